import dataclasses
import itertools
import math

import numpy as np
import pytest
import reference_search as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoders import (
    END,
    START,
    ToyDecoder,
    Tree,
    assert_close,
    assert_same,
    brute_force,
    grids,
    obeys,
    run,
    stream,
    words_of,
)

from captioner.config import SearchOptions
from captioner.search import Phrase

pytestmark = pytest.mark.usefixtures("array_kind")

WIDE = 1000


def rank(hypothesis, length_penalty):
    ends = [] if hypothesis.end_log_probability is None else [hypothesis.end_log_probability]
    log_probs = [*hypothesis.log_probabilities, *ends]
    return math.fsum(log_probs) / len(log_probs) ** length_penalty


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("demands", [{}, {"min_words": 3}, {"no_repeat_ngram": 2}, {"max_words": 2}])
def test_greedy_takes_the_best_permitted_token_at_every_step(seed, demands):
    decoder, grid = ToyDecoder(4, seed=seed), grids(1, seed)
    options = SearchOptions(**{"method": "greedy", "max_words": 5, **demands})
    ban = [Phrase("a b", (4, 5))]
    ((found,),) = run(decoder, grid, options, ban=ban)
    words, end = reference.greedy(Tree(decoder, grid), decoder, options, ban)
    assert found.token_ids == words
    assert found.end_log_probability == pytest.approx(end, abs=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_beam_of_one_equals_greedy(seed):
    decoder, grid = ToyDecoder(4, seed=seed), grids(5, seed)
    demands = {"max_words": 7, "min_words": 2, "no_repeat_ngram": 2}
    ban = [Phrase("b c", (5, 6))]
    beam = run(decoder, grid, SearchOptions(beam_size=1, **demands), ban=ban)
    greedy = run(decoder, grid, SearchOptions(method="greedy", **demands), ban=ban)
    for left, right in zip(beam, greedy, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize(
    ("demands", "must_include", "ban"),
    [
        ({}, (), ()),
        ({"min_words": 3}, (), ()),
        ({"min_words": 4}, (), ((5,), (4, 4))),
        ({"no_repeat_ngram": 1}, (), ()),
        ({"no_repeat_ngram": 2}, (), ((6, 5),)),
        ({}, ((5, 4), (6,)), ()),
        ({"min_words": 3, "no_repeat_ngram": 2}, ((4, 4, 6), (6, 4)), ((5, 6),)),
        ({"no_repeat_ngram": 1}, ((6, 4),), ()),
    ],
)
def test_a_beam_as_wide_as_the_space_equals_brute_force(length_penalty, demands, must_include, ban):
    decoder, grid = ToyDecoder(3, seed=2), grids(2)
    options = SearchOptions(beam_size=WIDE, n_best=12, max_words=4, length_penalty=length_penalty, **demands)
    phrases = {
        "must_include": [Phrase(str(ids), ids) for ids in must_include],
        "ban": [Phrase(str(ids), ids) for ids in ban],
    }
    for picture, found in enumerate(run(decoder, grid, options, **phrases)):
        tree = Tree(decoder, grid[picture : picture + 1])
        expected = brute_force(tree, decoder, options, **phrases)[:12]
        assert words_of(found) == [words for _, words in expected]
        assert [rank(h, length_penalty) for h in found] == pytest.approx([s for s, _ in expected], abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    beam_size=st.integers(1, 6),
    length_penalty=st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.7, 1.0, 2.0, 5.0]),
    min_words=st.integers(1, 4),
    scale=st.sampled_from([0.5, 2.0, 6.0]),
    data=st.data(),
)
def test_early_stopping_changes_nothing(seed, beam_size, length_penalty, min_words, scale, data):
    decoder, grid = ToyDecoder(3, seed=seed, scale=scale), grids(2, seed)
    n_best = data.draw(st.integers(1, beam_size))
    options = SearchOptions(
        beam_size=beam_size, n_best=n_best, max_words=5, min_words=min_words, length_penalty=length_penalty
    )
    for picture, found in enumerate(run(decoder, grid, options)):
        expected = reference.beam(Tree(decoder, grid[picture : picture + 1]), decoder, options)[:n_best]
        assert words_of(found) == [words for _, words in expected]


