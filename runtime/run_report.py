"""RUN/report.html: a run on one page that needs nothing else.

    python -m experiments.plots report RUN

The numbers come from config.json and metrics.jsonl, the texts from samples.jsonl and trees/. The page leaves out what
a run has not recorded. A model has written the texts, so they reach the page as data, never as markup.
"""

import html
import inspect
import json
import math
import re
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np

from config import SAMPLING_METHODS, Config, flatten, preset_for
from runtime import explorer
from runtime.cli import field_comments, restore
from runtime.files import KIT, typed, write
from runtime.run_folder import ending, read_metrics, read_settings
from runtime.scores import bootstrap

TEMPLATE = KIT / "assets" / "report.html"
CURVES = ("reward", "eval_parsed", "kl", "entropy", "gradient_norm", "tokens_per_second")
POINTS = 120  # of a curve, at most
SUMS = ("sampler_seconds", "critic_seconds", "update_seconds", "cpu_seconds")  # of a step each


def write_report(folder: Path) -> Path:
    """Write a run's page and return its place. ValueError if the folder holds no run."""
    saved = read_settings(folder)
    config, _ = restore(Config, saved, folder)
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"{folder} has no metrics yet: there is nothing to report")
    before, after = tests(rows)
    evaluations = [row for row in rows if "eval_mean" in row]
    trees = [tree for file in sorted((folder / "trees").glob("*.json")) for tree in explorer.read(file)]
    data = {
        "settings": {name: getattr(config, name) for name in ("method", "preset", "model", "seed")},
        "state": ending(rows),
        "last": rows[-1],
        "command": command(config),
        "before": before,
        "after": after,
        "change": change(before, after),
        "evaluations": evaluations,
        "curves": {name: curve(rows, name) for name in CURVES},
        "samples": samples_of(folder),
        "explorer": explorer.page(trees) if trees else None,
        "changed": changed_settings(config),
        "topics": topics(config),
        "sums": {name: sum(row.get(name, 0) for row in rows) for name in SUMS},
        "gpu_peak_gb": max(row.get("gpu_peak_gb", 0) for row in rows),
        "provenance": [[name, str(value)] for name, value in (saved.get("provenance") or {}).items()],
    }
    title, summary = headline(before, after, evaluations)
    texts = {"TITLE": html.escape(title), "SUMMARY": html.escape(summary)}
    texts["REPORT"] = json.dumps(data).replace("<", "\\u003c")  # so that no text ends the script element
    page = re.sub("__(TITLE|SUMMARY|REPORT)__", lambda match: texts[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    write(folder / "report.html", page)
    return folder / "report.html"


def tests(rows: list[dict]) -> tuple[dict | None, dict | None]:
    """The scores of the tests before and after training, None for a test that was not made."""
    scores = [row for row in rows if "test_mean_at_k" in row]
    before = next((score for score in scores if score["step"] == 0), None)
    after = next((score for score in reversed(scores) if score["step"] > 0), None)
    if before and after and any(before[name] != after[name] for name in ("test_problems", "test_samples")):
        before = None  # a run that went on with another test
    return before, after


def change(before: dict | None, after: dict | None) -> dict | None:
    """The change of mean@k and of pass@k, each with its 95 % interval over problems."""
    if not (before and after):
        return None
    old, new = (np.array(score["test_right"]) for score in (before, after))  # [problems]
    mean, passed = (new - old) / after["test_samples"], (new > 0) * 1.0 - (old > 0)
    return {name: [diff.mean(), *bootstrap(diff)] for name, diff in (("mean", mean), ("pass", passed))}


def headline(before: dict | None, after: dict | None, evaluations: list[dict]) -> tuple[str, str]:
    """The page's title, and the result in words."""
    if not after:
        last = evaluations[-1] if evaluations else None
        score = (
            f"mean@{last['eval_k']} is {percent(last['eval_mean'])}, after step {last['step']:,}"
            if last
            else "no score"
        )
        return "No test after training", f"On the validation problems: {score}."
    mean, passed = percent(after["test_mean_at_k"]), percent(after["test_pass_at_k"])
    title = f"{mean} right answers"
    text = (
        f"The policy alone, without search, now answers right in {mean} of its samples. At least one of "
        f"{after['test_samples']} samples is right on {passed} of the {after['test_problems']:,} test problems."
    )
    if before:
        old_mean, old_passed = percent(before["test_mean_at_k"]), percent(before["test_pass_at_k"])
        return f"From {old_mean} to {title}", f"{text} Before training it was {old_mean} and {old_passed}."
    return title, text


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def curve(rows: list[dict], name: str) -> list[list[float]]:
    """A metric along training as points [generated tokens, value], each the mean of equally many rows."""
    numbers = [(row["generated"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    size = max(1, math.ceil(len(numbers) / POINTS))
    return [np.mean(numbers[i : i + size], axis=0).tolist() for i in range(0, len(numbers), size)]


def samples_of(folder: Path) -> dict | None:
    """The answers to the same problems at each evaluation. A line that a kill has torn is left out."""
    answers, lines = {}, []
    with suppress(FileNotFoundError):
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            answer = {"text": str(row["text"]), "right": row["right"] is True, "reason": str(row["reason"])}
            answers[str(row["problem"]), int(row["step"])] = answer
    problems, steps = dict.fromkeys(problem for problem, _ in answers), sorted({step for _, step in answers})
    rows = [{"problem": name, "answers": [answers.get((name, step)) for step in steps]} for name in problems]
    return {"steps": steps, "rows": rows} if rows else None


def changed_settings(config: Config) -> list[list[str]]:
    """The settings that are not the preset's: name, value, the preset's value."""
    usual, own = flatten(preset_for(config.preset, config.method)), flatten(config)
    names = [name for name in own if own[name] != usual[name] and name not in ("out", "seed")]
    return [[name, str(own[name]), str(usual[name])] for name in names]


def command(config: Config) -> str:
    """The command that makes the run again."""
    program = "baselines.py --method" if config.method in SAMPLING_METHODS else "ppo.py --search"
    words = [f"python {program} {config.method} --seed {config.seed}"]
    if config.preset != "tiny":
        words.append(f"--preset {config.preset}")
    for name, value, _ in changed_settings(config):
        option = name.replace("_", "-")
        flags = {"True": f"--{option}", "False": f"--no-{option}"}
        words.append(flags.get(value) or f"--{option} {typed(value)}")
    return " ".join(words)


def topics(config: Config) -> list[dict]:
    """All settings by topic: name, value, meaning."""
    nested, tables = [config], []
    for topic in nested:
        comments, rows = field_comments(type(topic)), []
        for field in fields(topic):
            value = getattr(topic, field.name)
            if is_dataclass(value):
                nested.append(value)
            else:
                rows.append([field.name, str(value), comments[field.name]])
        name = type(topic).__name__.removesuffix("Config") or "Run"
        tables.append({"name": name, "about": inspect.getdoc(topic), "rows": rows})
    return tables
