"""One tar file of samples, in the format of WebDataset, read from its beginning to its end and never unpacked.

A sample is the run of files that share a name up to its first dot (Aizman et al. 2019, "High performance I/O for large
scale deep learning"): `000017.jpg` beside `000017.txt` (one caption per line) or `000017.json`
(`{"captions": [...]}` or `{"caption": "..."}`); the text comes first where there are both. Other files are passed over.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from captioner.errors import DataError
from captioner.images import DEFAULT_LIMITS
from training.sources import BadPicture, printable

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
_CAPTIONS = ("txt", "json")
_BLOCK = 512  # of a tar file, bytes (POSIX.1-2001, pax)


@dataclass(frozen=True)
class StreamedPicture:
    """A picture from a tar file.

    Args:
        name: "SHARD.tar/PICTURE.jpg", printable.
        data: the bytes of the picture's file, not decoded.
        captions: at least one, as written, without space around them.
    """

    name: str
    data: bytes
    captions: tuple[str, ...]


class _DamageError(Exception):
    """The rest of a tar file cannot be read."""


@dataclass
class _Sample:
    """Files of one sample, as they come.

    Args:
        key: what their names share.
        pictures: names of the files that are pictures.
        data: bytes of the last of them.
        texts: bytes of the files with captions, by extension.
        faults: what is wrong so far.
    """

    key: str
    pictures: list[str] = field(default_factory=list)
    data: bytes = b""
    texts: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def read_tar(shard: Path, *, with_data: bool) -> Iterator[StreamedPicture | BadPicture]:
    """Stream the samples of one tar file.

    Args:
        shard: the file.
        with_data: False leaves `StreamedPicture.data` empty, for the captions alone.

    Yields:
        Its samples, and what is bad in their place: a damaged file ends with a `BadPicture`.

    Raises:
        DataError: when the file is missing, or holds no sample.
    """
    sample: _Sample | None = None
    damage = ""
    found = 0
    try:
        for name, member, tar in _members(shard, stream=with_data):
            key, extension = _split_name(name)
            if extension not in PICTURES + _CAPTIONS:
                continue
            if sample is None or sample.key != key:
                if sample is not None:
                    found += 1
                    yield _finish(sample, shard)
                sample = _Sample(key)
            _add(sample, name, extension, member, tar, with_data)
    except _DamageError as err:
        damage = str(err)
    last = None if sample is None else _finish(sample, shard)
    # What the damage cuts off says nothing about the sample.
    if last is not None and not (damage and isinstance(last, BadPicture)):
        found += 1
        yield last
    if not found:
        raise DataError(
            f"{shard}: {damage or 'no pictures with captions in it'}; give a tar file of samples, uncompressed"
        )
    if damage:
        yield BadPicture(shard.name, f"{shard}: {damage}; what follows is lost: make or copy the file again")


def _members(shard: Path, *, stream: bool) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
    try:
        file = shard.open("rb")
    except OSError as err:
        raise DataError(f"{shard}: cannot be read: {err.strerror}; give an existing tar file") from err
    with file:
        size = os.fstat(file.fileno()).st_size
        tar = _opened(file, stream)
        with tar:
            while (member := _next(tar)) is not None:
                # Checked here, because tarfile would pass over a false size in small steps for years, and go in
                # circles where it is negative.
                if tar.offset <= member.offset:
                    raise _DamageError(f"the tar file is damaged at byte {member.offset} (a negative size)")
                if tar.offset > size:
                    raise _DamageError(f"the tar file ends within {printable(member.name)}")
                yield member.name.removeprefix("./"), member, tar
                tar.members = []  # type: ignore[attr-defined]  # It would remember every file, for random access.
            _check_end(file, tar.offset)


def _opened(file: IO[bytes], stream: bool) -> tarfile.TarFile:
    try:
        # To read captions alone, the pictures between them are jumped over.
        return tarfile.open(fileobj=file, mode="r|") if stream else tarfile.open(fileobj=file, mode="r:")
    except Exception as err:  # tarfile raises nearly anything on damaged bytes.
        raise _DamageError(f"not a tar file ({printable(str(err))})") from err


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except Exception as err:  # tarfile raises nearly anything on damaged bytes.
        raise _DamageError(f"the tar file is damaged at byte {tar.offset} ({_reason(err)})") from err


def _reason(err: Exception) -> str:
    return printable(str(err)) or type(err).__name__


def _check_end(file: IO[bytes], offset: int) -> None:
    """Tell the end of a tar from damage, which tarfile takes for an end too: empty blocks, and nothing after them."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise _DamageError("the tar file is cut off: it has no end mark")
    while block:
        if block.strip(b"\0"):
            raise _DamageError(f"the tar file is damaged near byte {offset}, or two were joined there")
        block = file.read(2**16)


