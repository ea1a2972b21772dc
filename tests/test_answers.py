"""Laws of answers: a status that says what happened, a sentence for every error, and nothing kept for nobody."""

import json

import pytest
from messages import END

from captioner.answers import FAULT, STATUS_OF, Unfetched
from captioner.asgi import ServiceMiddleware

pytest_plugins = ("asked",)


def failing(error, status=500):
    """An app that answers a direct call as Gradio does one that failed."""

    async def run(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        text = json.dumps(error).encode()
        await send({"type": "http.response.body", "body": text[:3], "more_body": True})
        await send({"type": "http.response.body", "body": text[3:]})

    return run


# --- Statuses ---


@pytest.mark.parametrize(("kind", "status"), [*STATUS_OF.items(), ("Error", 500), ("Cancelled", 500), (None, 500)])
def test_a_direct_call_that_failed_has_the_status_of_its_kind(ask, service, kind, status):
    answer = ask("POST", "/gradio_api/run/caption", {"data": []}, inner=failing({"error": "why", "title": kind}))
    assert answer.status == status
    assert json.loads(answer.body)["error"] == "why"
    assert (b"retry-after" in answer.headers) == (status == 503)
    assert service.telemetry.errors.value(kind=kind or "Error") == 1


@pytest.mark.parametrize("error", [{"error": None}, {}, [], "x" * 100_000])
def test_an_error_of_gradios_own_gets_a_sentence(ask, error):
    answer = ask("POST", "/gradio_api/run/caption", {"data": []}, inner=failing(error))
    assert answer.status == 500
    assert json.loads(answer.body)["error"]


def test_a_direct_call_that_succeeds_passes_as_it_is(ask):
    answer = ask("POST", "/gradio_api/run/caption", {"data": []}, inner=failing({"data": [None]}, status=200))
    assert (answer.status, json.loads(answer.body)) == (200, {"data": [None]})


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (b'event: error\ndata: {"error": null}\n\n', {"error": FAULT, "title": "Error"}),
        (b"event: error\ndata: null\n\n", {"error": FAULT, "title": "Error"}),
        (b'event: error\ndata: {"error": "why", "title": "X"}\n\n', {"error": "why", "title": "X"}),
        (b'event: complete\ndata: [{"error": null}]\n\n', [{"error": None}]),
        (b"event: heartbeat\ndata: null\n\n", None),
    ],
)
def test_an_event_of_an_error_has_a_sentence_and_all_others_pass(ask, event, said):
    async def telling(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await send(END)

    told = ask("GET", "/gradio_api/call/caption/abc", inner=telling).body
    assert told.splitlines()[0] == event.splitlines()[0]
    assert json.loads(told.splitlines()[1].removeprefix(b"data: ")) == said


@pytest.fixture
def table(ask):
    ask.middleware.calls = {"caption": 2, 0: 3}
    return ask


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("run/caption", {"data": [1, 2]}, 200),
        ("call/caption", {"data": [1, 2]}, 200),
        ("call/v2/caption", {"image": 1}, 200),
        ("queue/join", {"fn_index": 0, "data": [1, 2, 3]}, 200),
        ("run/caption", {"data": [1]}, 400),
        ("run/caption", {"data": [1, 2, 3]}, 400),
        ("call/caption", {"data": "ab"}, 400),
        ("call/caption", {}, 400),
        ("call/caption", [1, 2], 400),
        ("call/caption", {"data": [1, 2, 3], "fn_index": 0}, 400),
        ("call/nothing", {"data": [1, 2]}, 400),
        ("run/nothing", {"data": [1, 2]}, 400),
        ("call/v2/nothing", {"image": 1}, 400),
        ("call", {"data": [1, 2]}, 400),
        ("queue/join", {"fn_index": 999, "data": []}, 400),
        ("queue/join", {"fn_index": False, "data": [1, 2, 3]}, 400),
        ("queue/join", {"fn_index": [0], "data": [1, 2, 3]}, 400),
        ("queue/join", {"data": [1, 2, 3]}, 400),
        ("api/caption", {"data": [1, 2]}, 404),
    ],
    ids=str,
)
def test_a_call_of_what_is_there_with_as_many_values_is_let_through_and_no_other(table, app, route, body, status):
    assert table("POST", f"/gradio_api/{route}", body).status == status
    assert len(app.bodies) == (status == 200)


