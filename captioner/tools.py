"""Calls of tools (Model Context Protocol): what they hand over, and how one that is waited for no more is found again.

The protocol's server answers each request by itself and knows no other: so a "notifications/cancelled", which names the
request that it means, is understood here.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from captioner.exchange import Exchange, neighbourhood

REQUESTS = ("PingRequest", "ListToolsRequest", "CallToolRequest")
"""Kinds of requests that are answered, beside those that begin a session; Gradio has more, which it asks itself for."""
_CALLS_LIMIT = 1000
_PICTURES = ("image", "images")
"""Arguments in which an address would be fetched; in a sentence it is words."""


def arguments(value: Any) -> list[Any]:
    """Return what calls of tools hand over; the rest of such a message names no file.

    Args:
        value: the body of a request, one message or several.

    Returns:
        The parameters of each call.
    """
    return [message.get("params") for message in _messages(value, "tools/call")]


def pictures_named(value: Any) -> list[Any]:
    """Return what calls of tools hand over as pictures.

    Args:
        value: the body of a request, one message or several.

    Returns:
        The arguments that are pictures, of each call.
    """
    given = [params.get("arguments") for params in arguments(value) if isinstance(params, dict)]
    return [values.get(name) for values in given if isinstance(values, dict) for name in _PICTURES]


def refused(value: Any, message: str) -> object:
    """Return the answer to a call of a tool that is not let in, as its protocol says it.

    A status of HTTP would end the session of most clients, and nobody would read why.

    Args:
        value: the body of the request.
        message: one line for the client.

    Returns:
        The answer; None where the body is not one call of a tool that waits for an answer.
    """
    calls = _messages(value, "tools/call")
    if len(calls) != 1 or value is not calls[0] or "id" not in value:
        return None
    said = {"content": [{"type": "text", "text": message}], "isError": True}
    return {"jsonrpc": "2.0", "id": value["id"], "result": said}


def _messages(value: Any, method: str) -> list[dict[str, Any]]:
    messages = value if isinstance(value, list) else [value]
    return [message for message in messages if isinstance(message, dict) and message.get("method") == method]


class ToolCalls:
    """Remembers which call of whom has which name, so that it can be cancelled. For one event loop."""

    def __init__(self) -> None:
        self._names: OrderedDict[tuple[str, ...], list[str]] = OrderedDict()

    def begin(self, exchange: Exchange, value: Any, leave: Callable[[str], None]) -> str:
        """Name the calls of a request, and cancel those that it says are waited for no more.

        Args:
            exchange: that brings it.
            value: its body.
            leave: called with the name of a call that is waited for no more.

        Returns:
            A name for the calls in it.
        """
        name = secrets.token_hex(16)
        for message in _messages(value, "notifications/cancelled"):
            params = message.get("params")
            meant = self._names.get(_key(exchange, params.get("requestId") if isinstance(params, dict) else None), [])
            # Two clients that look the same from here count their requests from 1: neither is stopped for the other.
            if len(meant) == 1:
                leave(meant[0])
        for message in _messages(value, "tools/call"):
            key = _key(exchange, message.get("id"))
            self._names.setdefault(key, []).append(name)
            self._names.move_to_end(key)
        while len(self._names) > _CALLS_LIMIT:
            self._names.popitem(last=False)
        return name

    def end(self, exchange: Exchange, value: Any, name: str) -> None:
        """Forget the calls of a request that was answered.

        Args:
            exchange: that brought it.
            value: its body.
            name: of its calls.
        """
        for message in _messages(value, "tools/call"):
            key = _key(exchange, message.get("id"))
            names = self._names.get(key, [])
            if name in names:
                names.remove(name)
            if not names:
                self._names.pop(key, None)


def _key(exchange: Exchange, request: Any) -> tuple[str, ...]:
    """Return who asked, and the number of the request: an id of 1 is not one of "1"."""
    session = exchange.scope.get("query_string", b"").decode("latin-1")
    who = (exchange.header("authorization"), exchange.header("mcp-session-id"), neighbourhood(exchange.address()))
    return (*who, session, repr(request))
