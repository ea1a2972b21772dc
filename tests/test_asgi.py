"""Laws of what stands before the page: who is let through, how much, and naming which files."""

import asyncio
import contextlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from types import SimpleNamespace
from urllib.parse import quote

import loops
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import END, GONE, META, PART, answering, call, door
from pictures import encode, gradient

from captioner import asgi, bodies, payloads, preview, routes, serving
from captioner.asgi import ServiceMiddleware
from captioner.door import OpenDoor, wait_for_answers
from captioner.errors import ServiceBusyError, ServiceClosedError
from captioner.exchange import path_of
from captioner.requests import Place
from captioner.service import ServiceLimits

pytest_plugins = ("asked",)


# --- Health ---


def test_healthy_as_long_as_the_process_lives_ready_as_long_as_the_model_answers(ask, service, app):
    assert (ask("GET", "/healthz").status, ask("GET", "/readyz").status) == (200, 200)
    service.ready = False
    assert ask("GET", "/healthz").status == 200
    answer = ask("GET", "/readyz")
    assert answer.status == 503
    assert int(answer.headers[b"retry-after"]) >= 1
    assert ask("POST", "/healthz").status == 405
    assert app.bodies == []


def test_metrics_count_requests_by_endpoint_and_status(ask):
    ask(*call(1))
    ask(*call({"path": "/etc/passwd"}))
    answer = ask("GET", "/metrics")
    assert answer.headers[b"content-type"] == b"text/plain; version=0.0.4; charset=utf-8"
    text = answer.body.decode()
    assert 'captioner_http_requests_total{endpoint="call/caption",status="200"} 1' in text
    assert 'captioner_http_requests_total{endpoint="call/caption",status="400"} 1' in text
    assert 'captioner_errors_total{kind="RefusedPayload"} 1' in text


@given(st.lists(st.text(), max_size=5))
def test_labels_of_metrics_are_few_whatever_is_asked(parts):
    allowed = {"/", "page", "other", "file", "heartbeat", "queue/data", *routes.WORK, *routes.SENT}
    names = {
        f"{route}/{name}{end}" for route in ("call", "run") for name in ("caption", "other") for end in ("", "/answer")
    }
    for first in ("", "/gradio_api/", "/gradio_api/call/", "/gradio_api/queue/"):
        label = routes.label_of(path_of({"path": first + "/".join(parts)}), ["caption"])
        assert label in allowed | names


# --- Admission ---


@pytest.mark.parametrize("route", ["call/caption", "call/v2/caption", "run/caption", "queue/join", "upload"])
def test_a_full_queue_is_said_at_once(ask, service, app, route):
    service.refusal = lambda: ServiceBusyError("full", retry_after_s=7)
    answer = ask("POST", f"/gradio_api/{route}", b"{}")
    assert (answer.status, answer.headers[b"retry-after"]) == (503, b"7")
    assert json.loads(answer.body) == {"error": {"type": "ServiceBusyError", "message": "full"}}
    assert app.bodies == []
    assert answer.left == 2  # nothing of the body was read


def test_while_closing_answers_are_still_fetched_and_requests_cancelled(ask, service):
    service.refusal = lambda: ServiceClosedError("closing")
    assert ask(*call(1)).status == 503
    assert ask("GET", "/gradio_api/call/caption/abc").status == 200
    assert ask("GET", "/gradio_api/queue/data").status == 200
    assert ask("POST", "/gradio_api/cancel", b"{}").status == 200


def batch(count):
    return {"images": [{"path": None}] * count}


