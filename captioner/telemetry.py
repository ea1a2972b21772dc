"""What a service says of itself: metrics in the text format of Prometheus, and one line of JSON per request.

Neither holds pictures, names of files, or captions; captions only where `log_captions` asks for them.
Format: https://prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4.
"""

from __future__ import annotations

import bisect
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from captioner.errors import ConfigError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SERIES_LIMIT = 500
OTHER = "other"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


def _escaped(text: str, *, quotes: bool) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)


def _labelled(name: str, labels: Sequence[tuple[str, str]], value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text, quotes=True)}"' for label, text in labels)
    return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


class _Metric:
    """A metric and its series, one for each combination of label values.

    Args:
        kind: "counter", "gauge" or "histogram".
        name: of the metric.
        help_text: one line that says what is counted, and in which unit.
        labels: names of the labels.
    """

    def __init__(self, kind: str, name: str, help_text: str, labels: Sequence[str]) -> None:
        self.kind, self.name, self.help_text, self.labels = kind, name, help_text, tuple(labels)

    def head(self) -> list[str]:
        """Return the two lines before the samples."""
        return [f"# HELP {self.name} {_escaped(self.help_text, quotes=False)}", f"# TYPE {self.name} {self.kind}"]

    def key(self, known: Mapping[tuple[str, ...], object], given: Mapping[str, object]) -> tuple[str, ...]:
        """Return the series of these label values; the one of "other" where there would be too many."""
        if set(given) != set(self.labels):
            raise ConfigError(f"{self.name} has the labels {list(self.labels)}, got {sorted(given)}")
        key = tuple(str(given[label]) for label in self.labels)
        full = self.labels and key not in known and len(known) >= SERIES_LIMIT
        return (OTHER,) * len(self.labels) if full else key


class Counter(_Metric):
    """A number that only rises.

    Args:
        name: of the metric.
        help_text: one line that says what is counted.
        labels: names of the labels.
    """

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        super().__init__("counter", name, help_text, labels)
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], float] = {} if self.labels else {(): 0.0}

    def add(self, amount: float = 1.0, **labels: object) -> None:
        """Raise the number.

        Args:
            amount: by how much.
            **labels: the value of each label.
        """
        with self._lock:
            key = self.key(self._values, labels)
            self._values[key] = self._values.get(key, 0.0) + amount

    def value(self, **labels: object) -> float:
        """Return the number.

        Args:
            **labels: the value of each label.

        Returns:
            The number; 0 for a series that is not there yet.
        """
        with self._lock:
            return self._values.get(self.key(self._values, labels), 0.0)

    def lines(self) -> list[str]:
        """Return the metric as text."""
        with self._lock:
            series = sorted(self._values.items())
        return [*self.head(), *(_labelled(self.name, [*zip(self.labels, key, strict=True)], n) for key, n in series)]


class Gauge(_Metric):
    """A number that rises and falls.

    Args:
        name: of the metric.
        help_text: one line that says what it is, and in which unit.
    """

    def __init__(self, name: str, help_text: str) -> None:
        super().__init__("gauge", name, help_text, ())
        self._lock = threading.Lock()
        self._number = 0.0
        self._read: Callable[[], float] | None = None

    def add(self, amount: float) -> None:
        """Change the number.

        Args:
            amount: by how much.
        """
        with self._lock:
            self._number += amount

    def follow(self, read: Callable[[], float]) -> None:
        """Ask for the number whenever it is read.

        Args:
            read: gives the number, from any thread.
        """
        self._read = read

    def value(self) -> float:
        """Return the number as it is now."""
        return self._number if self._read is None else float(self._read())

    def lines(self) -> list[str]:
        """Return the metric as text."""
        return [*self.head(), _labelled(self.name, (), self.value())]


@dataclass
class _Series:
    counts: list[int]
    total: float = 0.0


