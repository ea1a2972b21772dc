"""The page without a browser: what it is built of, and what its functions answer."""

import base64
import io
import json
import socket
import sys
from pathlib import Path

import gradio as gr
import matplotlib
import numpy as np
import pytest
from PIL import Image
from pointing import CELLS, GRID_HW, PointingCaptioner

import app
from captioner.overlay import COLOUR_MAP

CAPTIONER = PointingCaptioner()


def photo(folder, size_wh_px, *, name="photo.jpg", orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / name
    Image.radial_gradient("L").resize(size_wh_px).convert("RGB").save(path, "JPEG", exif=exif)
    return str(path)


def describe(path, name="photo.jpg", beam_size=3, n_best=3):
    return app.describe(CAPTIONER, path, name, beam_size=beam_size, n_best=n_best)


def decoded(data_uri):
    head, _, data = data_uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def functions(page):
    return {block.fn.__name__: block.fn for block in page.fns.values()}


def strip_of(page):
    drawn = [block for block in page.blocks.values() if isinstance(block, gr.HTML)]
    return next(block for block in drawn if block.html_template == app.STRIP_HTML)


@pytest.fixture
def page(tmp_path, monkeypatch):
    photo(tmp_path, (60, 40), name="a_red-dog.jpg")
    monkeypatch.setattr(app, "EXAMPLES", tmp_path)
    return app.build_app(CAPTIONER)


def test_what_is_sent_is_plain_json(tmp_path):
    value = describe(photo(tmp_path, (300, 200)))
    assert json.loads(json.dumps(value)) == value


def test_every_map_is_sent_with_its_peak_at_one_in_its_own_cell(tmp_path):
    for word in describe(photo(tmp_path, (300, 200)))["words"]:
        weights = np.array(word["map"])
        assert weights.shape == GRID_HW
        assert weights.min() >= 0
        assert weights.max() == 1
        assert np.unravel_index(weights.argmax(), GRID_HW) == CELLS[word["text"]]


def test_captions_are_sent_best_first_with_their_scores(tmp_path):
    captions = describe(photo(tmp_path, (30, 20)), beam_size=4, n_best=4)["captions"]
    assert [caption["score"] for caption in captions] == [-1.5, -2.5, -3.5, -4.5]


@pytest.mark.parametrize(("orientation", "upright_wh_px"), [(1, (3000, 1000)), (6, (1000, 3000))])
def test_the_picture_is_sent_upright_small_and_with_its_own_size(tmp_path, orientation, upright_wh_px):
    value = describe(photo(tmp_path, (3000, 1000), orientation=orientation))
    assert (value["width"], value["height"]) == upright_wh_px
    picture = decoded(value["picture"])
    assert max(picture.size) == app.DISPLAY_SIDE_PX
    assert picture.width / picture.height == pytest.approx(value["width"] / value["height"], rel=0.01)
    assert len(picture.getexif()) == 0


def test_a_small_picture_is_not_enlarged_on_the_way(tmp_path):
    assert decoded(describe(photo(tmp_path, (31, 17)))["picture"]).size == (31, 17)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\xff\xd8\xff\xe0 cut off", b"<svg></svg>"])
def test_a_bad_file_gives_one_line_with_the_users_name_for_it_and_no_path(tmp_path, content):
    path = tmp_path / "upload.bin"
    path.write_bytes(content)
    value = describe(str(path), name="holiday.jpg")
    assert list(value) == ["error"]
    assert value["error"].startswith("holiday.jpg: ")
    assert "\n" not in value["error"]
    assert str(tmp_path) not in value["error"]


def test_a_photo_that_is_gone_gives_an_error_without_its_path(tmp_path):
    value = describe(str(tmp_path / "gone.jpg"), name="holiday.jpg")
    assert "no such file" in value["error"]
    assert str(tmp_path) not in value["error"]


def test_an_error_of_the_model_about_the_file_shows_no_path(tmp_path):
    class Forgetful(PointingCaptioner):
        def caption(self, picture, **options):
            return super().caption(str(picture) + ".lost", **options)

    value = app.describe(Forgetful(), photo(tmp_path, (30, 20)), "holiday.jpg", beam_size=3, n_best=1)
    assert str(tmp_path) not in value["error"]


@pytest.mark.parametrize(
    ("beam_size", "n_best", "thing"),
    [
        (2, 3, "n_best"),
        (0, 1, "beam_size"),
        (10**9, 1, "beam_size"),
        ("many", 1, "beam_size"),
        (3, None, "n_best"),
    ],
)
def test_impossible_options_are_refused_in_words(tmp_path, beam_size, n_best, thing):
    value = describe(photo(tmp_path, (30, 20)), beam_size=beam_size, n_best=n_best)
    assert list(value) == ["error"]
    assert thing in value["error"]


def test_an_upload_is_captioned_and_the_box_is_free_for_the_next(page, tmp_path):
    path = photo(tmp_path, (30, 20))
    upload = {"path": path, "orig_name": "mine.jpg"}
    box, shown, stage = functions(page)["caption_upload"](upload, 3, 2)
    assert box is None
    assert shown == (path, "mine.jpg")
    assert len(stage["captions"]) == 2


def test_clearing_the_box_changes_nothing(page):
    answers = functions(page)["caption_upload"](None, 3, 2)
    assert answers == tuple(gr.skip() for _ in answers)


def test_captioning_again_uses_the_photo_on_the_stage(page, tmp_path):
    again = functions(page)["caption_shown"]
    assert again((photo(tmp_path, (30, 20)), "mine.jpg"), 3, 1)["captions"][0]["score"] == -1.5
    assert "photo" in again(None, 3, 1)["error"]


def test_an_example_is_chosen_by_its_place_and_no_path_is_taken_from_outside(page):
    choose = functions(page)["caption_example"]
    (_, name), stage = choose(3, 1, gr.EventData(None, {"index": 0}))
    assert name == "a_red-dog.jpg"
    assert len(stage["words"]) == len(CELLS)
    for index in (1, "/etc/passwd", None):
        with pytest.raises((IndexError, TypeError)):
            choose(3, 1, gr.EventData(None, {"index": index}))


def test_examples_are_shown_small_and_under_a_readable_name(page):
    strip = strip_of(page)
    (example,) = strip.value
    assert example["name"] == "a red dog"
    assert max(decoded(example["picture"]).size) <= app.THUMBNAIL_SIDE_PX
    assert strip.visible


def test_the_page_is_built_without_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "EXAMPLES", tmp_path / "absent")
    page = app.build_app(CAPTIONER)
    strip = strip_of(page)
    assert not strip.visible