def tool(name, arguments):
    return {"method": "tools/call", "params": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("route", "body", "places"),
    [
        ("call/v2/caption", {"image": "x"}, [1]),
        ("run/score", {"data": ["x", "a dog"]}, [1]),
        ("queue/join", {"fn_index": 0, "data": []}, [1]),
        ("call/v2/caption_batch", batch(5), [5]),
        ("call/caption_batch", {"data": [["x"] * 3, None]}, [3]),
        ("call/v2/caption_batch", batch(0), []),
        ("call/v2/caption_batch", {"images": "x"}, [1]),
        ("call/v2/caption_batch", batch(300), [1]),  # more than ever fit: the endpoint says so
        ("mcp/", tool("caption", {"image": "x"}), [1]),
        ("mcp/", tool("caption_batch", {"images": ["x"] * 4}), [4]),
        ("mcp/", {"method": "tools/list"}, []),
        ("cancel", {"event_id": "x"}, []),
    ],
    ids=str,
)
def test_a_place_is_taken_at_the_door_for_every_picture(ask, service, route, body, places):
    asked = []
    service.reserve = lambda count: asked.append(count) or Place()
    assert ask("POST", f"/gradio_api/{route}", body).status == 200
    assert asked == places


@pytest.mark.parametrize("route", ["call/caption", "queue/join", "run/caption", "mcp/messages/"])
def test_without_a_place_a_request_is_refused_at_the_door(ask, service, app, route):
    def full(count):
        raise ServiceBusyError("full", retry_after_s=7)

    service.reserve = full
    body = tool("caption", {"image": "x"}) if route.startswith("mcp") else {"data": []}
    answer = ask("POST", f"/gradio_api/{route}", body)
    assert (answer.status, answer.headers[b"retry-after"]) == (503, b"7")
    assert app.bodies == []


def test_a_tool_is_told_of_a_full_queue_in_its_own_protocol(ask, service, app):
    """A status of HTTP ends the session of its client, and its reason is never read."""

    def full(*count):
        raise ServiceBusyError("full", retry_after_s=7)

    body = {**tool("caption", {"image": "x"}), "jsonrpc": "2.0", "id": 5}
    said = {"jsonrpc": "2.0", "id": 5, "result": {"content": [{"type": "text", "text": "full"}], "isError": True}}
    service.reserve, letting = full, service.reserve
    answer = ask("POST", "/gradio_api/mcp/", body)
    assert (answer.status, answer.headers[b"retry-after"], json.loads(answer.body)) == (200, b"7", said)
    service.reserve, service.refusal = letting, lambda: ServiceBusyError("full", retry_after_s=7)
    answer = ask("POST", "/gradio_api/mcp/", body)
    assert (answer.status, json.loads(answer.body)) == (200, said)
    assert ask("POST", "/gradio_api/mcp/", {"method": "tools/list"}).status == 503
    assert app.bodies == []
    assert service.telemetry.errors.value(kind="ServiceBusyError") == 3


def test_the_page_is_told_why_an_upload_is_refused_as_it_shows_it(ask, service):
    service.refusal = lambda: ServiceBusyError("full", retry_after_s=7)
    answer = ask("POST", "/gradio_api/upload", b"x", headers=[(b"sec-fetch-mode", b"cors")])
    assert (answer.status, answer.body) == (503, b"full")


def test_an_error_that_the_service_has_counted_is_not_counted_again(ask, service):
    place = Place()

    async def failing(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": "why", "title": "ImageReadError"}'})

    service.reserve = lambda count: place
    for place.errors_counted in (True, False):
        assert ask("POST", "/gradio_api/run/caption", {"data": []}, inner=failing).status == 422
    assert service.telemetry.errors.value(kind="ImageReadError") == 1


@pytest.mark.parametrize(
    ("route", "status", "dropped"),
    [
        ("run/caption", 200, True),
        ("mcp/", 200, True),
        ("call/caption", 400, True),
        ("queue/join", 422, True),
        ("call/caption", 200, False),
        ("queue/join", 200, False),
        ("mcp/messages/", 202, False),
    ],
)
def test_a_place_is_given_back_where_nothing_more_comes_of_the_request(ask, service, route, status, dropped):
    told = []
    place = SimpleNamespace(drop=lambda: told.append(True))
    service.reserve = lambda count: place

    async def answering_so(scope, receive, send):
        assert scope[asgi.PLACE] is place
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send(END)

    body = tool("caption", {"image": "x"}) if route.startswith("mcp") else {"data": []}
    ask("POST", f"/gradio_api/{route}", body, inner=answering_so)
    assert bool(told) == dropped


# --- Sizes ---


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/call/caption", "/gradio_api/cancel"])
def test_a_body_over_its_limit_is_refused_however_it_comes(ask, app, path, length):
    part = b" " * 100_000
    count = 1 + bodies.JSON_LIMIT // len(part)
    answer = ask("POST", path, *[part] * count, length=length)
    assert answer.status == 413
    assert app.bodies == []
    if length:
        assert answer.left == count + 1  # refused before anything was read


def test_a_body_at_its_limit_passes_unchanged(ask, app):
    limit = 1000 + bodies.MULTIPART_BYTES
    body = os.urandom(limit)
    assert ask("POST", "/gradio_api/upload", body[:7], body[7:], length=False).status == 200
    assert app.bodies == [body]
    assert ask("POST", "/gradio_api/upload", body + b"!", length=False).status == 413


def test_an_app_that_hides_the_end_of_a_body_cannot_answer_it(ask):
    async def stubborn(scope, receive, send):
        with contextlib.suppress(Exception):
            while (await receive())["more_body"]:
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"all is well"})

    answer = ask("POST", "/gradio_api/upload", *[b" " * 50_000] * 9, length=False, inner=stubborn)
    assert (answer.status, b"well" in answer.body) == (413, False)


