"""How much the folder of uploads may hold: a running count, the oldest files make room, the rest is refused.

upload ──begin──▶ is there room? old files go ──▶ parts are counted as they come ──end──▶ what broke off is deleted
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from captioner.exchange import Exchange, Refusal

FILE_BYTES = 8 * 2**10
"""What a file and its folder take, however small it is."""
RETRY_S = 60
_FULL = {errno.ENOSPC, errno.EDQUOT}


class UploadSpace:
    """Keeps the uploads within a limit. For one event loop.

    Args:
        folder: of the uploaded files.
        most_bytes: that they may take together.
        kept_s: how long a file is safe from making room: somebody may just be asking about it.
    """

    def __init__(self, folder: Path, *, most_bytes: int, kept_s: float) -> None:
        self._folder, self._most_bytes, self._kept_s = folder, most_bytes, kept_s
        self._used_bytes = most_bytes  # until the folder is looked into, before the first upload
        self._open, self._broken = 0, False
        self._looking = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def upload(self, exchange: Exchange, expected_bytes: int) -> AsyncIterator[Callable[[bytes], None]]:
        """Let one upload in.

        Args:
            exchange: that brings it.
            expected_bytes: of its body.

        Yields:
            What is to be told of each part of the body.

        Raises:
            Refusal: 507 where there is no room for it, or none on the disk.
        """
        await self._make_room(expected_bytes + FILE_BYTES)
        self._open += 1
        try:
            yield self._count
        except OSError as err:
            if err.errno not in _FULL:
                raise
            raise _full() from err
        finally:
            self._open -= 1
            self._broken |= exchange.status != 200
            if self._broken and not self._open:
                self._broken = False
                self._delete_parts()

    def _count(self, part: bytes) -> None:
        self._used_bytes += len(part) + FILE_BYTES * part.count(b"filename")
        if self._used_bytes > self._most_bytes:
            raise _full()

    async def _make_room(self, wanted_bytes: int) -> None:
        async with self._looking:
            if self._used_bytes + wanted_bytes > self._most_bytes:
                # The count is too high by what was deleted since: the folder itself is asked.
                self._used_bytes = await asyncio.to_thread(self._evict, wanted_bytes)
        if self._used_bytes + wanted_bytes > self._most_bytes:
            raise _full()

    def _evict(self, wanted_bytes: int) -> int:
        """Delete the oldest files until there is room; return how much is left."""
        files = []
        for folder, _, names in os.walk(self._folder):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(OSError):  # it is gone already
                    found = path.lstat()
                    files.append((found.st_mtime, found.st_size + FILE_BYTES, path))
        used_bytes = sum(size_bytes for _, size_bytes, _ in files)
        latest_s = time.time() - self._kept_s
        for changed_s, size_bytes, path in sorted(files):
            if used_bytes + wanted_bytes <= self._most_bytes or changed_s > latest_s:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                used_bytes -= size_bytes
                if path.parent != self._folder:
                    path.parent.rmdir()
        return used_bytes

    def _delete_parts(self) -> None:
        """Delete what an upload that broke off has left: whole files lie in folders of their own."""
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.is_file() and not path.is_symlink():
                    path.unlink(missing_ok=True)


def _full() -> Refusal:
    return Refusal(507, "StorageFull", "there is no room for more uploads; try again later", RETRY_S)
