"""Searched trees as one interactive HTML page that needs nothing else.

    python -m experiments.plots tree RUN                         # RUN/trees.html: the tree of every evaluation
    python -m experiments.plots tree RUN/trees/000120.json       # RUN/trees/000120.html

The page draws a tree and replays its search: selection, expansion, evaluation and backup of each simulation. Several
problems get a menu, several moments of a problem a slider. A report or a notebook embeds it with <iframe srcdoc>, at
about 900 x 560 pixels. A model has written the text, so it reaches the page as data, never as markup.
"""

import json
from pathlib import Path

from runtime.files import KIT

TEMPLATE = KIT / "assets" / "explorer.html"
KEYS = {"problem", "moment", "settings", "simulations", "root"}  # of runtime.trees.tree_to_dict


def page(trees: list[dict]) -> str:
    """The HTML page of trees, each as `runtime.trees.tree_to_dict` makes it, in the order in which they are shown."""
    data = json.dumps(trees).replace("<", "\\u003c")  # so that no text ends the script element
    return TEMPLATE.read_text(encoding="utf-8").replace("__TREES__", data)


def read(file: Path) -> list[dict]:
    """The trees in a file RUN/trees/STEP.json. ValueError for another file."""
    try:
        trees = json.loads(file.read_text(encoding="utf-8"))
        if not trees or not all(KEYS <= tree.keys() for tree in trees):
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file} holds no trees: pass RUN/trees/STEP.json of a run with --search mcts") from None
    return trees
