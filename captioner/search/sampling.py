"""Sampling: temperature, top-k, nucleus, and random numbers that do not depend on the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from captioner.config import SearchOptions
from captioner.search.engine import Choice, Rows

# Beyond these, float32 cannot tell a temperature from "always the best word" or from "any word".
_COLDEST, _HOTTEST = 1e-30, 1e30


class SampleMethod:
    """Draws `n_best` independent captions per picture; see `Method`.

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
        # At first all samples go on from the same slot, later each from its own.
        draws = self._options.n_best if rows.words == 0 else width
        slot_BJ = torch.arange(width, device=log_probs_NV.device).expand(lines, draws)
        steered_BJV = steer(log_probs_NV, self._options).view(lines, width, -1).expand(lines, draws, -1)
        token_BJ = (steered_BJV + self._noise(steered_BJV)).argmax(dim=2)
        possible_BJ = steered_BJV.gather(2, token_BJ[:, :, None])[:, :, 0] > -torch.inf
        return Choice(
            slot_BJ=slot_BJ,
            token_BJ=token_BJ,
            lane_BJ=torch.zeros_like(slot_BJ),
            valid_BJ=possible_BJ & rows.alive_BW,
        )

    def _noise(self, like_BJV: Tensor) -> Tensor:
        """Return Gumbel noise, [B, J, V], or [J, V] for all pictures alike."""
        if self._generator is None:
            return _gumbel(torch.empty_like(like_BJV, memory_format=torch.contiguous_format))
        # Drawn on the CPU, for the same numbers on every device, and for all samples, however many are open.
        noise_LV = _gumbel(torch.empty(self._options.n_best, like_BJV.shape[2], dtype=torch.float32), self._generator)
        return noise_LV[: like_BJV.shape[1]].to(like_BJV.device)

    def settle(self, choice: Choice, *, ends_BJ: Tensor, sum_BJ: Tensor, words: int) -> Tensor:
        """Every sample goes on to its own end; see `Method.settle`."""
        del choice, sum_BJ, words
        return torch.zeros_like(ends_BJ[:, 0])

    def keep(self, line_B: Tensor) -> None:
        """Nothing is kept per picture; see `Method.keep`."""


def _gumbel(empty: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor with standard Gumbel noise."""
    # Noise must be finite: infinite noise on a forbidden word would be NaN.
    return -empty.exponential_(generator=generator).clamp_(min=torch.finfo(empty.dtype).tiny).log()


def steer(log_probs_NV: Tensor, options: SearchOptions) -> Tensor:
    """Apply temperature, then top-k, then nucleus (Holtzman et al. 2020), each to what is left.

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
        # A token stays while those before it fall short of top_p, and the first stays always.
        before_NV = probability_NV.cumsum(dim=1) - probability_NV
        beyond_NV = before_NV >= options.top_p
        beyond_NV[:, 0] = False
        scaled_NV = scaled_NV.scatter(1, token_NV, best_NV.masked_fill(beyond_NV, -torch.inf))
    return scaled_NV
