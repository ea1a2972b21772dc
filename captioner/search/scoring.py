"""Reads given words instead of searching for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.decoders.protocol import Decoder
from captioner.errors import SearchError
from captioner.search.hypothesis import Hypothesis, SearchVocabulary


def score_tokens(
    decoder: Decoder, grid_1PC: Tensor, *, vocabulary: SearchVocabulary, token_ids: Sequence[int]
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
    with torch.inference_mode():
        state = decoder.start(grid_1PC, max_tokens=len(token_ids) + 1)
        read = [vocabulary.start_id, *token_ids]
        for token, following in zip(read, [*token_ids, vocabulary.end_id], strict=True):
            logits_1V, attention_1P, state = decoder.step(torch.tensor([token], device=grid_1PC.device), state)
            steps.append(logits_1V[0].float().log_softmax(dim=-1)[following])
            attention.append(attention_1P[0])
            heads.append(state.attention_heads_BLHP[0])
        log_probabilities = torch.stack(steps).tolist()
    if any(math.isnan(value) for value in log_probabilities):
        raise SearchError("the model gave NaN instead of probabilities: its weights are damaged or it overflowed")
    end = log_probabilities.pop()
    return Hypothesis(
        token_ids=tuple(token_ids),
        log_probabilities=tuple(log_probabilities),
        end_log_probability=None if end == float("-inf") else end,
        finished=True,
        attention_TP=torch.stack(attention[:-1]).float().cpu(),
        attention_heads_TLHP=torch.stack(heads[:-1]).float().cpu(),
    )
