"""A queue before one model: many callers, one batch after another, each answer to the one who asked.

    admit(n) ──▶ Ticket ──put(key, work)──▶ Item, with a Future ──┐   waiting, by key
                                                                  ▼
    model thread: the key of the item whose turn it is, with others of that key ──run──▶ outcomes ──▶ futures

Whose turn it is follows start-time fair queueing (Goyal, Vin and Cheng 1996) with every item of the same cost: the
items of a ticket have rising turns, and a new ticket starts at the turn that is being served, so that a ticket of 500
items is overtaken by a ticket of one. Items of other keys never wait for ever, since turns are served in order.

When the model is free and an item waits, it starts at once, unless others are to be expected: those that were admitted
and are still being decoded, or, after a batch of several, the same callers' next. For them it stands idle `max_wait_s`
at most; for those being decoded, a tenth of the time of the batch before, where that is longer: a search takes nearly
as long for one as for several, so that two half batches, each waiting for the other, would halve what the model does.
One who is alone never waits.

No lock is held while a future is answered: its callbacks are the callers' code.
"""

from __future__ import annotations

import bisect
import math
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from captioner.errors import CaptionerError, ServiceBusyError, ServiceClosedError, ServiceError, ServiceTimeoutError
from captioner.telemetry import Telemetry

Run = Callable[[Any, list[Any]], Sequence[Any]]
"""Key and works of a batch in, one outcome for each out; an outcome that is an `Exception` is raised to its caller."""

_FILL_SHARE = 0.1
_RETRY_LIMIT_S = 60
_JOIN_S = 5.0


@dataclass(eq=False)
class Ticket:
    """What was admitted together.

    Args:
        deadline_s: when its items must be answered, on the clock of `time.monotonic`.
        coming: items that were admitted and are not put in yet.
        held: places that are kept for items nobody works at yet.
        turn: of the item that was put in last.
        items: put in and not answered.
        expired: whether the deadline has passed.
    """

    deadline_s: float
    coming: int
    turn: int = 0
    held: int = 0
    items: set[Item] = field(default_factory=set)
    expired: bool = False


@dataclass(eq=False, kw_only=True)
class Item:
    """One thing to run.

    Args:
        ticket: to which it belongs.
        key: items of equal keys run together.
        work: what is run; dropped once it is answered.
        limit: the most items of its key that run together.
        rank: its turn, and its number among all items.
        queued_s: when it was put in, on the clock of `time.monotonic`.
        future: its answer.
        started_s: when its batch started; None while it waits.
        batch: how many items ran together.
        settled: whether the answer is given, or nobody wants it any more.
    """

    ticket: Ticket
    key: Hashable
    work: Any
    limit: int
    rank: tuple[int, int]
    queued_s: float
    future: Future[Any] = field(default_factory=Future)
    started_s: float | None = None
    batch: int = 0
    settled: bool = False


