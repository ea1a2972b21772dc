"""The page without a browser: what it is built of, and what its functions answer."""

import base64
import io
import socket
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import gradio as gr
import pytest
from gradio.state_holder import SessionState
from PIL import Image
from pointing import CELLS, PointingCaptioner

import app
from captioner import Captioner, SearchOptions
from captioner.page import read
from captioner.page.examples import THUMBNAIL_SIDE_PX
from captioner.requests import CALLER, Runs

CAPTIONER = PointingCaptioner()
WAIT_S = 60
VALUES = {**dict.fromkeys(name for row in app.OPTION_ROWS for name in row), **app.OPTION_VALUES}


def upload(**options):
    """A photo where Gradio keeps what was uploaded."""
    folder = app.UPLOADS / "ab12"
    folder.mkdir(exist_ok=True)
    return photo(folder, **options)


def photo(folder, size_wh_px=(30, 20), *, name="photo.jpg"):
    path = folder / name
    Image.radial_gradient("L").resize(size_wh_px).convert("RGB").save(path, "JPEG")
    return str(path)


def fields(**values):
    return list({**VALUES, **values}.values())


def staged(path):
    """What a page keeps that shows a photo."""
    return Runs((path, "mine.jpg", 1))


def functions(page):
    return {block.fn.__name__: block.fn for block in page.fns.values() if block.fn is not None}


def drawn(page, name):
    blocks = [block for block in page.blocks.values() if isinstance(block, gr.HTML)]
    return next(block for block in blocks if block.html_template == read(f"{name}.html"))


@pytest.fixture
def page(tmp_path, monkeypatch):
    photo(tmp_path, (60, 40), name="a_red-dog.jpg")
    monkeypatch.setattr(app, "EXAMPLES", tmp_path)
    return app.build_app(CAPTIONER)


def test_an_upload_is_captioned_and_the_box_is_free_for_the_next(page):
    path, runs = upload(), Runs()
    answers = list(functions(page)["caption_upload"]({"path": path, "orig_name": "mine.jpg"}, runs, *fields(n_best=2)))
    box, stage, _ = answers[0]
    assert box is None
    assert runs.shown == (path, "mine.jpg", stage["run"])
    assert len(answers[-1][1]["captions"]) == 2
    # Later answers must not touch what a newer photo may have put there.
    assert all(answer[0] == gr.skip() for answer in answers[1:])
    assert str(app.UPLOADS) not in str(answers)


@pytest.mark.parametrize("given", ["/etc/passwd", {}, {"path": "/etc/passwd"}, {"path": None}, {"path": 3}, [], 7])
def test_what_was_not_uploaded_is_refused_even_without_a_door_before_the_page(page, given):
    runs = Runs()
    ((box, stage, _),) = functions(page)["caption_upload"](given, runs, *fields())
    assert (box, runs.shown) == (None, None)
    assert stage["error"] == "This is not an uploaded photo."


def test_every_page_has_a_stage_of_its_own(page, tmp_path):
    (state,) = [block for block in page.blocks.values() if isinstance(block, gr.State)]
    mine, other = (SessionState(page)[state._id] for _ in range(2))
    list(functions(page)["caption_example"](gr.EventData(None, {"index": 0}), mine, *fields()))
    assert mine.shown is not None
    assert other.shown is None


def test_a_photo_that_takes_long_to_open_does_not_take_the_stage_from_a_later_one(page, monkeypatch):
    opening, opened = threading.Event(), threading.Event()

    def tell(model, path, name, options, *, run):
        if name == "slow.jpg":
            opening.set()
            assert opened.wait(WAIT_S)
        yield {"run": run, "phase": "looking"}

    monkeypatch.setattr(app, "tell", tell)
    caption, path, runs = functions(page)["caption_upload"], upload(), Runs()
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(lambda: list(caption({"path": path, "orig_name": "slow.jpg"}, runs, *fields())))
        assert opening.wait(WAIT_S)
        ((_, stage, _),) = caption({"path": path, "orig_name": "later.jpg"}, runs, *fields())
        opened.set()
        assert slow.result(WAIT_S) == [(None, gr.skip(), gr.skip())]
    assert runs.shown == (path, "later.jpg", stage["run"])


