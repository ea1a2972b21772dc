"""Where the features of a model's training pictures lie, kept with its weights. See `captioner.confidence`.

Shapes as there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioner.confidence import strangeness


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
        """Return how strange pictures are; see `strangeness`.

        Args:
            grid_BPC: features of the pictures.

        Returns:
            float32 [B], at least 0.
        """
        strange_B: Tensor = strangeness(grid_BPC, mean_C=self.mean_C, basis_KC=self.basis_KC)
        return strange_B
