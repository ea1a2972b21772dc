"""Laws of what stands before the tools: which addresses they have, who may call them, and how a call is cancelled."""

import asyncio

import pytest
from messages import answering

from captioner import asgi

pytest_plugins = ("asked",)
EVENTS = (b"accept", b"application/json, text/event-stream")


@pytest.mark.parametrize(
    "path",
    [
        "</script><script>alert(1)</script>",
        "x/",
        "sse/x",
        "schema/../x",
        "messages/x",
        "//",
        "http/http",
        '"-alert(1)-"/gradio_api/mcp',
        "x/gradio_api/mcp/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
def test_no_path_below_the_tools_but_their_own_is_served(ask, app, method, path):
    assert ask(method, f"/gradio_api/mcp/{path}", b"{}", headers=[EVENTS]).status == 404
    assert ask(method, f"/gradio_api/mcp{path}", b"{}", headers=[EVENTS]).status == 404
    assert app.bodies == []


@pytest.mark.parametrize("path", ["mcp", "mcp/", "mcp/http", "mcp/http/"])
def test_who_accepts_no_events_sees_no_page_of_gradios(ask, app, path):
    answer = ask("GET", f"/gradio_api/{path}")
    assert answer.status == 406
    assert b"<" not in answer.body
    assert app.bodies == []
    assert ask("GET", f"/gradio_api/{path}", headers=[EVENTS]).status == 200
    assert ask("POST", f"/gradio_api/{path}", {"method": "ping"}).status == 200


def test_a_page_of_another_site_calls_no_tool(ask, app):
    call = ("POST", "/gradio_api/mcp/", {"method": "ping"})
    for origin in (b"http://example.com", b"http://here", b"null", b"https://here:7861"):
        assert ask(*call, headers=[(b"origin", origin)]).status == 403
    assert app.bodies == []
    assert ask(*call, headers=[(b"origin", b"http://here:7860")]).status == 200
    assert ask(*call).status == 200


# --- Cancelled calls ---


def tool(number, name="caption"):
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": name, "arguments": {}}}


def cancelled(number):
    return {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": number}}


@pytest.fixture
def left(ask):
    told = []
    ask.middleware.leave = told.append
    return told


def during(ask, value, *others, path="/gradio_api/mcp/", **how):
    """Call a tool; while it works, send other messages. Return how the call is named."""
    names = []

    async def working(scope, receive, send):
        names.append(scope[asgi.CALL])
        for other, headers in others:
            await asyncio.to_thread(ask, "POST", path, other, headers=headers, inner=answering("start"))
        await answering("start")(scope, receive, send)

    ask("POST", path, value, inner=working, **how)
    return names[0]


def test_a_cancelled_call_of_a_tool_leaves_the_queue(ask, left):
    name = during(ask, tool(7), (cancelled(7), ()))
    assert left == [name]
    ask("POST", "/gradio_api/mcp/", cancelled(7))  # it is over
    assert left == [name]


@pytest.mark.parametrize(
    "message", [cancelled(8), cancelled("7"), cancelled(None), {"method": "notifications/cancelled"}]
)
def test_a_call_that_was_not_meant_goes_on(ask, left, message):
    during(ask, tool(7), (message, ()))
    assert left == []


def test_nobody_cancels_the_call_of_another(ask, left):
    mine, others = (b"authorization", b"Basic bWU6eA=="), (b"authorization", b"Basic eW91Ong=")
    during(ask, tool(7), (cancelled(7), [others]), headers=[mine])
    assert left == []
    name = during(ask, tool(7), (cancelled(7), [mine]), headers=[mine])
    assert left == [name]


def test_of_two_calls_that_look_the_same_none_is_cancelled(ask, left):
    path = "/gradio_api/mcp/messages/"
    for _ in range(2):
        ask("POST", path, tool(1), inner=answering("start"))
    ask("POST", path, cancelled(1), inner=answering("start"))
    assert left == []


def test_over_a_stream_of_events_a_call_can_be_cancelled_after_its_request_was_taken(ask, left):
    def post(value, session):
        return ask("POST", "/gradio_api/mcp/messages/", value, query=session, inner=answering("start"))

    post(tool(3), b"session_id=a")
    post(cancelled(3), b"session_id=b")
    assert left == []
    post(cancelled(3), b"session_id=a")
    assert len(left) == 1
