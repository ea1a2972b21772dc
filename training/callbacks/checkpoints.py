"""Checkpoints that a full disk cannot spoil."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO

from training.callbacks.files import not_written, write_whole


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, brings it to the disk, and then gives it its name.

    Lightning's own way (2.6, over fsspec) writes into the folder for temporary files and moves the file from there.
    Where that folder is on another disk, the move is a copy onto the final name: a disk that is full by then leaves
    half a checkpoint there, and where the name was taken, as with `last.ckpt`, the good one is gone. This one leaves
    the old file as it was. It needs room for one checkpoint more, as Lightning does, but none among temporary files.

    Addresses that are no local path, such as s3://, are written by Lightning, whose transactions hold there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; Lightning calls it on the main process alone.

        Args:
            checkpoint: of the trainer.
            path: of the file.
            storage_options: for other places than a local disk; see Lightning.

        Raises:
            CheckpointError: when it cannot be written, such as for a full disk: one line with what is free and how to
                resume. An older file of the name is untouched.
        """
        if storage_options is not None or not _is_local_file_protocol(str(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # In memory first, as Lightning does: torch turns an OSError of the disk into a RuntimeError without a reason.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        place = Path(path)
        try:
            write_whole(place, content.getbuffer())
        except OSError as err:
            raise not_written(place, content.tell(), err, remedy=_remedy(place.parent)) from err


def _remedy(folder: Path) -> str:
    written = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not written:
        return "make room and start again, no checkpoint had been written"
    return f"make room, then resume with --ckpt_path {written[-1]}"
