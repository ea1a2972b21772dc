"""Pictures in zip and tar files, read without unpacking anything to disk. A member's name is only a name.

    zip                        listed from its directory; a member is found by its place and unpacked alone
    tar                        listed header by header; a member is a stretch of the file
    tar.gz, .bz2, .xz, .zst    one stream, read once: a member's bytes are held by what names it

So another process reads a member of a zip or tar for the price of opening the file. Archives may be hostile: count,
sizes and growth are limited (`ArchiveLimits`) before anything is unpacked.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, cast

from captioner.errors import ConfigError, DataError, ImageReadError
from captioner.manifests import printable

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_CHUNK = 2**20
_LONGEST_HEADER = 2**20  # of a tar member with its extensions, bytes


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """How large an archive may be.

    Args:
        max_members: the most entries of an archive, folders and other files included.
        max_member_bytes: the most bytes of a picture, packed and unpacked; a larger one is a bad picture.
        max_total_bytes: the most bytes of all members together, unpacked.
        max_ratio: how many times its own size an archive may unpack to; not looked at while all members together
            stay below `max_member_bytes`.

    Raises:
        ConfigError: for a limit that is not a number, at least 1.
    """

    max_members: int = 1_000_000
    max_member_bytes: int = 100 * 2**20
    max_total_bytes: int = 2**40
    max_ratio: int = 200

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}")


DEFAULT_ARCHIVE_LIMITS = ArchiveLimits()


# --- What a member holds, and how it is read later. Messages lack the picture's name. ---


@dataclass(frozen=True)
class ZipContent:
    """A member of a zip.

    Args:
        offset: of its header, bytes.
        method: of its compression, by number.
        packed_bytes: its size in the zip.
        size_bytes: its size unpacked.
        crc: CRC-32 of the unpacked bytes.
    """

    offset: int
    method: int
    packed_bytes: int
    size_bytes: int
    crc: int

    def read(self, file: IO[bytes]) -> bytes:
        """Read the member.

        Args:
            file: the archive.

        Returns:
            Its bytes.

        Raises:
            ImageReadError: when it is damaged.
        """
        file.seek(self.offset)
        header = file.read(30)  # APPNOTE 4.3.7: local file header
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ImageReadError("the zip is damaged at this member; copy or pack it again")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        file.seek(self.offset + 30 + name_bytes + extra_bytes)
        packed = file.read(self.packed_bytes)
        try:
            # One byte more than is promised shows a false promise, and no more is ever unpacked.
            data = _UNPACKERS[self.method](packed, self.size_bytes + 1)
        except (zlib.error, OSError, EOFError, ValueError) as err:
            raise ImageReadError("damaged within the zip; copy or pack it again") from err
        if len(data) != self.size_bytes or zlib.crc32(data) != self.crc:
            raise ImageReadError("damaged within the zip (its checksum or size is wrong); copy or pack it again")
        return data


_UNPACKERS: dict[int, Callable[[bytes, int], bytes]] = {
    zipfile.ZIP_STORED: lambda packed, most: packed[:most],
    zipfile.ZIP_DEFLATED: lambda packed, most: zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, most),
    zipfile.ZIP_BZIP2: lambda packed, most: bz2.BZ2Decompressor().decompress(packed, most),
}


@dataclass(frozen=True)
class TarContent:
    """A member of a tar that is not compressed.

    Args:
        offset: of its first byte.
        size_bytes: how many bytes it has.
    """

    offset: int
    size_bytes: int

    def read(self, file: IO[bytes]) -> bytes:
        """Read the member.

        Args:
            file: the archive.

        Returns:
            Its bytes.

        Raises:
            ImageReadError: when the file ends before.
        """
        file.seek(self.offset)
        data = file.read(self.size_bytes)
        if len(data) < self.size_bytes:
            raise ImageReadError("the tar file ends within it; copy or pack it again")
        return data


@dataclass(frozen=True)
class HeldContent:
    """A member whose bytes are at hand.

    Args:
        data: its bytes.
    """

    data: bytes = field(repr=False)


@dataclass(frozen=True)
class NoContent:
    """What cannot be read, and why.

    Args:
        message: fault and remedy.
    """

    message: str


Content = ZipContent | TarContent | HeldContent | NoContent


@dataclass(frozen=True)
class Member:
    """A file in an archive.

    Args:
        name: as the archive has it, without a leading "./".
        size_bytes: unpacked.
        content: how to read it; None for a link, which holds nothing itself.
    """

    name: str
    size_bytes: int
    content: Content | None


def is_archive(path: Path) -> bool:
    """Tell an archive by its name.

    Args:
        path: of a file.

    Returns:
        Whether it is one.
    """
    return path.name.lower().endswith((".zip", *_TAR_SUFFIXES))


def check_archive(path: Path, limits: ArchiveLimits) -> None:
    """Open an archive and read its beginning (of a zip: its directory).

    Args:
        path: of the archive.
        limits: of it.

    Raises:
        DataError: when it is missing, damaged there, of a kind that cannot be read, or exceeds a limit.
    """
    for _ in read_members(path, limits, lambda name: True):
        return


def read_members(path: Path, limits: ArchiveLimits, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """List the files of an archive, in its order.

    Args:
        path: of the archive.
        limits: of it.
        wanted: says by the name which are listed.

    Yields:
        The wanted members; folders and devices are passed over.

    Raises:
        DataError: when the archive cannot be read, exceeds a limit, or is damaged, after what comes before the damage.
    """
    label = printable(str(path))
    reader = _zip_members if path.name.lower().endswith(".zip") else _tar_members
    try:
        with path.open("rb") as file:
            tally = _Tally(label, limits, path.stat().st_size)
            yield from reader(file, label, tally, wanted)
    except OSError as err:
        raise DataError(f"{label}: cannot be read ({printable(err.strerror or str(err))}); check the archive") from err
    except _DamageError as err:
        raise DataError(f"{label}: {err}; copy or pack the archive again") from err.__cause__


class _DamageError(Exception):
    """The rest of an archive cannot be read."""


class _Tally:
    """Counts what an archive unpacks to.

    Args:
        label: the archive in messages.
        limits: of it.
        archive_bytes: its own size.
    """

    def __init__(self, label: str, limits: ArchiveLimits, archive_bytes: int) -> None:
        self.label = label
        self.limits = limits
        self._most_by_ratio = max(limits.max_member_bytes, limits.max_ratio * archive_bytes)
        self._members = 0
        self._bytes = 0

    def add(self, size_bytes: int) -> None:
        self._members += 1
        self._bytes += size_bytes
        if self._members > self.limits.max_members:
            self._refuse(f"more than the limit of {self.limits.max_members} members", "max_members")
        if self._bytes > self.limits.max_total_bytes:
            self._refuse(f"it unpacks to more than the limit of {self.limits.max_total_bytes} bytes", "max_total_bytes")
        if self._bytes > self._most_by_ratio:
            self._refuse(f"it unpacks to more than {self.limits.max_ratio} times its own size", "max_ratio")

    def _refuse(self, fault: str, limit: str) -> None:
        option = f"--{limit.replace('_', '-')}"
        raise DataError(f"{self.label}: {fault}; if you trust the archive, raise {option} (ArchiveLimits.{limit})")

    def content(self, content: Content, *sizes_bytes: int) -> Content:
        """Return the content of a member, or why it is too large."""
        most = self.limits.max_member_bytes
        if max(sizes_bytes) <= most:
            return content
        return NoContent(f"over the limit of {most} bytes; make it smaller or raise --max-member-bytes")


# --- zip ---


def _zip_members(file: IO[bytes], label: str, tally: _Tally, wanted: Callable[[str], bool]) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except Exception as err:  # zipfile raises nearly anything on damaged bytes.
        raise _DamageError(f"not a zip file, or its end is missing ({_reason(err)})") from err
    for info in infos:
        tally.add(info.file_size)
    for info in infos:
        name = info.filename.removeprefix("./")
        if not info.is_dir() and wanted(name):
            yield Member(name, info.file_size, _zip_content(info, tally))


def _zip_content(info: zipfile.ZipInfo, tally: _Tally) -> Content | None:
    if stat.S_ISLNK(info.external_attr >> 16):  # the upper half holds the mode of Unix
        return None
    if info.flag_bits & 0x1:
        return NoContent("encrypted within the zip; unpack it first")
    if info.compress_type not in _UNPACKERS:
        return NoContent(f"compressed by a rare method ({info.compress_type}); pack the zip again with deflate")
    content = ZipContent(info.header_offset, info.compress_type, info.compress_size, info.file_size, info.CRC)
    return tally.content(content, info.compress_size, info.file_size)


# --- tar ---


class _StrictTarInfo(tarfile.TarInfo):
    """A header; what `tarfile` takes for the end of the archive although it is none is an error here."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as err:
            if type(err).__name__ == "EOFHeaderError":  # a block of zeros
                raise
            raise _DamageError(f"damaged at byte {archive.offset}, or cut off there ({_reason(err)})") from err


