"""Evaluation: a policy alone, or with search at test time against best-of-N at an equal budget of tokens.

    python evaluate.py runs/mcts-tiny-seed0                            # the policy alone: mean@16 and pass@16
    python evaluate.py assets/tiny --search mcts --budget 1024         # a tree a problem, up to 1,024 tokens each
    python evaluate.py assets/tiny --search best-of-n --budget 1024    # samples at the same budget; several: 64 256

mean@k is the post's metric: the share of k samples a problem that are exactly right, averaged over problems.
With a search one answer a problem is chosen, the one with the highest dense reward. The verifier of Countdown needs no
secret, so a deployed solver has it too. Inside a tree every wrong answer counts -1: with dense rewards a near
miss would attract all visits.
"""

import runtime.threads

import sys
from functools import partial

from config import SearchConfig
from mcts import plant, search
from policy import Policy
from runtime.cli import command
from runtime.evaluation import parse, run
from runtime.scores import Score, chunks, score_policy
from sampling import Problem, Sampler, SamplingParams, Trajectory, Usage, complete, shared_rows, stream


def score_search(
    policy: Policy,
    sampler: Sampler,
    problems: list[Problem],
    method: str,
    config: SearchConfig,
    seed: int = 0,
    progress: bool = False,
) -> Score:
    """One answer a problem, the best that `method` ("mcts" or "best-of-n") finds with config.token_budget tokens.

    Both count the tokens of each sample or step that they use. Both take samples as long as the next one fits, and stop
    at the first right answer (mcts: with config.until_right)."""
    rewards, usage = [], Usage()
    for chunk, seeds in chunks(problems, seed, method, progress):
        if method == "mcts":
            trees = plant(policy, chunk, seeds)
            used = search(trees, sampler, partial(policy.grade, exact=True), config)
            used.generated = sum(tree.generated for tree in trees)  # as best_of_budget counts
            rows = [[policy.grade(tree.problem, node.completion()) for node in tree.answers()] for tree in trees]
        else:
            samples, used = best_of_budget(policy, sampler, chunk, config, seeds)
            rows = [[t.reward for t in row] for row in samples]
        for problem, row in zip(chunk, rows, strict=True):
            rewards.append([max(row or [policy.grade(problem, [])], key=lambda reward: reward.value)])
        usage += used
    return Score.of(rewards, usage)


def best_of_budget(
    policy: Policy, sampler: Sampler, problems: list[Problem], config: SearchConfig, seeds: list[int]
) -> tuple[list[list[Trajectory]], Usage]:
    """For each problem the samples that config.token_budget pays for, drawn 8 at a time. Usage counts those samples
    alone, as if they had been drawn in one call."""
    rows: list[list[Trajectory]] = [[] for _ in problems]
    params = SamplingParams(8, config.max_tokens, config.temperature)
    unfinished, seconds, block = list(range(len(problems))), 0.0, 0
    while unfinished:
        chunk, streams = [problems[i] for i in unfinished], [stream(seeds[i], block) for i in unfinished]
        drawn, used = complete(policy, sampler, chunk, streams, params, policy.grade)
        for i, more in zip(unfinished, drawn, strict=True):
            rows[i] = within_budget(rows[i] + more, config.token_budget)
        block, seconds = block + 1, seconds + used.seconds
        unfinished = [i for i in unfinished if len(rows[i]) == 8 * block and not rows[i][-1].reward.correct]
    generated = sum(len(t.completion) for row in rows for t in row)
    decoded = sum(shared_rows([t.completion for t in row]) for row in rows)
    return rows, Usage(generated, sum(len(row[0].prompt) for row in rows), seconds, decoded=decoded)


def within_budget(samples: list[Trajectory], budget: int) -> list[Trajectory]:
    """The first samples that fit into a budget of tokens, at least one, and none after a right one."""
    spent = 0
    for count, sample in enumerate(samples):
        spent += len(sample.completion)
        if count and spent > budget:
            return samples[:count]
        if sample.reward.correct:
            return samples[: count + 1]
    return samples


if __name__ == "__main__":
    command(lambda: run(parse(sys.argv[1:]), score_policy, score_search))