@pytest.mark.parametrize("length", [b"-1", b"1e9", "²".encode(), b"9" * 400])
def test_a_length_that_is_no_sensible_number_is_refused(ask, app, length):
    answer = ask("POST", "/gradio_api/upload", b"x", length=False, headers=[(b"content-length", length)])
    assert answer.status in (400, 413)
    assert app.bodies == []


def test_what_is_buffered_is_bounded_and_given_back(ask):
    ask.middleware.buffers.most_bytes = 200
    assert ask("POST", "/gradio_api/call/caption", b" " * 60, b" " * 60).status == 503  # half of it is one address's
    assert ask.middleware.buffers.held_bytes == {}
    assert ask(*call(1)).status == 200
    assert ask.middleware.buffers.held_bytes == {}


def test_a_body_that_never_ends_times_out(ask, app, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.01)

    async def never():
        await asyncio.Event().wait()

    async def run(path):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        await asyncio.wait_for(ask.middleware(scope, never, send), 30)
        return sent[0]["status"]

    assert loops.run(run("/gradio_api/call/caption")) == 408
    assert loops.run(run("/gradio_api/upload")) == 408


def test_a_client_that_leaves_in_the_middle_gets_no_answer(ask, app):
    async def run():
        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/gradio_api/call/caption", "headers": []}
        await asyncio.wait_for(ask.middleware(scope, receive, send), 30)

    loops.run(run())
    assert app.bodies == []


def test_the_app_sees_the_client_leave_after_a_checked_body(ask):
    seen = []

    async def watching(scope, receive, send):
        seen.append(await receive())
        seen.extend([(await receive())["type"], (await receive())["type"]])

    ask("POST", "/gradio_api/call/caption", b"{}", inner=watching)
    assert seen == [{"type": "http.request", "body": b"{}", "more_body": False}, "http.disconnect", "http.disconnect"]


@pytest.mark.parametrize(
    ("method", "path", "inner", "left"),
    [
        ("GET", "/gradio_api/call/caption/abc", answering("start", PART, END, until=GONE), []),
        ("GET", "/gradio_api/call/caption/abc", answering("start", PART, until=GONE), ["abc"]),
        ("GET", "/gradio_api/call/v2/caption/abc/", answering("start", until=GONE), ["abc"]),
        ("GET", "/gradio_api/call/v2/caption/abc", answering(), ["abc"]),
        ("GET", "/gradio_api/queue/data", answering("start", PART, until=GONE), ["mine"]),
        ("GET", "/gradio_api/queue/data", answering("start", PART, END), []),
        ("GET", "/gradio_api/heartbeat/abc", answering("start", PART, until=GONE), []),
        ("POST", "/gradio_api/cancel", answering("start", END), ["abc"]),
        ("POST", "/gradio_api/run/caption", answering(until=GONE), ["its name"]),
        ("POST", "/gradio_api/call/caption", answering(until=GONE), []),
    ],
)
def test_it_is_said_who_waits_no_more(ask, method, path, inner, left):
    told, names = [], []
    ask.middleware.leave = told.append

    async def named(scope, receive, send):
        names.append(scope.get(asgi.CALL))
        await inner(scope, receive, send)
        await asyncio.sleep(0)

    body = [{"event_id": "abc"}] if method == "POST" else []
    ask(method, path, *body, inner=named, query=b"session_hash=mine")
    assert told == [names[0] if name == "its name" else name for name in left]


