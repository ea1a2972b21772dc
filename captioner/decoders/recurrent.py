"""What the two LSTM decoders share: the state, and teacher forcing as a loop over `step`.

Shapes as in `protocol.py`; S width of the LSTM state, E of the word embeddings.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.attention import GridMemory, PictureRows


@dataclass(frozen=True)
class RecurrentState:
    """State of an LSTM decoder; see `DecoderState`.

    Args:
        hidden_BS: output of the LSTM.
        cell_BS: memory of the LSTM.
        attention_heads_BLHP: of the last step; before the first, no row.
        memory: the pictures, shared by their rows.
        rows: which row looks at which picture.
    """

    hidden_BS: Tensor
    cell_BS: Tensor
    attention_heads_BLHP: Tensor
    memory: GridMemory
    rows: PictureRows

    def select(self, index_N: Tensor) -> RecurrentState:
        """Return the state of the named rows; see `DecoderState.select`."""
        pictures, rows = self.rows.select(index_N)
        stepped = self.attention_heads_BLHP.shape[0] > 0
        return RecurrentState(
            hidden_BS=self.hidden_BS[index_N],
            cell_BS=self.cell_BS[index_N],
            attention_heads_BLHP=self.attention_heads_BLHP[index_N] if stepped else self.attention_heads_BLHP,
            memory=self.memory if pictures is None else self.memory.select(pictures),
            rows=rows,
        )

    def stepped(self, hidden_BS: Tensor, cell_BS: Tensor, attention_BP: Tensor) -> RecurrentState:
        """Return the state after a step that looked at the grid once."""
        return dataclasses.replace(
            self, hidden_BS=hidden_BS, cell_BS=cell_BS, attention_heads_BLHP=attention_BP[:, None, None]
        )


def repeat_rows(state: RecurrentState, rows: int) -> RecurrentState:
    """Return the state of one row per picture with that many rows per picture in all, side by side."""
    pictures = state.hidden_BS.shape[0]
    if rows == pictures:
        return state
    per_picture = rows // pictures
    return state.select(torch.arange(pictures, device=state.hidden_BS.device).repeat_interleave(per_picture))