class _Tape:
    """A file as `tarfile` reads it: forward, but for the byte before the next header.

    Args:
        file: the tar file, unpacked while it is read.
        seekable: False when to seek is to read what lies between.
    """

    def __init__(self, file: IO[bytes], *, seekable: bool) -> None:
        self._file = file
        self._seekable = seekable
        self._at = 0
        self._last = b""  # the byte before `_at`
        self._again = False

    def tell(self) -> int:
        return self._at - self._again

    def seek(self, to: int) -> None:
        if self._seekable:
            self._at = self._file.seek(to)
            return
        self._again = to == self._at - 1
        while self._at < to and self._advance(min(_CHUNK, to - self._at)):
            pass

    def read(self, size: int) -> bytes:
        """Return the bytes of a header; a false size must not fill the memory."""
        if size > _LONGEST_HEADER:
            raise _DamageError(f"a header of {size} bytes at byte {self._at}")
        return self.take(size)

    def take(self, size: int) -> bytes:
        """Return bytes, fewer only at the end."""
        parts = [self._last] if self._again else []
        self._again = False
        wanted = size - len(parts)
        while wanted and (part := self._advance(min(_CHUNK, wanted))):
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    def _advance(self, size: int) -> bytes:
        part = self._file.read(size)
        self._at += len(part)
        self._last = part[-1:] or self._last
        return part


