"""Two processes train as one does with batches of twice the size. They are real ones, over gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_DECODERS
from training_runs import fit, recipe, write_table

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers")
ROOT = Path(__file__).resolve().parents[1]
STAGES = [
    {"epochs": 1, "cached": True, "attention_regularisation": 0.5, "label_smoothing": 0.1},
    {"epochs": 1, "encoder": "finetune", "encoder_batch_norm": False},
    {"epochs": 1, "objective": "self_critical", "cross_entropy_weight": 0.2},
]


def settings_for(root, folder, *, devices, batch_size):
    settings = recipe(
        root,
        folder,
        "additive",
        stages=STAGES,
        trainer={"devices": devices},
        data={"batch_size": batch_size, "augmentation": None, "cache_views": 1, "bad_picture_limit": 0.5},
    )
    settings["model"]["decoder_settings"] = {**TINY_DECODERS["additive"], "dropout": 0.0}
    settings["best_checkpoint"] = {"filename": "{epoch}", "save_top_k": -1}
    settings["data"]["cache_folder"] = str(folder.parent / "cache")
    return settings


def start(folder, settings):
    path = folder / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return subprocess.run(
        [sys.executable, "-m", "training", "fit", "--config", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def weights(folder, epoch):
    (path,) = folder.rglob(f"epoch={epoch}.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def scores(folder):
    return [json.loads(line)["scores"] for line in (folder / "scores.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders of two processes, and of one with twice the batch."""
    folder = tmp_path_factory.mktemp("ddp")
    root = write_table(folder / "data", train=9, dev=5)
    two, one = folder / "two", folder / "one"
    done = start(two, settings_for(root, two, devices=2, batch_size=2))
    assert done.returncode == 0, done.stderr
    assert fit(one, settings_for(root, one, devices=1, batch_size=4)) == 0
    return two, one


def test_two_processes_end_frozen_and_fine_tuning_stages_with_the_weights_of_one(folders):
    two, one = folders
    for epoch in (0, 1):
        expected = weights(one, epoch)
        for name, value in weights(two, epoch).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_captions_of_both_processes_are_scored_together(folders):
    two, one = folders
    assert len(scores(two)) == 3  # the self-critical stage draws other samples on each process
    for found, expected in zip(scores(two)[:2], scores(one)[:2], strict=True):
        assert found == pytest.approx(expected)


def test_checkpoints_and_records_are_written_once(folders):
    two, one = folders
    assert sorted(path.name for path in two.rglob("*") if path.is_file()) == sorted(
        path.name for path in one.rglob("*") if path.is_file()
    )
    record = json.loads((two / "run.json").read_text())
    assert (record["status"], record["device"]["processes"]) == ("finished", 2)


def test_a_process_whose_whole_batch_is_bad_does_not_hold_up_the_other(tmp_path):
    root = write_table(tmp_path / "data", train=8, dev=4)
    for index in (0, 1, 2, 9):
        (root / f"{index}.jpg").write_bytes(b"no picture")
    settings = settings_for(root, tmp_path / "run", devices=2, batch_size=1)
    settings["model"]["stages"] = STAGES[1:]
    done = start(tmp_path / "run", settings)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "bad_pictures.txt").read_text().splitlines()) >= 2
