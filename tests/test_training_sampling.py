"""Samples for self-critical training are independent draws from the model, whatever their words."""

from collections import Counter

import pytest
import torch
from models import CHANNELS, DECODERS, MAX_TOKENS, VOCABULARY, make_decoder, random_grid
from toy_decoders import END, PAD, START, UNKNOWN, ToyDecoder, grids, run

from captioner import ConfigError, SearchError
from captioner.api import search_vocabulary
from captioner.config import SearchOptions
from captioner.search import SearchVocabulary
from captioner.tokenizer import Tokenizer
from training.objectives import word_log_probabilities
from training.sampling import draw, permitted_ids, sample

NEVER = (PAD, START, UNKNOWN)
REAL = SearchVocabulary(size=VOCABULARY, start_id=START, end_id=END, never_ids=NEVER)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(decoder, grid, *, samples, max_tokens, seed=0):
    vocabulary = getattr(decoder, "vocabulary", REAL)
    return sample(
        decoder,
        grid,
        vocabulary=vocabulary,
        samples=samples,
        max_tokens=max_tokens,
        pad_id=PAD,
        generator=generator(seed),
    )


def inputs_of(tokens_NT):
    return torch.cat([torch.full((len(tokens_NT), 1), START), tokens_NT[:, :-1]], dim=1)


def teacher_forced(decoder, grid, tokens_NT, samples):
    grid_NPC = grid.repeat_interleave(samples, dim=0) if isinstance(decoder, ToyDecoder) else grid
    with torch.no_grad():
        return decoder.forward(grid_NPC, inputs_of(tokens_NT))[0]


def test_samples_of_a_picture_are_independent_where_search_drops_repeated_captions():
    decoder, grid = ToyDecoder(words=2, max_tokens=3), grids(3)
    options = SearchOptions(method="sample", n_best=50, temperature=1.0, max_words=2, seed=0)
    assert max(len(found) for found in run(decoder, grid, options)) < 50
    rows = sampled(decoder, grid, samples=50, max_tokens=3).view(3, 50, -1).tolist()
    assert all(len(captions) == 50 for captions in rows)
    assert all(len({tuple(caption) for caption in captions}) < 50 for captions in rows)


def test_share_of_every_caption_is_its_probability_by_teacher_forcing():
    """Over all captions of two words, for each picture; a chi-square statistic of a fixed seed."""
    decoder, pictures, samples = ToyDecoder(words=2, max_tokens=3, scale=1.0), 2, 4000
    grid = grids(pictures)
    tokens = sampled(decoder, grid, samples=samples, max_tokens=3)
    assert tokens.shape == (pictures * samples, 3)
    logits = teacher_forced(decoder, grid, tokens, samples)
    log_probability = word_log_probabilities(logits, tokens, never_ids=NEVER).sum(dim=1).tolist()
    for picture in range(pictures):
        rows = range(picture * samples, (picture + 1) * samples)
        drawn = Counter(tuple(tokens[row].tolist()) for row in rows)
        expected = {tuple(tokens[row].tolist()): samples * torch.tensor(log_probability[row]).exp() for row in rows}
        assert len(drawn) == 1 + 2 + 4 + 8
        assert float(sum(expected.values())) == pytest.approx(samples, rel=1e-4)
        statistic = sum((drawn[caption] - count) ** 2 / count for caption, count in expected.items())
        assert statistic < 36.1  # 14 degrees of freedom: 0.1 % of true samples lie above


def test_samples_of_a_picture_depend_on_that_picture():
    decoder, samples = ToyDecoder(words=3, max_tokens=4, scale=4.0), 500
    tokens = sampled(decoder, grids(2), samples=samples, max_tokens=4)
    first, second = (Counter(map(tuple, part.tolist())) for part in tokens.split(samples))
    assert (first & second).total() < 0.8 * samples


@pytest.mark.parametrize("kind", DECODERS)
def test_every_draw_is_the_one_that_teacher_forcing_gives(kind):
    """The same random numbers, put to the logits of the whole captions at once, give the same captions."""
    decoder, grid, samples = make_decoder(kind), random_grid(3), 4
    tokens = sampled(decoder, grid, samples=samples, max_tokens=MAX_TOKENS)
    logits = teacher_forced(decoder, grid, tokens, samples)
    permitted, again = permitted_ids(VOCABULARY, NEVER, device=torch.device("cpu")), generator()
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    for step in range(tokens.shape[1]):
        expected = draw(logits[:, step], permitted, generator=again).masked_fill(ended, PAD)
        assert torch.equal(tokens[:, step], expected)
        ended |= expected == END
    assert ended.any()


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_captions_are_words_then_the_end_then_padding(max_tokens):
    decoder = ToyDecoder(words=3, max_tokens=9)
    tokens = sampled(decoder, grids(4), samples=30, max_tokens=max_tokens)
    assert tokens.dtype == torch.int64
    assert tokens.shape[1] <= max_tokens
    for caption in tokens.tolist():
        ends = caption.index(END) if END in caption else len(caption)
        assert all(token in decoder.words for token in caption[:ends])
        assert all(token == PAD for token in caption[ends + 1 :])
        assert END in caption or len(caption) == max_tokens
    assert not torch.isin(tokens, torch.tensor([START, UNKNOWN])).any()


