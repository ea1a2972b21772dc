"""Attention of words over the words before them: whole sequences in training, a cache in search.

Shapes as in `protocol.py`; R rows of each picture, S slots of the cache, D width of the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.dropout import Dropout


class Past(NamedTuple):
    """What the rows of each picture have read, in one layer.

    Args:
        keys: [B, H, S, D per head].
        values: likewise.
        bias_B1RE: for the slots and then the R new tokens: 0 where a slot is a row's own past, and at its own new
            token, else -inf.
    """

    keys: Tensor
    values: Tensor
    bias_B1RE: Tensor


def past_bias(seen_BRS: Tensor) -> Tensor:
    """Return `Past.bias_B1RE`, [B, 1, R, S + R], for the slots that each row sees."""
    pictures, rows, _ = seen_BRS.shape
    place_R = torch.arange(rows, device=seen_BRS.device)
    itself_BRR = (place_R[:, None] == place_R).expand(pictures, -1, -1)
    return torch.where(torch.cat([seen_BRS, itself_BRR], dim=2), 0.0, -torch.inf)[:, None]


class CausalSelfAttention(nn.Module):
    """Multi-head attention of a sequence over its own past (Vaswani et al. 2017, section 3.2.3).

    Args:
        dim: width of the model.
        heads: number of heads; must divide `dim`.
        dropout: probability of dropping a weight, in training.
    """

    def __init__(self, *, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def split(self, projected: Tensor, rows_N: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of what `query_key_value` gave.

        Args:
            projected: [N, T, 3 D] or [N x T, 3 D].
            rows_N: N.

        Returns:
            Each [N, H, T, D per head].
        """
        head_dim = projected.shape[-1] // (3 * self.heads)
        heads = projected.reshape(rows_N, -1, 3 * self.heads, head_dim).transpose(1, 2)
        query, key, value = torch.split(heads, self.heads, dim=1)
        return query, key, value

    def read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally.

        Args:
            query: [N, H, T, D per head].
            key: likewise.
            value: likewise.

        Returns:
            [N, T, D], the heads side by side, not yet projected.
        """
        read: Tensor
        if query.device.type == "cpu" and (self.training or query.requires_grad):
            read = self._read_spelled_out(query, key, value)
        else:
            probability = self.dropout.p if self.training else 0.0
            read = functional.scaled_dot_product_attention(query, key, value, dropout_p=probability, is_causal=True)
        return read.transpose(1, 2).flatten(2)

    def _read_spelled_out(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # With dropout, scaled_dot_product_attention has no kernel for a CPU: it multiplies in float32 and draws a
        # whole random number for each weight. Without, what it does backwards is many times as slow as this for
        # sentences, which are short.
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        weights: Tensor = self.dropout(scores.softmax(dim=-1).to(value.dtype))
        return weights @ value

    def read_past(self, query: Tensor, key: Tensor, value: Tensor, past: Past) -> Tensor:
        """Attend with one new token per row to the row's own past and to itself.

        Args:
            query: [B, H, R, D per head], R rows of each picture.
            key: of the new tokens, likewise.
            value: of the new tokens, likewise.
            past: what the rows of each picture have read before.

        Returns:
            [B x R, D], the heads side by side, not yet projected.
        """
        # To copy the past of a few words is faster than the operations that would treat the new token apart.
        keys, values = torch.cat([past.keys, key], dim=2), torch.cat([past.values, value], dim=2)
        scores = (query @ keys.transpose(-2, -1)) * query.shape[-1] ** -0.5 + past.bias_B1RE
        weights = self.dropout(scores.softmax(dim=-1).to(value.dtype))
        read: Tensor = (weights @ values).transpose(1, 2)
        return read.reshape(-1, self.heads * query.shape[-1])
