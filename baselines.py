"""The rivals of tree search distillation, in the same trainer: only where the answers come from differs.

    python baselines.py --method best-of-n    # the best of N samples teaches, as the search's choice would
    python baselines.py --method cispo        # groups of samples, advantage (R - mean) / std, CISPO loss
    python baselines.py --method grpo         # the same groups with PPO's clipped loss

Unlike in the post, the optimiser, schedule, KL, temperature and precision are those of the search, not TRL's defaults.
"""

import runtime.threads

import sys

if __name__ == "__main__":
    from runtime.cli import answer_help

    answer_help(__doc__, "best-of-n")

import numpy as np

from config import Config
from distill import group_advantages
from policy import Policy
from ppo import make_optimizer, sample_answers, set_rate, train, update
from runtime.cli import command, fail, given, normalized
from runtime.launch import Trainer, launch
from sampling import Collected, Problem, Sampler


def collect_best_of_n(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """The sample with the highest reward of each problem (the first of equals), with advantage R - V."""
    rows, usage = sample_answers(policy, sampler, problems, config.group.samples, config, rng)
    best = [max(row, key=lambda trajectory: trajectory.reward.value) for row in rows]
    return best, usage, {"solved": float(np.mean([t.reward.correct for t in best]))}


def collect_groups(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """All samples of a problem, with the group's advantages. Groups of equal rewards teach nothing and are left out."""
    rows, usage = sample_answers(policy, sampler, problems, config.group.samples, config, rng)
    taught = []
    for row in rows:
        advantages = group_advantages([t.reward.value for t in row])
        if advantages.any():
            for trajectory, advantage in zip(row, advantages):
                trajectory.advantages = [float(advantage)] * len(trajectory.completion)
            taught += row
    samples = [t for row in rows for t in row]
    metrics = {
        "sample_reward": float(np.mean([t.reward.value for t in samples])),
        "parsed": float(np.mean([t.reward.parsed for t in samples])),  # also where no group teaches
        "solved": float(np.mean([any(t.reward.correct for t in row) for row in rows])),
    }
    return taught, usage, metrics


COLLECTORS = {"best-of-n": collect_best_of_n, "cispo": collect_groups, "grpo": collect_groups}


def main(args: list[str]) -> None:
    args = normalized(args)
    if given(args, "--method", "") not in COLLECTORS and "--resume" not in args:
        fail(f"pass --method {' | '.join(COLLECTORS)}, and options of ppo.py")
    launch(args, "best-of-n", COLLECTORS, Trainer(train, update, make_optimizer, set_rate))


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
