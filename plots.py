"""Figures from run folders, for the README and the notebooks.

python plots.py curves results/compare/*                     # validation mean@k against generated tokens
python plots.py table results/compare/*                      # their scores, a row a run
python plots.py summary results/compare/*                    # the README's table, a row a method
python plots.py tree RUN/trees/000000.json                   # searched trees as one interactive page beside the file
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter

import explorer
import runs

COLORS = {"mcts": "#0b6e4f", "best-of-n": "#c8553d", "cispo": "#3d5a80", "grpo": "#7a6c9d", "none": "#8d99ae"}
COLORS |= {"mcts, answers": "#e9a03b", "mcts, steps": "#c33c8e", "mcts, visits": "#46b0a4"}
DRAWS = 2_000  # of the bootstrap


def load(folder: Path) -> tuple[dict, list[dict]]:
    """A run's configuration and its rows of metrics."""
    return json.loads((folder / "config.json").read_text()), runs.read_metrics(folder)


def method(config: dict) -> str:
    """A run's method, with what it distils where that isn't the post's choice."""
    distill = config.get("distill", "best-path")
    return config["search"] + (f", {distill}" if config["search"] == "mcts" and distill != "best-path" else "")


def learning_curves(folders: list[Path], x: str = "generated", key: str = "eval_mean", axes=None):
    """Validation score against `x` ("generated" tokens or "seconds"), a line a method: the mean over seeds, and a
    thin line for each seed. Returns the matplotlib figure."""
    curves = defaultdict(list)
    for folder in folders:
        config, rows = load(folder)
        rows = [row for row in rows if key in row]
        curves[method(config)].append(([row[x] for row in rows], [100 * row[key] for row in rows]))
    if axes is None:
        _, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, seeds in curves.items():
        color = COLORS.get(name)
        for xs, ys in seeds:
            axes.plot(xs, ys, color=color, alpha=0.3, linewidth=0.8)
        end = min(max(xs) for xs, _ in seeds)
        grid = np.linspace(max(min(xs) for xs, _ in seeds), end, 50)
        mean = np.mean([np.interp(grid, xs, ys) for xs, ys in seeds], axis=0)
        label = f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        axes.plot(grid, mean, color=color, linewidth=2.2, label=label)
    axes.set_xlabel({"generated": "generated tokens", "seconds": "seconds of training"}[x])
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel("validation mean@k, %")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes.figure


def pooled(right: np.ndarray, samples: int) -> dict[str, tuple[float, float, float]]:
    """mean@k and pass@k of a method with 95 % intervals, from `right` [seeds, problems], how many of `samples` = k are
    right. Each of the bootstrap's draws takes seeds and, the same ones for all of them, problems with replacement."""
    rng = np.random.default_rng(0)
    found = {}
    for name, scores in {"mean": right / samples, "pass": right > 0}.items():
        seeds = rng.integers(len(right), size=(DRAWS, len(right)))
        problems = rng.integers(right.shape[1], size=(DRAWS, right.shape[1]))
        draws = [scores[s].mean(0)[p].mean() for s, p in zip(seeds, problems)]
        found[name] = float(scores.mean()), *(float(q) for q in np.quantile(draws, [0.025, 0.975]))
    return found


