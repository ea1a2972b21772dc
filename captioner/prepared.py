"""A picture decoded and resized for a model, without torch, so that other processes can do it cheaply.

source ──open_picture──▶ upright picture ──squash──▶ PreparedPicture (a square of 8-bit pixels)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioner.config import PreprocessingConfig
from captioner.images import DEFAULT_LIMITS, ImageLimits, Source, open_picture

FIGURE_SIDE_PX = 512
"""Longer side of a picture in a figure, and of the copy that is kept to draw one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedPicture:
    """A picture decoded and resized for a model: what `Captioner` takes as a picture too, without any more work.

    It can be pickled, so that other processes can decode for one that holds the model.

    Args:
        name: of the picture, for messages.
        pixels_u8: uint8 [3, side, side], the whole upright picture squashed to the model's square.
        picture_hw_px: height and width of the upright original, pixels.
        source: where the picture can be opened again, to draw it; None when it was not kept.
    """

    name: str
    pixels_u8: npt.NDArray[np.uint8]
    picture_hw_px: tuple[int, int]
    source: Source | None = None


def prepare(
    source: Source,
    config: PreprocessingConfig,
    *,
    name: str | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    keep_source: bool = True,
) -> PreparedPicture:
    """Open a picture and resize it for a model.

    Args:
        source: any of `Source`.
        config: of the model, `captioner.config.preprocessing`.
        name: what to call the picture in messages; default: its path, or "<bytes>", "<array>" and the like.
        limits: of pixels and bytes.
        keep_source: keep where the picture came from, so that figures can be drawn: a path as a path, bytes as they
            are, and of an array, tensor or `PIL.Image`, which its owner may change, a small copy.

    Returns:
        The prepared picture.

    Raises:
        ImageError: when the picture cannot be read.
    """
    recording = _Recording(source) if hasattr(source, "read") else None
    picture = open_picture(cast(Source, recording or source), name=name, limits=limits, side_px=config.side_px)
    kept: Source | None = None
    if keep_source:
        kept = b"".join(recording.chunks) if recording is not None else _kept(source, picture.image)
    return PreparedPicture(
        name=picture.name,
        pixels_u8=square_u8(picture.image, config),
        picture_hw_px=picture.full_hw_px,
        source=kept,
    )


def _kept(source: Source, image: Image.Image) -> Source:
    if isinstance(source, str | os.PathLike):
        # A relative path would mean another file once the program changes its folder.
        return Path(os.fsdecode(source)).absolute()
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    return _thumbnail(image)  # of an array, tensor or image, which its owner may change


def _thumbnail(image: Image.Image) -> Image.Image:
    """Return what a figure needs of a picture; cheap, since most captions are never drawn."""
    if max(image.size) <= FIGURE_SIDE_PX:
        return image
    scale = FIGURE_SIDE_PX / max(image.size)
    width_px, height_px = (max(1, round(scale * side_px)) for side_px in image.size)
    # Four samples make a pixel: all of them would take ten times as long and look hardly better at this size.
    return image.resize((2 * width_px, 2 * height_px), Image.Resampling.NEAREST).reduce(2)


class _Recording:
    """A binary file that keeps what is read from it, since it can be read only once.

    Args:
        file: to read from.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.name = getattr(file, "name", None)
        self.chunks: list[bytes] = []

    def read(self, size: int) -> bytes:
        """Return the next bytes of the file, at most `size`."""
        chunk: bytes = self._file.read(size)
        if isinstance(chunk, bytes | bytearray | memoryview):  # else `open_picture` says what is wrong with it
            self.chunks.append(bytes(chunk))
        return chunk


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


def square_u8(image: Image.Image, config: PreprocessingConfig) -> npt.NDArray[np.uint8]:
    """Squash an upright RGB picture to the square that a model takes.

    Args:
        image: upright RGB picture of any size.
        config: its side.

    Returns:
        uint8 [3, side, side].
    """
    return np.asarray(squash(image, side_px=config.side_px)).transpose(2, 0, 1).copy()
