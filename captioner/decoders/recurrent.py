"""What the two LSTM decoders share: the state, and teacher forcing as a loop over `step`.

Shapes as in `protocol.py`; S width of the LSTM state, E of the word embeddings.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from captioner.arrays import Array, namespace, send, to_numpy
from captioner.decoders.protocol import count_down
from captioner.geometry import exact_div
from captioner.rows import GridMemory, PictureRows


@dataclass(frozen=True)
class RecurrentState:
    """State of an LSTM decoder; see `DecoderState`.

    Args:
        hidden_BS: output of the LSTM.
        cell_BS: memory of the LSTM.
        attention_heads_BLHP: of the last step; before the first, no row.
        steps_left: how many more steps may be taken.
        memory: the pictures, shared by their rows.
        rows: which row looks at which picture.
    """

    hidden_BS: Array
    cell_BS: Array
    attention_heads_BLHP: Array
    steps_left: int
    memory: GridMemory
    rows: PictureRows

    def select(self, index_N: Array) -> RecurrentState:
        """Return the state of the named rows; see `DecoderState.select`."""
        kept, rows = self.rows.select(to_numpy(index_N))
        stepped = self.attention_heads_BLHP.shape[0] > 0
        return RecurrentState(
            hidden_BS=self.hidden_BS[index_N],
            cell_BS=self.cell_BS[index_N],
            attention_heads_BLHP=self.attention_heads_BLHP[index_N] if stepped else self.attention_heads_BLHP,
            steps_left=self.steps_left,
            memory=self.memory if kept is None else self.memory.select(send(kept, index_N)),
            rows=rows,
        )

    def stepped(self, hidden_BS: Array, cell_BS: Array, attention_BP: Array) -> RecurrentState:
        """Return the state after a step that looked at the grid once."""
        return dataclasses.replace(
            self,
            hidden_BS=hidden_BS,
            cell_BS=cell_BS,
            attention_heads_BLHP=attention_BP[:, None, None],
            steps_left=count_down(self.steps_left),
        )


def repeat_rows(state: RecurrentState, rows: int) -> RecurrentState:
    """Return the state of one row per picture with that many rows per picture in all, side by side."""
    pictures = state.hidden_BS.shape[0]
    per_picture = exact_div(rows, pictures)
    xp = namespace(state.hidden_BS)
    return dataclasses.replace(
        state,
        hidden_BS=xp.repeat(state.hidden_BS, per_picture, axis=0),
        cell_BS=xp.repeat(state.cell_BS, per_picture, axis=0),
        rows=PictureRows(pictures, rows),
    )
