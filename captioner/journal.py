"""What a batch run has done, on disk, so that no end of it loses or doubles a record.

    captions.jsonl              the records, one line a picture, appended batch by batch
    captions.progress           the journal: a header, then one line for every batch whose records are safely on disk
    captions.progress.lock      held while a run writes

A batch is written in this order: records, fsync, its line of the journal, fsync. Whatever moment a process ends at,
records without a line, and half a line, are what the next run cuts off: it goes on at the border of a batch, so that
the model sees the batches of an unbroken run and gives the same numbers to the last bit.

Texts of single pictures, and tables, are ours as long as they hold what we wrote, and nobody else's work is replaced.
So a hash of every text is noted before its file is written (`intend`) and kept with its picture (`Entry.texts`), and
that of a table before the table is put in place (`claim`).

A record that is replaced (its picture has changed, or failed and is tried again) stays until the new one is on disk;
both are there until the run ends or the next one begins, when the new one takes the place of the old (`compact`).
Two files cannot be replaced at once, so a replacement is first written down as a whole:

    captions.progress.records   new records   ─┐ both complete, then the second rename decides: whoever finds a
    captions.progress.new       new journal   ─┘ captions.progress.new moves both into place (`_roll_forward`)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from captioner.entries import (
    FORMAT,
    READ,
    REMEDY,
    VERSION,
    Entry,
    Known,
    batch_line,
    compare,
    copied,
    encode,
    lines_of,
    may_be_ours,
    name_hash,
    pieces,
    state_hash,
)
from captioner.errors import CaptionerError, ConfigError

__all__ = ["Entry", "Journal", "Known", "disk_fault", "name_hash", "state_hash"]


class Journal:
    """The record file and the journal of one output; use it as a context manager, which holds the lock.

    Args:
        progress: path of the journal.
        records: path of the record file.
        earlier: where an earlier run may have put the records; they are renamed to `records`.

    Raises:
        CaptionerError: when another run writes to this output, or the disk fails.
    """

    def __init__(self, progress: Path, records: Path, *, earlier: Path | None = None) -> None:
        self.progress, self.records, self._earlier = progress, records, earlier
        self.header: dict[str, Any] = {}
        self.finished: dict[str, Any] | None = None
        self._known: dict[bytes, bytes] = {}  # state, error and texts in one object, of which there may be millions
        self._intended: dict[bytes, set[bytes]] = {}
        self._tables: dict[str, list[str]] = {}
        self._superseded = False
        self._end = self._journal_end = 0
        self._files: tuple[io.FileIO, io.FileIO] | None = None
        self._lock = FileLock(progress.with_name(f"{progress.name}.lock"), timeout=0)

    def __enter__(self) -> Journal:
        with self._disk(self.progress):
            self.progress.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as err:
                raise CaptionerError(
                    f"{self.records}: another run is writing to it; wait for its end, or name another output"
                ) from err
            try:
                self._roll_forward()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        finally:
            self._lock.release()

    @property
    def exists(self) -> bool:
        """Whether an earlier run has begun this output."""
        return self.progress.exists()

    def __len__(self) -> int:
        return len(self._known)

    def known(self, name: bytes) -> Known | None:
        """Return what is on record of a picture.

        Args:
            name: its `name_hash`.

        Returns:
            That; None when it is new.
        """
        found = self._known.get(name)
        return None if found is None else Known(found[:8], found[8:].partition(b"\0")[0].decode())

    def written(self, name: bytes) -> set[bytes]:
        """Return what we may have written into the files of a picture: last, or when a run was killed amid it.

        Args:
            name: its `name_hash`.

        Returns:
            Hashes, as they were given to `intend` or in `Entry.texts`.
        """
        return pieces(self._known.get(name, b"")[8:].partition(b"\0")[2]) | self._intended.get(name, set())

    def tables(self, suffix: str) -> Sequence[str]:
        """Return the hashes of the tables that runs of ours have put in place, or were about to.

        Args:
            suffix: of the table.

        Returns:
            Hashes, as they were given to `claim`.
        """
        return self._tables.get(suffix, [])

    def begin(self, header: Mapping[str, Any], *, overwrite: bool, defaults: Mapping[str, Any] | None = None) -> None:
        """Go on with an output, or begin it; from here on `append` can be called.

        Args:
            header: whatever makes records differ, as plain values; it must be what the earlier run had.
            overwrite: begin anew; the old files are replaced by empty ones at once.
            defaults: of settings that an earlier version may not have known; without it they had this value.

        Raises:
            ConfigError: when the earlier run had another header, or the files have been changed since.
            CaptionerError: when the disk fails.
        """
        wanted: dict[str, Any] = json.loads(json.dumps({**header, "overwriting": overwrite}))  # as it is read again
        with self._disk(self.progress):
            if overwrite or not self.exists:
                self._replace(wanted, ())
                self.header = wanted
            else:
                self.records.touch()  # whoever has deleted the records wants them made again
                self.read()
                overwriting = {"overwriting": self.header.get("overwriting")}
                compare(self.header, {**wanted, **overwriting}, defaults or {}, self.records)
                self._check_tail()
            self._open()
            self.compact()

    def read(self) -> None:
        """Read the journal and check the records against it; nothing is written.

        Raises:
            ConfigError: when one of the two is damaged or has been changed by something else.
        """
        self._forget()
        self._end = self._journal_end = 0
        lines = lines_of(self.progress)
        first = next(lines, None)
        if (
            first is None
            or not isinstance(first[0], dict)
            or first[0].get("format") != FORMAT
            or first[0].get("version") not in READ
        ):
            raise ConfigError(f"{self.progress}: not a journal of this version of captioner; {REMEDY}")
        self._journal_end = first[1]
        self.header = {name: value for name, value in first[0].items() if name not in ("format", "version")}
        with self.records.open("rb") as records:
            for line, end in lines:
                if not self._accept(line, records):
                    break
                self._journal_end = end
        if first[0]["version"] == 1 and self.finished is not None:
            self.header["overwriting"] = False  # which that version did not note

    def _accept(self, line: dict[str, Any], records: IO[bytes]) -> bool:
        """Take a line of the journal in; return False for a batch whose records are not all there."""
        if "finished" in line:
            self.finished = line["finished"]
        elif "overwriting" in line:
            self.header["overwriting"] = line["overwriting"]
        elif "intended" in line:
            self._intend({bytes.fromhex(name): bytes.fromhex(texts) for name, texts in line["intended"].items()})
        elif "table" in line:
            self._tables.setdefault(line["table"], []).append(line["hash"])
        else:
            return self._accept_pictures(line, records)
        return True

    def _accept_pictures(self, line: dict[str, Any], records: IO[bytes]) -> bool:
        entries = [Entry.from_json(values) for values in line["pictures"]]
        size_bytes = sum(entry.length for entry in entries)
        data = records.read(size_bytes)
        if len(data) < size_bytes:
            return False
        if zlib.crc32(data) != line["crc32"]:
            raise ConfigError(f"{self.records}: has been changed by something else since it was written; {REMEDY}")
        self._end += size_bytes
        self._take(entries)
        return True

    def _take(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._superseded |= entry.name in self._known
            self._known[entry.name] = entry.state + entry.kind.encode() + (b"\0" + entry.texts if entry.texts else b"")
            self._intended.pop(entry.name, None)
            self.finished = None

    def _intend(self, texts: Mapping[bytes, bytes]) -> None:
        for name, hashes in texts.items():
            self._intended.setdefault(name, set()).update(pieces(hashes))

    def _forget(self) -> None:
        self._known, self._intended, self._tables = {}, {}, {}
        self.finished, self._superseded = None, False

    def append(self, results: Sequence[tuple[Entry, Mapping[str, Any]]]) -> None:
        """Put the records of a batch on disk: all of them, or after a fault none.

        Args:
            results: entries (their length is set here) and records, at least one.

        Raises:
            CaptionerError: when the disk is full or fails; what was written before is intact.
        """
        lines = [encode(record) for _, record in results]
        entries = [entry._replace(length=len(line)) for (entry, _), line in zip(results, lines, strict=True)]
        self._write(b"".join(lines), batch_line(entries, b"".join(lines)))
        self._take(entries)

    def intend(self, texts: Mapping[bytes, bytes]) -> None:
        """Note, before the files of single pictures are written, what they will hold.

        Args:
            texts: `Entry.texts` by `Entry.name`; what is known of a picture already is not noted again.

        Raises:
            CaptionerError: when the disk is full or fails.
        """
        new = {name: hashes for name, hashes in texts.items() if not pieces(hashes) <= self.written(name)}
        if new:
            self._write(b"", encode({"intended": {name.hex(): hashes.hex() for name, hashes in new.items()}}))
            self._intend(new)

    def claim(self, suffix: str, table_hash: str) -> None:
        """Note, before a table is put in place, what it holds.

        Args:
            suffix: of the table.
            table_hash: of its bytes; the same as before is not noted again.

        Raises:
            CaptionerError: when the disk is full or fails.
        """
        if table_hash not in self.tables(suffix):
            self._write(b"", encode({"table": suffix, "hash": table_hash}))
            self._tables.setdefault(suffix, []).append(table_hash)

    def end_overwriting(self) -> None:
        """Note that a run which was to overwrite has come to its end, so that later ones replace nothing.

        Raises:
            CaptionerError: when the disk is full or fails.
        """
        if self.header.get("overwriting"):
            self._write(b"", encode({"overwriting": False}))
            self.header["overwriting"] = False

    def finish(self, source: Mapping[str, Any]) -> None:
        """Note that a run has seen its whole source.

        Args:
            source: what it saw, as plain values; the same as before is not noted again.

        Raises:
            CaptionerError: when the disk is full or fails.
        """
        if self.finished != source:
            self._write(b"", encode({"finished": source}))
            self.finished = dict(source)

    def _write(self, records: bytes, line: bytes) -> None:
        assert self._files is not None, "begin() comes first"
        try:
            for file, data in zip(self._files, (records, line), strict=True):
                with self._disk(Path(file.name)):
                    _write_all(file, data)
        except BaseException:
            with contextlib.suppress(OSError):  # else the next run does it
                self._cut()
            raise
        self._end += len(records)
        self._journal_end += len(line)

    def _check_tail(self) -> None:
        """Refuse to cut off what no run of ours has left behind the last batch."""
        with self.records.open("rb") as records:
            records.seek(self._end)
            for line in records:
                if not may_be_ours(line):
                    raise ConfigError(
                        f"{self.records}: something else has appended to it, which would be lost; move those lines to "
                        f"another file, or {REMEDY}"
                    )

    def _cut(self) -> None:
        """Take back what was written of a batch that did not come to its end."""
        assert self._files is not None
        for file, end in zip(self._files, (self._end, self._journal_end), strict=True):
            file.truncate(end)
            file.seek(end)

    def compact(self) -> None:
        """Let new records take the place of the old ones of the same pictures.

        Raises:
            CaptionerError: when the disk is full or fails; nothing is lost then.
        """
        if not self._superseded:
            return
        finished, intended, tables = self.finished, self._intended, self._tables
        last: dict[bytes, tuple[Entry, int]] = {}  # in the order in which names came first
        for entry, begin in self.entries():
            last[entry.name] = (entry, begin)
        notes: list[Mapping[str, Any]] = [
            {"table": suffix, "hash": made} for suffix, hashes in tables.items() for made in hashes
        ]
        if intended:
            notes.append({"intended": {name.hex(): b"".join(sorted(texts)).hex() for name, texts in intended.items()}})
        self.fill(self.header, [(entry, begin, self.records) for entry, begin in last.values()], notes=notes)
        if finished is not None:
            self.finish(finished)

    def entries(self) -> Iterator[tuple[Entry, int]]:
        """Yield every entry, and where its record begins; those of superseded records too."""
        begin = 0
        for line, end in lines_of(self.progress):
            if end > self._journal_end:
                return
            for values in line.get("pictures", ()):
                entry = Entry.from_json(values)
                yield entry, begin
                begin += entry.length

    def iterate_records(self) -> Iterator[dict[str, Any]]:
        """Yield the records, one after another from the disk."""
        with self._disk(self.records), self.records.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def fill(
        self,
        header: Mapping[str, Any],
        parts: Sequence[tuple[Entry, int, Path]],
        *,
        notes: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Begin this output anew with records of others.

        Args:
            header: as in `begin`.
            parts: entry, where its record begins, and in which file, in the order wanted.
            notes: other lines of the journal that are to last.

        Raises:
            CaptionerError: when the disk is full or fails; what was here before is there still.
        """
        with self._disk(self.progress):
            self._replace(header, copied(parts), notes)
            self.read()
            self._open()

    def _replace(
        self,
        header: Mapping[str, Any],
        batches: Iterable[tuple[list[Entry], bytes]],
        notes: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Replace both files: all of it, or nothing, whatever happens."""
        self._close()
        new_records, new, partial = (self._aside(name) for name in ("records", "new", "partial"))
        try:
            with new_records.open("wb", buffering=0) as records, partial.open("wb", buffering=0) as journal:
                _write_all(journal, encode({"format": FORMAT, "version": VERSION, **header}), sync=False)
                for entries, data in batches:
                    _write_all(records, data, sync=False)
                    _write_all(journal, batch_line(entries, data), sync=False)
                for note in notes:
                    _write_all(journal, encode(note), sync=False)
                os.fsync(records.fileno())
                os.fsync(journal.fileno())
            partial.replace(new)  # from here on it is decided
        except BaseException:
            if not new.exists():  # an interrupt may come when it is decided already
                partial.unlink(missing_ok=True)
                new_records.unlink(missing_ok=True)
            raise
        _sync_folder(self.progress.parent)
        self._roll_forward()
        self._forget()
        self._end, self._journal_end = self.records.stat().st_size, self.progress.stat().st_size

    def _roll_forward(self) -> None:
        """End a replacement that was decided, clear away one that was not, and give the records their name."""
        new_records, new = self._aside("records"), self._aside("new")
        if self.exists and self._earlier is not None and self._earlier.exists() and not self.records.exists():
            self._earlier.replace(self.records)
        if new.exists():
            if new_records.exists():
                new_records.replace(self.records)
            new.replace(self.progress)
        for path in (new_records, self._aside("partial")):
            path.unlink(missing_ok=True)
        _sync_folder(self.progress.parent)

    def _aside(self, what: str) -> Path:
        return self.progress.with_name(f"{self.progress.name}.{what}")

    def _open(self) -> None:
        self._close()
        self._files = (self.records.open("r+b", buffering=0), self.progress.open("r+b", buffering=0))
        self._cut()

    def _close(self) -> None:
        if self._files is not None:
            for file in self._files:
                file.close()
        self._files = None

    @contextlib.contextmanager
    def _disk(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise disk_fault(Path(err.filename or path), err) from err


def disk_fault(path: Path, err: OSError) -> CaptionerError:
    """Return what to say when the disk fails a run.

    Args:
        path: what could not be read or written.
        err: what the system said.

    Returns:
        The error to raise.
    """
    return CaptionerError(
        f"{path}: cannot be written: {err.strerror or err}; what was written before is intact: make room or mend it, "
        "and the same command goes on from there (without --overwrite, which would begin anew)"
    )


def _write_all(file: io.FileIO, data: bytes, *, sync: bool = True) -> None:
    rest = memoryview(data)
    while rest:  # a write may take less than it is given
        rest = rest[file.write(rest) :]
    if sync and data:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames last through a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
