"""The one protocol behind which every decoder stands.

Shapes: B pictures, or hypotheses (one row each); N rows after a selection; P grid cells, row by row; C
channels of the encoder; V tokens of the vocabulary; T steps; L layers and H heads of the decoder's attention
over the grid.

Arrays are NumPy's or torch's, all of one kind and on one device: those of the grid that `start` is given.
"""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

from captioner.arrays import Array
from captioner.errors import ConfigError


def checked_steps(steps: int, *, limit: int) -> int:
    """Return the number of steps to be taken, checked against a decoder's limit.

    Args:
        steps: wanted.
        limit: the decoder's `max_tokens`.

    Returns:
        The same number.

    Raises:
        ConfigError: for no step, or more than the limit.
    """
    if not 1 <= steps <= limit:
        raise ConfigError(
            f"this decoder takes 1 to {limit} steps, got {steps}; cut the sequence, or make the model with a "
            "larger max_tokens"
        )
    return steps


def count_down(steps_left: int) -> int:
    """Return how many steps are left after one more; a number of the host, so that no device is waited for.

    Args:
        steps_left: before the step.

    Returns:
        One less.

    Raises:
        ConfigError: when none is left: there is no room for another token in the state.
    """
    if steps_left < 1:
        raise ConfigError(
            "the decoder has taken all steps that its state was started for; start it with more max_tokens"
        )
    return steps_left - 1


class DecoderState(Protocol):
    """What a decoder remembers between two steps, one row per hypothesis.

    Attributes:
        attention_heads_BLHP: attention over the grid of the last step, every layer and head; each row of P
            cells is non-negative and sums to 1. Empty along B before the first step. Decoders with one read
            of the grid have L = H = 1. A later step must not write into this array: a search keeps it.
    """

    @property
    def attention_heads_BLHP(self) -> Array:
        """Attention of the last step; see the class."""
        ...

    def select(self, index_N: Array) -> Self:
        """Return the state of the named rows, in that order; a row may be named often or not at all.

        Args:
            index_N: int64, rows of this state.

        Returns:
            A state of N rows. This state must not be stepped afterwards: the two may share memory.
        """
        ...


@runtime_checkable
class StepDecoder(Protocol):
    """Turns a grid of features into one distribution over the next token after another: all that a search needs."""

    max_tokens: int
    """Longest sequence it can write, end token included."""

    normalised: bool
    """Whether the logits of `step` are log-probabilities already, so that a search need not take their log-softmax. If
    so, all of a row must be NaN when one of its scores was NaN or +inf: a search looks at one column."""

    def start(self, grid_BPC: Array, *, max_tokens: int | None = None) -> DecoderState:
        """Look at the pictures once and return the state before the first step.

        Args:
            grid_BPC: features of the grid cells.
            max_tokens: the most steps that will be taken, for the size of the caches; default: the decoder's
                limit.

        Returns:
            The state, one row per picture.

        Raises:
            ConfigError: for `max_tokens` below 1 or above the decoder's limit.
        """
        ...

    def step(self, tokens_B: Array, state: Any) -> tuple[Array, Array, DecoderState]:
        """Read one token per row and predict the next.

        Args:
            tokens_B: int64; the start token first, then what was chosen.
            state: of this decoder, as returned by `start`, `step` or `select`. It is used up: go on with the
                returned one.

        Returns:
            logits_BV (see `normalised`), attention_BP (non-negative, sums to 1: where the picture was looked at
            to predict the next token), and the state after the step.

        Raises:
            ConfigError: when as many steps were taken as the state was started for.
        """
        ...


@runtime_checkable
class Decoder(StepDecoder, Protocol):
    """A decoder that can be trained, too."""

    def forward(self, grid_BPC: Array, tokens_BT: Array) -> tuple[Array, Array]:
        """Predict the token after each prefix at once (teacher forcing); equals T calls of `step`.

        Args:
            grid_BPC: features of the grid cells.
            tokens_BT: int64; the start token and the tokens after it, padded at the right. Rows may be a
                multiple of the pictures, side by side.

        Returns:
            logits_BTV and attention_BTP.

        Raises:
            ConfigError: for more tokens than `max_tokens`, or rows that are not a multiple of the pictures.
        """
        ...
