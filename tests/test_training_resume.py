"""A run that is broken off and resumed ends with the weights of an unbroken one, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from training_runs import fit, recipe, write_table

pytestmark = [
    pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*WeightAveraging", "ignore:(?s).*serialize"),
    pytest.mark.filterwarnings("ignore:.*not resumable", "ignore:The dirpath has changed"),  # it is; on purpose
]
EMA = {"class_path": "training.callbacks.WarmAveraging", "init_args": {"decay": 0.5}}


class KillItself(lightning.Callback):
    """Kills the process before a step, the way a power cut does: no handler, no clean-up."""

    def __init__(self, before_step):
        self.before_step = before_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.before_step and os.environ.get("KILL") == "yes":
            os.kill(os.getpid(), signal.SIGKILL)


class KeepAll(lightning.Callback):
    """Keeps a copy of every `last.ckpt`."""

    def __init__(self, folder):
        self.folder, self.seen = Path(folder), None

    def keep(self, trainer, moment):
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if path.exists() and path.stat().st_mtime_ns != self.seen:
            self.seen = path.stat().st_mtime_ns
            self.folder.mkdir(exist_ok=True)
            shutil.copy(path, self.folder / f"{trainer.current_epoch}-{trainer.global_step}-{moment}.ckpt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.keep(trainer, "step")

    def on_train_end(self, trainer, pl_module):
        self.keep(trainer, "end")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("data"), train=13, dev=4)


def settings_for(data_root, folder, decoder="multihead", *, accumulate=1, callbacks=()):
    return recipe(
        data_root,
        folder,
        decoder,
        stages=[
            {"epochs": 1, "cached": True, "scheduled_sampling": 0.5, "drop_words": 0.2},
            {"epochs": 1, "encoder": "finetune", "warmup_steps": 2},
            {"epochs": 1, "objective": "self_critical", "learning_rate": 1e-3},
        ],
        callbacks=[EMA, *callbacks],
        trainer={"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0},
        data={"cache_folder": str(data_root / "cache")},
    )


def final(folder):
    (path,) = folder.rglob("last.ckpt")
    return torch.load(path, weights_only=True)


def assert_same(first, second, where=""):
    """Compare nested states bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key, value in first.items():
            assert_same(value, second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, value in enumerate(first):
            assert_same(value, second[index], f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def assert_same_end(first, second, where=""):
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "global_step", "epoch"):
        assert_same(first[part], second[part], f"{where} {part}")


@pytest.mark.parametrize(("decoder", "accumulate", "workers"), [("multihead", 1, 0), ("additive", 2, 1)])
def test_a_run_resumed_from_any_of_its_checkpoints_ends_the_same(data_root, tmp_path, decoder, accumulate, workers):
    keeper = {"class_path": "test_training_resume.KeepAll", "init_args": {"folder": str(tmp_path / "kept")}}
    settings = settings_for(data_root, tmp_path / "whole", decoder, accumulate=accumulate, callbacks=[keeper])
    settings["data"]["workers"] = workers
    settings["last_checkpoint"] = {"minutes": 0}
    assert fit(tmp_path / "whole", settings) == 0
    whole = final(tmp_path / "whole")
    kept = sorted((tmp_path / "kept").iterdir())
    steps = whole["global_step"]
    assert len(kept) == steps  # after every step or, after the last of an epoch, at its end
    settings["trainer"]["callbacks"] = [EMA]
    for checkpoint in kept:
        rest = tmp_path / "rest" / checkpoint.stem
        settings["trainer"]["default_root_dir"] = str(rest)
        assert fit(rest, settings, "--ckpt_path", checkpoint) == 0
        if checkpoint is kept[-1]:  # that of the end: there is nothing left to do
            assert_same_end(torch.load(checkpoint, weights_only=True), whole)
            continue
        assert_same_end(final(rest), whole, checkpoint.stem)


def test_a_killed_process_loses_nothing_but_time(data_root, tmp_path):
    killer = {"class_path": "test_training_resume.KillItself", "init_args": {"before_step": 4}}
    settings = settings_for(data_root, tmp_path, callbacks=[killer])
    settings["last_checkpoint"] = {"minutes": 0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    run = [sys.executable, "-m", "training", "fit", "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())])}

    def start(*arguments, folder, kill):
        place = ["--trainer.default_root_dir", str(tmp_path / folder)]
        done = subprocess.run(
            [*run, *place, *arguments], env={**environment, "KILL": kill}, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    code, _ = start(folder="killed", kill="yes")
    assert code == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "killed").rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    code, errors = start("--ckpt_path", str(checkpoint), folder="resumed", kill="no")
    assert code == 0, errors
    code, errors = start(folder="whole", kill="no")
    assert code == 0, errors
    assert_same_end(final(tmp_path / "resumed"), final(tmp_path / "whole"))


def test_another_model_other_data_and_another_order_are_refused(data_root, tmp_path, capsys):
    settings = settings_for(data_root, tmp_path / "run")
    settings["last_checkpoint"] = {"minutes": 0}
    settings["trainer"]["max_steps"] = 2
    assert fit(tmp_path / "run", settings) == 0
    (checkpoint,) = (tmp_path / "run").rglob("last.ckpt")
    wider = {**settings["model"], "decoder_settings": {**settings["model"]["decoder_settings"], "dim": 32}}
    other = write_table(tmp_path / "other", train=12, dev=5)
    cases = {
        "decoder_settings": {**settings, "model": wider},
        "names or captions": {**settings, "data": {**settings["data"], "root": str(other)}},
        "batch_size": {**settings, "data": {**settings["data"], "batch_size": 3}},
    }
    for word, changed in cases.items():
        capsys.readouterr()
        assert fit(tmp_path / "again", changed, "--ckpt_path", checkpoint) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert word in errors[0]
