"""The bodies of requests: how large they may be, how slowly they may come, and how many at a time are in memory.

client ──▶ a part ──▶ in time? ──▶ within its limit? ──▶ read as a whole, or handed on as it comes
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

from captioner.exchange import App, Exchange, Message, Refusal, neighbourhood

JSON_LIMIT = 2 * 2**20
LOGIN_LIMIT = 16 * 2**10
MULTIPART_BYTES = 64 * 2**10
"""Room for the heads between the files of an upload."""
BUFFER_LIMIT = 64 * 2**20
"""Bytes of all bodies that are being read as a whole at a time."""
BODY_TIMEOUT_S = 30.0
SLOWEST_BYTES_S = 16 * 2**10
"""A body that takes longer than `BODY_TIMEOUT_S` must have come at this rate: its end is bounded by its size."""
RETRY_S = 5


class _Stopped(Exception):  # noqa: N818  # no fault: it only leaves the app
    """The body is not read any further."""


class Buffers:
    """Counts the bytes of the bodies in memory; an address may hold half of them. For one event loop.

    Args:
        largest_bytes: of a single body.
    """

    def __init__(self, largest_bytes: int) -> None:
        self.most_bytes = max(BUFFER_LIMIT, 2 * largest_bytes)
        self.held_bytes: Counter[str] = Counter()

    def take(self, address: str, count: int) -> None:
        """Count bytes that have come.

        Args:
            address: from where.
            count: how many.

        Raises:
            Refusal: 503 where they are too many.
        """
        self.held_bytes[address] += count
        if self.held_bytes.total() > self.most_bytes or self.held_bytes[address] > self.most_bytes // 2:
            raise Refusal(503, "ServiceBusyError", "too many large requests at once; try again", RETRY_S)

    def give_back(self, address: str, count: int) -> None:
        """Count bytes that are in memory no more.

        Args:
            address: from where they came.
            count: how many.
        """
        self.held_bytes[address] -= count
        if self.held_bytes[address] <= 0:
            del self.held_bytes[address]


class _Pace:
    """Says how long a body may still take."""

    def __init__(self) -> None:
        self._began_s, self._received = time.monotonic(), 0

    async def next_part(self, exchange: Exchange) -> Message:
        rest_s = self._began_s + BODY_TIMEOUT_S + self._received / SLOWEST_BYTES_S - time.monotonic()
        if rest_s <= 0:
            raise late()
        try:
            message = await asyncio.wait_for(exchange.receive(), rest_s)
        except TimeoutError as err:
            raise late() from err
        self._received += len(message.get("body", b""))
        return message


@contextlib.asynccontextmanager
async def whole(exchange: Exchange, limit: int, buffers: Buffers) -> AsyncIterator[bytes | None]:
    """Read a body as a whole; as long as the block lasts it counts as in memory.

    Args:
        exchange: that brings it.
        limit: the most bytes.
        buffers: count it.

    Yields:
        The body; None when the client has left.

    Raises:
        Refusal: 400, 408, 413, 503.
    """
    require_length(exchange, limit)
    pace, address, more = _Pace(), neighbourhood(exchange.address()), exchange.method == "POST"
    body, taken = bytearray(), 0
    try:
        while more:
            message = await pace.next_part(exchange)
            part = message.get("body", b"")
            if taken + len(part) > limit:
                raise too_large(limit)
            taken += len(part)
            buffers.take(address, len(part))
            body += part
            more = bool(message.get("more_body", False))
        yield None if exchange.left else bytes(body)
    finally:
        buffers.give_back(address, taken)


async def hand_on(app: App, exchange: Exchange, limit: int, *, count: Callable[[bytes], object] = len) -> None:
    """Hand a body on as it comes, and end the request where it grows over its limit.

    Args:
        app: that gets it.
        exchange: that brings it.
        limit: the most bytes.
        count: told of every part; may raise a `Refusal`.

    Raises:
        Refusal: 400, 408, 413, or of `count`.
    """
    require_length(exchange, limit)
    left, more, pace = limit, True, _Pace()
    refusal: Refusal | None = None

    async def receive() -> Message:
        nonlocal left, more, refusal
        if not more:  # what comes now is the client's leaving, whenever that is
            return await exchange.receive()
        try:
            message = await pace.next_part(exchange)
            part = message.get("body", b"")
            left -= len(part)
            more = message["type"] == "http.request" and bool(message.get("more_body", False))
            if left < 0:
                raise too_large(limit)
            count(part)
        except Refusal as err:
            refusal = err
            raise _Stopped from err
        return message

    async def send(message: Message) -> None:
        if refusal is None:  # what the app says of a body that was cut off is of no interest
            await exchange.send(message)

    try:
        await app(exchange.scope, receive, send)
    except Exception:
        if refusal is None:
            raise
    if refusal is not None:
        raise refusal


def require_length(exchange: Exchange, limit: int) -> int | None:
    """Refuse a body that says itself that it is too large.

    Args:
        exchange: that brings it.
        limit: the most bytes.

    Returns:
        How long it says that it is; None when it says nothing.

    Raises:
        Refusal: 413; 400 where the length is no number.
    """
    length = exchange.header("content-length")
    if length and (not length.isascii() or not length.isdecimal()):
        raise Refusal(400, "BadRequest", "Content-Length must be a number")
    if length and (len(length) > 15 or int(length) > limit):
        raise too_large(limit)
    return int(length) if length else None


def late() -> Refusal:
    """Return the refusal of a body that did not come in time."""
    return Refusal(408, "RequestTimeout", "the body did not come in time")


def too_large(limit: int) -> Refusal:
    """Return the refusal of a body over its limit.

    Args:
        limit: bytes.

    Returns:
        413.
    """
    return Refusal(413, "TooLarge", f"the body is over the limit of {limit} bytes; send a smaller picture")
