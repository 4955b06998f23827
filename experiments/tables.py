"""Scores of runs and evaluations: read, pooled over seeds, compared with the search, printed as Markdown tables.

`python -m experiments.plots table …` prints them.
"""

import math
import re
from collections import defaultdict
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import numpy as np

from config import preset_for
from runtime.cli import differing, result_settings
from runtime.files import read_json
from runtime.run_folder import ending, read_metrics, read_settings
from runtime.scores import DRAWS, interval, resampled

Logs = tuple[dict, list[dict]]  # what a run has written: config.json and its rows of metrics
Lead = tuple[float, float, float]  # a difference, and its 95 % interval

# ------------------------------------------------------------------------------------------------ runs


def load(folder: Path) -> Logs:
    """A run's configuration and rows of metrics. ValueError for a config.json without the settings of a run."""
    config = read_settings(folder)
    try:
        settings = result_settings(config)
        complete = preset_settings(settings).keys() <= settings.keys()
        hash(tuple(settings.values()))  # runs are grouped by them
    except (KeyError, TypeError, ValueError):
        complete = False
    if not complete:
        raise ValueError(f"{folder}/config.json is damaged: it does not hold the settings of a run")
    return config, read_metrics(folder)


def preset_settings(settings: dict) -> dict:
    """The settings of the preset and method that are named in a run's settings."""
    return result_settings(asdict(preset_for(settings["preset"], settings["method"])))


def setting_name(key: str, value: object) -> str:
    """A setting in the name of a row: "children 2", "failures", "no cutoff"."""
    if value is None or value is False:
        return f"no {key}"
    return key if value is True else f"{key} {value}"


def by_method(folders: list[Path]) -> dict[str, list[Logs]]:
    """Runs grouped: those that differ in their seed alone are one group, under their method's name.

    Where the runs of a method differ in another setting, the names of all groups tell that setting, unless it has the
    value of their preset. ValueError for a seed that a group has twice.
    """
    runs = [(result_settings(config), (config, rows)) for config, rows in map(load, folders)]
    values = defaultdict(set)
    for settings, _ in runs:
        for key, value in settings.items():
            values[settings["method"], key].add(value)
    varied = {key for (_, key), different in values.items() if len(different) > 1} - {"seed"}
    groups = defaultdict(list)
    for settings, logs in runs:
        changed = [
            setting_name(key, settings[key])
            for key, usual in preset_settings(settings).items()
            if key in varied and (key == "preset" or settings[key] != usual)
        ]
        groups[", ".join([settings["method"], *changed]).replace("_", " ")].append(logs)
    for name, group in groups.items():
        if len({config["seed"] for config, _ in group}) < len(group):
            raise ValueError(f"two runs of {name} have the same seed: pass each run once")
    return {name: groups[name] for name in sorted(groups, key=lambda name: (name.count(","), name))}


def require_test(groups: dict[str, list[Logs]], key: str = "test_mean_at_k") -> dict[str, list[Logs]]:
    """The groups. ValueError for a run that has no test after training, or no `key` in it."""
    for name, group in groups.items():
        for config, rows in group:
            if ending(rows) != "finished" or key not in rows[-1]:
                raise ValueError(
                    f"{name}, seed {config['seed']}, has no {key} after training: leave it out or --resume it"
                )
    return groups


def tested(folders: list[Path]) -> tuple[dict[str, list[Logs]], dict[str, str]]:
    """The groups of `by_method` without collapsed runs, and for each group the number of its seeds as text. Runs count
    as collapsed if they were stopped for that."""
    groups, seeds = {}, {}
    for name, group in by_method(folders).items():
        groups[name] = [logs for logs in group if ending(logs[1]) != "stopped"]
        counts = (len(groups[name]), ""), (len(group) - len(groups[name]), " collapsed")
        seeds[name] = ", ".join(f"{count}{text}" for count, text in counts if count)
    return require_test(groups, "test_right"), seeds


def along(rows: list[dict], x: str) -> list[float]:
    """How far a run was at each row, in tokens, seconds or CPU seconds; 0 throughout where that was not recorded. Rows
    hold the CPU seconds of their step alone."""
    if x == "cpu_seconds":
        return list(accumulate(row.get(x, 0) for row in rows))
    return [row.get(x, 0) for row in rows]


# ------------------------------------------------------------------------------------------------ evaluations


