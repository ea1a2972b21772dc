"""The one protocol behind which every decoder stands.

Shapes: B pictures, or hypotheses (one row each); N rows after a selection; P grid cells, row by row; C channels of
the encoder; V tokens of the vocabulary; T steps; L layers and H heads of the decoder's attention over the grid.
"""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

from torch import Tensor


class DecoderState(Protocol):
    """What a decoder remembers between two steps, one row per hypothesis.

    Attributes:
        attention_heads_BLHP: attention over the grid of the last step, every layer and head; each row of P cells is
            non-negative and sums to 1. Empty along B before the first step. Decoders with one read of the grid
            have L = H = 1.
    """

    attention_heads_BLHP: Tensor

    def select(self, index_N: Tensor) -> Self:
        """Return the state of the named rows, in that order; a row may be named often or not at all.

        Args:
            index_N: int64, rows of this state.

        Returns:
            A state of N rows. This state must not be stepped afterwards: the two may share memory.
        """
        ...


@runtime_checkable
class Decoder(Protocol):
    """Turns a grid of features into one distribution over the next token after another."""

    max_tokens: int
    """Longest sequence it can write, end token included."""

    def start(self, grid_BPC: Tensor, *, max_tokens: int | None = None) -> DecoderState:
        """Look at the pictures once and return the state before the first step.

        Args:
            grid_BPC: features of the grid cells.
            max_tokens: the most steps that will be taken, for the size of the caches; default: the decoder's limit.

        Returns:
            The state, one row per picture.
        """
        ...

    def step(self, tokens_B: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one token per row and predict the next.

        Args:
            tokens_B: int64; the start token first, then what was chosen.
            state: as returned by `start`, `step` or `select`. It is used up: go on with the returned one.

        Returns:
            logits_BV (unnormalised), attention_BP (non-negative, sums to 1: where the picture was looked at to
            predict the next token), and the state after the step.
        """
        ...

    def forward(self, grid_BPC: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the token after each prefix at once (teacher forcing); equals T calls of `step`.

        Args:
            grid_BPC: features of the grid cells.
            tokens_BT: int64; the start token and the tokens after it, padded at the right.

        Returns:
            logits_BTV and attention_BTP.
        """
        ...
