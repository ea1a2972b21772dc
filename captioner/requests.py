"""What a service keeps of one request: who waits, a place at the decoder, words on the way, what telemetry is told."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

from captioner.batching import Batcher, Item, Ticket
from captioner.caption import Caption, Word
from captioner.errors import CaptionerError
from captioner.prepared import PreparedPicture
from captioner.telemetry import Telemetry


class Caller:
    """One who waits, and may leave: then what has not started leaves the queue, and what comes later never enters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = False
        self._futures: list[Future[Any]] = []

    def require_present(self) -> None:
        """Raise `CancelledError` when the caller has left."""
        if self._left:
            raise CancelledError

    def wait_for(self, future: Future[Any]) -> None:
        """Cancel a future when the caller leaves, or now when that has happened."""
        with self._lock:
            self._futures.append(future)
            left = self._left
        if left:
            future.cancel()

    def leave(self) -> None:
        """Cancel what the caller waits for. What has started goes on."""
        with self._lock:
            self._left, futures = True, [*self._futures]
        for future in futures:  # without the lock: its callbacks are others' code
            future.cancel()


CALLER: ContextVar[Caller | None] = ContextVar("captioner_caller", default=None)
"""For whom this thread works; None where nobody would say that they leave."""


_GONE_LIMIT = 1000


def require_present() -> None:
    """Raise `CancelledError` where the one for whom this thread works has left."""
    if (caller := CALLER.get()) is not None:
        caller.require_present()