# --- Routes ---


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("POST", "/anything"),
        ("PUT", "/gradio_api/call/caption"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/stream/abc"),
        ("POST", "/gradio_api/queue/other"),
        ("GET", "/gradio_api/proxy=http://example.com/x"),
        ("GET", "/gradio_api/file=http://example.com/x.png"),
        ("GET", "/gradio_api/file=https:/example.com/x.png"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("HEAD", "/gradio_api/file=//etc/passwd"),
        ("GET", "/gradio_api/vibe-code"),
    ],
)
def test_routes_that_would_fetch_read_or_change_are_not_served(ask, app, method, path):
    assert ask(method, path, b"{}").status == 404
    assert app.bodies == []


def test_uploaded_files_are_shown(ask, uploads, tmp_path):
    assert ask("GET", f"/gradio_api/file={uploads}/ab12/a photo.png").status == 200
    assert ask("GET", f"/gradio_api/file={uploads}/../secret.png").status == 404
    assert ask("GET", f"/gradio_api/file={tmp_path}/secret.png").status == 404


def test_a_root_path_changes_nothing(ask, app):
    for root in ("", "/demo"):
        assert ask("POST", "/gradio_api/call/caption", {"data": [{"path": "/etc/passwd"}]}, root=root).status == 400
        assert ask("GET", "/gradio_api/file=/etc/passwd", root=root).status == 404
        assert ask("GET", "/healthz", root=root).status == 200
    assert app.bodies == []
    text = ask("GET", "/metrics").body.decode()
    assert 'captioner_http_requests_total{endpoint="call/caption",status="400"} 2' in text


