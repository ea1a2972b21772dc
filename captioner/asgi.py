"""What stands before the page's app: health, metrics, admission, limits of size, and refusal of what it does not serve.

    request ──▶ /healthz, /readyz, /metrics ──▶ answered here
            ──▶ a route that is not served ──▶ 404
            ──▶ not logged in, or too many wrong passwords ──▶ a page that asks for it; 401, 429
            ──▶ queue full or closing ──▶ 503 with Retry-After
            ──▶ body over its limit ──▶ 413; naming a file that was not uploaded ──▶ 400
            ──▶ app ──▶ the client leaves before its answer is complete ──▶ what it waited for leaves the queue

Pure ASGI 3 (https://asgi.readthedocs.io/en/stable/specs/www.html), so that streams pass through as they come.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs

from captioner import payloads
from captioner.errors import ServiceBusyError, ServiceError
from captioner.exchange import API, App, Exchange, Message, Receive, Refusal, Scope, Send, path_of, route_of
from captioner.logins import Logins
from captioner.service import ServiceLimits
from captioner.telemetry import CONTENT_TYPE, OTHER, Telemetry

JSON_LIMIT = 2 * 2**20
MULTIPART_BYTES = 64 * 2**10
"""Room for the heads between the files of an upload."""
BUFFER_LIMIT = 64 * 2**20
"""Bytes of all JSON bodies that are being read at a time."""
BODY_TIMEOUT_S = 30.0
RETRY_S = 5
CALL = "captioner.call"
"""In the scope of a request that is answered directly: a name of it, with which `leave` is called."""

# Routes that ask for work: the first part after the prefix. Their bodies are read before the app sees them.
_WORK = {"call", "run", "api", "queue/join", "mcp"}
# Other routes to which something may be sent.
_SENT = {"upload", "cancel", "reset", "login"}
# Routes of Gradio that would fetch from elsewhere, run tools, or change the page.
_CLOSED_READS = {"proxy", "stream", "custom_component", "deep_link", "vibe-code", "profiling", "runs", "run-history"}


class _Stopped(Exception):  # noqa: N818  # no fault: it only leaves the app
    """The body is not read any further."""


class Door(Protocol):
    """What the middleware asks before it lets a request in; `captioner.service.Service` has it."""

    limits: ServiceLimits
    telemetry: Telemetry

    @property
    def ready(self) -> bool:
        """Whether requests are taken and the model answers."""

    def refusal(self) -> ServiceError | None:
        """Return the error with which a request would be refused now; None when it would be taken."""


class OpenDoor:
    """Before a page without a service: lets everyone in, within the usual limits of size."""

    ready = True

    def __init__(self) -> None:
        self.limits, self.telemetry = ServiceLimits(), Telemetry()

    def refusal(self) -> None:
        """Refuse nobody."""


class ServiceMiddleware:
    """Stands before Gradio's app; see the head of this file.

    Args:
        app: what is behind.
        service: says when it is full, closing or broken, and counts.
        uploads: the folder of uploaded files, `GRADIO_TEMP_DIR`.
        endpoints: names of the page's API endpoints, as the metrics may show them; others are counted as "other".
        max_body_bytes: the most bytes of an upload with all its files; default: one file of the service's limit.
        users: names and passwords, of which tools must send one pair by HTTP Basic authentication (RFC 7617): behind
            this, Gradio asks for a login everywhere but there. None lets everyone in.
        known: tells from a request's cookies whether its sender has logged in; those who have not see a page that
            asks for it. Without it they see what is behind.
        forget: called with the id of a call by HTTP whose answer was fetched, and which therefore is over.
        leave: called with a name of what nobody waits for any more: the id of a call that was cancelled or whose client
            left, the session of a page that was closed, or `CALL` of a request.
    """

    def __init__(
        self,
        app: App,
        *,
        service: Door,
        uploads: str | Path,
        endpoints: Iterable[str] = (),
        max_body_bytes: int | None = None,
        users: Iterable[tuple[str, str]] | None = None,
        known: Callable[[str], bool] | None = None,
        forget: Callable[[str], None] | None = None,
        leave: Callable[[str], None] | None = None,
    ) -> None:
        self.app = app
        self.forget, self.leave = forget, leave
        self.service = service
        self.uploads = Path(uploads)
        self.endpoints = frozenset(name.strip("/") for name in endpoints)
        self.max_body_bytes = max_body_bytes or service.limits.max_upload_bytes + MULTIPART_BYTES
        # A picture may stand in a call of a tool as text, four characters for three bytes.
        self.max_tool_bytes = service.limits.max_upload_bytes * 4 // 3 + JSON_LIMIT
        self._buffered_bytes = 0
        self._logins = Logins(users, known=known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on; see the ASGI specification."""
        if scope["type"] == "websocket":  # Gradio has none
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, label=self._label(scope))
        # A heartbeat is as long as a page is looked at, and a tool may listen as long as it lives.
        endless = exchange.label == "heartbeat" or (exchange.label == "mcp" and exchange.method == "GET")
        counted = 0 if endless else 1
        self.service.telemetry.http_open.add(counted)
        try:
            await self._answer(exchange)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        finally:
            self.service.telemetry.http_open.add(-counted)
            self._note(exchange)

    # --- The way of a request ---

    async def _answer(self, exchange: Exchange) -> None:
        path, method = exchange.path, exchange.method
        if path in ("/healthz", "/readyz", "/metrics"):
            await self._say_health(exchange)
            return
        route = route_of(path)
        self._require_served(route, path, method)
        if route == "mcp":
            self._logins.require_key(exchange)
        if self._logins.asks(exchange):
            await self._logins.show(exchange)
            return
        if method in ("GET", "HEAD", "OPTIONS"):
            try:
                await self.app(exchange.scope, exchange.receive, exchange.send)
            finally:
                if method == "GET":
                    self._end_answer(exchange)
            return
        if route in _WORK or route == "upload":
            self._require_admission()
        if route in _WORK or route == "cancel":
            await self._hand_on_checked(exchange, self.max_tool_bytes if route == "mcp" else JSON_LIMIT)
        elif route == "login":
            await self._hand_on_guess(exchange)
        else:
            await self._hand_on_limited(exchange, self.max_body_bytes if route == "upload" else JSON_LIMIT)

    def _end_answer(self, exchange: Exchange) -> None:
        """Say of a stream of answers that it has ended. Of one that broke off nothing can be fetched any more."""
        call = exchange.path.rstrip("/").rpartition("/")[2] if exchange.label.endswith("/answer") else None
        if self.leave and (exchange.left or not exchange.finished):
            sessions = [call] if call else []
            if exchange.label == "queue/data":
                sessions = parse_qs(exchange.scope.get("query_string", b"").decode("latin-1")).get("session_hash", [])
            for name in sessions:
                self.leave(name)
        if self.forget and call:
            self.forget(call)

    async def _say_health(self, exchange: Exchange) -> None:
        if exchange.method not in ("GET", "HEAD"):
            raise Refusal(405, "MethodNotAllowed", "only GET")
        if exchange.path == "/metrics":
            await exchange.respond(200, self.service.telemetry.prometheus().encode(), CONTENT_TYPE)
        elif exchange.path == "/healthz":
            await exchange.respond_json(200, {"status": "alive"})
        elif self.service.ready:
            await exchange.respond_json(200, {"status": "ready"})
        else:
            raise Refusal(503, "NotReady", "closing, or the model does not answer", RETRY_S)

    def _require_served(self, route: str | None, path: str, method: str) -> None:
        if method in ("GET", "HEAD"):
            # The file route fetches what is an address.
            file = path.partition(f"{API}/file")[2].lstrip("=/")
            elsewhere = route == "file" and not payloads.is_upload(f"/{file.lstrip('/')}", self.uploads)
            if route in _CLOSED_READS or elsewhere:
                raise Refusal(404, "NotFound", "nothing is served here")
        elif method != "OPTIONS" and (method not in ("POST", "DELETE") or route not in _WORK | _SENT):
            raise Refusal(404, "NotFound", "nothing is served here")

    def _require_admission(self) -> None:
        error: ServiceError | None = self.service.refusal()
        if error is not None:
            seconds = error.retry_after_s if isinstance(error, ServiceBusyError) else RETRY_S
            raise Refusal(503, type(error).__name__, str(error), seconds)

    async def _hand_on_guess(self, exchange: Exchange) -> None:
        """Hand a login on; it is a guess until it is found to be right, or no login at all."""
        self._logins.begin(exchange)
        try:
            await self._hand_on_limited(exchange, JSON_LIMIT)
        finally:
            if exchange.status != 400:  # with which Gradio says that name or password is wrong
                self._logins.forgive(exchange)

    async def _hand_on_limited(self, exchange: Exchange, limit: int) -> None:
        """Hand the body on as it comes, and end the request where it grows over its limit."""
        _require_length(exchange, limit)
        left, more = limit, True
        refusal: Refusal | None = None

        async def receive() -> Message:
            nonlocal left, more, refusal
            if not more:  # what comes now is the client's leaving, whenever that is
                return await exchange.receive()
            try:
                message = await exchange.next_part(BODY_TIMEOUT_S)
                left -= len(message.get("body", b""))
                more = message["type"] == "http.request" and bool(message.get("more_body", False))
                if left < 0:
                    raise _too_large(limit)
            except Refusal as err:
                refusal = err
                raise _Stopped from err
            return message

        async def send(message: Message) -> None:
            if refusal is None:  # what the app says of a body that was cut off is of no interest
                await exchange.send(message)

        try:
            await self.app(exchange.scope, receive, send)
        except Exception:
            if refusal is None:
                raise
        if refusal is not None:
            raise refusal

    async def _hand_on_checked(self, exchange: Exchange, limit: int) -> None:
        """Read the whole body, check it, and hand it on."""
        _require_length(exchange, limit)
        body = bytearray()
        try:
            more = exchange.method == "POST"
            while more:
                message = await exchange.next_part(BODY_TIMEOUT_S)
                if message["type"] == "http.disconnect":
                    return
                part = message.get("body", b"")
                body += part
                self._buffered_bytes += len(part)
                if len(body) > limit:
                    raise _too_large(limit)
                if self._buffered_bytes > BUFFER_LIMIT:
                    raise Refusal(503, "ServiceBusyError", "too many large requests at once; try again", RETRY_S)
                more = message.get("more_body", False)
            value = self._check(exchange, bytes(body))
            whole = bytes(body)
        finally:
            self._buffered_bytes -= len(body)
        route = route_of(exchange.path)
        if self.leave and route == "cancel" and isinstance(value, dict):
            self.leave(str(value.get("event_id")))
        handed = False

        async def receive() -> Message:
            nonlocal handed, whole
            if handed:
                return await leaving()
            handed, part, whole = True, whole, b""
            return {"type": "http.request", "body": part, "more_body": False}

        try:
            async with self._watched(exchange, direct=route in ("run", "api")) as leaving:
                await self.app(exchange.scope, receive, exchange.send)
        except (KeyError, TypeError) as err:
            # So Gradio says that a call by names has a name too many or too few, or asks for no endpoint.
            if exchange.status is not None or not exchange.path.startswith(f"{API}/call/v2/"):
                raise
            raise Refusal(400, "BadRequest", f"no such endpoint or argument; {API}/info lists them") from err

    @asynccontextmanager
    async def _watched(self, exchange: Exchange, *, direct: bool) -> AsyncIterator[Receive]:
        """Watch for the leaving of a client who waits for the answer of this very request; yield what waits for it."""
        if not direct or self.leave is None:
            yield exchange.receive
            return
        name = exchange.scope[CALL] = secrets.token_hex(16)
        gone = asyncio.create_task(_disconnected(exchange))
        leave = self.leave
        gone.add_done_callback(lambda task: None if task.cancelled() or task.exception() else leave(name))

        async def leaving() -> Message:
            return await asyncio.shield(gone)

        try:
            yield leaving
        finally:
            gone.cancel()

    def _check(self, exchange: Exchange, body: bytes) -> Any:
        """Return the value that a body holds."""
        if exchange.method != "POST":
            return None
        if exchange.header("content-type").split(";")[0].strip().lower() == "multipart/form-data":
            raise Refusal(415, "UnsupportedMediaType", "send JSON here, files to the upload route")
        try:
            value = payloads.parse(body)
            tools = route_of(exchange.path) == "mcp"
            payloads.check(
                _arguments(value) if tools else value, uploads=self.uploads, hosts=exchange.hosts(), strings=tools
            )
        except payloads.RefusedPayloadError as err:
            raise Refusal(400, "RefusedPayload", str(err)) from err
        return value

    # --- What is noted ---

    def _label(self, scope: Scope) -> str:
        """Return the name of a request's endpoint, of which there are few."""
        path = path_of(scope)
        if path in ("/", "/healthz", "/readyz", "/metrics"):
            return path
        route = route_of(path)
        if route is None:
            return "page"
        if route in ("call", "run", "api"):
            parts = path.removeprefix(f"{API}/{route}/").removeprefix("v2/").split("/")
            name = parts[0] if parts[0] in self.endpoints else OTHER
            answer = "/answer" if len(parts) > 1 and parts[1] else ""
            return f"{route}/{name}{answer}"
        return route if route in _WORK | _SENT | {"queue/data", "file", "heartbeat"} else OTHER

    def _note(self, exchange: Exchange) -> None:
        telemetry = self.service.telemetry
        status = exchange.status or 499  # the client left before there was an answer
        telemetry.http_requests.add(endpoint=exchange.label, status=status)
        telemetry.http_seconds.observe(exchange.seconds(), endpoint=exchange.label)
        if exchange.error is not None:
            telemetry.errors.add(kind=exchange.error)
        telemetry.write(
            "http",
            endpoint=exchange.label,
            method=exchange.method if exchange.method in ("GET", "HEAD", "POST", "OPTIONS", "DELETE") else OTHER,
            status=status,
            milliseconds=round(1000 * exchange.seconds(), 1),
            error=exchange.error,
        )


