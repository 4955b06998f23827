"""Figures from run folders, for the README and the notebooks, and the command that prints the tables of tables.py.

    python -m experiments.plots curves results/compare/*                       # validation mean@k against tokens
    python -m experiments.plots forest results/ablate/* results/compare/mcts*  # leads over the usual search
    python -m experiments.plots search results/search/*                        # problems solved at test time, by tokens
    python -m experiments.plots table results/compare/*                        # test scores, a row a run
    python -m experiments.plots summary results/compare/*                      # test scores and cost, a row a method
    python -m experiments.plots tokens results/decoded/*                       # generated and decoded, a row a method
    python -m experiments.plots overview results/compare/*                     # the README's table: two temperatures
    python -m experiments.plots validation results/targets/*                   # validation scores, the best first
    python -m experiments.plots scores results/cold/*                          # what evaluate.py wrote, a row a policy
    python -m experiments.plots tree RUN                                       # an interactive page: RUN/trees.html
    python -m experiments.plots report RUN                                     # RUN/report.html: a run on one page

`--out` names the file of a figure, else it is curves.png.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python experiments/plots.py`

import runtime.threads

import numpy as np
import tyro
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from config import check_choices
from experiments.tables import TABLES, along, by_method, lead, pass_at, read_scores, tested
from runtime import cli, explorer
from runtime.files import check_writable, write
from runtime.run_folder import log_of
from runtime.run_report import write_report

COLORS = {"mcts": "#0b6e4f", "best-of-n": "#c8553d", "cispo": "#3d5a80", "grpo": "#7a6c9d", "none": "#e09f3e"}
GRAY = "#8d99ae"
ALONG = {
    "generated": "generated tokens",
    "decoded": "decoded tokens",
    "seconds": "seconds of training",
    "cpu_seconds": "CPU seconds of training",
}
REACH = {"yes": "#cfe8d5", "no": "#f3d3cd", "unknown": "#e6e6e6"}


def learning_curves(folders: list[Path], x: str = "generated", axes=None):
    """Validation score against `x` (of ALONG): for each method the mean over seeds, in a band from the lowest seed to
    the highest. Returns the matplotlib figure."""
    groups = by_method(folders)
    styles = line_styles(groups)
    curves, ks = defaultdict(list), set()
    for name, group in groups.items():
        for _, rows in group:
            points = [(at, 100 * row["eval_mean"]) for at, row in zip(along(rows, x), rows) if "eval_mean" in row]
            ks |= {str(row["eval_k"]) for row in rows if "eval_k" in row}
            if points and points[-1][0]:
                curves[name].append(tuple(zip(*points)))
    if not curves:
        raise ValueError(f"none of the runs has been evaluated yet (no eval_mean by {ALONG[x]})")
    if axes is None:
        _, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, seeds in curves.items():
        start, end = max(min(xs) for xs, _ in seeds), min(max(xs) for xs, _ in seeds)
        grid = np.linspace(start, end, 50)
        scores = np.array([np.interp(grid, xs, ys) for xs, ys in seeds])  # [seeds, 50]
        label = f"{name} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
        axes.plot(grid, scores.mean(0), styles[name], color=color_of(name), linewidth=2.2, label=label)
        axes.fill_between(grid, scores.min(0), scores.max(0), color=color_of(name), alpha=0.15, linewidth=0)
    axes.set_xlabel(ALONG[x])
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel(f"validation mean@{'/'.join(sorted(ks))}, %")
    axes.set_ylim(bottom=0)
    return add_legend(axes)


def line_styles(names) -> dict[str, str]:
    """A line style for each row, another one for each row of a method."""
    unused = defaultdict(lambda: cycle(["-", "--", ":", "-."]))
    return {name: next(unused[method_of(name)]) for name in names}


def method_of(name: str) -> str:
    """The method in a row's name: cispo of "cispo, samples 8"."""
    return name.partition(",")[0]


def color_of(name: str) -> str:
    return COLORS.get(method_of(name), GRAY)


