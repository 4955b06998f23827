"""The task of a run: Countdown, or one of your own from a Python file.

    python ppo.py --search mcts --task my_task.py:Sums

NAME is a class without arguments, or an object, with the methods of `sampling.Task`. The file is your own code: it runs
when it is loaded, with all your rights, because you asked for it. Do not pass a file that you have not read. A run's
config.json records its place and its SHA-256, and `--resume` and evaluate.py load it again.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from config import Config, TaskConfig
from countdown import Countdown, make_splits
from runtime import data
from runtime.files import one_line, sha256
from runtime.run_folder import read_settings
from sampling import Problem, Reward, Task

METHODS = ("problems", "prompt", "grade")
HELP = "docs/your_task.md shows how to write a task"

# ------------------------------------------------------------------------------------------------ loading


def load_task(config: TaskConfig) -> Task:
    """The task that the settings name. ValueError, one line with the file and where there is one the line in it, for a
    file that holds no such task."""
    if config.task == "countdown":
        return Countdown(config.size)
    file, name = file_of(config.task), config.task.rpartition(":")[2]
    module = attempt(file, lambda: run_file(file))
    if not hasattr(module, name):
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise ValueError(f"{file} has no {name} (it has {', '.join(own) or 'nothing of its own'})")
    task = getattr(module, name)
    if isinstance(task, type):
        task = attempt(file, task)
    if missing := [method for method in METHODS if not callable(getattr(task, method, None))]:
        raise ValueError(f"{name} of {file} has no method {missing[0]}: {HELP}")
    attempt(file, lambda: check_task(task))
    return task


def file_of(task: str) -> Path:
    """The file of a task of one's own. ValueError if it is gone."""
    file = Path(task.rpartition(":")[0])
    if not file.is_file():
        raise ValueError(f"there is no file {file}: pass --task FILE.py:NAME with its place")
    return file


def run_file(file: Path) -> ModuleType:
    """The module of a file. Its name depends on the file alone, so that other processes can unpickle its classes."""
    name = f"task_{sha256(file)[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def attempt(file: Path, call: Callable[[], object]) -> object:
    """What a call into the code of a file returns. ValueError with the file's line for whatever it raises."""
    try:
        return call()
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
        place = f"{file}, line {lines[-1]}" if lines else f"{file}"
        raise ValueError(f"{place}: {type(error).__name__}: {one_line(error)}") from None


def check_task(task: Task) -> None:
    """TypeError or ValueError for a task whose first problem can't be asked or graded as `sampling.Task` says."""
    for split in ("train", "validation", "test"):
        problems = task.problems(split, 1)
        if not isinstance(problems, list) or not problems:
            raise ValueError(f"problems({split!r}, 1) must be a list of problems, not {problems!r}: {HELP}")
        hash(problems[0])
    if not is_chat(messages := task.prompt(problems[0])):
        raise ValueError(f"prompt must be a system message (or none) and a user message of text, not {messages!r}")
    reward = task.grade(problems[0], "")
    if not isinstance(reward, Reward) or not -1 <= reward.value <= 1:
        raise ValueError(f"grade must return a sampling.Reward with a value in [-1, 1], not {reward!r}")


def is_chat(messages: object) -> bool:
    """Whether something is a system message (or none) and a user message, both of text."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    roles = [message.get("role") for message in messages]
    texts = [message.get("content") for message in messages]
    return roles in (["user"], ["system", "user"]) and all(isinstance(text, str) for text in texts)


# ------------------------------------------------------------------------------------------------ files behind a run


def checksums(config: TaskConfig) -> dict[str, object]:
    """The SHA-256 of the files that a run's problems and task come from, for its provenance."""
    sums: dict[str, object] = {}
    if config.data:
        sums["data"] = data.checksums(config.data)
    if config.task != "countdown":
        sums["task"] = sha256(file_of(config.task))
    return sums


def is_that_of(task: str, run: Path) -> bool:
    """Whether the file of a task is, to the byte, the one that a run began with. ValueError if it is gone."""
    provenance = read_settings(run).get("provenance")
    return task == "countdown" or (isinstance(provenance, dict) and sha256(file_of(task)) == provenance.get("task"))


# ------------------------------------------------------------------------------------------------ problems of a run


def splits(task: Task, config: Config) -> dict[str, list[Problem]]:
    """The run's problems, by split: train, validation, test. ValueError for a split without a problem."""
    settings, measuring = config.task, config.measuring
    sizes = dict(train=settings.train_problems, validation=measuring.eval_problems, test=measuring.test_problems)
    if settings.data:  # all training problems are used
        own = data.read_splits(settings.data)
        return {name: own[name] if name == "train" else own[name][: sizes[name]] for name in sizes}
    if settings.split == "post":
        return make_splits("post", **sizes, size=settings.size)
    return {name: task.problems(name, count) for name, count in sizes.items()}


def remarks(problems: dict[str, list[Problem]], config: Config) -> list[str]:
    """What a run says of its problems, a line each."""
    if config.task.data:
        return [data.counts(problems, config), *data.remarks(problems, config.model)]
    if config.task.task == "countdown":
        return data.unfamiliar(problems["train"], config.model)
    train, lines = set(problems["train"]), []
    for split in ("validation", "test"):
        if shared := sum(problem in train for problem in problems[split]):
            lines.append(f"warning: {shared:,} of {len(problems[split]):,} {split} problems are training problems")
    return [f"problems: {', '.join(f'{len(rows):,} {split}' for split, rows in problems.items())}", *lines]
