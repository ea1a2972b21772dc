"""Laws of the decoder protocol, the same for all three decoders."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CELLS,
    CHANNELS,
    DECODERS,
    FLOAT32,
    GRID_HW,
    MAX_TOKENS,
    VOCABULARY,
    make_decoder,
    random_grid,
    random_tokens,
    repeated,
    selections,
    step_through,
)

from captioner.decoders import Decoder, MultiheadDecoder
from captioner.decoders.multihead import CausalSelfAttention
from captioner.errors import ConfigError

close = torch.testing.assert_close


@pytest.fixture(params=DECODERS)
def decoder(request):
    return make_decoder(request.param)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_every_decoder_keeps_to_the_protocol(decoder):
    assert isinstance(decoder, Decoder)
    assert decoder.max_tokens == MAX_TOKENS


@pytest.mark.parametrize("rows", [1, 3])
def test_stepwise_equals_teacher_forced(decoder, rows):
    grid, tokens = random_grid(4), random_tokens(4 * rows, MAX_TOKENS)
    forced_logits, forced_attention = decoder(grid, tokens)
    logits, attention, _ = step_through(decoder, grid, tokens)
    assert logits.shape == (4 * rows, MAX_TOKENS, VOCABULARY)
    assert attention.shape == (4 * rows, MAX_TOKENS, CELLS)
    close(logits, forced_logits, **FLOAT32)
    close(attention, forced_attention, **FLOAT32)


def test_rows_of_one_picture_equal_pictures_of_their_own(decoder):
    grid, tokens = random_grid(2), random_tokens(6, 5)
    shared, own = decoder(grid, tokens), decoder(grid[repeated(2, 3)], tokens)
    close(shared[0], own[0], **FLOAT32)
    close(shared[1], own[1], **FLOAT32)


@pytest.mark.parametrize("kind", DECODERS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_stepwise_equals_teacher_forced_after_any_selection(kind, data):
    decoder, pictures = make_decoder(kind), data.draw(st.integers(1, 3))
    grid, state = random_grid(pictures), decoder.start(random_grid(pictures))
    picture_of_row, history = list(range(pictures)), torch.empty(pictures, 0, dtype=torch.int64)
    for step in range(data.draw(st.integers(1, 5))):
        for _ in range(data.draw(st.integers(0, 2))):
            chosen = data.draw(selections(picture_of_row))
            picture_of_row = [picture_of_row[row] for row in chosen]
            state, history = state.select(torch.tensor(chosen)), history[chosen]
        history = torch.cat([history, random_tokens(len(history), 1, seed=step)], dim=1)
        logits, attention, state = decoder.step(history[:, -1], state)
        forced_logits, forced_attention = decoder(grid[picture_of_row], history)
        close(logits, forced_logits[:, -1], **FLOAT32)
        close(attention, forced_attention[:, -1], **FLOAT32)
        assert len(state.attention_heads_BLHP) == len(history)
        close(state.attention_heads_BLHP.mean(dim=(1, 2)), attention, **FLOAT32)


def test_heads_follow_a_selection(decoder):
    state = decoder.step(random_tokens(3, 1)[:, 0], decoder.start(random_grid(3)))[2]
    before, order = state.attention_heads_BLHP.clone(), torch.tensor([2, 0, 0, 1])
    assert torch.equal(state.select(order).attention_heads_BLHP, before[order])


def test_no_row_of_attention_before_the_first_step(decoder):
    assert len(decoder.start(random_grid(3)).attention_heads_BLHP) == 0
    assert len(decoder.start(random_grid(3)).select(repeated(3, 2)).attention_heads_BLHP) == 0


def test_cached_equals_uncached(decoder):
    grid, tokens = random_grid(2), random_tokens(2, 6)
    logits, attention, _ = step_through(decoder, grid, tokens)
    for step in range(6):
        uncached_logits, uncached_attention = decoder(grid, tokens[:, : step + 1])
        close(logits[:, step], uncached_logits[:, -1], **FLOAT32)
        close(attention[:, step], uncached_attention[:, -1], **FLOAT32)


def test_a_smaller_cache_gives_the_same(decoder):
    grid, tokens = random_grid(2), random_tokens(2, 4)
    for small, large in zip(
        step_through(decoder, grid, tokens, max_tokens=4), step_through(decoder, grid, tokens), strict=True
    ):
        close(small, large, **FLOAT32)


def test_the_cache_is_allocated_once():
    decoder, tokens = make_decoder("multihead"), random_tokens(2, 4)
    state = decoder.start(random_grid(2), max_tokens=4)
    places = [cache.data_ptr() for cache in (*state.keys, *state.values)]
    assert all(cache.shape[2] == 4 for cache in (*state.keys, *state.values))
    for step in range(4):
        state = decoder.step(tokens[:, step], state)[2]
        assert [cache.data_ptr() for cache in (*state.keys, *state.values)] == places


def test_a_beam_is_reordered_without_copying_its_words():
    decoder = make_decoder("multihead")
    state = decoder.start(random_grid(3), max_tokens=8).with_room(40)
    places = [cache.data_ptr() for cache in (*state.keys, *state.values)]
    for order in (repeated(3, 4), torch.tensor([3, 3, 0, 1, 4, 5, 6, 7, 11, 8, 8, 8]), torch.tensor([0, 4, 8])):
        state = decoder.step(random_tokens(len(order), 1)[:, 0], state.select(order))[2]
        assert [cache.data_ptr() for cache in (*state.keys, *state.values)] == places
    assert state.slots == 4 + 4 + 1


@pytest.mark.parametrize("limit", [1, 3, MAX_TOKENS, None])
def test_a_step_beyond_the_limit_is_refused(decoder, limit):
    state = decoder.start(random_grid(2), max_tokens=limit)
    for step in range(limit or MAX_TOKENS):
        state = decoder.step(random_tokens(2, 1, seed=step)[:, 0], state)[2].select(torch.tensor([1, 0]))
    with pytest.raises(ConfigError, match="all steps that its state was started for"):
        decoder.step(random_tokens(2, 1)[:, 0], state)


@pytest.mark.parametrize("steps", [0, -1, MAX_TOKENS + 1])
def test_a_limit_out_of_range_is_refused(decoder, steps):
    with pytest.raises(ConfigError, match=f"1 to {MAX_TOKENS} steps, got {steps}"):
        decoder.start(random_grid(1), max_tokens=steps)


@pytest.mark.parametrize("steps", [0, MAX_TOKENS + 1])
def test_a_sequence_out_of_range_is_refused(decoder, steps):
    with pytest.raises(ConfigError, match=f"1 to {MAX_TOKENS} steps, got {steps}"):
        decoder(random_grid(1), random_tokens(1, steps))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_that_pictures_cannot_share_are_refused(decoder, rows):
    with pytest.raises(ConfigError, match="multiple of 2"):
        decoder(random_grid(2), random_tokens(rows, 2))


def test_batch_equals_singles(decoder):
    grid, tokens = random_grid(4), random_tokens(4, 5)
    logits, attention = decoder(grid, tokens)
    stepwise = step_through(decoder, grid, tokens)
    for picture in range(4):
        one = slice(picture, picture + 1)
        single_logits, single_attention = decoder(grid[one], tokens[one])
        close(logits[one], single_logits, **FLOAT32)
        close(attention[one], single_attention, **FLOAT32)
        for batch, single in zip(stepwise, step_through(decoder, grid[one], tokens[one]), strict=True):
            close(batch[one], single, **FLOAT32)


def test_causality(decoder):
    grid, tokens = random_grid(2), random_tokens(2, 7)
    logits, attention = decoder(grid, tokens)
    for changed in range(1, 7):
        other = tokens.clone()
        other[:, changed:] = (other[:, changed:] + 1) % VOCABULARY
        other_logits, other_attention = decoder(grid, other)
        close(other_logits[:, :changed], logits[:, :changed], **FLOAT32)
        close(other_attention[:, :changed], attention[:, :changed], **FLOAT32)
        # The token itself is read: the law is not kept by ignoring everything.
        assert not torch.allclose(other_logits[:, changed:], logits[:, changed:], atol=1e-3)


def test_padding_at_the_right_changes_nothing_before_it(decoder):
    grid, tokens = random_grid(2), random_tokens(2, 4)
    padded = torch.nn.functional.pad(tokens, (0, 5), value=0)
    short, long = decoder(grid, tokens), decoder(grid, padded)
    close(long[0][:, :4], short[0], **FLOAT32)
    close(long[1][:, :4], short[1], **FLOAT32)


def _projections(decoder):
    """Return the layers that compute what does not depend on the words."""
    if isinstance(decoder, MultiheadDecoder):
        return [decoder.grid, *(block.grid_attention.key_value for block in decoder.blocks)]
    return [decoder.attention.key] if hasattr(decoder, "attention") else [decoder.picture]


def test_the_pictures_are_looked_at_once(decoder):
    calls = []
    for layer in _projections(decoder):
        layer.register_forward_hook(lambda module, inputs, output: calls.append((module, len(inputs[0]))))
    state = decoder.start(random_grid(3))
    state = state.select(repeated(3, 4))
    for step in range(5):
        state = decoder.step(random_tokens(12, 1, seed=step)[:, 0], state)[2]
        state = state.select(torch.arange(12).view(3, 4).flip(1).flatten())
    assert calls == [(layer, 3) for layer in _projections(decoder)]
    calls.clear()
    decoder(random_grid(3), random_tokens(12, 5))
    assert calls == [(layer, 3) for layer in _projections(decoder)]


def _memories(state):
    return state.memories if hasattr(state, "memories") else (state.memory,)


def test_beams_share_the_pictures_and_copy_nothing(decoder):
    state = decoder.start(random_grid(3))
    places = [(memory.keys.data_ptr(), memory.values.data_ptr()) for memory in _memories(state)]
    for order in (repeated(3, 4), torch.tensor([3, 3, 0, 1, 4, 5, 6, 7, 11, 8, 8, 8]), torch.tensor([0, 4, 8])):
        state = decoder.step(random_tokens(len(order), 1)[:, 0], state.select(order))[2]
        assert [(m.keys.data_ptr(), m.values.data_ptr()) for m in _memories(state)] == places


def test_pictures_without_rows_are_forgotten(decoder):
    state = decoder.start(random_grid(3)).select(repeated(3, 2)).select(torch.tensor([0, 1, 4, 5]))
    assert all(len(memory.keys) == len(memory.values) == 2 for memory in _memories(state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_is_a_float32_distribution(decoder, dtype):
    decoder, tokens = copy.deepcopy(decoder).to(dtype), random_tokens(4, 5)
    grid = (random_grid(2) * 5).to(dtype)
    logits, attention, heads = step_through(decoder, grid, tokens)
    for weights in (attention, heads, decoder(grid, tokens)[1]):
        assert weights.dtype == torch.float32
        assert weights.min() >= 0
        close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-6)
    assert logits.dtype == dtype


def test_attention_is_a_float32_distribution_under_autocast(decoder):
    tokens = random_tokens(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, attention, heads = step_through(decoder, random_grid(2), tokens)
        forced_logits, forced_attention = decoder(random_grid(2), tokens)
    for weights in (attention, heads, forced_attention):
        assert weights.dtype == torch.float32
        close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-6)
    close(logits.float(), forced_logits.float(), rtol=0.1, atol=0.1)
    close(attention, forced_attention, rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("map_layers", "layers"), [((), [0, 1, 2]), ((-1,), [2]), ((0,), [0]), ((0, -1), [0, 2]), ((1, -2), [1])]
)
def test_a_map_is_the_mean_of_the_heads_over_the_map_layers(map_layers, layers):
    decoder = make_decoder("multihead", layers=3, map_layers=map_layers)
    _, attention, heads = step_through(decoder, random_grid(2), random_tokens(2, 4))
    assert heads.shape == (2, 4, 3, 4, CELLS)
    close(attention, heads[:, :, layers].mean(dim=(2, 3)), rtol=0, atol=1e-7)
    close(decoder(random_grid(2), random_tokens(2, 4))[1], attention, **FLOAT32)


@pytest.mark.parametrize("kind", ["mean", "additive"])
def test_one_read_of_the_grid_is_one_layer_with_one_head(kind):
    _, attention, heads = step_through(make_decoder(kind), random_grid(2), random_tokens(2, 4))
    assert heads.shape == (2, 4, 1, 1, CELLS)
    assert torch.equal(heads[:, :, 0, 0], attention)


def test_the_maps_of_mean_are_uniform():
    attention = make_decoder("mean")(random_grid(2), random_tokens(2, 4))[1]
    close(attention, torch.full_like(attention, 1 / CELLS), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["additive", "multihead"])
def test_maps_depend_on_picture_and_words(kind):
    attention = make_decoder(kind)(random_grid(2), random_tokens(2, 6))[1]
    assert (attention[0] - attention[1]).abs().max() > 0.01
    assert (attention[:, 1:] - attention[:, :-1]).abs().amax(dim=(1, 2)).min() > 0.005


def test_permuting_the_cells_permutes_the_attention(decoder):
    if isinstance(decoder, MultiheadDecoder):  # its positions tell one cell from another
        decoder.grid_row.zero_()
        decoder.grid_column.zero_()
    grid, tokens, order = random_grid(2), random_tokens(2, 5), torch.tensor([3, 0, 5, 1, 4, 2])
    logits, attention = decoder(grid, tokens)
    permuted_logits, permuted_attention = decoder(grid[:, order], tokens)
    close(permuted_logits, logits, **FLOAT32)
    close(permuted_attention, attention[:, :, order], **FLOAT32)


def test_the_place_of_a_cell_matters_to_multihead():
    decoder, order = make_decoder("multihead"), torch.tensor([3, 0, 5, 1, 4, 2])
    logits, attention = decoder(random_grid(2), random_tokens(2, 5))
    permuted_logits, permuted_attention = decoder(random_grid(2)[:, order], random_tokens(2, 5))
    assert (permuted_logits - logits).abs().max() > 0.01
    assert (permuted_attention - attention[:, :, order]).abs().max() > 0.01


def test_positions_of_the_grid_are_row_by_row():
    decoder, (rows, columns) = make_decoder("multihead"), GRID_HW
    for layer in (decoder.grid[0].weight, decoder.grid[0].bias, decoder.grid[1].weight, decoder.grid[1].bias):
        layer.zero_()
    seen = []
    decoder.blocks[0].grid_attention.key_value.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0])
    )
    decoder.start(torch.zeros(1, CELLS, CHANNELS))
    for row in range(rows):
        for column in range(columns):
            place = decoder.grid_row[row, 0] + decoder.grid_column[0, column]
            close(seen[0][0, row * columns + column], place)


def test_dropout_is_of_training_alone(decoder):
    grid, tokens = random_grid(2), random_tokens(2, 5)
    assert torch.equal(decoder(grid, tokens)[0], decoder(grid, tokens)[0])
    decoder.train()
    assert not torch.allclose(decoder(grid, tokens)[0], decoder(grid, tokens)[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["mean", "additive"])
def test_the_output_layer_is_dropped_in_a_training_step_too(kind):
    decoder, tokens = make_decoder(kind).train(), random_tokens(2, 1)[:, 0]
    decoder.embedding.weight.zero_()  # so that it is not the dropout of the words that is seen
    state = decoder.start(random_grid(2))
    assert not torch.allclose(decoder.step(tokens, state)[0], decoder.step(tokens, state)[0], atol=1e-3)


@pytest.mark.parametrize("kind", DECODERS)
def test_training_without_dropout_equals_evaluation(kind):
    decoder = make_decoder(kind, dropout=0.0)
    evaluated = decoder(random_grid(2), random_tokens(4, 5))
    trained = decoder.train()(random_grid(2), random_tokens(4, 5))
    close(trained[0], evaluated[0], **FLOAT32)
    close(trained[1], evaluated[1], **FLOAT32)


@pytest.mark.parametrize("kind", DECODERS)
def test_captions_that_share_a_picture_give_the_gradient_of_separate_pictures(kind):
    tokens, gradients = random_tokens(6, 5), []
    for grid in (random_grid(2), random_grid(2)[repeated(2, 3)]):
        decoder = make_decoder(kind)
        with torch.enable_grad():
            decoder(grid, tokens)[0].log_softmax(dim=-1)[..., 3].sum().backward()
        gradients.append({name: value.grad for name, value in decoder.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4)


def _wanted(lengths, steps):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, MAX_TOKENS), min_size=6, max_size=6).filter(any),
    pictures=st.sampled_from([1, 2, 3, 6]),
    training=st.booleans(),
)
def test_logits_at_wanted_positions_equal_forward_there(lengths, pictures, training):
    decoder = make_decoder("multihead", dropout=0.0).train(training)
    grid, tokens, wanted = random_grid(pictures), random_tokens(6, MAX_TOKENS), _wanted(lengths, MAX_TOKENS)
    close(decoder.logits_at(grid, tokens, wanted), decoder(grid, tokens)[0][wanted], **FLOAT32)


def test_what_stands_behind_the_wanted_positions_does_not_matter():
    decoder, grid, wanted = make_decoder("multihead"), random_grid(2), _wanted([1, 4, 7, 0], 7)
    tokens, others = random_tokens(4, 7), random_tokens(4, 7, seed=5)
    changed = torch.where(wanted, tokens, others)
    assert not torch.equal(changed, tokens)
    assert torch.equal(decoder.logits_at(grid, changed, wanted), decoder.logits_at(grid, tokens, wanted))


def test_logits_at_wanted_positions_give_the_gradient_of_forward():
    decoder = make_decoder("multihead", dropout=0.0).train()
    grid, tokens, wanted = random_grid(2), random_tokens(6, 7), _wanted([7, 1, 3, 0, 5, 6], 7)
    weights = torch.randn(int(wanted.sum()), VOCABULARY)
    parameters = [grid.requires_grad_(), *decoder.parameters()]
    with torch.enable_grad():
        whole = torch.autograd.grad((decoder(grid, tokens)[0][wanted] * weights).sum(), parameters)
        wanted_alone = torch.autograd.grad((decoder.logits_at(grid, tokens, wanted) * weights).sum(), parameters)
    for one, other in zip(wanted_alone, whole, strict=True):
        close(one, other, rtol=1e-4, atol=1e-5)


def test_logits_at_no_position_are_none():
    decoder = make_decoder("multihead")
    assert decoder.logits_at(random_grid(2), random_tokens(2, 3), _wanted([0, 0], 3)).shape == (0, VOCABULARY)


def test_logits_at_more_positions_than_the_limit_are_refused():
    decoder, steps = make_decoder("multihead"), MAX_TOKENS + 1
    with pytest.raises(ConfigError, match=f"takes 1 to {MAX_TOKENS} steps, got {steps}"):
        decoder.logits_at(random_grid(1), random_tokens(1, steps), _wanted([2], steps))


def test_self_attention_in_training_drops_each_weight_at_the_given_rate():
    """Values that are unit vectors make the read the weights themselves; the queries are alike, so all are 1 / T."""
    attention, steps = CausalSelfAttention(dim=32, heads=1, dropout=0.25).train(), 32
    alike, units = torch.zeros(50, 1, steps, 32), torch.eye(steps).expand(50, 1, -1, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = attention.read(alike, alike, units)[:, -1]
    dropped = (last == 0).double()
    close(last[last != 0], torch.full_like(last[last != 0], 1 / steps / 0.75), rtol=1e-5, atol=0)
    # Six standard deviations of a binomial.
    assert abs(dropped.mean() - 0.25) < 6 * (0.25 * 0.75 / dropped.numel()) ** 0.5


@pytest.mark.parametrize("steps", [1, 7])
def test_self_attention_is_torchs_with_a_gradient_and_without(steps):
    attention = CausalSelfAttention(dim=16, heads=2, dropout=0.25).eval()
    found = [torch.randn(3, 2, steps, 8).requires_grad_() for _ in range(3)]
    expected = [value.detach().clone().requires_grad_() for value in found]
    with torch.enable_grad():
        read = attention.read(*found)
        theirs = torch.nn.functional.scaled_dot_product_attention(*expected, is_causal=True).transpose(1, 2).flatten(2)
        (read.square().sum() + theirs.square().sum()).backward()
    close(read, theirs, **FLOAT32)
    close(read, attention.read(*found), **FLOAT32)
    for value, other in zip(found, expected, strict=True):
        close(value.grad, other.grad, **FLOAT32)


def test_embeddings_and_output_of_multihead_are_one_matrix():
    decoder = make_decoder("multihead")
    matrices = [name for name, value in decoder.named_parameters() if value.shape[0] == VOCABULARY]
    assert matrices == ["embedding.weight"]


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="dim=16 and heads=3"):
        make_decoder("multihead", heads=3)
