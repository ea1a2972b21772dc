"""The decoders against independent implementations: torch's own transformer layers, and the papers in numpy.

The numpy references are in float64 and written from the equations, gate by gate. The decoders are cast to float64 for
them; only the softmax of the attention stays in float32 (that is part of its contract), hence the tolerances: 1e-7 is
the rounding of a weight, 1e-6 what it may grow to in the logits.
"""

import numpy as np
import pytest
import torch
from models import CELLS, GRID_HW, make_decoder, random_grid, random_tokens, repeated, step_through
from torch import nn

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# ---- multihead: torch.nn.TransformerDecoderLayer -----------------------------------------------------------------


class RecordingLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer, which does not hand out the weights of its cross-attention: here it keeps them."""

    def _mha_block(self, x, mem, attn_mask, key_padding_mask, is_causal=False):
        read, self.weights_NHTP = self.multihead_attn(x, mem, mem, need_weights=True, average_attn_weights=False)
        return self.dropout2(read)


def _torch_layer(block):
    dim, heads = block.norm_self.normalized_shape[0], block.self_attention.heads
    hidden = block.feedforward[0].out_features
    layer = RecordingLayer(dim, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True).eval()
    copies = {
        layer.norm1: block.norm_self,
        layer.norm2: block.norm_grid,
        layer.norm3: block.norm_feedforward,
        layer.linear1: block.feedforward[0],
        layer.linear2: block.feedforward[3],
        layer.self_attn.out_proj: block.self_attention.output,
        layer.multihead_attn.out_proj: block.grid_attention.output,
    }
    for to, of in copies.items():
        to.load_state_dict(of.state_dict())
    grid = block.grid_attention
    layer.self_attn.in_proj_weight.copy_(block.self_attention.query_key_value.weight)
    layer.self_attn.in_proj_bias.copy_(block.self_attention.query_key_value.bias)
    layer.multihead_attn.in_proj_weight.copy_(torch.cat([grid.query.weight, grid.key_value.weight]))
    layer.multihead_attn.in_proj_bias.copy_(torch.cat([grid.query.bias, grid.key_value.bias]))
    return layer


def _multihead_reference(decoder, grid_BPC, tokens_BT):
    """Return logits_BTV and heads_BTLHP from torch's layers."""
    dim, (rows, columns) = decoder.embedding.embedding_dim, GRID_HW
    places = [
        decoder.grid_row[row, 0] + decoder.grid_column[0, column] for row in range(rows) for column in range(columns)
    ]
    linear, norm = decoder.grid
    memory = nn.functional.layer_norm(grid_BPC @ linear.weight.T + linear.bias, (dim,), norm.weight, norm.bias)
    memory = memory + torch.stack(places)
    state = decoder.embedding.weight[tokens_BT] * dim**0.5 + decoder.position[: tokens_BT.shape[1]]
    mask, heads = nn.Transformer.generate_square_subsequent_mask(tokens_BT.shape[1]), []
    for layer in map(_torch_layer, decoder.blocks):
        state = layer(state, memory, tgt_mask=mask)
        heads.append(layer.weights_NHTP)
    state = nn.functional.layer_norm(state, (dim,), decoder.norm.weight, decoder.norm.bias)
    return state @ decoder.embedding.weight.T, torch.stack(heads, dim=1).permute(0, 3, 1, 2, 4)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 4), (3, 8)])
def test_multihead_equals_torch_transformer_layers(layers, heads):
    decoder = make_decoder("multihead", layers=layers, heads=heads)
    grid, tokens = random_grid(3), random_tokens(3, 7)
    logits, heads_BTLHP = _multihead_reference(decoder, grid, tokens)
    close(decoder(grid, tokens)[0], logits, rtol=1e-5, atol=1e-5)
    close(decoder(grid, tokens)[1], heads_BTLHP.mean(dim=(2, 3)), rtol=0, atol=1e-6)
    step_logits, _, step_heads = step_through(decoder, grid, tokens)
    close(step_logits, logits, rtol=1e-5, atol=1e-5)
    close(step_heads, heads_BTLHP, rtol=0, atol=1e-6)


