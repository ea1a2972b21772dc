"""What a batch run shows while it works: a bar on a terminal, else a line now and then. All of it on standard error.

When nobody takes it any more (the terminal is gone, the pipe closed, the log's disk full), the run goes on unseen.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from captioner.errors import CaptionerError
from captioner.terminal import one_line

if TYPE_CHECKING:
    from captioner.batch import Progress

LINE_EVERY_S = 30.0


class Display(Protocol):
    """Shows how far a run is. A context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, progress: Progress) -> None:
        """Show what a batch has brought; name every picture that failed."""
        ...

    def say(self, text: str) -> None:
        """Show a line."""
        ...


def make_display(*, quiet: bool, console: Console | None = None) -> Display:
    """Return what fits to the terminal.

    Args:
        quiet: show nothing but errors.
        console: of standard error; default: that.

    Returns:
        A bar where there is somebody to look at it, else lines.
    """
    console = console or Console(file=cast("IO[str]", Unbreakable(sys.stderr)), stderr=True, highlight=False)
    if console.is_terminal and not quiet:
        return BarDisplay(console)
    return LineDisplay(console, quiet=quiet)


class Unbreakable:
    """A stream that can be written to whatever becomes of it.

    Args:
        stream: which; None, as Python has it for one that was closed from the start, takes everything.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text, or let it be."""
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Bring it out, or let it be."""
        self._attempt(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Tell whether somebody may look at it."""
        return bool(self._attempt(lambda stream: stream.isatty()))

    def fileno(self) -> int:
        """Return its number."""
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    def _attempt(self, step: Callable[[IO[str]], Any]) -> Any:
        if self._stream is None:
            return None
        try:
            return step(self._stream)
        except (OSError, ValueError):  # ValueError when it was closed by Python
            # What others still write to it, and what is left in its buffer, goes nowhere.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = None
            return None


def duration(seconds: float | None) -> str:
    """Return a time as 1:02:03 or 2:03; "?" when it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def status(progress: Progress) -> str:
    """Return how far a run is as one line."""
    done = progress.captioned + progress.failed + progress.skipped
    of = "" if progress.total is None else f" of {progress.total}"
    parts = [f"{done}{of} pictures", f"{progress.rate:.1f}/s"]
    if progress.remaining_s is not None:
        parts.append(f"{duration(progress.remaining_s)} left")
    if progress.skipped:
        parts.append(f"{progress.skipped} done before")
    parts.append(f"{progress.failed} failed")
    return ", ".join(parts)


def last_caption(progress: Progress) -> str:
    """Return name and caption of the last picture of the batch that has one; else nothing."""
    good = [(name, result) for name, result in progress.results if not isinstance(result, CaptionerError)]
    return one_line(f"{good[-1][0]}: {good[-1][1].text}") if good else ""


def failures(progress: Progress) -> list[str]:
    """Return a line for every picture of the batch that failed."""
    return [
        f"error: {one_line(' '.join(str(result).splitlines()))}"
        for _, result in progress.results
        if isinstance(result, CaptionerError)
    ]


class LineDisplay:
    """Lines: the first after the first batch, then one every half minute.

    Args:
        console: where to.
        quiet: nothing but errors.
        clock: seconds, from any moment on.
    """

    def __init__(self, console: Console, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._quiet, self._clock = console, quiet, clock
        self._next_s = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, progress: Progress) -> None:
        """Show what a batch has brought; see `Display`."""
        for line in failures(progress):
            self._print(line)
        if not self._quiet and self._clock() >= self._next_s:
            self._next_s = self._clock() + LINE_EVERY_S
            self._print(status(progress))

    def say(self, text: str) -> None:
        """Show a line, unless quiet."""
        if not self._quiet:
            self._print(one_line(text))

    def _print(self, text: str) -> None:
        self._console.out(text, highlight=False)


class BarDisplay:
    """A bar with rate, time left, failures and the last caption.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            BarColumn(bar_width=16, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
            # Where there is little room, the caption is what gives way.
            TextColumn(
                "{task.fields[last]}",
                markup=False,
                style="dim",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            transient=False,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, status="starting", last="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Show what a batch has brought; see `Display`."""
        for line in failures(progress):
            self._bar.console.print(Text(line))
        self._bar.update(
            self._task,
            total=progress.total,
            completed=progress.captioned + progress.failed + progress.skipped,
            status=status(progress).partition(", ")[2],
            last=last_caption(progress),
        )

    def say(self, text: str) -> None:
        """Show a line above the bar."""
        self._bar.console.print(Text(one_line(text)))