def test_there_are_no_websockets(ask, app):
    sent = []

    async def send(message):
        sent.append(message)

    loops.run(ask.middleware({"type": "websocket", "path": "/gradio_api/queue/join"}, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_logout_is_sent_and_no_mere_question_of_a_page_elsewhere(ask):
    asked = []

    async def noting(scope, receive, send):
        asked.append((scope["method"], scope["path"]))
        await send({"type": "http.response.start", "status": 302, "headers": []})
        await send(END)

    assert ask("GET", "/logout", inner=noting).status == 404
    assert ask("POST", "/logout", headers=[(b"origin", b"http://example.com")], inner=noting).status == 403
    assert asked == []
    assert ask("POST", "/logout", headers=[(b"origin", b"http://here:7860")], inner=noting).status == 302
    assert asked == [("GET", "/logout")]


# --- Files that a body names ---


def own(uploads):
    return f"{uploads}/ab12/a photo.png"


def test_an_uploaded_file_passes_as_a_browser_and_a_client_name_it(ask, app, uploads):
    path = own(uploads)
    address = f"http://here:7860/gradio_api/file={quote(path)}"
    named = [
        {"path": path, "meta": META, "orig_name": "../../x.png", "url": address},
        {"path": path, "meta": META, "url": f"/gradio_api/file={path}"},
        {"path": path, "meta": META, "url": f"http://example.com/gradio_api/file={path}"},
        {"path": path, "meta": META, "url": None},
        {"path": path},
        {"path": None, "url": None},
        "http://a.sentence/about a page",
    ]
    for value in named:
        assert ask(*call(value)).status == 200, value
    # By which name somebody calls this server nobody knows but they: no address is handed on.
    handed = [{**value, "url": None} if "url" in value else value for value in named]
    assert [json.loads(body)["data"][0] for body in app.bodies] == handed


ATTACKS = [
    {"path": "/etc/passwd"},
    {"path": "/etc/passwd", "meta": META},
    {"path": "/etc/passwd", "meta": {}},
    {"path": "{uploads}/../secret.png", "meta": META},
    {"path": "{uploads}/ab12/../../secret.png"},
    {"path": "{uploads}//ab12/a photo.png"},
    {"path": "{uploads}/ab12/./a photo.png"},
    {"path": "{uploads}"},
    {"path": "{uploads}/ab12"},
    {"path": "{uploads}/ab12/none.png"},
    {"path": "{uploads}-not/x.png"},
    {"path": "ab12/a photo.png"},
    {"path": ""},
    {"path": "~/x.png"},
    {"path": "/etc/passwd\0.png"},
    {"path": "file:///etc/passwd"},
    {"path": "http://example.com/x.png", "meta": META},
    {"path": "https://example.com/x.png"},
    {"path": "HTTP://example.com/x.png"},
    {"path": "data:image/png;base64,AAAA"},
    {"path": ["/etc/passwd"]},
    {"path": {"path": "/etc/passwd"}},
    {"path": 3},
    {"path": "{own}", "meta": "gradio.FileData"},
    {"meta": META},
    {"meta": META, "path": None, "url": None},
    {"url": "http://example.com/x.png"},
    {"url": "data:image/png;base64,AAAA", "path": None},
    {"path": "{own}", "url": "http://example.com/x.png"},
    {"path": "{own}", "url": "http://here:7860/gradio_api/file=/etc/passwd"},
    {"path": "{own}", "url": "http://here:7860/gradio_api/file={own}?x=http://example.com"},
    {"path": "{own}", "url": "file:///gradio_api/file={own}"},
    {"path": "{own}", "url": "http://[bad/gradio_api/file={own}"},
    {"path": "{own}", "url": 3},
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_what_was_not_uploaded_here_is_refused(ask, app, uploads, attack):
    def filled(value):
        return (
            value.replace("{uploads}", str(uploads)).replace("{own}", own(uploads)) if isinstance(value, str) else value
        )

    attack = {key: filled(value) for key, value in attack.items()}
    for route in ("call/caption", "call/v2/caption", "run/caption", "queue/join"):
        for value in (attack, [[attack]], {"deep": {"er": [attack]}}):
            answer = ask(*call(value, route=route))
            assert answer.status == 400
            assert "passwd" not in answer.body.decode()
            assert str(uploads) not in answer.body.decode()
    assert ask("POST", "/gradio_api/call/v2/caption", {"picture": attack}).status == 400
    assert app.bodies == []


def test_links_among_the_uploads_lead_nowhere(ask, uploads, tmp_path):
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    (uploads / "folder").symlink_to(tmp_path)
    assert ask(*call({"path": f"{uploads}/link.png"})).status == 400
    assert ask(*call({"path": f"{uploads}/folder/secret.png"})).status == 400


def test_the_folder_of_uploads_may_itself_be_a_link(uploads, tmp_path):
    (tmp_path / "alias").symlink_to(uploads)
    for folder in (tmp_path / "alias", uploads):
        assert payloads.is_upload(f"{folder}/ab12/a photo.png", tmp_path / "alias")
    assert not payloads.is_upload(f"{tmp_path}/alias/ab12/none.png", tmp_path / "alias")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"data": [{"path": null, "path": "/etc/passwd"}]}',
        '{"data": [{"path": "/etc/passwd"}]}'.encode("utf-16"),
        '{"data": [{"path": "/etc/passwd"}]}'.encode("utf-8-sig"),
        b'{"data": [{"p\\u0061th": "/etc/passwd"}]}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"\xff",
        b"[" + b"0," * 300_000 + b"0]",
    ],
)
def test_a_body_that_could_be_read_in_two_ways_or_is_endless_is_refused(ask, app, body):
    assert ask("POST", "/gradio_api/call/caption", body).status == 400
    assert app.bodies == []


def test_forms_go_to_the_upload_route_only(ask, app):
    form = [(b"content-type", b"Multipart/Form-Data; boundary=x")]
    assert ask("POST", "/gradio_api/call/caption", b"{}", headers=form).status == 415
    assert ask("POST", "/gradio_api/upload", b"--x--", headers=form).status == 200


