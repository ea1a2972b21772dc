"""Frames: original picture pixels, model pixels and cells of the attention grid.

Every size is (height, width), every position (y, x); the unit stands in the name. The model input is the
whole upright picture squashed to a square, so that the three frames are the same picture at three scales and
nothing is cropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captioner.errors import ConfigError

Map = npt.NDArray[np.float32]


def exact_div(dividend: int, divisor: int) -> int:
    """Return dividend / divisor; `ConfigError` when a remainder would be lost."""
    if divisor < 1 or dividend % divisor:
        raise ConfigError(f"{dividend} cannot be divided into parts of {divisor}; choose a multiple of {divisor}")
    return dividend // divisor


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one picture lies under the model's input and under the attention grid.

    Args:
        picture_hw_px: size of the upright original, original pixels.
        input_hw_px: size of the model's input, model pixels.
        grid_hw: rows and columns of the attention grid.
    """

    picture_hw_px: tuple[int, int]
    input_hw_px: tuple[int, int]
    grid_hw: tuple[int, int]

    def cell_box_px(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Return (top, left, bottom, right) of a grid cell in original pixels.

        Args:
            row: row of the grid, from the top.
            column: column of the grid, from the left.

        Returns:
            The box, original pixels, not rounded.

        Raises:
            IndexError: for a cell outside the grid.
        """
        rows, columns = self.grid_hw
        if not (0 <= row < rows and 0 <= column < columns):
            raise IndexError(f"cell ({row}, {column}) is outside the {rows} x {columns} grid")
        height_px, width_px = self.picture_hw_px
        return (
            row * height_px / rows,
            column * width_px / columns,
            (row + 1) * height_px / rows,
            (column + 1) * width_px / columns,
        )


def grid_to_picture(weights_hw: Map, picture_hw_px: tuple[int, int]) -> Map:
    """Spread a map of the grid over the picture's pixels.

    Bilinear between the centres of the cells and constant beyond the outermost ones (half-pixel centres, as
    `torch.nn.functional.interpolate(align_corners=False)`), so that the peak stays over its own cell in
    pictures of every shape. The values are densities on the scale of the grid, not renormalised: the maximum
    never grows.

    Args:
        weights_hw: weights of the cells, float32 [rows, columns].
        picture_hw_px: size to fill, pixels.

    Returns:
        float32 [height, width].
    """

    def taps(cells: int, pixels: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Map]:
        position = (np.arange(pixels) + 0.5) * (cells / pixels) - 0.5
        low = np.clip(np.floor(position), 0, cells - 1).astype(np.intp)
        high = np.minimum(low + 1, cells - 1)
        return low, high, np.clip(position - low, 0.0, 1.0).astype(np.float32)

    weights_hw = np.asarray(weights_hw, dtype=np.float32)
    top, bottom, down = taps(weights_hw.shape[0], picture_hw_px[0])
    left, right, across = taps(weights_hw.shape[1], picture_hw_px[1])
    rows = weights_hw[top] * (1 - down)[:, None] + weights_hw[bottom] * down[:, None]
    spread = rows[:, left] * (1 - across) + rows[:, right] * across
    return spread.astype(np.float32, copy=False)
