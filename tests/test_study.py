"""Tests of study.py: which runs there are, and that none is done twice, lost or left half done."""

import json
import subprocess
from types import SimpleNamespace

import pytest

import study
from config import Config
from study import StudyConfig


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Programs that are only recorded: each writes a finished run unless its name is in `failing`."""
    calls, failing = [], set()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "CHOSEN", dict.fromkeys(study.PROGRAMS, "1e-3"))

    def run(command, env, **_):
        _, program, *options = command
        folder = study.Path(options[options.index("--out" if "--out" in options else "--resume") + 1])
        calls.append((program, options, env["OMP_NUM_THREADS"]))
        if folder.name in failing:
            (folder / "checkpoint").mkdir(parents=True)
            return SimpleNamespace(returncode=2, stderr="a line\nerror: no luck\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "test_mean_at_k": 0.1}) + "\n")
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
    start(monkeypatch, "compare", "--seeds", "2", "--methods", "mcts", "cispo")
    out = capsys.readouterr().out
    assert "cispo-seed2: failed, error: no luck" in out and out.count(": done") == 3 and len(calls) == 4
    assert {path.name for path in (tmp_path / "results/compare").iterdir()} == {
        "mcts-seed1",
        "mcts-seed2",
        "cispo-seed1",
    }
    failing.clear()
    start(monkeypatch, "compare", "--seeds", "2", "--methods", "mcts", "cispo")
    assert capsys.readouterr().out.count("done before") == 3
    assert calls[4:] == [("baselines.py", ["--resume", "runs/compare/cispo-seed2"], calls[0][2])]


def test_a_run_with_only_its_first_test_is_not_finished(tmp_path):
    """Prevents a run killed after the test before training from counting as done."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "test_mean_at_k": 0.1}) + "\n")
    assert not study.finished(tmp_path) and not study.finished(tmp_path / "nowhere")


@pytest.mark.parametrize("stage", study.STAGES)
def test_every_command_is_a_configuration(stage, monkeypatch):
    """Prevents a study that fails in its third hour on an option, and two runs in one folder."""
    import baselines
    import ppo

    monkeypatch.setattr(study, "CHOSEN", dict.fromkeys(study.PROGRAMS, "1e-4") | study.CHOSEN)
    jobs, found = list(study.STAGES[stage](StudyConfig(stage, seeds=2))), []
    assert len({name for name, _ in jobs}) == len(jobs) > 10
    monkeypatch.setattr(ppo, "train", lambda config, *_: found.append(config))
    for _, command in jobs:
        program, *options = command.split()
        monkeypatch.setattr("sys.argv", [program, *options, "--preset", "tiny"])
        ppo.run(ppo.COLLECTORS, options, "mcts") if program == "ppo.py" else baselines.main()
    assert len(found) == len(jobs) and all(isinstance(config, Config) for config in found)
    assert len({str(config) for config in found}) == len(jobs)
    assert {config.tokens for config in found} == {300_000 if stage == "tune" else 1_000_000}


@pytest.mark.parametrize("args", [["guess"], ["tune", "--methods", "dpo"], ["tune", "--jobs", "0"]])
def test_nonsense_is_one_line(args, monkeypatch, capsys):
    """Prevents a traceback, or a study of nothing."""
    with pytest.raises((SystemExit, ValueError)):
        start(monkeypatch, *args)
    assert capsys.readouterr().err.count("\n") <= 1
