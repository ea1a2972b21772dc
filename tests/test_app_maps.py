"""The words and their maps, in a real headless Chromium."""

import io

import numpy as np
import pytest
from browser import SHAPES, WIDE, decoded, pressed, save_photo, upload_photo, upright_hw, word
from PIL import Image
from pointing import CELLS, GRID_HW, HEADS, HOSTILE, LAYERS, head_cell, pointing_word

from captioner.geometry import Geometry
from captioner.overlay import OPACITY, tint

pytestmark = pytest.mark.browser
pytest_plugins = ("app_pages",)

READ_MAP = "() => document.querySelector('.stage .frame canvas').toDataURL()"
# Picture and map as a person sees them, laid over each other by the browser at the size of the picture.
READ_BLEND = """() => {
  const picture = document.querySelector(".stage .frame img"), canvas = document.createElement("canvas");
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  context.drawImage(document.querySelector(".stage .frame canvas"), 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL();
}"""
# Lay a word under a place of the window; wait until the browser knows what lies under the mouse.
SLIDE = """([group, index, x, y]) => {
  const words = document.querySelector(group), box = words.children[index].getBoundingClientRect();
  words.style.transform = `translate(${x - box.x - box.width / 2}px, ${y - box.y - box.height / 2}px)`;
}"""
HOVERED = "([group, text]) => document.querySelector(group + ' button:hover')?.textContent === text"
READ_STRIP = "() => Array.from(document.querySelectorAll('.film canvas')).map((canvas) => canvas.toDataURL())"


def alpha(page):
    return decoded(page.evaluate(READ_MAP))[..., 3].astype(float)


def peak_px(weights_hw, size_hw):
    """Return (y, x) of the middle of the brightest spot, in pixels of a picture of that size."""
    peak = np.argwhere(weights_hw == weights_hw.max()).mean(axis=0) + 0.5
    return peak * np.array(size_hw) / np.array(weights_hw.shape)


def assert_inside(position_px, cell, size_hw):
    geometry = Geometry(picture_hw_px=size_hw, input_hw_px=(224, 224), grid_hw=GRID_HW)
    top, left, bottom, right = geometry.cell_box_px(*cell)
    assert top < position_px[0] < bottom
    assert left < position_px[1] < right


def set_opacity(page, percent):
    page.locator("[data-part=opacity]").fill(str(percent))


def chosen(page):
    return [index for index, on in enumerate(pressed(page)) if on]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_map_lies_exactly_over_its_picture_and_peaks_in_its_cell(url, visit, tmp_path, shape):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", shape))
    size_hw = upright_hw(shape)
    for text, cell in CELLS.items():
        word(page, text).click()
        box = page.locator(".stage .frame img").bounding_box()
        assert page.locator(".stage .frame canvas").bounding_box() == box
        assert box["width"] / box["height"] == pytest.approx(size_hw[1] / size_hw[0], rel=0.01)
        assert_inside(peak_px(alpha(page), size_hw), cell, size_hw)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_is_seen_on_the_right_pixels_of_the_screen(url, visit, tmp_path, shape):
    page = visit(url, width=390)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", shape, grey=True))
    set_opacity(page, 100)
    page.uncheck("[data-part=fade]")
    for text in ("north-west", "east", "south"):
        word(page, text).click()
        page.mouse.move(0, 0)
        seen = np.asarray(Image.open(io.BytesIO(page.locator(".stage .frame").screenshot())).convert("RGB")).astype(int)
        yellow = seen[..., 0] + seen[..., 1] - 2 * seen[..., 2]  # viridis ends in yellow, and nothing else here is
        y, x = np.argwhere(yellow > 0.9 * yellow.max()).mean(axis=0) + 0.5
        size_hw = upright_hw(shape)
        assert_inside((y * size_hw[0] / seen.shape[0], x * size_hw[1] / seen.shape[1]), CELLS[text], size_hw)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_draws_what_the_library_draws(url, visit, tmp_path, shape):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", shape))
    picture = Image.fromarray(decoded(page.get_attribute(".stage .frame img", "src"))).convert("RGB")
    for text, fade, colours in (("east", True, "viridis"), ("south", False, "inferno")):
        word(page, text).click()
        page.set_checked("[data-part=fade]", fade)
        page.select_option("[data-part=colours]", colours)
        shown = pointing_word(text, CELLS[text])
        opacity = OPACITY * (0.6 + 0.4 * shown.probability if fade else 1)
        wanted = np.asarray(tint(picture, shown.attention, opacity=opacity, colour_map=colours)).astype(int)
        seen = decoded(page.evaluate(READ_BLEND))[..., :3].astype(int)
        assert seen.shape == wanted.shape
        # The browser scales and blends in 8 bits.
        assert np.abs(seen - wanted).mean() < 1.5
        assert np.abs(seen - wanted).max() < 20
        assert np.abs(seen - np.asarray(picture).astype(int)).mean() > 10


