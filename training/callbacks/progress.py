"""How long a run will still take. Lightning's progress bars tell it for the epoch alone, its Timer for a time limit."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning
from torch import Tensor

_LOG = logging.getLogger(__name__)
MAX_WINDOW = 10_000


class RemainingTime:
    """Estimates the rest of a run from the rate of its latest steps.

    The window is one epoch: it holds a whole validation, and forgets a faster or slower stage before.

    Args:
        total: step at which the run ends.
        window: steps whose rate is taken.
    """

    def __init__(self, *, total: int, window: int) -> None:
        self.total = total
        self._points: deque[tuple[float, int]] = deque(maxlen=window + 1)

    def add(self, time_s: float, step: int) -> float | None:
        """Take in that a step is finished.

        Args:
            time_s: of a clock that never goes back.
            step: number of finished steps.

        Returns:
            Seconds until the end, at least 0; None as long as no step has been timed.
        """
        if self._points and step <= self._points[-1][1]:  # a batch whose gradients were only accumulated
            return None
        self._points.append((time_s, step))
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        if last == first:
            return None
        return (last_s - first_s) / (last - first) * max(0, self.total - last)


class RunEta(lightning.Callback):
    """Shows in the progress bar the minutes until the end of the run, as `eta_min`.

    A later stage with slower steps is not foreseen: the figure holds for steps as they are now.
    """

    def __init__(self) -> None:
        self._remaining: RemainingTime | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock.

        Args:
            trainer: of the run.
            pl_module: not used.
        """
        total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        if not 0 < total < math.inf:
            _LOG.warning("RunEta: no time to the end is shown, for the run has no last step; set trainer.max_steps")
            self._remaining = None
            return
        steps = min(batches, MAX_WINDOW * trainer.accumulate_grad_batches) / trainer.accumulate_grad_batches
        self._remaining = RemainingTime(total=int(total), window=max(1, math.ceil(steps)))
        self._remaining.add(time.monotonic(), trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show what is left.

        Args:
            trainer: of the run.
            pl_module: through which it is shown.
            outputs: not used.
            batch: not used.
            batch_idx: not used.
        """
        left_s = None if self._remaining is None else self._remaining.add(time.monotonic(), trainer.global_step)
        if left_s is not None:
            pl_module.log("eta_min", left_s / 60, prog_bar=True, logger=False, on_step=True, on_epoch=False)
