"""The critic against the truth: Countdown can be solved exactly from every state, so V(s) can be judged.

    python -m experiments.oracle assets/tiny runs/mcts-tiny-seed0 --out runs/critic.json
    python -m experiments.oracle assets/tiny --simulations 8 32 128 --children 2 8    # with searches

The states are those that the policy itself reaches: after every legal step of its own samples of validation problems.
For each state the file holds the critic's value, whether the target is still in reach, and the best reward in reach.

`--simulations` adds searches with three critics: the learned one, none (V = 0), and one that knows whether the target
is in reach. In a search a right answer is worth 1 and any other -1.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python experiments/oracle.py`

import runtime.threads

import numpy as np
import tyro

from config import TINY_TREE, SearchConfig, check, check_ranges
from countdown import Problem, follow, make_problems, reachable, solvable
from distill import most_visited_path
from mcts import Critic, plant, search
from policy import Policy
from runtime import cli
from runtime.files import check_writable, write
from runtime.loading import load_policy, locate
from runtime.provenance import provenance
from runtime.torch_sampler import TorchSampler, read_values
from sampling import STEP_END, SamplingParams, Usage, complete, stream

State = tuple[list[int], tuple[int, ...]]  # the tokens of an answer so far, and the numbers that are left


@dataclass
class OracleConfig:
    """Judge critics by the exact solver."""

    models: tyro.conf.Positional[tuple[str, ...]]  # run folders, saved policies
    simulations: tuple[int, ...] = ()  # of each search; none: no searches
    children: tuple[int, ...] = (TINY_TREE.children,)  # steps drawn at a node, in the searches
    problems: int = 200  # of the validation split
    samples: int = 8  # answers a problem
    temperature: float = 1.0
    max_tokens: int = 64  # tokens of an answer at most
    seed: int = 0
    out: Path = Path("runs/critic.json")

    def __post_init__(self):
        if not self.models:
            raise ValueError("name at least one model: a run folder, a policy's folder or a Hugging Face name")
        check(self, "at least", 1, "problems samples max_tokens children")
        if self.simulations:
            check(self, "at least", 1, "simulations")
        check(self, "above", 0, "temperature")
        check_ranges(seed=self.seed)
        check_writable(self.out)
        for model in self.models:
            locate(model)


# ------------------------------------------------------------------------------------------------ the truth


def states_of(policy: Policy, problem: Problem, completion: list[int]) -> list[State]:
    """The state at the end of each step, up to the first step that breaks a rule."""
    states, left, begin = [], tuple(sorted(problem.numbers)), 0
    for end in range(1, len(completion) + 1):
        text = policy.decode(completion[begin:end])
        if STEP_END in text:
            left = follow(left, text)
            if left is None:
                break
            states.append((completion[:end], left))
            begin = end
    return states


def best_reward(left: tuple[int, ...], target: int) -> float:
    """The highest dense reward of any value in reach."""
    return max(1 - 2 * min(abs(value - target) / target, 1) for value in reachable(left))


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """The area under the ROC curve: P(a positive's score exceeds a negative's), ties count half (Mann-Whitney). None
    where one class is missing."""
    ranks = np.empty(len(scores))
    for value in np.unique(scores):
        ties = scores == value
        ranks[ties] = (scores < value).sum() + (ties.sum() + 1) / 2
    positives, negatives = labels.sum(), (~labels).sum()
    if not positives or not negatives:
        return None
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def finder(policy: Policy, problems: list[Problem]) -> Callable[[list[int]], tuple[Problem, list[int]]]:
    """A function that takes a state's tokens apart, as a critic needs it: its problem, and the answer so far."""
    by_prompt = {tuple(policy.encode(problem)): problem for problem in problems}
    lengths = {len(prompt) for prompt in by_prompt}

    def find(tokens: list[int]) -> tuple[Problem, list[int]]:
        length = next(n for n in lengths if tuple(tokens[:n]) in by_prompt)
        return by_prompt[tuple(tokens[:length])], tokens[length:]

    return find


