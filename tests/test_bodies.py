"""Laws of bodies: no client keeps the others waiting, by size, by slowness, or by what is to be checked."""

import asyncio
import base64
import json
import threading

import loops
import pytest
from messages import EchoApp, call, door

from captioner import bodies, payloads
from captioner.asgi import ServiceMiddleware
from captioner.exchange import Refusal
from captioner.service import ServiceLimits

pytest_plugins = ("asked",)


def test_a_body_that_trickles_is_given_up_however_often_a_part_comes(ask, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)

    async def run(path):
        sent = []

        async def trickle():
            await asyncio.sleep(0.001)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        await asyncio.wait_for(ask.middleware(scope, trickle, send), 30)
        return sent[0]["status"]

    assert loops.run(run("/gradio_api/call/caption")) == 408
    assert loops.run(run("/gradio_api/upload")) == 408


def test_an_address_holds_half_of_the_memory_for_bodies_and_leaves_the_rest_to_others():
    buffers = bodies.Buffers(1)
    buffers.most_bytes = 100
    buffers.take("one", 50)
    with pytest.raises(Refusal) as refused:
        buffers.take("one", 1)
    assert (refused.value.status, refused.value.retry_after_s) == (503, bodies.RETRY_S)
    buffers.give_back("one", 1)
    buffers.take("other", 50)
    with pytest.raises(Refusal):
        buffers.take("third", 1)
    for address, count in (("one", 50), ("other", 50), ("third", 1)):
        buffers.give_back(address, count)
    assert buffers.held_bytes == {}


def test_the_largest_body_of_a_tool_always_fits():
    large = bodies.BUFFER_LIMIT
    assert bodies.Buffers(large).most_bytes // 2 == large


@pytest.mark.parametrize("route", ["call/caption", "queue/join", "upload", "cancel", "reset"])
def test_nothing_is_read_of_what_a_stranger_sends(tmp_path, route):
    app = EchoApp()
    guarded = ServiceMiddleware(
        app, service=door(ServiceLimits()), uploads=tmp_path, users=[("me", "secret")], known="token=right".__eq__
    )

    def status(**headers):
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            assert headers, "read before the login"
            return {"type": "http.request", "body": b"{}", "more_body": False}

        given = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": f"/gradio_api/{route}", "headers": given}
        loops.run(asyncio.wait_for(guarded(scope, receive, send), 30))
        assert b"www-authenticate" not in dict(sent[0]["headers"])  # else a browser would open a window of its own
        return sent[0]["status"]

    assert status() == 401
    assert app.bodies == []
    assert status(cookie="token=right") == 200


# --- What is checked ---


def many(uploads, count):
    for number in range(count):
        (uploads / f"{number}.png").touch()
    return [{"path": f"{uploads}/{number}.png"} for number in range(count)]


def test_a_body_names_as_many_files_as_a_batch_may_have_and_no_more(ask, app, uploads):
    files = many(uploads, payloads.FILES_LIMIT + 1)
    assert ask(*call(files[:-1])).status == 200
    answer = ask(*call(files))
    assert answer.status == 400
    assert "files" in json.loads(answer.body)["error"]["message"]


def test_a_path_is_looked_at_once_however_often_it_is_named(uploads, monkeypatch):
    looked = []
    monkeypatch.setattr(payloads, "is_upload", lambda path, folder: not looked.append(path))
    payloads.check([{"path": "/x"}] * 1000, uploads=uploads)
    assert looked == ["/x"]


def test_a_list_without_end_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(payloads.json, "loads", lambda *values, **named: pytest.fail("it was read"))
    with pytest.raises(payloads.RefusedPayloadError, match="too many values"):
        payloads.parse(b"[" + b"0," * 3 * payloads.NODES_LIMIT + b"0]")


def test_a_large_body_is_looked_at_in_another_thread_and_a_small_one_at_once(ask, monkeypatch):
    threads = []

    def parse(body):
        threads.append(threading.current_thread())
        return json.loads(body)

    monkeypatch.setattr(payloads, "parse", parse)

    async def loop_thread():
        return threading.current_thread()

    picture = "data:image/png;base64," + base64.b64encode(bytes(100_000)).decode()
    seen = []

    async def noting(scope, receive, send):
        seen.append(threading.current_thread())

    for value in ("small", picture):
        ask(*call(value), inner=noting)
    assert [parsed is loop for parsed, loop in zip(threads, seen, strict=True)] == [True, False]