@pytest.mark.parametrize(
    "address", ["http://example.com/x.png", "https://e.com", "file:/etc/passwd", "FTP://x", " http://x"]
)
def test_tools_are_handed_no_addresses(ask, app, address):
    def tool(value):
        arguments = {"image": value, "sentence": "note:/ a dog"}
        return {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": "caption", "arguments": arguments},
        }

    answer = ask("POST", "/gradio_api/mcp/", tool(address))
    assert answer.status == 200
    assert json.loads(answer.body)["result"]["isError"]
    assert ask("POST", "/gradio_api/mcp/", tool({"deep": [address]})).body == answer.body
    assert ask("POST", "/gradio_api/mcp/messages/", tool(address)).status == 400  # answered over a stream
    assert ask("POST", "/gradio_api/mcp/", [tool(address)]).status in (400,)
    assert app.bodies == []
    assert ask("POST", "/gradio_api/mcp/", tool("data:image/png;base64,AAAA")).status == 200
    assert (
        ask("POST", "/gradio_api/mcp/", {"method": "initialize", "params": {"client": {"url": "http://x"}}}).status
        == 200
    )


@pytest.mark.parametrize("path", ["/gradio_api/mcp/", "/gradio_api/mcp/sse", "/gradio_api/mcp/schema"])
def test_tools_are_asked_for_a_key_where_there_are_users(service, uploads, app, ask, path):
    import base64

    guarded = ServiceMiddleware(app, service=service, uploads=uploads, users=[("me", "pass:word"), ("é", "x")])

    def status(method, *authorization):
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"{}", "more_body": False}

        headers = [(b"accept", b"text/event-stream"), *((b"authorization", value) for value in authorization)]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        loops.run(asyncio.wait_for(guarded(scope, receive, send), 30))
        return sent[0]["status"]

    for method in ("GET", "POST"):
        for wrong in ([], [b""], [b"Basic"], [b"Basic " + base64.b64encode(b"me:pass")], [b"Bearer x"], [b"\xff \xff"]):
            assert status(method, *wrong) == 401
        for user in ("me:pass:word", "é:x"):
            assert status(method, b"basic " + base64.b64encode(user.encode())) == 200
    assert ask("GET", path, headers=[(b"accept", b"text/event-stream")]).status == 200  # where nobody need log in


def test_before_a_page_without_a_service_everyone_is_let_in_within_limits(app, uploads):
    door = OpenDoor()
    assert door.ready
    assert door.refusal() is None
    assert ServiceMiddleware(app, service=door, uploads=uploads).max_body_bytes > door.limits.max_upload_bytes


def test_a_tool_that_listens_is_not_waited_for(ask, service):
    seen = []

    async def listening(scope, receive, send):
        seen.append(service.telemetry.http_open.value())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    ask("GET", "/gradio_api/mcp/sse", inner=listening)
    assert seen == [0]


# --- Stopping ---


def test_open_answers_are_waited_for_and_heartbeats_are_not(ask, service):
    opened = service.telemetry.http_open
    seen = []

    async def counting(scope, receive, send):
        seen.append(opened.value())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    for path in ("/gradio_api/call/caption/abc", "/gradio_api/heartbeat/abc"):
        ask("GET", path, inner=counting)
    assert seen == [1, 0]
    assert opened.value() == 0
    assert wait_for_answers(service.telemetry, timeout_s=30, quiet_s=0)
    opened.add(1)
    assert not wait_for_answers(service.telemetry, timeout_s=0.01, quiet_s=0)


def test_an_app_that_fails_leaves_nothing_open(ask, service):
    async def failing(scope, receive, send):
        raise ZeroDivisionError

    for method, path in (("GET", "/"), ("POST", "/gradio_api/call/caption"), ("POST", "/gradio_api/upload")):
        with pytest.raises(ZeroDivisionError):
            ask(method, path, b"{}", inner=failing)
    assert service.telemetry.http_open.value() == 0


# --- What is left behind ---


