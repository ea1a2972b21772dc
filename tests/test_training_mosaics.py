"""Mosaics teach maps where things are: how they are laid out, what their loss asks for, and trainings with them."""

import csv
import math
from fractions import Fraction

import pytest
import torch
from conftest import TINY_DECODERS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_training_resume import EMA, assert_same_end
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, one_hot
from training_runs import Recorder, fit, recipe, write_table

from captioner import ConfigError
from captioner.encoder import Encoder
from captioner.images import open_picture
from captioner.metrics.language import FUNCTION_WORDS
from captioner.preprocessing import to_pixels
from captioner.tokenizer import SPECIAL_TOKENS, Tokenizer
from training.export import load_run
from training.mosaics import (
    PARTS,
    content_words,
    has_content,
    make_mosaics,
    one_caption_each,
    pointing_loss,
    quadrant_shares,
)
from training.stages import Stage

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers", "ignore:.*WeightAveraging"),
    pytest.mark.filterwarnings("ignore:.*not resumable", "ignore:The dirpath has changed", "ignore:(?s).*serialize"),
]
NO_VALIDATION = {"limit_val_batches": 0, "num_sanity_val_steps": 0}


def generator(seed):
    return torch.Generator().manual_seed(seed)


# --- The layout ---


@given(pictures=st.integers(0, 11), half=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_each_quadrant_is_a_picture_at_half_its_side_and_a_rest_is_left_out(pictures, half, seed):
    random = generator(seed)
    pixels_B3SS = torch.randn(pictures, 3, 2 * half, 2 * half, generator=random, dtype=torch.float64)
    order_B = torch.randperm(pictures, generator=random)
    mosaics = make_mosaics(pixels_B3SS, order_B)
    assert mosaics.shape == (pictures // PARTS, 3, 2 * half, 2 * half)
    halved = pixels_B3SS.unflatten(3, (half, 2)).unflatten(2, (half, 2)).mean(dim=(3, 5))
    for number, mosaic in enumerate(mosaics):
        for part in range(PARTS):
            top, left = half * (part // 2), half * (part % 2)
            quadrant = mosaic[:, top : top + half, left : left + half]
            torch.testing.assert_close(quadrant, halved[order_B[PARTS * number + part]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("side_px", [1, 7, 225])
def test_an_odd_side_is_refused(side_px):
    with pytest.raises(ConfigError, match=rf"even side, got {side_px} px; change data\.preprocessing\.side_px"):
        make_mosaics(torch.zeros(4, 3, side_px, side_px), torch.arange(4))


@given(rows=st.integers(1, 15), columns=st.integers(1, 15))
@settings(max_examples=60)
def test_a_cell_is_shared_among_the_quadrants_by_area(rows, columns):
    def in_first_half(cell, cells):
        return min(Fraction(1), max(Fraction(0), Fraction(cells, 2) - cell))

    shares_4P = quadrant_shares((rows, columns))
    assert (shares_4P.shape, shares_4P.dtype) == ((PARTS, rows * columns), torch.float32)
    for cell in range(rows * columns):
        top, left = in_first_half(cell // columns, rows), in_first_half(cell % columns, columns)
        expected = [top * left, top * (1 - left), (1 - top) * left, (1 - top) * (1 - left)]
        assert shares_4P[:, cell].tolist() == pytest.approx([float(share) for share in expected], abs=1e-5)
    torch.testing.assert_close(shares_4P.sum(dim=0), torch.ones(rows * columns))
    if rows % 2 == columns % 2 == 0:
        assert set(shares_4P.round(decimals=5).flatten().tolist()) == {0.0, 1.0}


@given(rows=st.integers(1, 7), columns=st.integers(1, 7))
@settings(max_examples=30)
def test_what_a_grid_sees_of_a_mosaic_is_its_quadrants_by_their_shares(rows, columns):
    brightness_4 = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    side_px = 2 * rows * columns
    mosaic = make_mosaics(brightness_4[:, None, None, None].expand(-1, 3, side_px, side_px), torch.arange(4))
    seen_P = adaptive_avg_pool2d(mosaic, (rows, columns))[0, 0].flatten()
    torch.testing.assert_close(brightness_4 @ quadrant_shares((rows, columns)), seen_P, rtol=1e-4, atol=1e-3)


@given(pictures=st.integers(1, 10), captions=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_each_quadrant_has_the_chosen_caption_of_its_own_picture(pictures, captions, seed):
    random = generator(seed)
    # Each token says whose caption it is, which one, and its place in it.
    tokens_NT = torch.arange(pictures * captions * 3).view(pictures * captions, 3)
    order_B = torch.randperm(pictures, generator=random)
    chosen_B = torch.randint(captions, (pictures,), generator=random)
    found = one_caption_each(tokens_NT, order_B, chosen_B, pictures=pictures)
    used = order_B.tolist()[: pictures // PARTS * PARTS]
    assert found.shape == (len(used), 3)
    assert found.tolist() == [tokens_NT[picture * captions + int(chosen_B[picture])].tolist() for picture in used]


# --- Words with a content ---


def test_content_words_are_all_but_special_tokens_and_function_words():
    tokenizer = Tokenizer.train(["A dog and a man's red ball are in the T-shirt", "behind it"], min_count=1)
    content_V = content_words(tokenizer)
    assert content_V.dtype == torch.bool
    names = [tokenizer.word(index) for index in range(tokenizer.vocabulary_size)]
    assert {name for name, chosen in zip(names, content_V, strict=True) if chosen} == {
        "dog",
        "man",
        "red",
        "ball",
        "t-shirt",
    }
    left_out = {name for name, chosen in zip(names, content_V, strict=True) if not chosen}
    assert left_out == {*SPECIAL_TOKENS, "a", "and", "'s", "are", "in", "the", "behind", "it"}


def test_function_words_have_no_content_whatever_their_capitals():
    assert [word for word in ("A", "Dog", "in", "The", "grass") if has_content(word)] == ["Dog", "grass"]
    assert not any(map(has_content, FUNCTION_WORDS))
    assert not any(has_content(word.upper()) for word in FUNCTION_WORDS)


# --- The loss that points ---

VOCABULARY = 6
CONTENT_V = torch.tensor([False, False, True, True, False, True])
even_grids = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda half: (2 * half[0], 2 * half[1]))


def targets_with_content(rows, steps, seed):
    targets_NT = torch.randint(VOCABULARY, (rows, steps), generator=generator(seed))
    targets_NT[0, 0] = 2
    return targets_NT


def attention_in_quadrants(mosaics, steps, grid_hw, seed):
    """Random maps, each with all its weight in the quadrant of its caption."""
    inside_4P = quadrant_shares(grid_hw)
    random_NTP = torch.rand(mosaics * PARTS, steps, inside_4P.shape[1], generator=generator(seed)) + 0.1
    random_NTP *= inside_4P.repeat(mosaics, 1)[:, None]
    return random_NTP / random_NTP.sum(dim=2, keepdim=True)


@given(grid_hw=even_grids, mosaics=st.integers(1, 3), steps=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_attention_in_the_right_quadrant_costs_nothing_and_even_attention_log_four(grid_hw, mosaics, steps, seed):
    targets_NT = targets_with_content(mosaics * PARTS, steps, seed)
    right_NTP = attention_in_quadrants(mosaics, steps, grid_hw, seed)
    shares_4P = quadrant_shares(grid_hw)
    assert float(pointing_loss(right_NTP, targets_NT, shares_4P, CONTENT_V)) == pytest.approx(0, abs=1e-5)
    even_NTP = torch.full_like(right_NTP, 1 / right_NTP.shape[2])
    assert float(pointing_loss(even_NTP, targets_NT, shares_4P, CONTENT_V)) == pytest.approx(math.log(4), abs=1e-5)


@given(
    grid_hw=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    mosaics=st.integers(1, 3),
    steps=st.integers(1, 4),
    seed=st.integers(0, 999),
)
@settings(max_examples=40)
def test_the_loss_is_the_mean_surprise_of_the_quadrant_over_content_words(grid_hw, mosaics, steps, seed):
    targets_NT = targets_with_content(mosaics * PARTS, steps, seed)
    shares_4P = quadrant_shares(grid_hw)
    attention_NTP = torch.randn(mosaics * PARTS, steps, shares_4P.shape[1], generator=generator(seed)).softmax(dim=2)
    surprise = [
        -math.log(max(1e-4, float(shares_4P[row % PARTS] @ attention_NTP[row, step])))
        for row in range(mosaics * PARTS)
        for step in range(steps)
        if CONTENT_V[targets_NT[row, step]]
    ]
    found = float(pointing_loss(attention_NTP, targets_NT, shares_4P, CONTENT_V))
    assert found == pytest.approx(sum(surprise) / len(surprise), rel=1e-4)


def test_only_content_words_count_and_without_one_the_loss_is_zero():
    shares_4P = quadrant_shares((2, 2))
    wrong_NTP = one_hot(torch.tensor([3, 3, 0, 0]), 4).float()[:, None].expand(-1, 3, -1)
    targets_NT = torch.tensor([[0, 4, 1]] * PARTS)
    assert float(pointing_loss(wrong_NTP, targets_NT, shares_4P, CONTENT_V)) == 0.0
    mixed_NTP = wrong_NTP.clone()
    mixed_NTP[:, 1] = 0.25
    targets_NT = torch.tensor([[0, 5, 1]] * PARTS)
    assert float(pointing_loss(mixed_NTP, targets_NT, shares_4P, CONTENT_V)) == pytest.approx(math.log(4))


def test_attention_that_misses_its_quadrant_entirely_costs_much_but_is_finite_in_16_bits_too():
    missed_NTP = one_hot(torch.tensor([3, 3, 0, 0]), 4)[:, None]
    targets_NT = torch.full((PARTS, 1), 2)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        loss = pointing_loss(missed_NTP.to(kind), targets_NT, quadrant_shares((2, 2)), CONTENT_V)
        assert loss.dtype == torch.float32
        assert 5 < float(loss) < 20


@given(grid_hw=even_grids, seed=st.integers(0, 999))
@settings(max_examples=30)
def test_its_gradient_pulls_the_attention_of_content_words_into_the_quadrant(grid_hw, seed):
    targets_NT = torch.tensor([[2, 4]] * PARTS)  # a content word, a function word
    shares_4P = quadrant_shares(grid_hw)
    scores_NTP = torch.randn(PARTS, 2, shares_4P.shape[1], generator=generator(seed)).requires_grad_()
    pointing_loss(scores_NTP.softmax(dim=2), targets_NT, shares_4P, CONTENT_V).backward()
    gradient_NTP = scores_NTP.grad
    inside_NP = shares_4P.round().bool()
    assert (gradient_NTP[:, 0][inside_NP] < 0).all()
    assert (gradient_NTP[:, 0][~inside_NP] > 0).all()
    assert (gradient_NTP[:, 1] == 0).all()


# --- The encoder's statistics ---


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(backbone="mobilenet_v3_small", side_px=64)


def modes(module):
    return [part.training for part in module.modules()]


def statistics(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("last_stages", "batch_norm"), [(None, True), (4, True), (0, True), (None, False)])
def test_kept_statistics_do_not_move_and_all_modes_come_back(encoder, training, last_stages, batch_norm):
    encoder.set_trainable(last_stages, batch_norm=batch_norm)
    encoder.train(training)
    before, kept = modes(encoder), statistics(encoder)
    pixels_B3SS = 3 + 2 * torch.randn(4, 3, 64, 64, generator=generator(1))
    with encoder.statistics_kept():
        grid_BPC = encoder(pixels_B3SS)
    assert same(statistics(encoder), kept)
    assert modes(encoder) == before
    with pytest.raises(KeyError, match="in the middle"), encoder.statistics_kept():
        raise KeyError("in the middle")
    assert modes(encoder) == before
    encoder.eval()
    torch.testing.assert_close(grid_BPC, encoder(pixels_B3SS))  # as in use
    encoder.train(training)
    encoder(pixels_B3SS)
    moves = training and batch_norm and last_stages != 0
    assert same(statistics(encoder), kept) == (not moves)


def test_gradients_flow_through_kept_statistics(encoder):
    encoder.set_trainable(4)
    encoder.train()
    encoder.zero_grad()
    with encoder.statistics_kept():
        encoder(torch.randn(2, 3, 64, 64, generator=generator(2))).square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained
    assert {name for name, parameter in encoder.named_parameters() if parameter.grad is not None} == trained


# --- Settings ---


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cached": True, "mosaics": 0.2}, "mosaics are made of pictures, not of cached features; use cached: false"),
        ({"pointing": 0.5}, r"pointing=0\.5 needs mosaics above 0"),
        ({"mosaics": -0.1}, r"mosaics must be at least 0 and finite, got -0\.1"),
        ({"mosaics": 1.0, "pointing": -1.0}, r"pointing must be at least 0 and finite, got -1\.0"),
        ({"mosaics": math.nan}, "mosaics must be at least 0 and finite, got nan"),
        ({"mosaics": 1.0, "pointing": math.inf}, "pointing must be at least 0 and finite, got inf"),
    ],
)
def test_mosaics_that_cannot_be_made_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        Stage(epochs=1, **given)


@pytest.mark.parametrize("objective", ["cross_entropy", "self_critical"])
def test_every_objective_can_have_mosaics_with_and_without_pointing(objective):
    for pointing in (0.0, 0.5):
        assert Stage(epochs=1, objective=objective, mosaics=0.2, pointing=pointing).pointing == pointing


# --- Trainings ---


class PointingRecorder(Recorder):
    """Writes down the loss of pointing, by epoch, too."""

    def __init__(self):
        super().__init__()
        self.pointing = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.pointing.setdefault(trainer.current_epoch, []).append(float(trainer.callback_metrics["train_pointing"]))


def mosaic_settings(data_root, folder, callbacks=()):
    tuned = {"epochs": 1, "encoder": "finetune", "mosaics": 0.5, "pointing": 0.5}
    settings = recipe(
        data_root,
        folder,
        stages=[
            {**tuned, "label_smoothing": 0.1, "drop_words": 0.2},
            {**tuned, "objective": "self_critical", "learning_rate": 1e-3, "encoder_batch_norm": False},
        ],
        callbacks=[EMA, *callbacks],
        trainer={"gradient_clip_val": 1.0},
    )
    return {**settings, "last_checkpoint": {"minutes": 0}}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data"), train=13, dev=2)


@pytest.fixture(scope="module")
def whole(data_root, tmp_path_factory):
    """A run of a fine-tuned and a self-critical stage with mosaics: its folder, what happened, a copy per step."""
    folder = tmp_path_factory.mktemp("whole")
    callbacks = [
        {"class_path": f"{__name__}.PointingRecorder"},
        {"class_path": "test_training_resume.KeepAll", "init_args": {"folder": str(folder / "kept")}},
    ]
    assert fit(folder, mosaic_settings(data_root, folder, callbacks)) == 0
    return folder, PointingRecorder.last, {int(path.name.split("-")[1]): path for path in (folder / "kept").iterdir()}


def checkpoint(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def test_fine_tuned_and_self_critical_stages_train_on_mosaics(whole):
    _, happened, _ = whole
    assert [len(happened.losses[epoch]) for epoch in range(2)] == [3, 3]
    for epoch in range(2):
        assert all(math.isfinite(loss) for loss in happened.losses[epoch])
        # Of four quadrants, with the maps of a decoder that has learned nothing.
        assert happened.pointing[epoch] == pytest.approx([math.log(4)] * 3, abs=0.3)


def test_statistics_follow_whole_pictures_alone(whole):
    _, happened, _ = whole
    counts = [
        {int(value) for name, value in happened.statistics[epoch].items() if name.endswith("num_batches_tracked")}
        for epoch in range(2)
    ]
    assert counts == [{3}, {3}]  # one pass of whole pictures a step, then encoder_batch_norm: false


def test_the_end_of_every_stage_is_kept_as_a_checkpoint_of_its_own(whole):
    folder, _, _ = whole
    assert sorted(path.name for path in (folder / "checkpoints").glob("stage-*")) == ["stage-1.ckpt", "stage-2.ckpt"]
    first, second, last = (
        load_run(folder / "checkpoints" / name).checkpoint.model.state_dict()
        for name in ("stage-1.ckpt", "stage-2.ckpt", "last.ckpt")
    )
    assert same(second, last)
    assert not same(first, last)
    assert [checkpoint(folder, f"stage-{number}.ckpt")["global_step"] for number in (1, 2)] == [3, 6]
    assert_same_end(checkpoint(folder, "stage-2.ckpt"), checkpoint(folder))


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_with_mosaics_that_is_resumed_ends_the_same(whole, data_root, tmp_path, step):
    folder, _, kept = whole
    start = folder / "checkpoints" / "stage-1.ckpt" if step == 3 else kept[step]
    assert torch.load(start, weights_only=True)["global_step"] == step
    assert fit(tmp_path, mosaic_settings(data_root, tmp_path), "--ckpt_path", start) == 0
    assert_same_end(checkpoint(tmp_path), checkpoint(folder), f"from step {step}")


def test_a_batch_of_fewer_than_four_pictures_has_no_mosaic_and_training_goes_on(data_root, tmp_path):
    settings = recipe(
        data_root,
        tmp_path,
        "mean",
        stages=[{"epochs": 1, "mosaics": 1.0, "pointing": 1.0}],
        callbacks=[{"class_path": "training_runs.Recorder"}],
        trainer={**NO_VALIDATION, "limit_train_batches": 2},
        data={"batch_size": 3},
    )
    settings["best_checkpoint"] = {"monitor": None}
    assert fit(tmp_path, settings) == 0
    assert all(math.isfinite(loss) and loss > 0 for loss in Recorder.last.losses[0])


# --- It works ---

COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan")


class ColourCells(Encoder):
    """Sees the mean colour of each of 4 x 4 cells: what a trained CNN can tell, at once."""

    def __init__(self, *, backbone, stride, side_px, weights):
        nn.Module.__init__(self)
        self.stages = nn.Sequential(nn.AvgPool2d(side_px // 4))
        self.backbone, self.stride, self.feature_dim, self.grid_hw = backbone, side_px // 4, 3, (4, 4)
        self._frozen_stages, self._batch_norm = 0, True


def write_colours(root, copies=16):
    root.mkdir()
    with (root / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for colour in COLOURS:
            for copy in range(copies + 1):
                Image.new("RGB", (32, 32), colour).save(root / f"{colour}-{copy}.png")
                writer.writerow([f"{colour}-{copy}.png", f"a {colour} page", "train" if copy else "dev"])
    return root


def shares_of_words(checkpoint, root):
    """Return the mean share of attention in the right quadrant for each of a, COLOUR, page, on mosaics of colours."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    preprocessing = model.config.preprocessing
    pictures = [open_picture(root / f"{colour}-0.png", side_px=preprocessing.side_px).image for colour in COLOURS]
    pixels = torch.stack([to_pixels(picture, preprocessing) for picture in pictures])
    order = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2], [5, 4, 3, 0], [2, 5, 4, 1], [4, 2, 0, 5]]).flatten()
    captions = [[tokenizer.start_id, *tokenizer.encode(f"a {COLOURS[index]} page")] for index in order]
    with torch.no_grad():
        _, attention_NTP = model(make_mosaics(pixels, order), torch.tensor(captions)[:, :-1])
    inside_NP = quadrant_shares(model.encoder.grid_hw).repeat(len(order) // PARTS, 1)
    return (attention_NTP * inside_NP[:, None]).sum(dim=2).mean(dim=0)


def test_pointing_brings_the_attention_of_words_into_their_quadrant(tmp_path, monkeypatch):
    monkeypatch.setattr("captioner.model.Encoder", ColourCells)
    root = write_colours(tmp_path / "data")
    settings = recipe(
        root,
        tmp_path / "run",
        stages=[{"epochs": 5, "learning_rate": 0.01, "mosaics": 1.0, "pointing": 1.0}],
        trainer=NO_VALIDATION,
        model={"decoder_settings": {**TINY_DECODERS["multihead"], "dropout": 0.0}},
        data={
            "augmentation": None,
            "batch_size": 8,
            "captions_per_picture": 1,
            "preprocessing": {"side_px": 32},
        },
    )
    settings["best_checkpoint"] = {"monitor": None}
    assert fit(tmp_path / "run", settings) == 0
    trained = load_run(tmp_path / "run" / "checkpoints" / "last.ckpt").checkpoint
    article, colour, page = shares_of_words(trained, root).tolist()
    # Which of the four is meant cannot be known before its colour has been said: a quarter is the best guess.
    assert [article, colour] == pytest.approx([0.25, 0.25], abs=0.1)
    assert page > 0.6
