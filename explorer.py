"""A searched tree to look at: as JSON, and as one HTML page that needs nothing else.

    python ppo.py --search mcts --dump-trees 4           # RUN/trees/000000.json …, the first 4 trees of each step
    python plots.py tree RUN/trees/000000.json           # RUN/trees/000000.html

The page shows each step's text, visits, Q, prior, critic, reward and whether the target is still in reach (the exact
oracle); the best path is marked. The text is a model's, so it reaches the page as data, never as markup.
"""

import json
from pathlib import Path

import runs
from countdown import follow, solvable
from distill import best_path
from mcts import Node, SearchConfig, Tree
from policy import Policy

PAGE = Path(__file__).parent / "assets" / "explorer.html"


def tree_to_dict(tree: Tree, policy: Policy, config: SearchConfig) -> dict:
    """The visited part of a tree, in numbers and text."""
    chosen = best_path(tree, config)
    best = {id(node) for node in chosen.path()} if chosen else {id(tree.root)}

    def visit(node: Node, left: tuple[int, ...] | None) -> dict:
        text = policy.decode(node.tokens).strip()
        if left is not None and text and not node.ended:
            left = follow(left, text)
        if node.reward:
            reachable = "yes" if node.reward.correct else "no"
        else:
            reachable = "unknown" if left is None else "yes" if solvable(left, tree.problem.target) else "no"
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
            "best": id(node) in best,
            "children": [visit(child, left) for child in node.children if child.visits],
        }

    problem = f"{' '.join(map(str, tree.problem.numbers))} → {tree.problem.target}"
    return {"problem": problem, "root": visit(tree.root, tuple(sorted(tree.problem.numbers)))}


def dump(trees: list[Tree], policy: Policy, config: SearchConfig, file: Path) -> None:
    """Write trees as JSON."""
    runs.write(file, json.dumps([tree_to_dict(tree, policy, config) for tree in trees]))


def read(file: Path) -> list[dict]:
    """Trees that `dump` wrote; ValueError for another file."""
    try:
        trees = json.loads(file.read_text())
        if not trees or not all("root" in tree and "problem" in tree for tree in trees):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{file} holds no trees: pass a file that --dump-trees wrote") from None
    return trees


def render(trees: list[dict]) -> str:
    """The HTML page of some trees from `tree_to_dict`."""
    data = json.dumps(trees).replace("<", "\\u003c")  # no text ends the script element
    return PAGE.read_text().replace("__TREES__", data)
