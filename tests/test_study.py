"""Tests of experiments/study.py: which runs there are, and that none is done twice, lost or left half done."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import pytest

import evaluate
from config import Config
from experiments import study, tables
from experiments.study import StudyConfig
from runtime import files, launch, run_folder

RESULTS = Path(study.__file__).parents[1] / "results"


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Programs that are only recorded: each writes a finished run unless its name is in `failing`."""
    calls, failing, lock = [], set(), Lock()
    monkeypatch.chdir(tmp_path)

    def run(command, env, **_):
        _, program, *options = command
        folder = Path(options[options.index("--out" if "--out" in options else "--resume") + 1])
        program = Path(program).name
        calls.append((program, options, env["OMP_NUM_THREADS"]))
        folder.mkdir(parents=True, exist_ok=True)
        if "--out" in options:
            with lock:  # tyro's messages are caught by a redirection of the whole process
                settings = study.settings_of([program, *options])
            (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        if folder.name in failing:
            (folder / "checkpoint").mkdir()
            return SimpleNamespace(returncode=2, stderr="a line\nerror: no luck\n")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "test_mean_at_k": 0.1}) + "\n", encoding="utf-8")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls, failing


def start(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["study.py", *args])
    study.main()


def test_what_is_done_is_skipped_and_what_was_interrupted_goes_on(programs, monkeypatch, capsys, tmp_path):
    """Prevents hours of runs done again, a failure that stops the others, and a half run among the results."""
    calls, failing = programs
    failing.add("cispo-seed2")
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, "compare", "--seeds", "2", "--methods", "mcts", "cispo")
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and error.startswith("error: 1 of 4 runs failed")
    assert "cispo-seed2: failed, error: no luck" in out and out.count(": done") == 3 and len(calls) == 4
    assert {path.name for path in (tmp_path / "results/compare").iterdir()} == {
        "mcts-seed1",
        "mcts-seed2",
        "cispo-seed1",
    }
    failing.clear()
    start(monkeypatch, "compare", "--seeds", "2", "--methods", "mcts", "cispo")
    share = str(max(1, os.cpu_count() // 2))  # of the cores, for each of two jobs
    assert calls[4:] == [("baselines.py", ["--resume", "runs/compare/cispo-seed2"], share)]


def test_a_run_without_a_checkpoint_is_left_to_the_program(programs, monkeypatch):
    """Prevents the loss of a run that another process is writing: the program asks for its lock, the study does not."""
    folder = Path("runs/compare/mcts-seed1")
    folder.mkdir(parents=True)
    command = dict(study.compare(StudyConfig("compare")))["mcts-seed1"]
    (folder / "config.json").write_text(json.dumps(study.settings_of(command.split())), encoding="utf-8")
    (folder / "trees").mkdir()
    start(monkeypatch, "compare", "--seeds", "1", "--methods", "mcts")
    assert programs[0][0][1] == ["--resume", str(folder)] and (folder / "trees").exists()


def test_ctrl_c_ends_the_study(programs, monkeypatch):
    """Prevents a study that begins its next runs, for hours, after Ctrl-C."""
    begun, over = threading.Event(), threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, **options):
            over.set() if wait else None
            super().shutdown(wait, **options)
            over.set()

    def interrupted(command, **_):
        programs[0].append(command)
        if len(programs[0]) == 1:
            begun.wait(60)
            time.sleep(0.3)  # a signal between Python's last look and the wait itself would be seen after the wait
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            over.wait(60)
        return SimpleNamespace(returncode=130, stderr="")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs with & is deaf to it
    monkeypatch.setattr(study, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(study, "as_completed", lambda futures: begun.set() or as_completed(futures))
    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(monkeypatch, "compare", "--jobs", "1")
    signal.signal(signal.SIGINT, before)
    assert len(programs[0]) == 1


def test_stages_leave_out_what_they_say(tmp_path):
    """Prevents hours of runs that nobody asked for, tests at 0.2 of runs that have no policy or have learnt the test's
    own problems, and a stage without distinct answers."""
    config = StudyConfig("cold", methods=("mcts",), out=tmp_path)
    files.write(tmp_path / "compare" / "mcts-seed2" / "metrics.jsonl", '{"step": 9, "stopped": "collapsed"}\n')
    names = dict(study.cold(config)).keys()
    assert "mcts-seed1" in names and not {"mcts-seed2", "cispo-seed1", "leaking-split-seed1"} & names
    assert len(dict(study.ablate(config))) == 3 * len(study.ABLATIONS) + 2  # answers-all has five seeds
    fresh = dict(study.fresh(StudyConfig("fresh", seeds=1)))
    distinct = {f"{method}-16x4-p0.3{end}-seed1" for method in ("best-of-n", "cispo") for end in ("", "-exact")}
    assert fresh.keys() == {"base", *(f"{method}-seed1" for method in study.METHODS), *distinct}
    assert {name.partition("-")[0] for name in dict(study.rivals(StudyConfig("rivals", methods=("none",))))} == {"none"}


def test_a_collapsed_run_is_a_result(programs, monkeypatch, capsys, tmp_path):
    """Prevents a setting that destroys the policy from being tried again with every start, and left out of what was
    tried."""

    def collapse(command, **_):
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(study.settings_of(command[1:])), encoding="utf-8")
        (folder / "metrics.jsonl").write_text(
            '{"step": 9, "generated": 90, "stopped": "collapsed"}\n', encoding="utf-8"
        )
        programs[0].append(command)
        return SimpleNamespace(returncode=3, stderr="error: step 9: collapsed\n")

    monkeypatch.setattr(subprocess, "run", collapse)
    for _ in range(2):
        start(monkeypatch, "compare", "--seeds", "1", "--methods", "mcts")
        assert capsys.readouterr().out == "mcts-seed1: done\n"
    assert len(programs[0]) == 1
    row = "| mcts-seed1 | 1 | collapsed | – | – | – | 0.00 M |"
    assert row in tables.validation_table([tmp_path / "results/compare/mcts-seed1"])


@pytest.mark.parametrize("where", ["runs", "results"])
def test_a_run_with_other_settings_is_not_taken_for_done(programs, monkeypatch, capsys, where):
    """Prevents a table of runs that are not what study.py says they are, after one of its settings was changed."""
    start(monkeypatch, "compare", "--seeds", "1", "--methods", "mcts")
    shutil.rmtree("results" if where == "runs" else "runs")
    monkeypatch.setattr(study, "BUDGET", "--tokens 1000000 --learning-rate 1e-4")
    with pytest.raises(ValueError, match=f"{where}/compare/mcts-seed1 .*learning_rate 0.0003 there, 0.0001 here"):
        start(monkeypatch, "compare", "--seeds", "1", "--methods", "mcts")
    assert len(programs[0]) == 1


def test_committed_runs_are_what_the_study_asks_for():
    """Prevents figures from runs that the study's own table would not make again, and hours of runs in the table that
    no figure has waited for."""
    finished = 0
    for stage, jobs in study.STAGES.items():
        for name, command in jobs(StudyConfig(stage)):
            study.check_settings(RESULTS / stage / name, command.split())
            finished += run_folder.finished(RESULTS / stage / name)
    assert finished >= 206
    for stage in ("tune", "compare", "samples"):
        runs = {folder.name for folder in (RESULTS / stage).iterdir()}
        assert runs == dict(study.STAGES[stage](StudyConfig(stage))).keys()
    for stage in study.EVALUATED:
        evaluations = {file.stem for file in (RESULTS / stage).iterdir()}
        assert evaluations and evaluations <= dict(study.STAGES[stage](StudyConfig(stage))).keys()


@pytest.mark.parametrize("stage", [stage for stage in study.STAGES if stage not in study.EVALUATED])
def test_every_command_is_a_configuration(stage, monkeypatch, tmp_path):
    """Prevents a study that fails in its third hour on an option, and two runs in one folder."""
    monkeypatch.chdir(tmp_path)  # in a clone where `make run` was first, its folder is in the way
    import baselines
    import ppo

    jobs, configs = list(study.STAGES[stage](StudyConfig(stage, seeds=2))), []
    assert len({name for name, _ in jobs}) == len(jobs) >= 2
    trainer = launch.Trainer(lambda config, *_: configs.append(config), None, None, None)
    monkeypatch.setattr(baselines, "Trainer", lambda *_: trainer)
    monkeypatch.setattr(launch, "recorded", lambda config: config)  # SmolLM2 is not here
    for _, command in jobs:
        program, *options = [*command.split(), "--preset", "tiny"]
        if program == "ppo.py":
            launch.launch(options, "mcts", ppo.COLLECTORS, trainer)
        else:
            baselines.main(options)
    assert len(configs) == len(jobs) and all(isinstance(config, Config) for config in configs)
    assert len({str(config) for config in configs}) == len(jobs)
    budget = {"chat": 400_000, "equal": 690_000}.get(stage, 1_000_000)
    assert {config.budget.tokens for config in configs} == {budget}


def test_a_search_is_measured_once(monkeypatch, tmp_path, capsys):
    """Prevents an option that evaluate.py does not have, an hour of searches done again, and a failure taken for a
    result."""
    calls = []

    def run(command, **_):
        config = evaluate.parse(command[2:])
        calls.append(config)
        if config.cutoff is not None:
            return SimpleNamespace(returncode=2, stderr="error: no luck\n")
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(asdict(config), default=str), encoding="utf-8")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(SystemExit):
            start(monkeypatch, "search", "--jobs", "1")
    assert "before-mcts-distinct: failed, error: no luck" in capsys.readouterr().out
    assert len(calls) == 9 + 3 and len({str(config) for config in calls}) == 9
    assert len(list((tmp_path / "results/search").iterdir())) == 6
    for folder in ("runs", "results"):
        for file in Path(folder, "search").iterdir():
            file.write_text(
                json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"temperature": 0.5}), encoding="utf-8"
            )
        with pytest.raises(ValueError, match=f"{folder}/search/before-best-of-n.json .*temperature 0.5 there, 1.0"):
            start(monkeypatch, "search")
        shutil.rmtree(folder)
