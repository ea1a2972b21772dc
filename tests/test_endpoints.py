"""Laws of the four endpoints: what a client gets is what the library says, as gradio_client, curl and tools ask."""

import base64
import contextlib
import http.client
import inspect
import io
import json
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from urllib.parse import urlsplit

import loops
import numpy as np
import pytest
from browser import free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, gradient
from PIL import Image
from pointing import PointingCaptioner
from served import API, HTTP, WAIT_S, ask, events, post, served, upload

from captioner import ConfigError, ImageReadError, SearchOptions
from captioner import endpoints as endpoints_module
from captioner.endpoints import MAX_NAME, NAMES, Endpoints, client_name
from captioner.errors import ServiceBusyError, ServiceTimeoutError
from captioner.page import MAX_PHRASES, MAX_SENTENCE
from captioner.requests import Callers
from captioner.service import Service, ServiceLimits

PNG = encode(gradient(), "PNG")
OTHER = encode(gradient().rotate(180), "PNG")
DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def url(tiny_captioner):
    limits = ServiceLimits(max_pixels=1_000_000, max_queue=8)
    with Service(tiny_captioner, limits=limits) as service, served(service, door=service) as url:
        yield url


@pytest.fixture(scope="module")
def photo(url):
    return {"path": upload(url, PNG, "my photo.png"), "orig_name": "my photo.png"}


@pytest.fixture
def endpoints(tmp_path):
    return Endpoints(PointingCaptioner(), uploads=tmp_path)


