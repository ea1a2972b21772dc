"""What the page says, as plain values, without a browser and without Gradio."""

import base64
import dataclasses
import io
import json
import time

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pointing import CELLS, FIRST_READING, GRID_HW, HEADS, LAYERS, PointingCaptioner, head_cell

from captioner import ConfigError, SearchError, SearchOptions, page
from captioner.errors import ImageTooLargeError
from captioner.images import ImageLimits, open_picture
from captioner.overlay import COLOUR_MAP
from captioner.service import Service, ServiceLimits
from captioner.serving import UPLOAD_AGE_S

CAPTIONER = PointingCaptioner()
GONE = "The photo was deleted after an hour; choose it again."
PARTS = ("strip", "stage", "compare")
FILES = [f"{part}.{kind}" for part in PARTS for kind in ("html", "css", "js")] + ["viewer.css", "viewer.js", "page.css"]


def photo(folder, size_wh_px=(30, 20), *, name="photo.jpg", orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / name
    Image.radial_gradient("L").resize(size_wh_px).convert("RGB").save(path, "JPEG", exif=exif)
    return str(path)


def told(path, name="photo.jpg", *, model=CAPTIONER, **options):
    return list(page.tell(model, path, name, {"n_best": 3, **options}, run=7))


def last(path, name="photo.jpg", **how):
    return told(path, name, **how)[-1]


def unpacked(text, *shape):
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(*shape, *GRID_HW)


def decoded(data_uri):
    head, _, data = data_uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_what_is_sent_is_plain_json(tmp_path):
    messages = told(photo(tmp_path))
    messages.append(page.tell_score(CAPTIONER, photo(tmp_path), "photo.jpg", "a dog", run=7))
    messages += page.tell_compare({"other": CAPTIONER}, photo(tmp_path), {}, messages[-2], own_name="own")
    for message in messages:
        assert json.loads(json.dumps(message, allow_nan=False)) == message


def test_no_message_holds_the_path_of_the_photo(tmp_path):
    path = photo(tmp_path)
    messages = told(path)
    messages.append(page.tell_score(CAPTIONER, path, "photo.jpg", "a dog", run=7))
    messages += page.tell_compare({"other": CAPTIONER}, path, {}, messages[-2], own_name="own")
    assert str(tmp_path) not in json.dumps(messages)


def test_the_photo_comes_first_then_one_word_after_another_then_the_captions(tmp_path):
    first, *reading, done = told(photo(tmp_path))
    assert first["phase"] == "looking"
    assert first["captions"][0]["words"] == []
    texts = [[word["text"] for word in message["captions"][0]["words"]] for message in reading]
    assert texts == [list(FIRST_READING[: count + 1]) for count in range(len(FIRST_READING))]
    assert done["phase"] == "done"
    assert {message["picture"] for message in (first, *reading)} == {done["picture"]}
    assert {message["run"] for message in (first, *reading, done)} == {7}


def test_a_preview_that_finds_no_way_leaves_the_word_to_the_search(tmp_path):
    class Lost(PointingCaptioner):
        def stream(self, picture, **options):
            yield from list(super().stream(picture))[:1]
            raise SearchError("no caption can be as the options ask")

    assert last(photo(tmp_path), model=Lost())["phase"] == "done"


def test_a_preview_heeds_what_a_greedy_search_can_heed(tmp_path):
    class Listening(PointingCaptioner):
        def stream(self, picture, **options):
            asked.append(SearchOptions.from_dict(options))
            return super().stream(picture)

    asked = []
    list(page.tell(Listening(), photo(tmp_path), "a", {"beam_size": 5, "n_best": 3, "ban": ["dog"]}, run=1))
    assert asked == [SearchOptions(method="greedy", ban=("dog",))]


def test_every_map_is_sent_with_its_peak_at_255_in_its_own_cell(tmp_path):
    for caption in last(photo(tmp_path))["captions"]:
        words = [word["text"] for word in caption["words"]]
        assert sorted(words) == sorted(CELLS)
        assert caption["grid"] == list(GRID_HW)
        for text, weights in zip(words, unpacked(caption["maps"], len(words)), strict=True):
            assert weights.max() == 255
            assert np.unravel_index(weights.argmax(), GRID_HW) == CELLS[text]


def test_the_map_of_every_layer_and_head_is_sent_in_its_place(tmp_path):
    caption = last(photo(tmp_path))["captions"][0]
    assert caption["heads"] == [LAYERS, HEADS]
    maps = unpacked(caption["head_maps"], len(CELLS), LAYERS, HEADS)
    for word, cell in enumerate(CELLS.values()):
        for layer, head in np.ndindex(LAYERS, HEADS):
            assert np.unravel_index(maps[word, layer, head].argmax(), GRID_HW) == head_cell(cell, layer, head)


def test_one_head_is_its_own_summary_and_not_sent_twice(tmp_path):
    class OneHead(PointingCaptioner):
        def caption(self, picture, **options):
            found = super().caption(picture)
            words = tuple(dataclasses.replace(w, attention_heads=w.attention[None, None]) for w in found.words)
            return dataclasses.replace(found, words=words)

    caption = last(photo(tmp_path), model=OneHead())["captions"][0]
    assert caption["heads"] == [1, 1]
    assert caption["head_maps"] == ""


def test_captions_are_sent_best_first_with_scores_and_records(tmp_path):
    captions = last(photo(tmp_path), "mine.jpg", n_best=3)["captions"]
    assert [caption["score"] for caption in captions] == [-1.5, -2.5, -3.5]
    assert [caption["finished"] for caption in captions] == [True, True, False]
    assert [caption["record"]["image"] for caption in captions] == ["mine.jpg"] * 3
    assert [caption["record"]["caption"] for caption in captions] == [caption["text"] for caption in captions]
    assert [len(caption["record"]["alternatives"]) for caption in captions] == [2, 0, 0]


@pytest.mark.parametrize(("orientation", "upright_wh_px"), [(1, (3000, 1000)), (6, (1000, 3000))])
def test_the_picture_is_sent_upright_small_and_with_its_own_size(tmp_path, orientation, upright_wh_px):
    message = last(photo(tmp_path, (3000, 1000), orientation=orientation))
    assert (message["width"], message["height"]) == upright_wh_px
    picture = decoded(message["picture"])
    assert max(picture.size) == page.DISPLAY_SIDE_PX
    assert picture.width / picture.height == pytest.approx(message["width"] / message["height"], rel=0.01)
    assert len(picture.getexif()) == 0


def test_a_small_picture_is_not_enlarged_on_the_way(tmp_path):
    assert decoded(last(photo(tmp_path, (31, 17)))["picture"]).size == (31, 17)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\xff\xd8\xff\xe0 cut off", b"<svg></svg>"])
def test_a_bad_file_gives_one_line_with_the_users_name_for_it_and_no_path(tmp_path, content):
    path = tmp_path / "upload.bin"
    path.write_bytes(content)
    (message,) = told(str(path), name="holiday.jpg")
    assert list(message) == ["run", "error", "keep"]
    assert message["error"].startswith("holiday.jpg: ")
    assert "\n" not in message["error"]
    assert str(tmp_path) not in message["error"]
    assert not message["keep"]


def test_a_photo_that_is_gone_is_asked_for_again_and_what_was_found_of_it_stays(tmp_path):
    before = last(photo(tmp_path))
    gone = str(tmp_path / "gone.jpg")
    (message,) = told(gone, name="holiday.jpg")
    assert message == {"run": 7, "error": GONE, "keep": True}
    assert page.tell_score(CAPTIONER, gone, "holiday.jpg", "a dog", run=7)["score_error"] == GONE
    *_, end = page.tell_compare({"other": CAPTIONER}, gone, {}, before, own_name="own")
    assert end["models"][1]["error"] == GONE
    assert UPLOAD_AGE_S == 3600


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_pixels": 599}, "This picture is too large for this page (at most 0.000599 megapixels)"),
        ({"max_bytes": 512}, "This picture is too large for this page (at most 0.000488281 MB)"),
        (None, "This picture is too large for this page; choose a smaller one."),
    ],
)
def test_a_picture_that_is_too_large_is_refused_without_advice_for_who_runs_the_page(tmp_path, limits, said):
    class Limited(PointingCaptioner):
        def open(self, picture, *, name=None, side_px=None):
            if limits is None:
                raise ImageTooLargeError("photo.jpg: more pixels than Pillow allows")
            return open_picture(picture, name=name, side_px=side_px, limits=ImageLimits(**limits))

    (message,) = told(photo(tmp_path), model=Limited())
    assert message["error"].startswith(said)
    assert "raise" not in message["error"]
    assert not message["keep"]


