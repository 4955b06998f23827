"""The stopwatch of the benchmarks: medians of repeats, after a warm-up, of one side or of several in turn."""

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

Result = TypeVar("Result")


def timed(
    work: Callable[[], Result], repeats: int, warm_up: int = 0, clock: Callable[[], float] = time.process_time
) -> tuple[float, Result]:
    """The median time of `repeats` calls in seconds, by default the process's own on the CPU; and the last result."""
    times = []
    for _ in range(warm_up + repeats):
        began = clock()
        result = work()
        times.append(clock() - began)
    return median(times[warm_up:]), result


def in_turn(measures: list[Callable[[], float]], repeats: int) -> list[float]:
    """The median of each measurement, taken in turn; the first round warms up."""
    rounds = [[measure() for measure in measures] for _ in range(repeats + 1)][1:]
    return [median(column) for column in zip(*rounds)]
