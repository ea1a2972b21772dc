"""What runs on the machines of a cluster for `captioner.ray_engine`: the desk, the reader and the captioning actors.

    driver ──lay──▶ `Desk` (one actor, no CPU) ◀──take── `Reader` (one read task of Ray Data, no CPU)
                                                              ──a row for each batch──▶ `Captioning` (a pool of actors)

A read task cannot draw from an iterator of the driver's, so that it asks the desk, by number. Asked again, as when Ray
starts a task anew, the desk answers the same, or with nothing for a batch whose results the driver has: no batch is
lost or counted twice. Importing this module imports Ray; torch is loaded by `Captioning` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pickle
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from captioner.errors import CaptionerError, ImageReadError
from captioner.images import ImageLimits
from captioner.manifests import printable
from captioner.sources import SourcePicture

if TYPE_CHECKING:
    from captioner.engine import Result

CALLS = 2
"""Batches that an actor has at a time: it decodes one while the model has the other."""
TRIES = 2
"""How often a batch may end the process it is in, or its machine, before its pictures are taken one by one."""


class Answer(NamedTuple):
    """What an actor says of a batch.

    Args:
        results: of its pictures, in their order.
        absent: the places of those that are not there on its machine.
        host: the name of its machine.
        fault: what made captioning impossible; None when it was not.
    """

    results: list[Result]
    absent: list[int]
    host: str
    fault: CaptionerError | None = None


class Desk:
    """Where the driver lays batches and the reader takes them, and which counts who began what. An async actor."""

    def __init__(self) -> None:
        self._batches: dict[int, bytes] = {}
        self._finished = 0  # batches below this number are done with
        self._count: int | None = None
        self._begun: Counter[tuple[int, int | None]] = Counter()
        self._changed = asyncio.Condition()

    async def lay(self, index: int, pictures: bytes | None, finished: int) -> None:
        """Lay a batch out.

        Args:
            index: its number.
            pictures: pickled; None says that there are no more batches than this many.
            finished: all batches below this number are done with.
        """
        async with self._changed:
            for old in range(self._finished, finished):
                self._batches.pop(old, None)
            self._begun = Counter({key: count for key, count in self._begun.items() if key[0] >= finished})
            self._finished = finished
            if pictures is None:
                self._count = index
            else:
                self._batches[index] = pictures
            self._changed.notify_all()

    async def take(self, index: int) -> bytes | None:
        """Wait for a batch.

        Args:
            index: its number.

        Returns:
            Its pictures, pickled; nothing, b"", when it is done with; None when there are no more.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: index in self._batches or index < self._finished or self._count is not None
            )
            if index in self._batches:
                return self._batches[index]
            return b"" if index < self._finished else None

    async def begin(self, index: int, place: int | None = None) -> int:
        """Note that somebody begins a batch, or one of its pictures alone; return how often that was."""
        self._begun[index, place] += 1
        return self._begun[index, place]

    async def end(self, index: int, place: int) -> None:
        """Note that a picture was captioned alone."""
        del self._begun[index, place]


class Reader(Datasource):  # type: ignore[misc]  # Ray may be missing where types are checked
    """A source of Ray Data that yields the desk's batches, one a row, without knowing how many there will be.

    Args:
        desk: handle of the `Desk`.
    """

    def __init__(self, desk: Any) -> None:
        super().__init__()
        self._desk = desk

    def estimate_inmemory_data_size(self) -> int | None:
        """Say that the size is not known; see `ray.data.Datasource`."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return the one task that reads; see `ray.data.Datasource`."""
        del parallelism, data_context
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(functools.partial(_rows, self._desk), unknown, per_task_row_limit=per_task_row_limit)]


def _rows(desk: Any) -> Iterator[pa.Table]:
    index = 0
    while (pictures := ray.get(desk.take.remote(index))) is not None:
        yield _row(index, pictures)
        index += 1


def _row(index: int, data: bytes) -> pa.Table:
    return pa.table({"index": pa.array([index], pa.int64()), "data": pa.array([data], pa.large_binary())})


class Captioning:
    """Holds a captioner and captions batches; one for each actor. Called by `CALLS` threads.

    Args:
        model: reference to the files of the model folder, by their names; in a list, so that Ray leaves it one.
        desk: handle of the `Desk`.
        loading: keywords of `Captioner.load`.
        batch_size: pictures that go through the model together.
        workers: processes that decode.
        options: search options.
        picture_limits: of pixels and bytes.
    """

    def __init__(
        self,
        *,
        model: list[Any],
        desk: Any,
        loading: Mapping[str, Any],
        batch_size: int,
        workers: int,
        options: Mapping[str, Any],
        picture_limits: ImageLimits,
    ) -> None:
        from captioner.api import Captioner
        from captioner.engine import LocalEngine

        self._desk = desk
        self._line, self._free = threading.Lock(), threading.Semaphore(CALLS)
        self._fault: CaptionerError | None = None
        with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
            for name, data in ray.get(model[0]).items():
                Path(folder, name).write_bytes(data)
            self._engine = LocalEngine(
                lambda: Captioner.load(folder, **loading),
                batch_size=batch_size,
                workers=workers,
                options=options,
                picture_limits=picture_limits,
            )
            try:
                self._engine.__enter__()
            except CaptionerError as err:  # an error here would have Ray start the actor over and over
                self._fault = err

    def __call__(self, table: pa.Table) -> pa.Table:
        """Caption the batch of a row; return a row with the pickled `Answer`."""
        (index,), (data,) = (table[name].to_pylist() for name in ("index", "data"))
        pictures: list[SourcePicture] = pickle.loads(data) if data else []
        fault = self._fault
        results: list[Result] = []
        if pictures and fault is None:
            try:
                results = self._results(index, pictures)
            except CaptionerError as err:
                fault = err
        absent = [
            place
            for place, (picture, result) in enumerate(zip(pictures, results, strict=False))
            if isinstance(result, ImageReadError) and not picture.path.exists()
        ]
        answer = Answer(results, absent, socket.gethostname(), fault)
        return _row(index, pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))

    def _results(self, index: int, pictures: list[SourcePicture]) -> list[Result]:
        if ray.get(self._desk.begin.remote(index)) <= TRIES:
            with self._places(1):
                return self._caption(pictures)
        # Something of this batch ends the process, or a machine that does not last: one by one, and nothing beside.
        with self._places(CALLS):
            return [self._alone(index, place, picture) for place, picture in enumerate(pictures)]

    def _alone(self, index: int, place: int, picture: SourcePicture) -> Result:
        if ray.get(self._desk.begin.remote(index, place)) > 1:
            return ImageReadError(
                f"{printable(picture.name)}: captioning it ended the process {TRIES + 1} times; it is damaged, or too "
                "large for the memory: save it again, smaller"
            )
        (result,) = self._caption([picture])
        ray.get(self._desk.end.remote(index, place))
        return result

    def _caption(self, pictures: list[SourcePicture]) -> list[Result]:
        return [result for batch in self._engine.captions(iter(pictures)) for _, result in batch]

    @contextlib.contextmanager
    def _places(self, count: int) -> Iterator[None]:
        with self._line:  # one thread at a time takes its places, so that no two wait for each other's
            for _ in range(count):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(count)
