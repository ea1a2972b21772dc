"""The one loop of all methods: step the decoder, let a method choose, end captions, let pictures leave.

All pictures and all their hypotheses are rows of one batch. A picture has as many slots W as the picture with
the most open hypotheses needs; slots without one are not alive: they are computed, for the shape's sake, and
never chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from captioner.decoders.protocol import Decoder
from captioner.errors import SearchError
from captioner.search.constraints import Constraints, Progress
from captioner.search.hypothesis import SearchVocabulary
from captioner.search.trace import Trace


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """The open hypotheses; row n = b x W + w of the decoder is slot w of picture b.

    Args:
        picture_B: int64, which picture of the batch each line is.
        alive_BW: bool, whether a slot holds a hypothesis.
        sum_BW: sum of its log-probabilities under the model.
        lane_BW: int64, the group of a diverse beam it belongs to; -1 before the first word: every group.
        token_N: int64, the last word, or the start token.
        progress: on the demands.
        words: number of words that every hypothesis has.
    """

    picture_B: Tensor
    alive_BW: Tensor
    sum_BW: Tensor
    lane_BW: Tensor
    token_N: Tensor
    progress: Progress
    words: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """The tokens chosen at one step, best first within a lane.

    Args:
        slot_BJ: int64, the slot that each goes on from.
        token_BJ: int64, words or the end token.
        lane_BJ: int64.
        valid_BJ: bool; False fills up the shape.
    """

    slot_BJ: Tensor
    token_BJ: Tensor
    lane_BJ: Tensor
    valid_BJ: Tensor


class Method(Protocol):
    """How words are chosen."""

    def choose(self, log_probs_NV: Tensor, rows: Rows) -> Choice:
        """Choose tokens for every picture.

        Args:
            log_probs_NV: under the model, -inf where forbidden.
            rows: the open hypotheses.

        Returns:
            What was chosen.
        """
        ...

    def settle(self, choice: Choice, *, ends_BJ: Tensor, sum_BJ: Tensor, words: int) -> Tensor:
        """Take note of what ended, and say which pictures are done.

        Args:
            choice: of this step.
            ends_BJ: bool, what ended.
            sum_BJ: sums of log-probabilities with the chosen token.
            words: number of words that open hypotheses have now.

        Returns:
            bool [B], True where no open hypothesis can change the result.
        """
        ...

    def keep(self, line_B: Tensor) -> None:
        """Go on with these lines of the batch alone."""
        ...


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
        decoder: Decoder,
        grid_BPC: Tensor,
        *,
        vocabulary: SearchVocabulary,
        constraints: Constraints,
        method: Method,
    ) -> None:
        self.trace = Trace()
        self._decoder = decoder
        self._vocabulary = vocabulary
        self.constraints = constraints
        self._method = method
        self._max_words = constraints.demands.max_words
        pictures, device = len(grid_BPC), grid_BPC.device
        self._state = decoder.start(grid_BPC, max_tokens=self._max_words + 1)
        self.rows = Rows(
            picture_B=torch.arange(pictures, device=device),
            alive_BW=torch.ones(pictures, 1, dtype=torch.bool, device=device),
            sum_BW=torch.zeros(pictures, 1, dtype=torch.float32, device=device),
            lane_BW=torch.full((pictures, 1), -1, device=device),
            token_N=torch.full((pictures,), vocabulary.start_id, device=device),
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
        self._end_stuck(log_probs_NV, permitted_NV)
        choice = self._method.choose(permitted_NV, rows)
        lines, width = rows.alive_BW.shape
        parent_BJ = choice.slot_BJ + torch.arange(lines, device=choice.slot_BJ.device)[:, None] * width
        log_prob_BJ = log_probs_NV[parent_BJ, choice.token_BJ]
        sum_BJ = rows.sum_BW.gather(1, choice.slot_BJ) + log_prob_BJ
        ends_BJ = choice.valid_BJ & (choice.token_BJ == self._vocabulary.end_id)
        self._end(log_probs_NV, row_BJ=parent_BJ, ends_BJ=ends_BJ)
        done_B = self._method.settle(choice, ends_BJ=ends_BJ, sum_BJ=sum_BJ, words=rows.words + 1)
        open_BJ = choice.valid_BJ & ~ends_BJ & ~done_B[:, None]
        # The one wait for the device in a step: whether the model gave NaN, and who goes on.
        broken_B = (log_probs_NV[:, 0].isnan().view(lines, width) & rows.alive_BW).any(dim=1)
        broken, counts = torch.stack([broken_B.long(), open_BJ.sum(dim=1)]).tolist()
        if any(broken):
            picture = int(rows.picture_B[broken.index(1)])
            raise SearchError(
                f"picture {picture} of the batch: the model gave NaN or infinite scores for word {rows.words + 1}; "
                "its weights or the picture's features are damaged",
                picture=picture,
            )
        self._go_on(choice, counts, parent_BJ=parent_BJ, log_prob_BJ=log_prob_BJ, sum_BJ=sum_BJ, open_BJ=open_BJ)

    def _read(self) -> Tensor:
        logits_NV, attention_NP, self._state = self._decoder.step(self.rows.token_N, self._state)
        if logits_NV.shape[-1] != self._vocabulary.size:
            raise SearchError(
                f"the vocabulary has {self._vocabulary.size} tokens, the model scores {logits_NV.shape[-1]}; "
                "use the tokenizer of this model"
            )
        self.trace.read(attention_NP, self._state.attention_heads_BLHP)
        # One NaN or +inf makes the log-softmax of its whole row NaN, so that looking at one column is enough.
        return logits_NV.float().log_softmax(dim=-1)

    def _end(self, log_probs_NV: Tensor, *, row_BJ: Tensor, ends_BJ: Tensor) -> None:
        end_N = log_probs_NV[:, self._vocabulary.end_id]
        natural_N = torch.ones_like(end_N, dtype=torch.bool)
        if self.rows.words == self._max_words:
            natural_N = end_N == log_probs_NV.amax(dim=1)
        self.trace.end(
            self.rows.picture_B,
            row_BJ=row_BJ,
            log_probability_BJ=end_N[row_BJ],
            natural_BJ=natural_N[row_BJ],
            ends_BJ=ends_BJ,
        )

    def _end_stuck(self, log_probs_NV: Tensor, permitted_NV: Tensor) -> None:
        """Break off hypotheses that may end but whose every permitted token the model rules out."""
        rows = self.rows
        may_end_N = self.constraints.may_end(rows.progress.state_N, words=rows.words)
        stuck_N = may_end_N & (permitted_NV.amax(dim=1) == -torch.inf)
        row_BW = torch.arange(len(stuck_N), device=stuck_N.device).view_as(rows.alive_BW)
        self._end(log_probs_NV, row_BJ=row_BW, ends_BJ=rows.alive_BW & stuck_N.view_as(rows.alive_BW))

    def _go_on(
        self,
        choice: Choice,
        counts: list[int],
        *,
        parent_BJ: Tensor,
        log_prob_BJ: Tensor,
        sum_BJ: Tensor,
        open_BJ: Tensor,
    ) -> None:
        """Pack the open hypotheses of the pictures that have any into as few slots as hold them."""
        lines, width = [line for line, count in enumerate(counts) if count], max(counts)
        line_B = torch.tensor(lines, dtype=torch.int64, device=open_BJ.device)
        slot_BW = (~open_BJ[line_B]).byte().argsort(dim=1, stable=True)[:, :width]

        def pack(values_BJ: Tensor) -> Tensor:
            return values_BJ[line_B].gather(1, slot_BW)

        parent_N = pack(parent_BJ).flatten()
        token_N = pack(choice.token_BJ).flatten()
        self.trace.write(parent_N, token_N, pack(log_prob_BJ).flatten())
        self._method.keep(line_B)
        rows = self.rows
        self.rows = Rows(
            picture_B=rows.picture_B[line_B],
            alive_BW=pack(open_BJ),
            sum_BW=pack(sum_BJ),
            lane_BW=pack(choice.lane_BJ),
            token_N=token_N,
            progress=self.constraints.advance(rows.progress, parent_N, token_N),
            words=rows.words + 1,
        )
        if lines:
            self._state = self._state.select(parent_N)
