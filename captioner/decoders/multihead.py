"""The transformer decoder: multi-head attention with queries, keys and values (Vaswani et al. 2017).

Pre-norm blocks (Xiong et al. 2020), learned positions of words and, in two dimensions, of grid cells, and one
matrix for the word embeddings and the output (Press & Wolf 2017). Shapes as in `protocol.py`; D width of the
model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.attention import MultiHeadAttention
from captioner.decoders.multihead_state import MultiheadState
from captioner.decoders.protocol import checked_steps, count_down
from captioner.decoders.self_attention import CausalSelfAttention, Past, past_bias
from captioner.dropout import Dropout
from captioner.errors import ConfigError
from captioner.rows import GridMemory, PictureRows


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
        projected_NTE = places.pad(attention.query_key_value(self.norm_self(state_RD)))
        query, key, value = attention.split(projected_NTE, places.rows)
        state_RD = self._after_self(state_RD, places.pick(attention.read(query, key, value)))
        query_RD = self.grid_attention.query(self.norm_grid(state_RD))
        looked_NTD, weights_NHTP = self.grid_attention.read_rows(places.pad(query_RD), memory)
        return self._after_grid(state_RD, places.pick(looked_NTD)), weights_NHTP

    def step(self, state_ND: Tensor, memory: GridMemory, past: Past) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run one step of R rows per picture, N in all.

        Args:
            state_ND: the new token of every row.
            memory: of the pictures.
            past: of the rows.

        Returns:
            state_ND, the grid attention weights_BHRP, and key and value of the new tokens, [B, H, R, D per head].
        """
        attention = self.self_attention
        query, key, value = attention.split(attention.query_key_value(self.norm_self(state_ND)), past.keys.shape[0])
        state_ND = self._after_self(state_ND, attention.read_past(query, key, value, past))
        looked_ND, weights_BHRP = self.grid_attention.read(self.grid_attention.query(self.norm_grid(state_ND)), memory)
        return self._after_grid(state_ND, looked_ND), weights_BHRP, key, value

    def _after_self(self, state: Tensor, read: Tensor) -> Tensor:
        after: Tensor = state + self.dropout(self.self_attention.output(read))
        return after

    def _after_grid(self, state: Tensor, looked: Tensor) -> Tensor:
        state = state + self.dropout(self.grid_attention.output(looked))
        after: Tensor = state + self.dropout(self.feedforward(self.norm_feedforward(state)))
        return after


