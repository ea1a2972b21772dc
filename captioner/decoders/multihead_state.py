"""What the transformer decoder remembers between two steps, over torch tensors or NumPy arrays alike.

Shapes as in `protocol.py`; R rows of each picture, S slots of the cache.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from captioner.arrays import Array, namespace, send, to_numpy
from captioner.rows import GridMemory, PictureRows


@dataclass(frozen=True)
class MultiheadState:
    """State of the transformer decoder; see `DecoderState`.

    The words of all rows of a picture lie side by side in one cache, a slot for each word that was ever read, and
    every row sees the slots of its own past: to reorder a beam is to reorder the rows of `seen_NS`, and no key or
    value is copied.

    Args:
        keys: of the words so far, one [B, H, S, D per head] per layer; S slots are allocated ahead.
        values: likewise.
        seen_NS: bool, which slots are a row's own past.
        slots: how many are taken.
        position: int64 [1], the number of tokens that every row has read.
        steps_left: how many more steps may be taken.
        attention_heads_BLHP: of the last step; before the first, no row.
        memories: the pictures, one memory per layer, shared by their rows.
        rows: which row looks at which picture.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    seen_NS: Array
    slots: int
    position: Array
    steps_left: int
    attention_heads_BLHP: Array
    memories: tuple[GridMemory, ...]
    rows: PictureRows

    def select(self, index_N: Array) -> MultiheadState:
        """Return the state of the named rows; see `DecoderState.select`."""
        kept, rows = self.rows.select(to_numpy(index_N))
        keys, values, memories = self.keys, self.values, self.memories
        if kept is not None:
            pictures = send(kept, index_N)
            keys = tuple(_take(cache, pictures) for cache in keys)
            values = tuple(_take(cache, pictures) for cache in values)
            memories = tuple(memory.select(pictures) for memory in memories)
        stepped = self.attention_heads_BLHP.shape[0] > 0
        return dataclasses.replace(
            self,
            keys=keys,
            values=values,
            seen_NS=self.seen_NS[index_N],
            attention_heads_BLHP=self.attention_heads_BLHP[index_N] if stepped else self.attention_heads_BLHP,
            memories=memories,
            rows=rows,
        )

    def with_room(self, slots: int) -> MultiheadState:
        """Return the state with room for so many more slots; what is allocated at least doubles when it grows."""
        allocated = self.seen_NS.shape[1]
        missing = self.slots + slots - allocated
        if missing <= 0:
            return self
        more = max(missing, allocated)
        return dataclasses.replace(
            self,
            keys=tuple(_longer(cache, more, axis=2) for cache in self.keys),
            values=tuple(_longer(cache, more, axis=2) for cache in self.values),
            seen_NS=_longer(self.seen_NS, more, axis=1),
        )


def _take(cache: Array, pictures: Array) -> Array:
    return namespace(cache).take(cache, pictures, axis=0)


def _longer(values: Array, more: int, *, axis: int) -> Array:
    """Return the values with so many zeros behind them along an axis."""
    xp = namespace(values)
    shape = [*values.shape]
    shape[axis] = more
    return xp.concat([values, xp.zeros(shape, dtype=values.dtype, **_device(values))], axis=axis)


def _device(like: Array) -> dict[str, Any]:
    """Return the keyword that makes a new array on the device of another; NumPy has no devices."""
    return {} if isinstance(like, np.ndarray) else {"device": like.device}
