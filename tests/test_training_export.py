"""A run becomes a model folder with a card that is true; foreign files and other data are refused."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_DECODERS
from training_runs import command, error_line, fit, recipe, write_table

from captioner import Captioner, CheckpointError
from captioner.metrics import java
from training.export import average, load_run

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(java, "missing", lambda metric: "left out")  # METEOR takes its time


@pytest.fixture(scope="module", params=TINY_DECODERS)
def run(request, data_root, tmp_path_factory):
    """A finished training: its decoder and its checkpoints by epoch."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = recipe(data_root, folder, request.param, stages=[{"epochs": 2, "learning_rate": 0.01}])
    settings["best_checkpoint"] = {"filename": "{epoch}", "save_top_k": -1}
    assert fit(folder, settings) == 0
    return request.param, sorted(folder.rglob("epoch=*.ckpt"))


def test_a_run_is_exported_as_a_model_that_captions(run, data_root, tmp_path, capsys):
    decoder, checkpoints = run
    assert len(checkpoints) == 2
    arguments = ["--folder", tmp_path / "model", "--name", "Shapes", "--beam-size", 2]
    assert command("export", *checkpoints, *arguments) == 0
    assert "BLEU-4" in capsys.readouterr().out
    captioner = Captioner.load(tmp_path / "model", device="cpu")
    assert captioner.config.decoder == decoder
    assert captioner.card.startswith("# Shapes\n")
    facts = (
        "python -m training fit",
        "BLEU-4",
        "CIDEr-D",
        decoder,
        "mobilenet_v3_small",
        "8 pictures with\n16 captions",
    )
    for fact in facts:
        assert fact.replace("\n", " ") in captioner.card
    assert captioner.caption(data_root / "0.jpg").text
    kept, mean = captioner.model.state_dict(), average([load_run(path).checkpoint for path in checkpoints])
    assert all(torch.equal(kept[name], value) for name, value in mean.model.state_dict().items())


def test_averaging_two_checkpoints_gives_their_mean_and_one_itself(run):
    first, second = (load_run(path).checkpoint for path in run[1])
    alone = average([load_run(run[1][0]).checkpoint]).model.state_dict()
    assert all(torch.equal(alone[name], value) for name, value in first.model.state_dict().items())
    wanted = {
        name: (value + second.model.state_dict()[name]) / 2
        for name, value in first.model.state_dict().items()
        if value.is_floating_point()
    }
    found = average([first, second]).model.state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_data_that_have_moved_are_named_and_data_that_have_changed_are_refused(run, data_root, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(data_root, moved)
    arguments = ["export", run[1][0], "--folder", tmp_path / "model", "--data-root", moved]
    assert command(*arguments) == 0
    capsys.readouterr()
    path = moved / "captions.csv"
    path.write_text(path.read_text().replace("red", "pink"))
    assert command(*arguments) == 1
    assert "not the data of the run" in error_line(capsys)


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"PK\x03\x04", {"state_dict": {}}])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "run.ckpt"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_run(path)


def test_checkpoints_of_different_models_are_not_averaged(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="one run"):
        average([tiny_checkpoint("mean"), tiny_checkpoint("additive")])


class Ascending:
    """Scores as if every caption were better than the one before: those of a tiny model may all be 0."""

    def __init__(self, references):
        self.count = len(references)

    def score(self, captions, indices):
        assert len(captions) == self.count
        return np.arange(self.count, dtype=float)


def test_captions_that_all_score_alike_leave_the_model_without_a_confidence(run, tmp_path, monkeypatch):
    for module in ("export", "calibration"):
        monkeypatch.setattr(f"training.{module}.FEWEST_TRAIN", 2)
        monkeypatch.setattr(f"training.{module}.FEWEST_DEV", 2)
    monkeypatch.setattr(Ascending, "score", lambda self, captions, indices: np.zeros(self.count))
    monkeypatch.setattr("training.calibration.CiderD", Ascending)
    assert command("export", run[1][0], "--folder", tmp_path / "model") == 0
    captioner = Captioner.load(tmp_path / "model", device="cpu")
    assert captioner.config.confidence is None
    assert "CIDEr-D tells no dev captions apart" in captioner.card


def test_with_enough_pictures_the_model_ships_calibrated_and_its_card_says_how_well(
    run, data_root, tmp_path, monkeypatch, example_photos
):
    decoder, checkpoints = run
    for module in ("export", "calibration"):
        monkeypatch.setattr(f"training.{module}.FEWEST_TRAIN", 2)
        monkeypatch.setattr(f"training.{module}.FEWEST_DEV", 2)
    monkeypatch.setattr("training.calibration.CiderD", Ascending)
    options = ["--beam-size", 2, "--no-repeat-ngram", 3, "--photo", example_photos[0], "--limits", "It knows shapes."]
    assert command("export", checkpoints[-1], "--folder", tmp_path / "model", "--half", *options) == 0
    captioner = Captioner.load(tmp_path / "model", device="cpu")
    assert (captioner.config.search.beam_size, captioner.config.search.no_repeat_ngram) == (2, 3)
    caption = captioner.caption(data_root / "9.jpg")
    assert 0 <= caption.confidence <= 1
    assert caption.text == captioner.caption(data_root / "9.jpg", beam_size=2, no_repeat_ngram=3).text
    for fact in ("expected calibration error", "It knows shapes.", "](maps.png)"):
        assert fact in captioner.card
    assert ("of the attention of content words" in captioner.card) == (decoder != "mean")
    assert (tmp_path / "model" / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_without_enough_pictures_it_ships_without_a_confidence(run, data_root, tmp_path):
    assert command("export", run[1][0], "--folder", tmp_path / "model") == 0
    captioner = Captioner.load(tmp_path / "model", device="cpu")
    assert captioner.caption(data_root / "9.jpg").confidence is None
    assert "confidence" not in captioner.card.lower()
