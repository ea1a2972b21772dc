"""Bad input: one line with thing, fault and remedy, and the exit status, before any long work."""

import copy
import errno
import os
import signal

import lightning
import pytest
import torch
from training_runs import command, error_line, fit, recipe, write_table

from training import data as training_data
from training import datasets as training_datasets

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data"))


@pytest.fixture
def no_long_work(monkeypatch):
    """Fail if features are computed or a picture is opened for training; a few are tried before."""

    def refuse(*arguments, **options):
        raise AssertionError("long work has begun")

    monkeypatch.setattr(training_data, "prepare_features", refuse)
    monkeypatch.setattr(training_datasets, "open_picture", refuse)


def one_stage(**more):
    return [{"epochs": 1, **more}]


SETTINGS = {
    "model.decodr": ("model", "decodr", "mean", 2, "did you mean model.decoder"),
    "data.bach_size": ("data", "bach_size", 3, 2, "did you mean data.batch_size"),
    "trainer.max_epoch": ("trainer", "max_epoch", 3, 2, "did you mean trainer.max_epochs"),
    "trainer.max_epochs=5": ("trainer", "max_epochs", 5, 1, "model.stages"),
    "model.stages.lerning_rate": ("model", "stages", one_stage(lerning_rate=1), 2, "model.stages.learning_rate"),
    "data.preprocessing.side": ("data", "preprocessing", {"side": 64}, 2, "data.preprocessing.side_px"),
    "resnet5": ("model", "encoder", {"backbone": "resnet5"}, 1, "did you mean resnet50"),
    "data.batch_size": ("data", "batch_size", "many", 2, "expected a whole number, got many"),
    "data.batch_size must": ("data", "batch_size", 0, 1, "at least 1, got 0"),
    "model.stages.epochs": ("model", "stages", one_stage(epochs="x"), 2, "expected a whole number, got x"),
    "epochs must": ("model", "stages", [{"epochs": 0}], 1, "at least 1, got 0"),
    "cached features": ("model", "stages", one_stage(cached=True, encoder="finetune"), 1, "cached: false"),
    "label_smoothing": (
        "model",
        "stages",
        one_stage(objective="self_critical", label_smoothing=0.1),
        1,
        "leave it out",
    ),
    "model.stages is empty": ("model", "stages", [], 1, "name at least one stage"),
    "stage 2 reads cached": (
        "model",
        "stages",
        [{"epochs": 1, "encoder": "finetune"}, {"epochs": 1, "cached": True}],
        1,
        "cached stages come first",
    ),
    "13 stages": ("model", "stages", one_stage(encoder="finetune", encoder_stages=99), 1, "the last 99"),
    "rewards.samples": (
        "model",
        "stages",
        one_stage(objective="self_critical", reward={"samples": 1}),
        1,
        "at least 2",
    ),
    "model.decoder must": ("model", "decoder", "gru", 1, "mean, additive, multihead"),
    "'head'": ("model", "decoder_settings", {"head": 3}, 1, "did you mean 'heads'"),
    "/nowhere.safetensors": ("model", "encoder_weights", "/nowhere.safetensors", 1, "name a safetensors file"),
    "model.init_from": ("model", "init_from", "/nowhere", 1, "no such folder"),
    "/nowhere": ("data", "root", "/nowhere", 1, "no such folder"),
    "'text'": ("data", "caption_column", "text", 1, "there are image, caption, split"),
    "'csv'": ("data", "format", "csv", 1, "flickr8k, karpathy, coco, table, shards"),
    "augmentation.mirror": ("data", "augmentation", {"mirror": 2.0}, 1, "from 0.0 to 1.0, got 2.0"),
    "trainer.precision": ("trainer", "precision", "17", 2, "bf16-mixed"),
    "trainer.callbacks": ("trainer", "callbacks", [{"class_path": "nowhere.Thing"}], 2, "'nowhere'"),
}


@pytest.mark.parametrize("thing", SETTINGS)
def test_a_wrong_setting_is_named_before_any_work(data_root, tmp_path, capsys, no_long_work, thing):
    section, key, value, status, remedy = SETTINGS[thing]
    settings = recipe(data_root, tmp_path, stages=[{"epochs": 1, "cached": True}])
    settings[section][key] = value
    assert fit(tmp_path, settings) == status
    line = error_line(capsys)
    assert thing.removeprefix("model.init_from") in line
    assert remedy in line
    assert len(line) < 400


