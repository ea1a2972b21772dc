"""Laws of preprocessing, and parity with torchvision and with plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from captioner.config import PreprocessingConfig
from captioner.prepared import squash
from captioner.preprocessing import normalise, to_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _noise(width_px, height_px, *, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _triangle(side_px, length_px):
    """Return the matrix of an antialiased bilinear resize: rows of weights over the source pixels."""
    scale = length_px / side_px
    width = max(scale, 1.0)
    centres = (np.arange(side_px) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(length_px) + 0.5 - centres[:, None]) / width)
    return weights / weights.sum(axis=1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(width=st.integers(1, 150), height=st.integers(1, 150), seed=st.integers(0, 99))
def test_pixels_equal_a_plain_numpy_computation(width, height, seed):
    image, config = _noise(width, height, seed=seed), PreprocessingConfig(side_px=32)
    source = np.asarray(image).astype(np.float64)
    resized = np.einsum("ih,jw,hwc->cij", _triangle(32, height), _triangle(32, width), source)
    expected = (resized / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    pixels = to_pixels(image, config)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    # Pillow rounds to 8 bits after each of its two passes.
    np.testing.assert_allclose(pixels.numpy(), expected, rtol=0, atol=1.1 / 255 / min(STD))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (40, 100), (131, 33), (500, 375)])
def test_pixels_equal_torchvision_transforms(width, height):
    image = _noise(width, height)
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((96, 96), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    pixels = to_pixels(image, PreprocessingConfig(side_px=96))
    torch.testing.assert_close(pixels, torch.as_tensor(transform(image)), rtol=0, atol=1.1 / 255 / min(STD))


def test_a_large_picture_differs_little_from_an_exact_resize():
    """Shrinking by a whole factor first is an approximation: here is how good it is."""
    y, x = np.mgrid[0:1500, 0:2000]
    waves = 127.5 + 127.5 * np.sin(x / 37 + y / 91)[..., None] * np.array([1.0, 0.7, 0.3])
    image = Image.fromarray(waves.astype(np.uint8))
    exact = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(np.asarray(squash(image, side_px=64), dtype=float) - exact).max() <= 4


def test_black_and_white_map_to_the_ends_of_the_range():
    config = PreprocessingConfig()
    for value in (0, 255):
        pixels = to_pixels(Image.new("RGB", (300, 200), (value,) * 3), config)
        for channel in range(3):
            expected = (value / 255 - config.mean[channel]) / config.std[channel]
            torch.testing.assert_close(pixels[channel], torch.full((224, 224), expected), rtol=0, atol=1e-6)


def test_channels_stay_red_green_blue():
    config = PreprocessingConfig(side_px=32, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = to_pixels(Image.new("RGB", (32, 32), (255, 51, 0)), config)
    torch.testing.assert_close(pixels.mean(dim=(1, 2)), torch.tensor([1.0, 0.2, 0.0]))


def test_rows_stay_rows():
    image = Image.new("RGB", (32, 32))
    image.putpixel((5, 20), (255, 255, 255))  # Pillow: (x, y)
    pixels = to_pixels(image, PreprocessingConfig(side_px=32))
    assert divmod(int(pixels[0].argmax()), 32) == (20, 5)


def test_squash_leaves_a_picture_of_that_size_alone():
    image = _noise(224, 224)
    assert squash(image, side_px=224) is image


@settings(deadline=None, max_examples=20)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_squash_is_idempotent_and_keeps_the_whole_picture(width, height):
    image = Image.new("RGB", (width, height), (9, 99, 199))
    once = squash(image, side_px=48)
    assert once.size == (48, 48)
    assert squash(once, side_px=48) is once
    assert once.getcolors() == [(48 * 48, (9, 99, 199))]


def test_squash_crops_nothing():
    image = Image.new("RGB", (400, 100))
    for x, colour in ((0, (255, 0, 0)), (200, (0, 255, 0))):
        image.paste(colour, (x, 0, x + 200, 100))
    square = np.asarray(squash(image, side_px=64))
    assert (square[:, 1] == (255, 0, 0)).all()
    assert (square[:, 62] == (0, 255, 0)).all()


def test_the_picture_of_the_caller_is_not_changed():
    image = _noise(224, 224)
    before = image.tobytes()
    to_pixels(image, PreprocessingConfig()).fill_(7)
    assert image.tobytes() == before


def test_a_batch_is_normalised_like_its_pictures():
    batch = torch.randint(0, 256, (3, 2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = PreprocessingConfig(side_px=32)
    together = normalise(batch, config)
    for first in range(3):
        for second in range(2):
            assert torch.equal(together[first, second], normalise(batch[first, second], config))