def test_an_error_of_the_model_about_the_file_shows_no_path(tmp_path):
    class Forgetful(PointingCaptioner):
        def caption(self, picture, **options):
            return super().caption(f"{picture}.lost", **options)

    def lost(picture):
        CAPTIONER.caption(f"{picture}.lost")

    for model in (Forgetful(), PointingCaptioner(gate=lost)):
        message = last(photo(tmp_path), "holiday.jpg", model=model)
        assert message["error"].startswith("holiday.jpg.lost: ")
        assert str(tmp_path) not in message["error"]


def test_a_picture_over_the_services_limit_is_never_looked_at(tmp_path, tiny_captioner):
    large = photo(tmp_path, (100, 50))
    with Service(tiny_captioner, limits=ServiceLimits(max_pixels=100 * 50 - 1)) as service:
        (message,) = told(large, "holiday.jpg", model=service)
        assert "phase" not in message
        assert "too large for this page" in message["error"]
        assert told(photo(tmp_path, (90, 50)), model=service)[0]["phase"] == "looking"


def test_a_picture_is_not_looked_at_while_the_service_is_full_or_closed(tmp_path, tiny_captioner):
    with Service(tiny_captioner, limits=ServiceLimits(max_queue=1)) as service:
        with service._places(1):
            (message,) = told(photo(tmp_path), model=service)
            assert "full" in message["error"]
        service.close(0)
        (message,) = told(photo(tmp_path), model=service)
        assert "closing" in message["error"]