class Batcher:
    """Runs what is put in, in batches, on a thread of its own.

    Args:
        run: runs a batch.
        max_wait_s: how long the model may stand idle to fill a batch.
        max_queue: items that may wait.
        timeout_s: from a ticket's admission to its last answer.
        telemetry: counts.
    """

    def __init__(self, run: Run, *, max_wait_s: float, max_queue: int, timeout_s: float, telemetry: Telemetry) -> None:
        self._run, self._max_wait_s, self._max_queue, self._timeout_s = run, max_wait_s, max_queue, timeout_s
        self._telemetry = telemetry
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # for the model thread
        self._alarm = threading.Condition(self._lock)  # for the clock thread
        self._empty = threading.Condition(self._lock)  # for close()
        self._groups: dict[Hashable, list[Item]] = {}
        self._tickets: OrderedDict[Ticket, None] = OrderedDict()  # in the order of their deadlines
        self._waiting = self._coming = self._numbered = self._turn = 0
        self._item_s = 0.05  # the time of an item in a batch, running mean
        self._last_s, self._last_size = 0.0, 1  # of the batch before
        self._running_since_s: float | None = None
        self._closing = self._stopped = False
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"captioner-{name}", daemon=True)
            for name, loop in (("model", self._serve), ("clock", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    # --- For the callers ---

    @property
    def waiting(self) -> int:
        """How many items wait: put in and not started, or admitted and not put in."""
        return self._waiting

    @property
    def ready(self) -> bool:
        """Whether tickets are given out and the model answers: False when a batch takes longer than the time limit."""
        since_s = self._running_since_s
        stuck = since_s is not None and time.monotonic() - since_s > self._timeout_s
        return not (self._closing or self._failure or stuck) and all(thread.is_alive() for thread in self._threads)

    def refusal(self, count: int = 1) -> ServiceError | None:
        """Return the error with which so many items would be refused now; None when they would be admitted.

        Args:
            count: how many items.

        Returns:
            The error, not raised.
        """
        if self._failure is not None:
            return ServiceError("the service has failed and answers nothing more; start it again")
        if self._closing:
            return ServiceClosedError("the service is closing and takes no more requests; try again later")
        if self._waiting + count > self._max_queue:
            seconds = min(max(1, math.ceil(self._waiting * self._item_s)), _RETRY_LIMIT_S)
            return ServiceBusyError(
                f"the queue is full: {self._waiting} of {self._max_queue} places are taken and {count} needed; "
                f"try again in {seconds} s",
                retry_after_s=seconds,
            )
        return None

    def admit(self, count: int, *, held: bool = False) -> Ticket:
        """Reserve places for all of so many items, or for none.

        Args:
            count: how many items will be put in, at least 1.
            held: whether nobody works at them yet: the model does not wait for them, and `take` comes before `put`.

        Returns:
            The ticket; `release` it when all that is to come has been put in.

        Raises:
            ServiceBusyError: when there are not so many places.
            ServiceClosedError: when the service is closing.
            ServiceError: when it has failed.
        """
        with self._lock:
            if (error := self.refusal(count)) is not None:
                raise error
            ticket = Ticket(time.monotonic() + self._timeout_s, 0, self._turn, count)
            self._waiting += count
            if not held:
                self._begin(ticket, count)
            self._tickets[ticket] = None
            if len(self._tickets) == 1:
                self._alarm.notify()
        return ticket

    def take(self, ticket: Ticket, count: int) -> None:
        """Begin to work at what a ticket holds places for.

        Args:
            ticket: that was admitted as held.
            count: how many items will be put in, which may be more or fewer than it has places.

        Raises:
            ServiceBusyError: when there are not so many places.
            ServiceTimeoutError: when the ticket has run out of time.
            ServiceClosedError: when the service was closed meanwhile.
            ServiceError: when it has failed.
        """
        with self._lock:
            if ticket.expired:
                raise self._timeout()
            more = count - ticket.held
            if (self._failure is not None or self._stopped or more > 0) and (error := self.refusal(more)) is not None:
                raise error
            self._waiting += more
            self._begin(ticket, count)

    def release(self, ticket: Ticket) -> None:
        """Give the places back that a ticket has not used.

        Args:
            ticket: into which nothing more is put.
        """
        with self._lock:
            self._waiting -= ticket.coming + ticket.held
            self._coming -= ticket.coming
            ticket.coming = ticket.held = 0
            self._forget_if_done(ticket)
            self._work.notify()

    def put(self, ticket: Ticket, key: Hashable, work: Any, *, limit: int) -> Item:
        """Put an item in.

        Args:
            ticket: with a place left.
            key: items of equal keys run together.
            work: handed to `run`.
            limit: the most items of its key that run together.

        Returns:
            The item. Its future is answered in any case; cancelled before it started, it leaves the queue.

        Raises:
            ServiceTimeoutError: when the ticket has run out of time.
            ServiceClosedError: when the service was closed meanwhile.
            ServiceError: when it has failed.
        """
        with self._lock:
            if self._failure is not None or self._stopped:
                raise self.refusal() or ServiceClosedError("the service is closed")
            if ticket.expired:
                raise self._timeout()
            ticket.turn = max(ticket.turn, self._turn) + 1
            self._numbered += 1
            rank = (ticket.turn, self._numbered)
            item = Item(ticket=ticket, key=key, work=work, limit=limit, rank=rank, queued_s=time.monotonic())
            item.future.add_done_callback(lambda future: self._leave(item) if future.cancelled() else None)
            ticket.items.add(item)
            ticket.coming -= 1
            self._coming -= 1
            bisect.insort(self._groups.setdefault(key, []), item, key=lambda other: other.rank)
            self._work.notify()
        return item

    def close(self, drain_s: float) -> None:
        """Admit nothing more, wait for what was admitted, then end.

        Args:
            drain_s: how long to wait; what is open then is answered with `ServiceClosedError`.
        """
        with self._lock:
            self._closing = True
            self._empty.wait_for(lambda: self._idle() or self._failure is not None, timeout=max(0.0, drain_s))
            self._stopped = True
            left = self._claim(item for ticket in [*self._tickets] for item in [*ticket.items])
            self._work.notify_all()
            self._alarm.notify_all()
        for item in left:
            _answer(item, ServiceClosedError("closed before the service came to this request; try again later"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)

    # --- Under the lock ---

    def _begin(self, ticket: Ticket, count: int) -> None:
        ticket.held, ticket.coming = 0, count
        self._coming += count

    def _idle(self) -> bool:
        """Return whether nobody works at anything."""
        return all(ticket.held for ticket in self._tickets)

    def _timeout(self) -> ServiceTimeoutError:
        return ServiceTimeoutError(
            f"not answered within the time limit of {self._timeout_s:g} s; try again when the service is less busy"
        )

    def _claim(self, items: Iterable[Item]) -> list[Item]:
        """Take items out of everything, once each; return those whose future awaits an answer."""
        claimed = []
        for item in items:
            if item.settled:
                continue
            item.settled, item.work = True, None
            if item.started_s is None:
                self._waiting -= 1
                group = self._groups[item.key]
                group.remove(item)
                if not group:
                    del self._groups[item.key]
            item.ticket.items.discard(item)
            self._forget_if_done(item.ticket)
            # From here on nobody can cancel it.
            if item.started_s is not None or item.future.set_running_or_notify_cancel():
                claimed.append(item)
        return claimed

    def _forget_if_done(self, ticket: Ticket) -> None:
        if not ticket.items and not ticket.coming and not ticket.held:
            self._tickets.pop(ticket, None)
            if self._idle():
                self._empty.notify_all()

    def _next_batch(self) -> list[tuple[Item, Any]]:
        """Take the batch whose turn it is; return nothing when none is to be taken yet, after waiting."""
        if not self._groups:
            self._work.wait()
            return []
        free_s = time.monotonic()
        while self._groups:
            group = min(self._groups.values(), key=lambda items: items[0].rank)
            patience_s = self._patience_s(len(group))
            rest_s = free_s + patience_s - time.monotonic()
            if len(group) >= group[0].limit or rest_s <= 0 or self._stopped:
                return self._started(group[: group[0].limit])
            self._work.wait(rest_s)
        return []

    def _patience_s(self, size: int) -> float:
        """Return how long a batch of this size may wait for more, from when the model was free."""
        if self._coming:
            return max(self._max_wait_s, _FILL_SHARE * self._last_s)
        return self._max_wait_s if size < self._last_size else 0.0

    def _started(self, items: list[Item]) -> list[tuple[Item, Any]]:
        self._turn = max(self._turn, items[0].rank[0])
        # Whoever cancelled in this moment is on the way to `_leave`.
        cancelled = [item for item in items if not item.future.set_running_or_notify_cancel()]
        batch = [(item, item.work) for item in items if item not in cancelled]
        group = self._groups[items[0].key]
        del group[: len(items)]
        if not group:
            del self._groups[items[0].key]
        self._waiting -= len(items)
        now_s = time.monotonic()
        for item in items:
            item.started_s, item.batch = now_s, len(batch)
        for item in cancelled:
            item.settled, item.work = True, None
            item.ticket.items.discard(item)
            self._forget_if_done(item.ticket)
        self._running_since_s = now_s
        return batch

    # --- The two threads ---

    def _guarded(self, loop: Callable[[], None]) -> None:
        """Run a thread; its end by a fault is the end of the service, and everybody is told."""
        try:
            loop()
        except BaseException as err:
            with self._lock:
                self._failure = err
                left = self._claim(item for ticket in [*self._tickets] for item in [*ticket.items])
                self._empty.notify_all()
                self._work.notify_all()
                self._alarm.notify_all()
            self._telemetry.write("failed", error=type(err).__name__, where=where(err))
            for item in left:
                fault = ServiceError(f"the service has failed ({type(err).__name__}); start it again")
                fault.__cause__ = err
                _answer(item, fault)

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._running_since_s = None
                if self._stopped or self._failure is not None:
                    return
                batch = self._next_batch()
            if batch:
                self._process(batch)
            del batch  # its pictures are not to be kept until the next one

    def _process(self, batch: list[tuple[Item, Any]]) -> None:
        self._running_since_s = began_s = time.monotonic()
        try:
            answered = self._run(batch[0][0].key, [work for _, work in batch])
            outcomes = [outcome for _, outcome in zip(batch, answered, strict=True)]
        except Exception as err:
            if len(batch) > 1:  # one of them may be to blame, or all together were too many
                for one in batch:
                    if not one[0].settled:
                        self._process([one])
                return
            outcomes = [err if isinstance(err, CaptionerError) else self._fault(err)]
        self._measure([item for item, _ in batch], began_s, time.monotonic() - began_s)
        for (item, _), outcome in zip(batch, outcomes, strict=True):
            with self._lock:
                claimed = self._claim([item])
            if claimed:
                _answer(item, outcome)

    def _fault(self, err: Exception) -> ServiceError:
        self._telemetry.write("fault", error=type(err).__name__, where=where(err))
        fault = ServiceError(f"the model failed on this request ({type(err).__name__}); the log says where")
        fault.__cause__ = err
        return fault

    def _measure(self, items: list[Item], began_s: float, took_s: float) -> None:
        self._last_s, self._last_size = took_s, len(items)
        self._item_s += 0.2 * (took_s / len(items) - self._item_s)
        self._telemetry.batch_size.observe(len(items))
        self._telemetry.batch_seconds.observe(took_s)
        for item in items:
            item.started_s, item.batch = began_s, len(items)
            self._telemetry.wait_seconds.observe(began_s - item.queued_s)

    def _watch(self) -> None:
        while True:
            with self._lock:
                if self._stopped or self._failure is not None:
                    return
                ticket = next(iter(self._tickets), None)
                rest_s = None if ticket is None else ticket.deadline_s - time.monotonic()
                if ticket is None or rest_s is None or rest_s > 0:
                    self._alarm.wait(rest_s)
                    continue
                ticket.expired = True
                self._tickets.pop(ticket)
                self._waiting -= ticket.held
                ticket.held = 0
                late = self._claim([*ticket.items])
            for item in late:
                _answer(item, self._timeout())

    def _leave(self, item: Item) -> None:
        with self._lock:
            self._claim([item])


def _answer(item: Item, outcome: Any) -> None:
    """Answer an item that was claimed. Every item gets an exception of its own, since raising one changes it."""
    if isinstance(outcome, Exception):
        item.future.set_exception(outcome)
    else:
        item.future.set_result(outcome)


def where(err: BaseException) -> str:
    """Return file and line of a fault: its message may quote what a user sent, and does not go into the log."""
    frames = traceback.extract_tb(err.__traceback__)
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "unknown"
