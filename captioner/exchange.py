"""A request and its answer, as the middleware handles them.

Pure ASGI 3 (https://asgi.readthedocs.io/en/stable/specs/www.html).
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api"


class Refusal(Exception):  # noqa: N818  # an answer, not a fault
    """A request is answered here.

    Args:
        status: of the answer.
        kind: of the error.
        message: one line for the client.
        retry_after_s: when to try again.

    Attributes:
        answer: what is answered, with status 200, where a protocol has a way of its own to say that; else None.
    """

    def __init__(self, status: int, kind: str, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after_s = status, kind, message, retry_after_s
        self.answer: object = None


class Exchange:
    """A request and its answer.

    Args:
        scope: of ASGI.
        receive: of ASGI.
        send: of ASGI.
        label: the endpoint's name in metrics.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, label: str) -> None:
        self.scope, self._receive, self._send, self.label = scope, receive, send, label
        self.method, self.path = str(scope["method"]).upper(), path_of(scope)
        self.status: int | None = None
        self.error: str | None = None
        self.finished = self.left = False  # the answer is complete; the client left before that
        self.more_headers: list[tuple[bytes, bytes]] = []  # of the answer, whoever gives it
        self._began_s = time.monotonic()

    def seconds(self) -> float:
        """Return how long the request has taken."""
        return time.monotonic() - self._began_s

    def header(self, name: str) -> str:
        """Return a header of the request, or nothing."""
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key.lower() == wanted), "")

    def address(self) -> str:
        """Return the address of the client, or nothing where there is none to know."""
        client = self.scope.get("client")
        return str(client[0]) if client else ""

    async def receive(self) -> Message:
        """Wait for what the client sends, or for its leaving."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.finished:
            self.left = True
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            if self.more_headers:
                message = {**message, "headers": [*message["headers"], *self.more_headers]}
        await self._send(message)
        self.finished = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def respond(self, status: int, body: bytes, content_type: str, *more: tuple[bytes, bytes]) -> None:
        """Send a whole answer."""
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            *more,
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def respond_json(self, status: int, value: object, *more: tuple[bytes, bytes]) -> None:
        """Send a value as the whole answer."""
        await self.respond(status, json.dumps(value).encode(), "application/json", *more)

    async def refuse(self, refusal: Refusal) -> None:
        """Say why the request is refused, if nothing has been said yet."""
        self.error = refusal.kind
        if self.status is not None:
            return
        more: list[tuple[bytes, bytes]] = []
        if refusal.retry_after_s is not None:
            more.append((b"retry-after", str(refusal.retry_after_s).encode()))
        if refusal.status == 401 and self.label == "mcp":  # a browser would ask with a window of its own
            more.append((b"www-authenticate", b'Basic realm="captioner", charset="UTF-8"'))
        if refusal.status in (408, 413):
            more.append((b"connection", b"close"))  # the rest of the body is not read
        if refusal.answer is not None:
            await self.respond_json(200, refusal.answer, *more)
        elif self.label == "upload" and self.header("sec-fetch-mode"):
            # Gradio's page shows the body of such an answer as it is; only browsers send this header.
            await self.respond(refusal.status, refusal.message.encode(), "text/plain; charset=utf-8", *more)
        else:
            error = {"type": refusal.kind, "message": refusal.message}
            await self.respond_json(refusal.status, {"error": error}, *more)


def neighbourhood(address: str) -> str:
    """Return whose an address is, as far as limits go.

    Args:
        address: of a client.

    Returns:
        The address, or of one in IPv6 the network of a single customer, who has 2**64 addresses.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.IPv6Network((parsed, 64), strict=False))


def path_of(scope: Scope) -> str:
    """Return the path below the app's root."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def route_of(path: str) -> str | None:
    """Return the first part of a path of the API, "login" and "logout" as such; None for a path of the page."""
    if path.rstrip("/") in ("/login", "/logout"):
        return path.strip("/")
    if not path.startswith(f"{API}/"):
        return None
    parts = path.removeprefix(f"{API}/").split("/")
    head = parts[0].partition("=")[0]
    return f"queue/{parts[1]}" if head == "queue" and len(parts) > 1 else head