def summary_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs, a row a method: test scores after training, pooled over seeds, and cost."""
    runs_of = defaultdict(list)
    for folder in folders:
        config, rows = load(folder)
        runs_of[method(config)].append((config, rows[-1]))
    lines = ["| method | seeds | mean@16 | pass@16 | format | tokens | steps | training |", "|" + "---|" * 8]
    for name, found in runs_of.items():
        ends = [row for _, row in found]
        scores = pooled(np.array([row["test_right"] for row in ends]), ends[0]["test_samples"])
        mean, passed = ("{:.1%} [{:.1%}, {:.1%}]".format(*scores[key]) for key in ("mean", "pass"))
        tokens, steps, seconds, parsed = (
            np.mean([row[key] for row in ends]) for key in ("generated", "step", "seconds", "test_parsed")
        )
        lines.append(
            f"| {name} | {len(found)} | **{mean}** | {passed} | {parsed:.0%} "
            f"| {tokens / 1e6:.2f} M | {steps:.0f} | {seconds / 60:.1f} min |"
        )
    return "\n".join(lines)


REACH = {"yes": "#cfe8d5", "no": "#f3d3cd", "unknown": "#e6e6e6"}  # as in assets/explorer.html


def draw_tree(tree: dict):
    """A searched tree (`explorer.tree_to_dict`), coloured by whether the target is in reach; the best path is thick.
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
                [x, x + 1], [y, row], color="#0b6e4f" if best else "#bbbbbb", linewidth=3 if best else 1, zorder=0
            )
        text = re.sub("</?(step|answer)>", "", node["text"]).strip() or tree["problem"]
        label = f"{text[:28]}\nN {node['visits']}  Q {node['q']:+.2f}"
        box = dict(boxstyle="round", facecolor=REACH[node["solvable"]], edgecolor="#888888")
        axes.text(x, y, label.replace("$", r"\$"), ha="center", va="center", fontsize=7, bbox=box)
    axes.set_xlim(-0.5, depth + 0.5)
    axes.invert_yaxis()
    axes.axis("off")
    return figure


def results_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs: test mean@k before and after with 95 % intervals, pass@k, cost."""
    lines = ["| method | seed | mean@16 before | mean@16 after | pass@16 before → after | tokens | steps | training |"]
    lines += ["|" + "---|" * 8]
    for folder in folders:
        config, rows = load(folder)
        tests = [row for row in rows if "test_mean_at_k" in row]
        means = [
            "{:.1%} [{:.1%}, {:.1%}]".format(*(t[f"test_mean_{k}"] for k in ("at_k", "low", "high"))) for t in tests
        ]
        passed, after = [f"{row['test_pass_at_k']:.1%}" for row in tests], tests[-1]
        if len(tests) == 1:  # --no-test-before
            means, passed = ["–", *means], ["–", *passed]
        lines.append(
            f"| {method(config)} | {config['seed']} | {means[0]} | **{means[-1]}** "
            f"| {passed[0]} → {passed[-1]} "
            f"| {after['generated'] / 1e6:.2f} M | {after['step']} | {after['seconds'] / 60:.1f} min |"
        )
    return "\n".join(lines)


@dataclass
class PlotConfig:
    """Draw the learning curves of some run folders, or print their results as a table."""

    what: tyro.conf.Positional[str]  # curves, table, summary, tree
    folders: tyro.conf.Positional[list[Path]]  # runs; for tree: files from --dump-trees
    out: Path = Path("curves.png")
    x: str = "generated"  # generated, seconds

    def __post_init__(self):
        if self.what not in ("curves", "table", "summary", "tree"):
            raise ValueError(f"the first word must be curves, table, summary or tree, not {self.what!r}")
        if self.what != "tree":
            self.folders = [f for f in self.folders if (f / "metrics.jsonl").exists()]
        if not self.folders:
            raise ValueError("none of the folders holds a run (metrics.jsonl)")
        if self.x not in ("generated", "seconds"):
            raise ValueError(f"x must be generated or seconds, not {self.x!r}")


def main() -> None:
    config = runs.read_config(PlotConfig)
    if config.what == "tree":
        for file in config.folders:
            runs.write(page := file.with_suffix(".html"), explorer.render(explorer.read(file)))
            print(page)
        return
    if config.what == "table":
        print(results_table(config.folders))
        return
    if config.what == "summary":
        print(summary_table(config.folders))
        return
    learning_curves(config.folders, config.x).savefig(config.out, dpi=150)
    print(config.out)


if __name__ == "__main__":
    runs.command(main)
