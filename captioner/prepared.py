"""A picture decoded and resized for a model, without torch, so that other processes can do it cheaply.

source ──open_picture──▶ upright picture ──squash──▶ PreparedPicture (a square of 8-bit pixels)
"""

from __future__ import annotations

import concurrent.futures
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioner.config import PreprocessingConfig
from captioner.errors import ImageError
from captioner.images import DEFAULT_LIMITS, ImageLimits, Source, open_picture

FIGURE_SIDE_PX = 512
"""Longer side of a picture in a figure, and of the copy that is kept to draw one."""
DECODERS_LIMIT = 8
"""Pictures that one process decodes side by side, at most: each may take a few hundred MB."""


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


def side_to_open_px(config: PreprocessingConfig) -> int:
    """Return the `side_px` of `open_picture` for a model.

    An eighth less than the side of its square: libjpeg decodes at 1/2, 1/4 or 1/8 alone, and a square of 256 px from a
    photo of 640 x 480 at half scale differs little from one of the whole, at half the time. In training and in use
    alike.

    Args:
        config: of the model.

    Returns:
        The side, pixels.
    """
    return math.ceil(config.side_px * 7 / 8)


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
    picture = open_picture(cast(Source, recording or source), name=name, limits=limits, side_px=side_to_open_px(config))
    kept: Source | None = None
    if keep_source:
        kept = b"".join(recording.chunks) if recording is not None else _kept(source, picture.image)
    return PreparedPicture(
        name=picture.name,
        pixels_u8=square_u8(picture.image, config),
        picture_hw_px=picture.full_hw_px,
        source=kept,
    )


def prepare_side_by_side(
    pictures: Sequence[Source | PreparedPicture],
    prepare_one: Callable[[Source | PreparedPicture], PreparedPicture],
    *,
    threads: int,
) -> Iterator[PreparedPicture | ImageError]:
    """Prepare pictures on several threads: Pillow lets go of the interpreter while it decodes and resizes.

    Args:
        pictures: of which paths and bytes are prepared side by side; what shares a state with others, as open files
            do, in the caller's thread.
        prepare_one: what to do with each.
        threads: that may be used.

    Yields:
        Each as prepared, or why it cannot be read, in their order. What is not asked for is not begun.
    """

    def attempt(picture: Source | PreparedPicture) -> PreparedPicture | ImageError:
        try:
            return prepare_one(picture)
        except ImageError as err:
            return err

    apart = [isinstance(picture, str | os.PathLike | bytes) for picture in pictures]
    workers = min(threads, DECODERS_LIMIT, sum(apart))
    if workers < 2:
        yield from map(attempt, pictures)
        return
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(attempt, picture) if alone else None for picture, alone in zip(pictures, apart, strict=True)
        ]
        try:
            for picture, future in zip(pictures, futures, strict=True):
                yield attempt(picture) if future is None else future.result()
        finally:
            for future in futures:
                if future is not None:
                    future.cancel()


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
