"""What a run shows while it learns: answers to the same problems, and one problem's tree, at every evaluation.

RUN/samples.jsonl      at each evaluation a line for each of the first WATCHED validation problems: answer and verdict
RUN/trees/STEP.json    the tree of the first of them, for method mcts

Neither changes the run: their draws depend on the seed alone, and their tokens do not count.
"""

from functools import partial

from config import Config
from mcts import Tree, plant, search
from policy import Policy
from sampling import Problem, Progress, Sampler, SamplingParams, complete, stream

WATCHED = 8  # problems


def answers(
    policy: Policy, sampler: Sampler, problems: list[Problem], config: Config, progress: Progress
) -> list[dict]:
    """A row for each watched problem: one answer of the policy alone, drawn as in an evaluation."""
    watched = problems[:WATCHED]
    params = SamplingParams(1, config.task.max_tokens, config.measuring.eval_temperature)
    seeds = [stream(config.seed, i) for i in range(len(watched))]
    rows, _ = complete(policy, sampler, watched, seeds, params, policy.grade)
    return [
        {
            "step": progress.step,
            "share": progress.share,
            "generated": progress.generated,
            "problem": str(answer.problem),
            "text": policy.decode(answer.completion).strip(),
            "right": answer.reward.correct,
            "reward": answer.reward.value,
            "reason": answer.reward.reason,
        }
        for (answer,) in rows
    ]


def tree(policy: Policy, sampler: Sampler, problems: list[Problem], config: Config) -> Tree:
    """The tree of the first problem, searched as in training."""
    (planted,) = plant(policy, problems[:1], [stream(config.seed, 0)])
    search([planted], sampler, partial(policy.grade, exact=config.task.reward == "exact"), config.search)
    return planted
