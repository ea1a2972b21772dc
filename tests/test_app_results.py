"""Captions that appear, are compared, scored, copied and saved, in a real headless Chromium."""

import json

import numpy as np
import pytest
from browser import (
    SHAPES,
    TALL,
    WIDE,
    decoded,
    pressed,
    save_photo,
    serve,
    upload,
    upload_photo,
    wait_for_captions,
    word,
)
from PIL import Image
from pointing import CELLS, FIRST_READING, PointingCaptioner

import app
from captioner import Captioner
from captioner.templates import alt_text

pytestmark = pytest.mark.browser
pytest_plugins = ("app_pages",)

TOPS = """() => Object.fromEntries(["frame", "words", "note"].map((name) => [
  name, document.querySelector(".stage [data-part=" + name + "]").getBoundingClientRect().top + scrollY]))"""

NOTE_WHAT_IS_SAID = """() => {
  window.said = [];
  const node = document.querySelector("[data-part=done]");
  new MutationObserver(() => said.push(node.textContent)).observe(node, { childList: true });
}"""
NOTE_WHO_IS_BUSY = """() => {
  window.busy = [];
  const note = (changes) => busy.push(...changes.map(({ target }) => target.dataset.part ?? target.className));
  new MutationObserver(note).observe(document.querySelector(".stage").parentElement,
    { attributes: true, attributeFilter: ["aria-busy"], subtree: true });
}"""


def texts(page):
    return [each.text_content() for each in page.locator(".stage .words button b").all()]


@pytest.mark.parametrize("width", [390, 1280])
def test_words_appear_as_they_are_found_and_the_best_replaces_them_without_a_jump(gated, visit, tmp_path, width):
    page, gate = visit(gated.url, width=width), gated.gate
    upload(page, save_photo(tmp_path / "photo.jpg", WIDE))
    page.wait_for_function("() => document.querySelector('.stage .frame img').naturalWidth > 0")
    assert texts(page) == []
    tops = page.evaluate(TOPS)
    for count in (1, 2, 3):
        gate.let_through(1)
        page.wait_for_selector(f".stage .words button:nth-child({count})")
        assert texts(page) == list(FIRST_READING[:count])
        assert not page.is_visible(".captions")
        assert page.evaluate(TOPS) == tops
    gate.let_through(1)
    wait_for_captions(page)
    assert texts(page) == list(CELLS)
    assert page.evaluate(TOPS) == tops
    for text in ("east", "south"):
        word(page, text).click()
        assert page.evaluate(TOPS) == tops
    assert "<i>Caption</i> 1." in page.text_content("[data-part=live]")


def test_a_word_that_is_chosen_while_others_come_stays_chosen(gated, visit, tmp_path):
    page, gate = visit(gated.url), gated.gate
    upload(page, save_photo(tmp_path / "photo.jpg", WIDE))
    gate.let_through(1)
    word(page, FIRST_READING[0]).click()
    gate.let_through(1)
    page.wait_for_selector(".stage .words button:nth-child(2)")
    assert pressed(page) == [True, False]
    assert page.is_visible(".stage .frame canvas")


def test_of_two_photos_the_later_stays(gated, visit, tmp_path):
    page, gate = visit(gated.url), gated.gate
    upload(page, save_photo(tmp_path / "slow.jpg", WIDE))
    page.wait_for_selector(".stage .frame img[src]")
    gate.let_through(1)
    page.wait_for_selector(".stage .words button")
    page.get_by_role("button", name="a tall one").click()
    width, height = SHAPES[TALL][0]
    page.wait_for_selector(f".frame[style*='--aspect: {width / height:.3g}']")
    gate.open()
    wait_for_captions(page)
    page.wait_for_selector(".compare .model:nth-child(2) .words button")
    assert page.locator(f".stage .frame[style*='--aspect: {width / height:.3g}']").count() == 1


