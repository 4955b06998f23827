"""RUN/report.html: a run on one page that needs nothing else.

    python -m experiments.plots report RUN

The numbers come from config.json and metrics.jsonl, the texts from samples.jsonl and trees/. The page leaves out what
a run has not recorded. A model has written the texts, so they reach the page as data, never as markup.
"""

import html
import json
import math
import re
from pathlib import Path

import numpy as np

from config import Config
from runtime import explorer
from runtime.cli import restore
from runtime.files import KIT, write
from runtime.run_folder import ending, read_metrics, read_samples, read_settings
from runtime.scores import bootstrap
from runtime.settings import changed_settings, command, topics

TEMPLATE = KIT / "assets" / "report.html"
COUNTERS = ("step", "generated", "decoded", "prefilled", "valued", "seconds")  # of a run
COSTS = ("sampler_seconds", "critic_seconds", "update_seconds", "cpu_seconds")  # of a step
CURVES = ("reward", "eval_parsed", "kl", "entropy", "gradient_norm", "tokens_per_second")
EVALUATION = ("step", "generated", "eval_k", "eval_mean", "eval_pass")
POINTS = 120  # of a curve, at most


def write_report(folder: Path) -> Path:
    """Write a run's page and return its place. ValueError if the folder holds no run."""
    saved, rows = read_settings(folder), read_metrics(folder)
    if not rows:
        raise ValueError(f"{folder} has no metrics yet: there is nothing to report")
    config, _ = restore(Config, saved, folder)
    before, after = tests(rows)
    evaluations = [{name: row[name] for name in EVALUATION} for row in rows if "eval_mean" in row]
    trees = [tree for file in sorted((folder / "trees").glob("*.json")) for tree in explorer.read(file)]
    report = {
        "run": {name: getattr(config, name) for name in ("method", "preset", "model", "seed")},
        "counters": {name: rows[-1].get(name, 0) for name in COUNTERS},
        "costs": {name: sum(row.get(name, 0) for row in rows) for name in COSTS},
        "gpu_peak_gb": max(row.get("gpu_peak_gb", 0) for row in rows),
        "ending": ending(rows),
        "stopped": rows[-1].get("stopped"),
        "command": command(config),
        "before": before,
        "after": after,
        "change": change(before, after) if before and after else None,
        "evaluations": evaluations,
        "curves": {name: curve(rows, name) for name in CURVES},
        "samples": watched(read_samples(folder)),
        "explorer": explorer.page(trees) if trees else None,
        "changed": changed_settings(config),
        "topics": topics(config),
        "provenance": [[name, str(value)] for name, value in (saved.get("provenance") or {}).items()],
    }
    title, summary = (html.escape(text) for text in headline(before, after, evaluations))
    data = json.dumps(report, allow_nan=False).replace("<", "\\u003c")  # so that no text ends the script element
    texts = {"__TITLE__": title, "__SUMMARY__": summary, "__REPORT__": data}
    page = re.sub("|".join(texts), lambda match: texts[match[0]], TEMPLATE.read_text(encoding="utf-8"))
    write(folder / "report.html", page)
    return folder / "report.html"


def tests(rows: list[dict]) -> tuple[dict | None, dict | None]:
    """The rows of the tests before and after training, None for a test that was not made."""
    scores = [row for row in rows if "test_mean_at_k" in row]
    before = next((score for score in scores if score["step"] == 0), None)
    after = next((score for score in reversed(scores) if score["step"] > 0), None)
    if before and after and any(before[name] != after[name] for name in ("test_problems", "test_samples")):
        before = None  # the run went on with another test
    return before, after


def change(before: dict, after: dict) -> dict:
    """The change of mean@k and of pass@k, each with its 95 % interval over problems."""
    old, new = np.array(before["test_right"]), np.array(after["test_right"])  # [problems]
    differences = {"mean": (new - old) / after["test_samples"], "pass": (new > 0) * 1.0 - (old > 0)}
    return {name: [difference.mean(), *bootstrap(difference)] for name, difference in differences.items()}


def headline(before: dict | None, after: dict | None, evaluations: list[dict]) -> tuple[str, str]:
    """The page's title, and the result in words."""
    if not after:
        score = "The policy has not been evaluated since its training began."
        for row in evaluations[-1:]:
            score = f"On the validation problems mean@{row['eval_k']} is {percent(row['eval_mean'])}."
        return "No test after training", score
    mean, passed = percent(after["test_mean_at_k"]), percent(after["test_pass_at_k"])
    title, text = (
        f"{mean} right answers",
        (
            f"The policy alone, without search, now answers right in {mean} of its samples. At least one of "
            f"{after['test_samples']} samples is right on {passed} of the {after['test_problems']:,} test problems."
        ),
    )
    if before:
        mean, passed = percent(before["test_mean_at_k"]), percent(before["test_pass_at_k"])
        title, text = f"From {mean} to {title}", f"{text} Before training it was {mean} and {passed}."
    return title, text


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def curve(rows: list[dict], name: str) -> list[list[float]]:
    """A metric along training as points [generated tokens, value], each the mean of equally many rows."""
    numbers = [(row["generated"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    size = max(1, math.ceil(len(numbers) / POINTS))
    return [np.mean(numbers[i : i + size], axis=0).tolist() for i in range(0, len(numbers), size)]


def watched(rows: list[dict]) -> dict | None:
    """The rows of samples.jsonl by problem: an answer at each evaluation. None if there are none."""
    answers = {}
    for row in rows:
        answer = {"text": str(row["text"]), "right": row["right"] is True, "reason": str(row["reason"])}
        answers[str(row["problem"]), row["step"]] = answer
    problems, steps = dict.fromkeys(problem for problem, _ in answers), sorted({step for _, step in answers})
    by_problem = [{"problem": name, "answers": [answers.get((name, step)) for step in steps]} for name in problems]
    return {"steps": steps, "rows": by_problem} if by_problem else None
