"""How far a score would move with other pictures: bootstrap intervals and paired tests over pictures.

Every score here is a function of sums over pictures, so a resample is one row of a matrix product.

Shapes: P pictures, K columns of statistics per picture, R resamples, M metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from captioner.errors import MetricError

Floats = NDArray[np.float64]

# From sums over resampled pictures [R, K] to scores [R, M].
ScoreOfSums = Callable[[Floats], Floats]

# Resamples at a time: bounds the memory to this many rows of P weights.
_CHUNK = 64


@dataclass(frozen=True)
class Interval:
    """A confidence interval; `low` and `high` have the unit of their score."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference of two sets of predictions in one metric, on the same pictures.

    Attributes:
        value: first minus second.
        interval: of the difference, from resamples in which both have the same pictures (Koehn 2004).
        p_value: two-sided, by approximate randomisation: how often a difference at least as large appears
            when the two predictions of each picture are swapped at random (Noreen 1989).
    """

    value: float
    interval: Interval
    p_value: float


def bootstrap(
    statistics_PK: Floats, score: ScoreOfSums, *, resamples: int, confidence: float, seed: int
) -> list[Interval]:
    """Resample the pictures with replacement and take the percentile interval of each metric (Efron 1979).

    Args:
        statistics_PK: what the scores are computed from, one row per picture.
        score: turns sums of rows into scores.
        resamples: how many.
        confidence: share of the resamples inside the interval, between 0 and 1.
        seed: of the resampling.

    Returns:
        One interval per metric.

    Raises:
        MetricError: `resamples` is below 2, or `confidence` not between 0 and 1.
    """
    _check(resamples, confidence)
    scores_RM = _resampled([statistics_PK], score, resamples, seed)
    return _percentiles(scores_RM, confidence)


def compare_paired(
    first_PK: Floats, second_PK: Floats, score: ScoreOfSums, *, resamples: int, confidence: float, seed: int
) -> list[Difference]:
    """Compare two sets of predictions for the same pictures.

    Args:
        first_PK: statistics of the first, one row per picture.
        second_PK: statistics of the second, rows in the same order.
        score: turns sums of rows into scores.
        resamples: how many, both of the bootstrap and of the randomisation.
        confidence: share of the resamples inside the interval, between 0 and 1.
        seed: of both.

    Returns:
        One difference (first minus second) per metric.

    Raises:
        MetricError: `resamples` is below 2, or `confidence` not between 0 and 1.
    """
    _check(resamples, confidence)
    value_M = _scores(first_PK, score) - _scores(second_PK, score)

    def difference(first_RK: Floats, second_RK: Floats) -> Floats:
        return score(first_RK) - score(second_RK)

    intervals = _percentiles(_resampled([first_PK, second_PK], difference, resamples, seed), confidence)

    rng = np.random.default_rng(seed)
    moved_PK = second_PK - first_PK
    at_least_M = np.zeros(len(value_M))
    for rows in _chunks(resamples):
        swap_RP = rng.integers(0, 2, size=(rows, len(first_PK))).astype(np.float64)
        shift_RK = swap_RP @ moved_PK
        shuffled_RM = score(first_PK.sum(axis=0) + shift_RK) - score(second_PK.sum(axis=0) - shift_RK)
        # Equal differences must count as at least as large, whatever the order of summation did to the last
        # bits.
        at_least_M += (np.abs(shuffled_RM) >= np.abs(value_M) - 1e-12).sum(axis=0)
    p_value_M = (at_least_M + 1) / (resamples + 1)
    return [
        Difference(float(value), interval, float(p))
        for value, interval, p in zip(value_M, intervals, p_value_M, strict=True)
    ]


def _check(resamples: int, confidence: float) -> None:
    if resamples < 2:
        raise MetricError(f"resamples must be at least 2, got {resamples}")
    if not 0 < confidence < 1:
        raise MetricError(f"confidence must be between 0 and 1, got {confidence}")


def _scores(statistics_PK: Floats, score: ScoreOfSums) -> Floats:
    return np.asarray(score(statistics_PK.sum(axis=0, keepdims=True))[0])


def _chunks(resamples: int) -> list[int]:
    return [min(_CHUNK, resamples - done) for done in range(0, resamples, _CHUNK)]


def _resampled(statistics: Sequence[Floats], score: Callable[..., Floats], resamples: int, seed: int) -> Floats:
    """Return the score of each resample; the same pictures are drawn from all statistics.

    Each has a product of its own: in one of them all, equal columns differ in the last bits by where they stand.
    """
    rng = np.random.default_rng(seed)
    pictures = len(statistics[0])
    scores = []
    for rows in _chunks(resamples):
        drawn_RP = rng.integers(0, pictures, size=(rows, pictures))
        flat = (drawn_RP + np.arange(rows)[:, None] * pictures).ravel()
        weights_RP = np.bincount(flat, minlength=rows * pictures).reshape(rows, pictures)
        scores.append(score(*(weights_RP @ statistics_PK for statistics_PK in statistics)))
    return np.concatenate(scores)


def _percentiles(scores_RM: Floats, confidence: float) -> list[Interval]:
    tail = 100 * (1 - confidence) / 2
    low_M, high_M = np.percentile(scores_RM, [tail, 100 - tail], axis=0)
    return [Interval(float(low), float(high)) for low, high in zip(low_M, high_M, strict=True)]
