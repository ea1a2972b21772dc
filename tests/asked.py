"""Requests through the middleware alone, without a server: fixtures shared by the tests of what stands before the page.

A plugin of pytest: the test files name it in `pytest_plugins`.
"""

import asyncio
import io
import json
from types import SimpleNamespace

import loops
import pytest
from messages import EchoApp, door
from pictures import encode, gradient

from captioner.asgi import ServiceMiddleware
from captioner.service import ServiceLimits


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "ab12").mkdir(parents=True)
    (folder / "ab12" / "a photo.png").write_bytes(encode(gradient(), "PNG"))
    (tmp_path / "secret.png").write_bytes(encode(gradient(), "PNG"))
    return folder


@pytest.fixture
def service():
    log = io.StringIO()
    return door(ServiceLimits(max_upload_bytes=1000), log=log)


@pytest.fixture
def app():
    return EchoApp()


@pytest.fixture
def ask(app, service, uploads):
    """Send a request through the middleware; the body goes in as many parts as it has."""
    middleware = ServiceMiddleware(app, service=service, uploads=uploads, endpoints=["/caption"])

    def ask(method, path, *parts, headers=(), length=True, inner=None, root="", query=b"", host=b"here:7860"):
        if parts and not isinstance(parts[0], bytes):
            parts = (json.dumps(parts[0]).encode(),)
        total = sum(map(len, parts))
        known = [(b"content-length", str(total).encode())] if length and parts else []
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages.append({"type": "http.request", "body": b"", "more_body": False})
        sent = []

        async def receive():
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        middleware.app = inner or app
        scope = {
            "type": "http",
            "method": method,
            "path": root + path,
            "headers": [*known, (b"host", host), *headers],
        }
        scope |= {"root_path": root, "query_string": query}
        loops.run(asyncio.wait_for(middleware(scope, receive, send), 30))
        starts = [message for message in sent if message["type"] == "http.response.start"]
        assert len(starts) <= 1
        return SimpleNamespace(
            status=starts[0]["status"] if starts else None,
            headers=dict(starts[0]["headers"]) if starts else {},
            body=b"".join(message.get("body", b"") for message in sent),
            left=len(messages),
        )

    ask.middleware = middleware
    return ask
