"""Photos that come in, options, errors, and the page as a whole, in a real headless Chromium."""

import base64

import gradio as gr
import pytest
from browser import (
    SHAPES,
    TALL,
    TURNED,
    WIDE,
    decoded,
    pressed,
    save_photo,
    screenshot,
    serve,
    upload,
    upload_photo,
    wait_for_captions,
    word,
)
from pointing import CELLS, PointingCaptioner

import app
from captioner import Captioner

pytestmark = pytest.mark.browser
pytest_plugins = ("app_pages",)
EXAMPLES = sorted(app.EXAMPLES.glob("*.jpg"))

AGAIN = "No answer came; too many may be asking at once. Please try again in a moment."
READ_MAP = "() => document.querySelector('.stage .frame canvas').toDataURL()"
# A file as the hand of a user would drop it.
DROP = """([selector, base64, name]) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
  const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
  document.querySelector(selector).dispatchEvent(new DragEvent("drop", options));
}"""
COPY = """async (base64) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const item = new ClipboardItem({ "image/png": new Blob([bytes], { type: "image/png" }) });
  await navigator.clipboard.write([item]);
}"""


def open_options(page):
    page.get_by_role("button", name="Search options").click()
    page.wait_for_selector("label:has-text('Top k')")


def set_number(page, label, number):
    """Type a number into a slider's field. Gradio may still be filling in a field that has just been unfolded."""
    field, slider = (page.get_by_label(f"{kind} for {label}") for kind in ("number input", "range slider"))
    for _ in range(100):
        field.fill(str(number))
        field.press("Tab")
        page.evaluate("() => new Promise(requestAnimationFrame)")
        if slider.input_value() == field.input_value() == str(number):
            return
    raise AssertionError(f"{label} does not take {number}; it shows {field.input_value()}")


def error(page):
    page.wait_for_selector(".stage [role=alert]:not([hidden])")
    return page.text_content(".stage [role=alert]")


def test_the_bundled_model_captions_a_photo_and_two_words_get_two_maps(browser, visit, tmp_path):
    photo = EXAMPLES[0] if EXAMPLES else save_photo(tmp_path / "photo.jpg", WIDE)
    served, url = serve(Captioner.load())
    try:
        page = visit(url)
        upload_photo(page, photo)
        words = page.locator(".stage .words button")
        assert not any(pressed(page))
        assert not page.is_visible(".stage .frame canvas")
        maps = []
        for index in (1, 2):
            words.nth(index).click()
            assert pressed(page) == [here == index for here in range(words.count())]
            maps.append(decoded(page.evaluate(READ_MAP)))
        assert (maps[0] != maps[1]).any()
        sentence = " ".join(each.text_content() for each in page.locator(".stage .words button b").all())
        assert page.locator(".captions button").first.text_content().startswith(sentence.replace(" '", "'"))
        assert page.locator(".stage .words button small").first.text_content().endswith("%")
        page.get_by_label("Your own sentence").fill("A dog runs on the xylophone")
        page.get_by_role("button", name="Score it").click()
        page.wait_for_function("() => document.querySelector('[data-part=own-answer]').textContent.includes('know')")
        page.get_by_label("Your own sentence").fill("A dog runs on the grass")
        page.get_by_role("button", name="Score it").click()
        page.wait_for_selector(".captions li:nth-child(4)")
        assert words.count() == 6
        screenshot(page, "desktop")
    finally:
        served.close(verbose=False)


def test_a_file_that_is_no_picture_gives_a_message_and_the_next_photo_still_works(url, visit, tmp_path):
    page = visit(url)
    name = "<img src=x onerror=document.title=1>.jpg"
    bad = tmp_path / name
    bad.write_text("no picture at all")
    upload(page, bad)
    message = error(page)
    assert "a text file, not a picture" in message
    assert "/" not in message.replace(name, "")
    assert page.locator(".stage [role=alert] *").count() == 0
    assert not page.is_visible(".stage [data-part=result]")
    screenshot(page, "error")
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    assert not page.is_visible(".stage [role=alert]")


def test_a_file_over_the_limit_is_refused_in_words(url, visit, tmp_path):
    page = visit(url)
    large = tmp_path / "large.jpg"
    large.write_bytes(b"\xff\xd8\xff" + bytes(21 * 2**20))
    upload(page, large)
    toast = page.wait_for_selector("[data-testid=toast-body]")
    assert "20" in toast.text_content()
    assert page.is_visible(".stage .start")


