"""What is made of Gradio's answers: statuses that say what happened, a sentence for every error, and an end of waiting.

Gradio answers every error of a direct call with status 500, and an error of its own without a word.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from captioner.exchange import Exchange, Message

STATUS_OF = {
    "ConfigError": 400,
    "SearchError": 422,
    "ImageError": 422,
    "ImageReadError": 422,
    "ImageTooLargeError": 413,
    "ServiceBusyError": 503,
    "ServiceClosedError": 503,
    "ServiceTimeoutError": 504,
}
"""Of a direct call that ended with an error, by its kind; of any other it is 500."""
RETRY_S = 5
FAULT = "Something went wrong on the computer that runs this page; please try again."
_ERROR_LIMIT = 64 * 2**10
_EVENT = b"event: error\ndata: "
UNFETCHED_LIMIT = 256


class DirectAnswer:
    """Passes the answer of a direct call on; one of status 500 gets the status of its kind, and a sentence.

    Args:
        exchange: of the call.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        """Send a part of the answer, or keep it until it is known what it says."""
        if message["type"] == "http.response.start" and message["status"] == 500:
            self._start = message
            return
        if self._start is None:
            await self._exchange.send(message)
            return
        self._body += message.get("body", b"")[:_ERROR_LIMIT]
        if message.get("more_body", False):
            return
        said = _read(self._body)
        kind = str(said.get("title") or "Error")
        self._exchange.error = kind
        more = [(b"retry-after", str(RETRY_S).encode())] if STATUS_OF.get(kind) == 503 else []
        await self._exchange.respond_json(STATUS_OF.get(kind, 500), _worded(said), *more)


class UploadProgress:
    """Passes the news of an upload on; of one that Gradio does not know, it is said that it is done.

    Its page asks too late where an upload is small, and for one without a name where there is none, as of a camera:
    both would be errors in the browser's console.

    Args:
        exchange: of who listens.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._unknown = False

    async def send(self, message: Message) -> None:
        """Send a part of the stream."""
        if message["type"] == "http.response.start" and message["status"] == 404:
            self._unknown = True
        elif not self._unknown:
            await self._exchange.send(message)
        elif not message.get("more_body", False):
            await self._exchange.respond(200, b'data: {"msg": "done"}\n\n', "text/event-stream")


async def send_events(exchange: Exchange, message: Message) -> None:
    """Send a part of the stream of a call's events; an error of Gradio's own gets a sentence.

    Args:
        exchange: of who listens.
        message: the part; each holds whole events.
    """
    body = message.get("body", b"")
    if body.startswith(_EVENT) and len(body) < _ERROR_LIMIT and body.endswith(b"\n\n"):
        said = _worded(_read(body[len(_EVENT) :]))
        message = {**message, "body": _EVENT + json.dumps(said).encode() + b"\n\n"}
    await exchange.send(message)


def _read(text: bytes) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {"error": value}


def _worded(said: dict[str, object]) -> dict[str, object]:
    return said if said.get("error") else {**said, "error": FAULT, "title": "Error"}


class Unfetched:
    """Remembers answers that nobody has fetched, and gives up those that nobody fetches any more.

    Args:
        give_up: called with the session and the id of such a call.
        kept_s: how long an answer is waited for, from its call on.
        most: answers that are waited for; the oldest goes first.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        give_up: Callable[[str, str], None],
        *,
        kept_s: float,
        most: int = UNFETCHED_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._give_up, self._kept_s, self._most, self._clock = give_up, kept_s, most, clock
        self._calls: OrderedDict[str, tuple[float, str]] = OrderedDict()  # by id: when, of which session
        self._heard: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._calls)

    def note(self, call: str, session: str | None) -> None:
        """Remember a call that was made.

        Args:
            call: its id.
            session: that its client named; None makes it one of its own.
        """
        session = session or call
        if session not in self._heard:
            self._calls[call] = (self._clock(), session)
        self.sweep()

    @contextlib.contextmanager
    def listening(self, name: str) -> Iterator[None]:
        """Forget what is fetched as long as the block lasts, and what its session asks for meanwhile.

        Args:
            name: of a call, or of a session, all of whose calls are fetched.

        Yields:
            Nothing.
        """
        for call in [call for call, (_, session) in self._calls.items() if name in (call, session)]:
            del self._calls[call]
        self._heard[name] += 1
        try:
            yield
        finally:
            self._heard[name] -= 1
            if not self._heard[name]:
                del self._heard[name]

    def sweep(self) -> None:
        """Give up what is overdue, or too much."""
        latest_s = self._clock() - self._kept_s
        while self._calls:
            call, (began_s, session) = next(iter(self._calls.items()))
            if began_s > latest_s and len(self._calls) <= self._most:
                return
            del self._calls[call]
            self._give_up(session, call)