@pytest.mark.parametrize("length_penalty", [-1.0, -0.3, 0.0, 0.7, 1.0, 2.0])
def test_asking_for_fewer_captions_gives_the_first_of_more(length_penalty):
    """To ask for fewer is to stop earlier."""
    for seed in range(12):
        decoder, grid = ToyDecoder(3, seed=seed, scale=5.0, end_bias=2.0), grids(8, seed)
        one, three = (
            run(
                decoder,
                grid,
                SearchOptions(beam_size=3, n_best=n, max_words=8, length_penalty=length_penalty),
            )
            for n in (1, 3)
        )
        assert [words_of(found) for found in one] == [words_of(found)[:1] for found in three]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_stops_as_soon_as_no_open_hypothesis_can_win(length_penalty):
    decoder, grid = ToyDecoder(4, seed=3, end_bias=12.0, max_tokens=41), grids(3)
    options = SearchOptions(beam_size=4, max_words=40, min_words=3, length_penalty=length_penalty)
    found = run(decoder, grid, options)
    assert all(len(h.token_ids) == 3 for (h,) in found)
    assert len(decoder.rows) < 41


def test_a_constrained_beam_stops_when_no_place_is_left_for_another_end():
    decoder, must_include = ToyDecoder(4, seed=3, end_bias=4.0, max_tokens=41), [Phrase("a", (4,))]
    run(decoder, grids(3), SearchOptions(beam_size=2, n_best=2, max_words=40), must_include=must_include)
    assert len(decoder.rows) < 20


def test_finished_pictures_leave_the_batch():
    decoder, grid = ToyDecoder(4, seed=5), grids(12)
    found = run(decoder, grid, SearchOptions(method="greedy", max_words=10))
    lengths = [len(h.token_ids) for (h,) in found]
    assert len(set(lengths)) > 2, "this toy must end at different steps"
    assert decoder.rows == [sum(length >= step for length in lengths) for step in range(max(lengths) + 1)]


def test_pictures_are_looked_at_once_and_the_first_step_has_one_row_for_each():
    decoder, grid = ToyDecoder(6), grids(4)
    for options in (
        SearchOptions(beam_size=5),
        SearchOptions(beam_size=6, groups=3),
        SearchOptions(method="sample", n_best=5),
    ):
        decoder.starts.clear()
        run(decoder, grid, dataclasses.replace(options, max_words=6))
        assert decoder.starts == [4]
        assert decoder.rows[0] == 4
        assert max(decoder.rows) <= 4 * max(options.beam_size, options.n_best)


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(method="greedy", max_words=6),
        SearchOptions(beam_size=4, n_best=4, max_words=6),
        SearchOptions(beam_size=4, n_best=2, max_words=6, length_penalty=-1.0, no_repeat_ngram=2, min_words=2),
        SearchOptions(beam_size=6, n_best=6, groups=3, diversity=1.0, max_words=6),
        SearchOptions(method="sample", n_best=4, seed=7, max_words=6, top_p=0.9),
    ],
)
def test_batch_equals_singles(options):
    decoder, grid = ToyDecoder(5, seed=11), grids(7)
    ban = [Phrase("a b", (4, 5))]
    for picture, together in enumerate(run(decoder, grid, options, ban=ban)):
        (alone,) = run(decoder, grid[picture : picture + 1], options, ban=ban)
        assert_same(together, alone)


def test_batch_equals_singles_with_required_phrases():
    decoder, grid = ToyDecoder(5, seed=12), grids(6)
    options = SearchOptions(beam_size=3, n_best=3, max_words=6)
    must_include = [Phrase("a c", (4, 6)), Phrase("b", (5,))]
    for picture, together in enumerate(run(decoder, grid, options, must_include=must_include)):
        (alone,) = run(decoder, grid[picture : picture + 1], options, must_include=must_include)
        assert_same(together, alone)


