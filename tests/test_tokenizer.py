"""Laws of the tokenizer: what is written can be read again, and nothing but words becomes a word."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from captioner.errors import CheckpointError, ConfigError, DataError
from captioner.tokenizer import END, PAD, SPECIAL_TOKENS, START, UNKNOWN, Tokenizer

WORDS = (
    *("a", "man", "'s", "dog", "t-shirt", "o'clock", "rock-'n'-roll", "x-s", "s", "2", "3d", "1960s", "t"),
    *("café", "straße", "ß", "naïve", "мяч", "犬", "हिन्दी", "ნინო", "ﬁ", "l'été", "well-to-do", "b-2-b", "ǰa"),
)
CAPTIONS = [" ".join(WORDS)] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS)


def _word_ids(tokenizer):
    return range(len(SPECIAL_TOKENS), tokenizer.vocabulary_size)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_sentence_of_known_words_is_read_back(tokenizer, data):
    ids = data.draw(st.lists(st.sampled_from(list(_word_ids(tokenizer))), max_size=8))
    sentence = tokenizer.sentence(ids)
    assert list(tokenizer.encode(sentence)) == ids
    assert tokenizer.sentence(tokenizer.encode(sentence)) == sentence


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)


@settings(deadline=None, max_examples=300)
@given(caption=st.lists(words, max_size=6).map(" ".join))
def test_a_sentence_about_anything_is_read_back(caption):
    try:
        tokenizer = Tokenizer.train([caption], min_count=1)
    except DataError:
        return  # no letter and no digit in it
    ids = tokenizer.encode(caption)
    assert Tokenizer.unknown_id not in ids
    assert [tokenizer.word(token_id) for token_id in ids] == tokenizer.split(caption)
    assert tokenizer.encode(tokenizer.sentence(ids)) == ids


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("ab's-'’ ,.<>É1S’"), max_size=20))
def test_splitting_the_sentence_of_a_text_changes_nothing(text):
    try:
        tokenizer = Tokenizer.train([text], min_count=1)
    except DataError:
        return
    ids = tokenizer.encode(text)
    assert tokenizer.encode(tokenizer.sentence(ids)) == ids
    assert [tokenizer.word(token_id) for token_id in ids] == tokenizer.split(text)


@settings(deadline=None, max_examples=50)
@given(captions=st.lists(st.lists(st.sampled_from(WORDS[:8]), min_size=1).map(" ".join), max_size=6))
def test_words_are_counted_whether_known_or_not(captions):
    few = Tokenizer.train(["a man"], min_count=1)
    assert few.count(captions) == Counter(word for caption in captions for word in few.split(caption))


@settings(deadline=None, max_examples=50)
@given(captions=st.lists(st.lists(st.sampled_from(WORDS), min_size=1).map(" ".join)), min_count=st.integers(1, 3))
def test_an_extended_vocabulary_keeps_its_ids_and_adds_the_frequent_new_words(captions, min_count):
    old = Tokenizer.train(["a man a"], min_count=1)
    new = old.extended(captions, min_count=min_count)
    assert [new.word(i) for i in _word_ids(old)] == [old.word(i) for i in _word_ids(old)]
    counts = old.count(captions)
    added = [new.word(token_id) for token_id in range(old.vocabulary_size, new.vocabulary_size)]
    wanted = [word for word in counts if counts[word] >= min_count and not old.knows(word)]
    assert added == sorted(wanted, key=lambda word: (-counts[word], word))
    assert new.extended(captions, min_count=min_count) is new
    assert Tokenizer.from_json(new.to_json(), name="x").to_json() == new.to_json()


def test_a_vocabulary_is_not_extended_by_words_of_no_occurrence(tokenizer):
    with pytest.raises(ConfigError, match="min_count must be at least 1, got 0"):
        tokenizer.extended(["a"], min_count=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog", ["a", "man", "'s", "dog"]),
        ("It’s the boys’ ball", ["it", "'s", "the", "boys", "ball"]),
        ("Five O'Clock", ["five", "o'clock"]),
        ("five o´clock, five o`clock", ["five", "o'clock"] * 2),
        ("a T-shirt - red", ["a", "t-shirt", "red"]),
        ("Dogs , cats ; and (birds) .", ["dogs", "cats", "and", "birds"]),
        ("one-year-old's toy", ["one-year-old", "'s", "toy"]),
        ("an x-s's x-sa", ["an", "x-s", "'s", "x-sa"]),
        ("a--b 'quoted' -c- d'", ["a", "b", "quoted", "c", "d"]),
        ("2nd 50% $20 #1", ["2nd", "50", "20", "1"]),
        ("ＦＵＬＬ ﬁne café", ["full", "fine", "café"]),
        ("ÉCOLE Straße", ["école", "straße"]),
        ("a\tb\nc\u00a0d\u3000e", ["a", "b", "c", "d", "e"]),
        ("snow ☃ ❤️ man", ["snow", "man"]),
        ("हिन्दी", ["हिन्दी"]),
        ("", []),
        (" .,!? ", []),
    ],
)
def test_a_text_is_split_into_words(tokenizer, text, words):
    assert tokenizer.split(text) == words


# Each is spelt otherwise after normalisation: a quote, a letter of two parts, a mark that joins after lower-casing.
@pytest.mark.parametrize("letter", ["ŉ", "Ĳ\u030c", "İ", "Ǆ", "ẞ", "ﬀ", "ǰ", "Σ", "Ⅷ"])
def test_a_letter_of_several_spellings_is_read_back(letter):
    tokenizer = Tokenizer.train([letter], min_count=1)
    ids = tokenizer.encode(letter)
    assert Tokenizer.unknown_id not in ids
    assert tokenizer.encode(tokenizer.sentence(ids)) == ids


def test_unknown_words_are_named_once_and_get_the_unknown_id(tokenizer):
    text = "A zebra's dog and a ZEBRA and a gnu"
    assert tokenizer.unknown_words(text) == ["zebra", "and", "gnu"]
    ids = tokenizer.encode(text)
    known = [tokenizer.knows(word) for word in tokenizer.split(text)]
    assert [token_id != Tokenizer.unknown_id for token_id in ids] == known
    assert ids[1] == ids[6] == Tokenizer.unknown_id


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_no_text_becomes_a_special_token(special):
    bare = special.strip("<>")
    tokenizer = Tokenizer.train([f"a {special} b {bare}"] * 5)
    assert tokenizer.split(f"a {special} b") == ["a", bare, "b"]
    ids = tokenizer.encode(f"{special} a{special}b {special}{special} {special.upper()}")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert not tokenizer.knows(special)
    assert tokenizer.knows(bare)


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("<>padstrendunk| 'A"), max_size=20))
def test_no_text_becomes_pad_start_or_end(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {Tokenizer.pad_id, Tokenizer.start_id, Tokenizer.end_id} & set(ids)
    assert len(ids) == len(tokenizer.split(text))


def test_special_tokens_have_the_same_ids_everywhere(tokenizer):
    ids = (Tokenizer.pad_id, Tokenizer.start_id, Tokenizer.end_id, Tokenizer.unknown_id)
    assert ids == (0, 1, 2, 3)
    assert [tokenizer.word(token_id) for token_id in ids] == [PAD, START, END, UNKNOWN]


def test_only_the_first_word_gets_a_capital(tokenizer):
    ids = tokenizer.encode("a man's t-shirt")
    assert tokenizer.words(ids) == ("A", "man", "'s", "t-shirt")
    assert tokenizer.sentence(ids) == "A man's t-shirt."
    assert tokenizer.words(()) == ()
    assert tokenizer.sentence(()) == ""


@pytest.mark.parametrize(
    ("word", "shown"), [("école", "École"), ("мяч", "Мяч"), ("犬", "犬"), ("ßa", "ßa"), ("ნინო", "ნინო"), ("3d", "3d")]
)
def test_a_capital_never_makes_another_word(word, shown):
    tokenizer = Tokenizer.train([word], min_count=1)
    assert tokenizer.words(tokenizer.encode(word)) == (shown,)
    assert tokenizer.encode(shown) == tokenizer.encode(word)


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, token_id):
    with pytest.raises(ConfigError, match=f"token {token_id} is outside the vocabulary"):
        tokenizer.words([token_id])


# ---- vocabulary --------------------------------------------------------------------------------------------------

corpora = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=6).map(" ".join), min_size=1, max_size=8)


def _vocabulary(tokenizer):
    return [tokenizer.word(token_id) for token_id in _word_ids(tokenizer)]


@settings(deadline=None, max_examples=100)
@given(captions=corpora, min_count=st.integers(1, 4), max_size=st.none() | st.integers(5, 12))
def test_the_vocabulary_holds_the_frequent_words_most_frequent_first(captions, min_count, max_size):
    counts = Counter(" ".join(captions).split())
    expected = sorted((word for word in counts if counts[word] >= min_count), key=lambda w: (-counts[w], w))
    if not expected:
        with pytest.raises(DataError, match=f"none occurs {min_count} times"):
            Tokenizer.train(captions, min_count=min_count, max_size=max_size)
        return
    tokenizer = Tokenizer.train(iter(captions), min_count=min_count, max_size=max_size)
    assert _vocabulary(tokenizer) == expected[: None if max_size is None else max_size - len(SPECIAL_TOKENS)]
    assert tokenizer.vocabulary_size <= (max_size or 99)
    assert all(tokenizer.knows(word) for word in _vocabulary(tokenizer))


@settings(deadline=None, max_examples=30)
@given(captions=corpora.filter(any), seed=st.randoms(use_true_random=False))
def test_the_order_of_the_captions_does_not_matter(captions, seed):
    shuffled = list(captions)
    seed.shuffle(shuffled)
    assert Tokenizer.train(captions, min_count=1).to_json() == Tokenizer.train(shuffled, min_count=1).to_json()


@pytest.mark.parametrize("options", [{"min_count": 0}, {"min_count": -1}, {"max_size": 4}, {"max_size": 0}])
def test_a_vocabulary_without_room_is_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} must be at least"):
        Tokenizer.train(CAPTIONS, **options)


# ---- file --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_tokenizer_is_the_same_after_its_file(tokenizer, data):
    again = Tokenizer.from_json(tokenizer.to_json())
    text = data.draw(st.text(max_size=20) | st.lists(st.sampled_from(WORDS)).map(" ".join))
    assert again.encode(text) == tokenizer.encode(text)
    assert again.to_json() == tokenizer.to_json()
    assert _vocabulary(again) == _vocabulary(tokenizer)


def test_save_writes_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.from_json((tmp_path / "tokenizer.json").read_text(encoding="utf-8")).encode("a dog") == (
        tokenizer.encode("a dog")
    )


@pytest.mark.parametrize("text", ["", "{}", "null", "[1]", "not json", "\x00", '{"version": "1.0"}', "[" * 5000])
def test_a_file_that_is_no_tokenizer_is_refused(text):
    with pytest.raises(CheckpointError, match=r"folder/tokenizer.json: not a tokenizer file"):
        Tokenizer.from_json(text, name="folder/tokenizer.json")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_as_a_tokenizer_of_ours(tokenizer, data):
    text = tokenizer.to_json()
    place = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(place, min(len(text), place + 40)))
    damaged = text[:place] + data.draw(st.text(max_size=3)) + text[end:]
    try:
        read = Tokenizer.from_json(damaged)
    except CheckpointError:
        return
    assert len(read.encode("a man's dog")) == len(read.split("a man's dog"))
    assert len(read.words(range(read.vocabulary_size))) == read.vocabulary_size


def _changed(tokenizer, **parts):
    return json.dumps({**json.loads(tokenizer.to_json()), **parts})


def _word_level(words, *, unk_token=UNKNOWN):
    return {
        "type": "WordLevel",
        "vocab": {word: index for index, word in enumerate(words)},
        "unk_token": unk_token,
    }


def test_a_foreign_tokenizer_is_refused(tokenizer):
    ours = (*SPECIAL_TOKENS, "a")
    bpe = HuggingFaceTokenizer(models.BPE({word: index for index, word in enumerate(ours)}, [], unk_token=UNKNOWN))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    gap = _word_level(ours)
    gap["vocab"]["b"] = 7
    double = _word_level(ours)
    double["vocab"]["b"] = 4
    token = {"id": 9, "content": "x", "single_word": False, "lstrip": False, "rstrip": False}
    foreign = {
        "its model is not a list of words": bpe.to_str(),
        "<pad> must have id 0, got 1": _changed(tokenizer, model=_word_level(("[CLS]", *ours))),
        "<end> must have id 2, got 3": _changed(tokenizer, model=_word_level((PAD, START, UNKNOWN, END, "a"))),
        "<start> must have id 1, got None": _changed(tokenizer, model=_word_level((PAD, "a", END, UNKNOWN))),
        "with <unk> for all others": _changed(tokenizer, model=_word_level(ours, unk_token="a")),
        "its ids are not 0, 1, 2": _changed(tokenizer, model=gap),
        "its ids are not 0, 1, 2 and so on": _changed(tokenizer, model=double),
        "how a text is split": _changed(tokenizer, pre_tokenizer=None),
        "it does not say how a text is split": _changed(tokenizer, normalizer=None),
        "it adds tokens, pads or cuts": _changed(
            tokenizer, added_tokens=[{**token, "normalized": False, "special": True}]
        ),
        "pads or cuts": _changed(
            tokenizer,
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        ),
    }
    for fault, text in foreign.items():
        with pytest.raises(CheckpointError) as caught:
            Tokenizer.from_json(text, name="folder/tokenizer.json")
        assert fault in str(caught.value)
        assert str(caught.value).startswith("folder/tokenizer.json: ")
        assert "not made by Captioner" in str(caught.value)