def test_a_wrong_setting_of_the_command_line_is_named(data_root, tmp_path, capsys, no_long_work):
    assert fit(tmp_path, recipe(data_root, tmp_path), "--data.bach_size", 3) == 2
    assert "data.bach_size: no such setting; did you mean data.batch_size?" in error_line(capsys)


@pytest.mark.parametrize(("section", "key"), [("model", "stages"), ("data", "root")])
def test_a_setting_that_is_needed_is_named(data_root, tmp_path, capsys, no_long_work, section, key):
    settings = recipe(data_root, tmp_path)
    del settings[section][key]
    assert fit(tmp_path, settings) == 2
    assert f"error: {section}.{key}: needed" in error_line(capsys)


def test_options_that_exclude_each_other_are_named(data_root, tmp_path, capsys, no_long_work):
    settings = recipe(data_root, tmp_path, model={"init_from": "bundled", "encoder_weights": "torchvision"})
    assert fit(tmp_path, settings) == 1
    assert "model.encoder_weights and model.init_from exclude each other" in error_line(capsys)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "no such file"),
        (b"model: [1, 2\ndata: }", "not YAML"),
        (b"- 1\n- 2\n", "settings expected"),
        (b"\xff\xfe\x00\x80", "UTF-8"),
        (b"modle: {x: 1}", "modle.x: no such setting"),
    ],
)
def test_a_config_file_that_is_none_is_named(tmp_path, capsys, content, fault):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    assert command("fit", "--config", path) == 2
    assert fault in error_line(capsys)


@pytest.mark.parametrize("arguments", [[], ["fitt"]])
def test_without_a_known_subcommand_they_are_named(capsys, arguments):
    assert command(*arguments) == 2
    assert "fit, validate or export" in error_line(capsys)


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "no such file"), (b"", "damaged"), (b"PK not", "damaged"), ({"a": 1}, "not a checkpoint of `python -m")],
)
def test_a_ckpt_path_that_is_no_checkpoint_is_named(data_root, tmp_path, capsys, no_long_work, content, fault):
    path = tmp_path / "other.ckpt"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    assert fit(tmp_path, recipe(data_root, tmp_path), "--ckpt_path", path) == 1
    line = error_line(capsys)
    assert str(path) in line
    assert fault in line


def test_no_usable_picture_at_all_is_named(tmp_path, capsys, no_long_work):
    root = write_table(tmp_path / "data")
    for path in root.glob("*.jpg"):
        path.unlink()
    assert fit(tmp_path, recipe(root, tmp_path)) == 1
    assert "none of the" in error_line(capsys)


def test_a_vocabulary_that_loses_too_many_words_is_named_before_the_features_are_computed(
    data_root, tmp_path, capsys, no_long_work
):
    assert fit(tmp_path, recipe(data_root, tmp_path, data={"min_count": 8})) == 1
    assert "lower data.min_count" in error_line(capsys)


# --- Faults of the machine ---


class Raise(lightning.Callback):
    """Raises in the second step what a machine or a user may raise."""

    def __init__(self, fault):
        self.fault = fault

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            if self.fault == "interrupt":
                signal.raise_signal(signal.SIGINT)
            elif self.fault == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("interrupt", 130, "interrupted; resume with --ckpt_path"),
        ("terminate", 143, "terminated; resume with --ckpt_path"),
        ("disk", 1, "No space left on device; make room"),
    ],
)
def test_a_run_that_is_broken_off_says_so_in_one_line(data_root, tmp_path, capsys, fault, status, words):
    breaker = {"class_path": f"{__name__}.Raise", "init_args": {"fault": fault}}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert fit(tmp_path, recipe(data_root, tmp_path, stages=one_stage(), callbacks=[breaker])) == status
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert words in error_line(capsys)


def test_lightnings_untrue_and_useless_remarks_are_not_shown(data_root, tmp_path, capsys, caplog):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "other.ckpt").touch()
    settings = recipe(data_root, tmp_path, stages=[{"epochs": 2}], trainer={"logger": True})
    assert fit(tmp_path, copy.deepcopy(settings)) == 0
    shown = capsys.readouterr().err + caplog.text
    for remark in ("litlogger", "weights_only", "LeafSpec", "not resumable", "not empty"):
        assert remark not in shown
