"""What stands before the page's app: health, metrics, admission, limits of size, and refusal of what it does not serve.

    request ──▶ /healthz, /readyz, /metrics ──▶ answered here
            ──▶ a route that is not served ──▶ 404
            ──▶ not logged in, or too many wrong passwords ──▶ a page that asks for it; 401, 429
            ──▶ queue full or closing ──▶ 503 with Retry-After
            ──▶ body over its limit ──▶ 413; naming a file that was not uploaded, or no endpoint ──▶ 400
            ──▶ no place in the queue for its pictures ──▶ 503; no room for its upload ──▶ 507
            ──▶ app ──▶ the client leaves before its answer is complete ──▶ what it waited for leaves the queue

Pure ASGI 3 (https://asgi.readthedocs.io/en/stable/specs/www.html), so that streams pass through as they come.
"""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from weakref import WeakValueDictionary

from captioner import bodies, payloads, preview, tools
from captioner.answers import DirectAnswer, Unfetched, UploadProgress, send_events
from captioner.calls import Calls, pictures, require_call, unknown_call
from captioner.door import Door
from captioner.errors import ServiceBusyError, ServiceError
from captioner.exchange import App, Exchange, Message, Receive, Refusal, Scope, Send, path_of, route_of
from captioner.logins import Logins, user_of
from captioner.requests import Place
from captioner.routes import HEALTH, OTHER, WORK, label_of, require_own_origin, require_served, require_tool
from captioner.telemetry import CONTENT_TYPE
from captioner.uploads import UploadSpace

RETRY_S = 5
UNFETCHED_S = 300.0
"""How much longer than its time limit a call's answer is kept for a client that does not fetch it."""
CALL = "captioner.call"
"""In the scope of a request that is answered directly: a name of it, with which `leave` is called."""
PLACE = "captioner.place"
"""In the scope of a request that asks for work: its `captioner.requests.Place` in the queue."""

_THREAD_BYTES = 64 * 2**10
_NAME_BYTES = 1000
# Gradio's errors of a call that asks for what is not there; one is its own, and cannot be imported here.
_UNKNOWN = {"KeyError", "TypeError", "FnIndexInferError"}


