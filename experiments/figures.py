"""The figures of notebook 04, from the logs in results/. Each function returns its matplotlib figure."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import StrMethodFormatter

from experiments import tables
from experiments.plots import COLORS, GRAY, color_of, learning_curves, pass_curves

RESULTS = Path(__file__).parents[1] / "results"
POST = {"base": 3.1, "best-of-n": 7.7, "cispo": 8.4, "mcts": 11.3}  # test mean@16, %: Tambde 2026, temperature 0.2
CRITICS = {"perfect": (COLORS["mcts"], "o-"), "learned": (COLORS["cispo"], "s--"), "none": (COLORS["none"], "x:")}
MARKERS = {"exact": "s", "dense": "D", "64": "^"}  # by a word in a row's name


def runs_of(stage: str) -> list[Path]:
    """The run folders of one stage of the study."""
    return sorted((RESULTS / stage).iterdir())


def cold_files(folders: list[Path]) -> list[Path]:
    """The scores of some runs at temperature 0.2."""
    return [RESULTS / "cold" / f"{folder.name}.json" for folder in folders]


def base_score() -> float:
    """Test mean@16 of the embedded policy before training, in %."""
    _, rows = tables.load(RESULTS / "make-run" / "mcts-tiny-seed0")
    return 100 * rows[0]["test_mean_at_k"]


def open_frame(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------ methods


def comparison(folders: list[Path]):
    """Validation score along training, against generated tokens and against CPU seconds. The dashed line is the policy
    that all runs start from."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
    for axis, x in zip(axes, ("generated", "cpu_seconds")):
        learning_curves(folders, x, axes=axis)
        axis.axhline(base_score(), color=GRAY, linestyle="--", linewidth=1.5, label="before training")
    axes[1].set_ylabel("")
    axes[1].get_legend().remove()
    axes[0].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.08))
    return figure


def variety(folders: list[Path]):
    """pass@k at temperatures 1 and 0.2."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    groups, _ = tables.tested(folders)
    pass_curves({name: tables.scores_of(group) for name, group in groups.items()}, 16, axes[0])
    cool, _ = tables.evaluated([RESULTS / "cold" / "base.json", *cold_files(folders)])
    pass_curves(cool, 16, axes[1])
    for axis, temperature in zip(axes, (1.0, 0.2)):
        axis.set_title(f"temperature {temperature}", fontsize=10)
    axes[1].set_ylabel("")
    axes[0].get_legend().remove()
    return figure


# ------------------------------------------------------------------------------------------------ tokens a problem


def by_settings(folders: list[Path]) -> dict[str, list[Path]]:
    """The runs of all seeds, by the name of their settings."""
    groups = defaultdict(list)
    for folder in folders:
        groups[re.sub(r"-seed\d+$", "", folder.name)].append(folder)
    return groups


def tokens_a_problem(config: dict, rows: list[dict]) -> float:
    """The generated tokens that a problem got in its step, the mean along a run."""
    return rows[-1]["generated"] / rows[-1]["step"] / config["learning"]["problems"]


def described(config: dict) -> str:
    """A run's method, and how it draws its answers or steps."""
    method, reward = config["method"], config["task"]["reward"]
    if method == "none":
        return f"none, {config['learning']['problems']} a step"
    if (config["tree"] or config["group"])["cutoff"] is not None:
        return f"{method}, distinct, {reward} reward, {'K' if method == 'mcts' else 'N'} = 4"
    return f"{method}, independent, {'K = 2, 4' if method == 'mcts' else 'N = 4, 8, 16'}"


