"""Show and Tell: the picture as one fixed-length context vector (Vinyals et al. 2015).

x_{-1} = W_I mean(grid);  x_t = W_E S_t;  h_{t+1} = LSTM(x_t);  p_{t+1} = softmax(W h_{t+1})    (eq. 10 to 12)

The picture is read once, before the first word: the bottleneck that attention was invented to remove. Every
cell has the same share in the mean, so the maps are uniform, which is the truth about this model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioner.decoders.protocol import checked_steps
from captioner.decoders.recurrent import RecurrentState, repeat_rows
from captioner.dropout import Dropout
from captioner.rows import GridMemory, PictureRows


class MeanDecoder(nn.Module):
    """LSTM that is shown the mean of the grid once; see the module's text and `Decoder`.

    Args:
        feature_dim: channels of a grid cell.
        grid_hw: rows and columns of the grid; only the protocol asks for it.
        vocabulary_size: number of tokens.
        max_tokens: longest caption in tokens, end included.
        embedding_dim: width of the word embeddings.
        state_dim: width of the LSTM.
        attention_dim: not used: this decoder has no attention.
        dropout: on embeddings and output, in training.
    """

    normalised = False

    def __init__(
        self,
        *,
        feature_dim: int,
        grid_hw: tuple[int, int],
        vocabulary_size: int,
        max_tokens: int,
        embedding_dim: int = 256,
        state_dim: int = 512,
        attention_dim: int = 512,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.embedding = nn.Embedding(vocabulary_size, embedding_dim)
        self.picture = nn.Linear(feature_dim, embedding_dim)
        # The picture is shown once: as strong as a word, since what a CNN gives behind its ReLU has a root mean square
        # near a half. By torch's default it is a quarter of that, and learnt more slowly (docs/tried.md).
        nn.init.normal_(self.picture.weight, std=2.0 * feature_dim**-0.5)
        self.lstm = nn.LSTMCell(embedding_dim, state_dim)
        self.output = nn.Linear(state_dim, vocabulary_size)
        self.dropout = Dropout(dropout)

    def start(self, grid_BPC: Tensor, *, max_tokens: int | None = None) -> RecurrentState:
        """Show the picture once; see `Decoder.start`."""
        pictures, cells, _ = grid_BPC.shape
        steps = checked_steps(self.max_tokens if max_tokens is None else max_tokens, limit=self.max_tokens)
        hidden_BS, cell_BS = self.lstm(self.picture(grid_BPC.mean(dim=1)))
        uniform_B1P = grid_BPC.new_full((pictures, 1, cells), 1.0 / cells, dtype=torch.float32)
        return RecurrentState(
            hidden_BS=hidden_BS,
            cell_BS=cell_BS,
            attention_heads_BLHP=uniform_B1P.new_empty(0, 1, 1, cells),
            steps_left=steps,
            memory=GridMemory(uniform_B1P, uniform_B1P),
            rows=PictureRows(pictures, pictures),
        )

    def step(self, tokens_B: Tensor, state: RecurrentState) -> tuple[Tensor, Tensor, RecurrentState]:
        """Read one token and predict the next; see `Decoder.step`."""
        embedded_BE = self.dropout(self.embedding(tokens_B))
        hidden_BS, cell_BS = self.lstm(embedded_BE, (state.hidden_BS, state.cell_BS))
        logits_BV = self.output(self.dropout(hidden_BS))
        attention_BP = state.memory.values[:1, 0].expand(tokens_B.shape[0], -1)
        return logits_BV, attention_BP, state.stepped(hidden_BS, cell_BS, attention_BP)

    def forward(self, grid_BPC: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing; rows may be a multiple of the pictures, side by side. See `Decoder.forward`."""
        checked_steps(tokens_BT.shape[1], limit=self.max_tokens)
        state = repeat_rows(self.start(grid_BPC), tokens_BT.shape[0])
        hidden_BS, cell_BS = state.hidden_BS, state.cell_BS
        embedded_BTE = self.dropout(self.embedding(tokens_BT))
        hidden = []
        for step in range(tokens_BT.shape[1]):
            hidden_BS, cell_BS = self.lstm(embedded_BTE[:, step], (hidden_BS, cell_BS))
            hidden.append(hidden_BS)
        logits_BTV = self.output(self.dropout(torch.stack(hidden, dim=1)))
        uniform_P = state.memory.values[0, 0]
        return logits_BTV, uniform_P.expand(*tokens_BT.shape, -1)
