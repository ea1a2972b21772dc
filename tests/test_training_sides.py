"""Laws of stages with pictures of another side: what they show, and that positions are interpolated over their grid."""

import shutil

import lightning
import pytest
import torch
from conftest import TINY_DECODERS
from test_training_resume import EMA
from training_runs import fit, recipe, write_table

from captioner import Captioner, ConfigError
from captioner.config import DECODER_CONFIGS
from captioner.decoders import MultiheadDecoder
from captioner.decoders.multihead import stretched
from training.stages import Stage, StagePlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*WeightAveraging", "ignore:(?s).*serialize"),
    pytest.mark.filterwarnings("ignore:.*not resumable", "ignore:The dirpath has changed"),
]
CHANNELS, WORDS = 6, 11


def decoder_for(grid_hw):
    torch.manual_seed(0)
    settings = DECODER_CONFIGS["multihead"].from_dict(TINY_DECODERS["multihead"]).to_dict()
    decoder = MultiheadDecoder(feature_dim=CHANNELS, grid_hw=grid_hw, vocabulary_size=WORDS, max_tokens=8, **settings)
    return decoder.eval()


def seen(decoder, grid_BPC):
    """Logits and maps, by teacher forcing and step by step."""
    tokens_BT = torch.arange(5).expand(len(grid_BPC), -1) + 2
    logits, attention = decoder(grid_BPC, tokens_BT)
    state, steps = decoder.start(grid_BPC), []
    for tokens_B in tokens_BT.T:
        found = decoder.step(tokens_B, state)
        steps.append(found[0])
        state = found[2]
    torch.testing.assert_close(torch.stack(steps, dim=1), logits, rtol=1e-4, atol=1e-5)
    return logits, attention


# --- The positions ---


def test_of_its_own_grid_nothing_changes():
    decoder, grid_BPC = decoder_for((3, 4)), torch.randn(2, 12, CHANNELS)
    expected = seen(decoder, grid_BPC)
    with decoder.over_grid((3, 4)):
        assert all(map(torch.equal, seen(decoder, grid_BPC), expected))


@pytest.mark.parametrize("grid_hw", [(2, 3), (5, 4), (1, 1), (3, 7)])
def test_another_grid_is_read_as_by_a_decoder_with_interpolated_positions(grid_hw):
    decoder, other = decoder_for((3, 4)), decoder_for(grid_hw)
    weights = decoder.state_dict()
    weights["grid_row"] = stretched(decoder.grid_row[:, 0], grid_hw[0])[:, None]
    weights["grid_column"] = stretched(decoder.grid_column[0], grid_hw[1])[None]
    other.load_state_dict(weights)
    grid_BPC = torch.randn(2, grid_hw[0] * grid_hw[1], CHANNELS)
    with decoder.over_grid(grid_hw):
        for found, expected in zip(seen(decoder, grid_BPC), seen(other, grid_BPC), strict=True):
            torch.testing.assert_close(found, expected)
    assert decoder(torch.randn(1, 12, CHANNELS), torch.ones(1, 3, dtype=torch.int64))[1].shape == (
        1,
        3,
        12,
    )  # as before


def test_interpolated_positions_lie_between_their_neighbours_and_learn():
    decoder = decoder_for((4, 4))
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    torch.testing.assert_close(stretched(line, 2), torch.tensor([[0.5], [2.5]]))  # a cell covers two
    with decoder.over_grid((3, 3)):
        decoder(torch.randn(1, 9, CHANNELS), torch.ones(1, 3, dtype=torch.int64))[0].square().sum().backward()
    for positions in (decoder.grid_row, decoder.grid_column):
        assert (positions.grad.abs().sum(dim=-1) > 0).all()


# --- A run ---


class Shapes(lightning.Callback):
    """Writes down the shapes of the pictures, by epoch and split."""

    found = None

    def __init__(self):
        type(self).found = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.found.setdefault(("train", trainer.current_epoch), set()).add(tuple(batch.pictures.shape[1:]))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.found.setdefault(("dev", trainer.current_epoch), set()).add(tuple(batch.pictures.shape[1:]))


