"""What stands in a journal: its lines, the hashes in them, and which header goes on with which.

    {"format": ..., "version": 2, ...}          the header: whatever makes records differ
    {"pictures": [Entry, ...], "crc32": ...}    a batch whose records are safely on disk
    {"intended": {name: texts}}                 what the files of a batch will hold, before they are written
    {"table": ".csv", "hash": ...}              a table that is about to be put in place
    {"finished": {...}}                         a run has seen its whole source
    {"overwriting": false}                      and it was one that was to overwrite

Names and texts stand there as hashes, so that a line is short.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from captioner.errors import ConfigError

FORMAT, VERSION = "captioner batch", 2
READ = (1, 2)
"""Versions that are read: the first had no hashes of texts and tables."""
TEXT_BYTES = 9
"""Of the hash of a text: one byte for its kind, eight of the hash itself."""

COPIED = 1000
"""Pictures in a line of the journal that is written anew."""

REMEDY = "--overwrite starts anew; or name another output"


class Entry(NamedTuple):
    """What the journal keeps of a picture.

    Args:
        name: hash of the picture's name, 16 bytes.
        state: hash of its size and time of change, 8 bytes.
        place: its place in the whole source, from 0.
        kind: of the error; empty when it was captioned.
        length: of its record, bytes.
        texts: what its files hold, as far as we wrote it: `captioner.xmp.text_hash`es, one after another.
    """

    name: bytes
    state: bytes
    place: int
    kind: str
    length: int
    texts: bytes = b""

    def to_json(self) -> list[Any]:
        """Return plain values; `from_json` is the inverse."""
        values = [self.name.hex(), self.state.hex(), self.place, self.kind, self.length]
        return [*values, self.texts.hex()] if self.texts else values

    @classmethod
    def from_json(cls, values: list[Any]) -> Entry:
        """Return the entry that `to_json` wrote."""
        name, state, place, kind, length, *texts = values
        return cls(
            bytes.fromhex(name),
            bytes.fromhex(state),
            int(place),
            str(kind),
            int(length),
            bytes.fromhex(texts[0]) if texts else b"",
        )


class Known(NamedTuple):
    """What is on record of a picture.

    Args:
        state: its `state_hash` then.
        kind: of its error; empty when it was captioned.
    """

    state: bytes
    kind: str


def name_hash(name: str) -> bytes:
    """Return the hash by which a picture is known, the same on every machine."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def state_hash(size_bytes: int | None, mtime_ns: int | None) -> bytes:
    """Return a hash that differs when a picture has changed."""
    return hashlib.blake2b(f"{size_bytes} {mtime_ns}".encode(), digest_size=8).digest()


def pieces(texts: bytes) -> set[bytes]:
    """Return the single hashes of `Entry.texts`."""
    return {texts[at : at + TEXT_BYTES] for at in range(0, len(texts), TEXT_BYTES)}


def encode(record: Mapping[str, Any]) -> bytes:
    """Return a line of JSON, in ASCII: valid whatever a file's name is."""
    return json.dumps(record).encode("ascii") + b"\n"


def batch_line(entries: Iterable[Entry], data: bytes) -> bytes:
    """Return the line of a batch."""
    return encode({"pictures": [entry.to_json() for entry in entries], "crc32": zlib.crc32(data)})


def lines_of(progress: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the whole lines of a journal and where each ends.

    Args:
        progress: path of the journal.

    Yields:
        Content and end; half a line at the end is passed over.

    Raises:
        ConfigError: when a line is no JSON.
    """
    end = 0
    with progress.open("rb") as file:
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return  # the process ended while it was written
            try:
                content = json.loads(line)
            except ValueError as err:
                raise ConfigError(f"{progress}: damaged; {REMEDY}") from err
            yield content, end


def copied(parts: Iterable[tuple[Entry, int, Path]]) -> Iterator[tuple[list[Entry], bytes]]:
    """Yield batches of entries and their records, read from where they are.

    Args:
        parts: entry, where its record begins, and in which file.

    Yields:
        As many as make a line of the journal, with their records.
    """
    batch: list[Entry] = []
    data = bytearray()
    with contextlib.ExitStack() as stack:
        files: dict[Path, IO[bytes]] = {}
        for entry, begin, path in parts:
            if path not in files:
                files[path] = stack.enter_context(path.open("rb"))
            files[path].seek(begin)
            data += files[path].read(entry.length)
            batch.append(entry)
            if len(batch) == COPIED:
                yield batch, bytes(data)
                batch, data = [], bytearray()
    if batch:
        yield batch, bytes(data)


_RECORD = b'{"image": '


def may_be_ours(line: bytes) -> bool:
    """Tell a record, or what a killed process or a power cut left of one, from a line of somebody else's.

    Args:
        line: of the record file, behind the last batch.

    Returns:
        Whether it may be lost without harm: its picture is captioned again.
    """
    if b"\0" in line:  # a file that has grown by a power cut, but not been filled
        return True
    if not line.endswith(b"\n"):
        return line.startswith(_RECORD[: len(line)])
    try:
        return line.startswith(_RECORD) and encode(json.loads(line)) == line
    except ValueError:
        return False


def compare(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], output: Path) -> None:
    """Refuse to mix records of two settings in one output.

    Args:
        before: header of the journal.
        now: that of this run.
        defaults: what settings are where a header does not name them.
        output: for the message.

    Raises:
        ConfigError: naming what differs.
    """
    # What an earlier version did not know was then as its default is.
    flat_before, flat_now = {**_flat(json.loads(json.dumps(defaults))), **_flat(before)}, _flat(now)
    changed = [
        "it was another model"
        if name == "model"
        else f"{name} was {json.dumps(flat_before.get(name))}, now {json.dumps(flat_now.get(name))}"
        for name in [*flat_now, *(name for name in _flat(before) if name not in flat_now)]
        if flat_before.get(name) != flat_now.get(name)
    ]
    if changed:
        raise ConfigError(f"{output}: was begun otherwise: {'; '.join(changed)}; keep to that, or {REMEDY}")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat
