"""What rows of a search look at, and which looks at which picture: over torch tensors or NumPy arrays alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captioner.arrays import Array, namespace
from captioner.geometry import exact_div

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GridMemory:
    """Keys and values of pictures, and which rows look at which.

    Args:
        keys: [B, ...], one entry per picture.
        values: [B, ...], one entry per picture.
    """

    keys: Array
    values: Array

    def select(self, picture_N: Array) -> GridMemory:
        """Return the memory of the named pictures, in that order."""
        xp = namespace(self.keys)
        return GridMemory(xp.take(self.keys, picture_N, axis=0), xp.take(self.values, picture_N, axis=0))

    def rows_per_picture(self, rows: int) -> int:
        """Return how many of the rows look at each picture."""
        return exact_div(rows, self.keys.shape[0])


class PictureRows:
    """Which picture each row of a state looks at, kept so that pictures are shared and not copied.

    Args:
        pictures: number of pictures in memory.
        rows: number of rows; the first rows / pictures of them look at the first picture, and so on.
    """

    def __init__(self, pictures: int, rows: int) -> None:
        self.pictures = pictures
        self.per_picture = exact_div(rows, pictures) if pictures else 0

    def select(self, index_N: Indices) -> tuple[Indices | None, PictureRows]:
        """Select rows.

        Args:
            index_N: rows of the present order.

        Returns:
            The pictures that the memory must be reduced to (None: all, as they are), and the new order.
        """
        picture_N = index_N // max(self.per_picture, 1)
        rows = len(index_N)
        if rows and rows % self.pictures == 0 and self._all_alike(picture_N):
            return None, PictureRows(self.pictures, rows)
        starts = np.flatnonzero(np.diff(picture_N, prepend=-1))
        count = np.diff(starts, append=len(picture_N))
        if len(count) and (count != count[0]).any():
            # Some pictures have more rows than others: every row gets a picture of its own.
            present, rows_each = picture_N, 1
        else:
            present, rows_each = picture_N[starts], int(count[0]) if len(count) else 0
        chosen = PictureRows(len(present), len(present) * rows_each)
        return present, chosen

    def _all_alike(self, picture_N: Indices) -> bool:
        """Return whether the rows are of all pictures in their order, as many of each: at most steps of a search."""
        return bool((picture_N.reshape(self.pictures, -1) == np.arange(self.pictures)[:, None]).all())
