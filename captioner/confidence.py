"""How far a caption can be trusted: the model's own doubt, and how strange the picture is to it.

A decoder is fluent about any picture, noise included, and its probabilities say how sure it is of words, not of
having seen the like. So two things are joined: a logistic regression on the probabilities of the caption, and the
strangeness of the picture, the part of its features that lies outside the subspace in which those of the training
pictures vary (the residual of ViM, Wang et al. 2022, section 4). `training.calibration` fits both.

Shapes: B pictures, P grid cells, C channels, K directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from captioner.arrays import Array, float32, namespace
from captioner.config import ConfidenceConfig


def strangeness(grid_BPC: Array, *, mean_C: Array, basis_KC: Array) -> Array:
    """Return how strange pictures are: the squared norm of what lies outside the subspace.

    Args:
        grid_BPC: features of the pictures; NumPy's or torch's, as the others are.
        mean_C: mean of the training pictures' mean features.
        basis_KC: orthonormal directions of the subspace.

    Returns:
        float32 [B], at least 0.
    """
    xp = namespace(grid_BPC)
    away_BC = xp.mean(float32(grid_BPC), axis=1) - mean_C
    inside_BK = away_BC @ basis_KC.T
    residual_B = xp.sum(away_BC * away_BC, axis=1) - xp.sum(inside_BK * inside_BK, axis=1)
    return xp.clip(residual_B, min=0)


def confidence(
    config: ConfidenceConfig, *, score: float, log_probabilities: Sequence[float], strangeness: float
) -> float:
    """Return the estimated probability that a caption is a good one.

    sigmoid(w · x) with x = (1, score, least log-probability of a word), times
    exp(-(strangeness - familiar) / (strange - familiar)) for pictures that are stranger than familiar ones.

    Args:
        config: of the model.
        score: mean log-probability per token, end token included.
        log_probabilities: of the words.
        strangeness: of the picture, from the function of this name.

    Returns:
        In [0, 1]; 0 for a sentence that the model holds to be impossible.
    """
    least = min(log_probabilities)
    if not (math.isfinite(score) and math.isfinite(least) and math.isfinite(strangeness)):
        return 0.0
    logit = config.intercept + config.score_weight * score + config.least_weight * least
    good = 1 / (1 + math.exp(-max(-500.0, min(500.0, logit))))
    beyond = max(0.0, strangeness - config.familiar) / (config.strange - config.familiar)
    return good * math.exp(-beyond)
