"""64-bit fingerprints of n-grams, and sets of them that are looked up many at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Prints = NDArray[np.uint64]

# Odd constants with no pattern, those of SplitMix64 (Steele, Lea & Flood 2014).
_STEP = np.uint64(0x9E3779B97F4A7C15)
# That an n-gram has this one has a chance of 2**-64.
_GAP = np.uint64(2**64 - 1)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def scramble(hashes: Ints) -> Prints:
    """Turn hashes of words, or ids of tokens, into 64 bits that look random; different ones stay different.

    Args:
        hashes: int64; used up.

    Returns:
        uint64, same shape.
    """
    z = hashes.view(np.uint64)
    z += _STEP
    z *= _MIX_1
    z ^= z >> np.uint64(32)
    z *= _MIX_2
    return z


def extend(prefix: Prints, last: Prints) -> Prints:
    """Return the fingerprints of n-grams from those of their first n-1 words and of their last words.

    Two different n-grams have the same by accident with a chance of about 2**-64.

    Args:
        prefix: uint64.
        last: uint64, same shape.

    Returns:
        uint64, same shape.
    """
    return np.asarray(prefix * _STEP + last)


class PrintSet:
    """A set of fingerprints that many can be looked up in at once; every fingerprint in it has a number.

    It is a sorted list with gaps: where one belongs follows from its highest bits, and it lies there, or, if
    the place is taken by smaller ones, in the next places. The numbers are the places, so that they too have
    gaps.
    """

    def __init__(self, prints: Prints) -> None:
        """Lay the fingerprints out.

        Args:
            prints: uint64; may repeat.
        """
        ordered = np.unique(prints)
        highest = int(ordered[-1]) + 1 if len(ordered) else 1
        # Two to four places for each, where there are any.
        bits = (len(ordered) * 2**64 // highest).bit_length() + 2
        self._shift = np.uint64(64 - bits)
        rank = np.arange(len(ordered))
        place = np.maximum.accumulate((ordered >> self._shift).view(np.int64) - rank) + rank
        # A gap holds what no fingerprint is above: every search ends there at the latest.
        self._table = np.full(max(2**bits, int(place.max(initial=0)) + 1) + 1, _GAP)
        self._table[place] = ordered

    def __len__(self) -> int:
        """Return a number that is above those of all fingerprints."""
        return len(self._table)

    def find(self, prints: Prints) -> Ints:
        """Look fingerprints up.

        Args:
            prints: uint64.

        Returns:
            int64, the number of each; -1 where it is not in the set.
        """
        place = (prints >> self._shift).view(np.int64)
        found = self._table.take(place)
        low = np.flatnonzero(found < prints)
        while low.size:
            place[low] += 1
            found[low] = self._table.take(place[low])
            low = low[found[low] < prints[low]]
        np.copyto(place, -1, where=found != prints)
        return place
