"""Maps that point: of a mosaic of four photos, how much attention of a caption's words falls on its own photo.

Four photos are laid out as one picture, the true caption of one of them is read to the model, and of every content
word the share of its attention that lies in the right quadrant is taken. Chance, and the `mean` decoder, is a quarter.

Shapes: M mosaics, L layers, H heads, P grid cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captioner import Captioner, Word
from captioner.config import MultiheadConfig
from captioner.errors import ConfigError, DataError
from captioner.images import open_picture
from captioner.metrics import Interval
from captioner.metrics.intervals import bootstrap
from captioner.prepared import squash
from training.mosaics import PARTS, has_content, quadrant_shares
from training.sources import CaptionedPicture

CHANCE = 1 / PARTS
RESAMPLES, CONFIDENCE = 1000, 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PointingScore:
    """How well a model's maps point.

    Args:
        share: mean over all content words of the share of `Word.attention` in the right quadrant; chance is 0.25.
        interval: of it, 95 %, bootstrap over mosaics.
        by_quadrant: the mean of the mosaics whose caption belongs to the quadrant, from top left to bottom right, row
            by row.
        by_head: mean share of every layer and head, [layers][heads].
        by_layer: mean of every layer over its heads. That of the mean map of some layers is the mean of theirs.
        map_layers: which layers `Word.attention` is the mean of; empty for a decoder without layers to choose from.
        words: content words in all.
        mosaics: how many.
        seed: that chose the photos.
    """

    share: float
    interval: Interval
    by_quadrant: tuple[float, ...]
    by_head: tuple[tuple[float, ...], ...]
    by_layer: tuple[float, ...]
    map_layers: tuple[int, ...]
    words: int
    mosaics: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON.

        Returns:
            The fields by name.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PointingScore:
        """Read what `to_dict` gave, after its way through JSON.

        Args:
            values: the fields by name.

        Returns:
            The score.
        """
        return cls(
            **{
                **values,
                "interval": Interval(**values["interval"]),
                "by_quadrant": tuple(values["by_quadrant"]),
                "by_head": tuple(tuple(layer) for layer in values["by_head"]),
                "by_layer": tuple(values["by_layer"]),
                "map_layers": tuple(values["map_layers"]),
            }
        )


@dataclass(frozen=True)
class _Asked:
    """A mosaic to be: the four pictures in the order of the quadrants, whose caption is read, and the caption."""

    pictures: tuple[int, ...]
    quadrant: int
    caption: str


def pointing(
    captioner: Captioner, pictures: Sequence[CaptionedPicture], *, mosaics: int = 400, seed: int = 0
) -> PointingScore:
    """Measure how well the maps of a model point.

    The mosaics depend on the seed, the pictures and the vocabulary alone, so that two models with one vocabulary are
    asked the same.

    Args:
        captioner: the model.
        pictures: that it was not trained on, with their captions; four different ones make a mosaic.
        mosaics: how many, at least 4: each quadrant has its turn.
        seed: of the choice of pictures.

    Returns:
        The score.

    Raises:
        ConfigError: for fewer than 4 mosaics, or a model whose input has an odd side.
        DataError: for fewer than 4 pictures, or when no caption of any has only words that the model knows.
        ImageError: when a picture cannot be read.
    """
    side_px = captioner.config.preprocessing.side_px
    if mosaics < PARTS:
        raise ConfigError(f"mosaics must be at least {PARTS}, so that each quadrant has its turn, got {mosaics}")
    if side_px % 2:
        raise ConfigError(f"mosaics need a model input of an even side, this model's has {side_px} px")
    shares_4P = quadrant_shares(captioner.model.encoder.grid_hw).double().numpy()
    sums_M2, heads = np.zeros((mosaics, 2)), []
    quadrants = []
    for row, asked in enumerate(_choose(captioner, pictures, mosaics=mosaics, seed=seed)):
        parts = [
            squash(open_picture(pictures[i].path, side_px=side_px // 2).image, side_px=side_px // 2)
            for i in asked.pictures
        ]
        words = _content(captioner.score(lay_out(parts), asked.caption).words)
        share_P = shares_4P[asked.quadrant]
        sums_M2[row] = sum(_share(word.attention, share_P) for word in words), len(words)
        heads += [_share(word.attention_heads, share_P) for word in words]
        quadrants.append(asked.quadrant)
    by_head = np.mean(heads, axis=0)
    settings = captioner.config.decoder_settings
    return PointingScore(
        share=float(_ratio(sums_M2.sum(axis=0, keepdims=True))[0, 0]),
        interval=bootstrap(sums_M2, _ratio, resamples=RESAMPLES, confidence=CONFIDENCE, seed=seed)[0],
        by_quadrant=tuple(
            float(_ratio(sums_M2[np.array(quadrants) == part].sum(axis=0, keepdims=True))[0, 0])
            for part in range(PARTS)
        ),
        by_head=tuple(tuple(layer) for layer in by_head.tolist()),
        by_layer=tuple(by_head.mean(axis=1).tolist()),
        map_layers=_map_layers(settings) if isinstance(settings, MultiheadConfig) else (),
        words=len(heads),
        mosaics=mosaics,
        seed=seed,
    )


def lay_out(parts: Sequence[Image.Image]) -> Image.Image:
    """Lay four pictures of one size out as one.

    Args:
        parts: from top left to bottom right, row by row.

    Returns:
        RGB, twice as wide and twice as high.
    """
    width_px, height_px = parts[0].size
    mosaic = Image.new("RGB", (2 * width_px, 2 * height_px))
    for index, part in enumerate(parts):
        mosaic.paste(part, (index % 2 * width_px, index // 2 * height_px))
    return mosaic


def _choose(captioner: Captioner, pictures: Sequence[CaptionedPicture], *, mosaics: int, seed: int) -> Iterator[_Asked]:
    if len(pictures) < PARTS:
        raise DataError(f"mosaics need at least {PARTS} pictures, got {len(pictures)}")
    captions = [_readable(captioner, picture) for picture in pictures]
    if not any(captions):
        raise DataError(
            f"mosaics: no caption of {len(pictures)} pictures has content and only words that the model knows; give "
            "pictures like those that it was trained on"
        )
    for index in range(mosaics):
        # A generator of its own for each: the first mosaics are the same, however many follow.
        order = np.random.default_rng([seed, index]).permutation(len(pictures)).tolist()
        told = next(picture for picture in order if captions[picture])
        others = [picture for picture in order if picture != told][: PARTS - 1]
        quadrant = index % PARTS
        others.insert(quadrant, told)
        yield _Asked(tuple(others), quadrant, captions[told])


def _readable(captioner: Captioner, picture: CaptionedPicture) -> str:
    """Return the first caption that the model can read and that has a content word; "" when there is none."""
    tokenizer = captioner.tokenizer
    for caption in picture.captions:
        words = tokenizer.split(caption)
        fits = len(words) < captioner.config.max_tokens and not tokenizer.unknown_words(caption)
        if fits and any(map(has_content, words)):
            return caption
    return ""


def _content(words: Sequence[Word]) -> list[Word]:
    return [word for word in words if has_content(word.text)]


def _share(maps: NDArray[np.float32], share_P: Floats) -> Any:
    """Return the part of each map [..., rows, columns] that lies where `share_P` says, in float64."""
    flat = maps.astype(np.float64).reshape(*maps.shape[:-2], -1)
    return (flat @ share_P) / flat.sum(axis=-1)


def _ratio(sums_R2: Floats) -> Floats:
    return np.asarray(sums_R2[:, :1] / sums_R2[:, 1:])


def _map_layers(settings: MultiheadConfig) -> tuple[int, ...]:
    return tuple(sorted({layer % settings.layers for layer in settings.map_layers or range(settings.layers)}))
