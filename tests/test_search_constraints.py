import math

import pytest
import reference_search as reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_decoders import (
    END,
    PAD,
    START,
    UNKNOWN,
    ToyDecoder,
    Tree,
    assert_close,
    brute_force,
    contains,
    grids,
    obeys,
    search,
    sentences,
)

from captioner.config import SearchOptions
from captioner.errors import ConfigError, SearchError
from captioner.search import Phrase
from captioner.search.automaton import START as START_STATE
from captioner.search.automaton import build_automaton
from captioner.search.demands import Demands

pytestmark = pytest.mark.usefixtures("array_kind")

WIDE = 1000


def run(decoder, grid_BPC, options, must_include=(), ban=()):
    return search(
        decoder,
        grid_BPC,
        vocabulary=decoder.vocabulary,
        options=options,
        must_include=[phrase(ids) for ids in must_include],
        ban=[phrase(ids) for ids in ban],
    )


def attempt(function, *arguments):
    """Return the result and None, or None and the message of a SearchError; no other error may come."""
    try:
        return function(*arguments), None
    except SearchError as err:
        return None, str(err)


def phrase(ids):
    return Phrase(" ".join("abcdefgh"[token - 4] if 4 <= token < 12 else f"<{token}>" for token in ids), tuple(ids))


phrases = st.lists(st.integers(4, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def searches(draw):
    """Options and phrases of any kind that `SearchOptions` accepts."""
    method = draw(st.sampled_from(["beam", "beam", "beam", "greedy", "sample"]))
    groups = draw(st.sampled_from([1, 1, 1, 2])) if method == "beam" else 1
    beam_size = groups * draw(st.integers(1, 4))
    min_words = draw(st.integers(1, 4))
    options = SearchOptions(
        method=method,
        beam_size=beam_size,
        n_best=1 if method == "greedy" else draw(st.integers(1, beam_size)),
        min_words=min_words,
        max_words=draw(st.integers(min_words, 5)),
        length_penalty=draw(st.floats(-5, 5)),
        no_repeat_ngram=draw(st.integers(0, 4)),
        groups=groups,
        diversity=draw(st.floats(0, 1e300)),
        temperature=draw(st.floats(1e-300, 1e300)),
        top_k=draw(st.integers(0, 9)),
        top_p=draw(st.floats(0.0, 1.0, exclude_min=True)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    required = draw(st.lists(phrases, max_size=3)) if method == "beam" and groups == 1 else []
    return options, required, draw(st.lists(phrases, max_size=3))


@settings(deadline=None, max_examples=150)
@given(search=searches(), seed=st.integers(0, 50), ends=st.booleans(), pictures=st.integers(1, 3))
def test_whatever_the_options_every_caption_obeys_them(search, seed, ends, pictures):
    options, required, banned = search
    decoder = ToyDecoder(3, seed=seed, impossible=[] if ends else [END])
    demands = [phrase(p) for p in required], [phrase(p) for p in banned]
    result, error = attempt(run, decoder, grids(pictures, seed), options, required, banned)
    if result is None:
        possible = any(obeys(words, options, *demands) for words in sentences(decoder, options.max_words))
        # Only a free repeat can still trap a narrow search; then it says that it was the search.
        assert not possible or ("in the search" in error and options.no_repeat_ngram)
        return
    assert len(result) == pictures
    for found in result:
        assert 1 <= len(found) <= options.n_best
        assert len({h.token_ids for h in found}) == len(found)
        for hypothesis in found:
            assert obeys(hypothesis.token_ids, options, *demands)
            assert ends == (hypothesis.end_log_probability is not None)
            assert len(hypothesis.log_probabilities) == len(hypothesis.token_ids)
            assert hypothesis.attention_TP.shape[0] == len(hypothesis.token_ids)
            assert_close(hypothesis.attention_TP.sum(1), torch.ones(len(hypothesis.token_ids)))


@settings(deadline=None, max_examples=80)
@given(search=searches(), seed=st.integers(0, 20))
def test_a_wide_beam_fails_only_where_no_sentence_meets_the_demands(search, seed):
    options, required, banned = search
    options = SearchOptions(
        beam_size=WIDE,
        n_best=3,
        min_words=options.min_words,
        max_words=options.max_words,
        no_repeat_ngram=options.no_repeat_ngram,
        length_penalty=options.length_penalty,
    )
    decoder, grid = ToyDecoder(3, seed=seed), grids(1, seed)
    expected = brute_force(
        Tree(decoder, grid), decoder, options, [phrase(p) for p in required], [phrase(p) for p in banned]
    )
    result, _ = attempt(run, decoder, grid, options, required, banned)
    if result is None:
        assert expected == []
        return
    (found,) = result
    assert [h.token_ids for h in found] == [words for _, words in expected[:3]]


@settings(deadline=None, max_examples=80)
@given(required=st.lists(phrases, max_size=3), banned=st.lists(phrases, max_size=3), data=st.data())
def test_the_automaton_knows_exactly_what_can_still_be_completed(required, banned, data):
    min_words = data.draw(st.integers(1, 4))
    max_words = data.draw(st.integers(min_words, 5))
    options = SearchOptions(min_words=min_words, max_words=max_words)
    must_include, ban = [phrase(p) for p in required], [phrase(p) for p in banned]
    decoder = ToyDecoder(3)
    automaton = build_automaton(Demands(must_include=tuple(must_include), ban=tuple(ban)), decoder.vocabulary)
    table = automaton.completable(min_words=min_words, max_words=max_words)
    whole = [words for words in sentences(decoder, max_words) if obeys(words, options, must_include, ban)]
    prefixes = {words[:end] for words in whole for end in range(len(words) + 1)}
    for words in [(), *sentences(decoder, max_words)]:
        state = START_STATE
        for token in words:
            state = int(automaton.next_SA[state, automaton.class_V[token]])
        assert bool(table[len(words), state]) == (words in prefixes)
        banned_here = any(contains(words, p) for p in banned)
        assert bool(automaton.met_S[state]) == (not banned_here and all(contains(words, p) for p in required))
        assert bool(automaton.met_S[state]) <= (int(automaton.bank_S[state]) == automaton.banks - 1)


@settings(deadline=None, max_examples=80)
@given(required=st.lists(phrases, min_size=1, max_size=3), ngram=st.integers(1, 3), max_words=st.integers(1, 5))
def test_the_automaton_never_gives_up_a_sentence_that_repeats_nothing(required, ngram, max_words):
    options = SearchOptions(max_words=max_words, no_repeat_ngram=ngram)
    must_include = [phrase(p) for p in required]
    decoder = ToyDecoder(3)
    demands = Demands(must_include=tuple(must_include), no_repeat_ngram=ngram)
    automaton = build_automaton(demands, decoder.vocabulary)
    table = automaton.completable(min_words=1, max_words=max_words)
    for words in sentences(decoder, max_words):
        if obeys(words, options, must_include):
            state = START_STATE
            for count, token in enumerate(words):
                assert table[count, state]
                state = int(automaton.next_SA[state, automaton.class_V[token]])
            assert automaton.met_S[state]


@pytest.mark.parametrize(
    ("required", "words", "possible"),
    [
        ([(4, 5, 6)], (4, 5), True),
        ([(4, 5, 6)], (4, 7), True),
        ([(4, 5, 6)], (4, 5, 7), False),  # "a b" is written and cannot begin "a b c" once more
        ([(4, 5, 6)], (5, 6), False),  # "b c" is written and cannot end it any more
        ([(4, 5, 6)], (4, 5, 6, 7), True),
        ([(4, 5, 6)], (4, 5, 6, 4, 5), False),  # now "a b" is there twice
        ([(4, 5, 6), (7, 4, 5)], (7, 4, 5), True),
        ([(4, 5, 6), (7, 4, 5)], (4, 5), False),  # only "d a b c" has both with one "a b"
    ],
)
def test_a_required_phrase_keeps_its_bigrams_for_itself(required, words, possible):
    demands = Demands(must_include=tuple(phrase(p) for p in required), no_repeat_ngram=2)
    automaton = build_automaton(demands, ToyDecoder(9).vocabulary)
    state = START_STATE
    for token in words:
        state = int(automaton.next_SA[state, automaton.class_V[token]])
    assert bool(automaton.completable(min_words=1, max_words=20)[len(words), state]) is possible


@settings(deadline=None, max_examples=30)
@given(required=st.lists(phrases, min_size=1, max_size=2), ngram=st.integers(1, 3), beam_size=st.integers(1, 3))
def test_with_words_to_spare_a_narrow_beam_finds_every_set_of_phrases_that_can_be(required, ngram, beam_size):
    decoder = ToyDecoder(9, seed=beam_size)
    options = SearchOptions(beam_size=beam_size, max_words=9, no_repeat_ngram=ngram)
    must_include = [phrase(p) for p in required]
    small = SearchOptions(max_words=6, no_repeat_ngram=ngram)
    assume(any(obeys(words, small, must_include) for words in sentences(ToyDecoder(4), 6)))
    for (found,) in run(decoder, grids(2), options, required):
        assert obeys(found.token_ids, options, must_include)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 500),
    required=st.lists(phrases, min_size=1, max_size=2),
    banned=st.lists(phrases, max_size=1),
    beam_size=st.integers(1, 4),
    length_penalty=st.sampled_from([-1.0, 0.0, 1.0]),
    min_words=st.integers(1, 3),
)
def test_constrained_beam_equals_its_plain_description(seed, required, banned, beam_size, length_penalty, min_words):
    decoder, grid = ToyDecoder(3, seed=seed, end_bias=1.0), grids(1, seed)
    options = SearchOptions(
        beam_size=beam_size, n_best=beam_size, min_words=min_words, max_words=5, length_penalty=length_penalty
    )
    demands = [phrase(p) for p in required], [phrase(p) for p in banned]
    expected = reference.beam(Tree(decoder, grid), decoder, options, *demands)
    result, _ = attempt(run, decoder, grid, options, required, banned)
    found = [h.token_ids for h in result[0]] if result else []
    assert found == [words for _, words in expected]


@pytest.mark.parametrize(
    ("required", "words"),
    [
        ([(4, 4, 5)], (4, 4, 4, 5)),
        ([(4, 5, 4, 6)], (4, 5, 4, 5, 4, 6)),
        ([(4, 5), (5,)], (4, 5)),
        ([(4, 5), (5, 6)], (4, 5, 6)),
        ([(4,), (4,)], (4,)),
    ],
)
def test_phrases_may_restart_overlap_and_contain_each_other(required, words):
    """A model that says exactly these words ends there: nothing more is demanded of it."""

    class Says(ToyDecoder):
        def step(self, tokens_B, state):
            logits, attention, state = super().step(tokens_B, state)
            place = len(self.rows) - 1
            logits[:, (*words, END)[place] if place <= len(words) else END] += 100.0
            return logits, attention, state

    decoder = Says(3)
    ((found,),) = run(decoder, grids(1), SearchOptions(max_words=8, beam_size=2), required)
    assert found.token_ids == words
    assert found.score > -1e-3


def test_hypotheses_on_the_way_to_a_phrase_are_not_crowded_out():
    """The word is improbable everywhere, but least at one place: who waits for the last chance misses it."""

    class OnePlace(ToyDecoder):
        def step(self, tokens_B, state):
            logits, attention, state = super().step(tokens_B, state)
            logits[:, 8] = -6.0 if len(self.rows) == 2 else -30.0
            return logits, attention, state

    decoder = OnePlace(5, scale=1.0)
    options = SearchOptions(beam_size=2, max_words=6, min_words=6)
    for (found,) in run(decoder, grids(3), options, [(8,)]):
        assert found.token_ids[1] == 8


def test_a_narrow_constrained_beam_comes_close_to_the_best_caption_with_the_phrases():
    options = SearchOptions(beam_size=3, max_words=5)
    losses = []
    for seed in range(10):
        decoder, grid = ToyDecoder(3, seed=seed, scale=3.0), grids(1, seed)
        tree = Tree(decoder, grid)
        for required in ([(4, 6)], [(5,), (6,)]):
            ((found,),) = run(decoder, grid, options, required)
            best, _ = brute_force(tree, decoder, options, [phrase(p) for p in required])[0]
            losses.append(best - found.score)
    assert min(losses) > -1e-5
    assert sum(losses) / len(losses) < 0.06
    assert sum(loss < 1e-5 for loss in losses) > 0.8 * len(losses)


@pytest.mark.parametrize(
    ("required", "banned", "demands", "named"),
    [
        (
            [(4, 5, 6)],
            [],
            {"max_words": 2},
            r"must_include 'a b c' and max_words=2 \(at least 3 words are needed\)",
        ),
        (
            [(4, 5), (6,), (7,)],
            [(8,)],
            {"max_words": 3},
            r"'a b' and must_include 'c' and must_include 'd' and max_w",
        ),
        ([(4, 5), (6,)], [(5,)], {}, "must_include 'a b' and ban 'b';"),
        ([(6,), (4, 5, 6)], [(5, 6), (7,)], {}, "must_include 'a b c' and ban 'b c';"),
        ([(4, 4)], [], {"no_repeat_ngram": 1}, "must_include 'a a' and no_repeat_ngram=1;"),
        ([(4, 5), (6, 5)], [], {"no_repeat_ngram": 1}, "'a b' and must_include 'c b' and no_repeat_ngram=1;"),
        ([], [(4,), (5,), (6,), (7,), (8,)], {}, "ban 'a' and ban 'b' and ban 'c' and ban 'd' and ban 'e';"),
        ([], [(4, 4), (5,), (6,), (7,), (8,)], {"min_words": 2}, "ban 'a a' and .* and min_words=2;"),
        ([(4, UNKNOWN)], [], {}, "vocabulary lacks a word of it"),
        ([(END,)], [], {}, "vocabulary lacks a word of it"),
        ([(99,)], [], {}, "token 99 lies outside the vocabulary of 9 tokens"),
        ([], [(-1,)], {}, "token -1 lies outside"),
        ([()], [], {}, "must_include '' has no word in it"),
        ([], [()], {}, "ban '' has no word in it"),
    ],
)
def test_an_impossible_demand_is_named(required, banned, demands, named):
    options = SearchOptions(**{"max_words": 6, **demands})
    with pytest.raises(SearchError, match=named):
        run(ToyDecoder(5), grids(1), options, required, banned)


def test_a_ban_of_what_is_never_written_changes_nothing():
    decoder = ToyDecoder(4)
    options = SearchOptions(max_words=5)
    ((plain,),) = run(decoder, grids(1), options)
    ((banned,),) = run(decoder, grids(1), options, (), [(UNKNOWN,), (4, PAD, 5), (END,), (START, 4)])
    assert plain.token_ids == banned.token_ids


def test_a_narrow_search_in_a_dead_end_says_so_and_a_wider_one_finds_the_way():
    """Of two words, few sentences of five have no bigram twice; greedy search walks into "a b a a"-like ends."""
    decoder, demands = ToyDecoder(2, seed=2), {"min_words": 5, "max_words": 5, "no_repeat_ngram": 2}
    with pytest.raises(SearchError, match=r"picture 0 .* no_repeat_ngram=2 and min_words=5 and max_words=5; use m"):
        run(decoder, grids(1), SearchOptions(method="greedy", **demands))
    ((found,),) = run(decoder, grids(1), SearchOptions(beam_size=20, **demands))
    assert obeys(found.token_ids, SearchOptions(**demands))


def test_words_that_the_model_rules_out_are_not_forced_on_it():
    decoder = ToyDecoder(3, impossible=[5])
    with pytest.raises(SearchError, match="must_include 'b'"):
        run(decoder, grids(1), SearchOptions(max_words=4), [(5,)])
    ((found,),) = run(decoder, grids(1), SearchOptions(max_words=4, min_words=4))
    assert 5 not in found.token_ids
    assert math.isfinite(found.score)


def test_so_many_phrases_that_the_tables_would_not_fit_are_an_error():
    decoder = ToyDecoder(200, max_tokens=201)
    options = SearchOptions(max_words=200)
    with pytest.raises(SearchError, match=r"must_include and ban are too much .* name fewer"):
        run(decoder, grids(1), options, [(4 + i, 5 + i) for i in range(0, 200, 2)])
    many_bans = [(4 + i, 4 + j) for i in range(20) for j in range(20, 40)]
    assert run(decoder, grids(1), SearchOptions(max_words=5), (), many_bans)


def test_required_phrases_need_a_plain_beam_and_their_tokens():
    decoder = ToyDecoder(3)
    for options in (
        SearchOptions(method="greedy"),
        SearchOptions(method="sample"),
        SearchOptions(beam_size=4, groups=2),
    ):
        with pytest.raises(ConfigError, match="must_include needs method='beam' with groups=1"):
            run(decoder, grids(1), SearchOptions(**{**options.to_dict(), "max_words": 4}), [(4,)])
    with pytest.raises(ConfigError, match=r"must_include 'dog' .* without its tokens"):
        run(decoder, grids(1), SearchOptions(max_words=4, must_include=("dog",)))
