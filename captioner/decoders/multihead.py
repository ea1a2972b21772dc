"""The transformer decoder: multi-head attention with queries, keys and values (Vaswani et al. 2017).

Pre-norm blocks (Xiong et al. 2020), learned positions of words and, in two dimensions, of grid cells, and one
matrix for the word embeddings and the output (Press & Wolf 2017). Shapes as in `protocol.py`; D width of the
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.attention import GridMemory, MultiHeadAttention, PictureRows
from captioner.decoders.protocol import checked_steps, count_down
from captioner.dropout import Dropout
from captioner.errors import ConfigError


@dataclass(frozen=True)
class MultiheadState:
    """State of the transformer decoder; see `DecoderState`.

    Args:
        keys: of the words so far, [L, N, H, T, D per head]; allocated once, T the most steps that will be
            taken.
        values: likewise.
        position: int64 scalar, the number of tokens read.
        steps_left: how many more steps the caches have room for.
        attention_heads_BLHP: of the last step; before the first, no row.
        memories: the pictures, one memory per layer, shared by their rows.
        rows: which row looks at which picture.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    steps_left: int
    attention_heads_BLHP: Tensor
    memories: tuple[GridMemory, ...]
    rows: PictureRows

    def select(self, index_N: Tensor) -> MultiheadState:
        """Return the state of the named rows; see `DecoderState.select`."""
        pictures, rows = self.rows.select(index_N)
        stepped = self.attention_heads_BLHP.shape[0] > 0
        return MultiheadState(
            keys=self.keys.index_select(1, index_N),
            values=self.values.index_select(1, index_N),
            position=self.position,
            steps_left=self.steps_left,
            attention_heads_BLHP=self.attention_heads_BLHP[index_N] if stepped else self.attention_heads_BLHP,
            memories=self.memories if pictures is None else tuple(memory.select(pictures) for memory in self.memories),
            rows=rows,
        )


