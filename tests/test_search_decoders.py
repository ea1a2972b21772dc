"""The laws of the search with the three real decoders; the other files have them with a toy."""

import itertools
import math

import pytest
import torch
from models import DECODERS, VOCABULARY, make_decoder, random_grid
from toy_decoders import assert_close, search

from captioner.config import SearchOptions
from captioner.search import SearchVocabulary

START, END, WORDS = 1, 2, range(4, VOCABULARY)
LEXICON = SearchVocabulary(size=VOCABULARY, start_id=START, end_id=END, never_ids=(0, 1, 3))

pytestmark = [
    pytest.mark.usefixtures("array_kind"),
    pytest.mark.parametrize("kind", DECODERS),
    pytest.mark.parametrize("seed", range(3)),
]


def found_by(decoder, grid_BPC, **options):
    return search(decoder, grid_BPC, vocabulary=LEXICON, options=SearchOptions(**options))


def test_beam_of_one_equals_greedy(kind, seed):
    decoder, grid_BPC = make_decoder(kind, seed=seed), random_grid(4, seed=seed + 9)
    beam = found_by(decoder, grid_BPC, beam_size=1, max_words=7)
    greedy = found_by(decoder, grid_BPC, method="greedy", max_words=7)
    for (left,), (right,) in zip(beam, greedy, strict=True):
        assert left.token_ids == right.token_ids
        assert left.score == pytest.approx(right.score, abs=1e-5)
        assert_close(left.attention_TP, right.attention_TP, rtol=0, atol=1e-5)
    scores = [found.score for (found,) in greedy]
    assert min(abs(a - b) for a, b in itertools.combinations(scores, 2)) > 1e-4  # the pictures matter


def every_caption(decoder, grid_1PC, *, max_words):
    """All captions, best first: (score, words), by teacher forcing."""
    captions = []
    for count in range(1, max_words + 1):
        sentences = list(itertools.product(WORDS, repeat=count))
        with torch.inference_mode():
            logits_BTV, _ = decoder(grid_1PC, torch.tensor([[START, *words] for words in sentences]))
        log_probs = logits_BTV.log_softmax(dim=-1).tolist()
        for words, steps in zip(sentences, log_probs, strict=True):
            total = math.fsum(step[token] for step, token in zip(steps, (*words, END), strict=True))
            captions.append((total / (count + 1), words))
    return sorted(captions, reverse=True)


def test_a_beam_as_wide_as_the_space_equals_brute_force(kind, seed):
    decoder, grid_BPC = make_decoder(kind, seed=seed), random_grid(2, seed=seed + 9)
    for picture, found in enumerate(found_by(decoder, grid_BPC, beam_size=500, n_best=12, max_words=3)):
        expected = every_caption(decoder, grid_BPC[picture : picture + 1], max_words=3)
        assert len(expected) < 500
        assert [hypothesis.score for hypothesis in found] == pytest.approx([s for s, _ in expected[:12]], abs=1e-5)
        by_words = {words: score for score, words in expected}
        for hypothesis in found:
            assert hypothesis.score == pytest.approx(by_words[tuple(hypothesis.token_ids)], abs=1e-5)
