"""Picture → normalised tensor. The settings travel with the weights; training and use share this file."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from captioner.config import PreprocessingConfig
from captioner.prepared import square_u8


def to_pixels(image: Image.Image, config: PreprocessingConfig) -> Tensor:
    """Turn an upright RGB picture into the encoder's input.

    Args:
        image: upright RGB picture of any size.
        config: side and normalisation.

    Returns:
        float32 [3, side, side], normalised.
    """
    return normalise(torch.from_numpy(square_u8(image, config)), config)


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
