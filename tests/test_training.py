"""Training end to end on a toy data set, and the laws of its parts."""

import random
import re
import sys
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from conftest import TINY_DECODERS
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI
from PIL import Image, ImageDraw

from captioner import Captioner, CheckpointError, ConfigError, DataError
from captioner.metrics import java
from captioner.tokenizer import Tokenizer
from training.__main__ import main
from training.augmentation import Augmentation, augment, mirror_allowed
from training.data import Flickr8kDataModule, LengthBatchSampler, collate, read_flickr8k
from training.export import average, load_run
from training.module import CaptionModule, WarmupCosine

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*WeightAveraging")  # Lightning's own
ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square")
TRAIN, DEV = 8, 4


def write_flickr8k(root):
    """A data set in the format of Flickr8k: coloured shapes, two captions each."""
    (root / "Images").mkdir(parents=True)
    names, lines = [], []
    for index in range(TRAIN + DEV):
        colour, shape = COLOURS[index % 3], SHAPES[index % 2]
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((10, 10, 50, 50), fill=colour)
        names.append(f"{index}.jpg")
        image.save(root / "Images" / names[-1])
        lines.append(f"{names[-1]}#0\tA {colour} {shape} .")
        lines.append(f"{names[-1]}#1\tThere is a {shape} that is {colour} on a white page .")
    (root / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    (root / "Flickr_8k.trainImages.txt").write_text("\n".join(names[:TRAIN]) + "\n")
    (root / "Flickr_8k.devImages.txt").write_text("\n".join(names[TRAIN:]) + "\n")
    return root


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_flickr8k(tmp_path_factory.mktemp("flickr8k"))


class Recorder(lightning.Callback):
    """Writes down what a training did: gradients, statistics and the order of the pictures, by epoch."""

    last: "Recorder"

    def __init__(self):
        type(self).last = self
        self.trainable, self.with_gradient, self.statistics, self.pictures = {}, {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pictures.setdefault(trainer.current_epoch, []).append(batch.names)

    def on_after_backward(self, trainer, pl_module):
        epoch, parameters = trainer.current_epoch, dict(pl_module.model.named_parameters())
        self.trainable[epoch] = {name for name, p in parameters.items() if p.requires_grad}
        reached = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
        self.with_gradient[epoch] = self.with_gradient.get(epoch, set()) | reached

    def on_train_epoch_end(self, trainer, pl_module):
        buffers = pl_module.model.encoder.named_buffers()
        self.statistics[trainer.current_epoch] = {name: value.clone() for name, value in buffers}


def recipe(data_root, folder, decoder):
    """A recipe of two epochs, the first with a frozen encoder."""
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "{epoch}", "save_top_k": -1, "monitor": "val_cider"},
    }
    averaging = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    return {
        "seed_everything": 1,
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": f"{__name__}.Recorder"}, checkpoint]
            + ([averaging] if decoder == "multihead" else []),
        },
        "model": {
            "decoder": decoder,
            "decoder_settings": TINY_DECODERS[decoder],
            "encoder": {"backbone": "mobilenet_v3_small", "stride": 32},
            "frozen_epochs": 1,
            "warmup_steps": 1,
            "search": {"beam_size": 2, "max_words": 8},
        },
        "data": {
            "root": str(data_root),
            "batch_size": 4,
            "captions_per_picture": 2,
            "min_count": 1,
            "preprocessing": {"side_px": 64},
            "augmentation": {"mirror": 0.5, "min_area": 0.7, "colour": 0.2},
            "workers": 0,
        },
    }


