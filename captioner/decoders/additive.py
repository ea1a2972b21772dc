"""Show, Attend and Tell: one soft attention read per word (Xu et al. 2015, section 3.1 and 4.2).

c_0 = f_c(mean(grid)), h_0 = f_h(mean(grid))                                initial state, section 3.1.2
alpha_t = softmax(f_att(a_i, h_{t-1})),  z_t = beta_t · sum_i alpha_ti a_i    eq. 4 to 6 and 13
beta_t = sigmoid(f_beta(h_{t-1}))                                           gate, section 4.2.1
h_t = LSTM([E y_{t-1}, z_t], h_{t-1})                                       eq. 1 to 3
p(y_t) = softmax(L_o (E y_{t-1} + L_h h_t + L_z z_t))                       deep output, eq. 7
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioner.attention import AdditiveAttention
from captioner.decoders.protocol import checked_steps
from captioner.decoders.recurrent import RecurrentState, repeat_rows
from captioner.dropout import Dropout
from captioner.rows import PictureRows


class AdditiveDecoder(nn.Module):
    """LSTM with soft attention over the grid; see the module's text and `Decoder`.

    Args:
        feature_dim: channels of a grid cell.
        grid_hw: rows and columns of the grid; only the protocol asks for it.
        vocabulary_size: number of tokens.
        max_tokens: longest caption in tokens, end included.
        embedding_dim: width of the word embeddings.
        state_dim: width of the LSTM.
        attention_dim: hidden width of the attention's score.
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
        self.initial_hidden = nn.Linear(feature_dim, state_dim)
        self.initial_cell = nn.Linear(feature_dim, state_dim)
        self.attention = AdditiveAttention(feature_dim=feature_dim, state_dim=state_dim, hidden_dim=attention_dim)
        self.gate = nn.Linear(state_dim, 1)
        self.lstm = nn.LSTMCell(embedding_dim + feature_dim, state_dim)
        self.hidden_output = nn.Linear(state_dim, embedding_dim)
        self.context_output = nn.Linear(feature_dim, embedding_dim)
        self.output = nn.Linear(embedding_dim, vocabulary_size)
        self.dropout = Dropout(dropout)

    def start(self, grid_BPC: Tensor, *, max_tokens: int | None = None) -> RecurrentState:
        """Set the initial state from the mean feature and compute the keys; see `Decoder.start`."""
        pictures, cells, _ = grid_BPC.shape
        steps = checked_steps(self.max_tokens if max_tokens is None else max_tokens, limit=self.max_tokens)
        mean_BC = grid_BPC.mean(dim=1)
        return RecurrentState(
            hidden_BS=torch.tanh(self.initial_hidden(mean_BC)),
            cell_BS=torch.tanh(self.initial_cell(mean_BC)),
            attention_heads_BLHP=grid_BPC.new_empty(0, 1, 1, cells),
            steps_left=steps,
            memory=self.attention.remember(grid_BPC),
            rows=PictureRows(pictures, pictures),
        )

    def step(self, tokens_B: Tensor, state: RecurrentState) -> tuple[Tensor, Tensor, RecurrentState]:
        """Read one token, look at the grid and predict the next; see `Decoder.step`."""
        hidden_BE, attention_BP, state = self._read(self.dropout(self.embedding(tokens_B)), state)
        return self.output(self.dropout(hidden_BE)), attention_BP, state

    def _read(self, embedded_BE: Tensor, state: RecurrentState) -> tuple[Tensor, Tensor, RecurrentState]:
        context_BC, attention_BP = self.attention(state.hidden_BS, state.memory)
        context_BC = torch.sigmoid(self.gate(state.hidden_BS)) * context_BC
        hidden_BS, cell_BS = self.lstm(torch.cat([embedded_BE, context_BC], dim=-1), (state.hidden_BS, state.cell_BS))
        deep_BE = embedded_BE + self.hidden_output(self.dropout(hidden_BS)) + self.context_output(context_BC)
        return deep_BE, attention_BP, state.stepped(hidden_BS, cell_BS, attention_BP)

    def forward(self, grid_BPC: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing; rows may be a multiple of the pictures, side by side. See `Decoder.forward`."""
        checked_steps(tokens_BT.shape[1], limit=self.max_tokens)
        state = repeat_rows(self.start(grid_BPC), tokens_BT.shape[0])
        embedded_BTE = self.dropout(self.embedding(tokens_BT))
        deep, attention = [], []
        for step in range(tokens_BT.shape[1]):
            deep_BE, attention_BP, state = self._read(embedded_BTE[:, step], state)
            deep.append(deep_BE)
            attention.append(attention_BP)
        logits_BTV = self.output(self.dropout(torch.stack(deep, dim=1)))
        return logits_BTV, torch.stack(attention, dim=1)