def _tar_members(file: IO[bytes], label: str, tally: _Tally, wanted: Callable[[str], bool]) -> Iterator[Member]:
    unpacked = _unpacked(file)
    packed = unpacked is not file
    size_bytes = None if packed else file.seek(0, 2)
    file.seek(0)
    tape = _Tape(unpacked, seekable=not packed)
    with unpacked:
        archive = _attempt(
            lambda: tarfile.TarFile(
                fileobj=cast("IO[bytes]", tape),
                tarinfo=_StrictTarInfo,
                encoding="utf-8",
                errors="surrogateescape",
            ),
            "not a tar file",
        )
        while (info := _attempt(archive.next, "damaged")) is not None:
            name = info.name.removeprefix("./")
            if archive.offset <= info.offset:
                raise _DamageError(f"damaged at byte {info.offset} (a negative size)")
            if size_bytes is not None and archive.offset > size_bytes:
                raise _DamageError(f"cut off within {printable(name)}")
            archive.members = []  # It would remember every header.
            tally.add(archive.offset - info.offset)  # A sparse file claims more than it takes.
            if wanted(name) and not info.isdir() and not info.isdev():
                yield Member(name, info.size, _tar_content(info, tape if packed else None, tally))
        _attempt(lambda: _check_end(tape), "damaged at its end")


def _check_end(tape: _Tape) -> None:
    """Tell the padding at the end from what was lost behind it; reading it also checks a checksum of the whole."""
    for _ in range(4):  # Padding is of some kilobytes, and no reason to unpack a bomb.
        if tape.take(_CHUNK).strip(b"\0"):
            raise _DamageError("more follows the end of the tar: it is damaged, or two were joined")


def _tar_content(info: tarfile.TarInfo, tape: _Tape | None, tally: _Tally) -> Content | None:
    if info.issym() or info.islnk():
        return None
    if info.issparse():
        return NoContent("a sparse file within the tar; unpack it first")
    place = TarContent(info.offset_data, info.size)
    content = tally.content(place, info.size)
    if tape is None or content is not place:
        return content

    def held() -> bytes:
        tape.seek(place.offset)
        return tape.take(place.size_bytes)

    data = _attempt(held, "damaged")
    if len(data) < info.size:
        raise _DamageError(f"cut off within {printable(info.name)}")
    return HeldContent(data)


def _attempt(step: Callable[[], Any], fault: str) -> Any:
    try:
        return step()
    except (_DamageError, DataError):
        raise
    except Exception as err:  # tarfile and the unpackers raise nearly anything on damaged bytes.
        raise _DamageError(f"{fault} ({_reason(err)})") from err


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    magic = file.read(6)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=file))
    if magic[:3] == b"BZh":
        return cast("IO[bytes]", bz2.BZ2File(file))
    if magic == b"\xfd7zXZ\0":
        return cast("IO[bytes]", lzma.LZMAFile(file))
    if magic[:4] == b"\x28\xb5\x2f\xfd":
        try:
            return cast("IO[bytes]", importlib.import_module("compression.zstd").ZstdFile(file))
        except ImportError as err:
            raise _DamageError("compressed with zstd, which needs Python 3.14: unpack it to .tar first") from err
    return file


def _reason(err: BaseException) -> str:
    return printable(str(err)) or type(err).__name__