def command(*arguments):
    """Run `python -m training` in this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["training", *map(str, arguments)])
        return main()


@pytest.fixture(scope="module", params=TINY_DECODERS)
def run(request, data_root, tmp_path_factory):
    """A finished training: its decoder, what happened, and its checkpoints by epoch."""
    folder = tmp_path_factory.mktemp(request.param)
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe(data_root, folder, request.param)))
    assert command("fit", "--config", config) == 0
    return request.param, Recorder.last, sorted(folder.rglob("*.ckpt"))


# --- A run ---


def test_gradients_reach_exactly_what_is_trained(run):
    _, happened, _ = run
    assert {name.partition(".")[0] for name in happened.trainable[0]} == {"decoder"}
    assert {name.partition(".")[0] for name in happened.trainable[1]} == {"decoder", "encoder"}
    for epoch in (0, 1):
        assert happened.with_gradient[epoch] == happened.trainable[epoch]


def test_statistics_of_batch_norms_keep_still_while_frozen(run):
    _, happened, _ = run
    first, second = happened.statistics[0], happened.statistics[1]
    assert all(int(value) == 0 for name, value in first.items() if name.endswith("num_batches_tracked"))
    assert all(int(value) == 2 for name, value in second.items() if name.endswith("num_batches_tracked"))
    assert any(not torch.equal(first[name], second[name]) for name in first if name.endswith("running_mean"))


def test_each_epoch_shows_every_picture_once_in_another_order(run):
    _, happened, _ = run
    orders = [[name for names in happened.pictures[epoch] for name in names] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == [f"{index}.jpg" for index in range(TRAIN)]


def test_a_run_is_exported_as_a_model_that_captions(run, data_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(java, "missing", lambda metric: "left out")  # METEOR takes its time
    decoder, _, checkpoints = run
    assert len(checkpoints) == 2
    arguments = ["--folder", tmp_path / "model", "--data-root", data_root, "--name", "Shapes"]
    assert command("export", *checkpoints, *arguments, "--command", "the command", "--beam-size", 2) == 0
    assert "BLEU-4" in capsys.readouterr().out
    captioner = Captioner.load(tmp_path / "model", device="cpu")
    assert captioner.config.decoder == decoder
    assert captioner.card.startswith("# Shapes\n")
    for fact in ("the command", "BLEU-4", "CIDEr-D", decoder, "mobilenet_v3_small"):
        assert fact in captioner.card
    assert captioner.caption(data_root / "Images" / "0.jpg").text
    kept, mean = captioner.model.state_dict(), average([load_run(path) for path in checkpoints])
    for name, value in mean.model.state_dict().items():
        assert torch.equal(kept[name], value)


def test_averaging_one_checkpoint_leaves_it_as_it_is(run):
    _, _, checkpoints = run
    expected = load_run(checkpoints[1]).model.state_dict()
    alone = average([load_run(checkpoints[1])]).model.state_dict()
    assert all(torch.equal(alone[name], value) for name, value in expected.items())


def test_averaging_two_checkpoints_gives_their_mean(run):
    first, second = (load_run(path) for path in run[2])
    wanted = {
        name: (value + second.model.state_dict()[name]) / 2
        for name, value in first.model.state_dict().items()
        if value.is_floating_point()
    }
    found = average([first, second]).model.state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_an_unusable_data_set_fails_with_one_line(tmp_path, data_root, capsys):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe(tmp_path / "nowhere", tmp_path, "mean")))
    assert command("fit", "--config", config) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Flickr8k.token.txt" in line


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "run.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_run(path)


def test_a_checkpoint_of_another_program_is_named(tmp_path):
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_run(path)


def test_checkpoints_of_different_models_are_not_averaged(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="one run"):
        average([tiny_checkpoint("mean"), tiny_checkpoint("additive")])


def test_the_recipe_of_the_bundled_model_builds(data_root, tmp_path):
    arguments = ["--config", str(ROOT / "configs" / "bundled.yaml"), "--data.root", str(data_root)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["training"])
        cli = LightningCLI(
            CaptionModule,
            Flickr8kDataModule,
            run=False,
            args=[*arguments, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"],
        )
    module, bundled = cli.model, Captioner.load(device="cpu").config
    assert module.hparams["decoder"] == bundled.decoder
    assert module.decoder_settings == bundled.decoder_settings
    assert module.encoder_config == bundled.encoder
    assert cli.datamodule.preprocessing == bundled.preprocessing
    assert cli.datamodule.max_tokens == bundled.max_tokens


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ConfigError, match="'gru'"):
        CaptionModule(decoder="gru")
    with pytest.raises(ConfigError, match="head_count"):
        CaptionModule(decoder="multihead", decoder_settings={"head_count": 3})


# --- Data ---


def test_the_data_set_is_read_in_its_order(data_root):
    pictures = read_flickr8k(data_root, "train")
    assert [picture.name for picture in pictures] == [f"{index}.jpg" for index in range(TRAIN)]
    assert pictures[1].captions == ("A green square .", "There is a square that is green on a white page .")
    assert all(picture.path.is_file() for picture in pictures)


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "Flickr_8k.devImages.txt"])
def test_a_missing_list_is_named(tmp_path, name):
    root = write_flickr8k(tmp_path / "data")
    (root / name).unlink()
    with pytest.raises(DataError, match=re.escape(str(root / name))):
        read_flickr8k(root, "dev")


@pytest.mark.parametrize("line", ["0.jpg#0 no tab", "0.jpg\tno number", "", "#"])
def test_a_malformed_line_is_named(tmp_path, line):
    root = write_flickr8k(tmp_path / "data")
    path = root / "Flickr8k.token.txt"
    path.write_text(f"0.jpg#0\tA dog .\n{line}\n")
    with pytest.raises(DataError, match=re.escape(f"{path}, line 2")):
        read_flickr8k(root, "dev")


def test_a_list_that_is_no_text_is_named(tmp_path):
    root = write_flickr8k(tmp_path / "data")
    (root / "Flickr8k.token.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=re.escape("Flickr8k.token.txt")):
        read_flickr8k(root, "dev")


def test_pictures_without_a_caption_are_named(tmp_path):
    root = write_flickr8k(tmp_path / "data")
    path = root / "Flickr8k.token.txt"
    path.write_text("".join(line for line in path.open() if not line.startswith("9.jpg#")))
    with pytest.raises(DataError, match=r"without a caption: 9\.jpg$"):
        read_flickr8k(root, "dev")
    assert len(read_flickr8k(root, "train")) == TRAIN


def test_missing_pictures_are_named_and_counted(tmp_path):
    root = write_flickr8k(tmp_path / "data")
    for index in range(7):
        (root / "Images" / f"{index}.jpg").unlink()
    with pytest.raises(DataError, match=r"missing pictures: 0\.jpg, .*4\.jpg and 2 more"):
        read_flickr8k(root, "train")


def test_an_empty_list_and_an_unknown_split_are_refused(tmp_path):
    root = write_flickr8k(tmp_path / "data")
    (root / "Flickr_8k.devImages.txt").write_text("\n")
    with pytest.raises(DataError, match="devImages"):
        read_flickr8k(root, "dev")
    with pytest.raises(ConfigError, match="'test'"):
        read_flickr8k(root, "test")


def test_the_hash_of_the_data_changes_with_a_caption(tmp_path):
    hashes = set()
    for index, edit in enumerate((lambda text: text, lambda text: text, lambda text: text.upper())):
        root = write_flickr8k(tmp_path / str(index))
        path = root / "Flickr8k.token.txt"
        path.write_text(edit(path.read_text()).replace(".JPG", ".jpg"))
        data = Flickr8kDataModule(str(root), min_count=1)
        data.setup("fit")
        hashes.add(data.data_hash())
    assert len(hashes) == 2


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_a_batch_holds_whole_captions_side_by_side_per_picture(data_root, wanted):
    data = Flickr8kDataModule(
        str(data_root), batch_size=3, captions_per_picture=wanted, min_count=1, max_tokens=6, workers=0
    )
    data.setup("fit")
    tokenizer = data.tokenizer
    captions = {picture.name: picture.captions for picture in data.pictures["train"]}
    for batch in data.train_dataloader():
        assert batch.pixels.shape == (3, 3, 224, 224)
        assert batch.tokens.shape[0] == 3 * wanted
        for row, ids in enumerate(batch.tokens.tolist()):
            length = ids.index(tokenizer.end_id)
            assert ids[0] == tokenizer.start_id
            assert set(ids[length + 1 :]) <= {tokenizer.pad_id}
            allowed = [tokenizer.encode(text)[:5] for text in captions[batch.names[row // wanted]]]
            assert tuple(ids[1:length]) in allowed


def test_padding_is_not_trained_on(data_root):
    data = Flickr8kDataModule(str(data_root), min_count=1, workers=0)
    data.setup("fit")
    dataset = data.val_dataloader().dataset
    short, long = dataset[0], dataset[1]
    assert (collate([short, long]).tokens == Tokenizer.pad_id).any()
    assert not (collate([(short[0], [short[1][0]], "name")]).tokens == Tokenizer.pad_id).any()


batches = st.builds(
    dict,
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=200),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 99),
    bucket_batches=st.integers(1, 5),
)


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@given(batches)
def test_an_epoch_shows_each_picture_at_most_once_in_full_batches(given):
    lengths = given.pop("lengths")
    sampler = LengthBatchSampler(lengths, **given)
    size = min(given["batch_size"], len(lengths))
    found = epoch_of(sampler, 3)
    shown = [index for batch in found for index in batch]
    assert len(found) == len(sampler) == len(lengths) // size
    assert all(len(batch) == size for batch in found)
    assert len(set(shown)) == len(shown)
    assert set(shown) <= set(range(len(lengths)))


@given(batches)
def test_the_order_depends_on_seed_and_epoch_alone(given):
    lengths = given.pop("lengths")
    first, second = LengthBatchSampler(lengths, **given), LengthBatchSampler(lengths, **given)
    epoch_of(second, 9)
    assert epoch_of(first, 5) == epoch_of(second, 5)


def test_epochs_and_seeds_differ_in_order_and_reach_all_pictures():
    sampler = LengthBatchSampler(range(50), batch_size=4, seed=1)
    orders = [epoch_of(sampler, epoch) for epoch in range(20)]
    assert len({str(order) for order in orders}) == 20
    assert {index for order in orders for batch in order for index in batch} == set(range(50))
    assert epoch_of(LengthBatchSampler(range(50), batch_size=4, seed=2), 0) != orders[0]


def test_captions_of_a_batch_are_of_like_length():
    lengths = [random.Random(0).randrange(5, 40) for _ in range(400)]
    spread = [max(at) - min(at) for at in ([lengths[i] for i in b] for b in whole_epoch(lengths))]
    assert sum(spread) / len(spread) < 4  # of 35 in random batches


def whole_epoch(lengths):
    return epoch_of(LengthBatchSampler(lengths, batch_size=10, seed=0), 0)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_pictures_is_refused(batch_size):
    with pytest.raises(ConfigError, match="batch_size"):
        LengthBatchSampler([3, 4], batch_size=batch_size, seed=0)


# --- Augmentation ---


@pytest.mark.parametrize(
    ("captions", "allowed"),
    [
        (["A dog runs ."], True),
        (["A dog .", "A man on the left ."], False),
        (["He turns RIGHT ."], False),
        (["The leftmost boy ."], False),
        (["A bright light upright in the cleft ."], True),
        ([], True),
    ],
)
def test_a_picture_whose_captions_name_a_side_is_not_mirrored(captions, allowed):
    assert mirror_allowed(captions) is allowed


def test_a_mirrored_picture_is_the_mirror_image_and_only_where_allowed():
    image = Image.linear_gradient("L").rotate(90).convert("RGB")
    always = Augmentation(mirror=1.0, min_area=1.0, colour=0.0)
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert augment(image, always, mirror=True).tobytes() == flipped.tobytes()
    assert augment(image, always, mirror=False).tobytes() == image.tobytes()
    assert image.tobytes() != flipped.tobytes()


@given(
    seed=st.integers(0, 999),
    mirror=st.floats(0, 1),
    min_area=st.floats(0.05, 1),
    colour=st.floats(0, 0.95),
    size_wh_px=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_an_augmented_picture_keeps_its_size(seed, mirror, min_area, colour, size_wh_px):
    random.seed(seed)
    settings = Augmentation(mirror=mirror, min_area=min_area, colour=colour)
    image = augment(Image.new("RGB", size_wh_px, "red"), settings, mirror=True)
    assert (image.size, image.mode) == (size_wh_px, "RGB")


@pytest.mark.parametrize("wrong", [{"mirror": 1.1}, {"min_area": 0.0}, {"colour": -0.1}, {"mirror": float("nan")}])
def test_an_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Augmentation(**wrong)


# --- Learning rate ---


@given(begin=st.integers(0, 50), warmup=st.integers(0, 50), length=st.integers(1, 200), step=st.integers(0, 400))
def test_the_rate_rises_from_zero_falls_to_zero_and_stays_in_range(begin, warmup, length, step):
    factor = WarmupCosine(begin=begin, warmup=warmup, total=begin + warmup + length)
    assert 0 <= factor(step) <= 1
    if step < begin:
        assert factor(step) == 0
    elif step + 1 < begin + warmup:
        assert factor(step) < factor(step + 1)
    elif step >= begin + warmup:
        assert factor(step + 1) <= factor(step)
    assert factor(begin + warmup) == 1
    assert factor(begin + warmup + length) == pytest.approx(0, abs=1e-12)