def same(record, wanted):
    """Compare records whose numbers may differ by the rounding of another batch."""
    if isinstance(wanted, dict):
        return record.keys() == wanted.keys() and all(same(record[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(record) == len(wanted) and all(map(same, record, wanted))
    return record == pytest.approx(wanted, rel=1e-4, abs=1e-5) if isinstance(wanted, float) else record == wanted


# --- What is answered ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 4, "n_best": 2, "min_words": 3},
        {"method": "greedy", "max_words": 5},
        {"method": "sample", "seed": 7, "temperature": 0.8, "top_k": 5},
        {"must_include": ["red ball"], "ban": ["grass"], "beam_size": 5},
    ],
)
def test_a_caption_is_the_librarys_record_with_the_name_that_its_owner_knows(url, photo, tiny_captioner, options):
    answer = ask(url, "caption", image=photo, **options)
    assert answer.kind == "complete"
    assert same(answer.value, [tiny_captioner.caption(PNG, **options).to_record("my photo.png")])


def test_a_batch_answers_in_order_and_names_what_failed(url, tiny_captioner):
    files = {"a.png": PNG, "b.txt": b"no picture", "c.png": OTHER}
    images = [{"path": upload(url, data, name), "orig_name": name} for name, data in files.items()]
    ((first, bad, last),) = ask(url, "caption_batch", images=images, n_best=2).value
    assert same(first, tiny_captioner.caption(PNG, n_best=2).to_record("a.png"))
    assert same(last, tiny_captioner.caption(OTHER, n_best=2).to_record("c.png"))
    assert (bad["image"], bad["caption"]) == ("b.txt", None)
    assert bad["error"]["type"] == "ImageReadError"
    assert bad["error"]["message"].startswith("b.txt: ")
    assert bad.keys() == first.keys()
    assert ask(url, "caption_batch", images=[]).value == [[]]


def test_a_score_is_the_librarys(url, photo, tiny_captioner):
    answer = ask(url, "score", image=photo, sentence="A dog runs.")
    assert same(answer.value, [tiny_captioner.score(PNG, "A dog runs.").to_record("my photo.png")])


@pytest.mark.parametrize("sentence", [None, "a man with the red ball"])
def test_an_explanation_has_the_map_of_every_word(url, photo, tiny_captioner, sentence):
    (answer,) = ask(url, "explain", image=photo, sentence=sentence).value
    wanted = tiny_captioner.caption(PNG) if sentence is None else tiny_captioner.score(PNG, sentence)
    assert same(answer["record"], wanted.to_record("my photo.png"))
    assert answer["grid_hw"] == list(wanted.geometry.grid_hw)
    assert answer["picture_hw_px"] == [40, 64]
    assert answer["figure"] is None
    assert [word["word"] for word in answer["words"]] == [word.text for word in wanted.words]
    for told, word in zip(answer["words"], wanted.words, strict=True):
        assert told["probability"] == pytest.approx(word.probability, rel=1e-4)
        np.testing.assert_allclose(told["attention"], word.attention, rtol=1e-3, atol=1e-5)
        assert np.sum(told["attention"]) == pytest.approx(1)


def test_an_explanation_draws_its_figure_when_asked(url, photo):
    (answer,) = ask(url, "explain", image=photo, figure=True).value
    head, _, data = answer["figure"].partition(",")
    assert head == "data:image/png;base64"
    assert min(Image.open(io.BytesIO(base64.b64decode(data))).size) > 100


class Drawing(PointingCaptioner):
    """Counts what is opened, and those who are asked for a caption."""

    def __init__(self):
        super().__init__()
        self.opened, self.asked = 0, 0

    def open(self, picture, **how):
        self.opened += 1
        return super().open(picture, **how)

    def caption(self, picture, **options):
        self.asked += 1
        return super().caption(picture, **options)


def test_no_more_figures_are_asked_for_at_a_time_than_are_let_in(tmp_path):
    model = Drawing()
    drawing = Endpoints(model, uploads=tmp_path)
    with contextlib.ExitStack() as others:
        for _ in range(endpoints_module.FIGURES):
            others.enter_context(drawing._figure(DATA))
        with pytest.raises(ServiceBusyError, match="try again"):
            drawing.explain(DATA, figure=True)
        assert model.asked == 0  # refused before anything was done for it
        assert drawing.explain(DATA)["figure"] is None
    assert drawing.explain(DATA, figure=True)["figure"]
    assert model.opened == 1  # within the model's limits, and in its turn


def test_a_figure_that_does_not_get_its_turn_in_time_is_given_up(endpoints, monkeypatch):
    monkeypatch.setattr(endpoints_module, "FIGURE_TIMEOUT_S", 0.01)
    assert endpoints_module._DRAWING.enter(0.0)
    try:
        with pytest.raises(ServiceTimeoutError, match="figure"):
            endpoints.explain(DATA, figure=True)
    finally:
        endpoints_module._DRAWING.leave()
    monkeypatch.undo()
    assert endpoints.explain(DATA, figure=True)["figure"]


def test_for_a_client_who_has_left_no_figure_is_drawn(endpoints):
    with Callers().waiting("call") as caller:
        caller.leave()
        with pytest.raises(CancelledError):
            endpoints.explain(DATA, figure=True)
    assert endpoints.explain(DATA, figure=True)["figure"]


def test_a_call_by_places_is_answered_too(url, photo, tiny_captioner):
    values = [photo, "beam", 2, *[None] * (len(SearchOptions().to_dict()) - 2)]
    answer = ask(url, "caption", route="call", data=values)
    assert same(answer.value, [tiny_captioner.caption(PNG, beam_size=2).to_record("my photo.png")])
    direct = post(url, "run/score", {"data": [photo, "a dog"]})
    assert same(direct.json()["data"], [tiny_captioner.score(PNG, "a dog").to_record("my photo.png")])


def test_the_python_client_gets_the_same(url, tiny_captioner, tmp_path):
    from gradio_client import Client, handle_file

    (tmp_path / "red.png").write_bytes(PNG)
    client = Client(url, verbose=False)
    picture = handle_file(str(tmp_path / "red.png"))
    record = client.predict(image=picture, beam_size=2, n_best=2, api_name="/caption")
    assert same(record, tiny_captioner.caption(PNG, beam_size=2, n_best=2).to_record("red.png"))
    (each, _) = client.predict([picture, picture], api_name="/caption_batch")
    assert same(each, tiny_captioner.caption(PNG).to_record("red.png"))
    assert client.predict(picture, "a dog", api_name="/score")["caption"] == "A dog."
    assert client.predict(picture, "a dog", api_name="/explain")["grid_hw"] == [2, 2]
    with pytest.raises(Exception, match="does not know 'zebra'"):
        client.predict(picture, "a zebra", api_name="/score")


@contextlib.contextmanager
def page_of(model):
    """Serve a page; yield it and its url."""
    import app

    page = app.build_app(model, examples=app.Examples(model, [], {}))
    try:
        yield page, app.start(page, host="127.0.0.1", port=free_port()).rstrip("/")
    finally:
        page.close(verbose=False)


def kept(page):
    """How much Gradio keeps of sessions and calls."""
    holder, queue = page.app.state_holder, page._queue
    tables = (holder.session_data, holder.time_last_used)
    return [*map(len, (*tables, queue.pending_event_ids_session, queue.pending_messages_per_session))]


def test_nothing_is_kept_of_calls_whose_answers_nobody_fetches(monkeypatch):
    monkeypatch.setattr("captioner.asgi.UNFETCHED_S", -ServiceLimits().timeout_s)
    with page_of(PointingCaptioner()) as (page, url):
        for _ in range(3):
            call = post(url, "call/v2/score", {"image": DATA, "sentence": "a dog"})
            until(lambda call=call: call.json()["event_id"] not in page._queue.event_ids_to_events)
            HTTP.get(f"{url}/healthz")  # whoever comes next
            assert kept(page) == [0, 0, 0, 0]


def test_nothing_is_kept_of_a_call_that_is_over():
    with page_of(PointingCaptioner()) as (page, url):
        for _ in range(5):
            assert ask(url, "score", image=DATA, sentence="a dog").kind == "complete"
    assert kept(page) == [0, 0, 0, 0]


# --- Who does not wait ---


class HeldCaptioner:
    """A model behind a door: what has come to it waits there, all else waits in the queue before it."""

    def __init__(self, captioner):
        self._captioner = captioner
        self.door, self.entered, self.batches = threading.Event(), threading.Event(), []

    def __getattr__(self, name):
        return getattr(self._captioner, name)

    def caption_batch(self, pictures, **options):
        self.batches.append(len(pictures))
        self.entered.set()
        assert self.door.wait(WAIT_S)
        return self._captioner.caption_batch(pictures, **options)

    def stream(self, picture, **options):
        self.batches.append("stream")
        return self._captioner.stream(picture, **options)


def until(condition):
    """Wait until it holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@contextlib.contextmanager
def asking(url, method, route, body=None, *, listen=False):
    """Send a request and do not wait for its answer, or for the beginning of it alone; at the end hang up."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request(method, f"{API}/{route}", body and json.dumps(body), {"Content-Type": "application/json"})
    if listen:
        assert connection.getresponse().status == 200
    yield
    connection.close()


def leave_call(url, waits):
    event = post(url, "call/v2/caption", {"image": DATA}).json()["event_id"]
    with asking(url, "GET", f"call/v2/caption/{event}", listen=True):
        waits(1)


def leave_direct_call(url, waits):
    with asking(url, "POST", "run/score", {"data": [DATA, "a dog"]}):
        waits(1)


def leave_batch(url, waits):
    event = post(url, "call/v2/caption_batch", {"images": [DATA] * 3}).json()["event_id"]
    with asking(url, "GET", f"call/v2/caption_batch/{event}"):
        waits(3)


def leave_page(url, waits):
    """Close a page on which a photo was just dropped."""
    first = HTTP.get(f"{url}/config").json()["dependencies"][0]
    values = [{"path": upload(url, PNG)}, *[None] * (len(first["inputs"]) - 1)]
    values[2:5] = ["beam", 3, 3]
    post(url, "queue/join", {"fn_index": first["id"], "data": values, "session_hash": "mine"})
    with asking(url, "GET", "queue/data?session_hash=mine", listen=True):
        waits(1)


def cancel(url, waits):
    event = post(url, "call/v2/caption", {"image": DATA}).json()["event_id"]
    waits(1)
    post(url, "cancel", {"event_id": event, "session_hash": event, "fn_index": 0})


@pytest.mark.parametrize("leave", [leave_call, leave_direct_call, leave_batch, leave_page, cancel])
def test_who_leaves_while_waiting_leaves_the_queue_and_nobody_else_does(tiny_captioner, caplog, capfd, leave):
    captioner = HeldCaptioner(tiny_captioner)
    with Service(captioner, limits=ServiceLimits(timeout_s=WAIT_S)) as service, served(service, door=service) as url:
        first = post(url, "call/v2/caption", {"image": DATA}).json()["event_id"]
        assert captioner.entered.wait(WAIT_S)
        stays = post(url, "call/v2/caption", {"image": DATA}).json()["event_id"]
        until(lambda: service.waiting == 1)
        leave(url, lambda count: until(lambda: service.waiting == 1 + count))
        until(lambda: service.waiting == 1)
        captioner.door.set()
        for event in (first, stays):
            assert events(HTTP.get(f"{url}{API}/call/v2/caption/{event}").text).kind == "complete"
        assert captioner.batches == [1, 1]
    assert caplog.text == ""
    assert "Traceback" not in capfd.readouterr().err


# --- What is refused ---


@pytest.mark.parametrize(
    ("endpoint", "values", "kind", "message"),
    [
        ("caption", {"beam_size": 0}, "ConfigError", "beam_size must be"),
        ("caption", {"beam_size": 11}, "ConfigError", "beam_size must be at most 10"),
        ("caption", {"n_best": 9}, "ConfigError", "n_best must not exceed beam_size"),
        ("caption", {"method": "magic"}, "ConfigError", "method must be"),
        ("caption", {"ban": ["a"] * (MAX_PHRASES + 1)}, "ConfigError", "ban must be at most"),
        ("caption", {"must_include": ["zebra"]}, "SearchError", "does not know 'zebra'"),
        ("caption_batch", {"beam_size": 0, "images": []}, "ConfigError", "beam_size must be"),
        ("score", {"sentence": "a zebra"}, "SearchError", "does not know 'zebra'"),
        ("score", {"sentence": ""}, "SearchError", "at least one word"),
        ("score", {"sentence": 7}, "SearchError", "must be a text"),
        ("score", {"sentence": "a " * MAX_SENTENCE}, "SearchError", "too long"),
        ("explain", {"sentence": "a dog", "n_best": 2}, "ConfigError", "leave out n_best"),
        ("explain", {"figure": "yes"}, "ConfigError", "figure must be"),
        ("caption", {"image": None}, "ImageReadError", "upload a file"),
        ("caption", {"image": {}}, "ImageReadError", "upload a file"),
        ("caption", {"image": "cat.jpg"}, "ImageReadError", "must begin with data:"),
        ("caption", {"image": "data:image/png;base64,***"}, "ImageReadError", "not valid base64"),
        ("caption", {"image": "data:image/png;base64,AAAA"}, "ImageReadError", "picture: "),
        ("caption_batch", {"images": "cat.jpg"}, "ConfigError", "images must be a list"),
        ("caption_batch", {"images": [DATA] * 9}, "ConfigError", "at most 8 pictures per request"),
    ],
    ids=str,
)
def test_a_fault_of_the_client_is_one_message_of_the_library(url, photo, endpoint, values, kind, message):
    picture = {} if endpoint == "caption_batch" else {"image": photo}
    answer = ask(url, endpoint, **{**picture, **values})
    assert answer.kind == "error"
    assert answer.value["title"] == kind
    assert message in answer.value["error"]
    assert "/" not in answer.value["error"].replace("image/jpeg", "")


def test_a_bad_picture_is_named_and_no_path_is_shown(url):
    large = encode(Image.new("1", (2000, 600)), "PNG")
    for data, kind in ((b"no picture", "ImageReadError"), (PNG[:60], "ImageReadError"), (large, "ImageTooLargeError")):
        for name in ("mine.png", "x" * 400 + ".png"):
            answer = ask(url, "caption", image={"path": upload(url, data, name[-200:]), "orig_name": name})
            assert answer.value["title"] == kind
            assert answer.value["error"].startswith(name[:MAX_NAME])
            assert "captioner-uploads" not in answer.value["error"]
    text = f"data:image/png;base64,{base64.b64encode(large).decode()}"
    assert ask(url, "caption", image=text).value["title"] == "ImageTooLargeError"


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("caption", {"picture": DATA}),
        ("caption", {}),
        ("caption", {"image": DATA, "beam": 3}),
        ("score", {"image": DATA}),
        ("nothing", {"image": DATA}),
    ],
    ids=str,
)
def test_a_call_with_other_names_is_told_so(url, endpoint, body):
    answer = post(url, f"call/v2/{endpoint}", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "BadRequest"


def test_a_call_with_other_values_is_told_so_and_not_repeated_in_the_log(url, capfd, caplog):
    for route, body, status in (
        ("run/score", {"data": [DATA]}, 400),
        ("call/caption", {"data": [1, 2, 3]}, 400),
        ("run/nothing", {"data": [DATA]}, 400),
        ("call/nothing", {"data": [DATA]}, 400),
        ("queue/join", {"fn_index": 999, "data": [DATA], "session_hash": "x"}, 400),
        ("run/score", {"data": [DATA, "a zebra"]}, 422),
        ("run/score", {"data": ["data:image/png;base64,AAAA", "a dog"]}, 422),
        ("run/caption", {"data": [DATA, "magic", *[None] * (len(SearchOptions().to_dict()) - 1)]}, 400),
    ):
        answer = post(url, route, body)
        assert answer.status_code == status, (route, answer.text)
        assert answer.json()["error"]
    assert post(url, "api/score", {"data": [DATA, "a dog"]}).status_code == 404
    said = capfd.readouterr()
    assert said.err + said.out + caplog.text == ""


def test_a_fault_of_ours_is_said_without_a_trace_and_logged(caplog):
    class Broken(PointingCaptioner):
        def caption(self, picture, **options):
            raise ZeroDivisionError("a secret of the server")

    with served(Broken()) as url:
        answer = ask(url, "caption", image={"path": upload(url, PNG)})
    assert answer.kind == "error"
    assert "secret" not in str(answer.value)
    assert "try again" in answer.value["error"]
    assert "a secret of the server" in caplog.text


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(SearchOptions().to_dict())), ANYTHING)
def test_whatever_an_option_is_it_is_taken_or_refused_in_words(name, value):
    endpoints = Endpoints(PointingCaptioner(), uploads=Path("/nowhere"))
    with contextlib.suppress(ConfigError):
        json.dumps(endpoints.caption(DATA, **{name: value}))


