"""What a call says: whether there is what it asks for, with as many values, and how many pictures it brings.

Gradio answers a call of what is not there, or with other values, with a fault whose trace repeats the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from captioner import tools
from captioner.exchange import API, Refusal

Calls = Mapping[str | int, int]
"""How many values each call takes: of an endpoint by its name, of an event of the page by its number."""

_BATCH, _PICTURES = "caption_batch", "images"


def require_call(route: str | None, path: str, value: Any, calls: Calls) -> None:
    """Refuse a call of what is not there, or with too many or too few values.

    Args:
        route: of the request, as `route_of` names it.
        path: of the request.
        value: its body.
        calls: what can be called.

    Raises:
        Refusal: 400.
    """
    if route not in ("call", "run", "queue/join"):
        return
    if not isinstance(value, dict):
        raise Refusal(400, "BadRequest", "the body must be an object")
    by_names = path.startswith(f"{API}/call/v2/")
    name = value.get("fn_index") if route == "queue/join" else _endpoint(path)
    if not isinstance(name, str | int) or isinstance(name, bool) or name not in calls:
        raise unknown_call()
    if route != "queue/join" and value.get("fn_index") is not None and not by_names:
        raise unknown_call()
    count, data = calls[name], value.get("data")
    if not by_names and (not isinstance(data, list) or len(data) != count):
        raise Refusal(400, "BadRequest", f"data must be a list of {count} values; {API}/info lists them")


def unknown_call() -> Refusal:
    """Return the refusal of a call of what is not there."""
    return Refusal(400, "BadRequest", f"no such endpoint or argument; {API}/info lists them")


def pictures(route: str | None, path: str, value: Any) -> int:
    """Return how many pictures a call brings.

    Args:
        route: of the request, as `route_of` names it.
        path: of the request.
        value: its body, of what can be called.

    Returns:
        How many places in the queue it needs at least.
    """
    if route == "mcp":
        given = [params.get("arguments") for params in tools.arguments(value) if isinstance(params, dict)]
        return sum(_count(values.get(_PICTURES)) for values in given if isinstance(values, dict))
    if not isinstance(value, dict):
        return 0
    if route in ("call", "run") and _endpoint(path) == _BATCH:
        data = value.get("data")
        first = data[0] if isinstance(data, list) and data else None
        return _count(value.get(_PICTURES, first))
    return 1


def _endpoint(path: str) -> str:
    rest = path.removeprefix(f"{API}/").partition("/")[2]
    return rest.removeprefix("v2/").partition("/")[0]


def _count(images: Any) -> int:
    return len(images) if isinstance(images, list) else 1