def test_an_example_is_one_click_away_also_by_keyboard(url, visit, examples):
    page = visit(url)
    assert page.locator(".strip button").count() == len(list(examples.iterdir()))
    assert page.locator(".strip img").first.evaluate("(node) => getComputedStyle(node).transitionDuration") == "0s"
    for name, (size, _) in (("a wide one", SHAPES[WIDE]), ("a tall one", SHAPES[TALL])):
        page.get_by_role("button", name=name).focus()
        page.keyboard.press("Enter")
        page.wait_for_selector(f".stage .frame[style*='--aspect: {size[0] / size[1]:.3g}']")
        wait_for_captions(page)
        assert page.locator(".stage .words button").count() == len(CELLS)


def test_a_photo_is_dropped(url, visit, tmp_path):
    page = visit(url)
    data = base64.b64encode(save_photo(tmp_path / "photo.jpg", TALL).read_bytes()).decode()
    page.evaluate(DROP, ["button.upload-container", data, "photo.jpg"])
    wait_for_captions(page)


def test_a_photo_is_pasted(url, visit, tmp_path):
    page = visit(url)
    data = base64.b64encode(save_photo(tmp_path / "photo.png", TALL).read_bytes()).decode()
    page.evaluate(COPY, data)
    page.get_by_label("Paste from clipboard").click()
    wait_for_captions(page)


def test_a_photo_is_pasted_by_the_keys_also_while_the_camera_is_asked_for(url, visit, tmp_path):
    page = visit(url)
    data = base64.b64encode(save_photo(tmp_path / "photo.png", TALL).read_bytes()).decode()
    for source in ("Paste from clipboard", "Upload file", "Capture from camera"):
        page.evaluate(COPY, data)
        page.get_by_label(source).focus()
        if source == "Capture from camera":
            page.keyboard.press("Enter")
            page.wait_for_selector("text=Click to Access Webcam")
        page.evaluate("() => { document.querySelector('.captions')?.replaceChildren(); }")
        page.keyboard.press("Control+V")
        wait_for_captions(page)


def test_text_is_no_photo_when_it_is_pasted(url, visit):
    page = visit(url)
    page.evaluate("() => navigator.clipboard.writeText('a dog')")
    page.get_by_label("Upload file").focus()
    page.keyboard.press("Control+V")
    assert "no picture in the clipboard" in error(page)
    page = visit(url)
    page.get_by_label("Paste from clipboard").click()
    assert "no picture in the clipboard" in error(page)
    page = visit(url)
    open_options(page)
    page.get_by_label("Ban").focus()
    page.keyboard.press("Control+V")
    page.wait_for_function("() => document.activeElement.value === 'a dog'")
    assert not page.is_visible(".stage [role=alert]")


def test_a_drawing_in_svg_is_refused_in_the_librarys_words(url, visit, tmp_path):
    drawing = tmp_path / "drawing.svg"
    drawing.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
    )
    page = visit(url)
    upload(page, drawing)
    assert "SVG is a drawing, not a photo" in error(page)


@pytest.mark.parametrize("width", [1280, 390])
def test_without_a_camera_that_is_said_and_the_way_back_is_open(url, visit, width):
    page = visit(url, width=width)
    page.evaluate("""() => {
      const devices = navigator.mediaDevices, ask = devices.getUserMedia;
      devices.getUserMedia = () => ask.call(devices, { video: { deviceId: { exact: "no such one" } } });
    }""")
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    assert "There is no camera" in error(page)
    page.get_by_label("Upload file").click()
    page.wait_for_selector(".photo input[type=file]", state="attached")


