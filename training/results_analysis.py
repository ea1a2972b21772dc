"""Where the captions of two decoders differ: paired over pictures, by length and by content of the references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from captioner.metrics import CiderD, Interval, tokenize
from captioner.metrics.evaluation import PERCENT
from captioner.metrics.intervals import bootstrap
from captioner.metrics.language import FUNCTION_WORDS

Floats = NDArray[np.float64]
# With fewer pictures a bootstrap interval is far too narrow.
FEWEST = 10
RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 0


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Some of the pictures.

    Args:
        name: what they share.
        pictures: their places in the list of names.
    """

    name: str
    pictures: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over pictures.

    Args:
        value: the mean.
        interval: 95 %, bootstrap over pictures; None for fewer than `FEWEST`.
    """

    value: float
    interval: Interval | None


class References:
    """The references of the dev split, tokenised once.

    Args:
        references: captions by picture.

    Attributes:
        names: of the pictures, in the order of all figures.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self.names = sorted(references)
        self._tokens = [[_words(caption) for caption in references[name]] for name in self.names]
        self._cider = CiderD(self._tokens)

    def cider(self, captions: Mapping[str, str]) -> Floats:
        """Return CIDEr-D of every picture, x100, with the document frequencies of the whole split.

        Args:
            captions: one for every picture.

        Returns:
            float64, in the order of the names.
        """
        return PERCENT * self._cider.score([_words(captions[name]) for name in self.names])

    def mean_lengths(self) -> list[float]:
        """Return the mean number of words of each picture's references."""
        return [float(np.mean([len(tokens) for tokens in sentences])) for sentences in self._tokens]

    def things(self) -> list[int]:
        """Return for each picture how many content words at least three in five of its references share."""
        return [_shared_words(sentences) for sentences in self._tokens]

    def by_length(self) -> list[Bin]:
        """Return the pictures in thirds by the mean length of their references; empty ones are left out."""
        lengths = np.array(self.mean_lengths())
        low, high = np.quantile(lengths, [1 / 3, 2 / 3])
        return _bins(
            {
                f"up to {low:.1f} words": lengths <= low,
                f"over {low:.1f}, up to {high:.1f} words": (lengths > low) & (lengths <= high),
                f"over {high:.1f} words": lengths > high,
            }
        )

    def by_things(self) -> list[Bin]:
        """Return the pictures by their number of things: up to 1, 2, 3 and more; empty bins are left out."""
        things = np.array(self.things())
        return _bins({"0 or 1": things <= 1, "2": things == 2, "3 or more": things >= 3})


def mean_of(values: Floats) -> Mean:
    """Return the mean of figures of pictures.

    Args:
        values: of CIDEr-D, or of the differences of two models on the same pictures.

    Returns:
        The mean with its interval.
    """
    if len(values) < FEWEST:
        return Mean(value=float(values.mean()), interval=None)
    statistics_P2 = np.stack([values, np.ones_like(values)], axis=1)
    (interval,) = bootstrap(
        statistics_P2,
        lambda sums_R2: np.asarray(sums_R2[:, :1] / sums_R2[:, 1:]),
        resamples=RESAMPLES,
        confidence=CONFIDENCE,
        seed=SEED,
    )
    return Mean(value=float(values.mean()), interval=interval)


def _bins(members: Mapping[str, NDArray[np.bool_]]) -> list[Bin]:
    return [
        Bin(name=name, pictures=tuple(np.flatnonzero(mask).tolist())) for name, mask in members.items() if mask.any()
    ]


def _shared_words(sentences: Sequence[Sequence[str]]) -> int:
    count = Counter(word for tokens in sentences for word in set(tokens))
    # In whole numbers: 0.6 x 5 is a little more than 3 for a computer.
    return sum(5 * n >= 3 * len(sentences) for word, n in count.items() if word not in FUNCTION_WORDS)


def _words(caption: str) -> list[str]:
    return " ".join(tokenize(caption)).split()
