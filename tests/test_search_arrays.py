"""One search for NumPy arrays and torch tensors: the same captions, and no torch where none is needed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DECODERS, VOCABULARY, make_decoder, random_grid
from test_search_constraints import attempt, phrase, searches
from toy_decoders import END, KINDS, ToyDecoder, grids, of_kind, words_of

from captioner import arrays
from captioner.config import SearchOptions
from captioner.search import SearchVocabulary, score_tokens, search, stream

TIGHT = {"rtol": 0, "atol": 1e-6}


def assert_alike(left, right):
    """Assert that two lists of hypotheses are the same to 1e-6."""
    assert words_of(left) == words_of(right)
    for one, other in zip(left, right, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-6)
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-6)
        assert one.end_log_probability == pytest.approx(other.end_log_probability, abs=1e-6)
        assert one.finished == other.finished
        np.testing.assert_allclose(one.attention_TP, other.attention_TP, **TIGHT)
        np.testing.assert_allclose(one.attention_heads_TLHP, other.attention_heads_TLHP, **TIGHT)


@settings(deadline=None, max_examples=150)
@given(found=searches(), seed=st.integers(0, 50), ends=st.booleans(), pictures=st.integers(1, 3))
def test_numpy_and_torch_find_the_same_captions_whatever_the_options(found, seed, ends, pictures):
    options, required, banned = found
    decoder = ToyDecoder(3, seed=seed, impossible=[] if ends else [END])

    def run(kind):
        return search(
            *of_kind(decoder, grids(pictures, seed), kind),
            vocabulary=decoder.vocabulary,
            options=options,
            must_include=[phrase(ids) for ids in required],
            ban=[phrase(ids) for ids in banned],
        )

    (left, fault), (right, other_fault) = (attempt(run, kind) for kind in KINDS)
    assert fault == other_fault
    for one, other in zip(left or [], right or [], strict=True):
        assert_alike(one, other)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_numpy_and_torch_find_the_same_captions_with_the_real_decoders(name, method):
    decoder, grid = make_decoder(name), random_grid(5)
    vocabulary = SearchVocabulary(size=VOCABULARY, start_id=1, end_id=2, never_ids=(0, 1, 3))
    options = SearchOptions(method=method, max_words=7, seed=2)
    left, right = (search(*of_kind(decoder, grid, kind), vocabulary=vocabulary, options=options) for kind in KINDS)
    for one, other in zip(left, right, strict=True):
        assert_alike(one, other)


def test_numpy_and_torch_give_given_words_the_same_score():
    decoder, grid = ToyDecoder(5), grids(1)
    left, right = (
        score_tokens(*of_kind(decoder, grid, kind), vocabulary=decoder.vocabulary, token_ids=(4, 6, 5))
        for kind in KINDS
    )
    assert_alike([left], [right])


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_that_normalises_gives_the_same_captions(kind):
    class Normalised(ToyDecoder):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.normalised = True

        def step(self, tokens_B, state):
            logits, attention, state = super().step(tokens_B, state)
            return logits.log_softmax(1), attention, state

    options = SearchOptions(beam_size=4, n_best=3, max_words=6)
    left, right = (
        search(*of_kind(made(4, seed=3), grids(3), kind), vocabulary=made(4).vocabulary, options=options)
        for made in (ToyDecoder, Normalised)
    )
    for one, other in zip(left, right, strict=True):
        assert_alike(one, other)
    words = (4, 5)
    left, right = (
        score_tokens(*of_kind(made(4), grids(1), kind), vocabulary=made(4).vocabulary, token_ids=words)
        for made in (ToyDecoder, Normalised)
    )
    assert_alike([left], [right])


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_does_not_write_into_what_the_decoder_gives(kind):
    """A decoder may hand out the same array again; this one keeps what it gave."""

    class Keeps(ToyDecoder):
        given = ()

        def step(self, tokens_B, state):
            logits, attention, state = super().step(tokens_B, state)
            self.given = [*self.given, (logits, logits.clone())]
            return logits, attention, state

    for normalised in (False, True):
        decoder = Keeps(5, dtype=torch.float32)
        decoder.normalised = normalised
        options = SearchOptions(beam_size=4, max_words=5, no_repeat_ngram=1)
        search(
            *of_kind(decoder, grids(2), kind),
            vocabulary=decoder.vocabulary,
            options=options,
            must_include=[phrase((4, 5))],
        )
        assert all(torch.equal(now, then) for now, then in decoder.given)


def test_a_search_over_numpy_arrays_needs_no_torch():
    program = """
import sys
import numpy as np
import captioner.caption, captioner.confidence, captioner.decoders
from captioner.config import SearchOptions
from captioner.search import SearchVocabulary, score_tokens, search, stream

