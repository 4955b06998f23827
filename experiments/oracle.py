"""The critic against the truth: Countdown can be solved exactly from every state, so V(s) can be judged.

    python oracle.py assets/tiny runs/mcts-tiny-seed0 --out runs/critic.json
    python oracle.py assets/tiny --simulations 8 32 128 --children 2 8    # and what search makes of which critic

The states are those that the policy itself reaches: after every legal step of its own samples on validation problems.
For each, what the critic says, whether the target can still be reached, and the best reward that can. Searches, where
a right answer is worth 1 and any other -1, are run with the learned critic, with none (V = 0), and with one that knows
whether the target is in reach.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import tyro

from runtime import cli
from runtime import files
from runtime import provenance
from config import check
from runtime.files import check_writable
from config import TINY_TREE
from countdown import Problem, check_game, follow, make_problems, reachable, solvable
from distill import most_visited_path
from runtime.loading import load_policy, locate
from mcts import search
from policy import Policy
from runtime.torch_sampler import TorchSampler, read_values
from sampling import STEP_END, Usage, complete, stream


@dataclass
class OracleConfig:
    """Hold critics against the exact solver."""

    models: tyro.conf.Positional[tuple[str, ...]]  # run folders, saved policies
    simulations: tuple[int, ...] = ()  # of searches with different critics
    children: tuple[int, ...] = (TINY_TREE.children,)  # a node, in these
    problems: int = 200  # of the validation split
    samples: int = 8
    temperature: float = 1.0
    max_tokens: int = 64
    seed: int = 0
    out: Path = Path("runs/critic.json")

    def __post_init__(self):
        if not self.models:
            raise ValueError("name at least one model: a run folder, a policy's folder or a Hugging Face name")
        check(self, "at least", 1, "problems samples max_tokens children" + " simulations" * bool(self.simulations))
        check(self, "above", 0, "temperature")
        check_game(seed=self.seed)
        check_writable(self.out)
        for model in self.models:
            locate(model)


def states_of(policy: Policy, problem: Problem, completion: list[int]) -> list[tuple[list[int], tuple[int, ...]]]:
    """The tokens up to the end of each step, and the numbers then left; up to the first step that breaks a rule."""
    found, left, begin = [], tuple(sorted(problem.numbers)), 0
    for end in range(1, len(completion) + 1):
        text = policy.decode(completion[begin:end])
        if STEP_END in text:
            left = follow(left, text)
            if left is None:
                break
            found.append((completion[:end], left))
            begin = end
    return found


def best_reward(left: tuple[int, ...], target: int) -> float:
    """The highest dense reward of any value in reach."""
    return max(1 - 2 * min(abs(value - target) / target, 1) for value in reachable(left))


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """P(a positive's score exceeds a negative's), ties count half (Mann-Whitney); None where one class is missing."""
    ranks = np.empty(len(scores))
    for value in np.unique(scores):
        same = scores == value
        ranks[same] = (scores < value).sum() + (same.sum() + 1) / 2
    positives, negatives = labels.sum(), (~labels).sum()
    if not positives or not negatives:
        return None
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def perfect(policy: Policy, problems: list[Problem]) -> Callable[[list[list[int]]], tuple[list[float], Usage]]:
    """A critic for `search` that knows: 1 where the target is in reach, else -1, and once a rule is broken."""
    asked = {tuple(policy.encode(problem)): problem for problem in problems}
    lengths = {len(prompt) for prompt in asked}

    def value(state: list[int]) -> float:
        length = next(n for n in lengths if tuple(state[:n]) in asked)
        problem, completion = asked[tuple(state[:length])], state[length:]
        legal = [([], tuple(sorted(problem.numbers))), *states_of(policy, problem, completion)]
        tokens, left = legal[-1]
        return 1.0 if tokens == completion and solvable(left, problem.target) else -1.0

    return lambda states: ([value(state) for state in states], Usage())


def search_with_critics(policy: Policy, config: OracleConfig) -> list[dict]:
    """For each critic, number of children and of simulations: the share of trees that hold a right answer, of those
    whose best path is one, and the tokens of a tree."""
    problems, sampler = make_problems(config.problems, "validation"), TorchSampler(policy)
    prompts = [policy.encode(problem) for problem in problems]
    critics = {
        "learned": sampler.values,
        "none": lambda states: ([0.0] * len(states), Usage()),
        "perfect": perfect(policy, problems),
    }

    found = []
    seeds = [stream(config.seed, i) for i in range(len(problems))]
    shared = replace(TINY_TREE, temperature=config.temperature, max_tokens=config.max_tokens)
    for name, children, simulations in product(critics, config.children, config.simulations):
        tree = replace(shared, children=children, simulations=simulations)
        trees, usage = search(problems, prompts, sampler, critics[name], partial(policy.grade, exact=True), tree, seeds)
        sampler.rest()
        paths = [most_visited_path(t, tree) for t in trees]
        row = {
            "critic": name,
            "children": children,
            "simulations": simulations,
            "solved": float(np.mean([t.statistics()["solved"] for t in trees])),
            "path_right": float(np.mean([path is not None and path.reward.correct for path in paths])),
            "tokens": usage.generated / len(trees),
        }
        found.append(row)
        print("  {critic} critic, {children} children, {simulations} simulations: ".format(**row), end="")
        print("right answer in {solved:.1%}, on the best path {path_right:.1%}, {tokens:.0f} tokens".format(**row))
    return found


def judge(model: str, config: OracleConfig) -> dict:
    """What a model's critic says of the states that its policy reaches, and the truth; each state once."""
    policy = load_policy(model, train=False)
    problems = make_problems(config.problems, "validation")
    seeds = [stream(config.seed, i) for i in range(len(problems))]
    rows, _ = complete(
        policy, TorchSampler(policy), problems, config.samples, seeds, config.max_tokens, config.temperature, "oracle"
    )
    found = {}
    for trajectory in (t for row in rows for t in row):
        for tokens, left in states_of(policy, trajectory.problem, trajectory.completion):
            found[tuple(trajectory.prompt + tokens)] = (left, trajectory.problem.target)
    if not found:
        raise ValueError(f"{model}: none of its samples holds a legal step, so there is no state to judge")
    values = np.array(read_values(policy, [list(state) for state in found])[0])
    in_reach = np.array([solvable(left, target) for left, target in found.values()])
    best = np.array([best_reward(left, target) for left, target in found.values()])
    correlation = float(np.corrcoef(values, best)[0, 1]) if values.std() > 0 and best.std() > 0 else None
    auc = area_under_curve(values, in_reach)
    told = [f"area under the curve of V for solvability {auc:.3f}"] if auc is not None else []
    told += [f"correlation with the best reward in reach {correlation:.3f}"] if correlation is not None else []
    print(f"{model}: {len(found)} states, {in_reach.mean():.0%} solvable; {', '.join(told)}")
    return {
        "model": model,
        "states": len(found),
        "solvable": float(in_reach.mean()),
        "auc": auc,
        "correlation": correlation,
        "numbers_left": [len(left) for left, _ in found.values()],
        "value": values.round(3).tolist(),
        "in_reach": in_reach.astype(int).tolist(),
        "best": best.round(3).tolist(),
        "searches": search_with_critics(policy, config) if config.simulations else [],
    }


def main() -> None:
    config = cli.read_config(OracleConfig)
    rows = []
    for model in config.models:
        rows.append(judge(model, config))
        files.write(config.out, json.dumps({"critics": rows} | provenance.provenance()))


if __name__ == "__main__":
    cli.command(main)
