"""Which routes are served: those that the page, its clients and tools use; all else of Gradio's is not there.

A list of what is open, not of what is closed: a new version of Gradio brings new routes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from captioner.exchange import API, Exchange, Refusal, route_of
from captioner.payloads import is_upload

HEALTH = ("/healthz", "/readyz", "/metrics")
WORK = frozenset({"call", "run", "queue/join", "mcp"})
"""Routes that ask for work: the first part after the prefix. Their bodies are read before the app sees them."""
SENT = frozenset({"upload", "cancel", "reset", "login", "logout"})
"""Other routes to which something may be sent."""
OTHER = "other"

_READ = frozenset(
    {
        "app_id",
        "call",
        "file",
        "heartbeat",
        "info",
        "login",
        "login_check",
        "mcp",
        "openapi.json",
        "queue/data",
        "queue/status",
        "startup-events",
        "theme.css",
        "upload_progress",
        "user",
    }
)
_TOOLS = re.compile(r"/mcp(/|(/http|/sse|/schema|/messages)/?)?")
_EVENTS = b"text/event-stream"


def require_served(exchange: Exchange, uploads: Path) -> str | None:
    """Refuse what is not served.

    Args:
        exchange: any request but those for health.
        uploads: the folder of uploaded files.

    Returns:
        The route, as `route_of` names it.

    Raises:
        Refusal: 404 where nothing is served.
    """
    path, method = exchange.path, exchange.method
    route = route_of(path)
    if method in ("GET", "HEAD"):
        # The file route fetches what is an address.
        file = path.partition(f"{API}/file")[2].lstrip("=/")
        elsewhere = route == "file" and not is_upload(f"/{file.lstrip('/')}", uploads)
        served = not elsewhere and (route is None or route in _READ)
    else:
        served = method == "OPTIONS" or (method in ("POST", "DELETE") and route in WORK | SENT)
    if not served:
        raise Refusal(404, "NotFound", "nothing is served here")
    if route == "mcp" and not _TOOLS.fullmatch(path.removeprefix(API)):
        raise Refusal(404, "NotFound", f"nothing is served here; tools are at {API}/mcp/")
    return route


def require_tool(exchange: Exchange) -> None:
    """Let tools through, and nobody else: Gradio shows people a page there, into whose script it writes the path.

    Args:
        exchange: for a route of tools.

    Raises:
        Refusal: 403, 406.
    """
    end = exchange.path.rstrip("/").rpartition("/")[2]
    if exchange.method in ("GET", "HEAD") and end in ("mcp", "http") and not _takes_events(exchange):
        raise Refusal(406, "NotAcceptable", "this address is for tools, which accept text/event-stream")
    require_own_origin(exchange)


def require_own_origin(exchange: Exchange) -> None:
    """Refuse what a page of another site sends, in the browser of somebody who may come in here.

    Args:
        exchange: any request.

    Raises:
        Refusal: 403.
    """
    origin = exchange.header("origin")
    if origin and origin.partition("://")[2] != exchange.header("host"):
        raise Refusal(403, "ForeignOrigin", "not from pages of other sites")


def _takes_events(exchange: Exchange) -> bool:
    return any(key.lower() == b"accept" and _EVENTS in value for key, value in exchange.scope["headers"])


def label_of(path: str, endpoints: Collection[str]) -> str:
    """Return the name of a request's endpoint, of which there are few.

    Args:
        path: below the app's root.
        endpoints: names of the API that may be shown; others are "other".

    Returns:
        The name, as metrics and log have it.
    """
    if path in ("/", *HEALTH):
        return path
    route = route_of(path)
    if route is None:
        return "page"
    if route in ("call", "run"):
        parts = path.removeprefix(f"{API}/{route}/").removeprefix("v2/").split("/")
        name = parts[0] if parts[0] in endpoints else OTHER
        answer = "/answer" if len(parts) > 1 and parts[1] else ""
        return f"{route}/{name}{answer}"
    return route if route in WORK | SENT | {"queue/data", "file", "heartbeat"} else OTHER