def read_scores(file: Path) -> dict:
    """What `evaluate.py --out` has written. ValueError for another file."""
    result = read_json(file)
    is_tree = isinstance(result.get("tree"), dict)
    if not (result.get("scores") and {"model", "method"} <= result.keys() and is_tree == (result["method"] == "mcts")):
        raise ValueError(f"{file} holds no scores: pass what evaluate.py wrote to its --out")
    return result


def evaluated(files: list[Path]) -> tuple[dict[str, np.ndarray], dict]:
    """The shares of samples that are right, [seeds, problems], from the files NAME-seedN.json of evaluate.py, by NAME,
    and the settings of the evaluations. ValueError if they differ in these."""
    scores, shared = defaultdict(list), {}
    for file in files:
        result = read_scores(file)
        keys = "method", "samples", "temperature", "max_tokens", "size", "problems", "skip", "data"
        settings = {key: result.get(key) for key in keys}
        if settings["method"] != "none":
            raise ValueError(f"{file} holds scores of a search, not of a policy alone")
        if differences := differing(shared := shared or settings, settings):
            raise ValueError(f"{file} can't share a table with {files[0]}: {'; '.join(differences)}")
        score = result["scores"][0]
        scores[without_seed(file.stem)].append(np.array(score["right"]) / score["samples"])
    return {name: np.array(shares) for name, shares in scores.items()}, shared


def without_seed(name: str) -> str:
    """The name that the seeds of a policy share: mcts of mcts-seed1."""
    return re.sub(r"-seed\d+$", "", name)


# ------------------------------------------------------------------------------------------------ statistics


def scores_of(group: list[Logs]) -> np.ndarray:
    """The share of samples that are right on each test problem, after training. [seeds, problems]"""
    tests = [rows[-1] for _, rows in group]
    return np.array([row["test_right"] for row in tests]) / tests[0]["test_samples"]


def pooled(scores: np.ndarray, rival: np.ndarray | None = None) -> Lead:
    """The mean of `scores` [seeds, problems] and its 95 % interval; with `rival`, scores on the same problems, that of
    the difference.

    The interval has two parts. Problems are drawn with replacement, the same ones for all seeds (bootstrap). Seeds are
    too few for a bootstrap: the error of their mean is s / sqrt(seeds) times a draw from Student's t, with the degrees
    of freedom of s. The scores and the rival share one s, so scores of one seed have the rival's; without a rival one
    seed has no such part. The noise of the samples is in both parts, so the interval is a little too wide.
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


def settings_of_test(group: list[Logs]) -> list:
    """What the test problems of a group of runs depend on."""
    settings = result_settings(group[0][0])
    return [settings[key] for key in ("data", "split", "size", "test_problems", "eval_temperature")]


def matching_search(name: str, groups: dict[str, list[Logs]]) -> list[Logs] | None:
    """The search that a group of runs is compared with; None if there is none that was tested on the same problems.

    It is the search that has the changed settings of the group's name too; if there is none, the one that has the last
    of them, as many as possible. A search is compared with one that has fewer of them.
    """
    method, *changed = name.split(", ")
    names = (", ".join(["mcts", *changed[i:]]) for i in range(method == "mcts", len(changed) + 1))
    search = next((groups[name] for name in names if groups.get(name)), None)
    return search if search and settings_of_test(search) == settings_of_test(groups[name]) else None


def lead(name: str, groups: dict[str, list[Logs]]) -> Lead | None:
    """By how many points of test mean@k a group leads over its `matching_search`."""
    if not (groups[name] and (search := matching_search(name, groups))):
        return None
    return in_points(pooled(scores_of(groups[name]), scores_of(search)))


def in_points(difference: Lead) -> Lead:
    """A difference of shares in percentage points."""
    return tuple(100 * x for x in difference)


# ------------------------------------------------------------------------------------------------ tables


def share_text(share: float, low: float, high: float) -> str:
    """A share and its interval in a table."""
    return f"{share:.1%} [{low:.1%}, {high:.1%}]"


def mean_and_pass(shares: np.ndarray) -> tuple[str, str]:
    """mean@k and pass@k in a table, from the shares of samples that are right [seeds, problems]."""
    return share_text(*pooled(shares)), share_text(*pooled((shares > 0) * 1.0))


def lead_text(difference: Lead | None) -> str:
    """A lead in a table; a dash for none."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*difference) if difference else "–"


