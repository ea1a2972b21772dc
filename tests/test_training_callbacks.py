"""What watches a training: in real runs of a model of one weight, and once of a tiny captioner."""

import contextlib
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioner import Captioner, CheckpointError, ConfigError, DataError
from captioner.tokenizer import Tokenizer
from training.callbacks import HealthCheck, PictureLog, RunEta, RunRecord, SafeCheckpointIO, WarmAveraging
from training.callbacks.files import write_whole
from training.callbacks.pictures import spread
from training.callbacks.progress import RemainingTime
from training.callbacks.record import git_commit

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?si).*deprecat", "ignore:.*WeightAveraging", "ignore:.*num_workers", "ignore:.*logging interval"
)
WORDS = ("red", "green", "blue", "big", "small", "dog", "cat", "ball")
DEV = 24
BATCHES, BATCH_SIZE = 4, 2


class Batch(SimpleNamespace):
    """Pictures of a batch, by name."""


class Batches(torch.utils.data.Dataset):
    """One item is one batch."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return Batch(x=torch.ones(1), names=self.names[index])


def loader(names):
    return torch.utils.data.DataLoader(Batches(names), batch_size=None)


class Data(lightning.LightningDataModule):
    """Captioned pictures: "a WORD dog ." for training, a caption of its own for every dev picture."""

    def __init__(self, folder=Path(), tokenizer=None, dev_captions=None):
        super().__init__()
        self.folder = folder
        self.given = tokenizer
        self.tokenizer = None
        self.pictures = {}
        self.dev_captions = dev_captions or [f"picture {k}" for k in range(DEV)]

    def setup(self, stage):
        def picture(split, index, caption):
            name = f"{split}{index}.png"
            return SimpleNamespace(name=name, path=self.folder / name, captions=(caption, "another | caption"))

        self.pictures = {
            "train": [picture("train", k, f"a {WORDS[k]} dog") for k in range(BATCHES * BATCH_SIZE)],
            "dev": [picture("dev", k, caption) for k, caption in enumerate(self.dev_captions)],
        }
        captions = [caption for p in self.pictures["train"] for caption in p.captions]
        self.tokenizer = self.given or Tokenizer.train(captions, min_count=1)

    def references(self):
        return {picture.name: picture.captions for picture in self.pictures["dev"]}

    def data_hash(self):
        return "abc"

    def train_dataloader(self):
        names = [picture.name for picture in self.pictures["train"]]
        return loader([tuple(names[k : k + BATCH_SIZE]) for k in range(0, len(names), BATCH_SIZE)])

    def val_dataloader(self):
        return loader([("all",)])


class Module(lightning.LightningModule):
    """One weight. What it writes and when its loss is no number are given by the test."""

    def __init__(self, captions=None, losses=None, ballast=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("ballast", torch.rand(ballast))
        self.written = captions or (lambda validation: [f"a dog {k}" for k in range(DEV)])
        self.losses = losses or {}
        self.captions, self.scores, self.bad_pictures = {}, {}, []
        self.validations = 0

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch.x).square().mean()
        return loss * self.losses.get((self.current_epoch, batch_idx), 1.0)

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        texts = self.written(self.validations)
        self.captions = {f"dev{k}.png": text for k, text in enumerate(texts)}
        self.scores = {"BLEU-4": 20.5, "CIDEr-D": math.nan if self.validations else 50.0}
        self.validations += not self.trainer.sanity_checking

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(folder, callbacks, **settings):
    settings = {"logger": False, "enable_checkpointing": False, "max_epochs": 2} | settings
    return lightning.Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(folder, callbacks, module=None, data=None, *, ckpt_path=None, **settings):
    """Run a training; returns its trainer."""
    trainer = trainer_of(folder, callbacks, **settings)
    trainer.fit(module or Module(), datamodule=data or Data(), ckpt_path=ckpt_path)
    return trainer


# --- Health: the loss ---


@pytest.mark.parametrize("every_steps", [1, 3, 100])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_pictures(tmp_path, every_steps, value):
    module = Module(losses={(1, 2): value})
    with pytest.raises(
        ConfigError, match=rf"loss is {value} at epoch 1, batch 2, step 7, .* train4\.png, train5\.png;"
    ):
        fit(tmp_path, [HealthCheck(every_steps=every_steps)], module)
    assert module.current_epoch == 1


def test_the_loss_is_looked_at_every_so_many_batches_and_at_the_end_of_an_epoch(tmp_path):
    for every_steps, seen in ((1, 2), (3, 3), (100, 4)):
        trainer = trainer_of(tmp_path, [HealthCheck(every_steps=every_steps)])
        with pytest.raises(ConfigError, match="batch 1, step 2,"):
            trainer.fit(Module(losses={(0, 1): math.nan}), datamodule=Data())
        assert trainer.global_step == seen


def test_weights_after_such_a_loss_are_never_stored(tmp_path):
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}", save_on_exception=True
    )
    with pytest.raises(ConfigError, match="batch 1, step 6,"):
        fit(
            tmp_path,
            [checkpoint, HealthCheck(every_steps=100)],
            Module(losses={(1, 1): math.nan}),
            enable_checkpointing=True,
        )
    kept = sorted((tmp_path / "kept").iterdir())
    assert [path.name for path in kept] == [f"step={step}.ckpt" for step in range(1, 6)]
    for path in kept:
        assert torch.load(path, weights_only=True)["state_dict"]["weight"].isfinite().all()


def test_a_second_training_does_not_inherit_the_losses_of_the_first(tmp_path):
    check = HealthCheck(every_steps=100)
    with pytest.raises(ConfigError):
        fit(tmp_path, [check], Module(losses={(0, 1): math.nan}))
    assert fit(tmp_path, [check]).global_step == 2 * BATCHES


def test_a_batch_that_is_left_out_is_no_fault(tmp_path):
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    assert fit(tmp_path, [HealthCheck(every_steps=1)], Skips()).current_epoch == 2


def test_a_run_whose_loss_cannot_be_seen_is_refused(tmp_path):
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return {"other": torch.zeros(1)}

    with pytest.raises(ConfigError, match="no loss to look at"):
        fit(tmp_path, [HealthCheck()], Manual())


# --- Health: one caption for every picture ---


def same(validation):
    return ["a dog"] * DEV


def test_one_caption_for_every_picture_stops_the_run_after_the_grace(tmp_path):
    module = Module(same)
    with pytest.raises(
        ConfigError, match=r"one caption for every picture: 3 .* 1 for 24 pictures \('a dog' 24 times\)"
    ):
        fit(tmp_path, [HealthCheck(patience=3)], module, max_epochs=9)
    assert module.validations == 3  # the trial run before the training is none of them


def test_empty_captions_are_one_caption(tmp_path):
    with pytest.raises(ConfigError, match=r"\('' 24 times\)"):
        fit(tmp_path, [HealthCheck(patience=1)], Module(lambda validation: [""] * DEV))


def test_a_start_with_one_caption_is_forgiven_and_forgotten(tmp_path):
    def recovers(validation):
        return ["a dog"] * DEV if validation % 3 < 2 else [f"a dog {k}" for k in range(DEV)]

    assert fit(tmp_path, [HealthCheck(patience=3)], Module(recovers), max_epochs=9).current_epoch == 9


def test_the_share_of_distinct_captions_is_held_against_the_limit(tmp_path):
    def three(validation):
        return [f"a dog {k % 3}" for k in range(DEV)]

    assert fit(tmp_path, [HealthCheck(patience=1, min_distinct=3 / DEV)], Module(three)).current_epoch == 2
    with pytest.raises(ConfigError, match="the last 3 for 24 pictures"):
        fit(tmp_path, [HealthCheck(patience=1, min_distinct=3.1 / DEV)], Module(three))


def test_data_of_few_captions_may_be_given_few(tmp_path):
    check = HealthCheck(patience=1, min_distinct=1.0)
    fit(tmp_path, [check], Module(same), Data(dev_captions=["a dog"] * DEV))
    two = Data(dev_captions=["a dog", "a cat"] * (DEV // 2))
    fit(tmp_path, [check], Module(lambda validation: ["a dog", "a ball"] * (DEV // 2)), two)
    with pytest.raises(ConfigError, match="one caption"):
        fit(tmp_path, [check], Module(same), two)


def test_too_few_pictures_are_not_judged(tmp_path):
    fit(tmp_path, [HealthCheck(patience=1, min_pictures=DEV + 1)], Module(same))


def test_a_resumed_run_fails_at_the_validation_where_the_unbroken_one_does(tmp_path):
    keep = {"dirpath": tmp_path / "kept", "filename": "{epoch}", "save_top_k": -1}
    fit(tmp_path, [HealthCheck(), ModelCheckpoint(**keep)], Module(same), enable_checkpointing=True)
    module = Module(same)
    with pytest.raises(ConfigError, match="picture: 3 validations"):
        fit(tmp_path, [HealthCheck()], module, max_epochs=9, ckpt_path=tmp_path / "kept" / "epoch=1.ckpt")
    assert module.validations == 1


def test_a_validation_without_a_training_is_not_judged(tmp_path):
    check, module = HealthCheck(patience=1), Module(same)
    data = Data()
    trainer_of(tmp_path, [check]).validate(module, datamodule=data, verbose=False)
    assert len(module.captions) == DEV


# --- Health: the vocabulary ---


def test_a_vocabulary_that_loses_too_many_words_stops_the_run_before_a_step(tmp_path):
    # "a WORD dog", "another caption" eight times: 40 words, of which 8 are "another" and 7 are colours, sizes, animals.
    data = Data(tokenizer=Tokenizer.train(["a dog caption"], min_count=1))
    module = Module()
    with pytest.raises(DataError, match=r"37\.5% of the 40 words .* 37\.4% may be \('another' 8x, .*min_count"):
        fit(tmp_path, [HealthCheck(max_unknown=0.374)], module, data)
    assert module.global_step == module.validations == 0
    fit(tmp_path, [HealthCheck(max_unknown=0.375)], module, data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"every_steps": 0},
        {"patience": 0},
        {"min_pictures": 0},
        {"min_distinct": 1.1},
        {"max_unknown": -0.1},
        {"max_unknown": math.nan},
    ],
)
def test_a_check_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        HealthCheck(**wrong)


# --- Pictures ---


class CaptionerModule(Module):
    """A tiny captioner in training."""

    def __init__(self, checkpoint):
        super().__init__()
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.seen, self.drawn = [], []

    def captioner(self):
        self.drawn.append(self.weight.item())
        return Captioner(self.checkpoint, device="cpu")

    def training_step(self, batch, batch_idx):
        pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(batch_idx))
        tokens = torch.tensor([[1, 5, 6, 7, 2]] * 2)
        logits_NTV, _ = self.model(pixels, tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_NTV.flatten(0, 1), tokens[:, 1:].flatten())
        return loss + super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.weight.item())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with the dev pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(DEV):
        Image.new("RGB", (80, 60), (10 * index, 90, 40)).save(folder / f"dev{index}.png")
    return folder


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_pictures_with_captions_are_in_tensorboard_after_every_validation(tmp_path, photos, tiny_checkpoint):
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    fit(
        tmp_path,
        [PictureLog(pictures=2, search={"beam_size": 2, "max_words": 4})],
        CaptionerModule(tiny_checkpoint()),
        Data(photos),
        logger=[CSVLogger(tmp_path), logger],
    )
    found = events(logger.log_dir)
    assert sorted(found.Tags()["images"]) == ["pictures/dev0.png", "pictures/dev12.png"]
    for tag in found.Tags()["images"]:
        drawn = found.Images(tag)
        assert [image.step for image in drawn] == [BATCHES, 2 * BATCHES]
        with Image.open(io.BytesIO(drawn[0].encoded_image_string)) as image:
            assert image.width > 100
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    (tag,) = (name for name in found.Tags()["tensors"] if name.startswith("captions"))
    table = found.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
    assert "| dev12.png | " in table
    assert "picture 12<br>another \\| caption" in table


def test_drawing_pictures_leaves_the_training_as_it_is(tmp_path, photos, tiny_checkpoint):
    weights = []
    for callbacks in ([], [PictureLog(pictures=2)]):
        module = CaptionerModule(tiny_checkpoint()).train()
        # As a captioner lays it out; another layout has other rounding.
        module.model.encoder.to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        fit(tmp_path, callbacks, module, Data(photos), logger=TensorBoardLogger(tmp_path))
        weights.append(module.state_dict())
        assert bool(module.drawn) == bool(callbacks)
        assert module.model.training
    without, with_pictures = weights
    assert all(torch.equal(with_pictures[name], value) for name, value in without.items())


@pytest.mark.parametrize("first", [0, 1])
def test_pictures_are_drawn_with_the_weights_that_are_scored(tmp_path, photos, tiny_checkpoint, first):
    callbacks = [PictureLog(pictures=1), EMAWeightAveraging(decay=0.9)]
    module = CaptionerModule(tiny_checkpoint())
    callbacks = callbacks[first:] + callbacks[:first]
    fit(tmp_path, callbacks, module, Data(photos), logger=TensorBoardLogger(tmp_path), num_sanity_val_steps=0)
    assert module.drawn == module.seen
    assert len(set(module.drawn)) == 2


def test_without_tensorboard_one_line_says_so(tmp_path, caplog):
    fit(tmp_path, [PictureLog()], max_epochs=3)
    assert sum("no TensorBoardLogger" in record.message for record in caplog.records) == 1


def test_a_picture_that_cannot_be_opened_is_left_out_with_one_line(tmp_path, photos, tiny_checkpoint, caplog):
    for name in ("dev0.png", "dev12.png"):
        shutil.copy(photos / name, tmp_path)
    (tmp_path / "dev0.png").write_bytes(b"no picture")
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    fit(tmp_path, [PictureLog(pictures=2)], CaptionerModule(tiny_checkpoint()), Data(tmp_path), logger=logger)
    assert events(logger.log_dir).Tags()["images"] == ["pictures/dev12.png"]
    assert sum("dev0.png is not drawn" in record.message for record in caplog.records) == 1


def test_a_picture_log_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="pictures"):
        PictureLog(pictures=0)
    with pytest.raises(ConfigError, match="beams"):
        PictureLog(search={"beams": 3})


@given(total=st.integers(1, 200), count=st.integers(1, 50))
def test_pictures_are_spread_evenly(total, count):
    chosen = spread(range(total), count)
    assert len(chosen) == min(total, count)
    assert chosen[0] == 0
    gaps = {after - before for before, after in zip(chosen, [*chosen[1:], total], strict=True)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


# --- Record ---


def read(folder):
    return json.loads((folder / "run.json").read_text())


def read_scores(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_record(tmp_path):
    during = []

    class Looks(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            during.append(read(tmp_path))

    lightning.seed_everything(7, verbose=False)
    try:
        fit(tmp_path, [RunRecord(), Looks()])
    finally:
        os.environ.pop("PL_GLOBAL_SEED")
    record = read(tmp_path)
    assert during[0]["status"] == "running"
    assert during[0]["ended"] is None
    assert (record["status"], record["message"], record["seed"]) == ("finished", None, 7)
    assert record["started"] == during[0]["started"] <= record["ended"]
    assert record["data_sha256"] == "abc"
    assert record["pictures"] == {"train": BATCHES * BATCH_SIZE, "dev": DEV}
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(record["versions"]) == {"python", "captioner", "torch", "torchvision", "lightning"}
    assert record["device"]["type"] == "cpu"
    assert (record["epoch"], record["step"], record["earlier"]) == (2, 2 * BATCHES, [])
    assert list(record["epoch_ends"]) == ["0", "1"]
    assert record["started"] <= record["epoch_ends"]["0"] <= record["epoch_ends"]["1"] <= record["ended"]
    scores = read_scores(tmp_path)
    assert [(row["attempt"], row["epoch"], row["step"]) for row in scores] == [(1, 0, BATCHES), (1, 1, 2 * BATCHES)]
    assert scores[0]["scores"] == {"BLEU-4": 20.5, "CIDEr-D": 50.0}
    assert scores[1]["scores"] == {"BLEU-4": 20.5, "CIDEr-D": None}
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "bad_pictures.txt").exists()


def test_the_record_is_in_the_folder_of_the_logger(tmp_path):
    fit(tmp_path, [RunRecord()], logger=TensorBoardLogger(tmp_path, name="run", version="3"))
    assert read(tmp_path / "run" / "3")["status"] == "finished"


def test_a_failed_run_says_why_and_raises_what_it_raised(tmp_path):
    with pytest.raises(ConfigError, match="one caption"):
        fit(tmp_path, [RunRecord(), HealthCheck(patience=1)], Module(same))
    record = read(tmp_path)
    assert record["status"] == "failed"
    assert record["message"].startswith("ConfigError: one caption for every picture")
    assert len(read_scores(tmp_path)) == 1


class Stops(lightning.Callback):
    """Ends a run from without, in its second epoch."""

    def __init__(self, how):
        self.how = how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            self.how()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_says_so(tmp_path, number):
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path, [RunRecord(), Stops(lambda: os.kill(os.getpid(), number))])
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
    record = read(tmp_path)
    assert (record["status"], record["epoch"]) == ("interrupted", 1)


def test_a_second_run_in_the_folder_keeps_the_record_of_the_first(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [RunRecord(), keep, Stops(lambda: 1 / 0)], enable_checkpointing=True)
    for _ in range(2):
        fit(tmp_path, [RunRecord()], ckpt_path=tmp_path / "epoch=0.ckpt")
    record = read(tmp_path)
    assert [run["status"] for run in record["earlier"]] == ["failed", "finished"]
    assert all("earlier" not in run for run in record["earlier"])
    assert [(row["attempt"], row["epoch"]) for row in read_scores(tmp_path)] == [(1, 0), (2, 1), (3, 1)]


@pytest.mark.parametrize("validated", [True, False])
def test_a_run_resumed_in_another_folder_takes_over_the_record(tmp_path, validated):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    keep = ModelCheckpoint(dirpath=first / "checkpoints", filename="{epoch}", save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(first, [RunRecord(), keep, Stops(lambda: 1 / 0)], enable_checkpointing=True)
    checkpoint = first / "checkpoints" / "epoch=0.ckpt"
    before = {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
    if not validated:
        (first / "scores.jsonl").unlink()
    fit(second, [RunRecord()], ckpt_path=checkpoint)
    fit(second, [RunRecord()], ckpt_path=checkpoint)  # its own folder knows of the first run by now
    assert [run["status"] for run in read(second)["earlier"]] == ["failed", "finished"]
    assert [list(run["epoch_ends"]) for run in [*read(second)["earlier"], read(second)]] == [["0"], ["1"], ["1"]]
    expected = [(1, 0), (2, 1), (3, 1)] if validated else [(2, 1), (3, 1)]
    assert [(row["attempt"], row["epoch"]) for row in read_scores(second)] == expected
    shutil.copytree(second, third)  # a run that was itself resumed, with a checkpoint
    (third / "checkpoints").mkdir()
    last = shutil.copy(checkpoint, third / "checkpoints")
    fit(tmp_path / "fourth", [RunRecord()], ckpt_path=last)
    assert [run["status"] for run in read(tmp_path / "fourth")["earlier"]] == ["failed", "finished", "finished"]
    if validated:
        assert {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()} == before


def test_of_a_checkpoint_without_a_record_beside_it_nothing_is_taken_over(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    fit(tmp_path / "first", [RunRecord(), keep], enable_checkpointing=True)
    fit(tmp_path / "second", [RunRecord()], ckpt_path=tmp_path / "kept" / "epoch=0.ckpt")
    assert read(tmp_path / "second")["earlier"] == []


def test_a_resumed_run_names_the_record_it_cannot_take_over(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path / "first" / "checkpoints", filename="{epoch}", save_top_k=-1)
    fit(tmp_path / "first", [RunRecord(), keep], enable_checkpointing=True)
    checkpoint = tmp_path / "first" / "checkpoints" / "epoch=0.ckpt"
    (tmp_path / "first" / "scores.jsonl").unlink()
    (tmp_path / "first" / "scores.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"first.scores\.jsonl: cannot be read: .*make it readable"):
        fit(tmp_path / "second", [RunRecord()], ckpt_path=checkpoint)
    (tmp_path / "first" / "run.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"first.run\.json: not the record of a run; move it away"):
        fit(tmp_path / "third", [RunRecord()], ckpt_path=checkpoint)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"earlier": 3}', "\xff"])
def test_a_record_that_is_none_is_named_before_a_step(tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"run\.json: not the record of a run; move it away"):
        fit(tmp_path, [RunRecord()])
    assert (tmp_path / "run.json").read_text(encoding="latin-1") == content


def test_bad_pictures_are_listed_with_their_fault(tmp_path):
    class Finds(Module):
        def training_step(self, batch, batch_idx):
            if (self.current_epoch, batch_idx) == (0, 0):
                self.bad_pictures.append(("a\udcff.jpg", "damaged\n here"))
            if self.current_epoch == 1:
                self.bad_pictures.append(("b.jpg", "missing"))
                raise DataError("too many bad pictures")
            return super().training_step(batch, batch_idx)

    with pytest.raises(DataError, match="too many"):
        fit(tmp_path, [RunRecord()], Finds())
    assert (tmp_path / "bad_pictures.txt").read_text() == "a\\udcff.jpg\tdamaged here\nb.jpg\tmissing\n"


def test_a_validation_alone_leaves_no_record(tmp_path):
    trainer_of(tmp_path, [RunRecord()]).validate(Module(), datamodule=Data(), verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_the_commit_is_that_of_the_code(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    code = tmp_path / "package" / "module.py"
    code.parent.mkdir()
    code.write_text("one")
    assert git_commit(code) is None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "empty")
    assert git_commit(code) is None  # a package that was installed into somebody's checkout is not of that commit
    git("add", ".")
    git("commit", "-m", "code")
    assert git_commit(code) == {"commit": git("rev-parse", "HEAD"), "changed": False}
    code.write_text("two")
    assert git_commit(code)["changed"]
    assert git_commit(tmp_path / "nowhere" / "module.py") is None


def test_a_run_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fit(tmp_path, [RunRecord()], max_epochs=1)
    assert read(tmp_path)["git"] is None


# --- Full disk ---


@contextlib.contextmanager
def small_disk(folder, size):
    """A real disk of a size; needs the right to mount."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here; the limit on the size of a file is tested all the same")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def largest_file(size):
    """The system refuses to write a file beyond a size, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_says_so_and_leaves_the_last_checkpoint_to_resume_from(tmp_path, caplog):
    class Fills(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.good = (disk / "kept" / "last.ckpt").read_bytes()
                fill(disk)

    def callbacks():
        return [RunRecord(), ModelCheckpoint(dirpath=disk / "kept", filename="{epoch}", save_last=True)]

    def module():
        return Module(ballast=50_000)  # 200 kB

    settings = {"enable_checkpointing": True, "plugins": [SafeCheckpointIO()]}
    with small_disk(tmp_path, "1500k") as disk:
        filler = Fills()
        last = disk / "kept" / "last.ckpt"
        with pytest.raises(CheckpointError) as caught:
            fit(disk, [*callbacks(), filler], module(), num_sanity_val_steps=0, **settings)
        assert str(caught.value).startswith(str(disk))
        for part in ("could not be written: No space left on device", " MB are free there; make room"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert last.read_bytes() == filler.good
        assert not list(disk.rglob("*.partial"))
        assert read(disk)["status"] == "running"  # there was no room to say otherwise
        assert any("run.json" in record.message for record in caplog.records)
        (disk / "filler").unlink()
        trainer = fit(disk, callbacks(), module(), ckpt_path=last, **settings)
        assert trainer.global_step == 2 * BATCHES
        assert read(disk)["status"] == "finished"


def test_a_checkpoint_that_does_not_fit_leaves_the_old_one_and_names_it(tmp_path):
    plugin, path = SafeCheckpointIO(), tmp_path / "kept" / "last.ckpt"
    with largest_file(100_000), pytest.raises(CheckpointError) as caught:
        plugin.save_checkpoint({"x": torch.zeros(100_000)}, path)
    assert "no checkpoint had been written" in str(caught.value)
    plugin.save_checkpoint({"x": torch.ones(10)}, path)
    good = path.read_bytes()
    with largest_file(100_000), pytest.raises(CheckpointError) as caught:
        plugin.save_checkpoint({"x": torch.zeros(100_000)}, path)
    assert f"{path}: 0.4 MB could not be written: File too large; " in str(caught.value)
    assert str(caught.value).endswith(f"make room, then resume with --ckpt_path {path}")
    assert path.read_bytes() == good
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    plugin, path = SafeCheckpointIO(), tmp_path / "a" / "b.ckpt"
    for content in (torch.rand(3), torch.rand(5)):
        plugin.save_checkpoint({"x": content, "step": 3}, str(path))
        assert torch.equal(plugin.load_checkpoint(path, weights_only=True)["x"], content)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_a_killed_writer_left_is_written_over_and_never_taken_for_a_checkpoint(tmp_path):
    (tmp_path / "last.ckpt.partial").write_bytes(b"half")
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = fit(tmp_path, [keep], enable_checkpointing=True, plugins=[SafeCheckpointIO()], max_epochs=1)
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "last.ckpt.partial").write_bytes(b"half")
    again = trainer_of(tmp_path, [keep], enable_checkpointing=True, plugins=[SafeCheckpointIO()], max_epochs=2)
    again.fit(Module(), datamodule=Data(), ckpt_path="last")
    assert (trainer.global_step, again.global_step) == (BATCHES, 2 * BATCHES)


@pytest.mark.parametrize("obstacle", ["file", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, obstacle):
    if obstacle == "file":  # where a folder should be
        (tmp_path / "kept").write_text("")
    else:  # where the checkpoint should be
        (tmp_path / "kept" / "last.ckpt" / "deeper").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .* could not be written"):
        SafeCheckpointIO().save_checkpoint({}, tmp_path / "kept" / "last.ckpt")
    assert not list(tmp_path.rglob("*.partial"))


def test_an_address_that_is_no_local_path_is_left_to_lightning(tmp_path):
    plugin = SafeCheckpointIO()
    plugin.save_checkpoint({"step": 3}, "memory://folder/last.ckpt")
    assert plugin.load_checkpoint("memory://folder/last.ckpt", weights_only=True) == {"step": 3}


@given(old=st.binary(max_size=50), new=st.binary(max_size=50))
def test_a_file_is_written_whole(tmp_path_factory, old, new):
    path = tmp_path_factory.mktemp("files") / "file"
    for content in (old, new):
        write_whole(path, content)
        assert path.read_bytes() == content


# --- Time to the end ---


@given(rate_s=st.floats(0.001, 100), total=st.integers(1, 50), window=st.integers(1, 60), start=st.integers(0, 20))
def test_even_steps_give_the_exact_rest(rate_s, total, window, start):
    estimate = RemainingTime(total=start + total, window=window)
    assert estimate.add(5.0, start) is None
    for done in range(1, total + 1):
        found = estimate.add(5.0 + rate_s * done, start + done)
        assert found == pytest.approx(rate_s * (total - done), rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 3)), max_size=30), st.integers(0, 20), st.integers(1, 9))
def test_the_rest_is_never_negative_and_zero_at_the_end(steps, total, window):
    estimate, now_s, step = RemainingTime(total=total, window=window), 0.0, 0
    estimate.add(0.0, 0)
    for taken_s, taken in steps:
        now_s, step = now_s + taken_s, step + taken
        found = estimate.add(now_s, step)
        assert (found is None) == (taken == 0)
        assert found is None or found >= 0
        assert found == 0 or found is None or step < total or taken_s == 0


def test_a_slower_stage_is_soon_the_only_one_that_counts():
    estimate = RemainingTime(total=100, window=4)
    for step in range(50):
        estimate.add(step * 1.0, step)
    found = [estimate.add(49 + 10.0 * k, 49 + k) for k in range(1, 5)]
    assert found[-1] == pytest.approx(10.0 * (100 - 53))


class Metrics(lightning.Callback):
    """Writes down what the progress bar shows."""

    def __init__(self):
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.shown.append(trainer.progress_bar_metrics.get("eta_min"))


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_the_progress_bar_shows_the_rest_of_the_run_and_no_logger_does(tmp_path, accumulated):
    metrics = Metrics()
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    fit(tmp_path, [RunEta(), metrics], logger=logger, accumulate_grad_batches=accumulated, log_every_n_steps=1)
    shown = [value for value in metrics.shown if value is not None]
    assert all(value > 0 for value in shown[: len(shown) // 2])
    assert shown[-1] == 0
    assert "eta_min" not in events(logger.log_dir).Tags()["scalars"]


def test_a_run_without_an_end_says_so_once(tmp_path, caplog):
    class Ends(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    metrics = Metrics()
    fit(tmp_path, [RunEta(), metrics, Ends()], max_epochs=-1)
    assert set(metrics.shown) == {None}
    assert sum("no last step" in record.message for record in caplog.records) == 1


# --- All together, from YAML ---


def test_all_of_it_is_named_in_yaml(tmp_path):
    recipe = {
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path),
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "training.callbacks.HealthCheck", "init_args": {"max_unknown": 0.2}},
                {"class_path": "training.callbacks.PictureLog", "init_args": {"search": {"beam_size": 2}}},
                {"class_path": "training.callbacks.RunRecord"},
                {"class_path": "training.callbacks.RunEta"},
            ],
            "logger": False,
            "enable_progress_bar": False,
            "plugins": [{"class_path": "training.callbacks.SafeCheckpointIO"}],
        }
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["training"])
        cli = LightningCLI(Module, Data, run=False, args=["--config", str(path)], seed_everything_default=0)
    os.environ.pop("PL_GLOBAL_SEED")
    assert isinstance(cli.trainer.strategy.checkpoint_io, SafeCheckpointIO)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert read(tmp_path)["status"] == "finished"
    assert len(read_scores(tmp_path)) == 3


# --- Averaging ---


def test_an_average_follows_the_weights_from_the_first_steps_on():
    averaging = WarmAveraging(decay=0.99)
    mean, seen = [torch.zeros(3)], [torch.tensor(5)]
    for step in range(30):
        assert averaging.should_update(step_idx=step)
        averaging._average(mean, [torch.ones(3)], None)
        averaging._average(seen, [torch.tensor(step)], None)
    assert mean[0].min() > 0.99  # with a fixed decay 0.26 would be left to go
    assert int(seen[0]) == 29
    assert not averaging.should_update(epoch_idx=0)
    for wrong in (1.0, -0.1):
        with pytest.raises(ConfigError, match="decay"):
            WarmAveraging(decay=wrong)
