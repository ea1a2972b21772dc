import math

import numpy as np
import pytest
import torch
from toy_decoders import END, START, ToyDecoder, assert_same, grids, run, search

from captioner.config import SearchOptions
from captioner.errors import ConfigError, SearchError
from captioner.search import SearchVocabulary

pytestmark = pytest.mark.usefixtures("array_kind")


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
@pytest.mark.parametrize("nan_at", [0, 2])
def test_nan_of_the_model_is_an_error(method, nan_at):
    decoder = ToyDecoder(3, end_bias=-30.0, nan_at=nan_at)
    with pytest.raises(
        SearchError, match=rf"picture 0 of the batch: the model gave NaN .* word {nan_at + 1};"
    ) as caught:
        run(decoder, grids(2), SearchOptions(method=method, max_words=5))
    assert caught.value.picture == 0


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_what_no_hypothesis_reads_cannot_spoil_the_search(method):
    """Slots that no hypothesis fills repeat what ended; this model answers an end with NaN."""

    class NanAfterEnd(ToyDecoder):
        def step(self, tokens_B, state):
            logits, attention, state = super().step(tokens_B, state)
            self.ends_read = getattr(self, "ends_read", 0) + int((tokens_B == END).sum())
            logits[tokens_B == END] = torch.nan
            return logits, attention, state

    options = SearchOptions(method=method, beam_size=4, n_best=4, max_words=6, seed=0)
    plain, spoilt = ToyDecoder(4, seed=1, end_bias=1.0), NanAfterEnd(4, seed=1, end_bias=1.0)
    for left, right in zip(run(plain, grids(5), options), run(spoilt, grids(5), options), strict=True):
        assert_same(left, right)
    assert spoilt.ends_read > 0, "this toy must leave slots empty"


def test_infinite_scores_of_the_model_are_an_error():
    class Overflows(ToyDecoder):
        def step(self, tokens_B, state):
            logits, attention, state = super().step(tokens_B, state)
            logits[-1, 5] = torch.inf
            return logits, attention, state

    with pytest.raises(SearchError, match=r"picture 2 .* NaN or infinite scores for word 1;"):
        run(Overflows(3), grids(3), SearchOptions(max_words=5))


def test_more_words_than_the_decoder_writes_is_an_error():
    with pytest.raises(SearchError, match=r"max_words=12 needs 13 tokens .* at most 12; set max_words to at most 11"):
        run(ToyDecoder(3, max_tokens=12), grids(1), SearchOptions(max_words=12))
    assert run(ToyDecoder(3, max_tokens=12), grids(1), SearchOptions(max_words=11))


def test_a_vocabulary_of_another_size_is_an_error():
    decoder = ToyDecoder(3)
    vocabulary = SearchVocabulary(size=9, start_id=START, end_id=END)
    with pytest.raises(SearchError, match="has 9 tokens, the model scores 7"):
        search(decoder, grids(1), vocabulary=vocabulary, options=SearchOptions(max_words=3))


@pytest.mark.parametrize(
    "ids", [{"size": 2}, {"never_ids": (7,)}, {"never_ids": (-1,)}, {"start_id": 2}, {"never_ids": (2,)}]
)
def test_a_vocabulary_checks_itself(ids):
    with pytest.raises(ConfigError, match="got"):
        SearchVocabulary(**{"size": 7, "start_id": START, "end_id": END, "never_ids": (), **ids})


def test_no_pictures_give_no_captions():
    assert run(ToyDecoder(3), grids(1)[:0], SearchOptions(max_words=3)) == []


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decoders_give_float32_results(method, dtype):
    decoder = ToyDecoder(5, seed=3, dtype=dtype)
    for (found,) in run(decoder, grids(3), SearchOptions(method=method, max_words=5, top_k=1)):
        assert isinstance(found.attention_TP, np.ndarray)
        assert found.attention_TP.dtype == found.attention_heads_TLHP.dtype == np.float32
        assert math.isfinite(found.score)
