"""One attention read that returns its weights: additive and multi-head.

Shapes: B pictures; N rows, R = N / B of them for each picture and side by side; T steps; P grid cells; C
channels; H heads; D width of a head.

What of the grid does not depend on the words (keys and values) is computed once per picture, in `remember`,
and shared by all rows of the picture: the hypotheses of a beam in search, the captions of a picture in
training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioner.dropout import Dropout
from captioner.geometry import exact_div
from captioner.rows import GridMemory


class AdditiveAttention(nn.Module):
    """Soft attention, scored by a one-layer network (Bahdanau et al. 2015; Xu et al. 2015, eq. 4 to 6, 13).

    e_i = w · tanh(W_a a_i + W_h h + b),  alpha = softmax(e),  z = sum_i alpha_i a_i

    Args:
        feature_dim: channels C of a grid cell.
        state_dim: width of the query h.
        hidden_dim: width of the score's hidden layer.
    """

    def __init__(self, *, feature_dim: int, state_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.key = nn.Linear(feature_dim, hidden_dim)
        self.query = nn.Linear(state_dim, hidden_dim, bias=False)
        self.score = nn.Linear(hidden_dim, 1, bias=False)

    def remember(self, grid_BPC: Tensor) -> GridMemory:
        """Compute the keys [B, P, hidden] of the pictures once; the values are the features themselves."""
        return GridMemory(self.key(grid_BPC), grid_BPC)

    def forward(self, state_ND: Tensor, memory: GridMemory) -> tuple[Tensor, Tensor]:
        """Read the grid.

        Args:
            state_ND: queries, R rows side by side for each picture.
            memory: of the pictures, from `remember`.

        Returns:
            context_NC and weights_NP, float32, non-negative, each row sums to 1.
        """
        pictures, rows = memory.keys.shape[0], memory.rows_per_picture(state_ND.shape[0])
        query_BR1D = self.query(state_ND).view(pictures, rows, 1, -1)
        hidden_BRPD = torch.tanh(memory.keys.unsqueeze(1) + query_BR1D)
        weights_BRP = self.score(hidden_BRPD).squeeze(-1).float().softmax(dim=-1)
        context_BRC = weights_BRP.to(memory.values.dtype) @ memory.values
        return context_BRC.flatten(0, 1), weights_BRP.flatten(0, 1)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention of several heads over a grid (Vaswani et al. 2017, eq. 1, section 3.2.2).

    Args:
        dim: width of queries, keys, values and output.
        heads: number of heads; must divide `dim`.
        dropout: probability of dropping a weight, in training. The returned weights are those before it.
    """

    def __init__(self, *, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = exact_div(dim, heads)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def remember(self, memory_BPD: Tensor) -> GridMemory:
        """Compute keys and values of the pictures once: each [B, H, P, D]."""
        keys, values = self.key_value(memory_BPD).chunk(2, dim=-1)
        return GridMemory(
            keys.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2),
            values.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2),
        )

    def forward(self, state_NTD: Tensor, memory: GridMemory) -> tuple[Tensor, Tensor]:
        """Read the grid.

        Args:
            state_NTD: queries of T steps, R rows side by side for each picture.
            memory: of the pictures, from `remember`.

        Returns:
            output_NTD, and weights_NHTP, float32, non-negative, each row of P sums to 1.
        """
        read_NTD, weights_NHTP = self.read_rows(self.query(state_NTD), memory)
        output_NTD = self.output(read_NTD)
        return output_NTD, weights_NHTP

    def read_rows(self, query_NTD: Tensor, memory: GridMemory) -> tuple[Tensor, Tensor]:
        """Read the grid with queries that are projected already; the output is not yet.

        Args:
            query_NTD: queries of T steps, R rows side by side for each picture.
            memory: of the pictures, from `remember`.

        Returns:
            read_NTD, the heads side by side, and weights_NHTP as in `forward`.
        """
        rows_N, steps, dim = query_NTD.shape
        pictures, rows_R = memory.keys.shape[0], memory.rows_per_picture(rows_N)
        # The rows of a picture are only more queries to the same keys.
        read_BQD, weights_BHQP = self.read(query_NTD.reshape(pictures, rows_R * steps, dim), memory)
        weights_BHRTP = weights_BHQP.view(pictures, self.heads, rows_R, steps, -1)
        return read_BQD.reshape(rows_N, steps, dim), weights_BHRTP.transpose(1, 2).flatten(0, 1)

    def read(self, queries: Tensor, memory: GridMemory) -> tuple[Tensor, Tensor]:
        """Read the grid with any number Q of projected queries to each picture; the output is not projected yet.

        Args:
            queries: [B, Q, D] or [B x Q, D].
            memory: of the pictures, from `remember`.

        Returns:
            What was read, in the shape of the queries, the heads side by side, and weights_BHQP, float32,
            non-negative, each row of P sums to 1.
        """
        query = queries.view(memory.keys.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)
        scores = (query * self.head_dim**-0.5) @ memory.keys.transpose(-2, -1)
        weights = scores.float().softmax(dim=-1)
        read = self.dropout(weights.to(memory.values.dtype)) @ memory.values
        return read.transpose(1, 2).reshape(queries.shape), weights
