"""Maps are drawn where they belong."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import ConfigError
from captioner.geometry import Geometry
from captioner.overlay import draw_words, tint
from captioner.prepared import FIGURE_SIDE_PX

GRID_HW = (7, 7)


@dataclasses.dataclass
class DrawnWord:
    text: str
    attention: np.ndarray
    probability: float = 0.5


def one_cell(row, column, grid_hw=GRID_HW):
    weights_hw = np.zeros(grid_hw, np.float32)
    weights_hw[row, column] = 1.0
    return weights_hw


def changes(image, weights_hw, **options):
    """How far each pixel moves when a map is laid over a picture, [height, width]."""
    tinted = tint(image, weights_hw, **options)
    assert tinted.mode == "RGB"
    assert tinted.size == image.size
    return np.abs(np.asarray(tinted, float) - np.asarray(image, float)).sum(axis=2)


@settings(max_examples=30)
@given(
    row=st.integers(0, 6),
    column=st.integers(0, 6),
    size_wh_px=st.sampled_from([(70, 70), (49, 350), (350, 49), (97, 31), (640, 427)]),
)
def test_a_map_is_strongest_over_its_own_cell(row, column, size_wh_px):
    image = Image.new("RGB", size_wh_px, (60, 60, 60))
    # In grey levels the colour map is the strength itself: brightness grows with it over a dark picture.
    brightness_HW = np.asarray(tint(image, one_cell(row, column), colour_map="gray").convert("L"), int)
    width_px, height_px = size_wh_px
    geometry = Geometry(picture_hw_px=(height_px, width_px), input_hw_px=(224, 224), grid_hw=GRID_HW)
    top, left, bottom, right = geometry.cell_box_px(row, column)
    for y, x in np.argwhere(brightness_HW == brightness_HW.max()):
        assert top <= y + 0.5 <= bottom
        assert left <= x + 0.5 <= right
    middle = brightness_HW[int((top + bottom) / 2), int((left + right) / 2)]
    far_row, far_column = (0 if row > 3 else 6), (0 if column > 3 else 6)
    top, left, bottom, right = geometry.cell_box_px(far_row, far_column)
    assert middle > brightness_HW[int((top + bottom) / 2), int((left + right) / 2)]


def test_the_scale_of_a_map_does_not_change_its_picture():
    image = Image.linear_gradient("L").convert("RGB")
    weights_hw = np.random.default_rng(0).random(GRID_HW).astype(np.float32)
    expected = np.asarray(tint(image, weights_hw), int)
    for scale in (1e-4, 1 / weights_hw.sum(), 1e4):
        scaled = np.asarray(tint(image, weights_hw * np.float32(scale)), int)
        assert np.abs(scaled - expected).max() <= 1


def test_without_opacity_the_picture_stays():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    assert not changes(image, one_cell(2, 3), opacity=0.0).any()


def test_more_opacity_changes_more():
    image = Image.new("RGB", (70, 70), "white")
    totals = [changes(image, one_cell(3, 3), opacity=opacity).sum() for opacity in (0.0, 0.3, 0.65, 1.0)]
    assert totals == sorted(totals)
    assert len(set(totals)) == 4


@pytest.mark.parametrize("size_wh_px", [(1, 1), (1, 50), (50, 1), (3, 5)])
@pytest.mark.parametrize("weights_hw", [np.zeros(GRID_HW, np.float32), one_cell(0, 0), one_cell(0, 0, (1, 1))])
def test_tiny_pictures_and_empty_maps_are_drawn(size_wh_px, weights_hw):
    changes(Image.new("RGB", size_wh_px), weights_hw)


@pytest.mark.parametrize("opacity", [-0.1, 1.1, float("nan")])
def test_an_opacity_out_of_range_is_refused(opacity):
    with pytest.raises(ConfigError, match="opacity"):
        tint(Image.new("RGB", (8, 8)), one_cell(0, 0), opacity=opacity)


def test_an_unknown_colour_map_is_refused():
    with pytest.raises(ConfigError, match="'rainbows'"):
        tint(Image.new("RGB", (8, 8)), one_cell(0, 0), colour_map="rainbows")


def panels(figure):
    return [axes for axes in figure.axes if axes.images]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_a_figure_has_the_picture_and_one_panel_per_word(count):
    words = [DrawnWord(f"word{index}", one_cell(index % 7, 0)) for index in range(count)]
    image = Image.linear_gradient("L").convert("RGB")
    figure = draw_words(image, words, title="A title.")
    drawn = panels(figure)
    assert len(drawn) == count + 1
    np.testing.assert_array_equal(drawn[0].images[0].get_array(), np.asarray(image))
    for word, axes in zip(words, drawn[1:], strict=True):
        assert axes.get_title() == f"{word.text}  50%"
        np.testing.assert_array_equal(axes.images[0].get_array(), np.asarray(tint(image, word.attention)))
    assert figure.get_suptitle() == "A title."


def test_a_large_picture_is_drawn_small_and_left_alone():
    image = Image.new("RGB", (4000, 1000), "red")
    figure = draw_words(image, [DrawnWord("word", one_cell(0, 0))], title="")
    assert image.size == (4000, 1000)
    assert panels(figure)[0].images[0].get_array().shape == (FIGURE_SIDE_PX // 4, FIGURE_SIDE_PX, 3)


@pytest.mark.parametrize("size_wh_px", [(2000, 10), (10, 2000)])
def test_extreme_shapes_make_a_figure_of_sane_size(size_wh_px):
    words = [DrawnWord("word", one_cell(0, 0))] * 6
    figure = draw_words(Image.new("RGB", size_wh_px), words, title="A title.")
    assert all(1 < side_inches < 30 for side_inches in figure.get_size_inches())
    figure.canvas.draw()
    assert all(min(axes.get_position().transformed(figure.transFigure).size) > 50 for axes in panels(figure))  # pixels


def test_dollar_signs_are_no_mathematics():
    words = [DrawnWord(text, one_cell(0, 0)) for text in ("$5", "$x$", r"\$", "$\\frac{$")]
    figure = draw_words(Image.new("RGB", (20, 20)), words, title=r"It costs $5, $\nosuchcommand$.")
    figure.savefig(io.BytesIO(), format="png", dpi=30)  # mathematics would not parse


def test_drawing_uses_no_window(monkeypatch):
    import matplotlib.pyplot as plt

    draw_words(Image.new("RGB", (20, 20)), [], title="A title.")
    assert plt.get_fignums() == []
