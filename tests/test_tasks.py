"""Tests of a task of one's own: docs/your_task.md is executed, bad files are one line, a run keeps its task."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ppo
from config import TINY, TaskConfig
from countdown import Countdown, Problem
from runtime import cli, evaluation, tasks
from runtime.loading import load_policy
from sampling import Reward, Task, ask

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your_task.md").read_text(encoding="utf-8")
SUMS = ROOT / "docs" / "sums.py"
SMALL = "--steps 2 --tokens 0 --problems 8 --evaluations 1 --eval-problems 4 --test-problems 4 --test-samples 2"


def load(file: Path, name: str, text: str | None = None) -> Task:
    """The task of a file, which is written first if there is a text for it."""
    if text is not None:
        file.write_text(text, encoding="utf-8")
    return tasks.load_task(TaskConfig(f"{file}:{name}"))


def run(*words) -> str:
    """What a program of the kit prints, run from its root."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_shows_the_example_as_it_is():
    """Prevents a page whose code is not the code that runs."""
    assert SUMS.read_text(encoding="utf-8") in PAGE


def test_the_reward_of_the_page(tmp_path):
    """Prevents a first example that a reader copies and that fails."""
    (code,) = re.findall(r"```python\n(import re\n\nfrom countdown .*?)```", PAGE, re.S)
    task, problem = load(tmp_path / "all_numbers.py", "AllNumbers", code), Problem((2, 3, 5, 10), 25)
    some = "<answer> 5 * (2 + 3) </answer>"
    assert task.grade(Problem((2, 3, 5), 25), some).correct
    assert Countdown().grade(problem, some).correct and not task.grade(problem, some).correct


