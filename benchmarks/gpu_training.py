"""Figure 8: for what share of the time a GPU computes while `python -m training fit` trains the decoder.

The run is that of benchmarks/training_speed.py: cached features of a made data set, batches of 32 pictures with 5
captions. After a warm-up PyTorch's profiler notes when the card runs a kernel; two that run at once count once, copies
not at all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.figure import Figure, Settings, Value

if TYPE_CHECKING:
    from lightning import Callback

TITLE = "8. Share of the time of training in which a GPU computes"


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return how much of the line intervals cover, where they overlap once.

    Args:
        intervals: beginnings and ends.

    Returns:
        The length.
    """
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def make_watch(*, warm_up: int, steps: int) -> Callback:
    """Return a callback of Lightning that watches the steps after a warm-up; see its `busy_s`, `whole_s`, `steps`.

    Args:
        warm_up: steps before.
        steps: of the training in all.

    Returns:
        The callback.
    """
    import lightning

    class Watch(lightning.Callback):
        busy_s = whole_s = 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            on_gpu = pl_module.device.type == "cuda"
            if trainer.global_step == warm_up:
                _wait(on_gpu)
                activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
                self._profiler = torch.profiler.profile(activities=[activity])
                self._profiler.start()
                self._began_s = time.perf_counter()
            elif trainer.global_step == steps:
                _wait(on_gpu)
                self.whole_s = time.perf_counter() - self._began_s
                self._profiler.stop()
                self.busy_s = covered(_kernels_s(self._profiler, on_gpu=on_gpu))

    return Watch()


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _kernels_s(profiler: Any, *, on_gpu: bool) -> Iterable[tuple[float, float]]:
    """Return when kernels ran; on a CPU, which is for tests, when operators did."""
    from torch._C._autograd import DeviceType  # the type of what the profiler says; it has no public name

    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    for event in profiler.events():
        no_kernel = event.name.startswith(("Memcpy", "Memset")) or getattr(event, "is_user_annotation", False)
        if event.device_type == wanted and not no_kernel:
            yield event.time_range.start / 1e6, event.time_range.end / 1e6


def measure(settings: Settings) -> Figure:
    """Measure the share on the GPU; where there is none, say so.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    if not torch.cuda.is_available():
        return Figure(title=TITLE, absent="no CUDA GPU here")
    return train_watched(steps=settings.pick(300, 20), warm_up=settings.pick(100, 10), pictures=1280)


def train_watched(*, steps: int, warm_up: int, pictures: int) -> Figure:
    """Train, on the GPU where there is one, and measure the share.

    Args:
        steps: in all.
        warm_up: those that are not watched.
        pictures: in the data set.

    Returns:
        The figure.
    """
    from benchmarks.training_speed import PICTURES, make_training, quiet

    quiet()
    workers = min(8, (os.cpu_count() or 1) - 1) if torch.cuda.is_available() else 0
    given = argparse.Namespace(pictures=pictures, workers=workers, steps=steps)
    watch: Any = make_watch(warm_up=warm_up, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer, module, data = make_training(given, Path(folder), callback=watch)
        trainer.fit(module, datamodule=data)
    rate = PICTURES * (steps - warm_up) / watch.whole_s
    return Figure(
        title=TITLE,
        values=(
            Value(name="time in which the card computes", value=100 * watch.busy_s / watch.whole_s, unit="%", least=90),
            Value(name="rate", value=rate, unit="pictures/s"),
        ),
        notes=(f"{steps - warm_up} steps after {warm_up}, bf16-mixed, {workers} processes that read",),
    )
