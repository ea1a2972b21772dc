"""What the transformer decoder remembers between two steps, and what a step gives.

Shapes as in `protocol.py`; R rows of each picture, S slots of the cache.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from captioner.attention import GridMemory
from captioner.rows import PictureRows


class StepOutput(NamedTuple):
    """What a step of R rows per picture gives.

    Args:
        logits_BRV: of the next token.
        attention_BRP: where the rows looked, the summary of the layers and heads.
        heads_BRLHP: where each head of each layer looked.
        keys: of the new tokens, one [B, H, R, D per head] per layer.
        values: likewise.
    """

    logits_BRV: Tensor
    attention_BRP: Tensor
    heads_BRLHP: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


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

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    seen_NS: Tensor
    slots: int
    position: Tensor
    steps_left: int
    attention_heads_BLHP: Tensor
    memories: tuple[GridMemory, ...]
    rows: PictureRows

    def select(self, index_N: Tensor) -> MultiheadState:
        """Return the state of the named rows; see `DecoderState.select`."""
        kept, rows = self.rows.select(index_N.cpu().numpy())
        keys, values, memories = self.keys, self.values, self.memories
        if kept is not None:
            pictures = torch.from_numpy(kept).to(index_N.device)
            keys = tuple(cache.index_select(0, pictures) for cache in keys)
            values = tuple(cache.index_select(0, pictures) for cache in values)
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
            keys=tuple(functional.pad(cache, (0, 0, 0, more)) for cache in self.keys),
            values=tuple(functional.pad(cache, (0, 0, 0, more)) for cache in self.values),
            seen_NS=functional.pad(self.seen_NS, (0, more)),
        )
