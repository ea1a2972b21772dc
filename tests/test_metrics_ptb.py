"""Tokens equal those of the Stanford tokenizer as coco-caption calls it."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics_texts import (
    ASCII,
    DATA,
    FOUND,
    PIECES,
    PIECES_OF,
    UNICODE,
    jar_tokens,
    lacks_the_jar,
    mutated,
    random_texts,
    sentences,
    texts,
    words,
)

from captioner.metrics import ptb, tokenize

RECORDED = json.loads((DATA / "metrics_ptb.json").read_text())


def test_tokens_equal_the_recorded_ones():
    assert len(RECORDED) > 700
    assert {text for text, _ in RECORDED} > set(FOUND)
    different = [(text, tokens, tokenize(text)) for text, tokens in RECORDED if words(tokenize(text)) != tokens.split()]
    assert not different


def test_tokens_equal_those_of_the_jar():
    if lacks_the_jar():
        pytest.skip(lacks_the_jar())
    lines = texts(seed=3, count=1500) + [text for kind in PIECES_OF for text in sentences(kind, seed=3, count=200)]
    lines += mutated(lines, UNICODE, seed=3, count=500) + mutated(lines, ASCII, seed=3, count=500)
    lines += random_texts(ASCII, seed=3, count=500) + random_texts(UNICODE, seed=3, count=500)
    different = [
        (line, tokens, tokenize(line))
        for line, tokens in zip(lines, jar_tokens(lines), strict=True)
        if words(tokenize(line)) != tokens
    ]
    assert not different


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's a dog that can't stop.", "it 's a dog that ca n't stop"),
        ("They cannot; we're gonna!", "they can not we 're gon na"),
        ('He said "hi" -- twice...', "he said hi twice"),
        ("A (red) [big] {old} one", "a -lrb- red -rrb- -lsb- big -rsb- -lcb- old -rcb- one"),
        ("Why?? What!", "why ?? what"),
        ("Vitamin C. The label", "vitamin c the label"),
        ("C. label", "c. label"),
        ("Mr. Ito of Acme Inc. in the U.S.", "mr. ito of acme inc. in the u.s."),
        ("1 1/2 cups, ½ cup", "1\u00a01/2 cups 1/2 cup"),
        ("$5, £5, €5 and 5¢", "$ 5 # 5 $ 5 and 5 cents"),
        ("a 3-year-old's t-shirt, and/or x-ray", "a 3-year-old 's t-shirt and/or x-ray"),
        ("see https://x.example/?q=1&b=2 now", "see https://x.example/?q=1&b=2 now"),
        ("a 😀 dog", "a dog"),
        ("co\u00adop caf&eacute; AT&amp;T", "coop caf&eacute; at&t"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_oddities_are_kept(text, tokens):
    assert tokenize(text) == [token for token in tokens.split(" ") if token]


def test_a_line_break_is_a_blank():
    for line_break in ("\n", "\r\n", "\u2028", "\v"):
        assert tokenize(f"A dog.{line_break}The cat") == tokenize("A dog. The cat")


@given(st.text(max_size=60))
def test_any_text_has_tokens(text):
    for token in tokenize(text):
        assert token
        assert token not in ptb.PUNCTUATION
        assert " " not in token
        assert token == token.lower()


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from([*PIECES, "a", "dog", "runs", ","]), max_size=8), st.sampled_from([" ", "  ", "", ", "])
)
def test_the_short_cut_for_plain_words_changes_nothing(pieces, joint):
    text = joint.join(pieces).replace("\u3000", "").replace("\u00a0", "")
    expected = tokenize(text)
    shortcut = ptb._PLAIN
    try:
        ptb._PLAIN = re.compile("(?!)")
        assert tokenize(text) == expected
    finally:
        ptb._PLAIN = shortcut
