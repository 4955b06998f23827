"""Searched trees as JSON: what each step says, and what the search and the task know of it."""

import json
from pathlib import Path

from config import SearchConfig
from distill import most_visited_path
from mcts import Node, Tree
from policy import Policy
from runtime.files import write
from sampling import ask


def tree_to_dict(tree: Tree, policy: Policy, config: SearchConfig) -> dict:
    """The visited part of a tree, in numbers and text."""
    chosen = most_visited_path(tree, config)
    best = set(chosen.path()) if chosen else {tree.root}

    def visit(node: Node, steps: list[str]) -> dict:
        text = policy.decode(node.tokens).strip()
        if text and not node.ended:
            steps = [*steps, text]
        if node.reward:
            reachable = node.reward.correct
        else:
            reachable = ask(policy.chat.task, "reachable", tree.problem, steps)
        return {
            "text": text,
            "visits": node.visits,
            "q": node.q,
            "prior": node.prior,
            "value": node.value,
            "count": node.count,
            "reward": node.reward.value if node.reward else None,
            "reason": node.reward.reason if node.reward else None,
            "solvable": {True: "yes", False: "no", None: "unknown"}[reachable],
            "best": node in best,
            "children": [visit(child, steps) for child in node.children if child.visits],
        }

    return {"problem": str(tree.problem), "root": visit(tree.root, [])}


def dump(trees: list[Tree], policy: Policy, config: SearchConfig, file: Path) -> None:
    """Write trees as JSON."""
    write(file, json.dumps([tree_to_dict(tree, policy, config) for tree in trees]))