def test_no_function_of_the_page_is_part_of_a_public_interface_yet(page):
    assert {block.api_visibility for block in page.fns.values()} == {"private"}


def test_the_page_takes_photos_from_this_machine_only(page):
    (photo_box,) = [block for block in page.blocks.values() if isinstance(block, gr.Image)]
    assert set(photo_box.sources) == {"upload", "webcam", "clipboard"}


@pytest.mark.parametrize("name", [name for name in vars(app) if name.startswith(("STAGE_", "STRIP_"))])
def test_templates_hold_nothing_that_gradio_would_evaluate(name):
    text = getattr(app, name)
    if not name.endswith("_JS"):
        assert "{{" not in text
        assert "${" not in text
        assert "`" not in text


def test_the_palette_is_the_librarys_colour_map():
    palette = np.array(app._palette())
    assert palette.shape == (256, 3)
    wanted = matplotlib.colormaps[COLOUR_MAP](np.arange(256), bytes=True)[:, :3]
    assert np.abs(palette - wanted.astype(int)).max() <= 1


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
            monkeypatch.setattr(app.Captioner, "load", lambda source: CAPTIONER)
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
    monkeypatch.setattr(app.Captioner, "load", lambda source: CAPTIONER)
    monkeypatch.setattr(app, "EXAMPLES", Path("absent"))
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_an_interrupt_closes_the_page_with_one_line_and_status_130(page, monkeypatch, capsys):
    class Interrupted:
        def wait(self):
            raise KeyboardInterrupt

    closed = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(sys, "argv", ["app.py", "--port", str(port)])
    monkeypatch.setattr(app.Captioner, "load", lambda source: CAPTIONER)
    monkeypatch.setattr(app, "build_app", lambda captioner: page)
    monkeypatch.setattr(app, "start", lambda page, host, port: "http://somewhere")
    monkeypatch.setattr(page, "close", lambda verbose: closed.append(page))
    monkeypatch.setattr(app.threading, "Event", Interrupted)
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 130
    shown = capsys.readouterr()
    assert shown.err == "error: interrupted\n"
    assert "http://somewhere" in shown.out
    assert closed == [page]
