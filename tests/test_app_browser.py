"""The page in a real headless Chromium."""

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from browser import TIMEOUT_MS, Watch, chromium, free_port
from PIL import Image
from pointing import CELLS, GRID_HW, HOSTILE, PointingCaptioner, pointing_word

import app
from captioner import Captioner
from captioner.geometry import Geometry
from captioner.overlay import tint

pytestmark = pytest.mark.browser
EXAMPLES = sorted(app.EXAMPLES.glob("*.jpg"))
WIDE, TALL, TURNED = "wide", "tall", "turned by EXIF"
# Stored width and height, EXIF orientation.
SHAPES = {WIDE: ((600, 200), 1), TALL: ((200, 600), 1), TURNED: ((640, 480), 6)}

READ_MAP = "() => document.querySelector('.frame canvas').toDataURL()"
# Picture and map as a person sees them, laid over each other by the browser at the size of the picture.
READ_BLEND = """() => {
  const picture = document.querySelector(".frame img"), canvas = document.createElement("canvas");
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  context.drawImage(document.querySelector(".frame canvas"), 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL();
}"""
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


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


def serve(captioner):
    page = app.build_app(captioner)
    return page, app.start(page, host="127.0.0.1", port=free_port())


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    for shape in (WIDE, TALL):
        save_photo(folder / f"a_{shape}-one.jpg", shape)
    return folder


@pytest.fixture(scope="module")
def url(browser, examples):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "EXAMPLES", examples)
        page, url = serve(PointingCaptioner())
    yield url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def context(browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write", "camera"])
    context.set_default_timeout(TIMEOUT_MS)
    yield context
    context.close()


@pytest.fixture
def visit(context):
    """Open a page that is watched: no request may leave the machine, no error may reach the console."""
    pages, watches = [], []

    def open_page(url, *, width=1280, height=900, colours="light"):
        page = context.new_page()
        pages.append(page)
        watches.append(Watch(page))
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=colours)
        page.goto(url)
        page.wait_for_selector(".stage .start")
        return page

    yield open_page
    for page in pages:
        page.close()
    for watch in watches:
        assert watch.requests
        assert watch.strangers() == []
        assert watch.errors == []


def save_photo(path, shape):
    size_wh_px, orientation = SHAPES[shape]
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size_wh_px).save(path, exif=exif)
    return path


def upload(page, path):
    page.set_input_files("input[type=file]", path)


def upload_photo(page, path):
    upload(page, path)
    page.wait_for_selector(".words button")


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


def pressed(page):
    return [word.get_attribute("aria-pressed") == "true" for word in page.locator(".words button").all()]


