"""Sampling: temperature, top-k, nucleus, and random numbers that do not depend on the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from captioner.config import SearchOptions
from captioner.search.engine import Choice, Rows

# Beyond these, float32 cannot tell a temperature from "always the best word" or from "any word".
_COLDEST, _HOTTEST = 1e-30, 1e30


class SampleMethod:
    """Draws `n_best` independent captions per picture; each sample is a lane. See `Method`.

    Words are drawn with the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the largest of
    log-probability plus Gumbel noise is a draw from the distribution, with no sum over the vocabulary to lose
    precision in.

    Args:
        options: of the search. With a seed all pictures share the same random numbers and the global
            generators stay untouched; without one, PyTorch's global generator of the decoder's device is
            used.
    """

    def __init__(self, options: SearchOptions) -> None:
        self._options = options
        self._generator = None if options.seed is None else torch.Generator().manual_seed(options.seed)

    def choose(self, log_probs_NV: Tensor, rows: Rows) -> Choice:
        """Draw one token for each open sample; see `Method.choose`."""
        lines, width = rows.alive_BW.shape
        first = rows.words == 0
        samples = self._options.n_best
        slot_BJ = torch.arange(width, device=log_probs_NV.device).expand(lines, width)
        if first:  # all samples start from the same row
            slot_BJ = slot_BJ.expand(lines, samples)
        lane_BJ = (
            torch.arange(samples, device=slot_BJ.device).expand(lines, samples) if first else rows.lane_BW
        )
        log_probs_BJV = steer(log_probs_NV, self._options).view(lines, width, -1)
        token_BJ = (log_probs_BJV + self._noise(log_probs_BJV, lane_BJ)).argmax(dim=2)
        possible_BJ = (log_probs_NV.amax(dim=1) > -torch.inf).view(lines, width).expand_as(token_BJ)
        return Choice(
            slot_BJ=slot_BJ, token_BJ=token_BJ, lane_BJ=lane_BJ, valid_BJ=possible_BJ & rows.alive_BW
        )

    def _noise(self, like_BWV: Tensor, lane_BJ: Tensor) -> Tensor:
        """Return Gumbel noise [B, J, V]."""
        if self._generator is None:
            shape = (*lane_BJ.shape, like_BWV.shape[2])
            return -torch.empty(shape, device=like_BWV.device).exponential_().log()
        # Drawn on the CPU, so that one seed gives one caption on every device.
        noise_LV = (
            -torch.empty(self._options.n_best, like_BWV.shape[2])
            .exponential_(generator=self._generator)
            .log()
        )
        return noise_LV.to(like_BWV.device)[lane_BJ]

    def settle(self, choice: Choice, *, ends_BJ: Tensor, sum_BJ: Tensor, words: int) -> Tensor:
        """Every sample goes on to its own end; see `Method.settle`."""
        del choice, sum_BJ, words
        return torch.zeros_like(ends_BJ[:, 0])

    def keep(self, line_B: Tensor) -> None:
        """Nothing is kept per picture; see `Method.keep`."""


def steer(log_probs_NV: Tensor, options: SearchOptions) -> Tensor:
    """Apply temperature, then top-k, then nucleus (Holtzman et al. 2020), each to what the one before has
    left.

    Args:
        log_probs_NV: -inf where forbidden; need not be normalised.
        options: temperature, top_k, top_p.

    Returns:
        Unnormalised log-probabilities of the distribution to draw from; at least one token of each row is
        left.
    """
    forbidden_NV = log_probs_NV == -torch.inf
    peak_N1 = log_probs_NV.amax(dim=1, keepdim=True)
    temperature = min(max(options.temperature, _COLDEST), _HOTTEST)
    scaled_NV = ((log_probs_NV - peak_N1) / temperature).masked_fill(forbidden_NV, -torch.inf)
    if 0 < options.top_k < scaled_NV.shape[1]:
        best_NK, token_NK = scaled_NV.topk(options.top_k, dim=1)
        scaled_NV = torch.full_like(scaled_NV, -torch.inf).scatter(1, token_NK, best_NK)
    if options.top_p < 1.0:
        best_NV, token_NV = scaled_NV.sort(dim=1, descending=True, stable=True)
        probability_NV = best_NV.softmax(dim=1)
        # A token stays when those before it have not reached top_p: the one that crosses it stays, and so
        # does the first.
        before_NV = probability_NV.cumsum(dim=1) - probability_NV
        before_NV[:, 0] = 0.0
        scaled_NV = scaled_NV.scatter(
            1, token_NV, best_NV.masked_fill(before_NV >= options.top_p, -torch.inf)
        )
    return scaled_NV
