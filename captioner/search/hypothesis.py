"""What goes into a search besides the options, and what comes out of it.

Shapes of the whole package: B pictures still in the batch; W slots per picture, N = B x W rows of the
decoder; V tokens of the vocabulary; P grid cells; C channels; L layers and H heads of the attention over the
grid; T words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from captioner.arrays import Floats
from captioner.errors import ConfigError


@dataclass(frozen=True)
class Phrase:
    """A word or phrase that a caption must or must not contain.

    Args:
        text: as the user wrote it, for messages.
        token_ids: its tokens, one per word.
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SearchVocabulary:
    """The little that a search knows about the vocabulary.

    Args:
        size: number of tokens V.
        start_id: the token that is read first; it is never written.
        end_id: the token that ends a caption.
        never_ids: tokens that are never written: padding, start, unknown.
    """

    size: int
    start_id: int
    end_id: int
    never_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids = {"start_id": (self.start_id,), "end_id": (self.end_id,), "never_ids": self.never_ids}
        for name, values in ids.items():
            for value in values:
                if not 0 <= value < self.size:
                    raise ConfigError(f"{name} must lie in a vocabulary of {self.size} tokens, got {value}")
        if self.end_id in (self.start_id, *self.never_ids):
            raise ConfigError(
                f"end_id must differ from start_id and never_ids, got end_id={self.end_id}, "
                f"start_id={self.start_id} and never_ids={self.never_ids}"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Hypothesis:
    """One caption that a search found.

    Args:
        token_ids: the words, without start and end.
        log_probabilities: of each word under the model itself, the log-softmax of its logits: masks,
            temperature and penalties steer the choice and never change what is reported.
        end_log_probability: of the end token; None when the model gave the end no probability at all.
        finished: False when the caption was broken off: at `max_words` where the end was not the model's own
            first choice, or where neither the end nor a permitted word had any probability.
        attention_TP: where the model looked for each word, one row per word.
        attention_heads_TLHP: the same, every layer and head.
    """

    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    end_log_probability: float | None
    finished: bool
    attention_TP: Floats
    attention_heads_TLHP: Floats

    @property
    def score(self) -> float:
        """Mean log-probability per token, the end token included where it was found."""
        return rank_score(self.log_probabilities, self.end_log_probability, length_penalty=1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamedWord:
    """One word of a caption as it is found.

    Args:
        token_id: the word.
        log_probability: under the model itself.
        attention_P: where the model looked for it.
        attention_heads_LHP: the same, every layer and head.
    """

    token_id: int
    log_probability: float
    attention_P: Floats
    attention_heads_LHP: Floats


def rank_score(
    log_probabilities: tuple[float, ...], end_log_probability: float | None, *, length_penalty: float
) -> float:
    """Return the sum of the log-probabilities over (number of tokens ** length_penalty).

    Sums alone favour short captions (Wu et al. 2016, section 7); 1 is the mean, 0 the plain sum.

    Args:
        log_probabilities: of the words, at least one.
        end_log_probability: of the end token, or None.
        length_penalty: exponent of the number of tokens, end token included where there is one.

    Returns:
        The score; higher is better.
    """
    ends = () if end_log_probability is None else (end_log_probability,)
    tokens = len(log_probabilities) + len(ends)
    return math.fsum((*log_probabilities, *ends)) / float(tokens**length_penalty)
