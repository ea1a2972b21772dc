"""Laws of the frames: original pixels, model pixels, grid cells."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from captioner.errors import ConfigError
from captioner.geometry import Geometry, exact_div, grid_to_picture

sides = st.integers(1, 60)
grids = st.tuples(st.integers(1, 8), st.integers(1, 8))
pictures = st.tuples(sides, sides)
maps = grids.flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=32, allow_subnormal=False))
)


def _geometry(picture_hw_px, grid_hw):
    return Geometry(picture_hw_px=picture_hw_px, input_hw_px=(224, 224), grid_hw=grid_hw)


@given(picture_hw_px=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)), grid_hw=grids)
def test_cells_tile_the_picture(picture_hw_px, grid_hw):
    geometry, (rows, columns) = _geometry(picture_hw_px, grid_hw), grid_hw
    boxes = [[geometry.cell_box_px(row, column) for column in range(columns)] for row in range(rows)]
    assert boxes[0][0][:2] == (0, 0)
    assert boxes[-1][-1][2:] == picture_hw_px
    for row in range(rows):
        for column in range(columns):
            top, left, bottom, right = boxes[row][column]
            assert bottom - top == pytest.approx(picture_hw_px[0] / rows)
            assert right - left == pytest.approx(picture_hw_px[1] / columns)
            # Neighbours share an edge to the bit: no gap and no overlap.
            assert row == 0 or boxes[row - 1][column][2] == top
            assert column == 0 or boxes[row][column - 1][3] == left


@pytest.mark.parametrize("cell", [(-1, 0), (0, -1), (2, 0), (0, 3)])
def test_a_cell_outside_the_grid_is_refused(cell):
    with pytest.raises(IndexError, match="outside the 2 x 3 grid"):
        _geometry((10, 10), (2, 3)).cell_box_px(*cell)


@settings(deadline=None)
@given(weights=maps, picture_hw_px=pictures)
def test_a_map_spreads_as_torch_interpolates(weights, picture_hw_px):
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(weights)[None, None], size=picture_hw_px, mode="bilinear", align_corners=False
    )[0, 0]
    spread = grid_to_picture(weights, picture_hw_px)
    assert spread.dtype == np.float32
    np.testing.assert_allclose(spread, expected.numpy(), rtol=0, atol=2e-5)


@settings(deadline=None)
@given(grid_hw=grids, scale=st.tuples(st.floats(1, 9), st.floats(1, 9)), data=st.data())
def test_the_peak_lands_in_its_own_cell(grid_hw, scale, data):
    row, column = (data.draw(st.integers(0, cells - 1)) for cells in grid_hw)
    picture_hw_px = tuple(int(np.ceil(cells * times)) for cells, times in zip(grid_hw, scale, strict=True))
    weights = np.zeros(grid_hw, dtype=np.float32)
    weights[row, column] = 1
    spread = grid_to_picture(weights, picture_hw_px)
    y, x = np.unravel_index(spread.argmax(), spread.shape)
    top, left, bottom, right = _geometry(picture_hw_px, grid_hw).cell_box_px(row, column)
    assert top <= y + 0.5 <= bottom
    assert left <= x + 0.5 <= right


@settings(deadline=None)
@given(grid_hw=grids, picture_hw_px=pictures, value=st.floats(0, 1, width=32, allow_subnormal=False))
def test_a_constant_map_stays_constant(grid_hw, picture_hw_px, value):
    spread = grid_to_picture(np.full(grid_hw, value, dtype=np.float32), picture_hw_px)
    np.testing.assert_allclose(spread, np.full(picture_hw_px, value), rtol=1e-6)


@settings(deadline=None)
@given(weights=maps, picture_hw_px=pictures)
def test_the_range_of_values_is_kept(weights, picture_hw_px):
    spread = grid_to_picture(weights, picture_hw_px)
    assert spread.shape == picture_hw_px
    assert spread.max() <= weights.max() * (1 + 1e-6)
    assert spread.min() >= weights.min() * (1 - 1e-6)


@settings(deadline=None)
@given(weights=maps)
def test_a_picture_of_the_grid_s_size_is_the_map_itself(weights):
    np.testing.assert_allclose(grid_to_picture(weights, weights.shape), weights, rtol=1e-6)


@settings(deadline=None)
@given(weights=maps, times=st.integers(1, 8))
def test_a_mirrored_map_spreads_to_a_mirrored_picture(weights, times):
    """No half-pixel shift in either direction."""
    picture_hw_px = (weights.shape[0] * times, weights.shape[1] * times)
    spread = grid_to_picture(weights, picture_hw_px)
    mirrored = grid_to_picture(weights[::-1, ::-1], picture_hw_px)
    np.testing.assert_allclose(mirrored[::-1, ::-1], spread, rtol=0, atol=1e-5)


@given(parts=st.integers(1, 1000), size=st.integers(0, 1000))
def test_exact_division_is_exact(parts, size):
    assert exact_div(parts * size, parts) == size


@pytest.mark.parametrize(("dividend", "divisor"), [(7, 2), (1, 3), (4, 0), (4, -2)])
def test_a_division_with_a_remainder_is_refused(dividend, divisor):
    with pytest.raises(ConfigError, match=f"{dividend} cannot be divided into parts of {divisor}"):
        exact_div(dividend, divisor)