def test_sampling_stops_when_all_have_ended():
    decoder = ToyDecoder(words=3, max_tokens=12, end_bias=60.0)
    tokens = sampled(decoder, grids(2), samples=3, max_tokens=12)
    assert tokens.tolist() == [[END]] * 6
    assert len(decoder.rows) == 1


def test_pictures_are_looked_at_once_and_read_for_the_first_time_once():
    decoder = ToyDecoder(words=3, max_tokens=6, end_bias=-60.0)
    sampled(decoder, grids(2), samples=5, max_tokens=6)
    assert decoder.starts == [2]
    assert decoder.rows == [2, 10, 10, 10, 10, 10]


def test_same_seed_gives_the_same_samples_and_leaves_the_global_generator_alone():
    decoder, before = ToyDecoder(), torch.get_rng_state()
    first = sampled(decoder, grids(2), samples=5, max_tokens=8)
    assert torch.equal(first, sampled(decoder, grids(2), samples=5, max_tokens=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, sampled(decoder, grids(2), samples=5, max_tokens=8, seed=1))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_of_a_pass_over_the_samples_is_that_without_sampling_before(kind, autocast):
    """Neither the tokens of inference mode nor the weights that autocast keeps may cut the gradient off."""
    decoder, grid = make_decoder(kind), random_grid(2)

    def gradients(tokens=None):
        decoder.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            drawn = sampled(decoder, grid, samples=3, max_tokens=MAX_TOKENS) if tokens is None else tokens
            logits, _ = decoder(grid, inputs_of(drawn))
        word_log_probabilities(logits, drawn, never_ids=NEVER).sum().backward()
        return drawn, {name: parameter.grad for name, parameter in decoder.named_parameters()}

    drawn, after = gradients()
    _, alone = gradients(drawn)
    assert any(gradient is not None for gradient in alone.values())
    torch.testing.assert_close(after, alone, rtol=0, atol=0)


def test_draw_gives_only_permitted_tokens_with_any_probability():
    logits = torch.full((1000, 6), -200.0)
    logits[:, [PAD, START, UNKNOWN]] = 200.0
    logits[:, 5] = -80.0
    permitted = permitted_ids(6, NEVER, device=torch.device("cpu"))
    assert permitted.tolist() == [END, 4, 5]
    assert draw(logits, permitted, generator=generator()).unique().tolist() == [5]
    broken = draw(torch.full((3, 6), torch.nan), permitted, generator=generator())
    assert set(broken.tolist()) <= {END, 4, 5}


@pytest.mark.parametrize("level", [0.0, 1 - 2**-24])
def test_tokens_without_probability_are_passed_over_at_either_end_of_the_range(level, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, level))
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, 1.0, -torch.inf]])
    assert draw(logits, permitted_ids(6, NEVER, device=logits.device)).tolist() == [4]


def test_samples_are_ordinary_tensors_that_autograd_can_keep():
    tokens = sampled(ToyDecoder(), grids(1), samples=2, max_tokens=3)
    assert not tokens.is_inference()
    weights = torch.randn(ToyDecoder().size, 4, requires_grad=True)
    torch.nn.functional.embedding(tokens, weights).sum().backward()
    assert weights.grad.sum().item() == pytest.approx(4 * tokens.numel())


def test_a_model_that_gives_nan_is_an_error():
    with pytest.raises(SearchError, match="NaN for word 3"):
        sampled(ToyDecoder(nan_at=2, end_bias=-60.0), grids(2), samples=3, max_tokens=8)


def test_impossible_samples_are_refused():
    decoder, grid = make_decoder("mean"), random_grid(2)
    with pytest.raises(ConfigError, match="samples must be at least 1"):
        sampled(decoder, grid, samples=0, max_tokens=4)
    with pytest.raises(ConfigError, match=f"takes 1 to {MAX_TOKENS} steps"):
        sampled(decoder, grid, samples=2, max_tokens=MAX_TOKENS + 1)
    careless = SearchVocabulary(size=VOCABULARY, start_id=START, end_id=END)
    with pytest.raises(ConfigError, match="never_ids must name start and padding"):
        sample(decoder, grid, vocabulary=careless, samples=2, max_tokens=4, pad_id=PAD)


def test_vocabulary_of_search_can_be_sampled():
    tokenizer = Tokenizer.train(["a dog runs"] * 5)
    vocabulary = search_vocabulary(tokenizer)
    decoder = make_decoder("additive", vocabulary_size=tokenizer.vocabulary_size)
    tokens = sample(
        decoder, torch.randn(1, 6, CHANNELS), vocabulary=vocabulary, samples=2, max_tokens=4, pad_id=tokenizer.pad_id
    )
    assert len(tokens) == 2
