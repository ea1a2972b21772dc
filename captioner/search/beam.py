"""Beam search: plain, diverse, and constrained.

A lane is a beam of its own within a picture. A plain beam has one lane. A diverse beam (Vijayakumar et al.
2018) has one per group. A constrained beam has one per number of required words that are in place, so that
hypotheses on the way to a phrase compete with their like and not with those that ignore it (grid beam search,
Hokamp & Liu 2017; Post & Vilar 2018 share one beam among these lanes instead, which starves them at the small
beams of captioning). Lane here, M candidates and J chosen ones per picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captioner.config import SearchOptions
from captioner.search.constraints import Constraints
from captioner.search.engine import Choice, Rows

# Sums of at most 201 terms in float32 are off by less than this share: a picture stops only beyond it.
_ROUNDING = 1e-4
_DIVERSITY_LIMIT = 1e30  # a penalty lowers a word; it must not become the -inf that forbids it


class BeamMethod:
    """Keeps the best hypotheses of every lane by the sum of their log-probabilities; see `Method`.

    A hypothesis that ends keeps its place: the candidate of rank r is taken when r is below the lane's size
    less the hypotheses that have ended in it. So a beam of one is greedy search, and a beam as wide as the
    space is exhaustive.

    Args:
        options: of the search.
        constraints: of the search.
        pictures: number of pictures.
        device: of the decoder.
    """

    def __init__(
        self, options: SearchOptions, constraints: Constraints, *, pictures: int, device: torch.device
    ) -> None:
        self._options = options
        self._constraints = constraints
        beam_size = options.beam_size if options.method == "beam" else 1
        groups = options.groups if options.method == "beam" else 1
        self._beam_size = beam_size
        self._lane_size = beam_size // groups
        self._lanes = groups * constraints.banks
        self._penalty = min(options.diversity, _DIVERSITY_LIMIT) if groups > 1 else 0.0
        self._ended_BL = torch.zeros(pictures, self._lanes, dtype=torch.int64, device=device)
        # One caption may end once in each group: so many ended ones hold at least n_best different ones.
        enough = (options.n_best - 1) * groups + 1
        self._best_BE = torch.full((pictures, enough), -torch.inf, dtype=torch.float32, device=device)

    def choose(self, log_probs_NV: Tensor, rows: Rows) -> Choice:
        """Take the best candidates of every lane; see `Method.choose`."""
        score_BM, slot_BM, token_BM = self._candidates(log_probs_NV, rows)
        lane_BM = self._lane_of(rows, slot_BM, token_BM)
        width = min(self._lane_size, score_BM.shape[1])
        rank_J = torch.arange(width, device=score_BM.device)
        penalty_BV = log_probs_NV.new_zeros(len(score_BM), log_probs_NV.shape[1] if self._penalty else 0)
        index, valid = [], []
        for lane in range(self._lanes):
            lane_score_BM = score_BM
            if self._lanes > 1:
                lane_score_BM = score_BM.masked_fill((lane_BM != lane) & (lane_BM >= 0), -torch.inf)
            if self._penalty:
                lane_score_BM = lane_score_BM - penalty_BV.gather(1, token_BM)
            best_BJ, index_BJ = lane_score_BM.topk(width, dim=1)
            free_B1 = (self._lane_size - self._ended_BL[:, lane])[:, None]
            index.append(index_BJ)
            valid.append((best_BJ > -torch.inf) & (rank_J < free_B1))
            if self._penalty:
                penalty_BV.scatter_add_(1, token_BM.gather(1, index_BJ), valid[-1].to(penalty_BV.dtype) * self._penalty)
        index_BJ = torch.cat(index, dim=1)
        lane_J = torch.arange(self._lanes, device=index_BJ.device).repeat_interleave(width)
        return Choice(
            slot_BJ=slot_BM.gather(1, index_BJ),
            token_BJ=token_BM.gather(1, index_BJ),
            lane_BJ=lane_J.expand_as(index_BJ),
            valid_BJ=torch.cat(valid, dim=1),
        )

    def _candidates(self, log_probs_NV: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return score, slot and token of the candidates of each picture, [B, M] each.

        No lane takes more than `beam_size` words of one row: words that no phrase names lead a row into one
        lane, and the earlier groups of a diverse beam lower at most the words that they chose.
        """
        lines, width = rows.alive_BW.shape
        named_A = self._constraints.named_ids if self._constraints.banks > 1 else None
        others_NV = log_probs_NV if named_A is None else log_probs_NV.index_fill(1, named_A, -torch.inf)
        best_NC, token_NC = others_NV.topk(min(self._beam_size, log_probs_NV.shape[1]), dim=1)
        if named_A is not None:
            best_NC = torch.cat([best_NC, log_probs_NV[:, named_A]], dim=1)
            token_NC = torch.cat([token_NC, named_A.expand(len(token_NC), -1)], dim=1)
        score_NC = best_NC + rows.sum_BW.flatten()[:, None]
        score_NC = score_NC.masked_fill(~rows.alive_BW.flatten()[:, None], -torch.inf)
        slot_M = torch.arange(width, device=score_NC.device).repeat_interleave(score_NC.shape[1])
        return score_NC.reshape(lines, -1), slot_M.expand(lines, -1), token_NC.reshape(lines, -1)

    def _lane_of(self, rows: Rows, slot_BM: Tensor, token_BM: Tensor) -> Tensor:
        """Return int64 [B, M], the lane that a candidate competes in; -1 for every lane."""
        if self._constraints.banks > 1:
            state_BM = rows.progress.state_N.view_as(rows.alive_BW).gather(1, slot_BM)
            return self._constraints.bank(self._constraints.state_after(state_BM, token_BM))
        return rows.lane_BW.gather(1, slot_BM)

    def settle(self, choice: Choice, *, ends_BJ: Tensor, sum_BJ: Tensor, words: int) -> Tensor:
        """Count what ended; a picture is done when no open hypothesis can rank among its n_best any more."""
        self._ended_BL += ends_BJ.view(len(ends_BJ), self._lanes, -1).sum(dim=2)
        ended_BJ = (sum_BJ / words**self._options.length_penalty).masked_fill(~ends_BJ, -torch.inf)
        self._best_BE = torch.cat([self._best_BE, ended_BJ], dim=1).topk(self._best_BE.shape[1], dim=1).values
        open_BJ = choice.valid_BJ & ~ends_BJ
        bound_B = sum_BJ.masked_fill(~open_BJ, -torch.inf).amax(dim=1) / self._best_divisor(words)
        # Only the last lane may end: when it is full, the hypotheses of the others cannot come in.
        full_B = self._ended_BL[:, -1] >= self._lane_size if self._constraints.banks > 1 else False
        return (self._best_BE[:, -1] > bound_B + _ROUNDING * bound_B.abs()) | full_B

    def _best_divisor(self, words: int) -> float:
        """Return what divides the sum of an open hypothesis of so many words at best.

        Log-probabilities are at most 0, so its sum only falls. What is left is the number of tokens: a
        positive length penalty favours the longest caption, a negative one the shortest.
        """
        options = self._options
        longest, shortest = options.max_words + 1, max(words, options.min_words) + 1
        tokens = longest if options.length_penalty >= 0 else shortest
        return float(tokens**options.length_penalty)

    def keep(self, line_B: Tensor) -> None:
        """Go on with these pictures; see `Method.keep`."""
        self._ended_BL = self._ended_BL[line_B]
        self._best_BE = self._best_BE[line_B]
