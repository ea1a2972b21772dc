"""The losses and inputs of training equal their definitions, and leave padding and special tokens alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CELLS, CHANNELS, DECODERS, VOCABULARY, make_decoder, random_grid
from torch.nn.functional import cross_entropy

from captioner import ConfigError
from captioner.tokenizer import Tokenizer
from training import objectives
from training.objectives import (
    attention_regulariser,
    caption_cross_entropy,
    drop_words,
    scheduled_inputs,
    self_critical_loss,
    word_log_probabilities,
)
from training.rewards import advantages

PAD, START, END, UNKNOWN = range(4)
SPECIAL = (PAD, START, END)
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(4, 9))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_targets(rows, steps, size=9, seed=0, start=False):
    """Words, the end, then padding; with a start in front on demand."""
    tokens = torch.randint(UNKNOWN, size, (rows, steps), generator=generator(seed))
    length = torch.randint(0, steps, (rows, 1), generator=generator(seed + 1))
    place = torch.arange(steps)
    tokens = tokens.masked_fill(place == length, END).masked_fill(place > length, PAD)
    return torch.cat([torch.full((rows, 1), START), tokens], dim=1) if start else tokens


def torch_cross_entropy(logits, targets, smoothing):
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing)


# ---------------------------------------------------------------- cross-entropy


@settings(deadline=None, max_examples=50)
@given(sizes=SIZES, smoothing=st.sampled_from([0.0, 0.1, 1.0]), at_once=st.integers(1, 60), seed=st.integers(0, 99))
def test_cross_entropy_equals_torch_with_ignored_padding(sizes, smoothing, at_once, seed):
    rows, steps, size = sizes
    logits = (3 * torch.randn(rows, steps, size, generator=generator(seed))).requires_grad_()
    targets = random_targets(rows, steps, size, seed)
    expected = torch_cross_entropy(logits, targets, smoothing)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "_AT_ONCE", at_once)
        found = caption_cross_entropy(logits, targets, label_smoothing=smoothing)
    (found_gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, expected_gradient)
    assert (found_gradient[targets == PAD] == 0).all()


def test_cross_entropy_of_more_logits_than_are_taken_at_once_equals_torch():
    logits = torch.randn(40, 16, 1500, generator=generator()).requires_grad_()
    assert logits.numel() > objectives._AT_ONCE
    targets = random_targets(40, 16, 1500)
    torch.testing.assert_close(
        caption_cross_entropy(logits, targets, label_smoothing=0.1), torch_cross_entropy(logits, targets, 0.1)
    )


def test_cross_entropy_of_bfloat16_is_computed_in_float32():
    logits = torch.randn(4, 5, 9, generator=generator()).bfloat16().requires_grad_()
    targets = random_targets(4, 5)
    loss = caption_cross_entropy(logits, targets, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch_cross_entropy(logits, targets, 0.1))
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------- regulariser


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_regulariser_is_the_equation_word_by_word(sizes, seed):
    rows, steps, cells = sizes
    attention = torch.randn(rows, steps, cells, generator=generator(seed)).softmax(dim=2)
    targets = random_targets(rows, steps, seed=seed)
    total = 0.0
    for row, cell in itertools.product(range(rows), range(cells)):
        looked = sum(attention[row, t, cell].item() for t in range(steps) if targets[row, t] != PAD)
        total += (1 - looked) ** 2
    assert attention_regulariser(attention, targets).item() == pytest.approx(total / rows / cells, rel=1e-5)


def test_regulariser_is_zero_when_a_caption_looks_at_every_cell_once():
    attention = torch.eye(5)[None].repeat(3, 1, 1)
    targets = torch.tensor([[4, 5, 6, 7, END]]).repeat(3, 1)
    assert attention_regulariser(attention, targets).item() == 0


def test_regulariser_ignores_steps_and_rows_of_padding():
    attention = torch.rand(2, 4, 6, generator=generator()).requires_grad_()
    targets = torch.tensor([[5, END, PAD, PAD], [PAD] * 4])
    loss = attention_regulariser(attention, targets)
    torch.testing.assert_close(loss, attention_regulariser(attention[:1, :2], targets[:1, :2]))
    loss.backward()
    assert (attention.grad[0, :2] != 0).all()
    assert (attention.grad[0, 2:] == 0).all()
    assert (attention.grad[1] == 0).all()


@pytest.mark.parametrize("kind", DECODERS)
def test_regulariser_takes_the_attention_of_every_decoder(kind):
    decoder = make_decoder(kind)
    tokens = random_targets(4, 6, VOCABULARY, start=True)
    _, attention = decoder(random_grid(2), tokens[:, :-1])
    assert attention.shape == (4, 6, CELLS)
    loss = attention_regulariser(attention, tokens[:, 1:])
    # Each step gives 1 in all, so that the mean over cells of what is looked at is the number of steps over P.
    steps = (tokens[:, 1:] != PAD).sum(dim=1) / CELLS
    assert loss >= (1 - steps).square().mean() - 1e-6


# ---------------------------------------------------------------- words dropped and replaced


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), probability=st.sampled_from([0.0, 0.3, 1.0]))
def test_dropped_words_are_unknown_and_special_tokens_stay(seed, probability):
    tokens = random_targets(6, 7, seed=seed, start=True)
    before = tokens.clone()
    dropped = drop_words(
        tokens, probability=probability, unknown_id=UNKNOWN, special_ids=SPECIAL, generator=generator(seed)
    )
    assert torch.equal(tokens, before)
    changed = dropped != tokens
    assert (dropped[changed] == UNKNOWN).all()
    special = torch.isin(tokens, torch.tensor(SPECIAL))
    assert not (changed & special).any()
    if probability == 0:
        assert torch.equal(dropped, tokens)
    if probability == 1:
        assert (dropped[~special] == UNKNOWN).all()


def test_words_are_dropped_with_the_probability_each_on_its_own():
    tokens = torch.full((200, 200), 5)
    dropped = drop_words(tokens, probability=0.3, unknown_id=UNKNOWN, special_ids=SPECIAL, generator=generator())
    gone = (dropped == UNKNOWN).double()
    assert gone.mean().item() == pytest.approx(0.3, abs=0.01)
    # Neighbours go together as often as two independent words.
    assert (gone[:, 1:] * gone[:, :-1]).mean().item() == pytest.approx(0.09, abs=0.01)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), probability=st.sampled_from([0.0, 0.5, 1.0]))
def test_scheduled_inputs_replace_words_alone_and_never_by_special_tokens(seed, probability):
    tokens = random_targets(6, 7, seed=seed, start=True)
    before = tokens.clone()
    logits = torch.randn(6, 8, 9, generator=generator(seed)).requires_grad_()
    inputs = scheduled_inputs(tokens, logits, probability=probability, special_ids=SPECIAL, generator=generator(seed))
    assert torch.equal(tokens, before)
    assert not inputs.requires_grad
    special = torch.isin(tokens, torch.tensor(SPECIAL))
    assert torch.equal(inputs[special], tokens[special])
    assert not torch.isin(inputs[~special], torch.tensor(SPECIAL)).any()
    if probability == 0:
        assert torch.equal(inputs, tokens)


def test_scheduled_inputs_are_what_the_model_says_for_that_position():
    tokens = random_targets(5, 6, size=40, seed=3, start=True)
    said = torch.randint(UNKNOWN, 40, tokens.shape, generator=generator(4))
    # The logits of position t are certain of one token for position t + 1.
    logits = torch.full((*tokens.shape, 40), -1e4).scatter(2, said[:, :, None], 0.0)
    inputs = scheduled_inputs(tokens, logits, probability=1.0, special_ids=SPECIAL, generator=generator())
    words = ~torch.isin(tokens, torch.tensor(SPECIAL))
    assert words.any()
    expected = tokens.clone()
    expected[:, 1:] = torch.where(words[:, 1:], said[:, :-1], tokens[:, 1:])
    assert torch.equal(inputs, expected)


def test_scheduled_inputs_are_drawn_from_the_softmax_of_the_words():
    tokens = torch.tensor([[START, 5]]).repeat(40_000, 1)
    logits = torch.tensor([2.0, 2.0, 2.0, 0.0, 1.0, -1.0]).repeat(40_000, 2, 1)
    inputs = scheduled_inputs(tokens, logits, probability=1.0, special_ids=SPECIAL, generator=generator())
    share = torch.bincount(inputs[:, 1], minlength=6) / 40_000
    torch.testing.assert_close(share[3:], logits[0, 0, 3:].softmax(dim=0), atol=0.01, rtol=0)


def test_scheduled_inputs_keep_a_first_word_that_nothing_predicts():
    tokens = torch.full((50, 2), 5)  # without a start in front
    inputs = scheduled_inputs(tokens, torch.randn(50, 2, 9), probability=1.0, special_ids=(*SPECIAL, 5))
    assert torch.equal(inputs, tokens)
    inputs = scheduled_inputs(tokens, torch.zeros(50, 2, 9), probability=1.0, special_ids=SPECIAL)
    assert (inputs[:, 0] == 5).all()
    assert (inputs[:, 1] != 5).any()


# ---------------------------------------------------------------- self-critical training


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, at_once=st.integers(1, 60), seed=st.integers(0, 99))
def test_word_log_probabilities_are_those_of_the_softmax_that_was_drawn_from(sizes, at_once, seed):
    rows, steps, size = sizes
    logits = torch.randn(rows, steps, size, generator=generator(seed))
    tokens = random_targets(rows, steps, size, seed)
    tokens[tokens == UNKNOWN] = END
    never = (PAD, START, UNKNOWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "_AT_ONCE", at_once)
        found = word_log_probabilities(logits, tokens, never_ids=never)
        plain = word_log_probabilities(logits, tokens)
    for row, step in itertools.product(range(rows), range(steps)):
        token = int(tokens[row, step])
        whole = logits[row, step].double().exp()
        assert plain[row, step].item() == pytest.approx((whole[token] / whole.sum()).log().item(), abs=1e-5)
        drawn = whole[token] / (whole.sum() - whole[list(never)].sum())
        assert found[row, step].item() == (0 if token == PAD else pytest.approx(drawn.log().item(), abs=1e-5))


def test_self_critical_loss_is_the_mean_over_real_tokens_and_leaves_padding_without_gradient():
    log_probabilities = torch.tensor([[-1.0, -2.0, -torch.inf], [-3.0, -4.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantage = torch.tensor([2.0, -1.0], requires_grad=True)
    loss = self_critical_loss(log_probabilities, mask, advantage)
    assert loss.item() == pytest.approx(-(2 * -3 + -1 * -12) / 5)
    loss.backward()
    expected = torch.tensor([[-2.0, -2.0, 0.0], [1.0, 1.0, 1.0]]) / 5
    torch.testing.assert_close(log_probabilities.grad, expected)
    assert advantage.grad is None


def all_captions(size, steps):
    """Every sequence of words and the end that a sampler can write in so many steps, padded."""
    words = [token for token in range(size) if token not in (PAD, START, UNKNOWN)]
    found = set()
    for sequence in itertools.product(words, repeat=steps):
        length = sequence.index(END) + 1 if END in sequence else steps
        found.add(sequence[:length] + (PAD,) * (steps - length))
    return torch.tensor(sorted(found))


@pytest.mark.parametrize("baseline", ["greedy", "mean_of_others"])
def test_expected_gradient_of_the_loss_is_that_of_the_expected_reward(baseline):
    """The sum over all pairs of samples, with their probabilities: exact, no noise."""
    size, steps, never = 6, 3, (PAD, START, UNKNOWN)
    captions = all_captions(size, steps)
    assert len(captions) == 1 + 2 + 4 + 8
    reward = torch.rand(len(captions), generator=generator(1))
    weights = torch.randn(size, size, generator=generator(2), requires_grad=True)  # of a bigram model
    inputs = torch.cat([torch.full((len(captions), 1), START), captions[:, :-1]], dim=1)
    mask = captions != PAD

    def log_probabilities():
        return word_log_probabilities(weights[inputs], captions, never_ids=never)

    probability = log_probabilities().sum(dim=1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    (exact,) = torch.autograd.grad((probability * reward).sum(), weights)
    greedy = reward[3:4].double().numpy() if baseline == "greedy" else None
    expected_loss = torch.zeros(())
    each = log_probabilities()
    for pair in map(list, itertools.product(range(len(captions)), repeat=2)):
        gain = advantages(reward[pair].double().numpy()[None], baseline=baseline, greedy_B=greedy)[0]
        loss = self_critical_loss(each[pair], mask[pair], torch.from_numpy(gain).float())
        # The mean over tokens becomes the mean over captions.
        per_caption = loss * mask[pair].sum() / 2
        expected_loss = expected_loss + probability[pair].prod().detach() * per_caption
    (found,) = torch.autograd.grad(expected_loss, weights)
    torch.testing.assert_close(found, -exact, atol=1e-6, rtol=1e-4)
    assert exact.abs().max() > 0.01


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_probabilities_out_of_range_are_named(wrong):
    logits, tokens = torch.zeros(1, 2, CHANNELS), torch.tensor([[4, END]])
    with pytest.raises(ConfigError, match="label_smoothing"):
        caption_cross_entropy(logits, tokens, label_smoothing=wrong)
    with pytest.raises(ConfigError, match="dropping"):
        drop_words(tokens, probability=wrong, unknown_id=UNKNOWN, special_ids=SPECIAL)
    with pytest.raises(ConfigError, match="scheduled sampling"):
        scheduled_inputs(tokens, logits, probability=wrong, special_ids=SPECIAL)


def test_special_tokens_have_the_ids_of_every_vocabulary():
    assert (Tokenizer.pad_id, Tokenizer.start_id, Tokenizer.end_id, Tokenizer.unknown_id) == (
        PAD,
        START,
        END,
        UNKNOWN,
    )
