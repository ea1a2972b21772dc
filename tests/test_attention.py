"""Laws of one attention read, and of the rows that share a picture."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captioner.attention import AdditiveAttention, MultiHeadAttention
from captioner.errors import ConfigError
from captioner.rows import GridMemory, PictureRows

close = torch.testing.assert_close
CELLS, DIM = 6, 16


@pytest.fixture(autouse=True)
def _seeded_and_without_gradients():
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


class _AdditiveRead(nn.Module):
    """Both kinds of attention behind one call: queries [N, D], cells [B, P, D] → read [N, D], weights [N, P]."""

    def __init__(self):
        super().__init__()
        self.attention = AdditiveAttention(feature_dim=DIM, state_dim=DIM, hidden_dim=9)

    def forward(self, state_ND, grid_BPD):
        return self.attention(state_ND, self.attention.remember(grid_BPD))


class _MultiHeadRead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(dim=DIM, heads=4)

    def forward(self, state_ND, grid_BPD):
        read, weights = self.attention(state_ND[:, None], self.attention.remember(grid_BPD))
        return read[:, 0], weights[:, :, 0]


@pytest.fixture(params=[_AdditiveRead, _MultiHeadRead])
def read(request):
    return request.param().eval()


def test_additive_attention_equals_the_paper_in_numpy():
    attention = AdditiveAttention(feature_dim=5, state_dim=7, hidden_dim=4).double()
    state, grid = torch.randn(3, 7).double(), torch.randn(3, CELLS, 5).double()
    context, weights = attention(state, attention.remember(grid))
    w_a, bias, w_h, w = (
        value.numpy()
        for value in (
            attention.key.weight,
            attention.key.bias,
            attention.query.weight,
            attention.score.weight,
        )
    )
    for row in range(3):
        energies = np.array([w[0] @ np.tanh(w_a @ a + w_h @ state[row].numpy() + bias) for a in grid[row].numpy()])
        alpha = np.exp(energies) / np.exp(energies).sum()
        np.testing.assert_allclose(weights[row], alpha, rtol=0, atol=1e-7)
        np.testing.assert_allclose(context[row], alpha @ grid[row].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 16])
@pytest.mark.parametrize("steps", [1, 5])
def test_multi_head_attention_equals_torch(heads, steps):
    ours = MultiHeadAttention(dim=DIM, heads=heads).eval()
    torchs = nn.MultiheadAttention(DIM, heads, batch_first=True).eval()
    torchs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
    torchs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    torchs.out_proj.load_state_dict(ours.output.state_dict())
    state, grid = torch.randn(4, steps, DIM), torch.randn(4, CELLS, DIM)
    output, weights = ours(state, ours.remember(grid))
    expected, expected_weights = torchs(state, grid, grid, need_weights=True, average_attn_weights=False)
    close(output, expected, rtol=1e-5, atol=1e-5)
    close(weights, expected_weights, rtol=0, atol=1e-6)


def test_rows_that_share_a_picture_equal_rows_with_a_copy_each(read):
    state, grid = torch.randn(6, DIM), torch.randn(2, CELLS, DIM)
    shared, copied = read(state, grid), read(state, grid.repeat_interleave(3, dim=0))
    close(shared[0], copied[0], rtol=1e-5, atol=1e-5)
    close(shared[1], copied[1], rtol=0, atol=1e-6)


def test_steps_of_rows_that_share_a_picture_do_not_mix():
    attention, state = MultiHeadAttention(dim=DIM, heads=4), torch.randn(6, 5, DIM)
    memory = attention.remember(torch.randn(2, CELLS, DIM))
    output, weights = attention(state, memory)
    for step in range(5):
        one, one_weights = attention(state[:, step : step + 1], memory)
        close(output[:, step : step + 1], one, rtol=1e-5, atol=1e-5)
        close(weights[:, :, step : step + 1], one_weights, rtol=0, atol=1e-6)


def test_equal_cells_get_equal_weights(read):
    _, weights = read(torch.randn(4, DIM), torch.randn(4, 1, DIM).expand(-1, CELLS, -1))
    close(weights, torch.full_like(weights, 1 / CELLS), rtol=0, atol=1e-6)


def test_permuting_the_cells_permutes_the_weights_and_not_the_read(read):
    state, grid, order = torch.randn(4, DIM), torch.randn(4, CELLS, DIM), torch.randperm(CELLS)
    before, after = read(state, grid), read(state, grid[:, order])
    close(after[0], before[0], rtol=1e-5, atol=1e-5)
    close(after[1], before[1][..., order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_weights_are_a_float32_distribution_however_large_the_scores(read, dtype, scale):
    _, weights = read.to(dtype)((torch.randn(4, DIM) * scale).to(dtype), (torch.randn(2, CELLS, DIM) * scale).to(dtype))
    assert weights.dtype == torch.float32
    assert weights.min() >= 0
    close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-6)


def test_the_additive_read_lies_between_the_cells():
    attention = AdditiveAttention(feature_dim=DIM, state_dim=DIM, hidden_dim=9)
    grid = torch.randn(3, CELLS, DIM)
    context, _ = attention(torch.randn(3, DIM) * 9, attention.remember(grid))
    assert (context <= grid.amax(dim=1) + 1e-6).all()
    assert (context >= grid.amin(dim=1) - 1e-6).all()


def test_returned_weights_are_those_before_dropout():
    attention = MultiHeadAttention(dim=DIM, heads=4, dropout=0.5)
    state, memory = torch.randn(4, 3, DIM), attention.remember(torch.randn(4, CELLS, DIM))
    trained, trained_weights = attention.train()(state, memory)
    evaluated, weights = attention.eval()(state, memory)
    assert torch.equal(trained_weights, weights)
    assert not torch.allclose(trained, evaluated, atol=1e-3)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="16 cannot be divided into parts of 3"):
        MultiHeadAttention(dim=16, heads=3)


def test_rows_that_are_not_a_multiple_of_the_pictures_are_refused(read):
    with pytest.raises(ConfigError, match="multiple of 2"):
        read(torch.randn(3, DIM), torch.randn(2, CELLS, DIM))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_every_row_finds_its_own_picture_after_any_selections(data):
    """The memory here holds the number of its picture, so that what a row would look at can be read off."""
    pictures = data.draw(st.integers(1, 4))
    picture_of_row, rows = list(range(pictures)), PictureRows(pictures, pictures)
    memory = GridMemory(torch.arange(pictures)[:, None], -torch.arange(pictures)[:, None])
    for _ in range(data.draw(st.integers(1, 4))):
        chosen = data.draw(st.lists(st.integers(0, len(picture_of_row) - 1), max_size=8))
        picture_of_row = [picture_of_row[row] for row in chosen]
        kept, rows = rows.select(np.array(chosen, dtype=np.int64))
        memory = memory if kept is None else memory.select(torch.from_numpy(kept))
        assert len(memory.keys) == len(memory.values) == rows.pictures
        assert rows.pictures * rows.per_picture == len(picture_of_row)
        found = memory.keys[:, 0].repeat_interleave(rows.per_picture).tolist()
        assert found == picture_of_row
        assert torch.equal(memory.values, -memory.keys)
        if not chosen:
            break


@given(pictures=st.integers(1, 5), widths=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
@settings(deadline=None, max_examples=50)
def test_a_beam_never_copies_a_picture(pictures, widths, data):
    """As long as every picture keeps its place and has as many rows as the others."""
    rows, width = PictureRows(pictures, pictures), 1
    for new in widths:
        slots = data.draw(st.lists(st.integers(0, width - 1), min_size=pictures * new, max_size=pictures * new))
        chosen = [(row // new) * width + slot for row, slot in enumerate(slots)]
        kept, rows = rows.select(np.array(chosen))
        assert kept is None
        assert (rows.pictures, rows.per_picture) == (pictures, new)
        width = new
