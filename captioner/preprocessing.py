"""Picture → normalised tensor. The settings travel with the weights; training and use share this file."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioner.config import PreprocessingConfig


def squash(image: Image.Image, *, side_px: int) -> Image.Image:
    """Resize an upright RGB picture to a square, aspect ratio not kept, nothing cropped.

    Args:
        image: upright RGB picture.
        side_px: side of the square, model pixels.

    Returns:
        The square picture; the same object when it already has that size.
    """
    if image.size == (side_px, side_px):
        return image
    # Pillow widens the filter when it shrinks, so that large pictures are not aliased. `reducing_gap` first
    # shrinks by a whole factor: several times faster on large pictures and, at 3, not told apart by eye.
    return image.resize((side_px, side_px), Image.Resampling.BILINEAR, reducing_gap=3.0)


def to_pixels(image: Image.Image, config: PreprocessingConfig) -> Tensor:
    """Turn an upright RGB picture into the encoder's input.

    Args:
        image: upright RGB picture of any size.
        config: side and normalisation.

    Returns:
        float32 [3, side, side], normalised.
    """
    square = np.asarray(squash(image, side_px=config.side_px))
    return normalise(torch.from_numpy(square.transpose(2, 0, 1).copy()), config)


def normalise(pixels_u8: Tensor, config: PreprocessingConfig) -> Tensor:
    """Scale 8-bit RGB to [0, 1] and standardise each channel.

    Args:
        pixels_u8: uint8 [..., 3, side, side].
        config: mean and standard deviation.

    Returns:
        float32 of the same shape.
    """
    mean = torch.tensor(config.mean, dtype=torch.float32, device=pixels_u8.device).view(3, 1, 1)
    std = torch.tensor(config.std, dtype=torch.float32, device=pixels_u8.device).view(3, 1, 1)
    return (pixels_u8.float() / 255.0 - mean) / std
