"""Pictures of other worlds, which no caption of everyday photos fits: noise, patterns, documents, charts, drawings.

All are made here, from a seed; none is read. They measure whether the confidence of a caption falls where the model
has never been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from captioner.errors import ConfigError

_Colour = tuple[int, int, int]
_WORDS = (
    "account",
    "address",
    "amount",
    "annual",
    "balance",
    "board",
    "budget",
    "clause",
    "company",
    "contract",
    "cost",
    "date",
    "delivery",
    "department",
    "due",
    "estimate",
    "fiscal",
    "form",
    "goods",
    "hereby",
    "income",
    "insurance",
    "interest",
    "invoice",
    "item",
    "law",
    "letter",
    "loan",
)


def _colour(rng: random.Random, low: int = 0, high: int = 255) -> _Colour:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _noise(rng: random.Random, side_px: int) -> Image.Image:
    """Return white noise at a random scale, grey or coloured."""
    cells = rng.choice([side_px, side_px // 2, side_px // 4, side_px // 16])
    values = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    if rng.random() < 0.4:
        image = image.convert("L").convert("RGB")
    return image.resize((side_px, side_px), rng.choice([Image.Resampling.NEAREST, Image.Resampling.BICUBIC]))


def _pattern(rng: random.Random, side_px: int) -> Image.Image:
    """Return a gradient, stripes, a chequerboard or waves."""
    y, x = np.mgrid[0:side_px, 0:side_px] / side_px
    angle, periods = rng.uniform(0, math.pi), rng.uniform(1, 20)
    along = x * math.cos(angle) + y * math.sin(angle)
    kind = rng.choice(["gradient", "stripes", "chequers", "waves"])
    if kind == "gradient":
        level = along
    elif kind == "stripes":
        level = (along * periods) % 1 > 0.5
    elif kind == "chequers":
        level = ((x * periods).astype(int) + (y * periods).astype(int)) % 2
    else:
        level = 0.5 + 0.5 * np.sin(along * periods * 6 + 4 * np.sin(y * periods))
    first, second = np.array(_colour(rng)), np.array(_colour(rng))
    mixed = first + (second - first) * np.asarray(level, dtype=np.float64)[..., None]
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _document(rng: random.Random, side_px: int) -> Image.Image:
    """Return a page of text: a letter, a form or a table of figures."""
    paper = rng.randint(235, 255)
    image = Image.new("RGB", (side_px, side_px), (paper, paper, paper - rng.randint(0, 12)))
    draw, ink = ImageDraw.Draw(image), _colour(rng, 0, 60)
    size_px = rng.randint(side_px // 28, side_px // 14)
    font = ImageFont.load_default(size_px)
    margin, line = side_px // 12, int(size_px * 1.4)
    columns = rng.choice([0, 0, 3, 4])
    for row, top in enumerate(range(margin, side_px - margin, line)):
        if columns:
            for column in range(columns):
                text = rng.choice(_WORDS) if column == 0 or row == 0 else f"{rng.uniform(0, 9999):.2f}"
                draw.text((margin + column * (side_px - margin) // columns, top), text, fill=ink, font=font)
            draw.line((margin, top + line - 2, side_px - margin, top + line - 2), fill=ink)
        elif rng.random() > 0.15:
            words = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(4, 12)))
            draw.text((margin, top), words, fill=ink, font=font)
    return image


def _chart(rng: random.Random, side_px: int) -> Image.Image:
    """Return bars, lines or a pie on a white ground, with axes and words."""
    image = Image.new("RGB", (side_px, side_px), "white")
    draw, margin = ImageDraw.Draw(image), side_px // 8
    font = ImageFont.load_default(max(8, side_px // 24))
    draw.text((margin, margin // 4), " ".join(rng.sample(_WORDS, 3)), fill="black", font=font)
    kind, inner = rng.choice(["bars", "lines", "pie"]), side_px - 2 * margin
    if kind == "pie":
        cuts = sorted(rng.uniform(0, 360) for _ in range(rng.randint(3, 7)))
        for start, end in zip(cuts, [*cuts[1:], cuts[0] + 360], strict=True):
            draw.pieslice((margin, margin, side_px - margin, side_px - margin), start, end, fill=_colour(rng))
        return image
    draw.line((margin, margin, margin, side_px - margin, side_px - margin, side_px - margin), fill="black", width=2)
    count = rng.randint(4, 12)
    for _series in range(rng.randint(1, 3)):
        colour, heights = _colour(rng), [rng.uniform(0.05, 1) * inner for _ in range(count)]
        places = [margin + (index + 0.5) * inner / count for index in range(count)]
        points = [(place, side_px - margin - height) for place, height in zip(places, heights, strict=True)]
        if kind == "lines":
            draw.line(points, fill=colour, width=2)
            continue
        for left, top in points:
            draw.rectangle((left - inner / count / 3, top, left + inner / count / 3, side_px - margin), fill=colour)
    return image


def _drawing(rng: random.Random, side_px: int) -> Image.Image:
    """Return strokes or flat shapes, as of a pen or a paint program."""
    image = Image.new("RGB", (side_px, side_px), _colour(rng, 225, 255))
    draw = ImageDraw.Draw(image)
    outline = rng.random() < 0.5
    for _shape in range(rng.randint(4, 14)):
        left, top = rng.uniform(-0.1, 0.8) * side_px, rng.uniform(-0.1, 0.8) * side_px
        width, height = rng.uniform(0.1, 0.5) * side_px, rng.uniform(0.1, 0.5) * side_px
        box, colour = (left, top, left + width, top + height), _colour(rng)
        fill = None if outline else colour
        kind = rng.choice(["ellipse", "rectangle", "polygon", "stroke"])
        if kind == "ellipse":
            draw.ellipse(box, outline=colour, fill=fill, width=2)
        elif kind == "rectangle":
            draw.rectangle(box, outline=colour, fill=fill, width=2)
        else:
            points = [(left + rng.random() * width, top + rng.random() * height) for _ in range(rng.randint(3, 8))]
            if kind == "polygon":
                draw.polygon(points, outline=colour, fill=fill, width=2)
            else:
                draw.line(points, fill=colour, width=rng.randint(1, 6), joint="curve")
    return image


def _blur(rng: random.Random, side_px: int) -> Image.Image:
    """Return clouds of colour without any shape."""
    return _noise(rng, side_px).filter(ImageFilter.GaussianBlur(side_px / rng.uniform(6, 20)))


KINDS: dict[str, Callable[[random.Random, int], Image.Image]] = {
    "noise": _noise,
    "pattern": _pattern,
    "document": _document,
    "chart": _chart,
    "drawing": _drawing,
    "blur": _blur,
}


def other_worlds(count: int, *, seed: int = 0, side_px: int = 256) -> Iterator[tuple[str, Image.Image]]:
    """Yield pictures of other worlds, the kinds in turn; a function of the arguments alone.

    Args:
        count: how many.
        seed: of what is random.
        side_px: of the square pictures.

    Yields:
        The kind and the RGB picture.

    Raises:
        ConfigError: for fewer than 0 pictures, or a side below 64 px.
    """
    if count < 0 or side_px < 64:
        raise ConfigError(f"other_worlds: count must be at least 0 and side_px at least 64, got {count}, {side_px}")
    names = list(KINDS)
    for index in range(count):
        kind = names[index % len(names)]
        yield kind, KINDS[kind](random.Random(f"{seed} {kind} {index}"), side_px)
