"""Can the demands be met at all? Asked before the first step; names those that exclude each other."""

from __future__ import annotations

import bisect
import functools
from dataclasses import replace

from captioner.config import WORDS_LIMIT
from captioner.errors import SearchError
from captioner.search.automaton import START, Tables, build_automaton
from captioner.search.demands import Demands
from captioner.search.hypothesis import Phrase, SearchVocabulary


def feasible_tables(demands: Demands, vocabulary: SearchVocabulary) -> Tables:
    """Build the tables of demands that can be met together.

    Args:
        demands: what is asked.
        vocabulary: which tokens there are.

    Returns:
        The tables.

    Raises:
        SearchError: when a phrase cannot be written, or naming demands that exclude each other.
    """
    # Most searches demand no phrase, and their tables are small; those of phrases can have megabytes.
    phrases = demands.must_include or demands.ban
    return _build(demands, vocabulary) if phrases else _build_once(demands, vocabulary)


def _build(demands: Demands, vocabulary: SearchVocabulary) -> Tables:
    for name, phrases in (("must_include", demands.must_include), ("ban", demands.ban)):
        for phrase in phrases:
            _check_phrase(name, phrase, vocabulary)
    never = {vocabulary.start_id, vocabulary.end_id, *vocabulary.never_ids}
    for phrase in demands.must_include:
        if never & {*phrase.token_ids}:
            raise SearchError(
                f"must_include {phrase.text!r}: this model's vocabulary lacks a word of it; use another word"
            )
    automaton = build_automaton(demands, vocabulary)
    table_TS = automaton.completable(min_words=demands.min_words, max_words=demands.max_words)
    if not table_TS[0, START]:
        raise SearchError(_explain(demands, vocabulary))
    return Tables(automaton=automaton, completable_TS=table_TS, min_words=demands.min_words)


_build_once = functools.lru_cache(maxsize=64)(_build)


def _check_phrase(name: str, phrase: Phrase, vocabulary: SearchVocabulary) -> None:
    if not phrase.token_ids:
        raise SearchError(f"{name} {phrase.text!r} has no word in it; name words such as 'dog' or 'red ball'")
    for token in phrase.token_ids:
        if not 0 <= token < vocabulary.size:
            raise SearchError(
                f"{name} {phrase.text!r}: token {token} lies outside the vocabulary of {vocabulary.size} "
                "tokens; use the tokenizer of this model"
            )


def _feasible(demands: Demands, vocabulary: SearchVocabulary) -> bool:
    automaton = build_automaton(demands, vocabulary)
    return bool(automaton.completable(min_words=demands.min_words, max_words=demands.max_words)[0, START])


def _explain(demands: Demands, vocabulary: SearchVocabulary) -> str:
    core = _conflict(Demands(), demands.single(), vocabulary)
    if core == Demands():
        return "this vocabulary has no word that may be written; never_ids names all of them"
    need = ""
    if core.max_words < WORDS_LIMIT:
        lengths = range(core.max_words, WORDS_LIMIT + 1)
        shortest = bisect.bisect(
            lengths, False, key=lambda words: _feasible(replace(core, max_words=words), vocabulary)
        )
        need = f" (at least {lengths[shortest]} words are needed)"
    return f"no caption can obey {core}{need}; drop or change one of them"


def _conflict(kept: Demands, suspects: list[Demands], vocabulary: SearchVocabulary) -> Demands:
    """Return a smallest part of the suspects that excludes those kept (QuickXplain, Junker 2004)."""
    if not _feasible(kept, vocabulary):
        return Demands()
    if len(suspects) == 1:
        return suspects[0]
    first, second = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
    needed = _conflict(sum(first, kept), second, vocabulary)
    return _conflict(kept + needed, first, vocabulary) + needed
