"""What two captions must have in common to be the same, and what every caption must be."""

import numpy as np
import pytest
import torch

from captioner.images import open_picture
from captioner.preprocessing import to_pixels

TOLERANCE = 1e-5


def assert_same_words(found, expected, *, tolerance=TOLERANCE):
    assert [word.text for word in found] == [word.text for word in expected]
    for word, other in zip(found, expected, strict=True):
        assert word.probability == pytest.approx(other.probability, abs=tolerance)
        np.testing.assert_allclose(word.attention, other.attention, rtol=0, atol=tolerance)
        np.testing.assert_allclose(word.attention_heads, other.attention_heads, rtol=0, atol=tolerance)


def assert_same(found, expected, *, tolerance=TOLERANCE):
    """Assert that two captions, and their alternatives, are equal but for rounding."""
    assert found.text == expected.text
    assert found.score == pytest.approx(expected.score, abs=tolerance)
    assert_same_words(found.words, expected.words, tolerance=tolerance)
    assert found.finished == expected.finished
    assert found.geometry == expected.geometry
    assert len(found.alternatives) == len(expected.alternatives)
    for other, another in zip(found.alternatives, expected.alternatives, strict=True):
        assert_same(other, another, tolerance=tolerance)


def assert_map(weights, grid_hw):
    assert weights.dtype == np.float32
    assert weights.shape[-2:] == tuple(grid_hw)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=(-2, -1)), 1.0, rtol=0, atol=TOLERANCE)


def everything(caption):
    """A caption and its alternatives."""
    return (caption, *caption.alternatives)


def grid_of(captioner, picture):
    """The features of a picture, grid_1PC: those of the model's own encoder, but for rounding."""
    image = open_picture(picture, side_px=captioner.config.preprocessing.side_px).image
    pixels = to_pixels(image, captioner.config.preprocessing)[None]
    with torch.inference_mode():
        own = captioner.model.encoder(pixels.contiguous(memory_format=torch.channels_last))
    found = captioner.features([picture])
    assert (found - own).abs().max() <= 1e-4 * own.abs().max()
    return found


def with_nan(grid_BPC, spoilt_B):
    """The features of pictures, NaN for those that are named spoilt; of the array's own kind."""
    factor_B11 = np.where(spoilt_B, np.nan, 1.0).astype(np.float32)[:, None, None]
    return grid_BPC * (
        factor_B11 if isinstance(grid_BPC, np.ndarray) else torch.from_numpy(factor_B11).to(grid_BPC.device)
    )
