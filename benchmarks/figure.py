"""What a benchmark is asked and what it answers: `Settings` in, `Figure` out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Series


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the figures are measured.

    Args:
        model: folder or hub id; None for the bundled model.
        runtime: of `captioner.runtimes.RUNTIMES`.
        threads: of torch and of ONNX Runtime, the same for all contestants.
        quick: one repetition of few pictures: whether a benchmark runs, not how fast.
        results: folder for plots.
    """

    model: str | None = None
    runtime: str = "auto"
    threads: int = 2
    quick: bool = False
    results: Path

    def pick(self, full: int, quick: int) -> int:
        """Return a number of repetitions, pictures or words, as `quick` asks."""
        return quick if self.quick else full


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number and what is wanted of it.

    Args:
        name: what was measured.
        value: how much.
        unit: of the value; "x" for a ratio.
        least: wanted is this or more.
        most: wanted is this or less.
    """

    name: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        """What is wanted, in words."""
        if self.least is not None:
            return f"at least {self.least:g}"
        return "" if self.most is None else f"at most {self.most:g}"

    @property
    def reached(self) -> bool | None:
        """Whether it is as wanted; None where nothing is wanted."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def to_record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "value": self.value if math.isfinite(self.value) else None,
            "unit": self.unit,
            "wanted": self.wanted or None,
            "reached": self.reached,
        }


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a benchmark found.

    Args:
        title: what was asked.
        values: the answers.
        series: the times behind them, by contestant.
        notes: what a reader must know: what differs between the contestants, what could not be measured.
        absent: why nothing was measured; None when something was.
    """

    title: str
    values: tuple[Value, ...] = ()
    series: dict[str, Series] | None = None
    notes: tuple[str, ...] = ()
    absent: str | None = None

    def to_record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "title": self.title,
            "absent": self.absent,
            "values": [value.to_record() for value in self.values],
            "series": {
                name: {
                    "median_s": series.median_s,
                    "quartiles_s": list(series.quartiles_s),
                    "cpu_median_s": series.cpu_median_s,
                    "repetitions": len(series.seconds),
                    "calls_per_repetition": series.calls,
                }
                for name, series in (self.series or {}).items()
            },
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Return the table as lines of text."""
        found = [self.title]
        if self.absent is not None:
            found.append(f"  absent: {self.absent}")
        marks = {True: "reached", False: "NOT REACHED", None: ""}
        for value in self.values:
            wanted = f"wanted {value.wanted}: {marks[value.reached]}" if value.wanted else ""
            found.append(f"  {value.name:<62}{value.value:>10.3g} {value.unit:<12} {wanted}".rstrip())
        for name, series in (self.series or {}).items():
            low, high = (1000 * cut for cut in series.quartiles_s)
            middle = f"{1000 * series.median_s:.2f} ms"
            cpu = "" if series.cpu_median_s is None else f"; processor {1000 * series.cpu_median_s:.2f} ms"
            found.append(f"    {name:<60}{middle:>12}  ({low:.2f} to {high:.2f}; {len(series.seconds)} times{cpu})")
        return [*found, *(f"  note: {note}" for note in self.notes)]


def ratio_of(series: dict[str, Series], slow: str, fast: str) -> float:
    """Return how many times as fast one contestant is as another: the ratio of their medians."""
    return series[slow].median_s / series[fast].median_s


def cpu_ratio_of(series: dict[str, Series], slow: str, fast: str) -> float:
    """Return the ratio of the medians of the processor time; NaN where it is too short to be measured."""
    slow_s, fast_s = series[slow].cpu_median_s, series[fast].cpu_median_s
    return slow_s / fast_s if slow_s and fast_s else math.nan
