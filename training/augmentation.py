"""Random changes of a training picture that leave its captions true. Of training alone."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageEnhance

from captioner.errors import ConfigError

_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far a training picture is changed.

    Args:
        mirror: probability of a left-right flip; pictures whose captions name a side are never flipped.
        min_area: a random part of the picture, at least this share of its area, takes the place of the whole.
        colour: brightness, contrast and saturation are each scaled by a factor within 1 ± this.
    """

    mirror: float = 0.5
    min_area: float = 0.7
    colour: float = 0.2

    def __post_init__(self) -> None:
        for name, low, high in (("mirror", 0.0, 1.0), ("min_area", 0.05, 1.0), ("colour", 0.0, 0.95)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"augmentation.{name} must be from {low} to {high}, got {getattr(self, name)!r}")


def mirror_allowed(captions: Sequence[str]) -> bool:
    """Return whether a mirror image would leave all captions true: none says left or right."""
    return not any(_SIDES.search(caption) for caption in captions)


def augment(image: Image.Image, settings: Augmentation, *, mirror: bool) -> Image.Image:
    """Return a randomly changed copy of a picture, of the same size; draws from Python's `random`.

    Args:
        image: RGB picture.
        settings: how far.
        mirror: whether it may be flipped.

    Returns:
        The changed picture.
    """
    if settings.min_area < 1:
        image = _random_part(image, settings.min_area)
    if mirror and random.random() < settings.mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.colour:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(1 + random.uniform(-settings.colour, settings.colour))
    return image


def _random_part(image: Image.Image, min_area: float) -> Image.Image:
    # Width and height shrink separately, so that the aspect ratio varies too, within 1 : 1 / min_area.
    across, down = (random.uniform(min_area**0.5, 1.0) for _ in range(2))
    width, height = image.width * across, image.height * down
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
