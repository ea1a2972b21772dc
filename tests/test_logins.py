"""Laws of the login: who sees which page, how often one may guess, and what does not count as a guess."""

import asyncio
import base64
import functools
import json
import re
from types import SimpleNamespace

import loops
import pytest

from captioner import logins
from captioner.asgi import ServiceMiddleware
from captioner.door import OpenDoor
from captioner.logins import Guesses

RIGHT, WRONG = b"username=me&password=secret", b"username=me&password=guess"


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


async def gradio(scope, receive, send):
    """Answers a login as Gradio does, and everything else with 200."""
    message = await receive()
    status = {WRONG: 400, b"": 422}.get(message.get("body", b""), 200) if scope["path"] == "/login" else 200
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"behind"})


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ask(tmp_path, clock, monkeypatch):
    """Send a request through a middleware whose users are one, "me"."""
    monkeypatch.setattr("captioner.logins.Guesses", functools.partial(Guesses, clock=clock))
    users = [("me", "secret")]
    known = "token=right".__eq__
    middleware = ServiceMiddleware(gradio, service=OpenDoor(), uploads=tmp_path, users=users, known=known)

    def ask(method, path, body=b"", *, address="192.0.2.1", inner=gradio, **headers):
        sent, bodies = [], [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return bodies.pop() if bodies else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "client": (address, 40000) if address else None,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        middleware.app = inner
        loops.run(asyncio.wait_for(middleware(scope, receive, send), 30))
        body = b"".join(message.get("body", b"") for message in sent)
        return SimpleNamespace(status=sent[0]["status"], headers=dict(sent[0]["headers"]), body=body)

    return ask


def key(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_who_has_not_logged_in_sees_a_page_that_asks_for_it_and_the_others_see_the_page(ask):
    for method in ("GET", "HEAD"):
        asked = ask(method, "/")
        assert asked.status == 200
        assert asked.headers[b"content-type"].startswith(b"text/html")
    page = ask("GET", "/", cookie="token=wrong").body.decode()
    assert 'name="password"' in page
    assert not re.search(r"https?:|url\(|@import|src=", page)  # it asks nobody else for anything
    assert ask("GET", "/", cookie="token=right").body == b"behind"
    assert ask("GET", "/healthz").status == 200
    assert ask("GET", "/config").body == b"behind"  # which is for Gradio to refuse


def test_after_too_many_wrong_passwords_the_next_is_not_looked_at_until_time_has_passed(ask, clock):
    for _ in range(logins.GUESSES):
        assert ask("POST", "/login", WRONG).status == 400
        clock.now_s += 1
    for body in (WRONG, RIGHT):
        refused = ask("POST", "/login", body)
        assert refused.status == 429
        assert json.loads(refused.body)["error"] == {
            "type": "TooManyGuesses",
            "message": "Too many wrong passwords; try again in 5 minutes.",
        }
        assert refused.headers[b"retry-after"] == str(round(logins.WINDOW_S) - logins.GUESSES).encode()
    clock.now_s += logins.WINDOW_S - logins.GUESSES - 1
    refused = ask("POST", "/login", RIGHT)
    assert (refused.status, refused.headers[b"retry-after"]) == (429, b"1")
    assert "try again in 1 s." in json.loads(refused.body)["error"]["message"]
    clock.now_s += 1
    assert ask("POST", "/login", RIGHT).status == 200


def test_each_address_has_its_own_guesses_and_a_network_of_one_customer_shares_them(ask):
    def use_up(address):
        for _ in range(logins.GUESSES):
            ask("POST", "/login", WRONG, address=address)

    use_up("192.0.2.1")
    assert ask("POST", "/login", RIGHT, address="192.0.2.1").status == 429
    assert ask("POST", "/login", RIGHT, address="::ffff:192.0.2.1").status == 429
    assert ask("POST", "/login", RIGHT, address="192.0.2.2").status == 200
    use_up("2001:db8::1")
    assert ask("POST", "/login", RIGHT, address="2001:db8::ffff:1").status == 429
    assert ask("POST", "/login", RIGHT, address="2001:db8:0:1::1").status == 200
    for address in (None, "fe80::1%eth0", "unix"):  # whatever a server says, guesses are counted
        use_up(address)
        assert ask("POST", "/login", RIGHT, address=address).status == 429


def test_right_passwords_and_what_is_no_login_are_no_guesses_and_take_none_back(ask):
    for _ in range(3 * logins.GUESSES):
        assert ask("POST", "/login", RIGHT).status == 200
        assert ask("POST", "/login", b"").status == 422
        assert ask("POST", "/login", WRONG, **{"content-length": "x"}).status == 400  # refused before it is read
    for _ in range(logins.GUESSES):
        assert ask("POST", "/login", WRONG).status == 400
        ask("POST", "/login/", RIGHT)
    assert ask("POST", "/login", RIGHT).status == 429


def test_many_guesses_at_once_are_no_way_around_the_limit(ask):
    refused = []

    async def slow(scope, receive, send):
        # While this one is not answered yet, the next one comes.
        answer = None
        if len(refused) < 2 * logins.GUESSES:
            refused.append(None)
            answer = await asyncio.to_thread(ask, "POST", "/login", WRONG, inner=slow)
            refused.append(answer.status)
        await gradio(scope, receive, send)

    ask("POST", "/login", WRONG, inner=slow)
    assert [status for status in refused if status].count(429) == 1
    assert [status for status in refused if status].count(400) == logins.GUESSES - 1


def test_keys_of_tools_are_guesses_too(ask):
    path = "/gradio_api/mcp/sse"
    for _ in range(2 * logins.GUESSES):
        assert ask("GET", path).status == 401  # none given
        assert ask("GET", path, authorization="Bearer x").status == 401
        assert ask("GET", path, authorization=key("me:secret")).status == 200
    for _ in range(logins.GUESSES):
        assert ask("GET", path, authorization=key("me:guess")).status == 401
    assert ask("GET", path, authorization=key("me:secret")).status == 429
    assert ask("POST", "/login", RIGHT).status == 429


def test_many_addresses_have_no_more_guesses_at_one_name_than_few(ask, clock):
    def guess(number, body=WRONG, **headers):
        return ask("POST", "/login", body, address=f"192.0.2.{number}", **headers)

    form = WRONG.replace(b"&", b"&x=1&")  # however it is sent
    parts = b'--x\r\nContent-Disposition: form-data; name="username"\r\n\r\n me \r\n--x--'
    bodies = (WRONG, form, parts)
    for number in range(logins.NAME_GUESSES):
        assert guess(number, bodies[number % 3], inner=wrong).status == 400
    assert guess(200, RIGHT).status == 429
    assert guess(200, b"username=you&password=guess").status == 200
    assert ask("GET", "/gradio_api/mcp/sse", address="192.0.2.201", authorization=key("me:secret")).status == 429
    clock.now_s += logins.WINDOW_S
    assert guess(200, RIGHT).status == 200


async def wrong(scope, receive, send):
    """Says that a password is wrong."""
    await receive()
    await send({"type": "http.response.start", "status": 400, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (b"username=me&password=x", "me"),
        (b"password=x&username=+%C3%A9+", "é"),
        (b'--x\r\nContent-Disposition: form-data; name="username"\r\n\r\nme\r\n--x--', "me"),
        (b"username=me&username=you", ""),
        (b'--x\r\nContent-Disposition: form-data; name="username"\r\nX: y\r\n\r\nme\r\n--x--', ""),
        (b"\xff\xfe", ""),
        (b"", ""),
    ],
)
def test_a_name_that_is_not_said_plainly_counts_as_that_of_all_such_logins(form, name):
    assert logins.user_of(form) == name


def test_addresses_that_are_remembered_are_bounded(clock, monkeypatch):
    monkeypatch.setattr(logins, "ADDRESSES_LIMIT", 3)
    guesses = Guesses(most=1, window_s=10, clock=clock)
    for number in range(5):
        assert guesses.enter(f"192.0.2.{number}") is None
    assert [guesses.enter(f"192.0.2.{number}") for number in (4, 3, 2)] == [10, 10, 10]
    assert len(guesses._times_s) == 3
    guesses.forgive("192.0.2.4")
    guesses.forgive("192.0.2.99")
    assert len(guesses._times_s) == 2


def test_without_users_nobody_is_asked_or_counted(tmp_path):
    middleware = ServiceMiddleware(gradio, service=OpenDoor(), uploads=tmp_path, known=lambda cookies: False)
    sent = []

    async def receive():
        return {"type": "http.request", "body": WRONG, "more_body": False}

    async def send(message):
        sent.append(message)

    for method, path in [("GET", "/")] + [("POST", "/login")] * (2 * logins.GUESSES):
        scope = {"type": "http", "method": method, "path": path, "headers": [], "client": ("192.0.2.1", 1)}
        loops.run(asyncio.wait_for(middleware(scope, receive, send), 30))
    assert {message["status"] for message in sent if "status" in message} == {200, 400}
