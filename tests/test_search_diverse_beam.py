import itertools

import pytest
import reference_search as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoders import ToyDecoder, Tree, assert_same, grids, run, words_of

from captioner.config import SearchOptions

pytestmark = pytest.mark.usefixtures("array_kind")


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 500), groups=st.integers(1, 4), size=st.integers(1, 3), diversity=st.floats(0, 8))
def test_diverse_beam_equals_its_plain_description(seed, groups, size, diversity):
    decoder, grid = ToyDecoder(4, seed=seed), grids(1, seed)
    options = SearchOptions(
        beam_size=groups * size, groups=groups, n_best=groups * size, diversity=diversity, max_words=4
    )
    (found,) = run(decoder, grid, options)
    expected = reference.beam(Tree(decoder, grid), decoder, options)[: options.n_best]
    assert words_of(found) == [words for _, words in expected]


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 500),
    groups=st.integers(2, 3),
    n_best=st.integers(1, 4),
    penalty=st.sampled_from([-1.0, 1.0]),
)
def test_early_stopping_changes_nothing_in_a_diverse_beam(seed, groups, n_best, penalty):
    decoder, grid = ToyDecoder(3, seed=seed, end_bias=1.5), grids(1, seed)
    options = SearchOptions(
        beam_size=groups * 2, groups=groups, n_best=n_best, diversity=0.4, max_words=5, length_penalty=penalty
    )
    (found,) = run(decoder, grid, options)
    expected = reference.beam(Tree(decoder, grid), decoder, options)[:n_best]
    assert words_of(found) == [words for _, words in expected]


def test_one_group_equals_a_plain_beam_and_no_diversity_equals_a_narrower_one():
    decoder, grid = ToyDecoder(4, seed=6), grids(3)
    plain = run(decoder, grid, SearchOptions(beam_size=3, n_best=3, max_words=5))
    one = run(decoder, grid, SearchOptions(beam_size=3, n_best=3, groups=1, diversity=9.0, max_words=5))
    same = run(decoder, grid, SearchOptions(beam_size=9, n_best=3, groups=3, diversity=0.0, max_words=5))
    for a, b, c in zip(plain, one, same, strict=True):
        assert_same(a, b)
        assert_same(a, c)


def test_more_diversity_gives_as_many_or_more_different_first_words():
    decoder, grid = ToyDecoder(8, seed=7, scale=6.0), grids(3)
    counts = []
    for diversity in (0.0, 1.0, 5.0, 50.0, 1e300):
        options = SearchOptions(beam_size=4, groups=4, n_best=4, diversity=diversity, max_words=4, min_words=2)
        counts.append([len({words[0] for words in words_of(found)}) for found in run(decoder, grid, options)])
    for less, more in itertools.pairwise(counts):
        assert all(a <= b for a, b in zip(less, more, strict=True))
    assert counts[0] == [1, 1, 1]
    assert counts[-1] == [4, 4, 4]


def test_an_absurd_diversity_only_lowers_words_and_forbids_none():
    decoder, grid = ToyDecoder(2, seed=3), grids(5)
    huge, absurd = (
        run(decoder, grid, SearchOptions(beam_size=9, groups=3, n_best=9, diversity=diversity, max_words=3))
        for diversity in (1e30, 1e300)
    )
    for left, right in zip(huge, absurd, strict=True):
        assert_same(left, right)
        assert len(left) > 3