@dataclass(frozen=True)
class Places:
    """The positions of N padded sequences of T tokens that a pass is about: all, or those that are no padding.

    What treats each position on its own runs on these R positions; attention needs the sequences, padded.

    Args:
        rows: N.
        steps: T.
        index_R: int64, the places in the N x T positions, row by row; None: all.
    """

    rows: int
    steps: int
    index_R: Tensor | None

    def pad(self, values_RD: Tensor) -> Tensor:
        """Return [N, T, D], 0 at the other positions."""
        if self.index_R is not None:
            padded = values_RD.new_zeros(self.rows * self.steps, values_RD.shape[1])
            values_RD = padded.index_copy(0, self.index_R, values_RD)
        return values_RD.reshape(self.rows, self.steps, values_RD.shape[1])

    def pick(self, values_NTD: Tensor) -> Tensor:
        """Return [R, D]."""
        values = values_NTD.flatten(0, 1)
        return values if self.index_R is None else values.index_select(0, self.index_R)


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

    def split(self, projected_NTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [N, H, T, D per head], of what `query_key_value` gave."""
        rows_N, steps, width = projected_NTE.shape
        split = projected_NTE.reshape(rows_N, steps, 3, self.heads, width // (3 * self.heads)).permute(2, 0, 3, 1, 4)
        return split[0], split[1], split[2]

    def read(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None) -> Tensor:
        """Attend; without a mask, causally.

        Args:
            query: [N, H, T, D per head].
            key: [N, H, U, D per head].
            value: [N, H, U, D per head].
            mask: bool, True where a key may be seen, or None for a causal mask.

        Returns:
            [N, T, D], the heads side by side, not yet projected.
        """
        read: Tensor
        if self.training and query.device.type == "cpu":
            read = self._read_with_dropout(query, key, value, mask=mask)
        else:
            probability = self.dropout.p if self.training else 0.0
            read = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=probability, is_causal=mask is None
            )
        return read.transpose(1, 2).flatten(2)

    def _read_with_dropout(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None) -> Tensor:
        # With dropout, scaled_dot_product_attention has no kernel for a CPU: it multiplies in float32 and draws a
        # whole random number for each weight.
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        weights: Tensor = self.dropout(scores.softmax(dim=-1).to(value.dtype))
        return weights @ value


class Block(nn.Module):
    """One pre-norm block: words among themselves, words over the grid, feed-forward (Xiong et al., fig. 1b).

    Args:
        dim: width of the model.
        heads: number of heads; must divide `dim`.
        feedforward_dim: hidden width of the feed-forward layer.
        dropout: on attention weights, hidden layer and each branch, in training.
    """

    def __init__(self, *, dim: int, heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = CausalSelfAttention(dim=dim, heads=heads, dropout=dropout)
        self.norm_grid = nn.LayerNorm(dim)
        self.grid_attention = MultiHeadAttention(dim=dim, heads=heads, dropout=dropout)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward_dim), nn.GELU(), Dropout(dropout), nn.Linear(feedforward_dim, dim)
        )
        self.dropout = Dropout(dropout)

    def forward(self, state_RD: Tensor, memory: GridMemory, places: Places) -> tuple[Tensor, Tensor]:
        """Run whole sequences; returns state_RD and the grid attention weights_NHTP, of use at the places alone."""
        attention = self.self_attention
        query, key, value = attention.split(places.pad(attention.query_key_value(self.norm_self(state_RD))))
        return self._finish(state_RD, attention.read(query, key, value, mask=None), memory, places)

    def step(
        self,
        state_ND: Tensor,
        memory: GridMemory,
        *,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        seen: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run one step and write its key and value into the cache, in place.

        Args:
            state_ND: the new token.
            memory: of the pictures.
            keys: cache [N, H, T, D per head].
            values: cache, likewise.
            position: int64 scalar, where the token stands.
            seen: bool [T], True for this token and those before it.

        Returns:
            state_ND and the grid attention weights_NH1P.
        """
        attention, places = self.self_attention, Places(len(state_ND), 1, None)
        query, key, value = attention.split(attention.query_key_value(self.norm_self(state_ND))[:, None])
        keys.index_copy_(2, position.view(1), key.to(keys.dtype))
        values.index_copy_(2, position.view(1), value.to(values.dtype))
        read_N1D = attention.read(query, keys.to(query.dtype), values.to(query.dtype), mask=seen)
        return self._finish(state_ND, read_N1D, memory, places)

    def _finish(self, state_RD: Tensor, read_NTD: Tensor, memory: GridMemory, places: Places) -> tuple[Tensor, Tensor]:
        state_RD = state_RD + self.dropout(self.self_attention.output(places.pick(read_NTD)))
        query_RD = self.grid_attention.query(self.norm_grid(state_RD))
        looked_NTD, weights_NHTP = self.grid_attention.read(places.pad(query_RD), memory)
        state_RD = state_RD + self.dropout(self.grid_attention.output(places.pick(looked_NTD)))
        state_RD = state_RD + self.dropout(self.feedforward(self.norm_feedforward(state_RD)))
        return state_RD, weights_NHTP


class MultiheadDecoder(nn.Module):
    """Pre-norm transformer over the grid; see the module's text and `Decoder`.

    Args:
        feature_dim: channels of a grid cell.
        grid_hw: rows and columns of the grid.
        vocabulary_size: number of tokens.
        max_tokens: longest caption in tokens, end included.
        dim: width of the model.
        layers: number of blocks.
        heads: number of heads; must divide `dim`.
        feedforward_dim: hidden width of the feed-forward layers.
        dropout: in training.
        map_layers: layers whose mean over layers and heads is a word's map; empty: all.

    Raises:
        ConfigError: when `heads` does not divide `dim`.
    """

    def __init__(
        self,
        *,
        feature_dim: int,
        grid_hw: tuple[int, int],
        vocabulary_size: int,
        max_tokens: int,
        dim: int = 256,
        layers: int = 3,
        heads: int = 8,
        feedforward_dim: int = 1024,
        dropout: float = 0.2,
        map_layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.max_tokens = max_tokens
        self.heads = heads
        self.map_layers = sorted({layer % layers for layer in map_layers} or range(layers))
        self.embedding = nn.Embedding(vocabulary_size, dim)
        self.position = nn.Parameter(torch.empty(max_tokens, dim))
        self.grid_row = nn.Parameter(torch.empty(grid_hw[0], 1, dim))
        self.grid_column = nn.Parameter(torch.empty(1, grid_hw[1], dim))
        self.grid = nn.Sequential(nn.Linear(feature_dim, dim), nn.LayerNorm(dim))
        self.blocks = nn.ModuleList(
            Block(dim=dim, heads=heads, feedforward_dim=feedforward_dim, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        for parameter in (self.embedding.weight, self.position, self.grid_row, self.grid_column):
            nn.init.normal_(parameter, std=0.02)

    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def _remember(self, grid_BPC: Tensor) -> tuple[GridMemory, ...]:
        """Compute keys and values of the pictures, once per layer."""
        place_PD = (self.grid_row + self.grid_column).flatten(0, 1)
        memory_BPD = self.dropout(self.grid(grid_BPC) + place_PD)
        return tuple(block.grid_attention.remember(memory_BPD) for block in self._layers())

    def _embed(self, tokens_R: Tensor, position_RD: Tensor) -> Tensor:
        # Embeddings start small because they are the output matrix too; sqrt(D) brings them to the scale of
        # the positions' sum with the residual stream (Vaswani et al. 2017, section 3.4).
        scaled = self.embedding(tokens_R) * self.embedding.embedding_dim**0.5
        embedded: Tensor = self.dropout(scaled + position_RD)
        return embedded

    def _logits(self, state: Tensor) -> Tensor:
        return functional.linear(self.norm(state), self.embedding.weight)

    def _summary(self, attention: list[Tensor]) -> Tensor:
        # A list index would be copied to the device, and waited for, at every step.
        kept = torch.stack([attention[layer] for layer in self.map_layers], dim=1)
        return kept.mean(dim=(1, 2))

    def start(self, grid_BPC: Tensor, *, max_tokens: int | None = None) -> MultiheadState:
        """Compute keys and values of the pictures and allocate the caches; see `Decoder.start`."""
        pictures, cells, _ = grid_BPC.shape
        steps = checked_steps(self.max_tokens if max_tokens is None else max_tokens, limit=self.max_tokens)
        memories = self._remember(grid_BPC)
        head_dim = self.embedding.embedding_dim // self.heads
        shape = (len(self.blocks), pictures, self.heads, steps, head_dim)
        dtype = memories[0].keys.dtype
        return MultiheadState(
            keys=torch.zeros(shape, dtype=dtype, device=grid_BPC.device),
            values=torch.zeros(shape, dtype=dtype, device=grid_BPC.device),
            position=torch.zeros((), dtype=torch.int64, device=grid_BPC.device),
            steps_left=steps,
            attention_heads_BLHP=grid_BPC.new_empty(0, len(self.blocks), self.heads, cells),
            memories=memories,
            rows=PictureRows(pictures, pictures),
        )

    def step(self, tokens_B: Tensor, state: MultiheadState) -> tuple[Tensor, Tensor, MultiheadState]:
        """Read one token and predict the next; see `Decoder.step`. The caches are written in place."""
        steps_left = count_down(state.steps_left)
        position = state.position
        seen = torch.arange(state.keys.shape[3], device=position.device) <= position
        hidden = self._embed(tokens_B, self.position.index_select(0, position.view(1)))
        attention = []
        for layer, (block, memory) in enumerate(zip(self._layers(), state.memories, strict=True)):
            hidden, weights_NH1P = block.step(
                hidden,
                memory,
                keys=state.keys[layer],
                values=state.values[layer],
                position=position,
                seen=seen[None],
            )
            attention.append(weights_NH1P[:, :, 0])
        heads_BLHP = torch.stack(attention, dim=1)
        after = MultiheadState(
            keys=state.keys,
            values=state.values,
            position=position + 1,
            steps_left=steps_left,
            attention_heads_BLHP=heads_BLHP,
            memories=state.memories,
            rows=state.rows,
        )
        return self._logits(hidden), self._summary(attention), after

    def forward(self, grid_BPC: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing; rows may be a multiple of the pictures, side by side. See `Decoder.forward`."""
        places = Places(tokens_BT.shape[0], tokens_BT.shape[1], None)
        hidden_RD, attention = self._run(grid_BPC, tokens_BT, places)
        return places.pad(self._logits(hidden_RD)), self._summary(attention)

    def logits_at(self, grid_BPC: Tensor, tokens_NT: Tensor, wanted_NT: Tensor) -> Tensor:
        """Teacher forcing for the loss: what `forward` gives at the wanted positions, at the cost of these alone.

        Args:
            grid_BPC: features of the grid cells.
            tokens_NT: int64; as for `forward`.
            wanted_NT: bool; in each row the first so many, for they alone are seen by the later ones.

        Returns:
            logits_RV of the wanted positions, row by row: `forward(grid_BPC, tokens_NT)[0][wanted_NT]`.

        Raises:
            ConfigError: as for `forward`.
        """
        index_R = wanted_NT.flatten().nonzero().squeeze(1)
        places = Places(tokens_NT.shape[0], tokens_NT.shape[1], index_R)
        return self._logits(self._run(grid_BPC, tokens_NT, places)[0])

    def _run(self, grid_BPC: Tensor, tokens_NT: Tensor, places: Places) -> tuple[Tensor, list[Tensor]]:
        """Run all blocks; returns hidden_RD and per layer the grid attention weights_NHTP."""
        steps = checked_steps(places.steps, limit=self.max_tokens)
        position_NTD = self.position[:steps].expand(places.rows, -1, -1)
        hidden_RD = self._embed(places.pick(tokens_NT[:, :, None])[:, 0], places.pick(position_NTD))
        attention = []
        for block, memory in zip(self._layers(), self._remember(grid_BPC), strict=True):
            hidden_RD, weights_NHTP = block(hidden_RD, memory, places)
            attention.append(weights_NHTP)
        return hidden_RD, attention
