"""Dropout that does not spend a third of a CPU training step on drawing random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.errors import ConfigError


class Dropout(nn.Module):
    """Zero elements with probability p in training, scale the rest by 1 / (1 - p) (Srivastava et al. 2014).

    On a CPU the mask is drawn as random bytes, eight per 64-bit number, where `torch.nn.Dropout` draws a
    whole number per element; p is therefore rounded to a multiple of 1/256 there, and the scale is that of
    the rounded p.

    Args:
        p: probability of dropping an element, in [0, 1).

    Raises:
        ConfigError: for a probability outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {p!r}")
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """Return the values, some of them dropped when in training."""
        if not self.training or self.p == 0.0:
            return values
        if values.device.type != "cpu":
            return functional.dropout(values, self.p)
        dropped = min(round(self.p * 256), 255)
        words = torch.empty((values.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        # Compared straight into the dtype of the values: to turn booleans into bfloat16 takes longer than all the rest.
        keep = torch.empty(values.shape, dtype=values.dtype)
        torch.ge(words.view(torch.uint8)[: values.numel()].view(values.shape), dropped, out=keep)
        return values * keep.mul_(256 / (256 - dropped))

    def extra_repr(self) -> str:
        """Show p in the printed model."""
        return f"p={self.p}"