def test_own_sentences_are_scored_or_refused_in_the_librarys_words(tmp_path):
    path = photo(tmp_path)
    good = page.tell_score(CAPTIONER, path, "a.jpg", "a dog runs", run=7)["scored"]
    assert good["text"] == "a dog runs"
    assert len(good["words"]) == 3
    bad = page.tell_score(CAPTIONER, path, "a.jpg", "a zebra", run=7)
    assert "does not know 'zebra'" in bad["score_error"]
    long = page.tell_score(CAPTIONER, path, "a.jpg", "a " * page.MAX_SENTENCE, run=7)
    assert "too long" in long["score_error"]


def test_other_models_stand_beside_each_with_its_captions_or_its_error(tmp_path):
    class Failing(PointingCaptioner):
        def caption(self, picture, **options):
            raise SearchError(f"{picture}: no caption can be as the options ask")

    path = photo(tmp_path)
    others = {"good": CAPTIONER, "bad": Failing()}
    *before, end = page.tell_compare(others, path, {}, last(path), own_name="own")
    assert [column["name"] for column in end["models"]] == ["own", "good", "bad"]
    assert [set(column) - {"name"} for column in end["models"]] == [{"captions"}, {"captions"}, {"error"}]
    assert end["models"][2]["error"].startswith("photo.jpg: ")
    assert [sum("waiting" in column for column in message["models"]) for message in before] == [2, 1]
    assert list(page.tell_compare({}, path, {}, last(path), own_name="own")) == []


