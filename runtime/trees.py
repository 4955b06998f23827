"""Searched trees as JSON: what each step says, what the search and the task know of it, and the record of the
simulations. With it `runtime/explorer.py` and the tests replay a search.

    N, Q of a node at simulation i     the backups of the simulations before its wave
    pending visits                     the simulations of its wave before i
"""

import json
from pathlib import Path

from config import SearchConfig
from distill import most_visited_path
from mcts import Node, Tree
from policy import Policy
from runtime.files import write
from sampling import ask

SETTINGS = ("selection", "c_puct", "unvisited", "virtual_loss", "answers")  # those that a replay needs


def tree_to_dict(tree: Tree, policy: Policy, config: SearchConfig, moment: str = "") -> dict:
    """A tree in numbers and text. `moment`: when in the training it was searched, such as "step 120".

    A node's `id` is its place in `tree.nodes()`. `simulations` has [root's visits before the wave, leaf's id] each.
    """
    chosen = most_visited_path(tree, config)
    best = set(chosen.path()) if chosen else {tree.root}
    ids = {node: i for i, node in enumerate(tree.nodes())}

    def visit(node: Node, steps: list[str]) -> dict:
        text = policy.decode(node.tokens).strip()
        steps = [*steps, text] if text and not node.ended else steps
        return {
            "id": ids[node],
            "text": text,
            "visits": node.visits,
            "q": node.q,
            "prior": node.prior,
            "value": node.value,
            "count": node.count,
            "ended": node.ended,
            "reward": node.reward.value if node.reward else None,
            "right": node.reward.correct if node.reward else None,
            "reason": node.reward.reason if node.reward else None,
            "solvable": reach(node, ask(policy.chat.task, "reachable", tree.problem, steps)),
            "best": node in best,
            "children": [visit(child, steps) for child in node.children],
        }

    return {
        "problem": str(tree.problem),
        "moment": moment,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "simulations": [[before, ids[leaf]] for before, leaf in tree.simulations],
        "root": visit(tree.root, []),
    }


def reach(node: Node, in_reach: bool | None) -> str:
    """Whether a right answer is in reach: yes, no, or unknown. `in_reach`: what the task says, None if unknown."""
    if node.reward:
        in_reach = node.reward.correct
    return {True: "yes", False: "no", None: "unknown"}[in_reach]


def dump(trees: list[Tree], policy: Policy, config: SearchConfig, file: Path, moment: str = "") -> None:
    """Write trees as JSON."""
    write(file, json.dumps([tree_to_dict(tree, policy, config, moment) for tree in trees]))
