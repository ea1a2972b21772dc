"""The pictures of the benchmarks: 640 x 480 JPEG files, made from the photos of examples/."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZE_PX = (640, 480)
QUALITY = 90


@contextlib.contextmanager
def photo_files(count: int) -> Iterator[list[Path]]:
    """Make JPEG files, each of them another part of a photo.

    Args:
        count: how many.

    Yields:
        Their paths; they are gone afterwards.
    """
    examples = itertools.cycle(sorted(EXAMPLES.glob("*.jpg")))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{index:04}.jpg") for index in range(count)]
        for index, (path, example) in enumerate(zip(paths, examples, strict=False)):
            with Image.open(example) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
            place = (index + 0.5) / count  # so that two cuts of one photo differ
            ImageOps.fit(upright, SIZE_PX, centering=(place, place)).save(path, quality=QUALITY)
        yield paths
