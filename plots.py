"""Figures from run folders, for the README and the notebooks.

python plots.py curves results/compare/*                       # validation mean@k against generated tokens
python plots.py table results/compare/*                        # their scores, a row a run
python plots.py summary results/compare/*                      # the README's table, a row a method
python plots.py validation results/targets/*                   # validation scores, the best first
python plots.py forest results/ablate/* results/compare/mcts*  # test scores less those of the usual search
python plots.py scores results/cold/*                          # what evaluate.py found, a row a policy
python plots.py search results/search/*                        # problems solved at test time against tokens spent
python plots.py tree RUN/trees/000000.json                     # searched trees as one interactive page beside the file
"""

import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import accumulate, cycle
from pathlib import Path

import numpy as np
import tyro
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, StrMethodFormatter

import explorer
import runs
from checks import check_choices, check_writable, differing, read_json
from config import PRESETS, preset_for, settings

COLORS = {"mcts": "#0b6e4f", "best-of-n": "#c8553d", "cispo": "#3d5a80", "grpo": "#7a6c9d", "none": "#e09f3e"}
DRAWS = 2_000  # of the bootstrap
ALONG = {"generated": "generated tokens", "seconds": "seconds of training", "cpu_seconds": "CPU seconds of training"}
RUN = tuple[dict, list[dict]]


def load(folder: Path) -> RUN:
    """A run's configuration and its rows of metrics. ValueError for a config.json that no run has written."""
    config = runs.read_settings(folder)
    try:
        told = settings(config)
        hash(tuple(told.values()))  # runs are told apart by them
        known = "seed" in config and told["search"] in COLORS and told["preset"] in PRESETS
    except TypeError:  # a value of another kind
        known = False
    if not known:
        raise ValueError(f"{folder}/config.json is damaged: it does not hold the settings of a run")
    return config, runs.read_metrics(folder)


def named(key: str, value: object) -> str:
    """A setting in a row's name."""
    return f"{key} {value}" if not isinstance(value, bool) else key if value else f"no {key}"


def by_method(folders: list[Path]) -> dict[str, list[RUN]]:
    """Runs that differ in nothing but their seed together, under their method's name. Where the runs of some method
    differ in more, such settings, if other than in their preset, are part of every name. ValueError for a seed that is
    there twice."""
    found, values = defaultdict(list), defaultdict(set)
    loaded = [(settings(config), config, rows) for config, rows in map(load, folders)]
    for told, _, _ in loaded:
        for key, value in told.items():
            values[told["search"], key].add(value)
    varied = {key for (_, key), some in values.items() if len(some) > 1}
    for told, config, rows in loaded:
        usual = settings(asdict(preset_for(told["preset"], told["search"])))
        other = [
            named(key.split(".")[-1], told[key])
            for key in usual
            if key in varied - {"seed"} and (key == "preset" or told[key] != usual[key])
            if key != "tree.min_p" or told["tree.distinct"]  # of distinct steps alone
        ]
        found[", ".join([told["search"], *other]).replace("_", " ")].append((config, rows))
    for name, some in found.items():
        if len({config["seed"] for config, _ in some}) < len(some):
            raise ValueError(f"two runs of {name} have the same seed: pass each run once")
    return {name: found[name] for name in sorted(found, key=lambda name: (name.count(","), name))}


def finished(found: dict[str, list[RUN]], key: str = "test_mean_at_k") -> dict[str, list[RUN]]:
    """ValueError if a run has no test after training, or no `key` in it."""
    for name, some in found.items():
        for config, rows in some:
            if runs.ending(rows) != "finished" or key not in rows[-1]:
                raise ValueError(
                    f"{name}, seed {config['seed']}, has no {key} after training: leave it out or --resume it"
                )
    return found


def along(rows: list[dict], x: str) -> list[float]:
    """How far a run was at each row. CPU seconds are a step's own (0 throughout where they were not recorded)."""
    if x == "cpu_seconds":
        return list(accumulate(row.get(x, 0) for row in rows))
    return [row[x] for row in rows]


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


