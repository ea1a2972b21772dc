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

import torch
from torch import Tensor, nn

from captioner.config import ConfidenceConfig


class Familiarity(nn.Module):
    """Where the mean features of training pictures lie. Not trained; filled by `training.calibration`.

    Args:
        feature_dim: channels of a grid cell.
        directions: of the subspace.
    """

    mean_C: Tensor
    basis_KC: Tensor

    def __init__(self, *, feature_dim: int, directions: int) -> None:
        super().__init__()
        self.register_buffer("mean_C", torch.zeros(feature_dim))
        self.register_buffer("basis_KC", torch.zeros(directions, feature_dim))

    def forward(self, grid_BPC: Tensor) -> Tensor:
        """Return how strange pictures are: the squared norm of what lies outside the subspace.

        Args:
            grid_BPC: features of the pictures.

        Returns:
            float32 [B], at least 0.
        """
        away_BC = grid_BPC.float().mean(dim=1) - self.mean_C
        inside_BK = away_BC @ self.basis_KC.T
        residual_B: Tensor = away_BC.square().sum(dim=1) - inside_BK.square().sum(dim=1)
        return residual_B.clamp(min=0)


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
        strangeness: of the picture, from `Familiarity`.

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