def test_of_an_older_photo_nothing_is_searched_for_or_waited_for_when_a_later_one_comes(tmp_path, monkeypatch):
    class Full(PointingCaptioner):
        def caption(self, picture, **options):
            if picture.endswith("slow.jpg"):
                answer = Future()  # as one that waits for its turn in a service
                CALLER.get().wait_for(answer)
                answers.append(answer)
                waiting.set()
                return answer.result(WAIT_S)
            return super().caption(picture, **options)

    monkeypatch.setattr(app, "EXAMPLES", tmp_path / "absent")
    waiting, answers, runs = threading.Event(), [], Runs()
    caption = functions(app.build_app(Full()))["caption_upload"]
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(lambda: list(caption({"path": upload(name="slow.jpg")}, runs, *fields())))
        assert waiting.wait(WAIT_S)
        *_, (_, stage, _) = caption({"path": upload()}, runs, *fields())
        assert stage["phase"] == "done"
        assert slow.result(WAIT_S)[-1] == (gr.skip(),) * 3
    assert [answer.cancelled() for answer in answers] == [True]

    reading = caption({"path": upload()}, runs, *fields())
    assert next(reading)[1]["phase"] == "looking"
    assert list(caption({"path": upload()}, runs, *fields()))
    assert list(reading) == [(gr.skip(),) * 3]


def test_clearing_the_box_changes_nothing(page):
    (answers,) = functions(page)["caption_upload"](None, Runs(), *fields())
    assert answers == (gr.skip(),) * 3


def test_captioning_again_uses_the_photo_on_the_stage(page, tmp_path):
    again = functions(page)["caption_shown"]
    *_, (stage, _) = again(staged(photo(tmp_path)), *fields())
    assert stage["captions"][0]["score"] == -1.5
    ((stage, _),) = again(Runs(), *fields())
    assert "photo" in stage["error"]


def test_impossible_options_are_refused_at_once_and_what_is_shown_is_kept(page, tmp_path):
    ((stage, _),) = functions(page)["caption_shown"](staged(photo(tmp_path)), *fields(n_best=9))
    assert "n_best must not exceed beam_size" in stage["error"]
    assert stage["keep"]


def test_beside_an_error_nothing_stays_of_another_photo(page):
    for answers in (
        functions(page)["caption_upload"]({"path": upload(), "orig_name": "mine.jpg"}, Runs(), *fields(n_best=9)),
        functions(page)["caption_example"](gr.EventData(None, {"index": 0}), Runs(), *fields(n_best=9)),
    ):
        ((*_, stage, compared),) = answers
        assert not stage["keep"]
        assert compared["models"] is None


def test_an_example_is_chosen_by_its_place_and_no_path_is_taken_from_outside(page):
    choose = functions(page)["caption_example"]
    runs = Runs()
    answers = list(choose(gr.EventData(None, {"index": 0}), runs, *fields()))
    assert runs.shown[1] == "a_red-dog.jpg"
    assert len(answers[-1][0]["captions"][0]["words"]) == len(CELLS)
    hostile = [{"index": index} for index in (1, -1, 0.0, True, "0", "/etc/passwd", None, [0], {})]
    for data in (*hostile, {}, None, [], "index"):
        runs = Runs()
        ((stage, _),) = choose(gr.EventData(None, data), runs, *fields())
        assert runs.shown is None
        assert stage["error"] == "There is no such example."


def test_an_example_is_captioned_once_with_the_usual_options_and_every_time_with_others(tmp_path, monkeypatch):
    class Counting(PointingCaptioner):
        calls = 0

        def caption(self, picture, **options):
            self.calls += 1
            return super().caption(picture, **options)

    photo(tmp_path)
    monkeypatch.setattr(app, "EXAMPLES", tmp_path)
    model = Counting()
    examples = app.find_examples(model)
    examples.get_ready()
    usual = app.search_options(app.OPTION_VALUES)
    ready = [list(examples.tell(0, usual, run=run)) for run in (5, 6)]
    assert [[message["run"] for message in messages] for messages in ready] == [[5], [6]]
    assert model.calls == 1
    for _ in range(2):
        assert len(list(examples.tell(0, {"n_best": 1}, run=7))[-1]["captions"]) == 1
    assert model.calls == 3