class State:
    def __init__(self, rows):
        self.attention_heads_BLHP = np.full((rows, 1, 1, 4), 0.25, np.float32)
    def select(self, index_N):
        return State(len(index_N))

class Decoder:
    max_tokens, normalised = 12, False
    def start(self, grid_BPC, *, max_tokens=None):
        return State(len(grid_BPC))
    def step(self, tokens_B, state):
        logits = np.random.default_rng(0).normal(size=(len(tokens_B), 9)).astype(np.float32)
        return logits, np.full((len(tokens_B), 4), 0.25, np.float32), State(len(tokens_B))

words, grid = SearchVocabulary(size=9, start_id=0, end_id=1), np.zeros((2, 4, 3), np.float32)
for method in ("beam", "greedy", "sample"):
    options = SearchOptions(method=method, max_words=5, seed=0, top_k=4, top_p=0.9, no_repeat_ngram=2)
    assert len(search(Decoder(), grid, vocabulary=words, options=options)) == 2
    if method != "beam":
        list(stream(Decoder(), grid[:1], vocabulary=words, options=options))
score_tokens(Decoder(), grid[:1], vocabulary=words, token_ids=(3, 4))
captioner.confidence.strangeness(grid, mean_C=np.zeros(3, np.float32), basis_KC=np.eye(3, dtype=np.float32)[:1])
print([name for name in sys.modules if name.split(".")[0] in ("torch", "torchvision")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(data=st.data(), rows=st.integers(1, 4), width=st.sampled_from([1, 2, 9, 63, 64, 200]))
def test_topk_finds_the_largest_in_order(kind, data, rows, width):
    count = data.draw(st.integers(1, width))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    values = generator.normal(size=(rows, width)).astype(np.float32)
    before = values.copy()
    best, index = arrays.topk(values if kind == "numpy" else torch.from_numpy(values), count)
    assert (values == before).all()
    np.testing.assert_array_equal(np.asarray(best), -np.sort(-values, axis=1)[:, :count])
    np.testing.assert_array_equal(np.take_along_axis(values, np.asarray(index), axis=1), np.asarray(best))


def test_what_crosses_from_a_device_in_one_piece_arrives_as_it_was():
    """A device is not at hand, so the pieces of `fetch` are put together here."""
    table = torch.randn(4, 7)
    table[1, 2], table[2, 2], table[0, 0] = -torch.inf, torch.nan, -0.0
    sent = (table, torch.arange(12).reshape(4, 3) * 100_000_000, table[:, 2], torch.zeros(0, 5))
    found = arrays.unpack(arrays.pack(*sent).numpy(), sent)
    for one, other in zip(found, sent, strict=True):
        np.testing.assert_array_equal(one, other.numpy())
        assert one.dtype == other.numpy().dtype
        assert one.shape == other.shape
        assert (np.signbit(one) == np.signbit(other.numpy())).all()


@pytest.mark.parametrize(("width", "count"), [(9, 3), (200, 3), (200, 100)])
def test_of_equal_values_the_first_is_taken(width, count):
    values = np.zeros((3, width), dtype=np.float32)
    values[:, 5] = 1.0
    _, index = arrays.topk(values, count)
    assert index.tolist() == [[5, *(place for place in range(count) if place != 5)][:count]] * 3
    assert arrays.topk(torch.from_numpy(values) * 0, 1)[1].tolist() == [[0]] * 3


@pytest.mark.parametrize("row", [[0.0, np.nan, 1.0], [0.0, np.inf, 1.0], [-np.inf] * 3])
def test_a_row_of_logits_that_is_not_all_numbers_has_no_log_softmax(row):
    logits = np.array([[1.0, 2.0, -np.inf], row], dtype=np.float32)
    with arrays.inference(logits):
        found = arrays.log_softmax(logits)
    expected = torch.from_numpy(logits).log_softmax(1)
    assert np.isnan(found[1]).all()
    assert expected[1].isnan().all()
    np.testing.assert_allclose(found[0], expected[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_same_for_every_kind(kind):
    decoder, grid = ToyDecoder(5, seed=1), grids(1)
    options = SearchOptions(method="greedy", max_words=6)
    ((found,),) = search(decoder, grid, vocabulary=decoder.vocabulary, options=options)
    words = list(stream(*of_kind(decoder, grid, kind), vocabulary=decoder.vocabulary, options=options))
    assert tuple(word.token_id for word in words) == found.token_ids
    for word, attention_P in zip(words, found.attention_TP, strict=True):
        np.testing.assert_allclose(word.attention_P, attention_P, **TIGHT)