def test_multihead_with_rows_of_one_picture_equals_torch_transformer_layers():
    decoder, grid, tokens = make_decoder("multihead"), random_grid(2), random_tokens(6, 5)
    logits, heads = _multihead_reference(decoder, grid[repeated(2, 3)], tokens)
    close(decoder(grid, tokens)[0], logits, rtol=1e-5, atol=1e-5)
    close(step_through(decoder, grid, tokens)[2], heads, rtol=0, atol=1e-6)


# ---- mean and additive: the papers in numpy ----------------------------------------------------------------------


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class _Weights:
    """The parameters of a decoder as float64 arrays: `w("output.weight")`."""

    def __init__(self, decoder):
        self._values = {name: value.numpy().astype(np.float64) for name, value in decoder.state_dict().items()}

    def __call__(self, name):
        return self._values[name]

    def affine(self, name, x):
        bias = self._values.get(f"{name}.bias", 0.0)
        return self._values[f"{name}.weight"] @ x + bias

    def lstm(self, x, h, c):
        """One step of the LSTM (Hochreiter & Schmidhuber 1997 with a forget gate); torch's order is i, f, g, o."""
        gates = self("lstm.weight_ih") @ x + self("lstm.bias_ih") + self("lstm.weight_hh") @ h + self("lstm.bias_hh")
        i, f, g, o = np.split(gates, 4)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        return _sigmoid(o) * np.tanh(c), c


def _show_attend_and_tell(w, grid_PC, tokens_T):
    """Xu et al. 2015, section 3.1 and 4.2, one picture."""
    mean = sum(grid_PC) / len(grid_PC)
    h, c = np.tanh(w.affine("initial_hidden", mean)), np.tanh(w.affine("initial_cell", mean))
    logits, maps = [], []
    for token in tokens_T:
        word = w("embedding.weight")[token]
        energies = [
            w.affine("attention.score", np.tanh(w.affine("attention.key", a) + w.affine("attention.query", h)))[0]
            for a in grid_PC
        ]
        alpha = _softmax(np.array(energies))
        beta = _sigmoid(w.affine("gate", h))
        z = beta * sum(share * a for share, a in zip(alpha, grid_PC, strict=True))
        h, c = w.lstm(np.concatenate([word, z]), h, c)
        deep = word + w.affine("hidden_output", h) + w.affine("context_output", z)
        logits.append(w.affine("output", deep))
        maps.append(alpha)
    return np.stack(logits), np.stack(maps)


def _show_and_tell(w, grid_PC, tokens_T):
    """Vinyals et al. 2015, eq. 10 to 12, one picture."""
    h = c = np.zeros(w("lstm.weight_hh").shape[1])
    h, c = w.lstm(w.affine("picture", grid_PC.mean(axis=0)), h, c)
    logits = []
    for token in tokens_T:
        h, c = w.lstm(w("embedding.weight")[token], h, c)
        logits.append(w.affine("output", h))
    return np.stack(logits), np.full((len(tokens_T), CELLS), 1 / CELLS)


@pytest.mark.parametrize(("kind", "reference"), [("mean", _show_and_tell), ("additive", _show_attend_and_tell)])
def test_recurrent_decoders_equal_their_papers_in_numpy(kind, reference):
    decoder = make_decoder(kind).double()
    grid, tokens = random_grid(3).double(), random_tokens(6, 7)
    forced, stepped = decoder(grid, tokens), step_through(decoder, grid, tokens)
    weights = _Weights(decoder)
    for row in range(6):
        logits, maps = reference(weights, grid[row // 2].numpy(), tokens[row].tolist())
        for found in (forced, stepped):
            np.testing.assert_allclose(found[0][row].numpy(), logits, rtol=0, atol=1e-6)
            np.testing.assert_allclose(found[1][row].numpy(), maps, rtol=0, atol=1e-7)
