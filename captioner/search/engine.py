"""The one loop of all methods: step the decoder, let a method choose, end captions, let pictures leave.

All pictures and all their hypotheses are rows of one batch. A picture has as many slots W as the picture with
the most open hypotheses needs; slots without one are not alive: they are computed, for the shape's sake, and
never chosen.

What has an entry per token of the vocabulary stays with the decoder, in arrays of its kind. A method reduces it to C
candidates a row; they come to the host with the one wait of a step, and what follows is NumPy's: on so few numbers it
is faster than a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from captioner.arrays import Array, Bools, Floats, Ints, fetch, float32, log_softmax, namespace, send
from captioner.decoders.protocol import StepDecoder
from captioner.errors import SearchError
from captioner.search.constraints import Constraints, Progress
from captioner.search.hypothesis import SearchVocabulary
from captioner.search.trace import Trace


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """The open hypotheses; row n = b x W + w of the decoder is slot w of picture b.

    Args:
        picture_B: which picture of the batch each line is.
        alive_BW: whether a slot holds a hypothesis.
        sum_BW: sum of its log-probabilities under the model.
        lane_BW: the group of a diverse beam it belongs to; -1 before the first word: every group.
        token_N: the last word, or the start token.
        progress: on the demands.
        words: number of words that every hypothesis has.
    """

    picture_B: Ints
    alive_BW: Bools
    sum_BW: Floats
    lane_BW: Ints
    token_N: Ints
    progress: Progress
    words: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """The tokens chosen at one step, best first within a lane.

    Args:
        parent_BJ: the row that each goes on from.
        token_BJ: words or the end token.
        lane_BJ: see `Rows`.
        valid_BJ: False fills up the shape.
        log_prob_BJ: of the token under the model.
        sum_BJ: of the hypothesis with it.
    """

    parent_BJ: Ints
    token_BJ: Ints
    lane_BJ: Ints
    valid_BJ: Bools
    log_prob_BJ: Floats
    sum_BJ: Floats


class Method(Protocol):
    """How words are chosen."""

    def offer(self, log_probs_NV: Array, rows: Rows) -> tuple[Array, Array]:
        """Reduce the vocabulary to candidates, on the decoder's device.

        Args:
            log_probs_NV: under the model, -inf where forbidden.
            rows: the open hypotheses.

        Returns:
            Log-probability and token, [N, C] each; -inf throughout a row only where no permitted token has any
            probability.
        """
        ...

    def choose(self, log_prob_NC: Floats, token_NC: Ints, rows: Rows) -> Choice:
        """Choose tokens for every picture, on the host.

        Args:
            log_prob_NC: of the candidates.
            token_NC: the candidates.
            rows: the open hypotheses.

        Returns:
            What was chosen.
        """
        ...

    def settle(self, choice: Choice, *, ends_BJ: Bools, words: int) -> Bools:
        """Take note of what ended, and say which pictures are done.

        Args:
            choice: of this step.
            ends_BJ: what ended.
            words: number of words that open hypotheses have now.

        Returns:
            bool [B], True where no open hypothesis can change the result.
        """
        ...

    def keep(self, line_B: Ints) -> None:
        """Go on with these lines of the batch alone."""
        ...


def read_log_probs(decoder: StepDecoder, logits_NV: Array) -> Array:
    """Return the log-probabilities of a decoder's logits.

    Args:
        decoder: whose they are.
        logits_NV: of one step.

    Returns:
        float32 [N, V].
    """
    return float32(logits_NV) if decoder.normalised else log_softmax(logits_NV)


class Engine:
    """A search in progress.

    Args:
        decoder: any decoder, in inference mode as the caller wants it (dropout off).
        grid_BPC: features of the pictures.
        vocabulary: which tokens there are.
        constraints: what may be written.
        method: how words are chosen.
    """

    def __init__(
        self,
        decoder: StepDecoder,
        grid_BPC: Array,
        *,
        vocabulary: SearchVocabulary,
        constraints: Constraints,
        method: Method,
    ) -> None:
        self.trace = Trace()
        self._decoder = decoder
        self._like = grid_BPC
        self._vocabulary = vocabulary
        self.constraints = constraints
        self._method = method
        self._max_words = constraints.demands.max_words
        pictures = len(grid_BPC)
        self._state = decoder.start(grid_BPC, max_tokens=self._max_words + 1)
        self.rows = Rows(
            picture_B=np.arange(pictures),
            alive_BW=np.ones((pictures, 1), dtype=np.bool_),
            sum_BW=np.zeros((pictures, 1), dtype=np.float32),
            lane_BW=np.full((pictures, 1), -1),
            token_N=np.full(pictures, vocabulary.start_id),
            progress=constraints.start(pictures),
            words=0,
        )

    @property
    def open(self) -> bool:
        """Whether any hypothesis can still grow."""
        return len(self.rows.picture_B) > 0

    def step(self) -> None:
        """Take one step of all pictures.

        Raises:
            SearchError: when the model gives NaN, or does not write the vocabulary.
        """
        rows = self.rows
        log_probs_NV = self._read()
        permitted_NV = self.constraints.permitted(log_probs_NV, rows.progress, words=rows.words)
        end_N = log_probs_NV[:, self._vocabulary.end_id]
        # An end is the model's own choice unless it was forced: only then the best token matters.
        forced = rows.words == self._max_words
        best_N = namespace(log_probs_NV).max(log_probs_NV, axis=1) if forced else end_N
        # The one wait for the device in a step.
        log_prob_NC, token_NC, end_N, best_N = fetch(*self._method.offer(permitted_NV, rows), end_N, best_N)
        if not math.isfinite(log_prob_NC.sum() + end_N.sum()):
            self._require_numbers(end_N)
            self._end_stuck(log_prob_NC, end_N)
        choice = self._method.choose(log_prob_NC, token_NC, rows)
        ends_BJ = choice.valid_BJ & (choice.token_BJ == self._vocabulary.end_id)
        if ends_BJ.any():
            self._end(ends_BJ, choice.parent_BJ, end_N, natural_N=end_N == best_N)
        done_B = self._method.settle(choice, ends_BJ=ends_BJ, words=rows.words + 1)
        self._go_on(choice, open_BJ=choice.valid_BJ & ~ends_BJ & ~done_B[:, None])

    def _read(self) -> Array:
        logits_NV, attention_NP, self._state = self._decoder.step(send(self.rows.token_N, self._like), self._state)
        if logits_NV.shape[-1] != self._vocabulary.size:
            raise SearchError(
                f"the vocabulary has {self._vocabulary.size} tokens, the model scores {logits_NV.shape[-1]}; "
                "use the tokenizer of this model"
            )
        self.trace.read(attention_NP, self._state.attention_heads_BLHP)
        return read_log_probs(self._decoder, logits_NV)

    def _require_numbers(self, end_N: Floats) -> None:
        # One NaN or +inf makes the log-softmax of its whole row NaN, so that looking at one column is enough.
        broken_B = (np.isnan(end_N).reshape(self.rows.alive_BW.shape) & self.rows.alive_BW).any(axis=1)
        if broken_B.any():
            picture = int(self.rows.picture_B[broken_B.argmax()])
            raise SearchError(
                f"picture {picture} of the batch: the model gave NaN or infinite scores for word "
                f"{self.rows.words + 1}; its weights or the picture's features are damaged",
                picture=picture,
            )

    def _end(self, ends_BJ: Bools, row_BJ: Ints, end_N: Floats, *, natural_N: Bools) -> None:
        line_E, column_E = ends_BJ.nonzero()
        row_E = row_BJ[line_E, column_E]
        self.trace.end(self.rows.picture_B[line_E], row_E, log_prob_E=end_N[row_E], natural_E=natural_N[row_E])

    def _end_stuck(self, log_prob_NC: Floats, end_N: Floats) -> None:
        """Break off hypotheses that may end but whose every permitted token the model rules out."""
        rows = self.rows
        ruled_out_N = log_prob_NC.max(axis=1) == -np.inf
        if ruled_out_N.any():
            stuck_N = ruled_out_N & self.constraints.may_end(rows.progress, words=rows.words)
            stuck_BW = rows.alive_BW & stuck_N.reshape(rows.alive_BW.shape)
            row_BW = np.arange(stuck_N.size).reshape(rows.alive_BW.shape)
            self._end(stuck_BW, row_BW, end_N, natural_N=np.zeros_like(stuck_N))

    def _go_on(self, choice: Choice, *, open_BJ: Bools) -> None:
        """Pack the open hypotheses of the pictures that have any into as few slots as hold them."""
        lines, columns = open_BJ.shape
        counts_B = open_BJ.sum(axis=1)
        line_B = counts_B.nonzero()[0]
        slot_BW = (~open_BJ[line_B]).argsort(axis=1, kind="stable")[:, : counts_B.max()]
        place_BW = slot_BW + (line_B * columns)[:, None]
        parent_N = choice.parent_BJ.reshape(-1)[place_BW].reshape(-1)
        token_N = choice.token_BJ.reshape(-1)[place_BW].reshape(-1)
        self.trace.write(parent_N, token_N, choice.log_prob_BJ.reshape(-1)[place_BW].reshape(-1))
        rows = self.rows
        self.rows = Rows(
            picture_B=rows.picture_B[line_B],
            alive_BW=open_BJ.reshape(-1)[place_BW],
            sum_BW=choice.sum_BJ.reshape(-1)[place_BW],
            lane_BW=choice.lane_BJ.reshape(-1)[place_BW],
            token_N=token_N,
            progress=self.constraints.advance(rows.progress, parent_N, token_N),
            words=rows.words + 1,
        )
        if len(line_B) < lines:
            self._method.keep(line_B)
        if len(line_B):
            self._state = self._state.select(send(parent_N, self._like))
