"""Many pictures → records on disk: `run`. Resumable, safe against every kind of end.

sources ──find_pictures──▶ pictures ──shard, journal──▶ those to do ──engine──▶ batches of captions and errors
        ──▶ hashes of texts into the journal ──▶ files of single pictures ──▶ records ──▶ journal
        ──▶ at the end: CSV, Parquet
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from captioner.api import Captioner
from captioner.archives import ArchiveLimits
from captioner.caption import Caption
from captioner.config import SearchOptions
from captioner.engine import Engine, LocalEngine, Result
from captioner.errors import CaptionerError, ConfigError, DataError, ImageError, SearchError
from captioner.images import DEFAULT_LIMITS, ImageLimits
from captioner.journal import Entry, Journal, name_hash, state_hash
from captioner.outputs import ADDED_SETTINGS, Outputs, PictureWriter, write_files
from captioner.sharding import WHOLE, Seen, Shard, Total
from captioner.sources import SourcePicture, find_pictures, ignore, spelled

_STRANGE = 100
"""After so many pictures of which none is on record, an output that has records gets a note."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, after each batch.

    Args:
        captioned: pictures captioned by this run.
        failed: pictures that failed in this run.
        skipped: pictures that an earlier run has done, failures among them.
        total: pictures there are for this run, those three kinds together; None while that is not known.
        seconds: since the first picture was begun.
        results: name and result of each picture of the batch.
    """

    captioned: int
    failed: int
    skipped: int
    total: int | None
    seconds: float
    results: Sequence[tuple[str, Result]]

    @property
    def rate(self) -> float:
        """Pictures per second of this run."""
        return (self.captioned + self.failed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Seconds still needed at this rate; None while the total is not known."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.captioned - self.failed - self.skipped) / self.rate


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run has done.

    Args:
        outputs: paths of what was written.
        captioned: pictures captioned by this run.
        skipped: pictures that an earlier run had captioned.
        failed: how many of the pictures have an error on record, by its kind; those of earlier runs too.
        failed_before: how many of them are of earlier runs and were not tried again.
        seconds: that the pictures took.
        stopped: why the run ended before its source did; None when it came to the end.
    """

    outputs: tuple[str, ...]
    captioned: int
    skipped: int
    failed: Mapping[str, int]
    failed_before: int
    seconds: float
    stopped: Literal["interrupted", "errors"] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "outputs": list(self.outputs),
            "captioned": self.captioned,
            "skipped": self.skipped,
            "failed": dict(self.failed),
            "failed_before": self.failed_before,
            "seconds": round(self.seconds, 3),
            "stopped": self.stopped,
        }