def perfect_critic(policy: Policy, problems: list[Problem]) -> Critic:
    """A critic for `search` that knows the truth: 1 where the target is in reach, -1 where it is not or a rule was
    broken."""
    find = finder(policy, problems)

    def value(tokens: list[int]) -> float:
        problem, completion = find(tokens)
        start = ([], tuple(sorted(problem.numbers)))
        legal, left = [start, *states_of(policy, problem, completion)][-1]
        return 1.0 if legal == completion and solvable(left, problem.target) else -1.0

    return lambda states: ([value(state) for state in states], Usage())


# ------------------------------------------------------------------------------------------------ judging


def judge(model: str, config: OracleConfig) -> dict:
    """What a model's critic says of the states that its policy reaches, and the truth; each state once."""
    policy = load_policy(model, train=False)
    problems, seeds = validation_problems(config)
    params = SamplingParams(config.samples, config.max_tokens, config.temperature)
    rows, _ = complete(policy, TorchSampler(policy), problems, seeds, params, policy.grade)
    states = {}  # prompt and answer so far -> numbers left and target
    for trajectory in (t for row in rows for t in row):
        for tokens, left in states_of(policy, trajectory.problem, trajectory.completion):
            states[tuple(trajectory.prompt + tokens)] = (left, trajectory.problem.target)
    if not states:
        raise ValueError(f"{model}: none of its samples holds a legal step, so there is no state to judge")
    values = np.array(read_values(policy, [list(state) for state in states])[0])
    in_reach = np.array([solvable(left, target) for left, target in states.values()])
    best = np.array([best_reward(left, target) for left, target in states.values()])
    correlation = float(np.corrcoef(values, best)[0, 1]) if values.std() > 0 and best.std() > 0 else None
    area = area_under_curve(values, in_reach)
    lines = [f"{len(states)} states, {in_reach.mean():.0%} solvable"]
    if area is not None:
        lines.append(f"area under the curve of V for solvability {area:.3f}")
    if correlation is not None:
        lines.append(f"correlation with the best reward in reach {correlation:.3f}")
    print(f"{model}: {', '.join(lines)}")
    return {
        "model": model,
        "states": len(states),
        "solvable": float(in_reach.mean()),
        "auc": area,
        "correlation": correlation,
        "numbers_left": [len(left) for left, _ in states.values()],
        "value": values.round(3).tolist(),
        "in_reach": in_reach.astype(int).tolist(),
        "best": best.round(3).tolist(),
        "searches": search_with_critics(policy, config) if config.simulations else [],
    }


def validation_problems(config: OracleConfig) -> tuple[list[Problem], list[int]]:
    """The problems, and a seed for each."""
    return make_problems(config.problems, "validation"), [stream(config.seed, i) for i in range(config.problems)]


def search_with_critics(policy: Policy, config: OracleConfig) -> list[dict]:
    """A row for each critic, number of children and of simulations: the share of trees with a right answer, the share
    whose best path is one, and the tokens of a tree."""
    problems, seeds = validation_problems(config)
    sampler, grade = TorchSampler(policy), partial(policy.grade, exact=True)
    critics = {
        "learned": sampler.values,
        "none": lambda states: ([0.0] * len(states), Usage()),
        "perfect": perfect_critic(policy, problems),
    }
    usual = SearchConfig(**vars(TINY_TREE), temperature=config.temperature, max_tokens=config.max_tokens)
    rows = []
    for name, children, simulations in product(critics, config.children, config.simulations):
        settings = replace(usual, children=children, simulations=simulations)
        trees = plant(policy, problems, seeds)
        usage = search(trees, sampler, grade, settings, critics[name])
        sampler.rest()
        paths = [most_visited_path(tree, settings) for tree in trees]
        row = {
            "critic": name,
            "children": children,
            "simulations": simulations,
            "solved": float(np.mean([tree.solved for tree in trees])),
            "path_right": float(np.mean([path is not None and path.reward.correct for path in paths])),
            "tokens": usage.generated / len(trees),
        }
        rows.append(row)
        print("  {critic} critic, {children} children, {simulations} simulations: ".format(**row), end="")
        print("right answer in {solved:.1%}, on the best path {path_right:.1%}, {tokens:.0f} tokens".format(**row))
    return rows


def main() -> None:
    config = cli.read_config(OracleConfig)
    rows = []
    for model in config.models:
        rows.append(judge(model, config))
        write(config.out, json.dumps({"critics": rows} | provenance()))


if __name__ == "__main__":
    cli.command(main)
