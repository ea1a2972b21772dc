"""CIDEr-D: TF-IDF agreement of a caption with its references (Vedantam et al. 2015; constants of coco-caption).

`CiderD` prepares the references once and then scores any number of hypotheses without a Python loop over n-grams,
which is what self-critical training needs: the references of a picture never change, only the samples do.

Shapes: H hypotheses, L tokens of all hypotheses in a row, S references, P pictures, G n-grams of the references,
E pairs (picture, n-gram), U pairs (hypothesis, n-gram), N = 4 orders of n-grams.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captioner.errors import MetricError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MAX_ORDER = 4

# Width of the Gaussian penalty on the difference of lengths, and the factor that coco-caption reports with.
SIGMA = 6.0
SCALE = 10.0

_FORMAT = "captioner-document-frequencies-1"


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many pictures of a corpus each n-gram occurs.

    Attributes:
        name: what the protocol card calls the corpus.
        documents: pictures in the corpus.
        counts: pictures in which the n-gram is in at least one reference.
    """

    name: str
    documents: int
    counts: Mapping[tuple[Hashable, ...], int]

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise MetricError(
                f"document frequencies {self.name!r}: documents must be at least 1, got {self.documents}"
            )

    @classmethod
    def of(cls, references: Iterable[Sequence[Sequence[Hashable]]], *, name: str) -> DocumentFrequencies:
        """Count a corpus.

        Args:
            references: the tokenised references of each picture.
            name: what the protocol card shall call the corpus.

        Returns:
            The frequencies of all n-grams up to order 4.
        """
        counts: Counter[tuple[Hashable, ...]] = Counter()
        documents = 0
        for sentences in references:
            documents += 1
            counts.update({gram for tokens in sentences for gram in _ngrams(tokens)})
        return cls(name, documents, dict(counts))

    def save(self, path: Path | str) -> None:
        """Write the frequencies as JSON.

        Args:
            path: file to write; an older one is replaced.

        Raises:
            MetricError: a token is no text or has a blank in it, so that the file could not be read back; or the
                file cannot be written.
        """
        for gram in self.counts:
            for token in gram:
                if not isinstance(token, str) or not token or token.split(" ") != [token]:
                    raise MetricError(
                        f"{path}: token {token!r} cannot be saved; expected text without blanks"
                    )
        content = {
            "format": _FORMAT,
            "name": self.name,
            "documents": self.documents,
            "counts": {" ".join(map(str, gram)): n for gram, n in self.counts.items()},
        }
        try:
            Path(path).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        except OSError as err:
            raise MetricError(f"{path}: cannot be written: {err.strerror}; choose another place") from err

    @classmethod
    def load(cls, path: Path | str) -> DocumentFrequencies:
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The frequencies.

        Raises:
            MetricError: the file is missing, unreadable or of another format.
        """
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as err:
            raise MetricError(
                f"{path}: cannot be read: {err.strerror}; give a document-frequency file"
            ) from err
        except ValueError as err:
            raise MetricError(
                f"{path}: not JSON: {err}; write it anew with DocumentFrequencies.save"
            ) from err
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise MetricError(f'{path}: no document-frequency file; expected "format": "{_FORMAT}"')
        try:
            counts = {tuple(gram.split(" ")): int(n) for gram, n in content["counts"].items()}
            return cls(str(content["name"]), int(content["documents"]), counts)
        except (KeyError, AttributeError, TypeError, ValueError) as err:
            raise MetricError(f"{path}: damaged document-frequency file ({err!r}); write it anew") from err


def _ngrams(tokens: Sequence[Hashable]) -> Iterable[tuple[Hashable, ...]]:
    for order in range(1, MAX_ORDER + 1):
        yield from zip(*(tokens[i:] for i in range(order)), strict=False)


class CiderD:
    """Scores hypotheses against references that were prepared once.

    Tokens are any hashable values, words or ids, as long as hypotheses and references use the same.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Sequence[Hashable]]],
        *,
        frequencies: DocumentFrequencies | None = None,
    ) -> None:
        """Count and weigh the references.

        Args:
            references: the tokenised references of each picture; at least one each.
            frequencies: of a fixed corpus; default: counted over these references, as coco-caption does.

        Raises:
            MetricError: no pictures, or a picture without references.
        """
        bare = [i for i, sentences in enumerate(references) if not sentences]
        if not references or bare:
            which = f"picture {bare[0]} has no references" if bare else "no pictures"
            raise MetricError(f"CIDEr-D: {which}; give at least one reference per picture")
        corpus = (
            [] if frequencies is None else [gram for gram in frequencies.counts if len(gram) <= MAX_ORDER]
        )
        sentences = [*chain.from_iterable(references), *corpus]
        self._vocabulary: dict[Hashable, int] = {}
        for token in chain.from_iterable(sentences):
            self._vocabulary.setdefault(token, len(self._vocabulary))
        self._tables: list[Ints] = []
        self._first_gram = [0]
        slot_X, gram_X = self._index(sentences, learn=True)
        self._pictures = len(references)
        self._grams = self._first_gram[MAX_ORDER]
        self._count(references, slot_X, gram_X)
        self._weigh(frequencies, corpus, slot_X, gram_X)

    def score(
        self, hypotheses: Sequence[Sequence[Hashable]], pictures: Sequence[int] | Ints | None = None
    ) -> Floats:
        """Score every hypothesis.

        Args:
            hypotheses: tokenised captions.
            pictures: for each hypothesis the index of its picture in the references; default: one hypothesis per
                picture, in their order.

        Returns:
            float64 [H], on coco-caption's scale (0..10).

        Raises:
            MetricError: hypotheses and pictures do not match, or a picture is unknown.
        """
        picture_H = self._picture_indices(len(hypotheses), pictures)
        if not len(hypotheses):
            return np.zeros(0)
        slots = len(hypotheses) * MAX_ORDER
        slot_X, gram_X = self._index(hypotheses, learn=False)
        # Every n-gram once per hypothesis, with its count. Unknown n-grams have numbers above the known ones.
        span = int(gram_X.max(initial=0)) + 1
        key_U, count_U = np.unique(slot_X * span + gram_X, return_counts=True)
        slot_U, gram_U = np.divmod(key_U, span)
        weight_U = count_U * self._idf_G1[np.minimum(gram_U, self._grams)]
        norm_HN = np.sqrt(np.bincount(slot_U, weight_U**2, minlength=slots))

        # Join with the references of the same picture that have the n-gram.
        known = np.flatnonzero(gram_U < self._grams)
        key = picture_H[slot_U[known] // MAX_ORDER] * self._grams + gram_U[known]
        entry = np.minimum(np.searchsorted(self._entry_E, key), len(self._entry_E) - 1)
        hit = self._entry_E[entry] == key
        known, entry = known[hit], entry[hit]
        start = self._pair_start_E1[entry]
        width = self._pair_start_E1[entry + 1] - start
        pair = np.arange(width.sum()) + np.repeat(start - np.cumsum(width) + width, width)
        source = np.repeat(known, width)

        slot = slot_U[source]
        hypothesis = slot // MAX_ORDER
        reference = self._pair_reference[pair]
        reference_weight = self._pair_weight[pair]
        norms = norm_HN[slot] * self._norm_SN[reference * MAX_ORDER + slot % MAX_ORDER]
        length_H = np.array([max(0, len(h) - 1) for h in hypotheses], dtype=np.int64)
        delta = length_H[hypothesis] - self._length_S[reference]
        clipped = np.minimum(weight_U[source], reference_weight) * reference_weight
        clipped *= np.exp(delta**2 / (-2 * SIGMA**2))
        agreement = np.divide(clipped, norms, out=np.zeros_like(clipped), where=norms > 0)
        total_H = np.bincount(hypothesis, agreement, minlength=len(hypotheses))
        return np.asarray(SCALE * total_H / (MAX_ORDER * self._references_P[picture_H]))

    def _picture_indices(self, hypotheses: int, pictures: Sequence[int] | Ints | None) -> Ints:
        picture_H = np.arange(self._pictures) if pictures is None else np.asarray(pictures, dtype=np.int64)
        if picture_H.shape != (hypotheses,):
            raise MetricError(
                f"CIDEr-D: {hypotheses} hypotheses for {picture_H.size} pictures; give one each"
            )
        if hypotheses and (picture_H.min() < 0 or picture_H.max() >= self._pictures):
            raise MetricError(f"CIDEr-D: picture index out of 0..{self._pictures - 1}; number them as given")
        return picture_H

    def _index(self, sentences: Sequence[Sequence[Hashable]], *, learn: bool) -> tuple[Ints, Ints]:
        """Number the n-grams of all sentences.

        An n-gram is looked up as the number of its prefix and its last word: exact, and one sorted table per order
        holds them all. What is not in the tables gets numbers from G on, the same for the same n-gram.

        Args:
            sentences: tokenised sentences.
            learn: put the n-grams into the tables.

        Returns:
            For every occurrence of an n-gram its slot (sentence x 4 + order - 1) and its number.
        """
        words = list(chain.from_iterable(sentences))
        lookup = self._vocabulary.get
        word_L = np.array([lookup(word, -1) for word in words], dtype=np.int64)
        known_words, extra = len(self._vocabulary), dict[Hashable, int]()
        for i in np.flatnonzero(word_L < 0):
            word_L[i] = known_words + extra.setdefault(words[i], len(extra))
        length = np.array([len(s) for s in sentences], dtype=np.int64)
        slot_L = np.repeat(np.arange(len(sentences)) * MAX_ORDER, length)
        left_L = np.repeat(np.cumsum(length), length) - np.arange(len(words))

        if learn:
            self._first_gram.append(known_words)
        next_unknown = self._first_gram[-1] + len(extra)
        number_L = np.where(word_L < known_words, word_L, word_L - known_words + self._first_gram[-1])
        slots, numbers = [slot_L], [number_L.copy()]
        for order in range(2, MAX_ORDER + 1):
            place = np.flatnonzero(left_L >= order)
            prefix, last = number_L[place], word_L[place + order - 1]
            if learn:
                table, number = np.unique(prefix * known_words + last, return_inverse=True)
                self._tables.append(table)
                number += self._first_gram[-1]
                self._first_gram.append(self._first_gram[-1] + len(table))
            else:
                number = self._find(order, prefix, last)
                new = np.flatnonzero(number < 0)
                fresh, rank = np.unique(
                    prefix[new] * (known_words + len(extra)) + last[new], return_inverse=True
                )
                number[new] = next_unknown + rank
                next_unknown += len(fresh)
            number_L[place] = number
            slots.append(slot_L[place] + order - 1)
            numbers.append(number)
        return np.concatenate(slots), np.concatenate(numbers)

    def _find(self, order: int, prefix: Ints, last: Ints) -> Ints:
        """Look n-grams up by prefix and last word; -1 where the tables do not have them."""
        table = self._tables[order - 2]
        number = np.full(len(prefix), -1, dtype=np.int64)
        if len(table):
            key = prefix * len(self._vocabulary) + last
            row = np.minimum(np.searchsorted(table, key), len(table) - 1)
            hit = (
                (table[row] == key) & (last < len(self._vocabulary)) & (prefix < self._first_gram[order - 1])
            )
            number[hit] = row[hit] + self._first_gram[order - 1]
        return number

    def _count(self, references: Sequence[Sequence[Sequence[Hashable]]], slot_X: Ints, gram_X: Ints) -> None:
        """Lay the n-grams out by picture and reference: E sorted keys, each with its run of references."""
        self._references_P = np.array([len(sentences) for sentences in references], dtype=np.int64)
        sentences = int(self._references_P.sum())
        picture_S = np.repeat(np.arange(self._pictures), self._references_P)
        own = slot_X < sentences * MAX_ORDER
        reference_X = slot_X[own] // MAX_ORDER
        key_X = picture_S[reference_X] * self._grams + gram_X[own]
        self._entry_E, entry_X = np.unique(key_X, return_inverse=True)
        key, self._pair_count = np.unique(entry_X * sentences + reference_X, return_counts=True)
        pair_entry, self._pair_reference = np.divmod(key, sentences)
        self._pair_start_E1 = np.searchsorted(pair_entry, np.arange(len(self._entry_E) + 1))
        self._pair_gram = self._entry_E[pair_entry] % self._grams
        self._length_S = np.array(
            [max(0, len(s) - 1) for s in chain.from_iterable(references)], dtype=np.int64
        )

    def _weigh(
        self,
        frequencies: DocumentFrequencies | None,
        corpus: Sequence[tuple[Hashable, ...]],
        slot_X: Ints,
        gram_X: Ints,
    ) -> None:
        """Set the inverse document frequencies, and with them the weights and norms of the references."""
        sentences = int(self._references_P.sum())
        if frequencies is None:
            documents = self._pictures
            frequency_G = np.bincount(self._entry_E % self._grams, minlength=self._grams)
        else:
            documents = frequencies.documents
            frequency_G = np.zeros(self._grams, dtype=np.int64)
            order_C = np.array([len(gram) for gram in corpus], dtype=np.int64)
            # A corpus n-gram was numbered as a sentence of its own: its one occurrence of full order is itself.
            full_slot_C = (np.arange(len(corpus)) + sentences) * MAX_ORDER + order_C - 1
            sought = np.isin(slot_X, full_slot_C)
            of_corpus = slot_X[sought] // MAX_ORDER - sentences
            frequency_C = np.array([frequencies.counts[gram] for gram in corpus], dtype=np.int64)
            frequency_G[gram_X[sought]] = frequency_C[of_corpus]
        inverse_G = np.log(float(documents)) - np.log(np.maximum(1.0, frequency_G))
        self._idf_G1 = np.append(inverse_G, np.log(float(documents)))
        self._pair_weight = self._pair_count * inverse_G[self._pair_gram]
        order_pair = np.searchsorted(self._first_gram, self._pair_gram, side="right") - 1
        self._norm_SN = np.sqrt(
            np.bincount(
                self._pair_reference * MAX_ORDER + order_pair,
                self._pair_weight**2,
                minlength=sentences * MAX_ORDER,
            )
        )
        del self._pair_count, self._pair_gram
