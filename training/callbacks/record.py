"""What a run was: `run.json`, `scores.jsonl`, `bad_pictures.txt` in the run folder, beside Lightning's config.yaml."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import torch

from captioner.errors import CheckpointError
from training.callbacks.files import not_written, write_whole
from training.callbacks.protocols import data_of, in_training, module_of

_LOG = logging.getLogger(__name__)
RECORD, SCORES, BAD_PICTURES = "run.json", "scores.jsonl", "bad_pictures.txt"
PACKAGES = ("captioner", "torch", "torchvision", "lightning")


class RunRecord(lightning.Callback):
    """Writes down what a run was made of, how it ended, and the scores of every validation.

    `run.json` holds versions, command, seed, device, hash and size of the data, git commit, start, end, when each
    epoch was over ("epoch_ends"; not all epochs need be validated), and status: "running", "finished",
    "interrupted" (Ctrl+C, SIGTERM) or "failed" with the message. A run that was killed stays "running". A second
    run in the same folder keeps the records of the others in "earlier", and so does one that goes on from a
    checkpoint in the folder of another run, whose scores it copies too. `scores.jsonl` has a line for every
    validation, with the number of the run among all of them as "attempt": a resumed run writes those after its
    checkpoint again. `bad_pictures.txt` names the pictures that could not be used.

    Every file is replaced as a whole, and is whole at any time.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._record: dict[str, Any] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write the record of a run that begins.

        Args:
            trainer: of the run.
            pl_module: not used.
            stage: "fit" is recorded, everything else is not.

        Raises:
            CheckpointError: when the folder holds a `run.json` that is none, or cannot be written.
        """
        self._folder = None
        if stage != "fit":
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on all processes: it is sent to them
        if not trainer.is_global_zero:
            return
        earlier = _earlier(folder / RECORD)
        self._folder, self._record = folder, {**describe_run(trainer), "epoch_ends": {}, "earlier": earlier}
        self._write_record()

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take over record and scores of the run that is resumed, where its folder is another.

        Args:
            trainer: of the run; its checkpoint is loaded.
            pl_module: not used.

        Raises:
            CheckpointError: when that folder holds a `run.json` that is none, or its scores cannot be copied.
        """
        if self._folder is None or trainer.ckpt_path is None or self._record["earlier"]:
            return
        origin = Path(trainer.ckpt_path).resolve().parent.parent  # FOLDER/checkpoints/last.ckpt
        if origin == self._folder.resolve() or not (origin / RECORD).is_file():
            return
        self._record["earlier"] = _earlier(origin / RECORD)
        with contextlib.suppress(FileNotFoundError):  # it was not yet validated
            self._write(SCORES, _scores(origin / SCORES))
        self._write_record()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add the scores.

        Args:
            trainer: of the run.
            pl_module: whose scores they are.

        Raises:
            CheckpointError: when they cannot be written.
        """
        if self._folder is None or not in_training(trainer):
            return
        path = self._folder / SCORES
        line = {
            "attempt": len(self._record["earlier"]) + 1,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "time": _now(),
            "scores": {name: _number(score) for name, score in module_of(pl_module).scores.items()},
        }
        written = path.read_bytes() if path.exists() else b""
        self._write(SCORES, written + json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._write_bad_pictures(pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record that the epoch is over.

        Args:
            trainer: of the run.
            pl_module: not used.

        Raises:
            CheckpointError: when it cannot be written.
        """
        if self._folder is not None:
            self._record["epoch_ends"][str(trainer.current_epoch)] = _now()
            self._write_record()

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record that the run is finished.

        Args:
            trainer: of the run.
            pl_module: that was trained.

        Raises:
            CheckpointError: when it cannot be written.
        """
        if self._folder is not None:
            self._write_bad_pictures(pl_module)
            self._end(trainer, "finished")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Record why the run has ended.

        Args:
            trainer: of the run.
            pl_module: that was trained.
            exception: that ended it.
        """
        if self._folder is None:
            return
        try:
            self._write_bad_pictures(pl_module)
            if isinstance(exception, (KeyboardInterrupt, SystemExit)):  # Lightning's SIGTERMException is a SystemExit
                self._end(trainer, "interrupted")
            else:
                self._end(trainer, "failed", f"{type(exception).__name__}: {exception}")
        except CheckpointError as err:  # the fault that ended the run is the one to be raised
            _LOG.warning("RunRecord: %s", err)

    def _end(self, trainer: lightning.Trainer, status: str, message: str | None = None) -> None:
        self._record |= {
            "status": status,
            "message": message,
            "ended": _now(),
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
        }
        self._write_record()

    def _write_bad_pictures(self, pl_module: lightning.LightningModule) -> None:
        bad = module_of(pl_module).bad_pictures
        if bad:
            lines = (f"{name}\t{' '.join(message.split())}\n" for name, message in bad)
            self._write(BAD_PICTURES, "".join(lines).encode("utf-8", "backslashreplace"))

    def _write_record(self) -> None:
        self._write(RECORD, json.dumps(self._record, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace"))

    def _write(self, name: str, content: bytes) -> None:
        assert self._folder is not None
        path = self._folder / name
        try:
            write_whole(path, content)
        except OSError as err:
            raise not_written(path, len(content), err, remedy="make room, or choose another run folder") from err


def describe_run(trainer: lightning.Trainer) -> dict[str, Any]:
    """Return what a run that begins is made of, as plain values for JSON.

    Args:
        trainer: of the run; its data module has been set up.

    Returns:
        The fields of `run.json`, those of the end empty.
    """
    data, device = data_of(trainer), trainer.strategy.root_device
    seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning keeps it
    return {
        "status": "running",
        "message": None,
        "started": _now(),
        "ended": None,
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": git_commit(Path(__file__)),
        "seed": int(seed) if seed is not None else None,
        "device": {
            "type": device.type,
            "name": device_name(device),
            "cores": cores(),
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
        },
        "data_sha256": data.data_hash(),
        "pictures": {split: len(pictures) for split, pictures in data.pictures.items()},
    }


def device_name(device: torch.device) -> str:
    """Return what a device is sold as.

    Args:
        device: of torch.

    Returns:
        The name of the GPU, or of the processor as far as the system tells it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # there is such a file on Linux alone, and `platform` says little there
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def git_commit(file: Path) -> dict[str, Any] | None:
    """Return the commit that a file of code comes from.

    Args:
        file: of the code.

    Returns:
        The hash as "commit", and as "changed" whether tracked files differ from it; None when the file is not tracked
        by git, such as one that was installed, or git is not there.
    """

    def git(*arguments: str) -> str:
        # What a hook of git sets would point to another checkout.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        return subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
            env=environment,
        ).stdout

    try:
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "HEAD").strip()
        return {"commit": commit, "changed": bool(git("status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None


def _earlier(path: Path) -> list[dict[str, Any]]:
    # The records of the runs before this one in the folder, oldest first.
    if not path.exists():
        return []
    try:
        last: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return [*last.pop("earlier"), last]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as err:
        raise CheckpointError(f"{path}: not the record of a run; move it away") from err


def _scores(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as err:
        raise CheckpointError(
            f"{path}: cannot be read: {err.strerror or err}; make it readable, or move it away"
        ) from err


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # used from a checkout, not installed
        return None


def _number(score: float) -> float | None:
    # JSON has no nan and no infinity.
    value = float(score)
    return value if math.isfinite(value) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