def tokens_and_scores(folders: list[Path]):
    """Test score against the tokens that a problem gets in its step, at two temperatures, with 95 % intervals."""
    points = defaultdict(list)
    for group in by_settings(folders).values():
        logs = [tables.load(folder) for folder in group]
        config, _ = logs[0]
        shares, _ = tables.evaluated(cold_files(group))
        scores = tables.pooled(tables.scores_of(logs)), tables.pooled(*shares.values())
        n = config["group"]["samples"] if config["group"] else 0
        points[described(config)].append((np.mean([tokens_a_problem(*log) for log in logs]), n, *scores))
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained", sharey=True)
    for label in sorted(points):
        tokens, ns, hot, cool = zip(*sorted(points[label]))
        marker = next((mark for word, mark in MARKERS.items() if word in label), "o")
        is_line = "N = 4, 8" in label
        style = dict(fmt=marker + "-" * is_line, capsize=3, color=color_of(label), label=label)
        for axis, scores in zip(axes, (hot, cool)):
            y, low, high = 100 * np.array(scores).T
            axis.errorbar(tokens, y, (y - low, high - y), **style)
            for x, n in zip(tokens, ns) if is_line else ():
                axis.annotate(f"N = {n}", (x, 1), ha="center", fontsize=8, color=GRAY)
    for axis, temperature in zip(axes, (1.0, 0.2)):
        axis.set_title(f"temperature {temperature}", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_xlabel("generated tokens a problem gets in its step")
        axis.set_ylim(0, 45)
        open_frame(axis)
    axes[0].set_ylabel("test mean@16 after 1 M tokens, %")
    axes[1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def yields_table(folders: list[Path]) -> str:
    """What the tokens buy: tokens a problem, right answers of 1,000 tokens, validation mean@4 after 100 CPU seconds."""
    lines = [
        "| runs | tokens a problem | right answers of 1,000 tokens | after 100 CPU s |",
        "|---|---|---|---|",
    ]
    for name, group in sorted(by_settings(folders).items()):
        tokens, right, score = np.mean([yields(folder) for folder in group], 0)
        lines.append(f"| {name} | {tokens:.0f} | {right:.1f} | {score:.1f} % |")
    return "\n".join(lines)


def yields(folder: Path) -> tuple[float, float, float]:
    """A run's numbers for `yields_table`; the score is interpolated between evaluations."""
    config, rows = tables.load(folder)
    right = sum(row.get("correct", 0) * row.get("trajectories", 0) for row in rows)
    times = tables.along(rows, "cpu_seconds")
    curve = [(t, row["eval_mean"]) for t, row in zip(times, rows) if "eval_mean" in row]
    return tokens_a_problem(config, rows), 1000 * right / rows[-1]["generated"], 100 * np.interp(100, *zip(*curve))


# ------------------------------------------------------------------------------------------------ the search


def simulations(preset: list[Path], ladder: list[Path]):
    """Score, tokens a tree and CPU minutes against the simulations of a tree; the score's bar is the 95 % interval of
    the difference to the preset."""
    groups = defaultdict(list)
    for config, rows in map(tables.load, [*preset, *ladder]):
        groups[config["tree"]["simulations"]].append((config, rows))
    points = []
    for count, logs in sorted(groups.items()):
        scores = tables.scores_of(logs)
        difference = tables.pooled(scores, tables.scores_of(groups[32]))
        minutes = np.mean([tables.along(rows, "cpu_seconds")[-1] for _, rows in logs]) / 60
        points.append(
            (count, 100 * scores.mean(), *difference, np.mean([tokens_a_problem(*log) for log in logs]), minutes)
        )
    count, score, middle, low, high, tokens, minutes = np.array(points).T
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    axes[0].errorbar(
        count, score, (100 * (middle - low), 100 * (high - middle)), fmt="o-", capsize=3, color=COLORS["mcts"]
    )
    axes[1].plot(count, tokens, "o-", color=COLORS["mcts"])
    axes[2].plot(count, minutes, "o-", color=COLORS["mcts"])
    labels = ("test mean@16 after 1 M tokens, %", "tokens a tree", "CPU minutes of training")
    for axis, label in zip(axes, labels):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_xlabel("simulations")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        open_frame(axis)
    return figure


def critics() -> list[dict]:
    """What `experiments.oracle` found of two policies: before distillation, and after it."""
    return json.loads((RESULTS / "critic.json").read_text(encoding="utf-8"))["critics"]


CRITIC_NAMES = ("before distillation", "after it (search, seed 1)")


def critic_values():
    """How V(s) is spread over states in reach of the target, and over the others."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, critic, name in zip(axes, critics(), CRITIC_NAMES, strict=True):
        values, in_reach = np.array(critic["value"]), np.array(critic["in_reach"], bool)
        bins = np.linspace(values.min() - 0.01, values.max() + 0.01, 41)
        style = dict(bins=bins, histtype="step", linewidth=1.5, density=True)
        axis.hist(values[in_reach], color=COLORS["mcts"], label="in reach", **style)
        axis.hist(values[~in_reach], color=COLORS["best-of-n"], linestyle="--", label="out of reach", **style)
        correlation = "–" if critic["correlation"] is None else f"{critic['correlation']:.2f}"
        numbers = f"AUC {critic['auc']:.2f}, correlation {correlation}, s.d. {values.std():.2f}"
        axis.set_title(f"{name}\n{numbers}", fontsize=9)
        axis.set_xlabel("V(s)")
        axis.set_yticks([])
        if values.std() == 0:
            axis.set_xticks([0])
        open_frame(axis)
    axes[0].set_ylabel("density of states")
    axes[0].legend(frameon=False)
    return figure


def critic_searches():
    """Trees with a right answer against simulations, with the learned critic, none, and a perfect one."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained", sharey=True, sharex=True)
    for axis, policy, name in zip(axes, critics(), CRITIC_NAMES, strict=True):
        for critic, (color, style) in CRITICS.items():
            searches = [s for s in policy["searches"] if s["critic"] == critic]
            solved = [100 * s["solved"] for s in searches]
            axis.plot([s["simulations"] for s in searches], solved, style, color=color, label=critic)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_title(f"{name}, K = 4", fontsize=9)
        axis.set_xlabel("simulations")
        open_frame(axis)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("trees with a right answer, %")
    axes[0].legend(frameon=False, title="critic")
    return figure


def beside_the_post(folders: list[Path]):
    """The post's final scores and ours, both at temperature 0.2. Only the order can be compared: model, budget, N,
    seeds and test problems differ."""
    shares, _ = tables.evaluated([RESULTS / "cold" / "base.json", *cold_files(folders)])
    scores = {name: 100 * np.array(tables.pooled(share)) for name, share in shares.items()}  # mean, low, high
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    axes[0].bar(list(POST), list(POST.values()), color=[*map(color_of, POST)])
    axes[0].set_title("the post: Qwen2.5-1.5B-Instruct, one seed", fontsize=9)
    for name in [*POST, "none"]:
        middle, low, high = scores[name]
        axes[1].bar(name, middle, yerr=[[middle - low], [high - middle]], color=color_of(name), capsize=3)
    axes[1].set_title("this kit: 1.7 M parameters, five seeds, 95 % intervals", fontsize=9)
    axes[0].set_ylabel("test mean@16 at temperature 0.2, %")
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
        open_frame(axis)
    return figure


# ------------------------------------------------------------------------------------------------ operators


def solved_within(tokens: list[int | None], budgets: np.ndarray) -> np.ndarray:
    """The share of problems that are solved within each budget. `tokens`: of each problem until its first right
    answer, None if there was none. [budgets]"""
    spent = np.array([np.inf if count is None else count for count in tokens])  # [problems]
    return (spent[:, None] <= budgets).mean(0)


def operator_map(files: list[Path]):
    """Problems solved against the tokens that each may take, from files of `experiments.operators`: trees by their
    critic, samples and beams beside them. A beam stands at the mean tokens of the problems that it solves. A panel for
    each width of the trees."""
    found: dict[str, list[int | None]] = {}
    for file in files:
        found |= json.loads(file.read_text(encoding="utf-8"))["tokens"]
    widths = sorted({int(name.split()[1].rstrip(",")) for name in found if name.startswith("tree")})
    budgets = np.geomspace(40, 4_000, 60)
    figure, axes = plt.subplots(1, len(widths), figsize=(6 * len(widths), 4.2), layout="constrained", sharey=True)
    for axis, width in zip(np.atleast_1d(axes), widths):
        errors = sorted(name for name in found if name.startswith(f"tree {width}, error"))
        for i, name in enumerate(errors):
            shade = plt.get_cmap("viridis")(i / max(len(errors), 1))
            label = f"tree, critic wrong in {100 * float(name.split()[-1]):.0f} % of states"
            axis.plot(budgets, 100 * solved_within(found[name], budgets), color=shade, label=label)
        styles = {f"tree {width}, none": ("tree, V = 0", "k:"), "samples": ("independent samples", "r--")}
        for name, (label, style) in styles.items():
            axis.plot(budgets, 100 * solved_within(found[name], budgets), style, label=label)
        for name in (name for name in found if name.startswith("beam")):
            n = int(name.split()[1])
            solved = [count for count in found[name] if count is not None]
            axis.plot(np.mean(solved), 100 * len(solved) / len(found[name]), "rD", markersize=5)
            axis.annotate(f"beam {n}", (np.mean(solved), 100 * len(solved) / len(found[name])), fontsize=8, va="bottom")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_xlabel("tokens that a problem may take")
        axis.set_title(f"trees with up to {width} children", fontsize=10)
        open_frame(axis)
    np.atleast_1d(axes)[0].set_ylabel("problems solved, %")
    np.atleast_1d(axes)[-1].legend(frameon=False, fontsize=8, loc="upper left")
    return figure