def settings_for(data_root, folder, decoder, callbacks=()):
    stages = [
        {"epochs": 1, "cached": True, "side_px": 64},
        {"epochs": 1, "encoder": "finetune", "side_px": 64, "mosaics": 0.2, "pointing": 1.0},
        {"epochs": 1, "encoder": "finetune", "side_px": 128, "mosaics": 0.2, "pointing": 1.0},
        {"epochs": 1, "encoder": "finetune", "objective": "self_critical", "learning_rate": 1e-4, "from_stage": 2},
    ]
    settings = recipe(
        data_root,
        folder,
        decoder,
        stages=stages,
        callbacks=[EMA, *callbacks],
        data={"preprocessing": {"side_px": 96}, "workers": 1, "cache_folder": str(data_root / "cache")},
    )
    return {**settings, "last_checkpoint": {"minutes": 0}}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data"), train=8, dev=4)


@pytest.fixture(scope="module", params=list(DECODER_CONFIGS))
def whole(request, data_root, tmp_path_factory):
    """A run through three sides: its folder, the decoder and the shapes of its pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    callbacks = [
        {"class_path": f"{__name__}.Shapes"},
        {"class_path": "test_training_resume.KeepAll", "init_args": {"folder": str(folder / "kept")}},
    ]
    settings = settings_for(data_root, folder, request.param, callbacks)
    assert fit(folder, settings, "--export", folder / "model") == 0
    return folder, request.param, dict(Shapes.found)


def test_every_epoch_learns_from_pictures_of_its_side_and_dev_has_the_models(whole):
    found = whole[2]
    ((cells, _),) = found["train", 0]
    assert cells == 4  # of 64 px at stride 32
    assert [found["train", epoch] for epoch in (1, 2, 3)] == [{(3, 64, 64)}, {(3, 128, 128)}, {(3, 96, 96)}]
    assert all(found["dev", epoch] == {(3, 96, 96)} for epoch in range(4))


def test_the_model_takes_pictures_of_its_own_side(whole, data_root):
    captioner = Captioner.load(whole[0] / "model", device="cpu")
    assert (captioner.config.preprocessing.side_px, captioner.runtime.grid_hw) == (96, (3, 3))
    assert captioner.caption(str(data_root / "0.jpg")).words[0].attention.shape == (3, 3)


def test_a_resumed_run_ends_the_same(whole, data_root, tmp_path):
    folder, decoder, _ = whole
    end = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = {int(path.stem.split("-")[1]): path for path in (folder / "kept").iterdir()}
    per_epoch = end["global_step"] // 4
    for step in (per_epoch, 2 * per_epoch + 1):  # before the first pixels, and within a stage of larger pictures
        before, after = tmp_path / f"{step}-before", tmp_path / f"{step}-after"
        before.mkdir()
        shutil.copy(kept[step], before / "last.ckpt")
        for stage in (1, 2):
            shutil.copy(folder / "checkpoints" / f"stage-{stage}.ckpt", before)
        assert fit(after, settings_for(data_root, after, decoder), "--ckpt_path", before / "last.ckpt") == 0
        found = torch.load(after / "checkpoints" / "last.ckpt", weights_only=True)
        assert (found["global_step"], found["epoch"]) == (end["global_step"], end["epoch"])
        for part in ("state_dict", "current_model_state"):
            # Not to the bit: of two runs alike, one bias of this encoder's gradients can differ in its last bits.
            torch.testing.assert_close(found[part], end[part])


# --- What is refused ---


def test_impossible_sides_are_refused():
    with pytest.raises(ConfigError, match="side_px must be at least 1, got 0"):
        Stage(epochs=1, side_px=0)
    with pytest.raises(ConfigError, match="mosaics need pictures of an even side, got side_px=65"):
        Stage(epochs=1, side_px=65, mosaics=0.1)
    mixed = [Stage(epochs=1, cached=True, side_px=64), Stage(epochs=1, cached=True)]
    with pytest.raises(ConfigError, match="share one cache, of pictures of one side"):
        StagePlan(mixed)
    with pytest.raises(ConfigError, match="share one cache, of pictures of one side"):
        StagePlan([Stage(epochs=1, side_px=64), Stage(epochs=1, cached=True, side_px=32)])
    assert StagePlan([Stage(epochs=2, cached=True, side_px=64), Stage(epochs=1)]).sides_px == (64, 64, None)
