"""The parts of a source that were captioned apart → one output, as if it had been captioned at once."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.errors import ConfigError
from captioner.journal import Entry, Journal
from captioner.outputs import Outputs


@dataclass(frozen=True)
class Merged:
    """What was joined.

    Args:
        outputs: paths of what was written.
        parts: number of parts.
        pictures: number of records.
        failed: how many of them are errors.
    """

    outputs: tuple[str, ...]
    parts: int
    pictures: int
    failed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "outputs": list(self.outputs),
            "parts": self.parts,
            "pictures": self.pictures,
            "failed": self.failed,
        }


_OF_ONE_PART = ("shard", "into", "overwriting")


def merge(
    parts: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    formats: Iterable[str] = (),
    overwrite: bool = False,
) -> Merged:
    """Join the outputs of all shards of a source; a later run without `shard` can go on with the result.

    Args:
        parts: the outputs of the shards, as they were named, in any order.
        output: as in `captioner.batch.run`; files of single pictures stay where they are.
        formats: "jsonl", "csv", "parquet"; default: by the output's name.
        overwrite: replace what is there.

    Returns:
        What was joined. The records are in the order of the source, as far as each picture was captioned by the first
        run of its part; one that a later run found stands where it stood then.

    Raises:
        ConfigError: when a part is missing, unfinished, of another model, of other options or of another source.
        CaptionerError: when a part is still being written, or the disk fails.
    """
    formats = tuple(formats)
    if {"txt", "xmp"}.intersection(formats):
        raise ConfigError("files of single pictures need no merge: they are where their part has put them")
    plan = Outputs.plan(output, formats=formats)
    if not parts:
        raise ConfigError("merge needs the outputs of all shards, got none")
    found = {journal.progress.resolve(): journal for journal in map(_part, parts)}
    if len(found) < len(parts):
        raise ConfigError(f"{len(parts)} parts are given, but they are {len(found)} outputs; give each part once")
    with contextlib.ExitStack() as stack:
        journals = [stack.enter_context(journal) for journal in found.values()]
        for journal in journals:
            journal.read()
        header = _check(journals)
        rows = _rows(journals)
        journal = stack.enter_context(plan.journal())
        if not overwrite:
            plan.check_unclaimed(journal)
            if journal.exists:
                raise ConfigError(
                    f"{plan.given}: is there already; name another output, or replace it with --overwrite"
                )
        journal.fill({**header, "shard": None, "overwriting": overwrite}, rows)
        plan.write_tables(journal)
        assert journals[0].finished is not None
        journal.finish(journals[0].finished)
        journal.end_overwriting()
    failed = sum(bool(entry.kind) for entry, _, _ in rows)
    return Merged(tuple(map(str, plan.paths)), len(journals), len(rows), failed)


def _part(output: str | os.PathLike[str]) -> Journal:
    name = os.fsdecode(output)
    path = Path(name)
    for stem in (path / "captions", path.with_suffix(""), path):
        progress = stem.with_name(f"{stem.name}.progress")
        if progress.is_file():
            apart, public = (stem.with_name(stem.name + suffix) for suffix in (".records.jsonl", ".jsonl"))
            return Journal(progress, public if public.exists() else apart)
    raise ConfigError(f"{name}: is no output of `captioner batch`: there is no journal (.progress) beside it")


def _check(journals: Sequence[Journal]) -> dict[str, Any]:
    """Refuse parts that are not all parts of one; return what they have in common."""
    shards: dict[str, Journal] = {}
    for journal in journals:
        shard = journal.header.get("shard")
        if shard is None:
            raise ConfigError(f"{journal.records}: is no shard, but a run over a whole source; leave it out")
        if shard in shards:
            raise ConfigError(f"{journal.records}: is shard {shard}, and so is {shards[shard].records}; leave one out")
        shards[shard] = journal
    counts = {shard.partition("/")[2] for shard in shards}
    if len(counts) > 1:
        raise ConfigError(f"the parts are shards of different divisions: {', '.join(sorted(shards))}")
    (count,) = counts
    if len(shards) < int(count):  # which may be any number
        every = (f"{number}/{count}" for number in range(1, int(count) + 1))
        missing = itertools.islice((shard for shard in every if shard not in shards), 20)
        raise ConfigError(f"{int(count) - len(shards)} of {count} shards are missing: {', '.join(missing)}")
    first = journals[0]
    for journal in journals:
        if journal.finished is None:
            raise ConfigError(
                f"{journal.records}: shard {journal.header['shard']} has not come to its end; run it again first"
            )
        for name in first.header.keys() | journal.header.keys():
            if name not in _OF_ONE_PART and first.header.get(name) != journal.header.get(name):
                raise ConfigError(f"{journal.records} and {first.records} were made with another {name}; run one again")
        if journal.finished != first.finished:
            raise ConfigError(
                f"{journal.records} and {first.records} have seen different sources ({_seen(journal)} and "
                f"{_seen(first)} pictures in all); run all parts again on the same source: what is done stays done"
            )
    return first.header


def _seen(journal: Journal) -> int:
    assert journal.finished is not None
    return int(journal.finished["pictures"])


def _rows(journals: Sequence[Journal]) -> list[tuple[Entry, int, Path]]:
    """Return the records of all parts in the order of their places; of a picture that was done again, the last."""
    rows: list[tuple[Entry, int, Path]] = []
    names: set[bytes] = set()
    for journal in journals:
        last = {entry.name: (entry, begin, journal.records) for entry, begin in journal.entries()}
        if names & last.keys():
            raise ConfigError(
                f"{journal.records}: holds pictures that another part holds too; run it again, --overwrite"
            )
        names |= last.keys()
        rows += last.values()
    return sorted(rows, key=lambda row: row[0].place)
