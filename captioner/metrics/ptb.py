"""PTB tokens, equal to those that coco-caption takes from the Stanford tokenizer 3.4.1, without Java.

coco-caption writes all captions into one file, runs `PTBTokenizer -preserveLines -lowerCase`, and drops
punctuation. Here each caption stands alone: its end is a line break, and line breaks inside it are blanks.
Otherwise the tokens are the same, oddities included: brackets are words ("-lrb-"), "??" is one, and the "C."
of "Vitamin C. The label" is "c", but that of "C. label" is "c.".
"""

from __future__ import annotations

import re
from array import array

from captioner.metrics.ptb_patterns import SPACE
from captioner.metrics.ptb_rules import rules

NAME = "PTB (rules of Stanford CoreNLP 3.4.1), lower case, without punctuation"

# As coco-caption has it; its brackets never match, since the tokens are in lower case by then.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_LINE_BREAK = re.compile("[\n\r\u2028\u2029\v\f]")
_BEYOND_16_BITS = re.compile("[\U00010000-\U0010ffff]")
# What nearly all captions consist of and no rule reads otherwise: words before a blank, the last full stop.
_PLAIN = re.compile(
    r"(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)\b)([A-Za-z]+)(?=[ \n]|, )"
    rf"|[ \t]{SPACE}*|\n|\.(?=\n)|,(?= )"
)


def tokenize(text: str) -> list[str]:
    """Split a caption into lower-case words without punctuation.

    Args:
        text: a caption.

    Returns:
        Its words. A word may have a no-break space in it: "1 1/2" is one.
    """
    text = _LINE_BREAK.sub(" ", text) + "\n"
    # The rules count in Java's 16-bit characters, of which an emoji is two.
    wide = _BEYOND_16_BITS.search(text) is not None
    if wide:
        text = "".join(map(chr, array("H", text.encode("utf-16-le", "surrogatepass"))))
    tokens: list[str] = []
    place = 0
    while place < len(text):
        plain = _PLAIN.match(text, place)
        if plain is None:
            token, place = _next(text, place)
        else:
            token, place = plain[1] or "", plain.end()
        if wide:
            token = token.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        token = token.lower()
        if token and token not in PUNCTUATION:
            tokens.append(token)
    return tokens


def _next(text: str, place: int) -> tuple[str, int]:
    """Read the token at a place; return it, empty if dropped, and the place after it."""
    longest: re.Match[str] | None = None
    writer = None
    for pattern, write in rules():
        match = pattern.match(text, place)
        if match is not None and (longest is None or match.end() > longest.end()):
            longest, writer = match, write
    if longest is None or writer is None:
        return "", place + 1
    group = longest.lastindex or 0
    return writer(longest[group]), longest.end(group)
