"""Searched trees as JSON: what each step says, and what the search and the exact solver know of it."""

import json
from pathlib import Path

from config import SearchConfig
from countdown import SOLVER_NUMBERS, follow, solvable
from distill import most_visited_path
from mcts import Node, Tree
from policy import Policy
from runtime.files import write


def tree_to_dict(tree: Tree, policy: Policy, config: SearchConfig) -> dict:
    """The visited part of a tree, in numbers and text."""
    chosen = most_visited_path(tree, config)
    best = set(chosen.path()) if chosen else {tree.root}

    def visit(node: Node, left: tuple[int, ...] | None) -> dict:
        text = policy.decode(node.tokens).strip()
        if left is not None and text and not node.ended:
            left = follow(left, text)
        if node.reward:
            reachable = "yes" if node.reward.correct else "no"
        else:
            known = left is not None and len(left) <= SOLVER_NUMBERS
            reachable = "unknown" if not known else "yes" if solvable(left, tree.problem.target) else "no"
        return {
            "text": text,
            "visits": node.visits,
            "q": node.q,
            "prior": node.prior,
            "value": node.value,
            "count": node.count,
            "reward": node.reward.value if node.reward else None,
            "reason": node.reward.reason if node.reward else None,
            "solvable": reachable,
            "best": node in best,
            "children": [visit(child, left) for child in node.children if child.visits],
        }

    problem = f"{' '.join(map(str, tree.problem.numbers))} → {tree.problem.target}"
    return {"problem": problem, "root": visit(tree.root, tuple(sorted(tree.problem.numbers)))}


def dump(trees: list[Tree], policy: Policy, config: SearchConfig, file: Path) -> None:
    """Write trees as JSON."""
    write(file, json.dumps([tree_to_dict(tree, policy, config) for tree in trees]))