def test_an_own_sentence_is_scored_for_the_photo_on_the_stage(page, tmp_path):
    score = functions(page)["score_own"]
    answer = score(staged(photo(tmp_path)), gr.EventData(None, {"sentence": "a dog"}))
    assert answer["run"] == 1
    assert answer["scored"]["text"] == "a dog"
    assert "photo" in score(Runs(), gr.EventData(None, {"sentence": "a dog"}))["error"]
    assert "scored" in score(staged(photo(tmp_path)), gr.EventData(None, {}))


def test_other_models_are_captioned_after_the_pages_own_and_hidden_when_there_are_none(page, tmp_path):
    assert not drawn(page, "compare").visible
    both = app.build_app(CAPTIONER, others={"other": CAPTIONER}, name="own")
    assert drawn(both, "compare").visible
    *_, (_, compared) = functions(both)["caption_shown"](staged(photo(tmp_path)), *fields())
    assert [column["name"] for column in compared["models"]] == ["own", "other"]
    *_, (stage, compared) = functions(page)["caption_shown"](staged(photo(tmp_path)), *fields())
    assert stage["phase"] == "done"
    assert compared == gr.skip()


def test_examples_are_shown_small_and_under_a_readable_name(page):
    strip = drawn(page, "strip")
    (example,) = strip.value
    assert example["name"] == "a red dog"
    small = Image.open(io.BytesIO(base64.b64decode(example["picture"].partition(",")[2])))
    assert max(small.size) <= THUMBNAIL_SIDE_PX
    assert strip.visible


def test_the_page_is_built_without_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "EXAMPLES", tmp_path / "absent")
    assert not drawn(app.build_app(CAPTIONER), "strip").visible


def test_every_search_option_has_a_field_with_help(page):
    assert set(VALUES) == set(SearchOptions().to_dict())
    labels = {name.replace("_", " ").capitalize() for name in VALUES}
    shown = {block.label: block for block in page.blocks.values() if getattr(block, "label", None) in labels}
    assert set(shown) == labels
    assert all(block.info for block in shown.values())


def test_the_public_interface_is_exactly_the_four_endpoints(page):
    public = {block.api_name for block in page.fns.values() if block.api_visibility != "private"}
    assert public == {"caption", "caption_batch", "score", "explain"}
    assert set(page.get_api_info()["named_endpoints"]) == {f"/{name}" for name in public}
    assert page.get_api_info()["unnamed_endpoints"] == {}


def test_the_page_takes_photos_from_this_machine_only(page):
    (photo_box,) = [block for block in page.blocks.values() if isinstance(block, gr.Image)]
    assert set(photo_box.sources) == {"upload", "webcam", "clipboard"}


def test_gradio_reports_nothing_to_anyone(page):
    assert not page.analytics_enabled


@pytest.mark.parametrize("fault", ["model", "port"])
def test_a_start_that_fails_says_why_in_one_line(tmp_path, monkeypatch, capsys, fault):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        value = {"model": str(tmp_path / "absent"), "port": str(taken.getsockname()[1])}[fault]
        monkeypatch.setattr(sys, "argv", ["app.py", f"--{fault}", value])
        if fault == "port":
            monkeypatch.setattr(Captioner, "load", lambda source, **how: CAPTIONER)
        with pytest.raises(SystemExit) as stopped:
            app.main()
    assert stopped.value.code == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1", "80.5", "", "9" * 400, "٣"])
@pytest.mark.parametrize("given", ["argument", "variable"])
def test_an_impossible_port_is_one_line_and_status_2(monkeypatch, capsys, port, given):
    monkeypatch.setattr(sys, "argv", ["app.py", f"--port={port}"] if given == "argument" else ["app.py"])
    if given == "variable":
        monkeypatch.setenv("GRADIO_SERVER_PORT", port)
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --port (or GRADIO_SERVER_PORT) must be a whole number")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "a b", "x" * 300])
def test_an_impossible_host_is_one_line(monkeypatch, capsys, host):
    monkeypatch.setattr(sys, "argv", ["app.py", "--host", host])
    monkeypatch.setattr(Captioner, "load", lambda source, **how: CAPTIONER)
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
