"""BLEU-1..4 over a set of pictures, from counts per picture (Papineni et al. 2002; constants of
coco-caption).

BLEU of a set is no mean over pictures: the counts are summed first. `BleuCounts` keeps them apart, so that
any resampling of the pictures is one matrix product.

Shapes: P pictures, R resamples, N = 4 orders of n-grams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[str]

MAX_ORDER = 4

# coco-caption adds these two to a count and to its divisor, so that nothing is divided by zero.
_TINY = 1e-15
_SMALL = 1e-9


@dataclass(frozen=True)
class BleuCounts:
    """What BLEU needs to know of every picture.

    Attributes:
        matched_PN: float64, n-grams of the prediction that are in a reference, each clipped to the reference
            that has most of it.
        written_PN: float64, n-grams of the prediction.
        length_P: float64, words of the prediction.
        reference_length_P: float64, words of the reference whose length is closest; of two the shorter.
    """

    matched_PN: NDArray[np.float64]
    written_PN: NDArray[np.float64]
    length_P: NDArray[np.float64]
    reference_length_P: NDArray[np.float64]

    def score(self, weights_RP: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Return BLEU-1..4 of the whole set, or of resamples of it.

        Args:
            weights_RP: how often each picture is in each resample; default: one resample with every picture
                once.

        Returns:
            float64 [R, 4], 0..1.
        """
        if weights_RP is None:
            weights_RP = np.ones((1, len(self.length_P)))
        return _bleu(
            weights_RP @ self.matched_PN,
            weights_RP @ self.written_PN,
            weights_RP @ self.length_P,
            weights_RP @ self.reference_length_P,
        )

    def stacked(self) -> NDArray[np.float64]:
        """Return all counts as one array [P, 10], in the order that `score_sums` reads."""
        return np.concatenate(
            [self.matched_PN, self.written_PN, self.length_P[:, None], self.reference_length_P[:, None]],
            axis=1,
        )


def score_sums(sums_R10: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return BLEU-1..4 of sums of the rows of `BleuCounts.stacked`.

    Args:
        sums_R10: float64 [R, 10], one row of summed counts per resample.

    Returns:
        float64 [R, 4], 0..1.
    """
    n = MAX_ORDER
    return _bleu(sums_R10[:, :n], sums_R10[:, n : 2 * n], sums_R10[:, 2 * n], sums_R10[:, 2 * n + 1])


def _bleu(
    matched_RN: NDArray[np.float64],
    written_RN: NDArray[np.float64],
    length_R: NDArray[np.float64],
    reference_length_R: NDArray[np.float64],
) -> NDArray[np.float64]:
    precision_RN = (matched_RN + _TINY) / (written_RN + _SMALL)
    orders_N = np.arange(1, MAX_ORDER + 1)
    geometric_RN = np.cumprod(precision_RN, axis=1) ** (1 / orders_N)
    ratio_R = (length_R + _TINY) / (reference_length_R + _SMALL)
    brevity_R = np.exp(np.minimum(0.0, 1 - 1 / ratio_R))
    return np.asarray(geometric_RN * brevity_R[:, None])


def count(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> BleuCounts:
    """Count the n-grams of every picture.

    Args:
        predictions: one tokenised caption per picture.
        references: the tokenised references of each picture, in the same order; at least one each.

    Returns:
        The counts, one row per picture.
    """
    rows = [_count_picture(p, r) for p, r in zip(predictions, references, strict=True)]
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 2 * MAX_ORDER + 2)
    n = MAX_ORDER
    return BleuCounts(table[:, :n], table[:, n : 2 * n], table[:, 2 * n], table[:, 2 * n + 1])


def _count_picture(prediction: Tokens, references: Sequence[Tokens]) -> list[int]:
    matched = []
    for order in range(1, MAX_ORDER + 1):
        limits: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            limits |= _ngrams(reference, order)
        matched.append((_ngrams(prediction, order) & limits).total())
    written = [max(0, len(prediction) - order + 1) for order in range(1, MAX_ORDER + 1)]
    closest = min((abs(len(r) - len(prediction)), len(r)) for r in references)[1]
    return [*matched, *written, len(prediction), closest]


def _ngrams(tokens: Tokens, order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(order)), strict=False))
