"""What the scores miss: how rich, how repetitive and how complete the captions of a set are.

Every figure is of tokens (lower case, no punctuation), and each has one definition, stated at its attribute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Tokens = Sequence[str]

# No English description of a picture ends in one of these. Words that end whole sentences are left out,
# though they are prepositions or determiners elsewhere: "looks on", "walks by", "behind her", "next to each
# other". fmt: off
UNFINISHED_ENDS = frozenset(
    {
        # articles, possessives
        "a",
        "an",
        "the",
        "its",
        "their",
        "his",
        "my",
        "your",
        "our",
        "every",
        # conjunctions and relative words
        "and",
        "or",
        "but",
        "nor",
        "while",
        "as",
        "because",
        "if",
        "than",
        "although",
        "though",
        "whose",
        "which",
        "who",
        # prepositions that need what follows
        "of",
        "at",
        "from",
        "into",
        "onto",
        "for",
        "to",
        "toward",
        "towards",
        "against",
        "between",
        "among",
        "amongst",
        "amidst",
        "during",
        "upon",
        "via",
        "beneath",
        "beside",
        "besides",
        "per",
        # verbs that need what follows
        "is",
        "are",
        "was",
        "were",
        "be",
        "being",
        "has",
        "have",
    }
)

# Words that do not make a phrase: articles, pronouns, prepositions, conjunctions, auxiliaries.
FUNCTION_WORDS = UNFINISHED_ENDS | {
    "this",
    "that",
    "these",
    "those",
    "some",
    "any",
    "each",
    "another",
    "one",
    "other",
    "he",
    "she",
    "it",
    "they",
    "him",
    "her",
    "them",
    "itself",
    "himself",
    "herself",
    "themselves",
    "in",
    "on",
    "by",
    "with",
    "without",
    "near",
    "over",
    "under",
    "above",
    "below",
    "behind",
    "through",
    "across",
    "around",
    "along",
    "up",
    "down",
    "off",
    "out",
    "inside",
    "outside",
    "past",
    "about",
    "after",
    "before",
    "there",
    "where",
    "when",
    "what",
    "'s",
}
# fmt: on

_LONGEST_PHRASE = 4


@dataclass(frozen=True)
class Language:
    """Figures of a set of captions.

    Attributes:
        vocabulary: different words used in all captions together.
        distinct: different captions, as a share of all captions.
        repeated: share of captions that say a phrase twice, see `repeats_phrase`.
        unfinished: share of captions that break off, see `is_unfinished`.
        mean_words: words per caption.
        longest_words: words of the longest caption.
    """

    vocabulary: int
    distinct: float
    repeated: float
    unfinished: float
    mean_words: float
    longest_words: int


def describe(captions: Sequence[Tokens]) -> Language:
    """Take the figures of a set.

    Args:
        captions: tokenised captions, at least one.

    Returns:
        The figures.
    """
    total = len(captions)
    return Language(
        vocabulary=len({word for tokens in captions for word in tokens}),
        distinct=len({tuple(tokens) for tokens in captions}) / total,
        repeated=sum(map(repeats_phrase, captions)) / total,
        unfinished=sum(map(is_unfinished, captions)) / total,
        mean_words=sum(map(len, captions)) / total,
        longest_words=max(map(len, captions)),
    )


def is_unfinished(tokens: Tokens) -> bool:
    """Tell whether a caption breaks off: it is empty, or its last word is one of `UNFINISHED_ENDS`.

    Args:
        tokens: the words of the caption.

    Returns:
        Whether it breaks off.
    """
    return not tokens or tokens[-1] in UNFINISHED_ENDS


def repeats_phrase(tokens: Tokens) -> bool:
    """Tell whether a caption says a phrase twice: "a blue shirt and a blue shirt", "a dog a dog", "on on".

    That is: a run of 1 to 4 words is followed at once by itself; or a run of 2 to 4 words, at least two of
    them outside `FUNCTION_WORDS`, comes again later without overlap. "A man in red and a man in blue" repeats
    nothing: of "a man in" only "man" is a content word.

    Args:
        tokens: the words of the caption.

    Returns:
        Whether a phrase comes twice.
    """
    for size in range(1, _LONGEST_PHRASE + 1):
        first_seen: dict[tuple[str, ...], int] = {}
        for start in range(len(tokens) - size + 1):
            run = tuple(tokens[start : start + size])
            if run == tuple(tokens[start + size : start + 2 * size]):
                return True
            if sum(word not in FUNCTION_WORDS for word in run) < 2:
                continue
            if start - first_seen.setdefault(run, start) >= size:
                return True
    return False