@pytest.mark.parametrize(
    ("options", "must_include"),
    [
        (SearchOptions(method="greedy", max_words=6), ()),
        (SearchOptions(beam_size=5, n_best=5, max_words=6), ()),
        (SearchOptions(beam_size=6, n_best=6, groups=3, max_words=6), ()),
        (SearchOptions(beam_size=4, n_best=4, max_words=6), (Phrase("b c", (5, 6)), Phrase("a", (4,)))),
        (
            SearchOptions(method="sample", n_best=6, temperature=2.0, top_k=4, seed=1, max_words=6, min_words=3),
            (),
        ),
    ],
)
def test_what_is_reported_equals_a_teacher_forced_pass_of_the_same_words(options, must_include):
    decoder, grid = ToyDecoder(5, seed=21), grids(4)
    for picture, found in enumerate(run(decoder, grid, options, must_include=must_include)):
        for hypothesis in found:
            words = hypothesis.token_ids
            logits, attention = decoder.forward(grid[picture : picture + 1], torch.tensor([[START, *words]]))
            log_probs = logits[0].float().log_softmax(-1)
            expected = [float(log_probs[i, token]) for i, token in enumerate((*words, END))]
            assert [*hypothesis.log_probabilities, hypothesis.end_log_probability] == pytest.approx(expected, abs=1e-5)
            assert hypothesis.score == pytest.approx(math.fsum(expected) / len(expected), abs=1e-5)
            assert_close(hypothesis.attention_TP, attention[0, :-1].float())
            tree = Tree(decoder, grid[picture : picture + 1])
            heads = torch.stack([tree.after(words[:i]).heads for i in range(len(words))])
            assert_close(hypothesis.attention_heads_TLHP, heads)
            natural = len(words) < 6 or int(log_probs[-1].argmax()) == END
            assert hypothesis.finished == natural


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_a_search_that_meets_no_end_returns_its_best(method):
    decoder, grid = ToyDecoder(3, seed=4, impossible=[END]), grids(2)
    options = SearchOptions(method=method, beam_size=WIDE, max_words=4, seed=0)
    for picture, (found,) in enumerate(run(decoder, grid, options)):
        assert len(found.token_ids) == 4
        assert found.end_log_probability is None
        assert not found.finished
        assert found.score == pytest.approx(math.fsum(found.log_probabilities) / 4)
        if method == "beam":
            tree = Tree(decoder, grid[picture : picture + 1])
            best = max(itertools.product(decoder.words, repeat=4), key=lambda w: sum(tree.log_probabilities(w)))
            assert found.token_ids == best


def test_captions_without_an_end_rank_after_those_with_one():
    """With a repeat forbidden and only two words, "a" ends nowhere and "b" ends everywhere."""

    class EndsAfterB(ToyDecoder):
        def step(self, tokens_B, state):
            logits, attention, state = super().step(tokens_B, state)
            logits[tokens_B != 5, END] = -torch.inf
            return logits, attention, state

    decoder = EndsAfterB(2, seed=1)
    options = SearchOptions(beam_size=WIDE, n_best=10, max_words=3, no_repeat_ngram=1)
    (found,) = run(decoder, grids(1), options)
    assert words_of(found)[-1] == (5, 4), "the only caption that is stuck"
    assert set(words_of(found)) == {(5,), (4, 5), (5, 4)}
    assert [h.end_log_probability is None for h in found] == [False, False, True]
    assert [h.finished for h in found] == [True, True, False]


def test_only_an_end_that_the_model_itself_preferred_is_finished_at_the_limit():
    for end_bias, finished in ((20.0, True), (-20.0, False)):
        decoder = ToyDecoder(3, end_bias=end_bias)
        ((found,),) = run(decoder, grids(1), SearchOptions(method="greedy", min_words=3, max_words=3))
        assert found.finished is finished
        assert found.end_log_probability is not None


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 500), size=st.integers(1, 8), penalty=st.floats(-5, 5), groups=st.sampled_from([1, 2]))
def test_captions_are_sorted_and_distinct(seed, size, penalty, groups):
    decoder = ToyDecoder(3, seed=seed)
    options = SearchOptions(
        beam_size=size * groups, n_best=size * groups, groups=groups, length_penalty=penalty, max_words=4
    )
    (found,) = run(decoder, grids(1, seed), options)
    ranks = [rank(h, penalty) for h in found]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(words_of(found))) == len(found)
    assert 1 <= len(found) <= options.n_best


def test_the_beam_is_wider_than_the_vocabulary():
    decoder, grid = ToyDecoder(1, seed=1), grids(2)
    for found in run(decoder, grid, SearchOptions(beam_size=50, n_best=50, max_words=4)):
        assert sorted(words_of(found)) == [(4,) * n for n in (1, 2, 3, 4)]


def test_maps_are_arrays_that_own_their_memory():
    decoder = ToyDecoder(3)
    (found, _), _ = run(decoder, grids(2), SearchOptions(n_best=2, max_words=5))
    options = SearchOptions(method="greedy", max_words=5)
    words = list(stream(decoder, grids(1), vocabulary=decoder.vocabulary, options=options))
    for maps in (
        found.attention_TP,
        found.attention_heads_TLHP,
        words[0].attention_P,
        words[0].attention_heads_LHP,
    ):
        assert type(maps) is np.ndarray
        assert maps.dtype == np.float32
        assert maps.base is None
        assert maps.flags.owndata
        assert maps.flags.writeable
        assert maps.flags.c_contiguous


def test_every_caption_obeys_in_a_long_search():
    decoder, grid = ToyDecoder(6, seed=9, max_tokens=201), grids(3)
    options = SearchOptions(beam_size=4, n_best=4, min_words=30, max_words=200, no_repeat_ngram=2)
    for found in run(decoder, grid, options):
        assert all(obeys(words, options) for words in words_of(found))