def test_words_are_walked_by_keyboard_pointed_at_and_clicked_without_asking_the_server(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    last = len(CELLS) - 1
    page.focus(".stage .words button")
    steps = {"Enter": 0, "ArrowRight": 1, "End": last, "ArrowLeft": last - 1, "Home": 0}
    for key, index in steps.items():
        page.keyboard.press(key)
        assert chosen(page) == [index]
        focused = page.evaluate("document.activeElement.querySelector('b').textContent")
        assert focused == list(CELLS)[index]
        assert focused in page.text_content("[role=status][data-part=note]")
    page.keyboard.press("ArrowLeft")
    assert pressed(page)[last]
    for key in ("Escape", "Enter", "Enter"):
        page.keyboard.press(key)
    assert not any(pressed(page))
    assert not page.is_visible(".stage .frame canvas")

    word(page, "east").hover()  # shown while it is pointed at, and not chosen
    assert page.is_visible(".stage .frame canvas")
    assert "east" in page.text_content("[data-part=note]")
    assert not any(pressed(page))
    word(page, "south").click()
    word(page, "east").hover()
    pointed = alpha(page)
    page.mouse.move(0, 0)
    assert "south" in page.text_content("[data-part=note]")
    assert (alpha(page) != pointed).any()
    assert asked == []


def test_a_word_that_comes_to_lie_under_a_resting_mouse_is_not_pointed_at(url, visit, tmp_path):
    page = visit(url, width=390)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    for group in (".stage .words", ".film"):
        names = [button.text_content() for button in page.locator(f"{group} button").all()]
        button = page.locator(f"{group} button").first
        button.hover()
        box = button.bounding_box()
        assert "north-west" in page.text_content("[data-part=note]")
        page.focus(f"{group} button")
        page.keyboard.press("ArrowRight")
        page.evaluate(SLIDE, [group, 2, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
        page.wait_for_function(HOVERED, arg=[group, names[2]])
        assert chosen(page) == [1]
        assert "east" in page.text_content("[data-part=note]")
        page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2 + 1)  # it does point now
        assert "south" in page.text_content("[data-part=note]")
        page.mouse.move(0, 0)
        assert "east" in page.text_content("[data-part=note]")
        page.keyboard.press("Escape")


def test_who_takes_a_choice_back_by_a_click_sees_no_map_though_the_hand_trembles(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    box = word(page, "east").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for _ in range(2):
        page.mouse.click(x, y)
    page.mouse.move(x + 1, y)
    assert not page.is_visible(".stage .frame canvas")
    word(page, "south").hover()
    word(page, "east").hover()
    assert "east" in page.text_content("[data-part=note]")


def test_the_words_are_one_stop_of_the_tab_key(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    word(page, "east").click()
    for group in (".stage .words", ".film"):
        stops = page.locator(f"{group} button[tabindex='0']")
        assert stops.count() == 1
        assert "east" in stops.text_content()


def test_the_strip_shows_every_word_with_its_own_map_and_chooses_it(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE, grey=True))
    set_opacity(page, 100)
    page.uncheck("[data-part=fade]")
    page.wait_for_function("() => document.querySelector('.stage .frame img').complete")
    pictures = [decoded(picture).astype(int) for picture in page.evaluate(READ_STRIP)]
    assert len(pictures) == len(CELLS)
    for seen, cell in zip(pictures, CELLS.values(), strict=True):
        yellow = seen[..., 0] + seen[..., 1] - 2 * seen[..., 2]
        assert_inside(peak_px(yellow, upright_hw(WIDE)), cell, upright_hw(WIDE))
    page.locator(".film button").nth(2).click()
    assert chosen(page) == [2]
    assert pressed(page, ".film") == pressed(page)


def test_words_are_tinted_by_their_probability(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    colour = (
        "(node, sure) => { node.style.setProperty('--sure', sure); return getComputedStyle(node).backgroundColor; }"
    )
    button = page.locator(".stage .words button").first
    assert button.evaluate("(node) => node.style.getPropertyValue('--sure')") == "0.42"
    assert len({button.evaluate(colour, sure) for sure in (0, 0.5, 1)}) == 3


def test_opacity_and_colours_change_every_map(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    word(page, "east").click()
    before, small = page.evaluate(READ_MAP), page.evaluate(READ_STRIP)
    page.focus("[data-part=opacity]")
    page.keyboard.press("ArrowRight")
    assert page.text_content("[data-part=opacity-said]") == "66%"
    changed = page.evaluate(READ_MAP)
    assert changed != before
    assert page.evaluate(READ_STRIP) != small
    seen = {changed}
    for name in ("cividis", "magma", "inferno"):
        page.select_option("[data-part=colours]", name)
        seen.add(page.evaluate(READ_MAP))
    assert len(seen) == 4
    set_opacity(page, 0)
    assert alpha(page).max() == 0


def test_single_layers_and_heads_are_seen_in_their_own_cells(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    word(page, "south").click()
    page.mouse.move(0, 0)
    assert page.locator("[data-part=which] option").count() == 1 + LAYERS * HEADS
    for layer, head in ((0, 0), (1, 2)):
        page.select_option("[data-part=which]", label=f"Layer {layer + 1}, head {head + 1}")
        wanted = head_cell(CELLS["south"], layer, head)
        assert_inside(peak_px(alpha(page), upright_hw(WIDE)), wanted, upright_hw(WIDE))
    page.select_option("[data-part=which]", label="Summary")
    assert_inside(peak_px(alpha(page), upright_hw(WIDE)), CELLS["south"], upright_hw(WIDE))


def test_hostile_words_are_shown_as_text(url, visit, tmp_path):
    page = visit(url)
    upload_photo(page, save_photo(tmp_path / "photo.jpg", WIDE))
    assert [b.text_content() for b in page.locator(".stage .words button b").all()] == list(CELLS)
    assert page.locator(".captions button span").first.text_content() == "<i>Caption</i> 1."
    assert page.get_attribute(".stage .frame img", "alt") == "<i>Caption</i> 1."
    page.get_by_role("button", name=HOSTILE[0]).first.click()
    assert HOSTILE[0] in page.text_content("[data-part=note]")
