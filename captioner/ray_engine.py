"""`RayEngine`: the pipeline of `LocalEngine` on a cluster, streamed by Ray Data.

    pictures ──batches, a few ahead──▶ reader ──▶ actors, a `LocalEngine` in each ──▶ re-ordered ──▶ results

Ray Data places the actors, GPUs and all, keeps each busy, starts anew what dies and does again what it was at; and it
streams, so that a source may be of any length. Which pictures make a batch, their order, and that a picture which kills
whatever it is in becomes an error after a few tries, is decided here: records are those of the local engine, whatever
dies (to the last digit of a score where processors and numbers of threads are the same).

The model travels through Ray: machines need Captioner and the pictures' paths, and neither model folder nor network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import pickle
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from captioner.api import Captioner
from captioner.decoding import WORKERS_LIMIT
from captioner.engine import LocalEngine, Result
from captioner.errors import CaptionerError, ConfigError, ImageReadError
from captioner.images import DEFAULT_LIMITS, ImageLimits
from captioner.manifests import printable
from captioner.sources import SourcePicture

if TYPE_CHECKING:
    from captioner.ray_workers import Answer

_AHEAD = 4
"""Batches that are under way for each actor, the two that it has and the two that it gets next among them."""
_STORE_BYTES = 512 * 2**20


class RayEngine:
    """Captions on the machines of a Ray cluster, or in several processes of this one.

    Args:
        captioner: makes the captioner; called once, here. The actors get the same model.
        address: of the cluster, "host:port", or "auto" for the one of this machine; default: the environment's
            RAY_ADDRESS, else a Ray of its own, on this machine, which ends with the engine. A Ray that this process
            is connected to already is used as it is.
        actors: processes that hold the model; default: one for each GPU, or each machine where there are none.
        device: of the actors, as in `Captioner.load`; "auto" is the GPU that Ray gave the actor.
        computing: runtime and threads of the actors, as in `Captioner.load`.
        batch_size: pictures that go through the model together.
        workers: processes that decode for each actor; None is one for each CPU that it has, 0 decodes in the actor.
        options: search options.
        picture_limits: of pixels and bytes.

    Raises:
        ConfigError: for an impossible setting, or where Ray is not installed.
    """

    def __init__(
        self,
        captioner: Callable[[], Captioner],
        *,
        address: str | None = None,
        actors: int | None = None,
        device: str = "auto",
        computing: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        options: Mapping[str, Any] | None = None,
        picture_limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        if actors is not None and (not isinstance(actors, int) or isinstance(actors, bool) or actors < 1):
            raise ConfigError(f"actors must be a whole number, at least 1, got {actors!r}")
        if address is not None and (not address or "://" in address):
            raise ConfigError(f"the address of a Ray cluster must be 'auto' or 'host:port', got {address!r}")
        # It checks what is the same for both.
        LocalEngine(captioner, batch_size=batch_size, workers=workers, options=options)
        require_ray()
        self._make, self._address, self._actors = captioner, address, actors
        self._device, self._batch_size, self._workers = device, batch_size, workers
        self._computing = dict(computing or {})
        self._options, self._picture_limits = dict(options or {}), picture_limits
        self._started = False
        self.identity: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        import ray

        captioner = self._make()
        with LocalEngine(lambda: captioner, batch_size=self._batch_size, workers=0, options=self._options) as local:
            self.identity = local.identity
        self._connect()
        try:
            self._pool = pool_for(ray.nodes(), self._actors)
            self._model = ray.put(model_files(captioner))
        except BaseException:
            self._disconnect()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._model
        self._disconnect()

    def captions(self, pictures: Iterator[SourcePicture]) -> Iterator[list[tuple[SourcePicture, Result]]]:
        """Caption pictures; see `captioner.engine.Engine`."""
        import ray
        from ray.data.exceptions import SystemException

        from captioner.ray_workers import Desk

        drawn = iter(lambda: list(itertools.islice(pictures, self._batch_size)), [])
        first = list(itertools.islice(drawn, 1))
        if not first:
            return
        desk = ray.remote(num_cpus=0)(Desk).remote()
        answers = self._answers(desk)
        try:
            yield from self._in_order(itertools.chain(first, drawn), answers, desk)
        except (ray.exceptions.RayError, SystemException) as err:
            raise CaptionerError(f"Ray has failed ({_reason(err)}); run again, and it goes on") from err
        finally:
            answers.close()
            with contextlib.suppress(ray.exceptions.RayError):  # what failed was said
                ray.kill(desk)

    def _in_order(
        self, drawn: Iterator[list[SourcePicture]], answers: Iterator[tuple[int, Answer]], desk: Any
    ) -> Iterator[list[tuple[SourcePicture, Result]]]:
        """Keep some batches under way, and yield what comes of them in their order."""
        import ray

        under_way: dict[int, list[SourcePicture]] = {}
        done: dict[int, Answer] = {}
        laid, more = 0, True
        for index in itertools.count():
            while more and len(under_way) < _AHEAD * self._pool.actors:
                batch = next(drawn, None)
                more = batch is not None
                ray.get(desk.lay.remote(laid, None if batch is None else _packed(batch), index))
                if batch is not None:
                    under_way[laid] = batch
                    laid += 1
            if not under_way:
                return
            while index not in done:
                number, answer = next(answers, (-1, None))
                if answer is None:
                    raise CaptionerError("Ray has ended before all pictures were captioned; run again, and it goes on")
                if number in under_way:
                    done[number] = answer
            yield _results(under_way.pop(index), done.pop(index))

    def _answers(self, desk: Any) -> Generator[tuple[int, Answer], None, None]:
        """Run the pipeline of Ray Data; yield what comes of each batch, as it comes."""
        import ray.data
        from ray.data import ActorPoolStrategy, DataContext

        from captioner.ray_workers import CALLS, Captioning, Reader

        context = DataContext.get_current().copy()
        context.target_max_block_size = 1  # a row, which is a batch, is never joined with others
        context.enable_progress_bars = context.print_on_execution_start = False
        with DataContext.current(context):
            rows = ray.data.read_datasource(Reader(desk), num_cpus=0, concurrency=1, override_num_blocks=1)
            rows = rows.map_batches(
                Captioning,
                fn_constructor_kwargs={
                    "model": [self._model],
                    "desk": desk,
                    "loading": {"device": self._device, **self._computing},
                    "batch_size": self._batch_size,
                    "workers": min(self._pool.cpus, WORKERS_LIMIT) if self._workers is None else self._workers,
                    "options": self._options,
                    "picture_limits": self._picture_limits,
                },
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=self._pool.actors, max_concurrent_calls_per_actor=CALLS, enable_true_multi_threading=True
                ),
                num_cpus=self._pool.cpus,
                num_gpus=self._pool.gpus,
            )
            tables = iter(rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        try:
            for table in tables:
                for index, data in zip(table["index"].to_pylist(), table["data"].to_pylist(), strict=True):
                    yield index, pickle.loads(data)
        finally:
            tables.close()

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        own = address == "local"
        if own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what it logs as errors are Ray Data's own habits
        settings: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if own else {}
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with _signals_kept():
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **settings)
            except Exception as err:  # of many kinds
                raise CaptionerError(
                    f"no connection to Ray at {printable(address)} ({_reason(err)}); "
                    "check the address, and that Ray and Python have the same versions there and here"
                ) from err
        self._started = True

    def _disconnect(self) -> None:
        import ray

        if self._started:
            self._started = False
            with _signals_kept():
                ray.shutdown()


@dataclasses.dataclass(frozen=True)
class Pool:
    """How many actors there are and what each gets.

    Args:
        actors: how many.
        cpus: of each.
        gpus: of each, 0 or 1.
    """

    actors: int
    cpus: int
    gpus: int


def pool_for(nodes: list[dict[str, Any]], actors: int | None) -> Pool:
    """Divide a cluster.

    Args:
        nodes: as `ray.nodes()` describes them.
        actors: how many are wanted; None: one for each GPU, or each machine where there are none.

    Returns:
        What fits.

    Raises:
        ConfigError: when so many do not fit.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    with_gpus = [found for found in resources if found.get("GPU", 0) >= 1]
    kind, able = ("GPU", with_gpus) if with_gpus else ("CPU", [found for found in resources if found.get("CPU", 0)])
    most = int(sum(found[kind] for found in able))
    actors = actors or (most if with_gpus else max(1, len(able)))
    if actors > most:
        raise ConfigError(
            f"{actors} actors need a {kind} each, the Ray cluster has {most}; lower actors or add machines"
        )
    # As many CPUs as each can have wherever it is: machines are filled evenly, or one GPU after the other.
    if with_gpus:
        cpus = min(int(found.get("CPU", 0) // found["GPU"]) for found in able)
    else:
        cpus = int(most // actors)
        while sum(int(found["CPU"] // cpus) for found in able) < actors:
            cpus -= 1
    return Pool(actors, max(cpus, 0), int(bool(with_gpus)))


def require_ray() -> None:
    """Make sure that Ray can be used.

    Raises:
        ConfigError: when it is not installed.
    """
    try:
        import pyarrow  # noqa: F401
        import ray.data  # noqa: F401
    except ImportError as err:
        raise ConfigError('the engine "ray" needs Ray: pip install "captioner[ray]"') from err


def model_files(captioner: Captioner) -> dict[str, bytes]:
    """Return the files of a model folder.

    Args:
        captioner: the model.

    Returns:
        Their bytes by their names.

    Raises:
        CheckpointError: when there is no room for a temporary copy.
    """
    with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
        captioner.save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _packed(batch: list[SourcePicture]) -> bytes:
    # Processes of Ray run in folders of their own.
    moved = [dataclasses.replace(picture, path=picture.path.absolute()) for picture in batch]
    return pickle.dumps(moved, protocol=pickle.HIGHEST_PROTOCOL)


def _results(batch: list[SourcePicture], answer: Answer) -> list[tuple[SourcePicture, Result]]:
    if answer.fault is not None:
        raise answer.fault
    results = list(answer.results)
    for place in answer.absent:
        if batch[place].path.exists():
            results[place] = ImageReadError(
                f"{printable(batch[place].name)}: is not there on {answer.host}, though it is here; put the pictures "
                "where all machines of the cluster find them at the same path"
            )
    return list(zip(batch, results, strict=True))


def _reason(error: Exception) -> str:
    """Find the line of what went wrong among those of Ray's tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return printable(next((line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)), lines[0]))


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the handler of SIGTERM that Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
