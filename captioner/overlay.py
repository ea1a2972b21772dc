"""Maps and pictures → pictures and figures. matplotlib is imported when something is drawn, not before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from captioner.errors import ConfigError
from captioner.geometry import Map, grid_to_picture
from captioner.prepared import FIGURE_SIDE_PX

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Perceptually even, and read the same way by people who are colour-blind (Nuñez et al. 2018).
COLOUR_MAP = "viridis"
OPACITY = 0.65
COLUMNS = 5


class DrawnWord(Protocol):
    """What a figure needs of a word; `captioner.Word` has it."""

    @property
    def text(self) -> str:
        """The word as it is read."""

    @property
    def probability(self) -> float:
        """In [0, 1]."""

    @property
    def attention(self) -> Map:
        """float32 [rows, columns], non-negative."""


def tint(image: Image.Image, weights_hw: Map, *, opacity: float = OPACITY, colour_map: str = COLOUR_MAP) -> Image.Image:
    """Lay a map over a picture: the more a place was looked at, the stronger the colour; the rest grows darker.

    The map is scaled to its own peak, so that it shows where, not how sharply.

    Args:
        image: RGB picture.
        weights_hw: non-negative weights of the grid cells, float [rows, columns], over the whole picture.
        opacity: of the colour at the peak, from 0 to 1.
        colour_map: name of a matplotlib colour map.

    Returns:
        RGB picture of the same size.

    Raises:
        ConfigError: for an opacity outside [0, 1] or an unknown colour map.
    """
    if not 0.0 <= opacity <= 1.0:
        raise ConfigError(f"opacity must be from 0 to 1, got {opacity!r}")
    import matplotlib

    if colour_map not in matplotlib.colormaps:
        raise ConfigError(f"colour_map {colour_map!r} is not one of matplotlib's; try viridis, cividis or inferno")
    spread_hw = grid_to_picture(weights_hw, (image.height, image.width))
    # One scale for the picture: the peak among the cells, which the spread map reaches at a cell's centre.
    strength_hw = np.clip(spread_hw / max(float(np.max(weights_hw)), 1e-12), 0.0, 1.0)
    colour_hw3 = matplotlib.colormaps[colour_map](strength_hw)[..., :3] * 255.0
    share_hw1 = (opacity * (0.35 + 0.65 * strength_hw))[..., None]
    blended = np.asarray(image, dtype=np.float32) * (1 - share_hw1) + colour_hw3 * share_hw1
    return Image.fromarray(np.rint(blended).astype(np.uint8), "RGB")


def draw_words(image: Image.Image, words: Sequence[DrawnWord], *, title: str, colour_map: str = COLOUR_MAP) -> Figure:
    """Draw the picture, and under each word its map over the picture.

    Args:
        image: upright RGB picture.
        words: with their maps.
        title: above all; the caption.
        colour_map: name of a matplotlib colour map.

    Returns:
        A matplotlib figure that belongs to no window: save it with `savefig`.
    """
    from matplotlib.figure import Figure

    small = image.copy()
    small.thumbnail((FIGURE_SIDE_PX, FIGURE_SIDE_PX))
    columns = min(COLUMNS, len(words) + 1)
    rows = math.ceil((len(words) + 1) / columns)
    aspect = min(3.0, max(1 / 3, small.height / small.width))
    pixel_aspect = aspect * small.width / small.height  # 1, but for a picture that would be a mere line
    figure = Figure(figsize=(2.3 * columns, (2.3 * aspect + 0.35) * rows + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(small, aspect=pixel_aspect)
    for axis, word in zip(axes[1:], words, strict=False):
        axis.imshow(tint(small, word.attention, colour_map=colour_map), aspect=pixel_aspect)
        axis.set_title(_plain(f"{word.text}  {word.probability:.0%}"), fontsize=11)
    figure.suptitle(_plain(title), fontsize=13, wrap=True)
    return figure


def _plain(text: str) -> str:
    # matplotlib reads what stands between two dollar signs as mathematics.
    return text.replace("$", r"\$")
