"""Stages that begin where an earlier one ended: branches of a run, whose weights are averaged at the end."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor

from captioner.errors import CheckpointError
from training.callbacks.last import STAGE, LastCheckpoint
from training.data import batches_done
from training.stages import StagePlan


class Branches(Callback):
    """Gives a stage with `from_stage` the weights at the end of that stage, or the mean of several, and an optimiser
    without a memory.

    They are read from the `stage-1.ckpt` and so on of `LastCheckpoint`. A run that is resumed from another folder takes
    those that it needs along.
    """

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the checkpoints along that later stages begin with, or that the run's model is the mean of.

        Args:
            trainer: of the run.
            pl_module: a `CaptionModule`.
        """
        plan, folder = _plan(pl_module), _folder(trainer)
        if plan is None or folder is None or trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        before = Path(trainer.ckpt_path).parent
        for number in {*plan.exported, *(number for stage in plan.stages for number in stage.origins)}:
            old, new = before / STAGE.format(number), folder / STAGE.format(number)
            if old.is_file() and not new.exists():
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(old, new)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin a branch.

        Args:
            trainer: of the run.
            pl_module: a `CaptionModule`.

        Raises:
            CheckpointError: when the checkpoint that it begins with is missing or damaged.
        """
        plan, folder = _plan(pl_module), _folder(trainer)
        if plan is None or folder is None:
            return
        position = plan.at(trainer.current_epoch)
        paths = [folder / STAGE.format(number) for number in position.stage.origins]
        # A run that is resumed within the branch has its weights already.
        if paths and batches_done(trainer) == position.first_epoch * trainer.num_training_batches:
            _restart(trainer, pl_module, paths, f"stage {position.index + 1}")


def _restart(trainer: lightning.Trainer, pl_module: lightning.LightningModule, paths: Sequence[Path], who: str) -> None:
    states = [_weights(path, pl_module, who) for path in paths]
    weights = {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }
    pl_module.load_state_dict(weights)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._average_model.module.load_state_dict(weights)
    for optimizer in trainer.optimizers:
        optimizer.state.clear()


def _weights(path: Path, pl_module: lightning.LightningModule, who: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        pl_module.load_state_dict(weights)  # whether it is of this model
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}: missing, but {who} begins with it; copy it there from its run") from err
    except Exception as err:  # zip, pickle, other shapes: whatever a damaged file brings
        raise CheckpointError(
            f"{path}: damaged, or of another model, but {who} begins with it; copy it there from its run"
        ) from err
    return weights


def _plan(pl_module: lightning.LightningModule) -> StagePlan | None:
    plan = getattr(pl_module, "plan", None)  # another module has no stages
    return plan if isinstance(plan, StagePlan) else None


def _folder(trainer: lightning.Trainer) -> Path | None:
    """Return where the run's checkpoints of stages lie; None where nobody writes them."""
    folders = [each.folder for each in trainer.callbacks if isinstance(each, LastCheckpoint)]  # type: ignore[attr-defined]
    return folders[0] if folders else None