@pytest.mark.parametrize(
    ("values", "thing"),
    [
        ({"beam_size": 2, "n_best": 3}, "n_best must not exceed beam_size"),
        ({"beam_size": 0}, "beam_size must be a whole number"),
        ({"beam_size": "many"}, "beam_size must be a whole number"),
        ({"beam_size": "2.5"}, "got 2.5"),
        ({"beam_size": 10**9}, "beam_size must be"),
        ({"beam_size": page.MAX_BEAM_SIZE + 1}, "on this page"),
        ({"method": "sample", "n_best": page.MAX_BEAM_SIZE + 1}, "on this page"),
        ({"method": "greedy", "n_best": 2}, "greedy search finds one caption"),
        ({"temperature": "nan"}, "temperature"),
        ({"must_include": "dog", "method": "sample"}, "must_include needs method='beam'"),
        ({"min_words": "9", "max_words": "3"}, "min_words must not exceed max_words"),
        ({"ban": 3}, "ban must be words"),
    ],
)
def test_impossible_options_are_refused_in_the_librarys_words(values, thing):
    with pytest.raises(ConfigError, match=thing):
        page.search_options(values)


def test_empty_fields_leave_their_options_to_the_model():
    values = {"method": "beam", "beam_size": 4, "seed": " ", "ban": " ,", "must_include": "red ball, dog", "top_p": ""}
    values |= {"temperature": "0.5", "max_words": "7", "groups": None}
    assert page.search_options(values) == {
        "method": "beam",
        "beam_size": 4,
        "must_include": ["red ball", "dog"],
        "temperature": 0.5,
        "max_words": 7,
    }


@given(st.dictionaries(st.sampled_from([*page.option_help(), "x"]), st.text(max_size=5) | st.integers() | st.none()))
@settings(max_examples=200)
def test_whatever_the_fields_hold_is_understood_or_refused_in_words(values):
    try:
        options = page.search_options(values)
    except ConfigError:
        return
    SearchOptions.from_dict(options)


def test_every_option_has_a_line_of_help():
    helps = page.option_help()
    assert list(helps) == [field.name for field in dataclasses.fields(SearchOptions)]
    assert all(len(text) > 10 and "\n" not in text for text in helps.values())


def test_every_caption_comes_with_its_alt_text(tmp_path):
    caption = CAPTIONER.caption(photo(tmp_path))
    told = page.caption_values(dataclasses.replace(caption, text="A photo of " + "a dog and " * 30 + "a cat."), "a.jpg")
    assert told["alt"].startswith("A dog and a dog")
    assert len(told["alt"]) <= 125


def test_a_low_confidence_is_said_in_words():
    assert page.sure(None) == ""
    assert "probably wrong" in page.sure(0.05)
    assert "unsure" in page.sure(0.2)
    assert page.sure(0.8).startswith("Confidence 80%")


def test_palettes_are_the_librarys_colour_maps_and_its_own_comes_first():
    found = page.palettes()
    assert next(iter(found)) == COLOUR_MAP
    for name, text in found.items():
        table = np.frombuffer(base64.b64decode(text), np.uint8).reshape(256, 3)
        assert (table == matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]).all()


def test_a_later_run_has_a_larger_number_that_javascript_holds_exactly():
    runs = [page.new_run()]
    while page.new_run() == runs[-1]:
        time.monotonic_ns()
    runs.append(page.new_run())
    assert runs[0] < runs[1] < 2**53


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".js")])
def test_templates_hold_nothing_that_gradio_would_evaluate(name):
    assert not [sign for sign in ("{{", "${", "`", "\\") if sign in page.read(name)]


@pytest.mark.parametrize("name", FILES)
def test_the_files_of_the_page_fetch_nothing_and_read_no_text_as_html(name):
    assert not [
        sign for sign in ("http:", "https:", "@import", "url(", "fetch(", "innerHTML") if sign in page.read(name)
    ]
