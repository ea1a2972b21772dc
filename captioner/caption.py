"""The results: `Caption` and `Word`, frozen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from captioner.errors import ConfigError
from captioner.geometry import Geometry, Map
from captioner.images import Source, open_picture
from captioner.search import Hypothesis
from captioner.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class Word:
    """A word of a caption, how sure the model was of it, and where it looked.

    Args:
        text: as it is read in the sentence.
        probability: under the model, given the picture and the words before it, in [0, 1].
        attention: float32 [rows, columns] over the whole upright picture; non-negative, sums to 1. The decoder's
            summary of `attention_heads`.
        attention_heads: float32 [layers, heads, rows, columns]; each map non-negative, sums to 1.
    """

    text: str
    probability: float
    attention: Map
    attention_heads: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False, kw_only=True)
class Caption:
    """A sentence about a picture.

    Args:
        text: the sentence.
        score: mean log-probability per token, end token included.
        words: in order; joined by spaces they are the sentence (possessive 's apart).
        end_probability: of the sentence ending where it does; None when the model gave that no probability.
        finished: False when the sentence was broken off at `max_words`, where the model would have gone on.
        geometry: sizes of picture, model input and attention grid.
        confidence: estimated probability, in [0, 1], that the caption is a good one, low too where the picture is
            strange to the model; None when the model was not calibrated. Its card says what "good" is.
        alternatives: the other captions that were asked for by `n_best`, best first, no two with one text.
        picture: what was captioned, opened again when a figure is drawn; of an array, tensor
            or `PIL.Image`, which its owner may change, a copy of at most 512 px a side.
    """

    text: str
    score: float
    words: tuple[Word, ...]
    end_probability: float | None
    finished: bool
    geometry: Geometry
    confidence: float | None = None
    alternatives: tuple[Caption, ...] = ()
    picture: Source | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text

    def figure(self, picture: Source | None = None) -> Figure:
        """Draw the picture under each word's map.

        Args:
            picture: what to draw; default: the captioned picture, opened again from where it came.

        Returns:
            A matplotlib figure that belongs to no window: save it with `savefig`.

        Raises:
            ConfigError: when there is no picture to draw.
            ImageError: when the picture cannot be opened any more.
        """
        from captioner.overlay import draw_words
        from captioner.prepared import FIGURE_SIDE_PX

        source = self.picture if picture is None else picture
        if source is None:
            raise ConfigError("this caption does not hold its picture; hand it over: caption.figure(picture)")
        # A panel is small: what is decoded at reduced scale is still as large as it.
        return draw_words(open_picture(source, side_px=FIGURE_SIDE_PX).image, self.words, title=self.text)

    def to_record(self, image: str) -> dict[str, Any]:
        """Return the JSON record of the caption, as the command line writes it.

        Args:
            image: the name of the picture in the record.

        Returns:
            Plain values, ready for JSON.
        """
        return {
            "image": image,
            "caption": self.text,
            "score": self.score,
            "confidence": self.confidence,
            "words": [{"word": word.text, "probability": word.probability} for word in self.words],
            "alternatives": [{"caption": other.text, "score": other.score} for other in self.alternatives],
            "error": None,
        }


def error_record(image: str, error: Exception) -> dict[str, Any]:
    """Return the JSON record of a picture that could not be captioned.

    Args:
        image: the name of the picture in the record.
        error: what went wrong.

    Returns:
        Plain values, ready for JSON; the same keys as `Caption.to_record`.
    """
    return {
        "image": image,
        "caption": None,
        "score": None,
        "confidence": None,
        "words": [],
        "alternatives": [],
        "error": {"type": type(error).__name__, "message": str(error)},
    }


def make_word(
    text: str, log_probability: float, attention_P: Map, heads_LHP: npt.NDArray[np.float32], grid_hw: tuple[int, int]
) -> Word:
    """Lay the attention of one step out on the grid.

    Args:
        text: the word.
        log_probability: under the model.
        attention_P: weights of the grid cells, row by row.
        heads_LHP: likewise for every layer and head.
        grid_hw: rows and columns.

    Returns:
        The word.
    """
    return Word(
        text=text,
        probability=min(1.0, math.exp(log_probability)),
        attention=np.ascontiguousarray(attention_P, dtype=np.float32).reshape(grid_hw),
        attention_heads=np.ascontiguousarray(heads_LHP, dtype=np.float32).reshape(*heads_LHP.shape[:-1], *grid_hw),
    )


def make_captions(
    hypotheses: list[Hypothesis],
    *,
    tokenizer: Tokenizer,
    geometry: Geometry,
    picture: Source | None,
    confidence_of: Callable[[Hypothesis], float | None],
) -> Caption:
    """Turn what a search found for one picture into its caption and the alternatives.

    Args:
        hypotheses: best first, at least one.
        tokenizer: ids → words.
        geometry: of the picture.
        picture: what was captioned.
        confidence_of: how far each can be trusted.

    Returns:
        The best caption, the others among its alternatives.
    """
    captions: dict[str, Caption] = {}
    for hypothesis in hypotheses:
        text = tokenizer.sentence(hypothesis.token_ids)
        end = hypothesis.end_log_probability
        rows = zip(
            tokenizer.words(hypothesis.token_ids),
            hypothesis.log_probabilities,
            hypothesis.attention_TP,
            hypothesis.attention_heads_TLHP,
            strict=True,
        )
        caption = Caption(
            text=text,
            score=hypothesis.score,
            words=tuple(make_word(*row, geometry.grid_hw) for row in rows),
            end_probability=None if end is None else min(1.0, math.exp(end)),
            confidence=confidence_of(hypothesis),
            finished=hypothesis.finished,
            geometry=geometry,
            picture=picture,
        )
        captions.setdefault(text, caption)
    best, *others = captions.values()
    return dataclasses.replace(best, alternatives=tuple(others))