@settings(max_examples=200)
@given(ANYTHING)
def test_whatever_an_image_is_it_is_refused_in_words(value):
    endpoints = Endpoints(PointingCaptioner(), uploads=Path("/nowhere"))
    for given_path in (value, {"path": value}, {"path": "/nowhere/x", "orig_name": value}):
        with pytest.raises(ImageReadError):
            endpoints.caption(given_path)


@given(st.text() | st.integers() | st.none())
def test_a_name_is_one_line_of_valid_text_without_a_folder(given_name):
    name = client_name(given_name, "/uploads/ab/photo.png")
    assert 1 <= len(name) <= MAX_NAME
    assert name.isprintable()
    assert "/" not in name
    assert "\\" not in name
    name.encode()


# --- What is said of them ---


def test_every_parameter_has_a_type_and_a_line_of_help(endpoints):
    for name, function in endpoints.functions().items():
        parameters = inspect.signature(function).parameters
        assert function.__name__ == name
        assert all(name in function.__annotations__ for name in parameters)
        lines = [line.strip().partition(": ") for line in function.__doc__.splitlines()]
        assert {line[0] for line in lines if line[2]} >= set(parameters)
    assert tuple(endpoints.functions()) == NAMES


def test_all_search_options_are_parameters_where_there_is_a_search(endpoints):
    options = set(SearchOptions().to_dict())
    functions = endpoints.functions()
    for name in ("caption", "caption_batch", "explain"):
        assert options < set(inspect.signature(functions[name]).parameters)
    assert list(inspect.signature(functions["score"]).parameters) == ["image", "sentence"]


