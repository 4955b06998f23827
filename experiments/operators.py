"""What finds right answers with the same policy and the same tokens: samples, a beam, a tree, and how good its critic
must be.

    python -m experiments.operators assets/tiny --out results/operators/tiny-4.json

An operator is a way to spend tokens on a problem. All stop at the first right answer. A row holds the tokens that each
problem took until then, so one search gives the solved share at every smaller budget.

    samples            independent answers, one after another
    beam N             N distinct answers in one draw (stochastic beam search); all of its tokens count
    tree K, critic     pUCT with K distinct children and V = 0, the learned critic, or the truth with an error

The truth is whether the target is still in reach (exact solver): V = 1 or -1. A critic with error e says the opposite
in a share e of the states. `--shared` lets states with the same numbers left err together, as real critics do.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python experiments/operators.py`

import runtime.threads

import tyro

from config import TINY_TREE, SearchConfig, check, check_ranges
from countdown import Countdown, Problem, follow, make_problems, solvable
from evaluate import best_of_budget
from experiments.oracle import finder
from mcts import Critic, plant, search
from policy import Policy
from runtime import cli
from runtime.files import check_writable, write
from runtime.loading import load_policy
from runtime.provenance import provenance
from runtime.torch_sampler import TorchSampler
from sampling import STEP_END, SamplingParams, Usage, complete, stream

CHUNK = 100  # problems searched together


@dataclass
class OperatorsConfig:
    """Compare operators at equal tokens."""

    model: tyro.conf.Positional[str] = "assets/tiny"
    problems: int = 400  # of the validation split
    size: int = 4  # numbers in a problem
    budget: int = 4_000  # tokens a problem at most
    beams: tuple[int, ...] = (4, 16, 48)  # distinct answers
    trees: tuple[int, ...] = (4, 16)  # children of a node
    cutoffs: tuple[float, ...] = (0.3, 0.05)  # of each tree; a beam has the last one
    errors: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)  # of the critic that knows the truth
    shared: bool = False  # states with the same numbers left err together
    seed: int = 0
    out: Path = Path("runs/operators.json")

    def __post_init__(self):
        check(self, "at least", 1, "problems budget beams trees")
        check(self, "at least", 0, "errors cutoffs")
        check(self, "at most", 1, "errors cutoffs")
        check_ranges(size=self.size, seed=self.seed)
        if len(self.trees) != len(self.cutoffs):
            raise ValueError("each tree needs a cutoff: give as many values to --cutoffs as to --trees")
        check_writable(self.out)


# ------------------------------------------------------------------------------------------------ critics


def share_of(*keys: object) -> float:
    """A number in [0, 1) that depends on the keys alone."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") / 2**64


def numbers_left(policy: Policy, problem: Problem, completion: list[int]) -> tuple[int, ...] | None:
    """The numbers after the steps of an answer; None after a step that breaks a rule."""
    left: tuple[int, ...] | None = tuple(sorted(problem.numbers))
    for step in policy.decode(completion).split(STEP_END)[:-1]:
        left = follow(left, step) if left else None
    return left


def erring_critic(policy: Policy, problems: list[Problem], error: float, shared: bool, seed: int) -> Critic:
    """V = 1 where the target is in reach, else -1; in a share `error` of the states the opposite."""
    find = finder(policy, problems)

    def value(state: list[int]) -> float:
        problem, completion = find(state)
        left = numbers_left(policy, problem, completion)
        truth = left is not None and solvable(left, problem.target)
        errs = share_of(seed, problem, left if shared else tuple(completion)) < error
        return 1.0 if truth != errs else -1.0

    return lambda states: ([value(state) for state in states], Usage())


# ------------------------------------------------------------------------------------------------ operators

Tokens = list[int | None]  # of each problem until its first right answer, None if there was none
Operator = Callable[[list[Problem], list[int]], Tokens]


def by_samples(policy: Policy, sampler, budget: int, problems: list[Problem], seeds: list[int]) -> Tokens:
    """Independent answers until one is right or the budget is spent."""
    rows, _ = best_of_budget(policy, sampler, problems, SearchConfig(max_tokens=64, token_budget=budget), seeds)
    return [sum(len(t.completion) for t in row) if row[-1].reward.correct else None for row in rows]


def by_beam(policy: Policy, sampler, n: int, cutoff: float, problems: list[Problem], seeds: list[int]) -> Tokens:
    """n distinct answers of each problem, drawn together; equal beginnings count once."""
    tokens: Tokens = []
    for problem, seed in zip(problems, seeds):  # one by one: the sampler counts the tokens of a call
        (row,), usage = complete(policy, sampler, [problem], [seed], SamplingParams(n, 64, cutoff=cutoff), policy.grade)
        tokens.append(usage.generated if any(answer.reward.correct for answer in row) else None)
    return tokens


def by_tree(
    policy: Policy, sampler, settings: SearchConfig, critic: Critic, problems: list[Problem], seeds: list[int]
) -> Tokens:
    """A tree of each problem until it holds a right answer or its budget is spent."""
    trees = plant(policy, problems, seeds)
    search(trees, sampler, partial(policy.grade, exact=True), settings, critic)
    return [tree.generated if tree.solved else None for tree in trees]


def operators(policy: Policy, problems: list[Problem], config: OperatorsConfig) -> dict[str, Operator]:
    """The operators by name."""
    sampler = TorchSampler(policy)
    found: dict[str, Operator] = {"samples": partial(by_samples, policy, sampler, config.budget)}
    for n in config.beams:
        found[f"beam {n}"] = partial(by_beam, policy, sampler, n, config.cutoffs[-1])
    critics = {"none": lambda states: ([0.0] * len(states), Usage()), "learned": sampler.values}
    for error in config.errors:
        critics[f"error {error:g}"] = erring_critic(policy, problems, error, config.shared, config.seed)
    usual = SearchConfig(**vars(TINY_TREE), max_tokens=64, token_budget=config.budget, until_right=True)
    for children, cutoff in zip(config.trees, config.cutoffs):
        settings = replace(usual, children=children, cutoff=cutoff, simulations=1_024, workers=1)
        for name, critic in critics.items():
            found[f"tree {children}, {name}"] = partial(by_tree, policy, sampler, settings, critic)
    return found


def main() -> None:
    config = cli.read_config(OperatorsConfig)
    policy = load_policy(config.model, train=False, task=Countdown(config.size))
    problems = make_problems(config.problems, "validation", size=config.size)
    seeds = [stream(config.seed, i) for i in range(config.problems)]
    rows: dict[str, Tokens] = {}
    for name, operator in operators(policy, problems, config).items():
        began, rows[name] = time.perf_counter(), []
        for start in range(0, len(problems), CHUNK):
            chunk = slice(start, start + CHUNK)
            rows[name] += operator(problems[chunk], seeds[chunk])
        settings = {key: value for key, value in asdict(config).items() if key != "out"}
        write(config.out, json.dumps({"settings": settings, "tokens": rows, "provenance": provenance()}))
        solved = [tokens for tokens in rows[name] if tokens is not None]
        seconds = time.perf_counter() - began
        print(f"{name}: {len(solved) / len(problems):.1%} solved within {config.budget} tokens, {seconds:.0f} s")


if __name__ == "__main__":
    cli.command(main)
