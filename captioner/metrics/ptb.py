"""PTB tokens, equal to those that coco-caption takes from the Stanford tokenizer 3.4.1, without Java.

coco-caption writes all captions into one file, runs `PTBTokenizer -preserveLines -lowerCase`, and drops
punctuation. Here each caption stands alone: its end is a line break, and line breaks inside it are blanks.
Otherwise the tokens are the same, oddities included: brackets are words ("-lrb-"), "??" is one, and the "C."
of "Vitamin C. The label" is "c", but that of "C. label" is "c.". What stays different: letters that Unicode got
later than the Java runtime have a lower case here and none there; they are kept in addresses alone.
"""

from __future__ import annotations

import re
from array import array
from unicodedata import category

from captioner.metrics.ptb_patterns import SPACE
from captioner.metrics.ptb_rules import rules

NAME = "PTB (rules of Stanford CoreNLP 3.4.1), lower case, without punctuation"

# As coco-caption has it; its brackets never match, since the tokens are in lower case by then.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_LINE_BREAK = re.compile("[\n\r\u2028\u2029\v\f]")
_BEYOND_16_BITS = re.compile("[\U00010000-\U0010ffff]")
_SIGMA = "\u03a3"
# Han and kana, which Java parts from a word that they touch.
_HAN_OR_KANA = re.compile("[\u3005\u3041-\u3094\u309d-\u309e\u30a1-\u30fe\u4e00-\u9fa5\uf900-\ufa2d]")
_CASED_NO_LETTER = re.compile("[\u02b0-\u02b8\u02c0\u02c1\u02e0-\u02e4\u0345\u037a\u1d2c-\u1d61\u2160-\u217f]")
# Words as Java's BreakIterator finds them, over kinds of characters: letters (L), numbers (N), what goes on inside
# letters (W), numbers (M) or both (B), and what counts for nothing (I).
_KINDS = dict.fromkeys(("Lu", "Ll", "Lt", "Lm", "Lo", "Mc"), "L") | {"Nd": "N", "Nl": "N", "No": "N"}
_KINDS |= {"Pd": "W", "Pc": "W", "Mn": "I", "Me": "I", "Cf": "I"}
_JAVA_WORD = re.compile("(?:(?:LI*)+(?:[WB]I*(?:LI*)+)*|(?:NI*)+(?:[MB]I*(?:NI*)+)*)+")
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
        token = _lower(token)
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


def _lower(token: str) -> str:
    """Write a token in lower case as Java does, which differs from Python in where a sigma ends a word."""
    if _SIGMA not in token:
        return token.lower()
    chars = list(token)
    for word in _JAVA_WORD.finditer("".join(map(_kind, token))):
        for i in range(word.start(), word.end()):
            if token[i] == _SIGMA:
                # The other form ends a word: a cased letter somewhere before, and none after it.
                last = any(map(_cased, token[word.start() : i])) and not any(map(_cased, token[i + 1 : word.end()]))
                chars[i] = "\u03c2" if last else "\u03c3"
    return "".join(chars).lower()


def _kind(char: str) -> str:
    if _HAN_OR_KANA.match(char):
        return "-"
    if char in "'\".":
        return "B"
    if char in ",\u066b":
        return "M"
    if char in "\u00ad\u2027":
        return "W"
    return _KINDS.get(category(char), "-")


def _cased(char: str) -> bool:
    return category(char) in ("Lu", "Ll", "Lt") or bool(_CASED_NO_LETTER.match(char))