def summary_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs, a row a method: test scores after training, pooled over seeds, the `lead` over
    the search, and cost. CPU time is of training alone, where it was recorded. Collapsed seeds are only counted."""
    groups, seeds = tested(folders)
    ks = {rows[-1]["test_samples"] for group in groups.values() for _, rows in group}
    if len(ks) > 1:
        raise ValueError(f"runs with {sorted(ks)} samples a test problem can't share a table")
    k = ks.pop() if ks else "k"
    lines = [f"| method | seeds | mean@{k} | minus search | pass@{k} | format | tokens | steps | CPU |"]
    lines.append("|" + "---|" * 9)
    for name, group in groups.items():
        if not group:
            lines.append(f"| {name} | {seeds[name]} |" + " – |" * 7)
            continue
        mean, passed = mean_and_pass(scores_of(group))
        tokens, steps, parsed = (
            np.mean([rows[-1][key] for _, rows in group]) for key in ("generated", "step", "test_parsed")
        )
        times = [sum(row.get("cpu_seconds", 0) for row in rows) for _, rows in group]
        cpu = f"{np.mean([time for time in times if time]) / 60:.1f} min" if any(times) else "–"
        lines.append(
            f"| {name} | {seeds[name]} | **{mean}** | {lead_text(lead(name, groups))} | {passed} | {parsed:.0%} "
            f"| {tokens / 1e6:.2f} M | {steps:.0f} | {cpu} |"
        )
    return "\n".join(lines)


def tokens_table(folders: list[Path]) -> str:
    """A Markdown table of runs, a row a method: tokens by both counts, and the validation score where all methods have
    spent equally many of each. ValueError for a run that has not recorded what it decoded."""
    groups = by_method(folders)
    every_row = [rows for group in groups.values() for _, rows in group]
    if not all("decoded" in rows[-1] for rows in every_row):
        raise ValueError("a run has not recorded decoded tokens: it was made by an earlier version")
    spent = {count: min(rows[-1][count] for rows in every_row) for count in ("generated", "decoded")}
    scores = [f"validation at {tokens / 1e6:.2f} M {count}" for count, tokens in spent.items()]
    lines = [" | ".join(["| method", "seeds", "generated", "decoded", "ratio", "prefilled", *scores]) + " |"]
    lines.append("|" + "---|" * 8)
    for name, group in groups.items():
        generated, decoded, prefilled = (
            np.mean([rows[-1][count] for _, rows in group]) / 1e6 for count in ("generated", "decoded", "prefilled")
        )
        at = [np.mean([score_at(rows, count, tokens) for _, rows in group]) for count, tokens in spent.items()]
        lines.append(
            f"| {name} | {len(group)} | {generated:.2f} M | {decoded:.2f} M | {generated / decoded:.2f} "
            f"| {prefilled:.2f} M | **{at[0]:.1%}** | **{at[1]:.1%}** |"
        )
    return "\n".join(lines)


def score_at(rows: list[dict], count: str, tokens: float) -> float:
    """A run's validation score after so many tokens by a count, between two evaluations on the line that joins them."""
    evaluations = [row for row in rows if "eval_mean" in row]
    return np.interp(tokens, [row[count] for row in evaluations], [row["eval_mean"] for row in evaluations])