def run(
    sources: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    captioner: Captioner | None = None,
    model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    runtime: str = "auto",
    threads: int | None = None,
    formats: Iterable[str] = (),
    into: str | os.PathLike[str] | None = None,
    template: str | None = None,
    alt_text: bool = False,
    sidecar: str = "picture",
    maps: str | None = None,
    pattern: str | None = None,
    hidden: bool = False,
    limits: ArchiveLimits | None = None,
    picture_limits: ImageLimits | None = None,
    stdin: IO[Any] | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    max_errors: int | None = None,
    shard: str | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    engine: Engine | Literal["local", "ray"] = "local",
    actors: int | None = None,
    ray_address: str | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> Summary:
    """Caption all pictures of the sources into files, going on where an earlier run ended.

    Bad pictures never stop it: each gets a record with its error, and so does a damaged archive or list. Wherever it
    ends, by a signal, a full disk or a power cut, the same call without `overwrite` goes on from there, to the same
    records as if it had never ended (with the same `batch_size`: other batches may change the last digits of a score).
    No text, sidecar or table is replaced unless it holds what such a run wrote.

    Args:
        sources: files, folders, globs, manifests, archives, "-"; see `captioner.sources`.
        output: a file .jsonl, .csv or .parquet, or a folder; see `captioner.outputs`.
        captioner: with which; default: it loads `model`.
        model: as in `Captioner.load`.
        device: as in `Captioner.load`.
        runtime: as in `Captioner.load`.
        threads: as in `Captioner.load`.
        formats: several of "jsonl", "csv", "parquet", "txt", "xmp"; default: by the output's name.
        into: folder for the files of single pictures; default: the output when it is a folder, else beside each
            picture.
        template: text of txt and xmp, see `captioner.writers.Template`.
        alt_text: also write alternative texts, into records, tables and XMP files.
        sidecar: how XMP files are named: "picture" (a.jpg.xmp) or "name" (a.xmp).
        maps: save each word's map, as "npz" or drawn as a "figure".
        pattern: only pictures of folders whose names match this glob.
        hidden: hidden files and folders too.
        limits: of archives.
        picture_limits: of each picture's pixels and bytes; a larger one is a bad picture.
        stdin: what "-" reads; default: standard input.
        overwrite: start anew instead of going on; texts and tables that are there are replaced, whoever wrote them,
            until this run, or what goes on from it, has come to its end.
        retry_failed: try pictures again that failed in an earlier run.
        max_errors: stop once more pictures than this have failed in this run.
        shard: caption only part "i/n" of the source; `captioner.merge` joins the parts.
        batch_size: pictures that go through the model together.
        workers: processes that decode; None is one for each CPU, 0 decodes in this process.
        engine: "local", this machine; "ray", a cluster (`captioner.ray_engine`), for which device, threads and workers
            are of each actor; or what captions instead of captioner, model, device, batch_size, workers and options.
        actors: of "ray": processes that hold the model; default: one for each GPU, or machine where there are none.
        ray_address: of "ray": the cluster, "host:port" or "auto"; default: RAY_ADDRESS, else this machine.
        stop: when it is set, the run ends after the batch in flight.
        progress: called after each batch, when it is safely on disk.
        note: called with a sentence about anything of the sources that is worth knowing.
        **options: search options; see `SearchOptions`.

    Returns:
        What was done.

    Raises:
        ConfigError: for an impossible setting, or one with which the output was not begun, or when a table was made
            by something else.
        CaptionerError: when the model cannot be loaded, the disk fails, or another run writes to this output.
        SearchError: for options that no caption of any picture can meet.
    """
    plan = Outputs.plan(
        output, formats=formats, into=into, template=template, alt_text=alt_text, maps=maps, sidecar=sidecar
    )
    given = [os.fsdecode(source) for source in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    part = WHOLE if shard is None else Shard.parse(shard)
    if max_errors is not None and (not isinstance(max_errors, int) or isinstance(max_errors, bool) or max_errors < 0):
        raise ConfigError(f"max_errors must be a whole number, at least 0, got {max_errors!r}")
    picture_limits = picture_limits or DEFAULT_LIMITS
    _check_apart(given, plan)
    if isinstance(engine, str):
        engine = _engine(
            engine,
            lambda where: (
                Captioner.load(model, device=where, runtime=runtime, threads=threads)
                if captioner is None
                else captioner
            ),
            cluster={"actors": actors, "address": ray_address},
            device=device,
            computing={"runtime": runtime, "threads": threads},
            settings={
                "batch_size": batch_size,
                "workers": workers,
                "options": options,
                "picture_limits": picture_limits,
            },
        )
    note = note or ignore
    search: dict[str, Any] = {"pattern": pattern, "hidden": hidden, "limits": limits or ArchiveLimits()}
    pictures = find_pictures(given, **search, stdin=stdin, note=note)
    with plan.journal() as journal:
        if not overwrite:
            plan.check_unclaimed(journal)
        with engine, Total(given, search, part, wanted=progress is not None) as total:
            first = list(itertools.islice(pictures, 1))  # a source that is not there is said before anything is begun
            for picture in first:
                plan.check_place(picture)
            header = {**engine.identity, **plan.settings(), "shard": None if shard is None else str(part)}
            _begin(journal, plan, header, overwrite=overwrite)
            kept: dict[str, Any] = {"limits": search["limits"], "picture_limits": picture_limits, "keep": _lists(given)}
            writers = {replace: plan.writers(replace=replace, **kept) for replace in (False, True)}
            work = _Run(
                journal,
                plan,
                part,
                writers,
                retry_failed=retry_failed,
                max_errors=max_errors,
                total=total,
                note=note,
            )
            try:
                work.loop(engine, itertools.chain(first, pictures), stop or threading.Event(), progress)
            except Exception:
                with contextlib.suppress(CaptionerError):  # such as a disk that is still full
                    work.end()
                raise
            work.end()
        return work.summary()


def _begin(journal: Journal, plan: Outputs, header: Mapping[str, Any], *, overwrite: bool) -> None:
    """Go on with an output, or begin it, and refuse to replace what is not ours."""
    journal.begin(header, overwrite=overwrite, defaults={"search": SearchOptions().to_dict(), **ADDED_SETTINGS})
    try:
        plan.check_tables(journal)
    except DataError as err:  # before anything is done, it is the use that is wrong
        raise ConfigError(str(err)) from err


@dataclass(eq=False)
class _Run:
    """The loop and what it counts."""

    journal: Journal
    plan: Outputs
    part: Shard
    writers: Mapping[bool, Sequence[PictureWriter]]
    """By whether they replace what others wrote."""
    retry_failed: bool = field(kw_only=True)
    max_errors: int | None = field(kw_only=True)
    total: Total = field(kw_only=True)
    note: Callable[[str], None] = field(kw_only=True)

    def __post_init__(self) -> None:
        self.captioned, self.skipped, self.failed_now = 0, 0, 0
        self.failed: Counter[str] = Counter()
        self.failed_before = 0
        self.seconds = 0.0
        self.stopped: Literal["interrupted", "errors"] | None = None
        self._overwriting = bool(self.journal.header["overwriting"])
        self._on_record = len(self.journal)
        self._strangers = 0  # pictures before the first that is on record
        self._complete = False
        # Of the pictures that the engine has drawn and not yet given back, and whether all is replaced for them.
        self._drawn: deque[tuple[Entry, bool]] = deque()
        self._seen = Seen()
        self._fault: Exception | None = None

    def loop(
        self,
        engine: Engine,
        pictures: Iterator[SourcePicture],
        stop: threading.Event,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """Caption what is to do, batch by batch."""
        if stop.is_set():  # while the model was loaded
            self.stopped = "interrupted"
            return
        began = time.perf_counter()
        for batch in engine.captions(self._to_do(pictures)):
            results = self._write(batch)
            self.seconds = time.perf_counter() - began
            if progress is not None:
                progress(self._progress(results))
            if self.max_errors is not None and self.failed_now > self.max_errors:
                self.stopped = "errors"
                return
            if stop.is_set():
                self.stopped = "interrupted"
                return
        if self._fault is not None:
            raise self._fault
        self._say_when_all_are_strange(self._on_record > 0 and self._strangers > 0)
        self.journal.finish(self._seen.to_dict())
        self._complete = True

    def _to_do(self, pictures: Iterator[SourcePicture]) -> Iterator[SourcePicture]:
        """Yield the pictures of this part that are not done; a fault of a source is kept until they are."""
        for place, picture in enumerate(self._until_fault(pictures)):
            name = name_hash(picture.name)
            self._seen.add(name)
            if not self.part.holds(name):
                continue
            state = state_hash(picture.size_bytes, picture.mtime_ns)
            known = self.journal.known(name)
            self._meet(known is not None)
            if known is not None and known.state == state and not (known.kind and self.retry_failed):
                if known.kind:
                    self.failed_before += 1
                    self.failed[known.kind] += 1
                else:
                    self.skipped += 1
                continue
            # What this run has captioned already it does not replace without asking again.
            replace = self._overwriting and (known is None or bool(known.kind))
            self._drawn.append((Entry(name, state, place, "", 0), replace))
            yield picture

    def _meet(self, is_known: bool) -> None:
        """Take note of a picture of this part."""
        if is_known:
            self._on_record = 0
        elif self._on_record:
            self._strangers += 1
            self._say_when_all_are_strange(self._strangers == _STRANGE)

    def _say_when_all_are_strange(self, are_they: bool) -> None:
        if are_they:
            self.note(
                f"{self.journal.records}: none of the {self._on_record} pictures on record is among the first "
                f"{self._strangers} of the source; a picture is known by its name as it is given, so that the same "
                "ones named from another folder are captioned again"
            )
            self._on_record = 0

    def _until_fault(self, pictures: Iterator[SourcePicture]) -> Iterator[SourcePicture]:
        try:
            yield from pictures
        except Exception as err:
            self._fault = err

    def _write(self, batch: list[tuple[SourcePicture, Result]]) -> list[tuple[str, Result]]:
        """Put a batch on disk: what texts will hold, the texts, records, journal; return what came of each picture."""
        rows: list[tuple[Entry, dict[str, Any]]] = []
        results: list[tuple[str, Result]] = []
        drawn = [self._drawn.popleft() for _ in batch]
        held = [self.journal.written(entry.name) for entry, _ in drawn]
        self._intend(batch, drawn)
        for (picture, result), (entry, replace), texts in zip(batch, drawn, held, strict=True):
            fault: ImageError | SearchError | DataError | None
            if isinstance(result, Caption):
                now, fault = write_files(picture, result, self.writers[replace], texts)
            else:
                now, fault = texts, result
            kind = "" if fault is None else type(fault).__name__
            if fault is not None:
                self.failed[kind] += 1
            record = self.plan.record(picture, result, fault)
            rows.append((entry._replace(kind=kind, texts=b"".join(sorted(now))), record))
            results.append((picture.name, result if fault is None else fault))
        self.journal.append(rows)
        captioned = sum(not entry.kind for entry, _ in rows)
        self.captioned += captioned
        self.failed_now += len(rows) - captioned
        return results

    def _intend(self, batch: list[tuple[SourcePicture, Result]], drawn: list[tuple[Entry, bool]]) -> None:
        """Note what the files of a batch will hold, so that they are known as ours wherever the run is killed."""
        texts: dict[bytes, bytes] = {}
        for (picture, result), (entry, replace) in zip(batch, drawn, strict=True):
            if isinstance(result, Caption):
                texts[entry.name] = b"".join(
                    text for writer in self.writers[replace] for text in writer.texts(picture, result)
                )
        self.journal.intend(texts)

    def _progress(self, results: list[tuple[str, Result]]) -> Progress:
        return Progress(
            captioned=self.captioned,
            failed=self.failed_now,
            skipped=self.skipped + self.failed_before,
            total=self.total.value,
            seconds=self.seconds,
            results=results,
        )

    def end(self) -> None:
        """Put the output in order."""
        self.journal.compact()
        self.plan.write_tables(self.journal)
        if self._complete:
            self.journal.end_overwriting()

    def summary(self) -> Summary:
        """Return what was done."""
        return Summary(
            outputs=tuple(map(str, self.plan.paths)),
            captioned=self.captioned,
            skipped=self.skipped,
            failed=dict(sorted(self.failed.items())),
            failed_before=self.failed_before,
            seconds=self.seconds,
            stopped=self.stopped,
        )


def _engine(
    name: str,
    load: Callable[[str], Captioner],
    *,
    cluster: dict[str, Any],
    device: str,
    computing: dict[str, Any],
    settings: dict[str, Any],
) -> Engine:
    """Return the engine of a name; on a cluster, the model is needed here to be sent, not to caption."""
    if name == "ray":
        from captioner.ray_engine import RayEngine

        return RayEngine(lambda: load("cpu"), device=device, computing=computing, **cluster, **settings)
    if name != "local":
        raise ConfigError(f"engine must be 'local' or 'ray', got {name!r}")
    for key, value in cluster.items():
        if value is not None:
            raise ConfigError(f"{key}={value!r} is of the engine 'ray'; leave it out, or set engine='ray'")
    return LocalEngine(lambda: load(device), **settings)


def _check_apart(sources: Sequence[str], plan: Outputs) -> None:
    """Refuse outputs that are sources."""
    ours = [*plan.paths, plan.table(".records.jsonl"), plan.table(".progress")]
    there = {(status.st_dev, status.st_ino): path for path in ours if path.exists() and (status := path.stat())}
    if not there:
        return
    for source in (Path(name) for given in sources for name in spelled(given)):
        with contextlib.suppress(OSError, ValueError):  # what is no source at all is said by what looks for pictures
            status = source.stat()
            path = there.get((status.st_dev, status.st_ino))
            if path is not None and source.is_file():
                raise ConfigError(f"{path}: is a source itself, which the output would replace; name another output")


def _lists(sources: Sequence[str]) -> frozenset[str]:
    """Return the real paths of lists of pictures, which have the names of texts."""
    names = (name for given in sources for name in spelled(given))
    return frozenset(os.path.realpath(name) for name in names if name.lower().endswith(".txt"))