@pytest.mark.parametrize("kind", ["KeyError", "TypeError", "FnIndexInferError"])
@pytest.mark.parametrize("route", ["run/caption", "call/caption", "call/v2/caption", "queue/join"])
def test_gradios_faults_of_a_call_that_is_not_there_are_faults_of_the_client(ask, kind, route):
    async def lost(scope, receive, send):
        raise type(kind, (Exception,), {})("caption")

    answer = ask("POST", f"/gradio_api/{route}", {"data": []}, inner=lost)
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["type"] == "BadRequest"


def test_faults_behind_are_counted_as_such(ask, service):
    async def lost(scope, receive, send):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask("GET", "/", inner=lost)
    assert service.telemetry.http_requests.value(endpoint="/", status=500) == 1
    assert service.telemetry.errors.value(kind="Other") == 1


# --- What nobody fetches ---


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_an_answer_that_is_not_fetched_in_time_is_given_up():
    clock, given_up = Clock(), []
    unfetched = Unfetched(lambda *names: given_up.append(names), kept_s=10, clock=clock)
    unfetched.note("one", None)
    clock.now_s = 5
    unfetched.note("two", "a page")
    clock.now_s = 10
    unfetched.sweep()
    assert given_up == [("one", "one")]
    clock.now_s = 15
    unfetched.sweep()
    assert given_up == [("one", "one"), ("a page", "two")]
    assert len(unfetched) == 0


def test_answers_that_are_kept_are_bounded_and_the_oldest_goes_first():
    given_up = []
    unfetched = Unfetched(lambda session, call: given_up.append(call), kept_s=10, most=3, clock=Clock())
    for number in range(5):
        unfetched.note(str(number), None)
    assert given_up == ["0", "1"]
    assert len(unfetched) == 3


def test_what_is_being_fetched_is_not_given_up():
    clock, given_up = Clock(), []
    unfetched = Unfetched(lambda *names: given_up.append(names), kept_s=10, clock=clock)
    for call, session in (("one", None), ("two", "page"), ("three", "page"), ("four", "other page")):
        unfetched.note(call, session)
    with unfetched.listening("one"), unfetched.listening("page"):
        unfetched.note("five", "page")
        clock.now_s = 10
        unfetched.sweep()
    assert given_up == [("other page", "four")]
    unfetched.note("six", "page")
    assert len(unfetched) == 1


@pytest.mark.parametrize("route", ["call/caption", "call/v2/caption", "queue/join"])
def test_every_call_is_noted_until_its_answer_is_fetched(app, service, uploads, ask, route):
    given_up = []
    middleware = ServiceMiddleware(app, service=service, uploads=uploads, give_up=lambda *names: given_up.append(names))
    middleware.unfetched._most = 1
    ask.middleware.unfetched = middleware.unfetched

    def named(name):
        async def run(scope, receive, send):
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps({"event_id": name}).encode()})

        return run

    ask("POST", f"/gradio_api/{route}", {"data": [], "session_hash": "page"}, inner=named("one"))
    ask("POST", f"/gradio_api/{route}", {"data": []}, inner=named("two"))
    assert given_up == [("page", "one")]
    ask("GET", "/gradio_api/call/caption/two", inner=named(""))
    ask("POST", f"/gradio_api/{route}", {"data": []}, inner=named("three"))
    assert given_up == [("page", "one")]


# --- Progress of uploads ---


@pytest.mark.parametrize("parts", [[b"Upload not found"], [b"Upload ", b"not found"]])
def test_an_upload_that_nobody_knows_is_said_to_be_done(ask, parts):
    """A browser would write a 404 into its console; Gradio's page asks for uploads that are over, or have no name."""

    async def unknown(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": part is not parts[-1]})

    answer = ask("GET", "/gradio_api/upload_progress", inner=unknown)
    assert answer.status == 200
    assert answer.headers[b"content-type"] == b"text/event-stream"
    assert json.loads(answer.body.removeprefix(b"data: ")) == {"msg": "done"}


def test_the_progress_of_an_upload_passes_as_it_is(ask):
    async def known(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n\n"})

    assert ask("GET", "/gradio_api/upload_progress", inner=known).body == b"data: 1\n\n"