class Callers:
    """Who waits for an answer, by the names under which the door before the page knows them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._present: dict[str, set[Caller]] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()

    @contextlib.contextmanager
    def waiting(self, *names: str, once: Collection[str] = ()) -> Iterator[Caller]:
        """Work for a caller in this thread, as long as the block lasts.

        Args:
            *names: of the call, and of the page it comes from.
            once: those of them that no other call ever has: who left under one before the work began has left.

        Yields:
            The caller.
        """
        caller = Caller()
        with self._lock:
            for name in names:
                self._present.setdefault(name, set()).add(caller)
            gone = not self._gone.keys().isdisjoint(once)
        if gone:
            caller.leave()
        token = CALLER.set(caller)
        try:
            yield caller
        finally:
            CALLER.reset(token)
            with self._lock:
                for name in set(names):
                    self._present[name].discard(caller)
                    if not self._present[name]:
                        del self._present[name]

    def leave(self, name: str) -> None:
        """Cancel what those of a name wait for; a name that nobody has is none's.

        Args:
            name: of a call, or of a page.
        """
        with self._lock:
            callers = [*self._present.get(name, ())]
            self._gone[name] = None
            while len(self._gone) > _GONE_LIMIT:
                self._gone.popitem(last=False)
        for caller in callers:
            caller.leave()


_RUNS_LOCK = threading.Lock()  # not one for each: a page's runs are copied before it is first used


def _nobody() -> None:
    """Stand for no caller."""


class Runs:
    """The runs of one page: the latest counts. An older one leaves the queue, and shows nothing more.

    Args:
        shown: what the page shows.
    """

    def __init__(self, shown: Any = None) -> None:
        self.shown = shown
        self._run = 0
        # Weakly: pages stay open for hours, and a caller holds the answers it has waited for.
        self._caller: Callable[[], Caller | None] = _nobody

    def goes_on(self, run: int, shown: Any = None) -> bool:
        """Say that a run goes on in this thread; of a later one than before, that the older ones are to end.

        Args:
            run: its number, larger than those of all earlier ones.
            shown: what the page shows from now on; None leaves that as it is.

        Returns:
            Whether it is the latest; it is to end when it is not.
        """
        with _RUNS_LOCK:
            if run < self._run:
                return False
            older = self._caller() if run > self._run else None
            caller = CALLER.get()
            self._run, self._caller = run, _nobody if caller is None else weakref.ref(caller)
            self.shown = self.shown if shown is None else shown
        if older is not None:
            older.leave()
        return True


class Place:
    """Places in the queue of a service that were taken at its door, for the one who comes through.

    Args:
        batcher: whose places they are; None for none.
        ticket: with the places.

    Attributes:
        errors_counted: whether the service has counted an error of this request, so that the door need not.
    """

    def __init__(self, batcher: Batcher | None = None, ticket: Ticket | None = None) -> None:
        self.errors_counted = False
        self._lock = threading.Lock()
        self._batcher, self._ticket = batcher, ticket

    def take(self, batcher: Batcher, count: int) -> Ticket | None:
        """Use the places, once.

        Args:
            batcher: of the service that is asked.
            count: how many are needed.

        Returns:
            The ticket; None when these are places of another, or used.

        Raises:
            ServiceError: when more are needed than there are, or time is up.
        """
        if batcher is not self._batcher or (ticket := self._given()) is None:
            return None
        try:
            batcher.take(ticket, count)
        except BaseException:
            batcher.release(ticket)
            raise
        return ticket

    def drop(self) -> None:
        """Give the places back that were not used."""
        if (ticket := self._given()) is not None and self._batcher is not None:
            self._batcher.release(ticket)

    def _given(self) -> Ticket | None:
        with self._lock:
            ticket, self._ticket = self._ticket, None
        return ticket


PLACED: ContextVar[Place | None] = ContextVar("captioner_place", default=None)
"""What the one for whom this thread works was given at the door."""


class WordStream:
    """Words on their way from the model thread to the one who reads them; the model never waits for the reader.

    Args:
        start: starts the search, in the model thread.
    """

    def __init__(self, start: Callable[[PreparedPicture], Iterator[Word]]) -> None:
        self._start = start
        self._queue: queue.SimpleQueue[Word | None] = queue.SimpleQueue()  # None: started, then ended
        self._stopped = False

    def run(self, picture: PreparedPicture) -> None:
        """Search, in the model thread."""
        words = self._start(picture)
        self._queue.put(None)
        for word in words:
            if self._stopped:  # nobody reads any more, or time is up
                return
            self._queue.put(word)

    def follow(self, future: Future[Any]) -> Iterator[Word]:
        """Wait for the start, then hand the words out."""
        future.add_done_callback(self._end)
        self._queue.get()
        if future.done():
            future.result()  # raises what went wrong
        return self._read(future)

    def _end(self, future: Future[Any]) -> None:
        del future
        self._stopped = True
        self._queue.put(None)

    def _read(self, future: Future[Any]) -> Iterator[Word]:
        try:
            while (word := self._queue.get()) is not None:
                yield word
            future.result()  # raises what went wrong on the way
        finally:
            self._stopped = True
            future.cancel()


class Turnstile:
    """Lets some threads in at a time, first come, first served: a semaphore would let the same one in again.

    Args:
        places: how many threads may be in.
        capacity: what those inside may weigh together; None for no limit.
    """

    def __init__(self, places: int, *, capacity: int | None = None) -> None:
        self._lock = threading.Lock()
        self._free, self._capacity = places, capacity
        self._inside = 0
        self._line: deque[tuple[threading.Event, int]] = deque()

    def enter(self, deadline_s: float, *, weight: int = 0) -> bool:
        """Wait for a place; False when there was none until then, on the clock of `time.monotonic`.

        Args:
            deadline_s: until when.
            weight: of the one who enters; one that is too heavy for the capacity goes in alone.

        Returns:
            Whether there was a place; `leave` gives it back.
        """
        mine = (threading.Event(), weight)
        with self._lock:
            self._line.append(mine)
            self._let_in()
        came = False
        try:
            came = mine[0].wait(max(0.0, deadline_s - time.monotonic()))
        finally:
            if not came:
                with self._lock:
                    if mine[0].is_set():  # in this very moment
                        came = True
                    else:
                        self._line.remove(mine)
                        self._let_in()  # who stood behind may be lighter
        return came

    def leave(self, *, weight: int = 0) -> None:
        """Hand the place to the next in line.

        Args:
            weight: as for `enter`.
        """
        with self._lock:
            self._free += 1
            self._inside -= weight
            self._let_in()

    def _let_in(self) -> None:
        while self._line and self._free:
            event, weight = self._line[0]
            if self._capacity is not None and self._inside and self._inside + weight > self._capacity:
                return
            self._line.popleft()
            self._free -= 1
            self._inside += weight
            event.set()


class RequestRecord:
    """What telemetry is told of one request, when its last picture is answered.

    Args:
        telemetry: that is told.
        operation: what was asked for.
        pictures: how many were given.
    """

    def __init__(self, telemetry: Telemetry, operation: str, *, pictures: int) -> None:
        self._telemetry, self._operation, self._pictures = telemetry, operation, pictures
        self._place = PLACED.get()
        self._began_s = time.monotonic()
        self._lock = threading.Lock()
        self._open = 1  # this block, and every item
        self._items: list[Item] = []
        self._errors: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self._close_one(refused=error is not None)

    def failed(self, error: BaseException) -> None:
        """Count an error of the request, or of one of its pictures."""
        if isinstance(error, CancelledError):
            self._errors.append("Cancelled")
            return
        kind = type(error).__name__ if isinstance(error, CaptionerError) else "Other"
        self._errors.append(kind)
        self._telemetry.errors.add(kind=kind)
        if self._place is not None:
            self._place.errors_counted = True

    def watch(self, item: Item) -> None:
        """Wait for an item's answer before the request is counted."""
        with self._lock:
            self._open += 1
            self._items.append(item)
        item.future.add_done_callback(self._answered)

    def _answered(self, future: Future[Any]) -> None:
        if future.cancelled():
            self._errors.append("Cancelled")
        elif (error := future.exception()) is not None:
            self.failed(error)
        self._close_one(refused=False)

    def _close_one(self, *, refused: bool) -> None:
        with self._lock:
            self._open -= 1
            if self._open:
                return
        errors = self._errors
        whole = refused or len(errors) >= self._pictures > 0
        seconds = time.monotonic() - self._began_s
        self._telemetry.requests.add(operation=self._operation, outcome=errors[-1] if whole and errors else "ok")
        self._telemetry.request_seconds.observe(seconds, operation=self._operation)
        started = [item for item in self._items if item.started_s is not None]
        self._telemetry.write(
            "request",
            operation=self._operation,
            pictures=self._pictures,
            milliseconds=round(1000 * seconds, 1),
            wait_milliseconds=max(
                (round(1000 * (item.started_s - item.queued_s), 1) for item in started if item.started_s), default=None
            ),
            batch=max((item.batch for item in started), default=None),
            error=errors[-1] if errors else None,
            failed_pictures=len(errors) or None,
            captions=[_text(item) for item in started] if self._telemetry.log_captions else None,
        )


def _text(item: Item) -> str | None:
    found = None if item.future.cancelled() or item.future.exception() else item.future.result()
    return found.text if isinstance(found, Caption) else None
