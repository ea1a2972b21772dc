"""Sampling: temperature, top-k, nucleus, and random numbers that do not depend on the batch."""

from __future__ import annotations

import numpy as np

from captioner.arrays import Array, Bools, Floats, Ints, kth_largest, namespace, send, unsort
from captioner.config import SearchOptions
from captioner.search.engine import Choice, Rows

# Beyond these, float32 cannot tell a temperature from "always the best word" or from "any word".
_COLDEST, _HOTTEST = 1e-30, 1e30


class SampleMethod:
    """Draws `n_best` independent captions per picture; see `Method`.

    Words are drawn with the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the largest of
    log-probability plus Gumbel noise is a draw from the distribution, with no sum over the vocabulary to lose
    precision in. The noise is NumPy's, drawn on the host: the same for every kind of array and every device.

    Args:
        options: of the search. With a seed all pictures share the same random numbers; without one, every caption
            has fresh ones of its own. No global generator is touched.
    """

    def __init__(self, options: SearchOptions) -> None:
        self._options = options
        self._generator = np.random.Generator(np.random.PCG64(options.seed))

    def offer(self, log_probs_NV: Array, rows: Rows) -> tuple[Array, Array]:
        """Draw one token for each open sample; see `Method.offer`."""
        xp = namespace(log_probs_NV)
        lines, width = rows.alive_BW.shape
        # At first all samples go on from the same slot, later each from its own.
        draws = self._options.n_best if rows.words == 0 else width
        steered_BWV = xp.reshape(steer(log_probs_NV, self._options), (lines, width, -1))
        noise = self._noise(lines, draws, log_probs_NV.shape[1])
        token_BJ = xp.argmax(steered_BWV + send(noise, log_probs_NV), axis=2)
        token_NC = xp.reshape(token_BJ, (lines * width, -1))
        return xp.take_along_axis(log_probs_NV, token_NC, axis=1), token_NC

    def choose(self, log_prob_NC: Floats, token_NC: Ints, rows: Rows) -> Choice:
        """Take what was drawn; see `Method.choose`."""
        lines, width = rows.alive_BW.shape
        log_prob_BJ = log_prob_NC.reshape(lines, -1)
        slots = log_prob_BJ.shape[1] // width
        return Choice(
            parent_BJ=np.arange(log_prob_NC.size).reshape(lines, -1) // log_prob_NC.shape[1],
            token_BJ=token_NC.reshape(lines, -1),
            lane_BJ=np.zeros(log_prob_BJ.shape, dtype=np.int64),
            valid_BJ=(log_prob_BJ > -np.inf) & rows.alive_BW.repeat(slots, axis=1),
            log_prob_BJ=log_prob_BJ,
            sum_BJ=rows.sum_BW.repeat(slots, axis=1) + log_prob_BJ,
        )

    def _noise(self, lines: int, draws: int, vocabulary: int) -> Floats:
        """Return Gumbel noise, [B, J, V], or [J, V] for all pictures alike."""
        if self._options.seed is None:
            return _gumbel((lines, draws, vocabulary), self._generator)
        # For all samples, however many are open: what one draws does not depend on which others have ended.
        return _gumbel((self._options.n_best, vocabulary), self._generator)[:draws]

    def settle(self, choice: Choice, *, ends_BJ: Bools, words: int) -> Bools:
        """Every sample goes on to its own end; see `Method.settle`."""
        del choice, words
        return np.zeros(len(ends_BJ), dtype=np.bool_)

    def keep(self, line_B: Ints) -> None:
        """Nothing is kept per picture; see `Method.keep`."""


def _gumbel(shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    """Return standard Gumbel noise."""
    noise = generator.standard_exponential(shape, dtype=np.float32)
    # Noise must be finite: infinite noise on a forbidden word would be NaN.
    np.maximum(noise, np.finfo(np.float32).tiny, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def steer(log_probs_NV: Array, options: SearchOptions) -> Array:
    """Apply temperature, then top-k, then nucleus (Holtzman et al. 2020), each to what is left.

    Args:
        log_probs_NV: -inf where forbidden; need not be normalised.
        options: temperature, top_k, top_p.

    Returns:
        Unnormalised log-probabilities of the distribution to draw from; at least one token of each row is
        left.
    """
    xp = namespace(log_probs_NV)
    steered_NV = log_probs_NV
    if options.temperature != 1.0:
        temperature = min(max(options.temperature, _COLDEST), _HOTTEST)
        scaled_NV = (log_probs_NV - xp.max(log_probs_NV, axis=1, keepdims=True)) / temperature
        steered_NV = _where(log_probs_NV > -np.inf, scaled_NV)
    if 0 < options.top_k < steered_NV.shape[1]:
        steered_NV = _where(_first(steered_NV, options.top_k), steered_NV)
    if options.top_p < 1.0:
        order_NV = xp.argsort(-steered_NV, axis=1, stable=True)
        weight_NV = xp.exp(xp.take_along_axis(steered_NV, order_NV, axis=1) - xp.max(steered_NV, axis=1, keepdims=True))
        probability_NV = weight_NV / xp.sum(weight_NV, axis=1, keepdims=True)
        # A token stays while those before it fall short of top_p, and the first stays always.
        within_NV = xp.cumulative_sum(probability_NV, axis=1) - probability_NV < options.top_p
        within_NV[:, 0] = True
        steered_NV = _where(unsort(within_NV, order_NV), steered_NV)
    return steered_NV


def _first(values_NV: Array, count: int) -> Array:
    """Return where the largest values of each row stand, exactly so many; of equal ones the first."""
    xp = namespace(values_NV)
    least_N1 = kth_largest(values_NV, count)
    above_NV, level_NV = values_NV > least_N1, values_NV == least_N1
    room_N1 = count - xp.sum(xp.astype(above_NV, xp.int64), axis=1, keepdims=True)
    return above_NV | (level_NV & (xp.cumulative_sum(xp.astype(level_NV, xp.int64), axis=1) <= room_N1))


def _where(kept_NV: Array, values_NV: Array) -> Array:
    """Return the values, -inf where they are not kept."""
    xp = namespace(values_NV)
    return xp.where(kept_NV, values_NV, xp.asarray(-np.inf, dtype=values_NV.dtype, device=values_NV.device))
