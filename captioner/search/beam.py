"""Beam search: plain, diverse, and constrained.

A lane is a beam of its own within a picture. A plain beam has one lane. A diverse beam (Vijayakumar et al.
2018) has one per group. A constrained beam has one per number of required words that are in place, so that
hypotheses on the way to a phrase compete with their like and not with those that ignore it (grid beam search,
Hokamp & Liu 2017; Post & Vilar 2018 share one beam among these lanes instead, which starves them at the small
beams of captioning). Lane here, M candidates and J chosen ones per picture.
"""

from __future__ import annotations

import numpy as np

from captioner.arrays import Array, Bools, Floats, Ints, namespace, send, topk
from captioner.config import SearchOptions
from captioner.search.constraints import Constraints
from captioner.search.engine import Choice, Rows

# Sums of at most 201 terms in float32 are off by less than this share: a picture stops only beyond it.
_ROUNDING = np.float32(1e-4)
_NEVER = np.float32(-np.inf)
_DIVERSITY_LIMIT = 1e30  # a penalty lowers a word; it must not become the -inf that forbids it


class BeamMethod:
    """Keeps the best hypotheses of every lane by the sum of their log-probabilities; see `Method`.

    A hypothesis that ends keeps its place: the candidate of rank r is taken when r is below the lane's size
    less the hypotheses that have ended in it. So a beam of one is greedy search, and a beam as wide as the
    space is exhaustive.

    Args:
        options: of the search.
        constraints: of the search.
        like: an array of the decoder, one entry per picture.
    """

    def __init__(self, options: SearchOptions, constraints: Constraints, *, like: Array) -> None:
        self._options = options
        self._constraints = constraints
        beam_size = options.beam_size if options.method == "beam" else 1
        groups = options.groups if options.method == "beam" else 1
        self._beam_size = beam_size
        self._lane_size = beam_size // groups
        self._lanes = groups * constraints.banks
        self._penalty = np.float32(min(options.diversity, _DIVERSITY_LIMIT) if groups > 1 else 0.0)
        self._named_1A: Array = None
        if constraints.banks > 1:
            self._named_1A = send(constraints.named_ids[None], like)
        self._any_ended = False
        self._ended_BL = np.zeros((len(like), self._lanes), dtype=np.int64)
        # One caption may end once in each group: so many ended ones hold at least n_best different ones.
        enough = (options.n_best - 1) * groups + 1
        self._best_BE = np.full((len(like), enough), -np.inf, dtype=np.float32)

    def offer(self, log_probs_NV: Array, rows: Rows) -> tuple[Array, Array]:
        """Return the candidates of each row; see `Method.offer`.

        No lane takes more than `beam_size` words of one row: words that no phrase names lead a row into one
        lane, and the earlier groups of a diverse beam lower at most the words that they chose.
        """
        count = min(self._beam_size, log_probs_NV.shape[1])
        if self._named_1A is None:
            return topk(log_probs_NV, count)
        xp = namespace(log_probs_NV)
        named_NA = xp.broadcast_to(self._named_1A, (len(log_probs_NV), self._named_1A.shape[1]))
        others_NV = xp.asarray(log_probs_NV, copy=True)
        others_NV[:, self._named_1A[0]] = -np.inf
        best_NK, token_NK = topk(others_NV, count)
        log_prob_NA = xp.take(log_probs_NV, self._named_1A[0], axis=1)
        return xp.concat([best_NK, log_prob_NA], axis=1), xp.concat([token_NK, named_NA], axis=1)

    def choose(self, log_prob_NC: Floats, token_NC: Ints, rows: Rows) -> Choice:
        """Take the best candidates of every lane; see `Method.choose`."""
        lines, per_row = len(rows.alive_BW), log_prob_NC.shape[1]
        score_NC = log_prob_NC + rows.sum_BW.reshape(-1, 1)
        score_BM = np.where(rows.alive_BW.reshape(-1, 1), score_NC, _NEVER).reshape(lines, -1)
        candidates = score_BM.shape[1]
        width = min(self._lane_size, candidates)
        if self._lanes == 1:
            best_BJ, index_BJ = topk(score_BM, width)
            valid_BJ = best_BJ > -np.inf
            if self._any_ended:
                valid_BJ &= np.arange(width) < self._lane_size - self._ended_BL
            lane_BJ = np.zeros(index_BJ.shape, dtype=np.int64)
        else:
            index_BJ, valid_BJ = self._choose_in_lanes(score_BM, token_NC.reshape(lines, -1), rows, width)
            lane_BJ = np.broadcast_to(np.arange(self._lanes).repeat(width), index_BJ.shape)
        # Candidate m of picture b is candidate m + b x M of all, and the rows stand in this order too.
        index_BJ = index_BJ + np.arange(0, lines * candidates, candidates)[:, None]
        return Choice(
            parent_BJ=index_BJ // per_row,
            token_BJ=token_NC.reshape(-1)[index_BJ],
            lane_BJ=lane_BJ,
            valid_BJ=valid_BJ,
            log_prob_BJ=log_prob_NC.reshape(-1)[index_BJ],
            sum_BJ=score_BM.reshape(-1)[index_BJ],
        )

    def _choose_in_lanes(self, score_BM: Floats, token_BM: Ints, rows: Rows, width: int) -> tuple[Ints, Bools]:
        """Return the chosen candidates, lane by lane, and which of them are valid."""
        lane_BM = self._lane_of(rows, token_BM)
        lowered_BM = np.zeros_like(score_BM)
        index, valid = [], []
        for lane in range(self._lanes):
            lane_score_BM = np.where((lane_BM == lane) | (lane_BM < 0), score_BM, _NEVER) - lowered_BM
            best_BJ, index_BJ = topk(lane_score_BM, width)
            free_B1 = (self._lane_size - self._ended_BL[:, lane])[:, None]
            index.append(index_BJ)
            valid.append((best_BJ > -np.inf) & (np.arange(width) < free_B1))
            if self._penalty:
                chosen_BJ = np.where(valid[-1], np.take_along_axis(token_BM, index_BJ, axis=1), -1)
                lowered_BM += (token_BM[:, :, None] == chosen_BJ[:, None, :]).sum(axis=2) * self._penalty
        return np.concatenate(index, axis=1), np.concatenate(valid, axis=1)

    def _lane_of(self, rows: Rows, token_BM: Ints) -> Ints:
        """Return [B, M], the lane that a candidate competes in; -1 for every lane."""
        per_row = token_BM.shape[1] // rows.alive_BW.shape[1]
        if self._constraints.banks > 1:
            state_BM = rows.progress.state_N.reshape(rows.alive_BW.shape).repeat(per_row, axis=1)
            return self._constraints.bank(self._constraints.state_after(state_BM, token_BM))
        return rows.lane_BW.repeat(per_row, axis=1)

    def settle(self, choice: Choice, *, ends_BJ: Bools, words: int) -> Bools:
        """Count what ended; a picture is done when no open hypothesis can rank among its n_best any more."""
        if ends_BJ.any():
            self._any_ended = True
            self._ended_BL += ends_BJ.reshape(len(ends_BJ), self._lanes, -1).sum(axis=2)
            ended_BJ = np.where(ends_BJ, choice.sum_BJ / np.float32(words**self._options.length_penalty), _NEVER)
            self._best_BE = topk(np.concatenate([self._best_BE, ended_BJ], axis=1), self._best_BE.shape[1])[0]
        if not self._any_ended:
            return np.zeros(len(ends_BJ), dtype=np.bool_)
        open_BJ = np.where(choice.valid_BJ & ~ends_BJ, choice.sum_BJ, _NEVER)
        bound_B = open_BJ.max(axis=1) / np.float32(self._best_divisor(words))
        done_B: Bools = self._best_BE[:, -1] > bound_B + _ROUNDING * np.abs(bound_B)
        if self._constraints.banks > 1:
            # Only the last lane may end: when it is full, the hypotheses of the others cannot come in.
            done_B |= self._ended_BL[:, -1] >= self._lane_size
        return done_B

    def _best_divisor(self, words: int) -> float:
        """Return what divides the sum of an open hypothesis of so many words at best.

        Log-probabilities are at most 0, so its sum only falls. What is left is the number of tokens: a
        positive length penalty favours the longest caption, a negative one the shortest.
        """
        options = self._options
        longest, shortest = options.max_words + 1, max(words, options.min_words) + 1
        tokens = longest if options.length_penalty >= 0 else shortest
        return float(tokens**options.length_penalty)

    def keep(self, line_B: Ints) -> None:
        """Go on with these pictures; see `Method.keep`."""
        self._ended_BL = self._ended_BL[line_B]
        self._best_BE = self._best_BE[line_B]
