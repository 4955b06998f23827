"""What a searched tree teaches.

    best-path        the path of most visits, with advantage R - V (the post)

The other lessons, for comparison:

    best-answer      the answer with the highest reward, with advantage R - V
    best-path-q      the path of most visits; the critic learns the tree's values Q, not R
    best-path-tree   the same, and the critic learns from every other answer of the tree too
    every-answer     every answer, with advantage R - V; the critic learns the tree's values
    answers          every answer, with advantage (R - mean) / std over them: the tree as a GRPO group
    steps            every answer; the tokens of a step have advantage Q(child) - Q(parent)
    visits           every answer; the tokens of a step have advantage pi(child) - mu(child), after AlphaZero. pi is the
                     child's share of its siblings' visits, mu that of the policy

In the last three the critic learns the tree's values too. In all of them ppo.teaches_policy decides whether a wrong
answer teaches the policy.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from config import SearchConfig
from mcts import Node, Tree, child_arrays, priors
from sampling import Trajectory
from selection import gumbel_scores


def best_path(tree: Tree, config: SearchConfig) -> list[Trajectory]:
    """The post's lesson: the answer at the end of `most_visited_path`. Advantage and target are the critic's R - V
    and R."""
    answer = most_visited_path(tree, config)
    return [] if answer is None else [trajectory(tree, answer)]


def most_visited_path(tree: Tree, config: SearchConfig) -> Node | None:
    """Follow the most-visited child from the root to an answer; of children with equal visits, the one with the higher
    Q. None if the tree has no graded answer.

    Only subtrees with a graded answer are entered, so the path never ends before one. With Gumbel, equal
    visits of the root's children are decided by the score: the winner of sequential halving.
    """
    answered = {node for answer in tree.answers() for node in answer.path()}
    if tree.root not in answered:
        return None
    node = tree.root
    while node.children:
        scores = child_arrays(node, config).q
        if config.selection == "gumbel" and node is tree.root:
            scores = gumbel_scores(child_arrays(node, config), node.value or 0.0)
        children = [(child.visits, score, child) for child, score in zip(node.children, scores) if child in answered]
        node = max(children, key=lambda item: item[:2])[2]
    return node


def trajectory(tree: Tree, answer: Node, **teaches) -> Trajectory:
    """An answer of a tree as a trajectory; `teaches`: its advantages, returns and critic_only."""
    logprobs = [logprob for node in answer.path() for logprob in node.logprobs]
    return Trajectory(tree.problem, tree.prompt, answer.completion(), logprobs, answer.reward, **teaches)


# ------------------------------------------------------------------------------------------------ other lessons


def best_answer(tree: Tree, config: SearchConfig) -> list[Trajectory]:
    """The graded answer with the highest reward; of equal ones, the one with more visits."""
    answer = max(tree.answers(), key=lambda node: (node.reward.value, node.visits), default=None)
    return [] if answer is None else [trajectory(tree, answer)]


def best_path_q(tree: Tree, config: SearchConfig) -> list[Trajectory]:
    answer = most_visited_path(tree, config)
    return [] if answer is None else [trajectory(tree, answer, returns=tree_values(answer))]


def best_path_tree(tree: Tree, config: SearchConfig) -> list[Trajectory]:
    """A critic that sees best paths alone never learns what a poor state looks like."""
    best = most_visited_path(tree, config)
    return [trajectory(tree, a, returns=tree_values(a), critic_only=a is not best) for a in tree.answers()]


def every_answer(tree: Tree, config: SearchConfig) -> list[Trajectory]:
    return [trajectory(tree, answer, returns=tree_values(answer)) for answer in tree.answers()]


def answer_group(tree: Tree, config: SearchConfig) -> list[Trajectory]:
    graded = tree.answers()
    advantages = group_advantages([answer.reward.value for answer in graded]).tolist()
    if not any(advantages):
        return []
    return [
        trajectory(tree, answer, advantages=[advantage] * answer.length, returns=tree_values(answer))
        for answer, advantage in zip(graded, advantages)
    ]


def step_advantages(tree: Tree, config: SearchConfig) -> list[Trajectory]:
    return [stepwise(tree, answer, lambda parent, child: child.q - parent.q) for answer in tree.answers()]


def visit_advantages(tree: Tree, config: SearchConfig) -> list[Trajectory]:
    def visit_gain(parent: Node, child: Node) -> float:
        shares = visit_shares(parent) - policy_shares(parent, config)
        return shares[parent.children.index(child)]

    return [stepwise(tree, answer, visit_gain) for answer in tree.answers()]


def visit_shares(parent: Node) -> np.ndarray:
    """Each child's share of its siblings' visits, AlphaZero's policy target. [K]"""
    visits = np.array([child.visits for child in parent.children])
    return visits / max(visits.sum(), 1)


def policy_shares(parent: Node, config: SearchConfig) -> np.ndarray:
    """The policy over the children alone: pi(child) / sum of pi. With it as baseline the lesson is the gradient of the
    cross-entropy between the two shares: without a preference of the search nothing is learnt. [K]

    Prior `count` estimates it by the children's shares of independent draws.
    """
    return priors(parent.children, "count" if config.prior == "count" and config.cutoff is None else "sum")


def stepwise(tree: Tree, answer: Node, advantage: Callable[[Node, Node], float]) -> Trajectory:
    """An answer whose every token has the advantage(parent, child) of its step."""
    advantages = [advantage(parent, child) for parent, child in pairwise(answer.path()) for _ in child.tokens]
    return trajectory(tree, answer, advantages=advantages, returns=tree_values(answer))


def tree_values(answer: Node) -> list[float]:
    """The critic's targets for the tokens of an answer. V(s) is read before a token is written: the first token of a
    step gets Q of the parent node, the others get Q of the step's own node."""
    values = []
    for parent, child in pairwise(answer.path()):
        values += [parent.q] + [child.q] * (len(child.tokens) - 1)
    return values


def group_advantages(rewards: list[float]) -> np.ndarray:
    """(R - mean) / (std + 1e-4) over a group, with the sample deviation (GRPO, Shao et al. 2024; as in TRL). [n]

    All 0 where the rewards are equal: such a group teaches nothing.
    """
    values = np.asarray(rewards)
    if len(set(rewards)) < 2:  # the mean may differ from equal rewards by rounding
        return np.zeros(len(rewards))
    return (values - values.mean()) / (values.std(ddof=1) + 1e-4)


LESSONS: dict[str, Callable[[Tree, SearchConfig], list[Trajectory]]] = {
    "best-path": best_path,
    "best-answer": best_answer,
    "best-path-q": best_path_q,
    "best-path-tree": best_path_tree,
    "every-answer": every_answer,
    "answers": answer_group,
    "steps": step_advantages,
    "visits": visit_advantages,
}