def test_the_n_best_captions_are_listed_with_scores_and_each_has_its_words(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    rows = page.locator(".captions button")
    assert [row.locator("span").last.text_content() for row in rows.all()] == ["−1.50", "−2.50", "−3.50"]
    assert pressed(page, ".captions") == [True, False, False]
    for index in (1, 2, 0):
        rows.nth(index).click()
        assert texts(page) == [*list(CELLS)[index:], *list(CELLS)[:index]]
        assert pressed(page, ".captions") == [here == index for here in range(3)]
        assert page.get_attribute(".stage .frame img", "alt") == f"<i>Caption</i> {index + 1}."
    assert "cut short" in rows.nth(2).text_content()
    assert "cut short" not in rows.nth(0).text_content()


def test_a_low_confidence_is_said_in_words(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    assert "probably wrong" in page.locator(".stage .sure").inner_text()
    assert "probably wrong" in page.text_content("[data-part=live]")


def test_ones_own_sentence_is_scored_shown_and_refused_in_the_librarys_words(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    field, answer = page.get_by_label("Your own sentence"), page.locator("[data-part=own-answer]")
    field.press("Enter")
    assert "Write a sentence" in answer.text_content()
    for sentence in ("a zebra", "another zebra"):
        field.fill(sentence)
        field.press("Enter")
        page.wait_for_function("() => document.querySelector('[data-part=own-answer]').textContent.includes('know')")
        assert "does not know 'zebra'" in answer.text_content()
        assert field.get_attribute("aria-invalid") == "true"
        assert len(texts(page)) == len(CELLS)
    field.fill("zebra" * 90)
    field.press("Enter")
    page.wait_for_function("() => document.querySelector('[data-part=own-answer]').textContent.includes('zebrazebra')")
    assert answer.evaluate("node => node.scrollWidth <= node.clientWidth")
    field.fill("a red <b>dog</b>")
    page.get_by_role("button", name="Score it").click()
    page.wait_for_selector(".captions li:nth-child(4)")
    assert texts(page) == ["a", "red", "<b>dog</b>"]
    assert "yours" in page.locator(".captions button").nth(3).text_content()
    assert "−6.50" in answer.text_content()
    assert field.get_attribute("aria-invalid") == "false"
    word(page, "red").click()
    assert page.is_visible(".stage .frame canvas")
    page.locator(".captions button").first.click()
    assert texts(page) == list(CELLS)


def test_caption_and_alt_text_are_copied(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    for name, text in (("Copy caption", "<i>Caption</i> 1."), ("Copy alt text", alt_text("<i>Caption</i> 1."))):
        page.get_by_role("button", name=name).click()
        page.wait_for_function("(text) => navigator.clipboard.readText().then((t) => t === text)", arg=text)
        page.wait_for_function("() => document.querySelector('[data-part=done]').textContent.endsWith(' copied')")
    assert page.text_content("[data-part=alt]") == alt_text("<i>Caption</i> 1.")
    assert f"{len(alt_text('<i>Caption</i> 1.'))} characters" in page.text_content("[data-part=alt-length]")


def test_what_is_copied_again_is_said_again(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    page.evaluate(NOTE_WHAT_IS_SAID)
    for times in (1, 2):
        page.get_by_role("button", name="Copy caption").click()
        page.wait_for_function(
            "(count) => said.filter((text) => text === 'Caption copied').length === count", arg=times
        )
    assert page.evaluate("said") == ["Caption copied", "", "Caption copied"]


def test_buttons_and_headings_are_read_word_by_word_and_the_opacity_by_its_percent(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    page.wait_for_selector(".model:nth-child(2) .words button")
    for role, name in (
        ("button", "<i>Caption</i> 1. −1.50"),
        ("button", "<i>Caption</i> 3. cut short −3.50"),
        ("heading", "another model −1.50"),
        ("button", "east 42%"),
    ):
        assert page.get_by_role(role, name=name, exact=True).count() >= 1, name
    slider = page.get_by_role("slider", name="Opacity", exact=True)
    assert slider.get_attribute("aria-valuetext") == "65%"
    slider.fill("40")
    assert slider.get_attribute("aria-valuetext") == "40%"


def test_what_is_said_while_the_page_is_busy_is_not_silenced(gated, visit, tmp_path):
    page, gate = visit(gated.url), gated.gate
    page.evaluate(NOTE_WHO_IS_BUSY)
    upload(page, save_photo(tmp_path / "photo.jpg", WIDE))
    page.wait_for_selector(".stage .frame img[src]")
    gate.open()
    wait_for_captions(page)
    assert set(page.evaluate("busy")) == {"result"}
    assert page.locator("[aria-busy=true]").count() == 0


def test_where_the_system_forces_its_colours_what_is_chosen_still_stands_out(url, visit, tmp_path):
    page = visit(url)
    page.emulate_media(forced_colors="active")
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    word(page, "south").click()
    colours = "(node) => [getComputedStyle(node).backgroundColor, getComputedStyle(node.lastElementChild).color]"
    for group in (".stage .words", ".film", ".captions"):
        buttons = page.locator(f"{group} button").all()
        chosen = pressed(page, group)
        on, off = (
            {
                tuple(button.evaluate(colours))
                for button, is_chosen in zip(buttons, chosen, strict=True)
                if is_chosen is which
            }
            for which in (True, False)
        )
        assert len(on) == 1
        assert not {background for background, _ in on} & {background for background, _ in off}
        assert all(background != text for background, text in on | off)


def test_figure_and_record_are_saved_under_the_photos_name_and_hold_what_is_shown(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "my.photo.jpg", WIDE))
    page.locator(".captions button").nth(1).click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save record").click()
    assert download.value.suggested_filename == "my.photo-caption.json"
    record = json.loads(download.value.path().read_text())
    assert record["image"] == "my.photo.jpg"
    assert record["caption"] == "<i>Caption</i> 2."
    assert record["error"] is None
    with page.expect_download() as download:
        page.get_by_role("button", name="Save figure").click()
    assert download.value.suggested_filename == "my.photo-captioned.png"
    figure = Image.open(download.value.path())
    figure.load()
    assert figure.format == "PNG"
    width, height = SHAPES[WIDE][0]
    assert figure.width > 3 * 320
    assert len(figure.convert("RGB").getcolors(2**24)) > 1000
    assert figure.height > 2 * 320 * height / width


def test_models_stand_side_by_side_on_one_photo_and_each_has_its_own_words(url, visit, tmp_path):
    page = visit(url)
    assert not page.is_visible(".compare h2")
    upload_photo(page, save_photo(tmp_path / "photo.jpg", TALL))
    page.wait_for_selector(".model:nth-child(2) .words button")
    assert [each.text_content() for each in page.locator(".model h3").all()] == [
        "this model −1.50",
        "another model −1.50",
    ]
    left, right = page.evaluate(
        "() => Array.from(document.querySelectorAll('.model')).map((each) => each.getBoundingClientRect().toJSON())"
    )
    assert left["top"] == right["top"]
    assert left["right"] <= right["left"]
    page.locator(".model").nth(1).get_by_role("button", name="east").click()
    assert page.locator(".model canvas:visible").count() == 1
    assert "east" in page.locator(".model .line").nth(1).text_content()
    assert not any(pressed(page))


@pytest.mark.parametrize("width", [390, 1280])
def test_three_decoders_stand_side_by_side_each_with_its_own_maps(browser, visit, tmp_path, tiny_checkpoint, width):
    models = {kind: Captioner(tiny_checkpoint(kind), device="cpu") for kind in ("multihead", "mean", "additive")}
    own, *others = models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "EXAMPLES", tmp_path / "absent")
        served, url = serve(models[own], others={name: models[name] for name in others}, name=own)
    try:
        page = visit(url, width=width)
        upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
        page.wait_for_selector(".model:nth-child(3) .words button")
        columns = page.locator(".model")
        assert [column.get_attribute("aria-label") for column in columns.all()] == [*models]
        maps, notes = [], []
        for column in columns.all():
            column.locator(".words button").first.click()
            page.mouse.move(0, 0)
            maps.append(decoded(column.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")))
            notes.append(column.locator(".line").text_content())
        assert [len(np.unique(each.reshape(-1, 4), axis=0)) == 1 for each in maps] == [False, True, False]
        assert (maps[0] != maps[2]).any()
        assert [note.startswith("The model read the photo as a whole") for note in notes] == [False, True, False]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for selector in ("h3", ".frame", ".words", ".line"):
            boxes = [column.locator(selector).bounding_box() for column in columns.all()]
            if width == 1280:
                assert len({box["x"] for box in boxes}) == 3
                assert selector == "h3" or len({box["y"] for box in boxes}) == 1
            else:
                assert [box["y"] for box in boxes] == sorted({box["y"] for box in boxes})
    finally:
        served.close(verbose=False)


def test_without_other_models_and_with_one_head_there_is_nothing_to_compare_or_choose(
    browser, visit, tmp_path, monkeypatch
):
    monkeypatch.setattr("pointing.LAYERS", 1)
    monkeypatch.setattr("pointing.HEADS", 1)
    monkeypatch.setattr(app, "EXAMPLES", tmp_path / "absent")
    served, url = serve(PointingCaptioner())
    try:
        page = visit(url)
        upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
        assert page.locator(".compare").count() == 0
        assert page.locator(".strip").count() == 0
        assert not page.is_visible("[data-part=which]")
        assert not page.is_visible(".stage .sure")
    finally:
        served.close(verbose=False)
