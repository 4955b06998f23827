"""The critic against the truth: Countdown can be solved exactly from every state, so V(s) can be judged.

    python oracle.py assets/tiny runs/mcts-tiny-seed0 --out results/critic.json

The states are those that the policy itself reaches: after every legal step of its own samples on validation problems.
For each, what the critic says, whether the target can still be reached, and the best reward that can.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import runs
from countdown import Problem, follow, make_problems, reachable
from loading import load_policy
from policy import Policy
from sampling import STEP_END, TorchSampler, complete, read_values, stream


@dataclass
class OracleConfig:
    """Hold critics against the exact solver."""

    models: tyro.conf.Positional[tuple[str, ...]]  # run folders, saved policies
    problems: int = 200  # of the validation split
    samples: int = 8
    temperature: float = 1.0
    max_tokens: int = 64
    seed: int = 0
    out: Path = Path("results/critic.json")


def states_of(policy: Policy, problem: Problem, completion: list[int]) -> list[tuple[list[int], tuple[int, ...]]]:
    """The tokens up to the end of each step, and the numbers then left; up to the first step that breaks a rule."""
    found, left, begin = [], tuple(sorted(problem.numbers)), 0
    for end in range(1, len(completion) + 1):
        text = policy.decode(completion[begin:end])
        if STEP_END in text:
            left = follow(left, text.replace("<step>", "").replace(STEP_END, "").strip())
            if left is None:
                break
            found.append((completion[:end], left))
            begin = end
    return found


def best_reward(left: tuple[int, ...], target: int) -> float:
    """The highest dense reward of any value in reach."""
    return max(1 - 2 * min(abs(value - target) / target, 1) for value in reachable(left))


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """P(a positive's score exceeds a negative's), ties count half (Mann-Whitney); NaN where one class is missing."""
    ranks = np.empty(len(scores))
    for value in np.unique(scores):
        same = scores == value
        ranks[same] = (scores < value).sum() + (same.sum() + 1) / 2
    positives, negatives = labels.sum(), (~labels).sum()
    if not positives or not negatives:
        return float("nan")
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


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
    values = np.array(read_values(policy, [list(state) for state in found])[0])
    solvable = np.array([target in reachable(left) for left, target in found.values()])
    best = np.array([best_reward(left, target) for left, target in found.values()])
    return {
        "model": model,
        "states": len(found),
        "solvable": float(solvable.mean()),
        "auc": area_under_curve(values, solvable),
        "correlation": float(np.corrcoef(values, best)[0, 1]) if values.std() > 0 else float("nan"),
        "numbers_left": [len(left) for left, _ in found.values()],
        "value": values.round(3).tolist(),
        "in_reach": solvable.astype(int).tolist(),
        "best": best.round(3).tolist(),
    }


def main() -> None:
    config = runs.read_config(OracleConfig)
    torch.manual_seed(config.seed)
    rows = []
    for model in config.models:
        row = judge(model, config)
        rows.append(row)
        print(
            f"{model}: {row['states']} states, {row['solvable']:.0%} solvable; area under the curve of V for "
            f"solvability {row['auc']:.3f}, correlation with the best reward in reach {row['correlation']:.3f}"
        )
    runs.write(config.out, json.dumps({"critics": rows} | runs.provenance()))


if __name__ == "__main__":
    runs.command(main)
