"""Text ↔ ids over Hugging Face `tokenizers`; ids → readable words and sentence.

A token is a lower-case word of letters and digits, with inner hyphens and apostrophes ("t-shirt", "o'clock");
a possessive is a token of its own ("man", "'s"). Punctuation is dropped: captions are read as one sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from captioner.errors import CheckpointError, ConfigError, DataError

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unk>"
SPECIAL_TOKENS = (PAD, START, END, UNKNOWN)
# A letter or digit and the marks that belong to it: vowel signs of Hindi, accents that have no composed form.
_LETTER, _NO_LETTER = r"(?:[\p{L}\p{N}]\p{M}*)", r"(?![\p{L}\p{M}\p{N}])"
_WORD = rf"'s{_NO_LETTER}|{_LETTER}+(?:[-'](?!s{_NO_LETTER}){_LETTER}+|-s{_NO_LETTER})*"


def _pipeline(vocabulary: dict[str, int]) -> HuggingFaceTokenizer:
    tokenizer = HuggingFaceTokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    quotes = normalizers.Replace(Regex("[’‘ʼ`´]"), "'")
    # Quotes before NFKC, which would make the acute accent a space, and after it, which makes new ones.
    tokenizer.normalizer = normalizers.Sequence(
        [quotes, normalizers.NFKC(), quotes, normalizers.Lowercase(), normalizers.NFKC()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    return tokenizer


def _fault(backend: HuggingFaceTokenizer) -> str | None:
    """Return why a tokenizer is not one of ours; None when it is."""
    if not isinstance(backend.model, models.WordLevel) or backend.model.unk_token != UNKNOWN:
        return f"its model is not a list of words with {UNKNOWN} for all others"
    if backend.normalizer is None or backend.pre_tokenizer is None:
        return "it does not say how a text is split into words"
    if backend.get_added_tokens_decoder() or backend.padding or backend.truncation:
        return "it adds tokens, pads or cuts"
    for index, token in enumerate(SPECIAL_TOKENS):
        if backend.token_to_id(token) != index:
            return f"{token} must have id {index}, got {backend.token_to_id(token)}"
    if sorted(backend.get_vocab().values()) != list(range(backend.get_vocab_size())):
        return "its ids are not 0, 1, 2 and so on, one for each word"
    return None


def _frequent(counts: Counter[str], min_count: int) -> list[str]:
    """Return the words that occur often enough, by falling count, equal counts in alphabetical order."""
    return sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))


class Tokenizer:
    """Words of one vocabulary. The ids of the special tokens are the same in every vocabulary.

    Args:
        backend: a word-level tokenizer with the special tokens first.
        name: of the file that it comes from, for the error message.

    Attributes:
        pad_id: fills batches up; never predicted.
        start_id: read before the first word; never predicted.
        end_id: predicted after the last word.
        unknown_id: stands for every word outside the vocabulary; never written.

    Raises:
        CheckpointError: when the tokenizer was not made by Captioner.
    """

    pad_id, start_id, end_id, unknown_id = range(len(SPECIAL_TOKENS))

    def __init__(self, backend: HuggingFaceTokenizer, *, name: str = "tokenizer") -> None:
        fault = _fault(backend)
        if fault is not None:
            raise CheckpointError(f"{name}: {fault}; the vocabulary was not made by Captioner")
        self._backend = backend

    @classmethod
    def train(cls, captions: Iterable[str], *, min_count: int = 5, max_size: int | None = None) -> Tokenizer:
        """Make a vocabulary from captions.

        Args:
            captions: sentences.
            min_count: a word that occurs less often is left out.
            max_size: most tokens, the special ones included; the rarest words are left out. None: no limit.

        Returns:
            The tokenizer; words by falling count, equal counts in alphabetical order.

        Raises:
            ConfigError: for a `min_count` below 1, or a `max_size` that leaves no room for a word.
            DataError: when no word is left.
        """
        if min_count < 1:
            raise ConfigError(f"min_count must be at least 1, got {min_count}")
        if max_size is not None and max_size <= len(SPECIAL_TOKENS):
            raise ConfigError(f"max_size must be at least {len(SPECIAL_TOKENS) + 1}, got {max_size}")
        counts = cls(_pipeline({token: index for index, token in enumerate(SPECIAL_TOKENS)})).count(captions)
        words = _frequent(counts, min_count)
        if max_size is not None:
            words = words[: max_size - len(SPECIAL_TOKENS)]
        if not words:
            raise DataError(
                f"vocabulary: of {len(counts)} different words none occurs {min_count} times; lower min_count"
            )
        return cls(_pipeline({token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}))

    def count(self, captions: Iterable[str]) -> Counter[str]:
        """Return how often each word occurs in captions, known or not."""
        counts: Counter[str] = Counter()
        for caption in captions:
            counts.update(self.split(caption))
        return counts

    def extended(self, captions: Iterable[str], *, min_count: int = 5) -> Tokenizer:
        """Return this vocabulary with the new words of captions after its own, whose ids stay.

        Args:
            captions: sentences.
            min_count: a new word that occurs less often is left out.

        Returns:
            The larger tokenizer; this one when there is no new word.

        Raises:
            ConfigError: for a `min_count` below 1.
        """
        if min_count < 1:
            raise ConfigError(f"min_count must be at least 1, got {min_count}")
        new = [word for word in _frequent(self.count(captions), min_count) if not self.knows(word)]
        if not new:
            return self
        vocabulary = dict(self._backend.get_vocab())
        vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(new)}
        return Tokenizer(_pipeline(vocabulary))

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._backend.get_vocab_size())

    def split(self, text: str) -> list[str]:
        """Return the words of a text as the vocabulary spells them, known or not."""
        normalised = self._backend.normalizer.normalize_str(text)
        return [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(normalised)]

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of the words of a text, without start and end; unknown words get `unknown_id`."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text that are not in the vocabulary, each once, in order."""
        return list(dict.fromkeys(word for word in self.split(text) if not self.knows(word)))

    def knows(self, word: str) -> bool:
        """Return whether a word, spelt as `split` gives it, is in the vocabulary."""
        return word not in SPECIAL_TOKENS and self._backend.token_to_id(word) is not None

    def word(self, token_id: int) -> str:
        """Return the word of an id as the vocabulary spells it.

        Args:
            token_id: at least 0 and below `vocabulary_size`.

        Returns:
            The word.

        Raises:
            ConfigError: for an id outside the vocabulary: the model is of another one.
        """
        if not 0 <= token_id < self.vocabulary_size:
            raise ConfigError(f"token {token_id} is outside the vocabulary of {self.vocabulary_size} tokens")
        return str(self._backend.id_to_token(token_id))

    def words(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Return one readable word per id, the first with a capital letter.

        Args:
            token_ids: ids without start, end and padding.

        Returns:
            As many words as ids.
        """
        words = [self.word(token_id) for token_id in token_ids]
        if words:
            capital = words[0][:1].title()
            # Letters without a capital of one letter, such as ß, stay: as "Ss" they would be another word.
            if capital.lower() == words[0][:1]:
                words[0] = capital + words[0][1:]
        return tuple(words)

    def sentence(self, token_ids: Sequence[int]) -> str:
        """Return the readable sentence: a capital first, possessives joined to their word, a full stop last.

        Args:
            token_ids: ids without start, end and padding.

        Returns:
            The sentence; empty for no ids.
        """
        text = " ".join(self.words(token_ids)).replace(" '", "'")
        return f"{text}." if text else ""

    def to_json(self) -> str:
        """Return the text of `tokenizer.json`, in the format of the `tokenizers` library."""
        return str(self._backend.to_str(pretty=True))

    @classmethod
    def from_json(cls, text: str, *, name: str = "tokenizer.json") -> Tokenizer:
        """Read what `to_json` wrote.

        Args:
            text: the content of the file.
            name: of the file, for the error message.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: when the text is not a tokenizer, or not one of ours.
        """
        try:
            backend = HuggingFaceTokenizer.from_str(text)
        except Exception as err:  # the Rust library raises plain Exception
            raise CheckpointError(f"{name}: not a tokenizer file of the tokenizers library: {err}") from err
        return cls(backend, name=name)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self.to_json(), encoding="utf-8")