def pixels(page, script):
    """Return what a canvas shows, [height, width, red green blue alpha]."""
    data = base64.b64decode(page.evaluate(script).partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def screenshot(page, name):
    if folder := os.environ.get("CAPTIONER_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_photo_gets_a_caption_and_two_words_get_two_maps(visit, tmp_path):
    photo = EXAMPLES[0] if EXAMPLES else save_photo(tmp_path / "photo.jpg", WIDE)
    served, url = serve(Captioner.load())
    try:
        page = visit(url)
        upload_photo(page, photo)
        words = page.locator(".words button")
        assert not any(pressed(page))
        assert not page.is_visible(".frame canvas")
        maps = []
        for index in (1, 2):
            words.nth(index).click()
            assert pressed(page) == [here == index for here in range(words.count())]
            maps.append(pixels(page, READ_MAP))
        assert (maps[0] != maps[1]).any()
        sentence = " ".join(word.text_content() for word in page.locator(".words button b").all())
        assert page.locator(".captions li").first.text_content().startswith(sentence.replace(" '", "'"))
        assert page.locator(".words button small").first.text_content().endswith("%")
        screenshot(page, "desktop")
    finally:
        served.close(verbose=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_map_lies_exactly_over_its_picture_and_peaks_in_its_cell(url, visit, tmp_path, shape):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", shape))
    (width, height), orientation = SHAPES[shape]
    size_hw = (width, height) if orientation == 6 else (height, width)
    geometry = Geometry(picture_hw_px=size_hw, input_hw_px=(224, 224), grid_hw=GRID_HW)
    for text, cell in CELLS.items():
        page.get_by_role("button", name=text).click()
        box = page.locator(".frame img").bounding_box()
        assert page.locator(".frame canvas").bounding_box() == box
        assert box["width"] / box["height"] == pytest.approx(size_hw[1] / size_hw[0], rel=0.01)
        alpha = pixels(page, READ_MAP)[..., 3].astype(float)
        # The middle of the brightest spot, in pixels of the original.
        peak = np.argwhere(alpha == alpha.max()).mean(axis=0) + 0.5
        y, x = peak * np.array(size_hw) / np.array(alpha.shape)
        top, left, bottom, right = geometry.cell_box_px(*cell)
        assert top < y < bottom
        assert left < x < right


@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_draws_what_the_library_draws(url, visit, tmp_path, shape):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", shape))
    sent = base64.b64decode(page.get_attribute(".frame img", "src").partition(",")[2])
    picture = Image.open(io.BytesIO(sent)).convert("RGB")
    for text in ("east", "south"):
        page.get_by_role("button", name=text).click()
        wanted = np.asarray(tint(picture, pointing_word(text, CELLS[text]).attention)).astype(int)
        seen = pixels(page, READ_BLEND)[..., :3].astype(int)
        assert seen.shape == wanted.shape
        # The browser scales and blends in 8 bits.
        assert np.abs(seen - wanted).mean() < 1
        assert np.abs(seen - wanted).max() < 16
        assert np.abs(seen - np.asarray(picture).astype(int)).mean() > 10


def test_the_words_are_walked_by_keyboard(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    last = len(CELLS) - 1
    page.focus(".words button")
    steps = {"Enter": 0, "ArrowRight": 1, "End": last, "ArrowLeft": last - 1, "Home": 0}
    for key, index in steps.items():
        page.keyboard.press(key)
        assert [here for here, on in enumerate(pressed(page)) if on] == [index]
        focused = page.evaluate("document.activeElement.querySelector('b').textContent")
        assert focused == list(CELLS)[index]
        assert focused in page.text_content("[role=status][data-part=note]")
    page.keyboard.press("ArrowLeft")
    assert pressed(page)[last]
    for key in ("Escape", "Enter", "Enter"):
        page.keyboard.press(key)
    assert not any(pressed(page))
    assert not page.is_visible(".frame canvas")


def test_words_and_captions_are_text_and_never_markup_or_templates(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    assert [word.text_content() for word in page.locator(".words button b").all()] == list(CELLS)
    assert page.locator(".captions li span").first.text_content() == "<i>Caption</i> 1."
    assert page.get_attribute(".frame img", "alt") == "<i>Caption</i> 1."
    page.get_by_role("button", name=HOSTILE[0]).click()
    assert HOSTILE[0] in page.text_content("[data-part=note]")


def test_a_file_that_is_no_picture_gives_a_message_and_the_next_photo_still_works(url, visit, tmp_path):
    page = visit(url)
    name = "<img src=x onerror=document.title=1>.jpg"
    bad = tmp_path / name
    bad.write_text("no picture at all")
    upload(page, bad)
    page.wait_for_selector("[role=alert]:not([hidden])")
    message = page.text_content(".stage [role=alert]")
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


def test_an_example_is_one_click_away(url, visit, examples):
    page = visit(url)
    assert page.locator(".strip button").count() == len(list(examples.iterdir()))
    for name, (size, _) in (("a wide one", SHAPES[WIDE]), ("a tall one", SHAPES[TALL])):
        page.get_by_role("button", name=name).click()
        page.wait_for_selector(f".frame[style*='--aspect: {size[0] / size[1]:.3g}']")
        assert page.locator(".words button").count() == len(CELLS)


def test_a_photo_is_dropped(url, visit, tmp_path):
    page = visit(url)
    data = base64.b64encode(save_photo(tmp_path / "photo.jpg", TALL).read_bytes()).decode()
    page.evaluate(DROP, ["button.upload-container", data, "photo.jpg"])
    page.wait_for_selector(".words button")


def test_a_photo_is_pasted(url, visit, tmp_path):
    page = visit(url)
    data = base64.b64encode(save_photo(tmp_path / "photo.png", TALL).read_bytes()).decode()
    page.evaluate(COPY, data)
    page.get_by_label("Paste from clipboard").click()
    page.wait_for_selector(".words button")


def test_a_photo_is_taken_with_the_webcam(url, visit):
    page = visit(url)
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("() => document.querySelector('video')?.videoWidth > 0")
    page.get_by_label("capture photo").click()
    page.wait_for_selector(".words button")


def test_search_options_are_used_and_impossible_ones_refused_in_the_librarys_words(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    assert page.locator(".captions li").count() == 3
    page.get_by_role("button", name="Search options").click()
    answers = {2: ".captions li:nth-child(2):last-child", 9: ".stage [role=alert]:not([hidden])"}
    for number, selector in answers.items():
        set_number(page, "Captions", number)
        page.get_by_role("button", name="Caption again").click()
        page.wait_for_selector(selector)
    assert "n_best must not exceed beam_size" in page.text_content(".stage [role=alert]")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_before_and_after(url, visit, tmp_path, width, colours):
    page = visit(url, width=width, height=844, colours=colours)
    photo = EXAMPLES[0] if EXAMPLES else save_photo(tmp_path / "photo.jpg", TURNED)
    left = page.locator("h1").bounding_box()["x"]
    screenshot(page, f"start-{width}-{colours}")
    upload_photo(page, photo)
    page.locator(".words button").nth(3).click()
    screenshot(page, f"page-{width}-{colours}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1").bounding_box()["x"] == left
    box = page.locator(".frame").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
