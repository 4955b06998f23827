"""The stopwatch of the benchmarks: medians of repeats, after a warm-up, of one side or of several in turn."""

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

Found = TypeVar("Found")


def timed(
    work: Callable[[], Found], repeats: int, warm_up: int = 0, clock: Callable[[], float] = time.process_time
) -> tuple[float, Found]:
    """The median time of some calls in seconds, of the process's own on the CPU by default, and what the last made."""
    times = []
    for _ in range(warm_up + repeats):
        began = clock()
        found = work()
        times.append(clock() - began)
    return median(times[warm_up:]), found


def in_turn(measures: list[Callable[[], float]], repeats: int) -> list[float]:
    """The median of each measurement, taken in turn; the first round warms up."""
    rounds = [[measure() for measure in measures] for _ in range(repeats + 1)][1:]
    return [median(column) for column in zip(*rounds)]