def add_legend(axes, **options):
    """Give a figure its legend, and take its frame away. Returns the figure."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, **options)
    return axes.figure


def pass_curves(policies: dict[str, np.ndarray], samples: int, axes):
    """pass@k against k: for each policy's shares, as for `pass_at`, the mean over seeds, in a band from the lowest seed
    to the highest. Returns the matplotlib figure."""
    ks = range(1, samples + 1)
    for name, shares in policies.items():
        curves = 100 * pass_at(shares, samples)  # [seeds, samples]
        axes.plot(ks, curves.mean(0), color=color_of(name), linewidth=2.2, label=name)
        axes.fill_between(ks, curves.min(0), curves.max(0), color=color_of(name), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("samples a problem, k")
    axes.set_ylabel("pass@k, % of test problems")
    return add_legend(axes)


def search_curves(files: list[Path]):
    """Problems solved against the tokens that a search has generated (left) and decoded (right) for each, with 95 %
    intervals over problems, from `evaluate.py --out` files with several budgets. A policy has a line style, a number of
    children a shade. Returns the matplotlib figure."""
    _, panels = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True, layout="constrained")
    results = [read_scores(file) for file in files]
    models = list(dict.fromkeys(result["model"] for result in results))
    widths = sorted({result["tree"]["children"] for result in results if result["method"] == "mcts"})
    for result in results:
        scores = result["scores"]
        keys = ("mean_at_k", "mean_low", "mean_high")
        solved, low, high = (100 * np.array([score[key] for score in scores]) for key in keys)
        words, marker = [result["method"]], {"marker": "o"}
        if result["method"] == "mcts":
            children, distinct = result["tree"]["children"], result["tree"]["cutoff"] is not None
            words = [f"mcts, K = {children}", "distinct"] if distinct else [f"mcts, K = {children}"]
            marker = {"marker": "D"} if distinct else {"marker": "o", "mfc": "white"}
            marker["alpha"] = 1 - 0.6 * (len(widths) - 1 - widths.index(children)) / len(widths)
        if len(models) > 1:
            words.append(result["model"])
        for axes, tokens in zip(panels, ("generated", "decoded")):
            axes.errorbar(
                [score["usage"][tokens] / score["problems"] for score in scores],
                solved,
                (solved - low, high - solved),
                color=COLORS[result["method"]],
                linestyle=("-", "--", ":", "-.")[models.index(result["model"]) % 4],
                markersize=4,
                label=", ".join(words),
                **marker,
            )
            axes.set_xscale("log", base=4)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.set_xlabel(f"{ALONG[tokens]} a problem")
    panels[0].set_ylabel("test problems solved, %")
    panels[0].spines[["top", "right"]].set_visible(False)
    return add_legend(panels[1], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)


def forest(folders: list[Path]):
    """The leads of runs over the search, in points of test mean@k with 95 % intervals: a row a setting, the best first.
    Returns the matplotlib figure."""
    groups, seeds = tested(folders)
    leads = {name: difference for name in groups if (difference := lead(name, groups))}
    if not leads:
        raise ValueError("none of the runs can be compared with a search: pass those of `mcts` too")
    names = sorted(leads, key=lambda name: leads[name][0])  # drawn from the bottom
    middle, low, high = np.array([leads[name] for name in names]).T
    _, axes = plt.subplots(figsize=(7, 1 + 0.3 * len(names)), layout="constrained")
    colors = [color_of(name) for name in names]
    axes.hlines(names, low, high, colors, linewidth=2)
    axes.scatter(middle, names, color=colors, zorder=2)
    axes.set_yticks(range(len(names)), [f"{name.removeprefix('mcts, ')} ({seeds[name]})" for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.axvline(0, color=GRAY, linewidth=1, zorder=0)
    axes.set_xlabel("points of test mean@k ahead of the search")
    axes.spines[["top", "right"]].set_visible(False)
    return axes.figure


def draw_tree(tree: dict, most: int = 25):
    """The visited part of a searched tree (`runtime.trees.tree_to_dict`), coloured by whether the target is in reach;
    the best path is thick. Shows `most` nodes: the best path, then those of most visits. Returns the matplotlib figure.
    """
    # a child has no more visits than its parent, and a higher id
    ranked = sorted(visited(tree["root"]), key=lambda node: (not node["best"], -node["visits"], node["id"]))
    shown = {node["id"] for node in ranked[:most]}
    places, rows = [], count()

    def place(node: dict, depth: int) -> float:
        """Put a node and what is below it; returns the node's row."""
        children = [child for child in node["children"] if child["id"] in shown]
        below = [place(child, depth + 1) for child in children]
        row = (below[0] + below[-1]) / 2 if below else next(rows)
        places.append((node, depth, row, [(child["best"], y) for child, y in zip(children, below)]))
        return row

    place(tree["root"], 0)
    depth = max(column for _, column, _, _ in places)
    figure, axes = plt.subplots(figsize=(1.9 * (depth + 1), 0.5 * next(rows) + 0.4), layout="constrained")
    for node, x, y, children in places:
        for best, row in children:
            color, width = ("#222222", 3) if best else ("#bbbbbb", 1)
            axes.plot([x, x + 1], [y, row], color=color, linewidth=width, zorder=0)
        equation = re.sub("</?(step|answer)>|left.*", "", node["text"]).strip() or tree["problem"]
        label = f"{equation[:24]}\nN {node['visits']}  Q {node['q']:+.2f}"
        box = dict(boxstyle="round", facecolor=REACH[node["solvable"]], edgecolor="#888888")
        axes.text(x, y, label, ha="center", va="center", fontsize=9, bbox=box, parse_math=False)
    axes.set_xlim(-0.5, depth + 0.5)
    axes.invert_yaxis()
    axes.axis("off")
    return figure


