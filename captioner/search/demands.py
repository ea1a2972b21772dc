"""What is asked of the words of a caption, as a value that can be taken apart and put together."""

from __future__ import annotations

from dataclasses import dataclass

from captioner.config import WORDS_LIMIT
from captioner.search.hypothesis import Phrase

_NAMED = 5


def _named(option: str, phrases: tuple[Phrase, ...]) -> list[str]:
    """Return how the user named each phrase, of many the first ones."""
    names = [f"{option} {phrase.text!r}" for phrase in phrases[:_NAMED]]
    return names + [f"{len(phrases) - _NAMED} more of {option}"] * (len(phrases) > _NAMED)


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What is asked of the words of a caption. The defaults ask nothing.

    Args:
        min_words: fewest words.
        max_words: most words.
        no_repeat_ngram: no sequence of this many words occurs twice; 0 allows repeats.
        must_include: phrases that must occur.
        ban: phrases that must not.
    """

    min_words: int = 1
    max_words: int = WORDS_LIMIT
    no_repeat_ngram: int = 0
    must_include: tuple[Phrase, ...] = ()
    ban: tuple[Phrase, ...] = ()

    def __str__(self) -> str:
        """Name what is asked as the user named it, such as "ban 'dog' and max_words=9"."""
        names = _named("must_include", self.must_include) + _named("ban", self.ban)
        if self.no_repeat_ngram:
            names.append(f"no_repeat_ngram={self.no_repeat_ngram}")
        if self.min_words > 1:
            names.append(f"min_words={self.min_words}")
        if self.max_words < WORDS_LIMIT:
            names.append(f"max_words={self.max_words}")
        return " and ".join(names)

    def __add__(self, other: Demands) -> Demands:
        """Return both demands together."""
        return Demands(
            min_words=max(self.min_words, other.min_words),
            max_words=min(self.max_words, other.max_words),
            no_repeat_ngram=self.no_repeat_ngram or other.no_repeat_ngram,
            must_include=(*self.must_include, *other.must_include),
            ban=(*self.ban, *other.ban),
        )

    def single(self) -> list[Demands]:
        """Take the demands apart: each by itself."""
        singles = [Demands(must_include=(phrase,)) for phrase in self.must_include]
        singles += [Demands(ban=(phrase,)) for phrase in self.ban]
        if self.no_repeat_ngram:
            singles.append(Demands(no_repeat_ngram=self.no_repeat_ngram))
        if self.min_words > 1:
            singles.append(Demands(min_words=self.min_words))
        if self.max_words < WORDS_LIMIT:
            singles.append(Demands(max_words=self.max_words))
        return singles
