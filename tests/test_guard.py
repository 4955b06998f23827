"""Tests of runtime/guard.py: runs that collapsed are stopped, runs that learn never are."""

from pathlib import Path

import pytest

from runtime.guard import IDLE, Guard
from runtime.run_folder import read_metrics

RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("run", sorted(RESULTS.rglob("metrics.jsonl*")), ids=lambda path: "/".join(path.parts[-3:-1]))
def test_of_the_published_runs_those_that_collapsed_are_stopped(run):
    """Prevents a limit that stops a run that learns, and one that lets a lost run spend its budget."""
    guard, found = Guard(), read_metrics(run.parent)
    stopped = next((row["step"] for row in found if guard.check(row)), None)
    if "stopped" in found[-1]:  # by the guard of its day
        assert stopped and stopped <= found[-1]["step"]
    elif not any("policy_loss" in row for row in found):  # four simulations: no tree has had an answer
        assert stopped == IDLE
    else:
        kept = [row["eval_parsed"] for row in found if "eval_parsed" in row][-1]  # answers in the format
        assert bool(stopped) == (kept < 0.5)


def rows(*parsed, kl=0.0):
    return [{"parsed": share, "kl": kl} for share in parsed]


@pytest.mark.parametrize(
    ("steps", "stopped"),
    [
        (rows(1, 0, 0, 0), 3),
        (rows(0.6, 0.3, 0, 0, 0), 4),
        (rows(*[0] * 9), None),  # a model that has never known the format
        (rows(0.5, *[0] * 9), None),
        (rows(1, 0, 0, 0.25, 0, 0), None),
        (rows(1, 0.06, 0.02, 0.1), 3),  # lost, though some answers still have it
        (rows(*[1] * 9, kl=4.9), None),
        (rows(*[1] * 9, kl=5.1), 2),
        (rows(*[0] * 9, kl=5.1), 2),
        (rows(1, 1, kl=9) + rows(1, 1) + rows(1, 1, kl=9), None),  # outliers
        (rows(1, 0, 0) + [{"trajectories": 0}, {"test_parsed": 0.0}] + rows(0), 5),  # no news
        ([{"parsed": 1.0}] * 9, None),  # no KL is measured
        ([{"parsed": 1.0}, {"parsed": 0.0}] * 5, None),
        ((rows(1, kl=9) + [{"parsed": 1.0}]) * 3, 4),  # nothing was taught in between
        (rows(1, kl=9) * 2 + [{"parsed": 0.0}], 2),
    ],
)
def test_a_run_stops_after_three_bad_steps_in_a_row(steps, stopped):
    """Prevents a stop for one outlier, for a format that was never known, or never."""
    guard = Guard(max_kl=5.0, patience=3)
    assert next((i for i, row in enumerate(steps) if guard.check(row)), None) == stopped


def test_a_run_that_learns_nothing_is_stopped():
    """Prevents a budget that is spent on steps whose answers are all wrong, or whose groups are all alike; and a stop
    of a run that has a lesson now and then, or that has just been tested."""
    lesson, none = {"trajectories": 4, "parsed": 1.0, "policy_loss": 0.1}, {"trajectories": 4, "parsed": 1.0}
    empty, test, solved = {"trajectories": 0, "solved": 0.0}, {"test_parsed": 1.0}, {"trajectories": 0, "solved": 1.0}
    guard = Guard(idle=3)
    assert [guard.check(row) for row in (none, empty, lesson, none, empty, solved, none, test, empty)] == [""] * 9
    assert guard.check(none) == "3 steps in a row have taught the policy nothing"


def test_the_reason_is_told():
    """Prevents a stop that nobody understands."""
    guard = Guard(max_kl=5.0, patience=2, knew_format=True)
    assert [guard.check(row) for row in rows(0, 0, kl=6.54)] == [
        "",
        "collapsed, 2 bad steps in a row: KL 6.5 nats a token, the limit is 5; 0% of the answers have the format",
    ]
