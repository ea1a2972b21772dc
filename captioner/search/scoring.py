"""Reads given words instead of searching for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from captioner.arrays import Array, fetch, float32, inference, namespace, send, to_numpy
from captioner.decoders.protocol import StepDecoder
from captioner.errors import SearchError
from captioner.search.engine import read_log_probs
from captioner.search.hypothesis import Hypothesis, SearchVocabulary


def score_tokens(
    decoder: StepDecoder, grid_1PC: Array, *, vocabulary: SearchVocabulary, token_ids: Sequence[int]
) -> Hypothesis:
    """Force the decoder through given words and return them as if they had been found.

    Args:
        decoder: in evaluation mode.
        grid_1PC: features of one picture.
        vocabulary: for the start and the end token.
        token_ids: the words, without start and end; at least one.

    Returns:
        The hypothesis, with the end token after the last word: None where its probability is 0.

    Raises:
        SearchError: for no words, more than the decoder can read, or a model that gives NaN.
    """
    if not 0 < len(token_ids) < decoder.max_tokens:
        raise SearchError(f"a sentence to score must have 1 to {decoder.max_tokens - 1} words, got {len(token_ids)}")
    steps, attention, heads = [], [], []
    with inference(grid_1PC):
        state = decoder.start(grid_1PC, max_tokens=len(token_ids) + 1)
        read = [vocabulary.start_id, *token_ids]
        for token, following in zip(read, [*token_ids, vocabulary.end_id], strict=True):
            logits_1V, attention_1P, state = decoder.step(send(np.array([token]), grid_1PC), state)
            steps.append(read_log_probs(decoder, logits_1V)[:, following])
            attention.append(attention_1P)
            heads.append(state.attention_heads_BLHP)
        xp = namespace(grid_1PC)
        log_probabilities = fetch(xp.concat(steps))[0].tolist()
        attention_TP, heads_TLHP = (to_numpy(float32(xp.concat(maps[:-1]))) for maps in (attention, heads))
    if any(math.isnan(value) for value in log_probabilities):
        raise SearchError("the model gave NaN instead of probabilities: its weights are damaged or it overflowed")
    end = log_probabilities.pop()
    return Hypothesis(
        token_ids=tuple(token_ids),
        log_probabilities=tuple(log_probabilities),
        end_log_probability=None if end == float("-inf") else end,
        finished=True,
        attention_TP=attention_TP,
        attention_heads_TLHP=heads_TLHP,
    )