def read_scores(file: Path) -> dict:
    """What `evaluate.py --out` has written, an earlier version's too. ValueError for another file."""
    found = {"skip": 0} | read_json(file)
    if not (found.get("scores") and {"model", "search", "children"} <= found.keys()):
        raise ValueError(f"{file} holds no scores: pass what evaluate.py wrote to its --out")
    return found


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
            markersize=4,
            label=", ".join(told),
        )
    axes.set_xscale("log", base=4)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("generated tokens a problem")
    axes.set_ylabel("test problems solved, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return axes.figure


def pooled(scores: np.ndarray, rival: np.ndarray | None = None) -> tuple[float, float, float]:
    """The mean of `scores` [seeds, problems], less that of a rival's on the same problems, and its 95 % interval.

    Problems are drawn with replacement, the same ones for all seeds (bootstrap). Five seeds are too few for that: their
    mean is off by s / sqrt(seeds) times a draw from Student's t, with the degrees of freedom that s has. A row and its
    rival are taken to have the same s, so that a row of one seed has its rival's; alone it has none.
    """
    rng = np.random.default_rng(0)
    groups = [scores] if rival is None else [scores, -rival]
    per_problem = sum(group.mean(0) for group in groups)  # [problems]
    draws = per_problem[rng.integers(len(per_problem), size=(DRAWS, len(per_problem)))].mean(1)
    means = [group.mean(1) for group in groups]  # [seeds]
    if freedom := sum(len(mean) - 1 for mean in means):
        s = math.sqrt(sum(((mean - mean.mean()) ** 2).sum() for mean in means) / freedom)
        draws += s * math.sqrt(sum(1 / len(mean) for mean in means)) * rng.standard_t(freedom, DRAWS)
    return float(per_problem.mean()), *(float(q) for q in np.quantile(draws, [0.025, 0.975]))


def pass_at(shares: np.ndarray, samples: int) -> np.ndarray:
    """pass@k for k from 1 to `samples`, without bias (Chen et al. 2021, eq. 1), where `shares` [seeds, problems] of
    so many samples are right. [seeds, samples]"""
    wrong, i = samples - np.rint(shares * samples)[..., None], np.arange(samples)  # [seeds, problems, 1], [samples]
    missed = np.cumprod(np.maximum(wrong - i, 0) / (samples - i), -1)  # P(k samples without a right one)
    return (1 - missed).mean(1)


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


def shown(share: float, low: float, high: float) -> str:
    """A share and its interval in a table."""
    return f"{share:.1%} [{low:.1%}, {high:.1%}]"


def shown_means(shares: np.ndarray) -> tuple[str, str]:
    """mean@k and pass@k, in a table, of shares of samples that are right [seeds, problems]."""
    return shown(*pooled(shares)), shown(*pooled((shares > 0) * 1.0))


def shown_lead(lead: tuple[float, float, float] | None) -> str:
    """By how many points a row is ahead, in a table; a dash where it is held against nothing."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*lead) if lead else "–"


def scores_of(found: list[RUN]) -> np.ndarray:
    """The share of samples that are right, of finished runs on the test problems, [seeds, problems]."""
    ends = [rows[-1] for _, rows in found]
    return np.array([row["test_right"] for row in ends]) / ends[0]["test_samples"]


def search_like(name: str, found: dict[str, list[RUN]]) -> list[RUN] | None:
    """The runs of the search that a row is held against: with the same settings, or with as many of the last of them
    as there are; for a search with fewer. None if there is none that was tested on the same problems."""
    method, *changed = name.split(", ")
    names = (", ".join(["mcts", *changed[i:]]) for i in range(method == "mcts", len(changed) + 1))
    like = next((found[name] for name in names if found.get(name)), None)
    return like if like and tested_on(like) == tested_on(found[name]) else None


def ahead(name: str, found: dict[str, list[RUN]]) -> tuple[float, float, float] | None:
    """By how many points of test mean@k a row is ahead of `search_like` it, and the 95 % interval."""
    if not (found[name] and (search := search_like(name, found))):
        return None
    return tuple(100 * x for x in pooled(scores_of(found[name]), scores_of(search)))


def tested_on(some: list[RUN]) -> list:
    """What the test problems of runs depend on."""
    return [settings(some[0][0])[name] for name in ("split", "size", "test_problems", "eval_temperature")]


def tested(folders: list[Path]) -> tuple[dict[str, list[RUN]], dict[str, str]]:
    """`by_method` without the runs that were stopped because they had collapsed; and of each row how many seeds there
    are and how many had collapsed."""
    every = by_method(folders)
    left = {name: [run for run in some if runs.ending(run[1]) != "stopped"] for name, some in every.items()}
    counts = {name: (len(left[name]), len(some) - len(left[name])) for name, some in every.items()}
    seeds = {
        name: ", ".join(f"{n}{what}" for n, what in zip(pair, ("", " collapsed")) if n) for name, pair in counts.items()
    }
    return finished(left, "test_right"), seeds


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


def summary_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs, a row a method: test scores after training, pooled over seeds, how far from
    `search_like` it on the same problems, and cost. CPU time is of training alone, where it was recorded. Seeds that
    were stopped because they had collapsed are counted and nothing more."""
    found, seeds = tested(folders)
    ks = {rows[-1]["test_samples"] for some in found.values() for _, rows in some}
    if len(ks) > 1:
        raise ValueError(f"runs with {sorted(ks)} samples a test problem can't share a table")
    k = ks.pop() if ks else "k"
    lines = [f"| method | seeds | mean@{k} | minus search | pass@{k} | format | tokens | steps | CPU |"]
    lines.append("|" + "---|" * 9)
    for name, some in found.items():
        if not some:
            lines.append(f"| {name} | {seeds[name]} |" + " – |" * 7)
            continue
        shares = scores_of(some)
        mean, passed = shown_means(shares)
        less = shown_lead(ahead(name, found))
        tokens, steps, parsed = (
            np.mean([rows[-1][key] for _, rows in some]) for key in ("generated", "step", "test_parsed")
        )
        times = [sum(row.get("cpu_seconds", 0) for row in rows) for _, rows in some]
        cpu = f"{np.mean([time for time in times if time]) / 60:.1f} min" if any(times) else "–"
        lines.append(
            f"| {name} | {seeds[name]} | **{mean}** | {less} | {passed} | {parsed:.0%} "
            f"| {tokens / 1e6:.2f} M | {steps:.0f} | {cpu} |"
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


def results_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs: test mean@k before and after with 95 % intervals, pass@k, cost."""
    found = finished(by_method(folders))
    k = "/".join(sorted({str(rows[-1]["test_samples"]) for some in found.values() for _, rows in some}))
    lines = [
        f"| method | seed | mean@{k} before | mean@{k} after | pass@{k} before → after | tokens | steps | training |"
    ]
    lines += ["|" + "---|" * 8]
    for name, config, rows in ((name, *run) for name, some in found.items() for run in some):
        tests = [row for row in rows if "test_mean_at_k" in row]
        means = [shown(*(t[f"test_mean_{k}"] for k in ("at_k", "low", "high"))) for t in tests]
        passed, after = [f"{row['test_pass_at_k']:.1%}" for row in tests], tests[-1]
        if len(tests) == 1:  # --no-test-before
            means, passed = ["–", *means], ["–", *passed]
        lines.append(
            f"| {name} | {config['seed']} | {means[0]} | **{means[-1]}** "
            f"| {passed[0]} → {passed[-1]} "
            f"| {after['generated'] / 1e6:.2f} M | {after['step']} | {after['seconds'] / 60:.1f} min |"
        )
    return "\n".join(lines)


def validation_table(folders: list[Path]) -> str:
    """A Markdown table of runs, the best first: their last score on the validation split, and cost; last, those that
    were stopped because they had collapsed."""
    found, stopped = [], []
    for folder in folders:
        config, rows = load(folder)
        if runs.ending(rows) == "stopped":
            tokens = f"{rows[-1]['generated'] / 1e6:.2f} M"
            stopped.append(f"| {folder.name} | {config['seed']} | collapsed | – | – | – | {tokens} |")
        elif evaluated := [row for row in rows if "eval_mean" in row]:
            found.append((folder.name, config["seed"], evaluated[-1]))
    if not found and not stopped:
        raise ValueError("none of the runs has been evaluated yet (no eval_mean)")
    k = "/".join(sorted({str(row["eval_k"]) for *_, row in found}))
    lines = [f"| run | seed | mean@{k} | pass@{k} | dense reward | format | tokens |", "|" + "---|" * 7]
    for name, seed, row in sorted(found, key=lambda item: -item[2]["eval_mean"]):
        lines.append(
            f"| {name} | {seed} | **{row['eval_mean']:.1%}** | {row['eval_pass']:.1%} | {row['eval_reward']:+.2f} "
            f"| {row['eval_parsed']:.0%} | {row['generated'] / 1e6:.2f} M |"
        )
    return "\n".join(lines + stopped)


def evaluated(files: list[Path]) -> tuple[dict[str, np.ndarray], dict]:
    """The shares of samples that are right, [seeds, problems], from files of evaluate.py NAME-seedN.json, and the
    settings that they share. ValueError if they don't."""
    found, shared = defaultdict(list), {}
    for file in files:
        one = read_scores(file)
        told = {
            key: one.get(key)
            for key in ("search", "samples", "temperature", "max_tokens", "size", "problems", "skip", "data")
        }
        if told["search"] != "none":
            raise ValueError(f"{file} holds scores of a search, not of a policy alone")
        if differ := differing(shared := shared or told, told):
            raise ValueError(f"{file} can't share a table with {files[0]}: {'; '.join(differ)}")
        score = one["scores"][0]
        found[re.sub(r"-seed\d+$", "", file.stem)].append(np.array(score["right"]) / score["samples"])
    return {name: np.array(some) for name, some in found.items()}, shared


def scores_table(files: list[Path]) -> str:
    """A Markdown table of evaluations of policies alone, the best first: scores, pooled over seeds, and how far from
    those of `mcts`."""
    found, shared = evaluated(files)
    k, at = shared["samples"], shared["temperature"]
    lines = [f"| policy | seeds | mean@{k} at {at} | minus search | pass@{k} |", "|" + "---|" * 5]
    for name, shares in sorted(found.items(), key=lambda item: -item[1].mean()):
        mean, passed = shown_means(shares)
        lead = tuple(100 * x for x in pooled(shares, found["mcts"])) if "mcts" in found and name != "mcts" else None
        lines.append(f"| {name} | {len(shares)} | **{mean}** | {shown_lead(lead)} | {passed} |")
    return "\n".join(lines)


FIGURES = {"curves": learning_curves, "forest": forest, "search": search_curves}
TABLES = {"table": results_table, "summary": summary_table, "validation": validation_table, "scores": scores_table}


@dataclass
class PlotConfig:
    """Draw a figure of some runs, print their results as a table, or make a page of searched trees."""

    what: tyro.conf.Positional[str]  # curves, forest, search, table, summary, validation, scores, tree
    folders: tyro.conf.Positional[list[Path]]  # runs; scores, search: of evaluate.py --out; tree: of --dump-trees
    out: Path = Path("curves.png")  # of curves, forest and search
    x: str = "generated"  # generated, seconds, cpu_seconds

    def __post_init__(self):
        if self.what not in (known := (*FIGURES, *TABLES, "tree")):
            raise ValueError(f"the first word must be one of {', '.join(known)}, not {self.what!r}")
        if missing := [str(folder) for folder in self.folders if not folder.exists()]:
            raise ValueError(f"there is no {', '.join(missing)}")
        if self.what not in ("scores", "search", "tree"):  # a shell's glob names other files too
            self.folders = [f for f in self.folders if runs.log_of(f)]
        if not self.folders:
            raise ValueError("none of the folders holds a run (metrics.jsonl)")
        if self.what in FIGURES:
            check_writable(self.out)
        check_choices(self, x=ALONG)


def main() -> None:
    config = runs.read_config(PlotConfig)
    if config.what == "tree":
        for file in config.folders:
            runs.write(page := file.with_suffix(".html"), explorer.render(explorer.read(file)))
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
    runs.command(main)
