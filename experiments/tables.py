"""What runs have scored: read, pooled over seeds, held against the search, as Markdown tables (`python plots.py`)."""

import math
import re
from collections import defaultdict
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import numpy as np

from runtime import run_folder
from runtime.cli import differing
from runtime.files import read_json
from config import METHODS, PRESETS, preset_for
from runtime.cli import result_settings
from runtime.scores import DRAWS, interval, resampled

RUN = tuple[dict, list[dict]]  # settings, rows of metrics


def load(folder: Path) -> RUN:
    """A run's configuration and its rows of metrics. ValueError for a config.json that no run has written."""
    config = run_folder.read_settings(folder)
    try:
        told = result_settings(config)
        hash(tuple(told.values()))  # runs are told apart by them
        known = "seed" in config and told["search"] in METHODS and told["preset"] in PRESETS
    except TypeError:  # a value of another kind
        known = False
    if not known:
        raise ValueError(f"{folder}/config.json is damaged: it does not hold the settings of a run")
    return config, run_folder.read_metrics(folder)


def named(key: str, value: object) -> str:
    """A setting in a row's name."""
    return f"{key} {value}" if not isinstance(value, bool) else key if value else f"no {key}"


def by_method(folders: list[Path]) -> dict[str, list[RUN]]:
    """Runs that differ in nothing but their seed together, under their method's name. Where the runs of some method
    differ in more, such settings, if other than in their preset, are part of every name. ValueError for a seed that is
    there twice."""
    found, values = defaultdict(list), defaultdict(set)
    loaded = [(result_settings(config), config, rows) for config, rows in map(load, folders)]
    for told, _, _ in loaded:
        for key, value in told.items():
            values[told["search"], key].add(value)
    varied = {key for (_, key), some in values.items() if len(some) > 1}
    for told, config, rows in loaded:
        usual = result_settings(asdict(preset_for(told["preset"], told["search"])))
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


def require_test(found: dict[str, list[RUN]], key: str = "test_mean_at_k") -> dict[str, list[RUN]]:
    """ValueError if a run has no test after training, or no `key` in it."""
    for name, some in found.items():
        for config, rows in some:
            if run_folder.ending(rows) != "finished" or key not in rows[-1]:
                raise ValueError(
                    f"{name}, seed {config['seed']}, has no {key} after training: leave it out or --resume it"
                )
    return found


def along(rows: list[dict], x: str) -> list[float]:
    """How far a run was at each row. CPU seconds are a step's own (0 throughout where they were not recorded)."""
    if x == "cpu_seconds":
        return list(accumulate(row.get(x, 0) for row in rows))
    return [row[x] for row in rows]


def read_scores(file: Path) -> dict:
    """What `evaluate.py --out` has written, an earlier version's too. ValueError for another file."""
    found = {"skip": 0} | read_json(file)
    if not (found.get("scores") and {"model", "search", "children"} <= found.keys()):
        raise ValueError(f"{file} holds no scores: pass what evaluate.py wrote to its --out")
    return found


def pooled(scores: np.ndarray, rival: np.ndarray | None = None) -> tuple[float, float, float]:
    """The mean of `scores` [seeds, problems], less that of a rival's on the same problems, and its 95 % interval.

    Problems are drawn with replacement, the same ones for all seeds (bootstrap). Five seeds are too few for that: their
    mean is off by s / sqrt(seeds) times a draw from Student's t, with the degrees of freedom that s has. A row and its
    rival are taken to have the same s, so that a row of one seed has its rival's; alone it has none. The noise of the
    samples is in both parts, so the interval is a little too wide.
    """
    rng = np.random.default_rng(0)
    groups = [scores] if rival is None else [scores, -rival]
    per_problem = sum(group.mean(0) for group in groups)  # [problems]
    draws = resampled(per_problem, rng)
    means = [group.mean(1) for group in groups]  # [seeds]
    if freedom := sum(len(mean) - 1 for mean in means):
        s = math.sqrt(sum(((mean - mean.mean()) ** 2).sum() for mean in means) / freedom)
        draws += s * math.sqrt(sum(1 / len(mean) for mean in means)) * rng.standard_t(freedom, DRAWS)
    return float(per_problem.mean()), *interval(draws)


def pass_at(shares: np.ndarray, samples: int) -> np.ndarray:
    """pass@k for k from 1 to `samples`, without bias (Chen et al. 2021, eq. 1), where `shares` [seeds, problems] of
    so many samples are right. [seeds, samples]"""
    wrong, i = samples - np.rint(shares * samples)[..., None], np.arange(samples)  # [seeds, problems, 1], [samples]
    missed = np.cumprod(np.maximum(wrong - i, 0) / (samples - i), -1)  # P(k samples without a right one)
    return (1 - missed).mean(1)


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
    return [result_settings(some[0][0])[name] for name in ("split", "size", "test_problems", "eval_temperature")]


def tested(folders: list[Path]) -> tuple[dict[str, list[RUN]], dict[str, str]]:
    """`by_method` without the runs that were stopped because they had collapsed; and of each row how many seeds there
    are and how many had collapsed."""
    every = by_method(folders)
    left = {name: [run for run in some if run_folder.ending(run[1]) != "stopped"] for name, some in every.items()}
    counts = {name: (len(left[name]), len(some) - len(left[name])) for name, some in every.items()}
    seeds = {
        name: ", ".join(f"{n}{what}" for n, what in zip(pair, ("", " collapsed")) if n) for name, pair in counts.items()
    }
    return require_test(left, "test_right"), seeds


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


def results_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs: test mean@k before and after with 95 % intervals, pass@k, cost."""
    found = require_test(by_method(folders))
    k = "/".join(sorted({str(rows[-1]["test_samples"]) for some in found.values() for _, rows in some}))
    lines = [
        f"| method | seed | mean@{k} before | mean@{k} after | pass@{k} before → after | tokens | steps | training |"
    ]
    lines += ["|" + "---|" * 8]
    for name, config, rows in ((name, *run) for name, some in found.items() for run in some):
        tests = [row for row in rows if "test_mean_at_k" in row]
        means = [shown(*(t[f"test_mean_{key}"] for key in ("at_k", "low", "high"))) for t in tests]
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
        if run_folder.ending(rows) == "stopped":
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


TABLES = {"table": results_table, "summary": summary_table, "validation": validation_table, "scores": scores_table}