# --- Tools ---


def use_tools(url, *calls, headers=None):
    """Return the tools and what the calls answered."""
    mcp = pytest.importorskip("mcp", reason="mcp is not installed; it comes with pip install -e '.[mcp]'")
    from mcp.client.streamable_http import streamablehttp_client

    async def run():
        async with (
            streamablehttp_client(f"{url}{API}/mcp/", headers=headers) as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            return tools, [await session.call_tool(name, values) for name, values in calls]

    return loops.run(run())


def test_tools_are_the_endpoints_and_answer_in_json(tiny_captioner):
    pytest.importorskip("mcp", reason="mcp is not installed; it comes with pip install -e '.[mcp]'")
    with Service(tiny_captioner) as service, served(service, door=service, mcp=True) as url:
        tools, answers = use_tools(
            url,
            ("caption", {"image": DATA, "n_best": 2}),
            ("caption_batch", {"images": [DATA, "data:image/png;base64,AAAA"]}),
            ("explain", {"image": DATA, "sentence": "a dog"}),
            ("score", {"image": DATA, "sentence": "a zebra"}),
            ("score", {"image": "/etc/passwd", "sentence": "a dog"}),
        )
    assert {tool.name for tool in tools} == set(NAMES)
    for tool in tools:
        assert tool.description
        assert all(value["description"] for value in tool.inputSchema["properties"].values())
    caption, batch, explained = (json.loads(answer.content[0].text) for answer in answers[:3])
    assert same(caption, tiny_captioner.caption(PNG, n_best=2).to_record("picture"))
    assert [record["error"] is None for record in batch] == [True, False]
    assert [word["word"] for word in explained["words"]] == ["A", "dog"]
    assert [answer.isError for answer in answers] == [False, False, False, True, True]
    assert "does not know 'zebra'" in answers[3].content[0].text


def test_a_refused_call_of_a_tool_says_why_and_its_session_goes_on(tiny_captioner):
    with Service(tiny_captioner) as service, served(service, door=service, mcp=True) as url:
        _, answers = use_tools(
            url,
            ("caption", {"image": "https://example.com/x.jpg"}),
            ("caption", {"image": {"path": "/etc/passwd"}}),
            ("caption_batch", {"images": [DATA, "file:///etc/passwd"]}),
            ("score", {"image": DATA, "sentence": "note:/ a zebra"}),
            ("caption", {"image": DATA}),
        )
    assert [answer.isError for answer in answers] == [True, True, True, True, False]
    assert all("upload the picture" in answer.content[0].text for answer in answers[:3])
    assert "does not know" in answers[3].content[0].text  # of words, not of an address


def test_tools_have_neither_prompts_nor_resources():
    mcp = pytest.importorskip("mcp", reason="mcp is not installed; it comes with pip install -e '.[mcp]'")
    from mcp.client.streamable_http import streamablehttp_client

    async def run(url):
        async with (
            streamablehttp_client(f"{url}{API}/mcp/") as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            can = (await session.initialize()).capabilities
            with pytest.raises(mcp.McpError, match="Method not found"):
                await session.get_prompt("caption", {})
            with pytest.raises(mcp.McpError, match="Method not found"):
                await session.read_resource("file:///etc/passwd")
            await session.send_ping()
            return can

    with served(PointingCaptioner(), mcp=True) as url:
        can = loops.run(run(url))
    assert can.tools
    assert (can.prompts, can.resources) == (None, None)


def test_a_cancelled_call_of_a_tool_leaves_the_queue(tiny_captioner):
    pytest.importorskip("mcp", reason="mcp is not installed; it comes with pip install -e '.[mcp]'")
    captioner = HeldCaptioner(tiny_captioner)
    accept = {"Accept": "application/json, text/event-stream"}
    values = {"name": "caption", "arguments": {"image": DATA}}
    call = {"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": values}
    cancelled = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 5}}
    with (
        Service(captioner, limits=ServiceLimits(timeout_s=WAIT_S)) as service,
        served(service, door=service, mcp=True) as url,
    ):
        first = post(url, "call/v2/caption", {"image": DATA}).json()["event_id"]
        assert captioner.entered.wait(WAIT_S)
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(post(url, "mcp/", call, headers=accept)))
        waiting.start()
        until(lambda: service.waiting == 1)
        assert post(url, "mcp/", cancelled, headers=accept).status_code == 202
        until(lambda: service.waiting == 0)
        waiting.join(WAIT_S)
        captioner.door.set()
        assert events(HTTP.get(f"{url}{API}/call/v2/caption/{first}").text).kind == "complete"
    assert "has left" in answers[0].text
    assert captioner.batches == [1]


def test_behind_a_login_tools_need_user_and_password():
    pytest.importorskip("mcp", reason="mcp is not installed; it comes with pip install -e '.[mcp]'")
    call = ("score", {"image": DATA, "sentence": "a dog"})
    wrong = [None, "Basic", "Basic bWU6", "Basic " + base64.b64encode(b"me:wrong").decode(), "Bearer me:secret"]
    right = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    with served(PointingCaptioner(), mcp=True, users=[("me", "secret")]) as url:
        for given_header in wrong:
            headers = {} if given_header is None else {"Authorization": given_header}
            answer = post(url, "mcp/", message, headers={**headers, "Accept": "application/json, text/event-stream"})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Basic")
        _, (answer,) = use_tools(url, call, headers=right)
    assert json.loads(answer.content[0].text)["caption"] == "a dog"
