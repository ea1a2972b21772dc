"""ROUGE-L: how much of a caption is, in order, in its references (Lin 2004; beta of coco-caption)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[str]

# The weight of recall; coco-caption's value.
BETA = 1.2


def rouge_l(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> NDArray[np.float64]:
    """Score every picture; the score of a set is the mean.

    Args:
        predictions: one tokenised caption per picture.
        references: the tokenised references of each picture, in the same order; at least one each.

    Returns:
        float64 [P], 0..1.
    """
    scores = [_score(p, r) for p, r in zip(predictions, references, strict=True)]
    return np.array(scores, dtype=np.float64)


def _score(prediction: Tokens, references: Sequence[Tokens]) -> float:
    # coco-caption splits at single blanks, so that an empty sentence counts as one empty word.
    prediction = prediction or [""]
    precision = recall = 0.0
    for reference in references:
        words = reference or [""]
        common = common_subsequence_length(prediction, words)
        precision = max(precision, common / len(prediction))
        recall = max(recall, common / len(words))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_subsequence_length(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence.

    Bit-parallel: one column of the table is one integer (Hyyro 2004, "Bit-parallel LCS-length computation
    revisited", algorithm 2).

    Args:
        first: words.
        second: words.

    Returns:
        How many words are in both, in the same order.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << i
    mask = (1 << len(first)) - 1
    column = mask
    for word in second:
        hits = column & positions.get(word, 0)
        column = ((column + hits) | (column - hits)) & mask
    return len(first) - column.bit_count()
