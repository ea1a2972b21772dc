"""CIDEr-D: TF-IDF agreement of a caption with its references (Vedantam et al. 2015; as in coco-caption).

`CiderD` prepares the references once and then scores any number of hypotheses without a Python loop over
n-grams, which is what self-critical training needs: the references of a picture never change, only the
samples do.

Shapes: H hypotheses, L words of all sentences in a row, S references, P pictures, G n-grams, X occurrences of
n-grams, U different n-grams per hypothesis, E pairs (picture, n-gram), C n-grams of a fixed corpus, Z slots:
one per sentence and order of n-grams (1..4).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import reduce
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from captioner.errors import MetricError
from captioner.metrics.fingerprints import Ints, Prints, PrintSet, extend, scramble
from captioner.metrics.frequencies import MAX_ORDER, DocumentFrequencies

Floats = NDArray[np.float64]

# Width of the Gaussian penalty on the difference of lengths, and the factor that coco-caption reports with.
SIGMA = 6.0
SCALE = 10.0
# Hypotheses at a time, which bounds the memory.
_AT_ONCE = 1024
_ORDERS_N1 = np.arange(MAX_ORDER)[:, None]
_ORDER_BITS = 2
# Python salts the hashes of text in every process; fingerprints are made of them.
_SALTED = "captioner"
_TRUE = np.ones(1, dtype=np.bool_)
# The penalty by difference of lengths; beyond the last it is zero in double precision.
_GAUSS = np.exp(-(np.arange(240) ** 2) / (2 * SIGMA**2))


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
        own = list(chain.from_iterable(references))
        corpus = [] if frequencies is None else [gram for gram in frequencies.counts if len(gram) <= MAX_ORDER]
        self._salt = hash(_SALTED)
        self._references_P = np.array([len(sentences) for sentences in references], dtype=np.int64)
        self._first_reference_P = np.cumsum(self._references_P) - self._references_P
        # So many of the highest bits of an entry's fingerprint are its picture.
        self._picture_bits = np.uint64(len(references).bit_length())

        print_X, slot_X, self._length_S = self._occurrences(own)
        whole_C = self._whole_fingerprints(corpus)
        self._grams = PrintSet(np.concatenate([print_X, whole_C]))
        gram_X = self._grams.find(print_X)
        picture_S = np.repeat(np.arange(len(references)), self._references_P)
        entry_print_X = self._of_pictures(picture_S, slot_X >> _ORDER_BITS, print_X)
        self._entries = PrintSet(entry_print_X)
        entry_X = self._entries.find(entry_print_X)
        gram_E = np.zeros(len(self._entries), dtype=np.int64)
        gram_E[entry_X] = gram_X

        documents = len(references) if frequencies is None else frequencies.documents
        if frequencies is None:
            frequency_G = np.bincount(gram_E[np.unique(entry_X)], minlength=len(self._grams))
        else:
            frequency_G = np.zeros(len(self._grams), dtype=np.int64)
            frequency_G[self._grams.find(whole_C)] = [frequencies.counts[gram] for gram in corpus]
        self._unknown_idf = float(np.log(documents))
        idf_G = self._unknown_idf - np.log(np.maximum(1.0, frequency_G))
        # Numbers below G are n-grams, from G on entries: those lie side by side for a picture.
        self._idf_GE = np.concatenate([idf_G, idf_G[gram_E]])
        self._number_bits = np.int64(len(self._idf_GE).bit_length())
        self._lay_out(slot_X, picture_S[slot_X >> _ORDER_BITS], entry_X, idf_G[gram_X])

    def score(self, hypotheses: Sequence[Sequence[Hashable]], pictures: Sequence[int] | Ints | None = None) -> Floats:
        """Score every hypothesis.

        Args:
            hypotheses: tokenised captions.
            pictures: for each hypothesis the index of its picture in the references; default: one hypothesis
                per picture, in their order.

        Returns:
            float64 [H], on coco-caption's scale (0..10).

        Raises:
            MetricError: hypotheses and pictures do not match, a picture is unknown, or the scorer was pickled in
                another process.
        """
        if hash(_SALTED) != self._salt:
            raise MetricError("CIDEr-D: this scorer comes from another process; make it anew in this one")
        picture_H = self._picture_indices(len(hypotheses), pictures)
        parts = [
            self._score(hypotheses[i : i + _AT_ONCE], picture_H[i : i + _AT_ONCE])
            for i in range(0, len(hypotheses), _AT_ONCE)
        ]
        return np.concatenate([np.zeros(0), *parts])

    def _score(self, hypotheses: Sequence[Sequence[Hashable]], picture_H: Ints) -> Floats:
        slots = len(hypotheses) * MAX_ORDER
        print_X, slot_X, length_H = self._occurrences(hypotheses)
        slot_U, number_U, count_U, square_Z = self._count(print_X, slot_X, picture_H)
        square_Z += np.bincount(slot_U, (count_U * self._idf_GE.take(number_U)) ** 2, minlength=slots)

        # What the n-grams share with each reference of the picture, summed per hypothesis and order.
        hit = np.flatnonzero(number_U >= len(self._grams))
        slot, count = slot_U.take(hit), count_U.take(hit)
        references_H = self._references_P.take(picture_H)
        column_R = np.arange(references_H.max())
        cell = self._first_cell_E.take(number_U.take(hit) - len(self._grams))[:, None] + column_R
        shared = self._share_cells.take(cell)
        more = np.flatnonzero(count > 1)
        shared[more] *= np.minimum(count[more, None], self._count_cells.take(cell[more]))

        # Cells beyond the references of a picture belong to others: their penalty is set to zero.
        reference_HR = self._first_reference_P.take(picture_H)[:, None] + column_R
        delta_HR = length_H[:, None] - self._length_S.take(reference_HR, mode="clip")
        gauss_HR = _GAUSS.take(np.abs(delta_HR), mode="clip") * (column_R < references_H[:, None])
        of_all_references = np.einsum("ur,ur->u", shared, gauss_HR.take(slot >> _ORDER_BITS, axis=0))
        shared_Z = np.bincount(slot, of_all_references, minlength=slots)
        norm_Z = np.sqrt(square_Z)
        cosine_Z = np.divide(shared_Z, norm_Z, out=np.zeros(slots), where=norm_Z > 0)
        return np.asarray(SCALE / MAX_ORDER * cosine_Z.reshape(-1, MAX_ORDER).sum(axis=1) / references_H)

    def _count(self, print_X: Prints, slot_X: Ints, picture_H: Ints) -> tuple[Ints, Ints, Ints, Floats]:
        """Number and count the n-grams of hypotheses.

        Args:
            print_X: their fingerprints.
            slot_X: their slots.
            picture_H: the pictures of the hypotheses.

        Returns:
            Slot, number and count of every known n-gram, each once and sorted by slot; and for every slot the
            sum of the squared weights of its unknown n-grams.
        """
        entry_X = self._entries.find(self._of_pictures(picture_H, slot_X >> _ORDER_BITS, print_X))
        missed = np.flatnonzero(entry_X < 0)
        gram = self._grams.find(print_X.take(missed))
        number_X = entry_X + len(self._grams)
        number_X[missed] = gram
        unknown = missed[gram < 0]
        square_Z = self._unknown_idf**2 * _squared_counts(
            print_X.take(unknown), slot_X.take(unknown), len(picture_H) * MAX_ORDER
        )
        key_X = (slot_X << self._number_bits) | number_X
        # Unknown ones have a number of -1, hence that key, and sort below all others.
        key_X.sort()
        key_X = key_X[len(unknown) :]
        key_U, count_U = _runs(key_X)
        return key_U >> self._number_bits, key_U & ((1 << self._number_bits) - 1), count_U, square_Z

    def _picture_indices(self, hypotheses: int, pictures: Sequence[int] | Ints | None) -> Ints:
        known = len(self._references_P)
        picture_H = np.arange(known) if pictures is None else np.asarray(pictures, dtype=np.int64)
        if picture_H.shape != (hypotheses,):
            raise MetricError(f"CIDEr-D: {hypotheses} hypotheses for {picture_H.size} pictures; give one each")
        if hypotheses and (picture_H.min() < 0 or picture_H.max() >= known):
            raise MetricError(f"CIDEr-D: picture index out of 0..{known - 1}; number them as given")
        return picture_H

    def _occurrences(self, sentences: Sequence[Sequence[Hashable]]) -> tuple[Prints, Ints, Ints]:
        """Find the n-grams of sentences.

        Args:
            sentences: tokenised.

        Returns:
            Fingerprint and slot (sentence x 4 + order - 1) of every occurrence; and of every sentence the
            length that the penalty compares: like coco-caption, the number of pairs of words.
        """
        length = np.fromiter(map(len, sentences), np.int64, count=len(sentences))
        hashes = map(hash, chain.from_iterable(sentences))
        print_L = scramble(np.fromiter(hashes, np.int64, count=int(length.sum())))
        print_NL = np.zeros((MAX_ORDER, len(print_L)), dtype=np.uint64)
        print_NL[0] = print_L
        for n in range(1, MAX_ORDER):
            print_NL[n, :-n] = extend(print_NL[n - 1, :-n], print_L[n:])
        left_L = np.repeat(np.cumsum(length), length) - np.arange(len(print_L))
        slot_NL = np.repeat(np.arange(len(length)) << _ORDER_BITS, length) | _ORDERS_N1
        inside = np.flatnonzero(left_L > _ORDERS_N1)
        return print_NL.take(inside), slot_NL.take(inside), np.maximum(length - 1, 0)

    def _whole_fingerprints(self, grams: Sequence[tuple[Hashable, ...]]) -> Prints:
        """Return one fingerprint per n-gram, of all its words."""
        prints = np.zeros(len(grams), dtype=np.uint64)
        for order in range(1, MAX_ORDER + 1):
            rows = [i for i, gram in enumerate(grams) if len(gram) == order]
            hashes = [[hash(word) for word in grams[i]] for i in rows]
            prints[rows] = reduce(extend, scramble(np.array(hashes, dtype=np.int64).reshape(-1, order)).T)
        return prints

    def _of_pictures(self, picture_K: Ints, sentence_X: Ints, print_X: Prints) -> Prints:
        """Return the fingerprints of entries: the picture comes first, so that its entries adjoin.

        Args:
            picture_K: the picture of each sentence.
            sentence_X: the sentence of each n-gram.
            print_X: the fingerprint of each n-gram.

        Returns:
            A fingerprint for each n-gram.
        """
        high_K = picture_K.view(np.uint64) << (np.uint64(64) - self._picture_bits)
        return np.asarray(high_K.take(sentence_X) | (print_X >> self._picture_bits))

    def _lay_out(self, slot_X: Ints, picture_X: Ints, entry_X: Ints, idf_X: Floats) -> None:
        """Give every entry a row of cells, one per reference of its picture.

        A cell has the n-gram's count in the reference, and what one occurrence of it in a hypothesis shares
        with the reference: the product of their weights, count x idf x idf, over the norm of the reference.

        Args:
            slot_X: slots of the n-grams of the references.
            picture_X: their pictures.
            entry_X: their entries.
            idf_X: their inverse document frequencies.
        """
        width_E = np.zeros(len(self._entries), dtype=np.int64)
        width_E[entry_X] = self._references_P[picture_X]
        self._first_cell_E = np.cumsum(width_E) - width_E
        cell_X = self._first_cell_E[entry_X] + (slot_X >> _ORDER_BITS) - self._first_reference_P[picture_X]
        # A row is read as wide as the widest of the batch, beyond its own end.
        cells = int(width_E.sum() + self._references_P.max())
        self._count_cells = np.bincount(cell_X, minlength=cells).astype(np.uint16)
        product_X = self._count_cells[cell_X] * idf_X**2
        # An n-gram with count c occurs c times here: the sum over them is c x c x idf**2, its squared weight.
        norm_X = np.sqrt(np.bincount(slot_X, product_X)[slot_X]) if len(slot_X) else product_X
        self._share_cells = np.zeros(cells)
        self._share_cells[cell_X] = np.divide(product_X, norm_X, out=np.zeros_like(norm_X), where=norm_X > 0)


def _runs(sorted_X: Ints) -> tuple[Ints, Ints]:
    """Return the different values of a sorted array and how often each is there."""
    first = np.flatnonzero(np.concatenate([_TRUE[: len(sorted_X)], sorted_X[1:] != sorted_X[:-1]]))
    end = np.empty_like(first)
    end[:-1] = first[1:]
    end[-1:] = len(sorted_X)
    return sorted_X.take(first), end - first


def _squared_counts(print_X: Prints, slot_X: Ints, slots: int) -> Floats:
    """Sum over the different n-grams of each slot the squares of their counts."""
    key_X = extend(print_X, slot_X.view(np.uint64))
    in_order = np.sort(key_X)
    if not (in_order[1:] == in_order[:-1]).any():
        return np.bincount(slot_X, minlength=slots).astype(np.float64)
    _, first, count = np.unique(key_X, return_index=True, return_counts=True)
    return np.asarray(np.bincount(slot_X[first], count.astype(np.float64) ** 2, minlength=slots), dtype=np.float64)
