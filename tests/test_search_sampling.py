import collections
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoders import END, KINDS, ToyDecoder, Tree, grids, obeys, of_kind, search, sentences, stream

import captioner.search
from captioner.config import SearchOptions
from captioner.errors import ConfigError, SearchError
from captioner.search import Phrase
from captioner.search.sampling import steer

pytestmark = pytest.mark.usefixtures("array_kind")


@pytest.fixture
def known_entropy(monkeypatch):
    """What has no seed is drawn anew each time; here it is drawn from a known one."""
    fresh = np.random.PCG64
    monkeypatch.setattr(np.random, "PCG64", lambda seed: fresh(0 if seed is None else seed))


@pytest.fixture(scope="module")
def as_kind(array_kind):
    """Turn a tensor into an array of the kind that is searched with."""
    return (lambda tensor: tensor.numpy()) if array_kind == "numpy" else (lambda tensor: tensor)


def run(decoder, grid_BPC, ban=(), **options):
    return search(
        decoder,
        grid_BPC,
        vocabulary=decoder.vocabulary,
        options=SearchOptions(method="sample", **options),
        ban=ban,
    )


@pytest.mark.usefixtures("known_entropy")
def test_samples_come_as_often_as_the_model_says():
    decoder, pictures = ToyDecoder(3, seed=2), 4000
    grid = grids(1)
    found = run(decoder, grid.expand(pictures, -1, -1), max_words=2)
    counts = collections.Counter(h.token_ids for (h,) in found)
    tree, expected = Tree(decoder, grid), {}
    for words in sentences(decoder, 2):
        log_probs, ways = tree.log_probabilities(words), tree.after(words).log_probs
        never = [1 - sum(math.exp(tree.after(words[:i]).log_probs[t]) for t in (0, 1, 3)) for i in (0, 1)]
        first = never[0] - math.exp(tree.after(()).log_probs[END])  # no end before min_words=1
        p = math.exp(log_probs[0]) / first
        p *= math.exp(ways[END]) / never[1] if len(words) == 1 else math.exp(log_probs[1]) / never[1]
        expected[words] = p * pictures
    assert sum(expected.values()) == pytest.approx(pictures, rel=1e-5)
    chi_square = sum((counts[w] - e) ** 2 / e for w, e in expected.items() if e > 5)
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


@pytest.mark.usefixtures("known_entropy")
def test_temperature_flattens_and_sharpens_the_distribution(as_kind):
    decoder = ToyDecoder(3, seed=2)
    log_probs = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    for temperature in (0.3, 1.0, 2.5):
        steered = steer(as_kind(log_probs), SearchOptions(method="sample", temperature=temperature))
        torch.testing.assert_close(torch.as_tensor(steered).softmax(1), (log_probs / temperature).softmax(1))
    hot = run(decoder, grids(1).expand(500, -1, -1), max_words=1, temperature=1e300)
    counts = collections.Counter(h.token_ids for (h,) in hot)
    assert all(120 < counts[(token,)] < 215 for token in decoder.words)


def test_the_same_seed_gives_the_same_captions_and_another_seed_others():
    decoder, grid = ToyDecoder(6), grids(3)

    def words(seed):
        return [[h.token_ids for h in found] for found in run(decoder, grid, seed=seed, n_best=3, max_words=8)]

    assert words(5) == words(5)
    assert words(5) != words(6)


@pytest.mark.parametrize("seed", [1, None])
def test_no_global_generator_is_touched_or_asked(seed):
    decoder, grid = ToyDecoder(6), grids(5)

    def words():
        torch.manual_seed(3)
        np.random.seed(3)
        before = torch.get_rng_state(), np.random.get_state()[1:]
        found = [h.token_ids for (h,) in run(decoder, grid, seed=seed, max_words=8)]
        after = torch.get_rng_state(), np.random.get_state()[1:]
        assert torch.equal(before[0], after[0])
        assert str(before[1]) == str(after[1])
        return found

    if seed is None:
        assert any(words() != words() for _ in range(20))
    else:
        assert words() == words()


def test_a_seed_gives_the_same_captions_for_every_kind_of_array():
    decoder, grid = ToyDecoder(6), grids(4)
    options = SearchOptions(method="sample", seed=4, n_best=3, max_words=8, top_p=0.9)
    found = [
        captioner.search.search(*of_kind(decoder, grid, kind), vocabulary=decoder.vocabulary, options=options)
        for kind in KINDS
    ]
    words = [[[h.token_ids for h in hypotheses] for hypotheses in pictures] for pictures in found]
    assert words[0] == words[1]


@pytest.mark.usefixtures("known_entropy")
def test_without_a_seed_equal_pictures_get_captions_of_their_own():
    found = run(ToyDecoder(6), grids(1).expand(20, -1, -1), max_words=8)
    assert len({h.token_ids for (h,) in found}) > 5


