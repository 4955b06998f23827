"""From play.py's command line to the players at the table."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tyro

from config import TINY, Config, SearchConfig, check, preset_for
from policy import Policy
from runtime.cli import read_config, restore
from runtime.evaluation import run_of
from runtime.loading import load_policy, locate, pick_device
from runtime.run_folder import read_settings
from runtime.tasks import load_task
from runtime.torch_sampler import TorchSampler
from sampling import Grade, Problem, Sampler, Task, ask


@dataclass
class Play:
    """Give the policy before and after training a problem: play.py [MODEL] 3 5 7 9 44. Without numbers it asks."""

    words: tyro.conf.Positional[tuple[str, ...]] = ()  # a model (default: the newest run), numbers, the target
    search: bool = False  # draw the trained policy's tree too
    samples: int = 64  # answers of each policy
    device: str = "auto"  # auto, cpu, cuda
    seed: int = 0

    def __post_init__(self):
        check(self, "at least", 1, "samples")
        check(self, "at least", 0, "seed")


@dataclass
class Player:
    name: str
    policy: Policy
    sampler: Sampler


@dataclass
class Table:
    """The players, the base first, and how they play."""

    players: list[Player]
    task: Task
    tree: SearchConfig
    exact: bool  # a near miss earns nothing
    settings: Play

    def parse(self, text: str) -> Problem:
        """The problem that a person has typed. ValueError for what is none."""
        return parse(self.task, text)

    def example(self) -> str:
        """A problem as one types it."""
        return str(self.task.problems("validation", 1)[0]).replace("→ ", "")

    def grade(self, policy: Policy) -> Grade:
        """The verifier, with the reward of the search in training."""
        return partial(policy.grade, exact=self.exact)


def sit_down(args: list[str]) -> tuple[Table, Problem | None]:
    """The table that a command line asks for, and its problem if it states one. ValueError, before anything is loaded,
    for a problem that is none."""
    settings = read_config(Play, args)
    model, words = split_words(settings.words)
    model = model or newest_run() or TINY
    config = config_of(model)
    task = load_task(config.task)
    problem = parse(task, " ".join(words)) if words else None
    names = [name for name in (base_of(model, config), model) if name]
    print(f"loading {' and '.join(names)} …")
    device = pick_device(settings.device)
    players = [sit(name, config, task, device) for name in names]
    tree = config.change(temperature=config.learning.temperature).search
    return Table(players, task, tree, config.task.reward == "exact", settings), problem


def split_words(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """The model and the words of the problem. The first word is the model unless it is a number."""
    if words and not words[0].rstrip(",").isdigit():
        return words[0], list(words[1:])
    return "", list(words)


def newest_run() -> str:
    """The folder of the newest run under runs/ with a policy; empty if there is none."""
    policies = [path for name in ("policy", "best") for path in Path("runs").glob(f"*/{name}")]
    newest = max(policies, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    run = newest.parent
    return str(run if (run / "policy").is_dir() else newest)


def config_of(model: str) -> Config:
    """The settings of the run that a model is, or those of the preset that fits it; always with a tree."""
    run = run_of(model)
    if not run:
        return preset_for("tiny" if locate(model)[0] == locate(TINY)[0] else "qwen1.5b", "mcts")
    config, _ = restore(Config, read_settings(run), run)
    if config.tree:
        return config
    usual = preset_for(config.preset, "mcts")
    return replace(config, method="mcts", group=None, tree=usual.tree, distill=usual.distill)


def parse(task: Task, text: str) -> Problem:
    """The problem that a text means. ValueError for what is none, and for a task that reads no texts."""
    problem = ask(task, "parse", text)
    if problem is None:
        raise ValueError("this task has no method parse: it reads no problems that are typed (docs/your_task.md)")
    return problem


def base_of(model: str, config: Config) -> str:
    """The model that training began with: of a run, or of an adapter; empty if it is not known."""
    folder, base = locate(model)
    return config.model if run_of(model) else base if base != folder else ""


def sit(name: str, config: Config, task: Task, device: str) -> Player:
    """A policy, loaded as the run had it, with a sampler."""
    machine = config.machine
    options = dict(train=False, template_options=config.task.template_options, task=task)
    policy = load_policy(name, 0, device, machine.dtype, machine.quantize, **options)
    return Player(name, policy, TorchSampler(policy))
