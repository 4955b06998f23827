"""Figures from run folders, for the README and the notebooks, and the command that prints tables.py.

python plots.py curves results/compare/*                       # validation mean@k against generated tokens
python plots.py table results/compare/*                        # their scores, a row a run
python plots.py summary results/compare/*                      # the README's table, a row a method
python plots.py validation results/targets/*                   # validation scores, the best first
python plots.py forest results/ablate/* results/compare/mcts*  # test scores less those of the usual search
python plots.py scores results/cold/*                          # what evaluate.py found, a row a policy
python plots.py search results/search/*                        # problems solved at test time against tokens spent
python plots.py tree RUN/trees/000000.json                     # searched trees as one interactive page beside the file
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import tyro
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from experiments import explorer
from runtime import trees
import explorer
from runtime import cli
from runtime import files
from runtime import run_folder
from config import check_choices
from runtime.files import check_writable
from experiments.tables import TABLES, ahead, along, by_method, pass_at, read_scores, tested

COLORS = {"mcts": "#0b6e4f", "best-of-n": "#c8553d", "cispo": "#3d5a80", "grpo": "#7a6c9d", "none": "#e09f3e"}
ALONG = {"generated": "generated tokens", "seconds": "seconds of training", "cpu_seconds": "CPU seconds of training"}


def learning_curves(folders: list[Path], x: str = "generated", axes=None):
    """Validation score against `x` (generated tokens, seconds or CPU seconds): for each method the mean over seeds, in
    a band from the lowest seed to the highest. Returns the matplotlib figure."""
    curves, styles, free = defaultdict(list), {}, defaultdict(lambda: cycle(["-", "--", ":", "-."]))
    ks = set()
    for name, found in by_method(folders).items():
        styles[name] = next(free[name.partition(",")[0]])  # the same whatever x is
        for _, rows in found:
            points = [(at, 100 * row["eval_mean"]) for at, row in zip(along(rows, x), rows) if "eval_mean" in row]
            ks |= {str(row["eval_k"]) for row in rows if "eval_k" in row}
            if points and points[-1][0]:
                curves[name].append(tuple(zip(*points)))
    if not curves:
        raise ValueError(f"none of the runs has been evaluated yet (no eval_mean by {ALONG[x]})")
    if axes is None:
        _, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, seeds in curves.items():
        color = COLORS.get(name.partition(",")[0])
        start, end = max(min(xs) for xs, _ in seeds), min(max(xs) for xs, _ in seeds)
        grid = np.linspace(start, end, 50)
        scores = np.array([np.interp(grid, xs, ys) for xs, ys in seeds])  # [seeds, 50]
        label = f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        axes.plot(grid, scores.mean(0), styles[name], color=color, linewidth=2.2, label=label)
        axes.fill_between(grid, scores.min(0), scores.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(ALONG[x])
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel(f"validation mean@{'/'.join(sorted(ks))}, %")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes.figure


def pass_curves(found: dict[str, np.ndarray], samples: int, axes):
    """pass@k against k: of each policy's `shares`, as of `pass_at`, the mean over seeds, in a band from the lowest seed
    to the highest. Returns the matplotlib figure."""
    for name, shares in found.items():
        curves, color = 100 * pass_at(shares, samples), COLORS.get(name.partition(",")[0], "#8d99ae")
        ks = range(1, samples + 1)
        axes.plot(ks, curves.mean(0), color=color, linewidth=2.2, label=name)
        axes.fill_between(ks, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("samples a problem, k")
    axes.set_ylabel("pass@k, % of test problems")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes.figure


def search_curves(files: list[Path]):
    """Problems solved against the tokens that a search spent on each, with 95 % intervals over problems, from
    `evaluate.py --out` files with several budgets. A line style for each policy, a shade for each width of a tree."""
    _, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    found = [read_scores(file) for file in files]
    models = list(dict.fromkeys(one["model"] for one in found))
    widths = sorted({one["children"] for one in found if one["search"] == "mcts"})
    for one in found:
        spent = [score["usage"]["generated"] / score["problems"] for score in one["scores"]]
        solved, low, high = (
            100 * np.array([score[f"mean_{key}"] for score in one["scores"]]) for key in ("at_k", "low", "high")
        )
        width = widths.index(one["children"]) if one["search"] == "mcts" else len(widths)
        told = [f"mcts, K = {one['children']}" if one["search"] == "mcts" else one["search"]]
        told += ["distinct"] * one.get("distinct", False) + [one["model"]] * (len(models) > 1)
        axes.errorbar(
            spent,
            solved,
            (solved - low, high - solved),
            color=COLORS[one["search"]],
            alpha=1 - 0.6 * (len(widths) - 1 - width) / len(widths) if one["search"] == "mcts" else 1,
            linestyle=("-", "--", ":", "-.")[models.index(one["model"]) % 4],
            marker="D" if one.get("distinct") else "o",
            mfc=None if one.get("distinct") or one["search"] != "mcts" else "white",
            markersize=4,
            label=", ".join(told),
        )
    axes.set_xscale("log", base=4)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("generated tokens a problem")
    axes.set_ylabel("test problems solved, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
    return axes.figure


def forest(folders: list[Path]):
    """By how many points of test mean@k runs are ahead of `search_like` them, with 95 % intervals: a row a setting, the
    best first. Returns the matplotlib figure."""
    found, seeds = tested(folders)
    leads = {name: lead for name in found if (lead := ahead(name, found))}
    if not leads:
        raise ValueError("none of the runs can be held against a search: pass those of `mcts` too")
    names = sorted(leads, key=lambda name: leads[name][0])  # drawn from the bottom
    middle, low, high = np.array([leads[name] for name in names]).T
    _, axes = plt.subplots(figsize=(7, 1 + 0.3 * len(names)), layout="constrained")
    colors = [COLORS[name.partition(",")[0]] for name in names]
    axes.hlines(names, low, high, colors, linewidth=2)
    axes.scatter(middle, names, color=colors, zorder=2)
    axes.set_yticks(range(len(names)), [f"{name.removeprefix('mcts, ')} ({seeds[name]})" for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.axvline(0, color="#8d99ae", linewidth=1, zorder=0)
    axes.set_xlabel("points of test mean@k ahead of the search")
    axes.spines[["top", "right"]].set_visible(False)
    return axes.figure


REACH = {"yes": "#cfe8d5", "no": "#f3d3cd", "unknown": "#e6e6e6"}  # as in assets/explorer.html


def draw_tree(tree: dict):
    """A searched tree (`trees.tree_to_dict`), coloured by whether the target is in reach; the best path is thick.
    Returns the matplotlib figure."""
    places, rows = [], iter(range(10**6))

    def place(node: dict, depth: int) -> float:
        below = [place(child, depth + 1) for child in node["children"]]
        y = (below[0] + below[-1]) / 2 if below else next(rows)
        places.append((node, depth, y, [(child["best"], row) for child, row in zip(node["children"], below)]))
        return y

    place(tree["root"], 0)
    depth = max(column for _, column, _, _ in places)
    figure, axes = plt.subplots(figsize=(3 * (depth + 1), 0.5 * next(rows) + 0.4), layout="constrained")
    for node, x, y, below in places:
        for best, row in below:
            axes.plot(
                [x, x + 1], [y, row], color="#222222" if best else "#bbbbbb", linewidth=3 if best else 1, zorder=0
            )
        text = re.sub("</?(step|answer)>", "", node["text"]).strip() or tree["problem"]
        label = f"{text[:28]}\nN {node['visits']}  Q {node['q']:+.2f}"
        box = dict(boxstyle="round", facecolor=REACH[node["solvable"]], edgecolor="#888888")
        axes.text(x, y, label, ha="center", va="center", fontsize=7, bbox=box, parse_math=False)
    axes.set_xlim(-0.5, depth + 0.5)
    axes.invert_yaxis()
    axes.axis("off")
    return figure


FIGURES = {"curves": learning_curves, "forest": forest, "search": search_curves}


@dataclass
class PlotConfig:
    """Draw a figure of some runs, print their results as a table, or make a page of searched trees."""

    what: tyro.conf.Positional[str]  # curves, forest, search, table, summary, validation, scores, tree (FILE.html)
    folders: tyro.conf.Positional[list[Path]]  # runs; scores, search: of evaluate.py --out; tree: of --dump-trees
    out: Path = Path("curves.png")  # of curves, forest and search: .png, .pdf or .svg
    x: str = "generated"  # of curves: generated, seconds, cpu_seconds

    def __post_init__(self):
        if self.what not in (known := (*FIGURES, *TABLES, "tree")):
            raise ValueError(f"the first word must be one of {', '.join(known)}, not {self.what!r}")
        if missing := [str(folder) for folder in self.folders if not folder.exists()]:
            raise ValueError(f"there is no {', '.join(missing)}")
        if self.what in ("scores", "search", "tree"):
            if folders := [str(folder) for folder in self.folders if folder.is_dir()]:
                raise ValueError(f"{self.what} wants files, not folders like {folders[0]}")
        else:  # a shell's glob names other files too
            self.folders = [f for f in self.folders if run_folder.log_of(f)]
        if not self.folders:
            raise ValueError("none of the folders holds a run (metrics.jsonl)")
        if self.what in FIGURES:
            if self.out.suffix not in (".png", ".pdf", ".svg"):
                raise ValueError(f"out must end in .png, .pdf or .svg, not {self.out.name!r}")
            check_writable(self.out)
        check_choices(self, x=ALONG)

    def unread(self) -> dict[str, str]:
        """The options that this figure or table has no use for."""
        read = {"--out": self.what in FIGURES, "--x": self.what == "curves"}
        return {option: self.what for option, is_read in read.items() if not is_read}


def main() -> None:
    config = cli.read_config(PlotConfig)
    if config.what == "tree":
        for file in config.folders:
            files.write(page := file.with_suffix(".html"), explorer.render(explorer.read(file)))
            print(page)
        return
    if config.what in TABLES:
        print(TABLES[config.what](config.folders))
        return
    x = [config.x] if config.what == "curves" else []
    drawn = FIGURES[config.what](config.folders, *x)
    drawn.savefig(config.out, dpi=150)
    print(config.out)


if __name__ == "__main__":
    cli.command(main)
