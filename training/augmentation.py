"""Random changes of a training picture that leave its captions true. Of training alone."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from PIL import Image, ImageEnhance
from torchvision.transforms import InterpolationMode, v2

from captioner.config import PreprocessingConfig
from captioner.errors import ConfigError
from captioner.prepared import side_to_open_px

# The mean colour of ImageNet: near zero once normalised, so that what is blank says nothing.
_BLANK_RGB = (124, 116, 104)
_MOST_MAGNITUDE = 30
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far a training picture is changed.

    Args:
        mirror: probability of a left-right flip; pictures whose captions name a side are never flipped.
        min_area: a random part of the picture, at least this share of its area, takes the place of the whole.
        colour: brightness, contrast and saturation are each scaled by a factor within 1 ± this.
        rand_augment: number of operations that RandAugment (Cubuk et al. 2020) draws for each picture; 0: none. It
            shears, shifts, turns and recolours, and never mirrors.
        rand_augment_magnitude: of these operations, from 0 to 30; None: 9, as in the paper.
        erase: probability that a rectangle of 2 to 33 % of the picture is blanked (Zhong et al. 2020).
    """

    mirror: float = 0.5
    min_area: float = 0.7
    colour: float = 0.2
    rand_augment: int = 0
    rand_augment_magnitude: int | None = None
    erase: float = 0.0

    def __post_init__(self) -> None:
        numbers = (("mirror", 0.0, 1.0), ("min_area", 0.05, 1.0), ("colour", 0.0, 0.95), ("erase", 0.0, 1.0))
        for name, low, high in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"augmentation.{name} must be from {low} to {high}, got {value!r}")
        for name, most in (("rand_augment", 10), ("rand_augment_magnitude", _MOST_MAGNITUDE)):
            value = getattr(self, name)
            if value is None and name == "rand_augment_magnitude":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ConfigError(f"augmentation.{name} must be a whole number from 0 to {most}, got {value!r}")
        if self.rand_augment_magnitude is not None and not self.rand_augment:
            raise ConfigError("augmentation.rand_augment_magnitude has no effect while rand_augment is 0; set both")


def mirror_allowed(captions: Sequence[str]) -> bool:
    """Return whether a mirror image would leave all captions true: none says left or right."""
    return not any(_SIDES.search(caption) for caption in captions)


def side_to_open_part_px(config: PreprocessingConfig, settings: Augmentation | None) -> int:
    """Return the side at which to open a picture, so that a part of it has as many pixels as a whole one would.

    Args:
        config: of the model.
        settings: of the augmentation; None: none.

    Returns:
        The `side_px` of `open_picture`.
    """
    whole_px = side_to_open_px(config)
    return whole_px if settings is None else math.ceil(whole_px / math.sqrt(settings.min_area))


def augment(image: Image.Image, settings: Augmentation, *, mirror: bool, rng: random.Random) -> Image.Image:
    """Return a randomly changed copy of a picture, of the same size.

    A function of its arguments and the state of `rng` alone; no global generator is read or left changed. Not for
    several threads at once: while torchvision draws, torch's global generator is set aside.

    Args:
        image: RGB picture.
        settings: how far.
        mirror: whether it may be flipped.
        rng: the source of all randomness.

    Returns:
        The changed picture.
    """
    if settings.min_area < 1:
        image = _random_part(image, settings.min_area, rng)
    if mirror and rng.random() < settings.mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.colour:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(1 + rng.uniform(-settings.colour, settings.colour))
    if settings.rand_augment or settings.erase:
        image = _torchvision(image, settings, rng)
    return image


def _random_part(image: Image.Image, min_area: float, rng: random.Random) -> Image.Image:
    # Width and height shrink separately, so that the aspect ratio varies too, within 1 : 1 / min_area.
    across, down = (rng.uniform(min_area**0.5, 1.0) for _ in range(2))
    width, height = image.width * across, image.height * down
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def _torchvision(image: Image.Image, settings: Augmentation, rng: random.Random) -> Image.Image:
    magnitude = settings.rand_augment_magnitude
    changes = v2.Compose(
        [
            v2.RandAugment(
                num_ops=settings.rand_augment,
                magnitude=9 if magnitude is None else magnitude,
                num_magnitude_bins=_MOST_MAGNITUDE + 1,
                interpolation=InterpolationMode.BILINEAR,
                fill=list(_BLANK_RGB),
            ),
            v2.RandomErasing(p=settings.erase, value=_BLANK_RGB),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the generators of all GPUs too.
        torch.default_generator.manual_seed(rng.getrandbits(63))
        return cast(Image.Image, changes(image))