COMMANDS = re.findall(r"^python (ppo.py|baselines.py) (.*docs/sums.py.*--tokens.*)$", PAGE, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("program, options", COMMANDS, ids=[program for program, _ in COMMANDS])
def test_two_steps_of_another_task_train_a_policy_that_is_scored_with_it(program, options, tmp_path):
    """Prevents a trainer, a baseline or an evaluation that needs Countdown: the page's commands, two steps each."""
    options = re.sub(r"--(tokens|out) \S+", "", options).split()
    run(program, *options, *SMALL.split(), "--out", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert settings["task"]["task"] == f"{SUMS}:Sums"
    trained, start = load_policy(tmp_path / "run", train=False), load_policy(TINY, train=False)
    pairs = zip(trained.lm.parameters(), start.lm.parameters(), strict=True)
    assert not all(torch.equal(ours, before) for ours, before in pairs)
    run("evaluate.py", tmp_path / "run", "--problems", 20, "--out", tmp_path / "scores.json")
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert result["task"] == f"{SUMS}:Sums" and result["scores"][0]["mean_at_k"] > 0.1  # of Countdown 0.03


RECORDS = """
from dataclasses import dataclass
from sampling import Reward
@dataclass(frozen=True)
class Digit:
    value: int
class Digits:
    def problems(self, split, count): return [Digit(i) for i in range(3)][:count]
    def prompt(self, problem): return [{"role": "user", "content": f"Numbers: {problem.value} Target: 7"}]
    def grade(self, problem, text): return Reward(1.0, True, True, "fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["ppo.py --cluster local", "-m torch.distributed.run --nproc-per-node 2 ppo.py"])
def test_other_processes_have_the_task(start, tmp_path):
    """Prevents generators and ranks that can't unpickle a problem of a class in the user's file, or take Countdown."""
    if "cluster" in start:
        pytest.importorskip("ray")
    (tmp_path / "digits.py").write_text(RECORDS, encoding="utf-8")
    task = f"--task {tmp_path}/digits.py:Digits --search none --device cpu"
    run(*start.split(), *task.split(), *SMALL.split(), "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["test_mean_at_k"] == rows[-2]["correct"] == 1.0


# ------------------------------------------------------------------------------------------------ bad files

CLASS = """
from sampling import Reward
class Fine:
    def problems(self, split, count): return ["a"]
    def prompt(self, problem): return [{"role": "user", "content": "Numbers: 1"}]
    def grade(self, problem, text): return Reward(-1.0, False, False, "no")
"""


@pytest.mark.parametrize("name, text, message", [
    ("Fine", CLASS + "class Fine(", r"task.py, line 7: "),
    ("Fine", "import nothing_of_this_name", r"task.py, line 1: ModuleNotFoundError: No module named"),
    ("Fine", CLASS + "raise SystemExit(3)", r"task.py, line 7: SystemExit: 3"),
    ("Missing", CLASS, r"task.py has no Missing \(it has Fine\)"),
    ("Missing", "", r"task.py has no Missing \(it has nothing of its own\)"),
    ("Fine", CLASS.replace("def grade", "def grades"), r"Fine of .*task.py has no method grade: docs/your_task.md"),
    ("Fine", CLASS.replace("class Fine:", "class Fine:\n    def __init__(self, file): pass\n"), "TypeError: .*'file'"),
    ("Fine", CLASS.replace('return ["a"]', "return 1 / 0"), r"task.py, line 4: ZeroDivisionError"),
    ("Fine", CLASS.replace('return ["a"]', "return []"), r"\('train', 1\) must be a list of problems, not \[\]"),
    ("Fine", CLASS.replace('return ["a"]', "return [[1]]"), r"unhashable type: 'list'"),
    ("Fine", CLASS.replace("user", "assistant"), r"prompt must be a system message \(or none\) and a user message"),
    ("Fine", CLASS.replace('"Numbers: 1"', "None"), r"prompt must be a system message \(or none\) and a user message"),
    ("Fine", CLASS.replace('[{"role": "user", "content": "Numbers: 1"}]', '"Numbers: 1"'), r"prompt must be"),
    ("Fine", CLASS.replace('Reward(-1.0, False, False, "no")', "0.5"), r"grade must return a sampling.Reward"),
    ("Fine", CLASS.replace("-1.0", "-7.0"), r"grade must return a sampling.Reward with a value in \[-1, 1\]"),
])  # fmt: skip
def test_a_bad_task_is_one_line_that_names_the_place(tmp_path, name, text, message):
    """Prevents a traceback through the kit for a slip in the user's own file, or one that shows hours later."""
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "task.py", name, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    ("--task nowhere.py:Sums", "there is no file .*nowhere.py"),
    ("--task docs/sums.py", "task must be countdown or FILE.py:NAME"),
    ("--task sums", "task must be countdown or FILE.py:NAME"),
    ("--task docs/sums.py:Sums --size 3", "--size has no effect here .--task brings its own problems"),
    ("--task docs/sums.py:Sums --data x", "--data has no effect here .--task brings its own problems"),
])  # fmt: skip
@pytest.mark.parametrize("program", ["ppo", "evaluate"])
def test_bad_options_are_refused(program, options, message, tmp_path, capsys, monkeypatch):
    """Prevents settings of Countdown that another task is silently trained or measured without."""
    monkeypatch.chdir(ROOT)

    def main():
        if program == "ppo":
            config, _ = cli.parse([*options.split(), "--out", str(tmp_path / "run")], "mcts")
            tasks.load_task(config.task)
        else:
            evaluation.load(evaluation.parse(options.split()))

    with pytest.raises(SystemExit) as stop:
        cli.command(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------ a run keeps its task


def test_a_resumed_run_keeps_its_task(tiny_config, tmp_path, capsys):
    """Prevents a run that goes on with another task, and a policy that is scored with another one."""
    file = tmp_path / "sums.py"
    (tmp_path / "moved").mkdir()
    file.write_text(SUMS.read_text(encoding="utf-8"), encoding="utf-8")
    config = tiny_config("none", task=f"{file}:Sums", steps=1, tokens=0, evaluations=0, test_before=False)
    ppo.train(config, ppo.COLLECTORS["none"])
    run = str(config.folder)
    assert cli.parse(["--resume", run], "none")[0] == config
    assert evaluation.parse([run, "--max-tokens", "8"]).task == f"{file}:Sums"
    assert evaluation.parse([run, "--task", "countdown"]).task == "countdown"
    moved = file.rename(tmp_path / "moved" / "sums.py")
    with pytest.raises(ValueError, match="there is no file .*sums.py"):
        cli.parse(["--resume", run], "none")
    assert cli.parse(["--resume", run, "--task", f"{moved}:Sums"], "none")[0].task.task == f"{moved}:Sums"
    file.write_text("# another one\n" + moved.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.parse(["--resume", run], "none")
    assert "sums.py has changed since the run began): --force" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sums.py has changed since .*: pass --task"):
        evaluation.parse([run, "--max-tokens", "8"])


def test_problems_that_are_in_two_splits_are_told(tiny_config):
    """Prevents a score on training problems that nobody knows of."""
    problems = {"train": [1, 2, 3], "validation": [4], "test": [3, 5]}
    config = tiny_config("none", task=f"{SUMS}:Sums")
    assert tasks.remarks(problems, config) == [
        "problems: 3 train, 1 validation, 2 test",
        "warning: 1 of 2 test problems are training problems",
    ]


# ------------------------------------------------------------------------------------------------ optional methods


def test_countdown_has_the_optional_methods():
    """Prevents a play or an explorer that shows a wrong solution, or calls a lost position won."""
    task, problem = Countdown(), Problem((3, 5, 7, 9), 44)
    assert str(problem) == "3 5 7 9 → 44" and task.parse("3 5 7 9 44") == task.parse(str(problem)) == problem
    assert task.grade(problem, f"<answer> {task.solution(problem)} </answer>").correct
    assert task.solution(Problem((2, 3), 7)) is None and task.solution(Problem((1,) * 6, 6)) is None
    assert task.reachable(problem, []) and task.reachable(problem, ["<step> 5 * 7 = 35 left 3 9 35 </step>"])
    assert not task.reachable(problem, ["3 * 5 = 15", "7 * 15 = 105"])
    assert task.reachable(problem, ["3 * 5 = 16"]) is None and task.reachable(Problem((1,) * 6, 6), []) is None
    for text in ("", "44", "3 5 x", "3 5 -1", "0 5", "3.0 5", "9999999999 1"):
        with pytest.raises(ValueError, match="a problem is numbers from 1 to 999,999,999, the target last"):
            task.parse(text)


def test_a_task_may_lack_them(tmp_path):
    """Prevents a crash where a task has the three methods alone."""
    task = load(tmp_path / "task.py", "Fine", CLASS)
    assert ask(task, "solution", "a") is None and ask(Countdown(), "solution", Problem((2, 3), 5)) == "2 + 3"
    assert isinstance(task.grade("a", ""), Reward)
