"""Small data sets and recipes for the tests of training, and what a training did."""

import csv
import os
import sys

import lightning
import pytest
import yaml
from conftest import TINY_DECODERS
from PIL import Image, ImageDraw

from training.cli import main

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square")
TRAIN, DEV = 8, 4


def captions_of(index):
    colour, shape = COLOURS[index % 3], SHAPES[index % 2]
    return [f"A {colour} {shape} .", f"There is a {shape} that is {colour} on a white page ."]


def save_picture(path, index, *, side_px=64):
    """A coloured shape on white."""
    image = Image.new("RGB", (side_px, side_px), "white")
    draw = ImageDraw.Draw(image)
    corners = tuple(side_px * share // 64 for share in (10, 10, 50, 50))
    (draw.ellipse if index % 2 == 0 else draw.rectangle)(corners, fill=COLOURS[index % 3])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_table(root, *, train=TRAIN, dev=DEV):
    """A folder of pictures with captions.csv."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for index in range(train + dev):
            save_picture(root / f"{index}.jpg", index)
            for caption in captions_of(index):
                writer.writerow([f"{index}.jpg", caption, "train" if index < train else "dev"])
    return root


class Recorder(lightning.Callback):
    """Writes down what a training did: gradients, statistics and the order of the pictures, by epoch."""

    last: "Recorder"

    def __init__(self):
        type(self).last = self
        self.trainable, self.with_gradient, self.statistics, self.pictures = {}, {}, {}, {}
        self.cached, self.losses = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pictures.setdefault(trainer.current_epoch, []).append(batch.names)
        self.cached[trainer.current_epoch] = batch.cached

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.setdefault(trainer.current_epoch, []).append(float(outputs["loss"]))

    def on_after_backward(self, trainer, pl_module):
        epoch, parameters = trainer.current_epoch, dict(pl_module.model.named_parameters())
        self.trainable[epoch] = {name for name, p in parameters.items() if p.requires_grad}
        reached = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
        self.with_gradient[epoch] = self.with_gradient.get(epoch, set()) | reached

    def on_train_epoch_end(self, trainer, pl_module):
        buffers = pl_module.model.encoder.named_buffers()
        self.statistics[trainer.current_epoch] = {name: value.clone() for name, value in buffers}


def recipe(data_root, folder, decoder="multihead", *, stages=None, callbacks=(), trainer=None, data=None, model=None):
    """A recipe of three stages of an epoch each; what is given replaces or adds to it."""
    three = [
        {"epochs": 1, "cached": True, "warmup_steps": 1},
        {"epochs": 1, "encoder": "finetune", "label_smoothing": 0.1},
        {"epochs": 1, "objective": "self_critical", "learning_rate": 1e-4},
    ]
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "log_every_n_steps": 1,
            "callbacks": list(callbacks),
            **(trainer or {}),
        },
        "model": {
            "decoder": decoder,
            "decoder_settings": TINY_DECODERS[decoder],
            "encoder": {"backbone": "mobilenet_v3_small", "stride": 32},
            "stages": three if stages is None else stages,
            "search": {"beam_size": 2, "max_words": 8},
            **(model or {}),
        },
        "data": {
            "root": str(data_root),
            "batch_size": 4,
            "captions_per_picture": 2,
            "min_count": 1,
            "max_tokens": 12,
            "preprocessing": {"side_px": 64},
            "augmentation": {"mirror": 0.5, "min_area": 0.7, "colour": 0.2},
            "cache_folder": str(folder / "cache"),
            "cache_views": 2,
            "workers": 0,
            **(data or {}),
        },
    }


def command(*arguments):
    """Run `python -m training` in this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["training", *map(str, arguments)])
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test cuts the power
        return main()


def fit(folder, settings, *arguments):
    """Train by a recipe; returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return command("fit", "--config", path, *arguments)


def error_line(capsys):
    """Return the one line that says what went wrong."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line
