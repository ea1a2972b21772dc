"""The newest state of a run, so that a run that is cut off loses minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from captioner.errors import ConfigError
from training.stages import StagePlan

LAST = "last.ckpt"
STAGE = "stage-{}.ckpt"


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` at the end of every epoch and, within epochs, every so many minutes; `stage-1.ckpt` and so on
    at the end of each stage of a `CaptionModule`.

    `ModelCheckpoint(save_last=True)` is no replacement: its `last.ckpt` is of the last epoch that was among the best.

    Only after an optimiser step: gradients that are still being gathered are not part of a checkpoint, and a run that
    is resumed without them would not end with the weights of an unbroken one.

    Args:
        minutes: between two checkpoints; 0: after every step.
        dirpath: folder; default: `checkpoints` in the run's folder.

    Raises:
        ConfigError: for a time below 0.
    """

    def __init__(self, *, minutes: float = 15.0, dirpath: str | None = None) -> None:
        if not 0 <= minutes < math.inf:
            raise ConfigError(f"last_checkpoint.minutes must be at least 0, got {minutes}")
        self.minutes, self.dirpath = minutes, dirpath
        self._written = time.monotonic()
        self._path = Path()

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie; known from `setup` on."""
        return self._path.parent

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Choose the place.

        Args:
            trainer: of the run.
            pl_module: not used.
            stage: of Lightning.
        """
        folder = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self._path = Path(trainer.strategy.broadcast(str(folder))) / LAST

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._written = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write when it is time and no gradient is under way.

        Args:
            trainer: of the run.
            pl_module: not used.
            outputs: of the step.
            batch: that was trained on.
            batch_idx: its number.
        """
        # After the last step of an epoch comes the checkpoint of its end: Lightning, resumed between the two, would
        # leave the validation out.
        if trainer.is_last_batch or trainer.fit_loop._should_accumulate():
            return
        # The main process's clock decides: all must take part in a checkpoint.
        if trainer.strategy.broadcast(time.monotonic() - self._written >= 60 * self.minutes):
            self._write(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the state after the epoch and its validation; that of a stage's last epoch stays."""
        self._write(trainer)
        plan = getattr(pl_module, "plan", None)  # another module has no stages
        if isinstance(plan, StagePlan) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            position = plan.at(trainer.current_epoch)
            if trainer.current_epoch + 1 == position.first_epoch + position.stage.epochs:
                trainer.save_checkpoint(self._path.with_name(STAGE.format(position.index + 1)))

    def _write(self, trainer: lightning.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._path)
        self._written = time.monotonic()