class StepOutput(NamedTuple):
    """What a step of R rows per picture gives.

    Args:
        logits_NV: of the next token.
        attention_BRP: where the rows looked, the summary of the layers and heads.
        heads_BRLHP: where each head of each layer looked.
        keys: of the new tokens, one [B, H, R, D per head] per layer.
        values: likewise.
    """

    logits_NV: Tensor
    attention_BRP: Tensor
    heads_BRLHP: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def stretched(positions_ND: Tensor, count: int) -> Tensor:
    """Interpolate positions of a line of cells linearly over another number of cells of the same line.

    Args:
        positions_ND: one a cell.
        count: of the cells wanted.

    Returns:
        positions [count, D].
    """
    return functional.interpolate(positions_ND.T[None], count, mode="linear")[0].T


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

    normalised = False

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
        self._shown_hw: tuple[int, int] | None = None

    @contextlib.contextmanager
    def over_grid(self, grid_hw: tuple[int, int]) -> Iterator[None]:
        """Read grids of pictures of another side: the positions of rows and columns are interpolated over them.

        As for larger pictures in ViT (Dosovitskiy et al. 2021, section 3.2). Gradients reach the positions.

        Args:
            grid_hw: rows and columns of the grids that are read within.
        """
        before, self._shown_hw = self._shown_hw, grid_hw
        try:
            yield
        finally:
            self._shown_hw = before

    def _cell_positions(self) -> Tensor:
        row_H1D: Tensor = self.grid_row
        column_1WD: Tensor = self.grid_column
        if self._shown_hw is not None and self._shown_hw != (row_H1D.shape[0], column_1WD.shape[1]):
            row_H1D = stretched(row_H1D[:, 0], self._shown_hw[0])[:, None]
            column_1WD = stretched(column_1WD[0], self._shown_hw[1])[None]
        return (row_H1D + column_1WD).flatten(0, 1)

    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def remember(self, grid_BPC: Tensor) -> tuple[GridMemory, ...]:
        """Compute keys and values of the pictures, once per layer."""
        memory_BPD = self.dropout(self.grid(grid_BPC) + self._cell_positions())
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
        memories = self.remember(grid_BPC)
        shape = (pictures, self.heads, steps, self.embedding.embedding_dim // self.heads)
        caches = [memories[0].keys.new_zeros(shape) for _ in range(2 * len(memories))]
        return MultiheadState(
            keys=tuple(caches[0::2]),
            values=tuple(caches[1::2]),
            seen_NS=torch.zeros(pictures, steps, dtype=torch.bool, device=grid_BPC.device),
            slots=0,
            position=torch.zeros(1, dtype=torch.int64, device=grid_BPC.device),
            steps_left=steps,
            attention_heads_BLHP=grid_BPC.new_empty(0, len(self.blocks), self.heads, cells),
            memories=memories,
            rows=PictureRows(pictures, pictures),
        )

    def step(self, tokens_B: Tensor, state: MultiheadState) -> tuple[Tensor, Tensor, MultiheadState]:
        """Read one token and predict the next; see `Decoder.step`. The caches are written in place."""
        steps_left = count_down(state.steps_left)
        pictures, width = state.rows.pictures, state.rows.per_picture
        state = state.with_room(width)
        taken = slice(state.slots, state.slots + width)
        read = self.read_step(
            tokens_B.view(pictures, width),
            state.position,
            keys=[cache[:, :, : state.slots] for cache in state.keys],
            values=[cache[:, :, : state.slots] for cache in state.values],
            seen_BRS=state.seen_NS[:, : state.slots].view(pictures, width, state.slots),
            memories=state.memories,
        )
        for cache, new in zip((*state.keys, *state.values), (*read.keys, *read.values), strict=True):
            cache[:, :, taken] = new
        seen_NS = state.seen_NS.clone()
        seen_NS[:, taken] = torch.eye(width, dtype=torch.bool, device=seen_NS.device).repeat(pictures, 1)
        heads_BLHP = read.heads_BRLHP.flatten(0, 1)
        after = dataclasses.replace(
            state,
            seen_NS=seen_NS,
            slots=taken.stop,
            position=state.position + 1,
            steps_left=steps_left,
            attention_heads_BLHP=heads_BLHP,
        )
        return read.logits_NV, read.attention_BRP.flatten(0, 1), after

    def read_step(
        self,
        tokens_BR: Tensor,
        position: Tensor,
        *,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        seen_BRS: Tensor,
        memories: Sequence[GridMemory],
    ) -> StepOutput:
        """Compute one step: tensors in, tensors out, and nothing written. This is what is exported, too.

        Args:
            tokens_BR: int64, the new token of each of the R rows of each picture.
            position: int64 [1], how many tokens every row has read.
            keys: of the slots so far, [B, H, S, D per head] per layer.
            values: likewise.
            seen_BRS: bool, which slots are a row's own past.
            memories: the pictures, one memory per layer.

        Returns:
            What the step gives.
        """
        # Rows, not rows of pictures: of a matrix a linear layer is one operation of ONNX Runtime, with its bias.
        hidden_ND = self._embed(tokens_BR.flatten(), self.position.index_select(0, position))
        bias_B1RE = past_bias(seen_BRS)
        attention, new_keys, new_values = [], [], []
        for block, memory, key, value in zip(self._layers(), memories, keys, values, strict=True):
            past = Past(key.to(hidden_ND.dtype), value.to(hidden_ND.dtype), bias_B1RE)
            hidden_ND, weights_BHRP, new_key, new_value = block.step(hidden_ND, memory, past)
            attention.append(weights_BHRP)
            new_keys.append(new_key)
            new_values.append(new_value)
        return StepOutput(
            logits_NV=self._logits(hidden_ND),
            attention_BRP=self._summary(attention),
            heads_BRLHP=torch.stack(attention, dim=1).permute(0, 3, 1, 2, 4),
            keys=tuple(new_keys),
            values=tuple(new_values),
        )

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
        for block, memory in zip(self._layers(), self.remember(grid_BPC), strict=True):
            hidden_RD, weights_NHTP = block(hidden_RD, memory, places)
            attention.append(weights_NHTP)
        return hidden_RD, attention
