"""Whole files or none: what is written has its name only when all of it is on the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from captioner.errors import CheckpointError

# Of a file that is being written; one that a killed process leaves is overwritten when the file is written again.
PARTIAL = ".partial"


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file under another name, bring it to the disk, and give it its name; until then the old one stands.

    Args:
        path: of the file; its folder is made when it is not there. One process writes it at a time.
        content: all of it.

    Raises:
        OSError: when it cannot be written, such as for a full disk. The old file, if any, is untouched.
    """
    partial = path.with_name(path.name + PARTIAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def not_written(path: Path, size: int, fault: OSError, *, remedy: str) -> CheckpointError:
    """Return the error of a file that could not be written, with what is free on its disk.

    Args:
        path: of the file.
        size: of the file, bytes.
        fault: what `write_whole` raised.
        remedy: what to do.

    Returns:
        The error, of one line.
    """
    free = ""
    with contextlib.suppress(OSError):  # no folder, no figure
        free = f"{_megabytes(shutil.disk_usage(path.parent).free)} are free there; "
    return CheckpointError(
        f"{path}: {_megabytes(size)} could not be written: {fault.strerror or fault}; {free}{remedy}"
    )


def _sync_folder(folder: Path) -> None:
    # The new name is an entry of the folder, which a power cut can lose too. Only POSIX lets a folder be opened.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