def visited(node: dict) -> list[dict]:
    """A node and all below it that have a visit."""
    return [node, *(below for child in node["children"] if child["visits"] for below in visited(child))]


FIGURES = {"curves": learning_curves, "forest": forest, "search": search_curves}

# ------------------------------------------------------------------------------------------------ command line


@dataclass
class PlotConfig:
    """Draw a figure of runs, print their results as a table, or make a page of searched trees or of a run."""

    # figures: curves, forest, search; tables: table, summary, overview, tokens, validation, scores; pages: tree, report
    what: tyro.conf.Positional[str]
    folders: tyro.conf.Positional[list[Path]]  # runs; scores, search: of evaluate.py --out; tree: RUN/trees/*.json too
    out: Path | None = None  # of curves, forest and search: .png, .pdf or .svg; else curves.png
    x: str | None = None  # of curves: generated, decoded, seconds, cpu_seconds; else generated

    def __post_init__(self):
        if self.what not in (known := (*FIGURES, *TABLES, "tree", "report")):
            raise ValueError(f"the first word must be one of {', '.join(known)}, not {self.what!r}")
        if missing := [str(folder) for folder in self.folders if not folder.exists()]:
            raise ValueError(f"there is no {', '.join(missing)}")
        if self.what == "tree":
            self.folders = [file for path in self.folders for file in tree_files(path)]
        elif self.what in ("scores", "search"):
            if folders := [str(folder) for folder in self.folders if folder.is_dir()]:
                raise ValueError(f"{self.what} wants files, not folders like {folders[0]}")
        else:  # a shell's glob names other files too
            self.folders = [folder for folder in self.folders if log_of(folder)]
        if not self.folders:
            raise ValueError("none of the folders holds a run (metrics.jsonl)")
        if self.out and self.what not in FIGURES:
            raise ValueError(f"{self.what} has no use for --out: leave it out")
        if self.x and self.what != "curves":
            raise ValueError(f"{self.what} has no use for --x: leave it out")
        if self.what in FIGURES:
            if self.figure.suffix not in (".png", ".pdf", ".svg"):
                raise ValueError(f"out must end in .png, .pdf or .svg, not {self.figure.name!r}")
            check_writable(self.figure)
        check_choices(self, x=ALONG)

    @property
    def figure(self) -> Path:
        """Where a figure goes."""
        return self.out or Path("curves.png")


def tree_files(path: Path) -> list[Path]:
    """A file with trees, or those of a run, in the order of its steps."""
    files = sorted(path.glob("trees/*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no trees (trees/*.json): pass a run with --search mcts")
    return files


def tree_page(files: list[Path]) -> Path:
    """Write the page of the trees in `files`: beside a single file, RUN/trees.html for those of a run. Returns it."""
    page = (files[0] if len(files) == 1 else files[0].parent).with_suffix(".html")
    write(page, explorer.page([tree for file in files for tree in explorer.read(file)]))
    return page


def main() -> None:
    config = cli.read_config(PlotConfig)
    if config.what == "tree":
        print(tree_page(config.folders))
        return
    if config.what == "report":
        for folder in config.folders:
            print(write_report(folder))
        return
    if config.what in TABLES:
        print(TABLES[config.what](config.folders))
        return
    options = {"x": config.x} if config.x else {}
    FIGURES[config.what](config.folders, **options).savefig(config.figure, dpi=150)
    print(config.figure)


if __name__ == "__main__":
    cli.command(main)