def test_greedy_search_is_one_click_from_what_the_page_begins_with(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    open_options(page)
    page.get_by_label("greedy").check()
    page.get_by_role("button", name="Caption again").click()
    page.wait_for_selector(".captions li:only-child")
    assert not page.is_visible(".stage [role=alert]")


def test_a_photo_is_taken_with_the_webcam(url, visit):
    page = visit(url)
    page.get_by_label("Capture from camera").click()
    assert page.text_content(".stage .start").startswith("Choose a photo")  # no photo was chosen by that
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("() => document.querySelector('video')?.videoWidth > 0")
    page.get_by_label("capture photo").click()
    wait_for_captions(page)


def test_search_options_are_used_and_impossible_ones_refused_in_the_librarys_words(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    assert page.locator(".captions li").count() == 3
    open_options(page)
    set_number(page, "N best", 2)
    page.get_by_role("button", name="Caption again").click()
    page.wait_for_selector(".captions li:nth-child(2):last-child")
    set_number(page, "N best", 9)
    page.get_by_role("button", name="Caption again").click()
    assert "n_best must not exceed beam_size" in error(page)
    assert page.locator(".captions li").count() == 2  # what was found before is still there
    assert page.is_visible(".stage .frame img")
    set_number(page, "N best", 3)
    page.get_by_label("Top k").fill("many")
    page.get_by_role("button", name="Caption again").click()
    page.wait_for_function("() => document.querySelector('.stage [role=alert]').textContent.includes('top_k must be')")
    upload(page, save_photo(tmp_path / "other.jpg", TALL))
    page.wait_for_selector(".stage [data-part=result]", state="hidden")  # it is not of the new photo
    assert "top_k must be" in error(page)
    page.get_by_label("Top k").fill("")
    page.get_by_role("button", name="Caption again").click()
    page.wait_for_selector(".captions li:nth-child(3)")
    assert not page.is_visible(".stage [role=alert]")


def test_captioning_again_without_a_photo_asks_for_one(url, visit):
    page = visit(url)
    open_options(page)
    page.get_by_role("button", name="Caption again").click()
    assert error(page) == "Choose a photo first."


def test_a_fault_of_the_server_is_said_without_a_trace(browser, visit, tmp_path, monkeypatch, caplog):
    class Broken(PointingCaptioner):
        def caption(self, picture, **options):
            if options["n_best"] == 2:
                raise RuntimeError(f"a bug at {picture}")
            return super().caption(picture, **options)

    def no_answer(self, shown, event):
        raise RuntimeError("a bug")

    monkeypatch.setattr(app._Listeners, "score_own", no_answer)
    monkeypatch.setattr(no_answer, "__annotations__", {"event": gr.EventData}, raising=False)
    served, url = serve(Broken())
    try:
        page = visit(url)
        upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
        page.get_by_label("Your own sentence").fill("a dog")
        page.get_by_label("Your own sentence").press("Enter")
        page.wait_for_function("() => document.querySelector('[data-part=own-answer]').textContent.includes('again')")
        open_options(page)
        set_number(page, "N best", 2)
        page.get_by_role("button", name="Caption again").click()
        assert error(page) == app.FAULT
        assert not page.is_visible(".stage .frame")
        assert "bug" not in page.content()
        assert str(tmp_path) not in page.content()
        assert "a bug at" in caplog.text
    finally:
        served.close(verbose=False)


def test_a_call_that_fails_is_said_on_the_stage_and_what_it_shows_stays(browser, visit, tmp_path, monkeypatch):
    def broken(self, runs, path, name, values, **how):
        if not works:
            raise RuntimeError("a bug")
        yield from answers(self, runs, path, name, values, **how)

    def no_answer(self, runs, event):
        raise RuntimeError("a bug")

    works, answers = [], app._Listeners._answers
    monkeypatch.setattr(app._Listeners, "_answers", broken)
    monkeypatch.setattr(app._Listeners, "score_own", no_answer)
    monkeypatch.setattr(no_answer, "__annotations__", {"event": gr.EventData}, raising=False)
    served, url = serve(PointingCaptioner())
    try:
        photo = save_photo(tmp_path / "photo.jpg", WIDE)
        page = visit(url)
        upload(page, photo)
        assert error(page) == AGAIN
        assert not page.is_visible(".stage .start")
        assert not page.is_visible(".stage [data-part=result]")
        works.append(True)
        page = visit(url)
        upload_photo(page, photo)
        works.clear()
        open_options(page)
        page.get_by_role("button", name="Caption again").click()
        assert error(page) == AGAIN
        assert page.is_visible(".stage .frame img")
        assert page.locator(".captions button").count() == 3
        assert page.locator("[aria-busy=true]").count() == 0
        page.locator(".captions button").nth(1).click()
        page.get_by_label("Your own sentence").fill("a dog")
        page.get_by_label("Your own sentence").press("Enter")
        page.wait_for_function("() => document.querySelector('[data-part=own-answer]').textContent.includes('again')")
        assert pressed(page, ".captions") == [False, True, False]
    finally:
        served.close(verbose=False)


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_and_axe_finds_no_serious_fault(url, visit, tmp_path, width, colours):
    page = visit(url, width=width, height=844, colours=colours, motion="no-preference")
    left = page.locator("h1").bounding_box()["x"]
    screenshot(page, f"start-{width}-{colours}")
    upload_photo(page, save_photo(tmp_path / "photo.jpg", TURNED))
    page.wait_for_selector(".model:nth-child(2) .words button")
    word(page, "south").click()
    open_options(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1").bounding_box()["x"] == left
    box = page.locator(".stage .frame").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    screenshot(page, f"page-{width}-{colours}")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    faults = [
        (fault["id"], [node["html"][:200] for node in fault["nodes"]])
        for fault in axe.Axe().run(page).response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert faults == []


def test_the_whole_page_is_reached_by_keyboard(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    page.locator(".stage .words button").first.focus()
    reached = []
    for _ in range(20):
        reached.append(
            page.evaluate("document.activeElement.dataset.part ?? document.activeElement.textContent.trim()")
        )
        page.keyboard.press("Tab")
    wanted = ["opacity", "colours", "which", "fade", "sentence", "Score it", "copy-caption", "copy-alt", "save-figure"]
    assert [name for name in reached if name in wanted] == wanted
