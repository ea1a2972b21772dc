"""An exponential moving average of the weights that also suits short runs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from captioner.errors import ConfigError


class WarmAveraging(WeightAveraging):
    """Averages the weights exponentially; what is validated and exported is the average.

    Up to the step where it reaches the decay, the average is that of all steps so far, weighted by their number
    (polynomial-decay averaging, Shamir & Zhang 2013): with a fixed decay, a run of few steps would
    end with an average that is mostly the weights that it began with.

    Args:
        decay: that the average reaches; the higher, the more steps it looks back on.

    Raises:
        ConfigError: for a decay outside 0 to 1.
    """

    def __init__(self, *, decay: float = 0.9975) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"WarmAveraging: decay must be at least 0 and below 1, got {decay}")
        super().__init__(multi_avg_fn=self._average)
        self.decay, self._step = decay, 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether to average now: after every optimiser step.

        Args:
            step_idx: of the step, counted over the whole run, so that a resumed one goes on alike.
            epoch_idx: not used.

        Returns:
            Whether there was a step.
        """
        if step_idx is None:
            return False
        self._step = step_idx
        return True

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], _count: Any) -> None:
        decay = min(self.decay, self._step / (self._step + 2))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:  # numbers of batches seen
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(value)
