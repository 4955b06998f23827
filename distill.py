"""What a searched tree teaches: the trajectories that --distill hands to the trainer.

    best-path      the path of most visits, right or wrong, advantage R - V (the post)
    best-answer    the answer with the highest reward, advantage R - V
    best-path-q    the most-visited path; the critic learns the tree's values Q instead of R
    best-path-tree the same, and the critic learns from every other answer of the tree too
    every-answer   every answer, advantage R - V; the critic learns the tree's values
    answers        every answer of the tree, advantage (R - mean) / std over them: the tree as a GRPO group
    steps          every answer, each step's tokens with advantage Q(child) - Q(parent)
    visits         every answer, each step's tokens with advantage pi(child) - mu(child): from the shares mu of the
                   siblings' samples (equal ones, if distinct) towards the shares pi of their visits, as AlphaZero

The last three train the critic on the tree's values too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mcts import Node, SearchConfig, Tree, child_statistics, gumbel_scores


@dataclass
class Lesson:
    """An answer of a tree, and what is to be learnt from its tokens."""

    answer: Node
    advantages: list[float] | None = None  # a token; None: the critic's R - V
    returns: list[float] | None = None  # a token: what the critic should say of the state before it; None: R
    critic_only: bool = False  # nothing for the policy


Teacher = Callable[[Tree, SearchConfig], list[Lesson]]


def best_path(tree: Tree, config: SearchConfig) -> Node | None:
    """The post's choice: follow the most-visited child (ties: the higher Q), here only into subtrees with a graded
    answer, so that the path never ends before one. With Gumbel, the first step is the one that sequential halving
    kept. None if the tree has no answer."""
    answered = {id(above) for node in tree.answers() for above in node.path()}
    if id(tree.root) not in answered:
        return None
    node = tree.root
    while node.children:
        children = [child for child in node.children if id(child) in answered]
        q, prior, visits = child_statistics(node, config)
        halved = config.selection == "gumbel" and node.parent is None
        scores = gumbel_scores(node, q, prior, visits) if halved else q
        ties = dict(zip(map(id, node.children), scores, strict=True))
        node = max(children, key=lambda child: (child.visits, ties[id(child)]))
    return node


def best_answer(tree: Tree, config: SearchConfig) -> Node | None:
    """The graded answer with the highest reward (ties: the more visits); None if the tree has no answer."""
    return max(tree.answers(), key=lambda node: (node.reward.value, node.visits), default=None)


def tree_values(answer: Node) -> list[float]:
    """Q of the state that each token of the way to an answer follows; inside a step, Q of the step."""
    return [q for parent, child in pairwise(answer.path()) for q in [parent.q, *[child.q] * (len(child.tokens) - 1)]]


def group_advantages(rewards: list[float]) -> np.ndarray:
    """(R - mean) / (std + 1e-4) over a group, sample deviation (GRPO, Shao et al. 2024; as in TRL); all 0 where rewards
    are equal, which teaches nothing (their mean may differ from them by rounding)."""
    values = np.asarray(rewards)
    if len(set(rewards)) < 2:
        return np.zeros(len(rewards))
    return (values - values.mean()) / (values.std(ddof=1) + 1e-4)


def answers(tree: Tree, config: SearchConfig) -> list[Lesson]:
    found = tree.answers()
    advantages = group_advantages([node.reward.value for node in found])
    pairs = zip(found, advantages.tolist()) if advantages.any() else []
    return [Lesson(node, [a] * node.length, tree_values(node)) for node, a in pairs]


def q_gain(parent: Node, child: Node) -> float:
    """Q(child) - Q(parent)."""
    return child.q - parent.q


def visit_gain(parent: Node, child: Node) -> float:
    """pi(child) - mu(child): the child's share of its siblings' visits less that of their samples."""
    visited, drawn = sum(c.visits for c in parent.children), sum(c.count for c in parent.children)
    return child.visits / visited - child.count / drawn


def step_by_step(advantage: Callable[[Node, Node], float]) -> Teacher:
    """Every answer, each of its steps' tokens with advantage(parent, child)."""

    def lesson(answer: Node) -> Lesson:
        steps = pairwise(answer.path())
        advantages = [advantage(parent, child) for parent, child in steps for _ in child.tokens]
        return Lesson(answer, advantages, tree_values(answer))

    return lambda tree, config: [lesson(answer) for answer in tree.answers()]


def alone(choose: Callable[[Tree, SearchConfig], Node | None], q: bool = False) -> Teacher:
    """The one answer that `choose` picks; its critic's targets are the tree's values if `q`."""

    def lessons(tree: Tree, config: SearchConfig) -> list[Lesson]:
        node = choose(tree, config)
        return [] if node is None else [Lesson(node, returns=tree_values(node) if q else None)]

    return lessons


def best_path_tree(tree: Tree, config: SearchConfig) -> list[Lesson]:
    """A critic that sees chosen paths alone never learns what a poor state looks like."""
    best = best_path(tree, config)
    return [Lesson(node, returns=tree_values(node), critic_only=node is not best) for node in tree.answers()]


def every_answer(tree: Tree, config: SearchConfig) -> list[Lesson]:
    return [Lesson(node, returns=tree_values(node)) for node in tree.answers()]


LESSONS: dict[str, Teacher] = {
    "best-path": alone(best_path),
    "best-answer": alone(best_answer),
    "best-path-q": alone(best_path, q=True),
    "best-path-tree": best_path_tree,
    "every-answer": every_answer,
    "answers": answers,
    "steps": step_by_step(q_gain),
    "visits": step_by_step(visit_gain),
}
