"""The one way of timing of all figures: contestants take turns in one run, and medians are compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PAUSE_S = 0.02
"""Before each turn. Threads of a pool go on asking for work for some milliseconds after their last, and would take
the processor from the next contestant."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The times of one contestant.

    Args:
        seconds: of one call, in each repetition.
        calls: in each repetition.
        cpu_seconds: processor time of one call, all threads together, in each repetition; empty where it was not
            taken. It counts less what else runs on the machine.
    """

    seconds: tuple[float, ...]
    calls: int = 1
    cpu_seconds: tuple[float, ...] = ()

    def per(self, count: int) -> Series:
        """Return the times of one of so many things that a call does."""
        whole, cpu = (tuple(taken / count for taken in times) for times in (self.seconds, self.cpu_seconds))
        return Series(seconds=whole, calls=self.calls, cpu_seconds=cpu)

    @property
    def median_s(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.seconds)

    @property
    def cpu_median_s(self) -> float | None:
        """Median of the processor time."""
        return statistics.median(self.cpu_seconds) if self.cpu_seconds else None

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile of the repetitions: how quiet the machine was."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def seconds_of(action: Callable[[], object], calls: int = 1) -> float:
    """Time an action.

    Args:
        action: what is timed.
        calls: how often it is called in a row.

    Returns:
        Seconds of one call, the mean of those in the row.
    """
    began_s = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - began_s) / calls


def take_turns(
    contestants: Mapping[str, Callable[[], object]], *, repetitions: int, least_s: float = 0.0
) -> dict[str, Series]:
    """Time contestants in turns, A B A B ..., so that all meet the same machine.

    Args:
        contestants: what is timed, by name. Each is called before, to warm up.
        repetitions: turns of each.
        least_s: a turn takes at least about so long: a contestant faster than that is called many times in it.

    Returns:
        The times of each, in the order of the contestants.
    """
    calls = {}
    for name, action in contestants.items():
        action()
        calls[name] = max(1, math.ceil(least_s / seconds_of(action))) if least_s else 1
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, action in contestants.items():
            time.sleep(PAUSE_S)
            cpu_began_s = time.process_time()
            seconds[name].append(seconds_of(action, calls[name]))
            cpu_seconds[name].append((time.process_time() - cpu_began_s) / calls[name])
    return {
        name: Series(seconds=tuple(times), calls=calls[name], cpu_seconds=tuple(cpu_seconds[name]))
        for name, times in seconds.items()
    }


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Fit seconds = a * size ** exponent by least squares of the logarithms.

    Args:
        sizes: at least two different ones.
        seconds: the time of each.

    Returns:
        The exponent: 1 is linear, less is cheaper.
    """
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(s) for s in seconds]).slope