def test_with_a_seed_equal_pictures_get_equal_captions():
    found = run(ToyDecoder(6), grids(1).expand(20, -1, -1), max_words=8, seed=0)
    assert len({h.token_ids for (h,) in found}) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-320}, {"temperature": 1e-4}, {"top_p": 1e-9}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_coldest_sampling_equals_greedy(seed, options, dtype):
    # Half precision ties: only top_k=1 must then choose as greedy search does.
    decoder = ToyDecoder(6, seed=seed, dtype=dtype if "top_k" in options else torch.float64)
    grid = grids(4, seed)
    greedy_options = SearchOptions(method="greedy", max_words=6)
    greedy = search(decoder, grid, vocabulary=decoder.vocabulary, options=greedy_options)
    sampled = run(decoder, grid, max_words=6, seed=seed, n_best=2, **options)
    assert [[h.token_ids for h in found] for found in sampled] == [[h.token_ids for h in found] for found in greedy]


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    forbidden=st.sets(st.integers(0, 11)),
)
def test_top_k_then_nucleus_keep_the_smallest_sets(as_kind, logits, top_k, top_p, forbidden):
    raw = torch.tensor([logits]).log_softmax(1)
    forbidden = [i for i in forbidden if i < len(logits)][: len(logits) - 1]
    raw[0, forbidden] = -torch.inf
    kept = torch.as_tensor(steer(as_kind(raw), SearchOptions(method="sample", top_k=top_k, top_p=top_p)))[0]
    chosen = (kept > -torch.inf).nonzero().flatten().tolist()
    left = sorted((raw[0, i].item() for i in range(len(logits)) if i not in forbidden), reverse=True)
    left = left[: top_k or None]
    total = sum(math.exp(x) for x in left)
    assert 1 <= len(chosen) <= len(left)
    assert sorted((raw[0, i].item() for i in chosen), reverse=True) == left[: len(chosen)]
    mass = [math.exp(x) / total for x in left]
    assert sum(mass[: len(chosen)]) >= top_p - 1e-4 or len(chosen) == len(left)
    assert sum(mass[: len(chosen) - 1]) < top_p + 1e-4


def test_samples_are_ranked_by_score_and_distinct():
    decoder = ToyDecoder(3)
    for found in run(decoder, grids(5), n_best=40, max_words=4, seed=2, length_penalty=3.0):
        scores = [h.score for h in found]
        assert scores == sorted(scores, reverse=True)
        assert len({h.token_ids for h in found}) == len(found) > 5


def test_a_sample_in_a_dead_end_does_not_spoil_the_others():
    decoder = ToyDecoder(2, seed=3)
    options = {"min_words": 4, "max_words": 4, "no_repeat_ngram": 2}
    (found,) = run(decoder, grids(1), n_best=50, seed=0, temperature=5.0, **options)
    assert all(obeys(h.token_ids, SearchOptions(**options)) for h in found)
    with pytest.raises(SearchError, match="ran out of words"):
        run(decoder, grids(1), n_best=50, seed=0, min_words=6, max_words=6, no_repeat_ngram=2)


@pytest.mark.parametrize("method", ["greedy", "sample"])
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_gives_the_words_of_the_search(method, seed):
    decoder, grid = ToyDecoder(5, seed=seed), grids(1, seed)
    options = SearchOptions(method=method, seed=seed, max_words=6, min_words=2, no_repeat_ngram=2, top_p=0.95)
    phrases = {"ban": [Phrase("a b", (4, 5))]}
    ((found,),) = search(decoder, grid, vocabulary=decoder.vocabulary, options=options, **phrases)
    words = list(stream(decoder, grid, vocabulary=decoder.vocabulary, options=options, **phrases))
    assert tuple(word.token_id for word in words) == found.token_ids
    assert tuple(word.log_probability for word in words) == found.log_probabilities
    assert np.array_equal(np.stack([word.attention_P for word in words]), found.attention_TP)
    assert np.array_equal(np.stack([word.attention_heads_LHP for word in words]), found.attention_heads_TLHP)


def test_a_stream_steps_the_decoder_only_as_words_are_asked_for():
    decoder = ToyDecoder(5, end_bias=-20.0)
    words = stream(
        decoder, grids(1), vocabulary=decoder.vocabulary, options=SearchOptions(method="greedy", max_words=6)
    )
    assert decoder.rows == []
    for count in (1, 2, 3):
        next(words)
        assert len(decoder.rows) == count
        assert not torch.is_inference_mode_enabled()


def test_a_stream_without_an_end_gives_its_words():
    decoder = ToyDecoder(3, impossible=[END])
    words = stream(
        decoder, grids(1), vocabulary=decoder.vocabulary, options=SearchOptions(method="greedy", max_words=4)
    )
    assert len(list(words)) == 4


def test_a_stream_raises_what_the_search_raises():
    decoder = ToyDecoder(2)
    options = SearchOptions(method="greedy", min_words=5, max_words=5, no_repeat_ngram=1)
    with pytest.raises(SearchError, match="ran out of words"):
        list(stream(decoder, grids(1), vocabulary=decoder.vocabulary, options=options))


@pytest.mark.parametrize(
    ("options", "pictures", "fault"),
    [
        (SearchOptions(max_words=4), 1, "stream with method='greedy'"),
        (SearchOptions(method="sample", n_best=3, max_words=4), 1, "got n_best=3"),
        (SearchOptions(method="greedy", max_words=4), 2, "of one picture, got 2"),
    ],
)
def test_a_stream_is_one_caption_of_one_picture_at_once(options, pictures, fault):
    decoder = ToyDecoder(3)
    with pytest.raises(ConfigError, match=fault):
        stream(decoder, grids(pictures), vocabulary=decoder.vocabulary, options=options)
