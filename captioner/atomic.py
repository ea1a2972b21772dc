"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears at once and whole, or not at all.

    Args:
        path: of the file; one that is there is replaced. Its folder must be there.

    Yields:
        The file to write to.

    Raises:
        OSError: when it cannot be written, as on a full disk; nothing is left then.
    """
    # The name is a function of the path, so that what a killed run left is written over by the next.
    part = path.with_name(f".captioner-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.part")
    part.unlink(missing_ok=True)
    try:
        with part.open("xb") as file:
            with contextlib.suppress(FileNotFoundError):
                part.chmod(path.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