def wait_for_answers(telemetry: Telemetry, *, timeout_s: float = 5.0, quiet_s: float = 0.5) -> bool:
    """Wait until those who have been let in have their answers: after `Service.drain`, before anything is closed.

    Gradio drops the answers of its queue when it is closed; and a client asks for an answer some time after the call.

    Args:
        telemetry: of the service.
        timeout_s: how long to wait at most.
        quiet_s: for how long no request must be open.

    Returns:
        Whether it became quiet.
    """
    end_s = time.monotonic() + timeout_s
    quiet_since_s = time.monotonic()
    while (now_s := time.monotonic()) < end_s:
        if telemetry.http_open.value() > 0:
            quiet_since_s = now_s
        elif now_s - quiet_since_s >= quiet_s:
            return True
        time.sleep(0.02)
    return False


async def _disconnected(exchange: Exchange) -> Message:
    while (message := await exchange.receive())["type"] != "http.disconnect":
        pass
    return message


def _arguments(value: Any) -> Any:
    """Return what a call of a tool hands over; the rest of such a message names no file."""
    calls = value if isinstance(value, list) else [value]
    return [call.get("params") for call in calls if isinstance(call, dict) and call.get("method") == "tools/call"]


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "TooLarge", f"the body is over the limit of {limit} bytes; send a smaller picture")


def _require_length(exchange: Exchange, limit: int) -> None:
    length = exchange.header("content-length")
    if length and (not length.isascii() or not length.isdecimal()):
        raise Refusal(400, "BadRequest", "Content-Length must be a number")
    if length and (len(length) > 15 or int(length) > limit):
        raise _too_large(limit)
