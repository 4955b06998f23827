"""The rivals of tree search distillation, in the same trainer: only where trajectories come from differs.

    python baselines.py --method best-of-n    # the best of N samples goes to the trainer that search would feed
    python baselines.py --method cispo        # groups of samples, advantage (R - mean) / std, CISPO loss
    python baselines.py --method grpo         # the same groups with the clipped PPO loss

Deviation from the post: optimiser, schedule, KL, temperature and precision are those of the search run, not TRL's
defaults; preset tiny has each method's own step, rate and reward. The options of ppo.py apply, but for a tree's.
"""

import sys

import numpy as np

import runs
from config import Config, given
from countdown import Problem
from distill import group_advantages
from policy import Policy
from ppo import Collected, run, sample_rows
from sampling import Sampler


def collect_best_of_n(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """The sample with the highest reward of each problem (the first of equals), advantage R - V as for search."""
    rows, usage = sample_rows(policy, sampler, problems, config.samples, config, rng)
    best = [max(row, key=lambda trajectory: trajectory.reward.value) for row in rows]
    return best, usage, {"solved": float(np.mean([t.reward.correct for t in best]))}


def collect_groups(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, rng) -> Collected:
    """All samples of each problem with the group advantage; groups of equal rewards teach nothing and are left out."""
    rows, usage = sample_rows(policy, sampler, problems, config.samples, config, rng)
    trained = []
    for row in rows:
        advantages = group_advantages([t.reward.value for t in row])
        if advantages.any():
            for trajectory, advantage in zip(row, advantages):
                trajectory.advantages = [float(advantage)] * len(trajectory.completion)
            trained += row
    everything = [t for row in rows for t in row]
    info = {
        "sample_reward": float(np.mean([t.reward.value for t in everything])),
        "parsed": float(np.mean([t.reward.parsed for t in everything])),  # also where no group teaches
        "solved": float(np.mean([any(t.reward.correct for t in row) for row in rows])),
    }
    return trained, usage, info


COLLECTORS = {"best-of-n": collect_best_of_n, "cispo": collect_groups, "grpo": collect_groups}


def main() -> None:
    args = sys.argv[1:]
    if given(args, "--search", ""):
        runs.fail("--method names the method here; --search belongs to ppo.py")
    names = {arg.partition("=")[0] for arg in args}
    if given(args, "--method", "") not in COLLECTORS and not {"--help", "-h", "--resume"} & names:
        runs.fail(f"pass --method {' | '.join(COLLECTORS)}, and options of ppo.py")
    args = [arg.replace("--method", "--search", 1) if arg.partition("=")[0] == "--method" else arg for arg in args]
    run(COLLECTORS, args, "best-of-n")


if __name__ == "__main__":
    runs.command(main)