def overview_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs, a row a method, the best first: test scores at the temperature of training,
    and those of the study's stage `cold`, whose files lie in ../cold/RUN.json beside the folder of a run's stage."""
    groups, _ = tested(folders)
    if not (groups.get("mcts") and all(groups.values())):
        raise ValueError("an overview is of finished runs: leave out collapsed ones, and pass those of `mcts` too")
    policies, shared = evaluated([folder.parents[1] / "cold" / f"{folder.name}.json" for folder in folders])
    warm, cold = {name: scores_of(group) for name, group in groups.items()}, {}
    for folder in folders:
        config, _ = load(folder)
        name = next(name for name, group in groups.items() if any(config == other for other, _ in group))
        cold[name] = policies[without_seed(folder.name)]
    k, cold_score = groups["mcts"][0][1][-1]["test_samples"], f"mean@{shared['samples']} at {shared['temperature']}"
    lines = [f"| method | mean@{k} | minus search | pass@{k} | {cold_score} | minus search |"]
    lines.append("|" + "---|" * 6)
    for name in sorted(groups, key=lambda name: -warm[name].mean()):
        (mean, passed), (cold_mean, _) = mean_and_pass(warm[name]), mean_and_pass(cold[name])
        warm_lead, cold_lead = "–", "–"
        if name != "mcts":
            warm_lead = lead_text(in_points(pooled(warm[name], warm["mcts"])))
            cold_lead = lead_text(in_points(pooled(cold[name], cold["mcts"])))
        lines.append(f"| {name} | **{mean}** | {warm_lead} | {passed} | **{cold_mean}** | {cold_lead} |")
    return "\n".join(lines)


def results_table(folders: list[Path]) -> str:
    """A Markdown table of finished runs, a row each: test mean@k before and after with 95 % intervals, pass@k, cost."""
    groups = require_test(by_method(folders))
    k = "/".join(sorted({str(rows[-1]["test_samples"]) for group in groups.values() for _, rows in group}))
    lines = [
        f"| method | seed | mean@{k} before | mean@{k} after | pass@{k} before → after | tokens | steps | training |"
    ]
    lines += ["|" + "---|" * 8]
    for name, config, rows in ((name, *logs) for name, group in groups.items() for logs in group):
        tests = [row for row in rows if "test_mean_at_k" in row]
        means = [share_text(*(test[f"test_mean_{key}"] for key in ("at_k", "low", "high"))) for test in tests]
        passed, after = [f"{test['test_pass_at_k']:.1%}" for test in tests], tests[-1]
        if len(tests) == 1:  # --no-test-before
            means, passed = ["–", *means], ["–", *passed]
        lines.append(
            f"| {name} | {config['seed']} | {means[0]} | **{means[-1]}** "
            f"| {passed[0]} → {passed[-1]} "
            f"| {after['generated'] / 1e6:.2f} M | {after['step']} | {after['seconds'] / 60:.1f} min |"
        )
    return "\n".join(lines)


def validation_table(folders: list[Path]) -> str:
    """A Markdown table of runs, the best first: the last score on the validation split, and cost. Collapsed runs come
    last."""
    scored, collapsed = [], []
    for folder in folders:
        config, rows = load(folder)
        if ending(rows) == "stopped":
            tokens = f"{rows[-1]['generated'] / 1e6:.2f} M"
            collapsed.append(f"| {folder.name} | {config['seed']} | collapsed | – | – | – | {tokens} |")
        elif evaluations := [row for row in rows if "eval_mean" in row]:
            scored.append((folder.name, config["seed"], evaluations[-1]))
    if not scored and not collapsed:
        raise ValueError("none of the runs has been evaluated yet (no eval_mean)")
    k = "/".join(sorted({str(row["eval_k"]) for *_, row in scored}))
    lines = [f"| run | seed | mean@{k} | pass@{k} | dense reward | format | tokens |", "|" + "---|" * 7]
    for name, seed, row in sorted(scored, key=lambda run: -run[2]["eval_mean"]):
        lines.append(
            f"| {name} | {seed} | **{row['eval_mean']:.1%}** | {row['eval_pass']:.1%} | {row['eval_reward']:+.2f} "
            f"| {row['eval_parsed']:.0%} | {row['generated'] / 1e6:.2f} M |"
        )
    return "\n".join(lines + collapsed)


def scores_table(files: list[Path]) -> str:
    """A Markdown table of evaluations of policies alone, the best first: scores, pooled over seeds, and their lead over
    those of `mcts`."""
    policies, shared = evaluated(files)
    k, temperature = shared["samples"], shared["temperature"]
    lines = [f"| policy | seeds | mean@{k} at {temperature} | minus search | pass@{k} |", "|" + "---|" * 5]
    for name, shares in sorted(policies.items(), key=lambda policy: -policy[1].mean()):
        mean, passed = mean_and_pass(shares)
        is_rival = "mcts" in policies and name != "mcts"
        difference = in_points(pooled(shares, policies["mcts"])) if is_rival else None
        lines.append(f"| {name} | {len(shares)} | **{mean}** | {lead_text(difference)} | {passed} |")
    return "\n".join(lines)


TABLES = {
    "table": results_table,
    "summary": summary_table,
    "overview": overview_table,
    "tokens": tokens_table,
    "validation": validation_table,
    "scores": scores_table,
}