def test_old_files_are_swept_and_new_ones_stay(uploads):
    old, new = uploads / "old" / "x.png", uploads / "ab12" / "a photo.png"
    old.parent.mkdir()
    old.write_bytes(b"x")
    for path in (old, old.parent):
        os.utime(path, (time.time() - 7200,) * 2)
    assert payloads.sweep(uploads, older_than_s=3600) == 1
    assert not old.exists()
    assert new.exists()
    assert payloads.sweep(uploads, older_than_s=3600) == 0


def test_the_log_names_endpoint_status_and_error_and_nothing_of_the_user(ask, service):
    ask("POST", "/gradio_api/call/my-private-name", {"data": [{"path": "/home/me/secret.png"}]})
    line = json.loads(service.telemetry.log.getvalue())
    assert {key: line[key] for key in ("event", "endpoint", "status", "error")} == {
        "event": "http",
        "endpoint": "call/other",
        "status": 400,
        "error": "RefusedPayload",
    }
    assert "private" not in str(line)
    assert "secret" not in str(line)


# --- Before Gradio itself ---


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of Gradio with a picture as input, behind the middleware, on a port of its own."""
    folder = tmp_path_factory.mktemp("gradio")
    serving.open_uploads(serving.prepare_environment())  # as the page does: Gradio, if it is there, would make it first
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        import gradio as gr
        from starlette.middleware import Middleware

        there = door(ServiceLimits(max_upload_bytes=100_000))
        with gr.Blocks() as blocks:
            photo, out = gr.Image(type="filepath"), gr.Textbox()
            gr.Button().click(lambda path: "seen" if path else "nothing", photo, out, api_name="caption")
            gr.Button().click(lambda given: str(given["path"]), photo, out, api_name="raw", preprocess=False)
        middleware = Middleware(ServiceMiddleware, service=there, uploads=folder, endpoints=["caption", "raw"])
        _, url, _ = blocks.launch(
            prevent_thread_lock=True, quiet=True, share=False, app_kwargs={"middleware": [middleware]}
        )
        yield url.rstrip("/")
        blocks.close(verbose=False)


def fetch(url, body=None, headers=None):
    request = urllib.request.Request(url, body, headers or {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as err:
        return err.code, err.read()


def upload(url, data):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a b.png"\r\n\r\n' + data + b"\r\n--x--\r\n"
    return fetch(f"{url}/gradio_api/upload", form, {"Content-Type": "multipart/form-data; boundary=x"})


def test_before_gradio_an_upload_is_seen_and_a_file_of_the_server_is_not(page, tmp_path):
    status, body = upload(page, encode(gradient(), "PNG"))
    assert status == 200
    (path,) = json.loads(body)
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode(gradient(), "PNG"))
    for name in ("caption", "raw"):
        for url in (None, f"{page}/gradio_api/file={quote(path)}"):
            data = json.dumps({"data": [{"path": path, "meta": META, "url": url}]}).encode()
            status, body = fetch(f"{page}/gradio_api/run/{name}", data)
            assert status == 200, body
            assert json.loads(body)["data"] in (["seen"], [path])
        for attack in (
            {"path": str(secret)},
            {"path": str(secret), "meta": META},
            {"path": f"{page}/healthz", "meta": META},
        ):
            for route in (f"run/{name}", f"call/{name}", "queue/join"):
                body = {"data": [attack], "fn_index": 0, "session_hash": "x"}
                assert fetch(f"{page}/gradio_api/{route}", json.dumps(body).encode())[0] == 400
    assert fetch(f"{page}/gradio_api/file={quote(path)}")[0] == 200
    assert fetch(f"{page}/gradio_api/file={quote(str(secret))}")[0] == 404


def test_before_gradio_the_page_health_and_limits_are_there(page):
    status, body = fetch(page)
    assert status == 200
    assert b"gradio" in body
    assert re.findall(rb'(?:content|href|src)\s*=\s*"((?:https?:)?//[^"]*)"', body) == []
    assert preview.DESCRIPTION.encode() in body
    assert b"og:title" in body
    assert fetch(f"{page}/config")[0] == 200
    assert fetch(f"{page}/healthz")[0] == 200
    assert b"captioner_http_requests_total" in fetch(f"{page}/metrics")[1]
    assert upload(page, bytes(200_000))[0] == 413