class ServiceMiddleware:
    """Stands before Gradio's app; see the head of this file.

    Args:
        app: what is behind.
        service: says when it is full, closing or broken, and counts.
        uploads: the folder of uploaded files, `GRADIO_TEMP_DIR`.
        endpoints: names of the page's API endpoints, as the metrics may show them; others are counted as "other".
        calls: what can be called, and with how many values; None leaves that to what is behind.
        max_body_bytes: the most bytes of an upload with all its files; default: one file of the service's limit.
        users: names and passwords, of which tools must send one pair by HTTP Basic authentication (RFC 7617): behind
            this, Gradio asks for a login everywhere but there. None lets everyone in.
        known: tells from a request's cookies whether its sender has logged in; those who have not see a page that
            asks for it. Without it they see what is behind.
        forget: called with the id of a call by HTTP whose answer was fetched, and which therefore is over.
        leave: called with a name of what nobody waits for any more: the id of a call that was cancelled or whose client
            left, the session of a page that was closed, or `CALL` of a request.
        give_up: called with the session and the id of a call whose answer nobody fetches.
        picture: a JPEG for those who show a link to the page.
        frames: which sites may show the page inside theirs, as a Content-Security-Policy says it.
    """

    def __init__(
        self,
        app: App,
        *,
        service: Door,
        uploads: str | Path,
        endpoints: Iterable[str] = (),
        calls: Calls | None = None,
        max_body_bytes: int | None = None,
        users: Iterable[tuple[str, str]] | None = None,
        known: Callable[[str], bool] | None = None,
        forget: Callable[[str], None] | None = None,
        leave: Callable[[str], None] | None = None,
        give_up: Callable[[str, str], None] | None = None,
        picture: bytes | None = None,
        frames: str = "'self'",
    ) -> None:
        self.app = app
        self.forget, self.leave = forget, leave or _nobody
        self.service, self.calls, self.picture = service, calls, picture
        self._frames = (b"content-security-policy", f"frame-ancestors {frames}".encode())
        self.uploads = Path(uploads)
        self.endpoints = frozenset(name.strip("/") for name in endpoints)
        limits = service.limits
        self.max_body_bytes = max_body_bytes or limits.max_upload_bytes + bodies.MULTIPART_BYTES
        # A picture may stand in a call of a tool as text, four characters for three bytes.
        self.max_tool_bytes = limits.max_upload_bytes * 4 // 3 + bodies.JSON_LIMIT
        self.buffers = bodies.Buffers(self.max_tool_bytes)
        self.space = UploadSpace(self.uploads, most_bytes=limits.max_uploads_bytes, kept_s=2 * limits.timeout_s)
        self.unfetched = Unfetched(give_up or _nobody, kept_s=limits.timeout_s + UNFETCHED_S)
        self._tools = tools.ToolCalls()
        # Of calls that Gradio has not begun, which it never will when they are cancelled.
        self._places: WeakValueDictionary[str, Place] = WeakValueDictionary()
        self._logins = Logins(users, known=known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on; see the ASGI specification."""
        if scope["type"] == "websocket":  # Gradio has none
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.unfetched.sweep()
        exchange = Exchange(scope, receive, send, label=label_of(path_of(scope), self.endpoints))
        # A heartbeat is as long as a page is looked at, and a tool may listen as long as it lives.
        endless = exchange.label == "heartbeat" or (exchange.label == "mcp" and exchange.method == "GET")
        counted = 0 if endless else 1
        self.service.telemetry.http_open.add(counted)
        try:
            await self._answer(exchange)
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except Exception:
            exchange.status = exchange.status or 500
            raise
        finally:
            self.service.telemetry.http_open.add(-counted)
            self._note(exchange)

    # --- The way of a request ---

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.path in HEALTH:
            await self._say_health(exchange)
            return
        if exchange.path == preview.PATH and self.picture and exchange.method in ("GET", "HEAD"):
            await exchange.respond(200, self.picture, "image/jpeg")
            return
        if exchange.path == "/":
            exchange.more_headers.append(self._frames)
        route = require_served(exchange, self.uploads)
        if route == "mcp":
            self._logins.require_key(exchange)
            require_tool(exchange)
        if self._logins.asks(exchange):
            await self._logins.show(exchange)
            return
        if exchange.method in ("GET", "HEAD", "OPTIONS"):
            await self._hand_on_question(exchange)
            return
        await self._hand_on_sent(exchange, route)

    async def _hand_on_sent(self, exchange: Exchange, route: str | None) -> None:
        """Hand on what may have a body."""
        if route not in ("mcp", "login"):
            self._logins.require_known(exchange)
        if (route in WORK and route != "mcp") or route == "upload":  # a tool is told in its own protocol
            self._require_admission()
        if route in WORK or route == "cancel":
            await self._hand_on_work(exchange, route)
        elif route == "login":
            await self._hand_on_guess(exchange)
        elif route == "upload":
            length = bodies.require_length(exchange, self.max_body_bytes)
            async with self.space.upload(exchange, length or self.max_body_bytes) as count:
                await bodies.hand_on(self.app, exchange, self.max_body_bytes, count=count)
        elif route == "logout":
            require_own_origin(exchange)
            # Gradio takes a mere question for a logout, as any page of another site could ask it.
            await self.app({**exchange.scope, "method": "GET"}, exchange.receive, exchange.send)
        else:
            await bodies.hand_on(self.app, exchange, bodies.JSON_LIMIT)

    async def _hand_on_question(self, exchange: Exchange) -> None:
        """Hand on what has no body; of a stream of answers mind who listens, and when it ends."""
        call, session = _listened_to(exchange)
        send = functools.partial(send_events, exchange) if call else exchange.send
        if route_of(exchange.path) == "upload_progress":
            send = UploadProgress(exchange).send
        if exchange.path == "/" and exchange.method == "GET":
            send = preview.PageAnswer(exchange, picture=self.picture is not None).send
        try:
            with self.unfetched.listening(call or session or ""):
                await self.app(exchange.scope, exchange.receive, send)
        finally:
            # Of one that broke off nothing can be fetched any more.
            if (call or session) and (exchange.left or not exchange.finished):
                self._leave(call or session)
            if self.forget and call:
                self.forget(call)

    def _leave(self, name: str) -> None:
        """Say of a call, or a page, that nobody waits for it any more."""
        self.leave(name)
        if (place := self._places.pop(name, None)) is not None:
            place.drop()

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

    def _require_admission(self) -> None:
        error: ServiceError | None = self.service.refusal()
        if error is not None:
            raise _refused(error)

    async def _hand_on_guess(self, exchange: Exchange) -> None:
        """Hand a login on; it is a guess until it is found to be right, or no login at all."""
        async with bodies.whole(exchange, bodies.LOGIN_LIMIT, self.buffers) as form:
            if form is None:
                return
        user = user_of(form)
        self._logins.begin(exchange, user)
        try:
            await self.app(exchange.scope, _replayed(form, exchange.receive), exchange.send)
        finally:
            if exchange.status != 400:  # with which Gradio says that name or password is wrong
                self._logins.forgive(exchange, user)

    # --- Work ---

    async def _hand_on_work(self, exchange: Exchange, route: str | None) -> None:
        """Read the whole body, check it, take places in the queue, and hand it on."""
        limit = self.max_tool_bytes if route == "mcp" else bodies.JSON_LIMIT
        async with bodies.whole(exchange, limit, self.buffers) as given:
            if given is None:
                return
            value, body = await self._checked(exchange, route, given)
        if route == "cancel":
            self._leave(str(value.get("event_id")) if isinstance(value, dict) else "")
            await self.app(exchange.scope, _replayed(body, exchange.receive), exchange.send)
            return
        try:
            if route == "mcp":
                self._require_admission()
            place = self._reserved(exchange, route, value)
        except Refusal as refusal:
            refusal.answer = _tool_answer(exchange, route, value, refusal)
            raise
        direct = route == "run" or (route == "mcp" and not _in_stream(exchange))
        answer = _Answer(exchange, DirectAnswer(exchange).send if route == "run" else exchange.send)
        try:
            async with self._named(exchange, route, value, direct=direct) as leaving:
                await self.app(exchange.scope, _replayed(body, leaving), answer.send)
        except Exception as err:
            # So Gradio says that a call by names has a name too many or too few, or asks for what is not there.
            if exchange.status is not None or route == "mcp" or type(err).__name__ not in _UNKNOWN:
                raise
            raise unknown_call() from err
        finally:
            if direct or exchange.status not in (200, 202):
                place.drop()
        if route in ("call", "queue/join") and (call := answer.event()):
            session = value.get("session_hash") if isinstance(value, dict) else None
            self.unfetched.note(call, session if isinstance(session, str) else None)
            self._places[call] = place

    async def _checked(self, exchange: Exchange, route: str | None, body: bytes) -> tuple[Any, bytes]:
        """Return the value that a body holds, and the body as it may be handed on."""
        if exchange.method != "POST":
            return None, body
        if exchange.header("content-type").split(";")[0].strip().lower() == "multipart/form-data":
            raise Refusal(415, "UnsupportedMediaType", "send JSON here, files to the upload route")
        try:
            # Nobody else is answered while a large body is looked at in this thread.
            if len(body) > _THREAD_BYTES:
                value, body = await asyncio.to_thread(self._look, exchange, route, body)
            else:
                value, body = self._look(exchange, route, body)
        except payloads.RefusedPayloadError as err:
            raise Refusal(400, "RefusedPayload", str(err)) from err
        if self.calls is not None:
            require_call(route, exchange.path, value, self.calls)
        return value, body

    def _look(self, exchange: Exchange, route: str | None, body: bytes) -> tuple[Any, bytes]:
        value = payloads.parse(body)
        limits: Any = {
            "uploads": self.uploads,
            "most_files": max(payloads.FILES_LIMIT, self.service.limits.max_queue),
        }
        try:
            changed = payloads.check(tools.arguments(value) if route == "mcp" else value, **limits)
            if route == "mcp":
                payloads.check(tools.pictures_named(value), strings=True, **limits)
        except payloads.RefusedPayloadError as err:
            refusal = Refusal(400, "RefusedPayload", str(err))
            refusal.answer = _tool_answer(exchange, route, value, refusal)
            raise refusal from err
        return value, json.dumps(value).encode() if changed else body

    def _reserved(self, exchange: Exchange, route: str | None, value: Any) -> Place:
        """Take a place in the queue for every picture that a request brings."""
        count = pictures(route, exchange.path, value) if exchange.method == "POST" else 0
        if count > self.service.limits.max_queue:
            count = 1  # who is let in with more than ever fits is told so
        try:
            place = self.service.reserve(count) if count else Place()
        except ServiceError as err:
            raise _refused(err) from err
        exchange.scope[PLACE] = place
        return place

    @asynccontextmanager
    async def _named(
        self, exchange: Exchange, route: str | None, value: Any, *, direct: bool
    ) -> AsyncIterator[Receive]:
        """Name work that is answered in this very request, and watch for the leaving of its client."""
        if route == "mcp":
            name = exchange.scope[CALL] = self._tools.begin(exchange, value, self.leave)
            try:
                yield exchange.receive  # its protocol takes a client's leaving for no cancellation
            finally:
                if direct:
                    self._tools.end(exchange, value, name)
            return
        if not direct:
            yield exchange.receive
            return
        name = exchange.scope[CALL] = secrets.token_hex(16)
        gone = asyncio.create_task(_disconnected(exchange))
        gone.add_done_callback(lambda task: None if task.cancelled() or task.exception() else self.leave(name))

        async def leaving() -> Message:
            return await asyncio.shield(gone)

        try:
            yield leaving
        finally:
            gone.cancel()

    # --- What is noted ---

    def _note(self, exchange: Exchange) -> None:
        telemetry = self.service.telemetry
        status = exchange.status or 499  # the client left before there was an answer
        if exchange.error is None and status >= 500:
            exchange.error = "Other"
        telemetry.http_requests.add(endpoint=exchange.label, status=status)
        telemetry.http_seconds.observe(exchange.seconds(), endpoint=exchange.label)
        # What the service has seen it has counted, picture by picture.
        if exchange.error is not None and not getattr(exchange.scope.get(PLACE), "errors_counted", False):
            telemetry.errors.add(kind=exchange.error)
        telemetry.write(
            "http",
            endpoint=exchange.label,
            method=exchange.method if exchange.method in ("GET", "HEAD", "POST", "OPTIONS", "DELETE") else OTHER,
            status=status,
            milliseconds=round(1000 * exchange.seconds(), 1),
            error=exchange.error,
        )


class _Answer:
    """Passes the answer to a call on, and reads in it how the call is named."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange, self._send, self._said = exchange, send, b""

    async def send(self, message: Message) -> None:
        self._said = (self._said + message.get("body", b""))[:_NAME_BYTES]
        await self._send(message)

    def event(self) -> str | None:
        """Return the id of the call; None where it was refused."""
        if self._exchange.status != 200:
            return None
        try:
            return str(json.loads(self._said)["event_id"])
        except (ValueError, LookupError, TypeError):
            return None


async def _disconnected(exchange: Exchange) -> Message:
    while (message := await exchange.receive())["type"] != "http.disconnect":
        pass
    return message


def _replayed(body: bytes, then: Receive) -> Receive:
    """Return what gives a body that was read once more, and after it what comes."""
    given: list[bytes] = [body]

    async def receive() -> Message:
        return {"type": "http.request", "body": given.pop(), "more_body": False} if given else await then()

    return receive


def _tool_answer(exchange: Exchange, route: str | None, value: Any, refusal: Refusal) -> object:
    """Return how a tool is told that its call is refused; None where only a status can say it."""
    if route != "mcp" or _in_stream(exchange):
        return None
    return tools.refused(value, refusal.message)


def _in_stream(exchange: Exchange) -> bool:
    """Return whether a tool's call is answered over a stream of its own, later, as a call by HTTP is."""
    return exchange.path.rstrip("/").endswith("/messages")


def _listened_to(exchange: Exchange) -> tuple[str, str]:
    """Return the call whose answer is asked for, and the session whose answers are; nothing where there is none."""
    if exchange.method != "GET":
        return "", ""
    if exchange.label.endswith("/answer"):
        return exchange.path.rstrip("/").rpartition("/")[2], ""
    if exchange.label == "queue/data":
        query = parse_qs(exchange.scope.get("query_string", b"").decode("latin-1"))
        return "", query.get("session_hash", [""])[0]
    return "", ""


def _refused(error: ServiceError) -> Refusal:
    seconds = error.retry_after_s if isinstance(error, ServiceBusyError) else RETRY_S
    return Refusal(503, type(error).__name__, str(error), seconds)


def _nobody(*names: str) -> None:
    """Tell nobody who waits no more."""
