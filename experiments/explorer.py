"""A searched tree as one interactive HTML page that needs nothing else.

    python ppo.py --search mcts --dump-trees 4                  # RUN/trees/000000.json …, 4 trees of each step
    python -m experiments.plots tree RUN/trees/000000.json      # RUN/trees/000000.html

The page shows each step's text, visits, Q, prior, value, reward and whether the target is still in reach (by the exact
solver), and marks the best path. A model has written the text, so it reaches the page as data, never as markup.
"""

import json
from pathlib import Path

PAGE = Path(__file__).parents[1] / "assets" / "explorer.html"


def read(file: Path) -> list[dict]:
    """The trees that `runtime.trees.dump` wrote. ValueError for another file."""
    try:
        trees = json.loads(file.read_text(encoding="utf-8"))
        if not trees or not all("root" in tree and "problem" in tree for tree in trees):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{file} holds no trees: pass a file that --dump-trees wrote") from None
    return trees


def render(trees: list[dict]) -> str:
    """The HTML page of trees, each as `runtime.trees.tree_to_dict` makes it."""
    data = json.dumps(trees).replace("<", "\\u003c")  # so that no text ends the script element
    return PAGE.read_text(encoding="utf-8").replace("__TREES__", data)