class Histogram(_Metric):
    """How often a number fell into which of the buckets.

    Args:
        name: of the metric.
        help_text: one line that says what is measured, and in which unit.
        labels: names of the labels.
        bounds: upper bounds of the buckets, rising; one without bound comes after them.
    """

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = (), *, bounds: Sequence[float]) -> None:
        super().__init__("histogram", name, help_text, labels)
        self._lock = threading.Lock()
        self._bounds = (*bounds, math.inf)
        self._series: dict[tuple[str, ...], _Series] = {} if self.labels else {(): self._empty()}

    def _empty(self) -> _Series:
        return _Series([0] * len(self._bounds))

    def observe(self, value: float, **labels: object) -> None:
        """Count a number.

        Args:
            value: what was measured.
            **labels: the value of each label.
        """
        with self._lock:
            series = self._series.setdefault(self.key(self._series, labels), self._empty())
            series.counts[bisect.bisect_left(self._bounds, value)] += 1
            series.total += value

    def count(self, **labels: object) -> int:
        """Return how many numbers were counted.

        Args:
            **labels: the value of each label.

        Returns:
            The sum over all buckets; 0 for a series that is not there yet.
        """
        with self._lock:
            series = self._series.get(self.key(self._series, labels))
            return sum(series.counts) if series else 0

    def lines(self) -> list[str]:
        """Return the metric as text: cumulative buckets, sum and count of each series."""
        with self._lock:
            known = sorted((key, list(series.counts), series.total) for key, series in self._series.items())
        lines = self.head()
        for key, counts, total in known:
            labels = [*zip(self.labels, key, strict=True)]
            below = 0
            for bound, count in zip(self._bounds, counts, strict=True):
                below += count
                lines.append(_labelled(f"{self.name}_bucket", [*labels, ("le", _number(bound))], below))
            lines.append(_labelled(f"{self.name}_sum", labels, total))
            lines.append(_labelled(f"{self.name}_count", labels, below))
        return lines


@dataclass(frozen=True, eq=False, kw_only=True)
class Telemetry:
    """The metrics and the log of one service. Safe to use from many threads.

    Args:
        log: where the lines of the log go; None for no log. "stderr" is `sys.stderr` as it is at that moment.
        log_captions: whether captions may stand in the log.
    """

    log: IO[str] | str | None = None
    log_captions: bool = False
    http_requests: Counter = field(
        default_factory=lambda: Counter(
            "captioner_http_requests_total", "HTTP requests that were answered.", ("endpoint", "status")
        )
    )
    http_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "captioner_http_request_seconds",
            "Seconds from an HTTP request to the end of its answer.",
            ("endpoint",),
            bounds=SECONDS,
        )
    )
    http_open: Gauge = field(
        default_factory=lambda: Gauge("captioner_http_open", "HTTP requests that are being answered, heartbeats apart.")
    )
    requests: Counter = field(
        default_factory=lambda: Counter(
            "captioner_requests_total", "Requests to the model that were answered.", ("operation", "outcome")
        )
    )
    errors: Counter = field(
        default_factory=lambda: Counter(
            "captioner_errors_total",
            "Errors: of a caption request one for each picture that has none, else one for each request.",
            ("kind",),
        )
    )
    pictures: Counter = field(
        default_factory=lambda: Counter("captioner_pictures_total", "Pictures that went through the model.")
    )
    queue: Gauge = field(default_factory=lambda: Gauge("captioner_queue_pictures", "Pictures that wait for the model."))
    ready: Gauge = field(default_factory=lambda: Gauge("captioner_ready", "1 while requests are taken, otherwise 0."))
    batch_size: Histogram = field(
        default_factory=lambda: Histogram(
            "captioner_batch_size", "Pictures that went through the model together.", bounds=SIZES
        )
    )
    batch_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "captioner_batch_seconds", "Seconds that a batch took the model.", bounds=SECONDS
        )
    )
    wait_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "captioner_wait_seconds", "Seconds that a decoded picture waited for the model.", bounds=SECONDS
        )
    )
    request_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "captioner_request_seconds",
            "Seconds from a request to the model to its answer.",
            ("operation",),
            bounds=SECONDS,
        )
    )
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def prometheus(self) -> str:
        """Return all metrics as text; its media type is `CONTENT_TYPE`."""
        metrics = [metric for metric in vars(self).values() if isinstance(metric, Counter | Gauge | Histogram)]
        return "\n".join(line for metric in metrics for line in metric.lines()) + "\n"

    def write(self, event: str, **fields: Any) -> None:
        """Write a line of the log.

        Args:
            event: what the line is about.
            **fields: plain values. One called `captions` is left out unless `log_captions` is set; what is None is
                left out too.
        """
        if self.log is None:
            return
        if not self.log_captions:
            fields.pop("captions", None)
        time_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        said = {name: value for name, value in fields.items() if value is not None}
        line = json.dumps({"time": f"{time_text}Z", "event": event, **said}, ensure_ascii=True)
        file: Any = sys.stderr if self.log == "stderr" else self.log
        with self._lock:
            try:
                file.write(line + "\n")
                file.flush()
            except (OSError, ValueError):  # a closed or full log is no reason to fail a request
                return