def _split_name(name: str) -> tuple[str, str]:
    """Return the key and the extension; a hidden file, or one without a dot, has no extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _add(
    sample: _Sample, name: str, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile, with_data: bool
) -> None:
    is_picture = extension in PICTURES
    if is_picture:
        sample.pictures.append(name)
    name = printable(name)
    if not member.isreg() or member.issparse():
        sample.faults.append(f"{name} is a link, a folder or a sparse file; put the file itself into the tar")
    elif member.size > DEFAULT_LIMITS.max_bytes:
        sample.faults.append(f"{name} is over the limit of {DEFAULT_LIMITS.max_bytes} bytes; make it smaller")
    elif len(sample.pictures) > 1 or extension in sample.texts:
        sample.faults.append(f"{name} is a second file of its kind; keep one")
    elif not is_picture:
        sample.texts[extension] = _bytes(tar, member)
    elif with_data:
        sample.data = _bytes(tar, member)


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = tar.extractfile(member)
        return b"" if file is None else file.read()
    except Exception as err:  # tarfile raises nearly anything on damaged bytes.
        raise _DamageError(f"the tar file is damaged within {printable(member.name)} ({_reason(err)})") from err


class _FaultError(Exception):
    """A sample cannot be used."""


def _finish(sample: _Sample, shard: Path) -> StreamedPicture | BadPicture:
    name = f"{shard.name}/{printable(sample.pictures[0] if sample.pictures else sample.key)}"
    faults = list(sample.faults)
    if not sample.pictures or not sample.texts:
        kind = "a picture without captions" if sample.pictures else "captions without a picture"
        faults.append(f"{kind}; the files of a sample must lie side by side in the tar")
    if not faults:
        try:
            return StreamedPicture(name, sample.data, _captions(sample.texts))
        except _FaultError as err:
            faults.append(str(err))
    return BadPicture(name, f"{name}: {faults[0]}")


def _captions(texts: dict[str, bytes]) -> tuple[str, ...]:
    extension = "txt" if "txt" in texts else "json"
    try:
        text = texts[extension].decode("utf-8-sig")
        found = text.split("\n") if extension == "txt" else _json_captions(json.loads(text))
    except UnicodeDecodeError as err:
        raise _FaultError(f"its {extension} is not UTF-8 text at byte {err.start}; save it as UTF-8") from err
    except (ValueError, RecursionError) as err:
        raise _FaultError(f"its json cannot be read ({getattr(err, 'msg', err)}); correct it") from err
    captions = tuple(caption.strip() for caption in found if caption.strip())
    if not captions:
        raise _FaultError(f"no caption in its {extension}; write at least one")
    return captions


def _json_captions(content: object) -> list[str]:
    if isinstance(content, dict):
        found = content.get("captions", content.get("caption"))
        found = [found] if isinstance(found, str) else found
        if isinstance(found, list) and all(isinstance(caption, str) for caption in found):
            return found
    raise _FaultError('its json must hold {"captions": ["...", ...]} or {"caption": "..."}')
