"""Pictures decoded in processes of their own, in order, while the model works in this one.

    pictures ──▶ a few ahead ──▶ one thread for each process ──pickle, pipes──▶ `serve`: read, decode, resize
                                                             ◀── PreparedPicture or ImageError

The processes import no torch, and are started as commands, neither forked (the threads of torch would not survive)
nor spawned by `multiprocessing` (which would run the user's script again). They end when their standard input does,
however this process ended. Each holds one picture at a time, so that one which dies names the picture it died of.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from captioner.config import PreprocessingConfig
from captioner.errors import CaptionerError, ConfigError, ImageError, ImageReadError
from captioner.images import DEFAULT_LIMITS, ImageLimits
from captioner.prepared import PreparedPicture, prepare
from captioner.sources import SourcePicture

WORKERS_LIMIT = 16
"""Processes that are started without being asked for."""
MOST_WORKERS = 256
"""And those that can be asked for: each takes some 60 MB, and a few feed any model."""
_READY = "ready"


class Task(NamedTuple):
    """What a process is asked to do.

    Args:
        picture: to read and decode.
        config: of the model.
        limits: of pixels and bytes.
    """

    picture: SourcePicture
    config: PreprocessingConfig
    limits: ImageLimits = DEFAULT_LIMITS


class WorkerDiedError(Exception):
    """A process ended while it held a picture; the message says how."""


def default_workers() -> int:
    """Return how many processes to decode in: as many as this process may use CPUs, but not more than 16."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, WORKERS_LIMIT)


def decode(task: Task) -> PreparedPicture | ImageError:
    """Read, decode and resize one picture.

    Args:
        task: which, and for which model.

    Returns:
        The picture as a model takes it, or why it cannot be read.
    """
    try:
        return prepare(task.picture.read(), task.config, name=task.picture.name, limits=task.limits, keep_source=False)
    except ImageError as err:
        return err


class Decoders:
    """Processes that decode; use it as a context manager, which ends them.

    Args:
        workers: how many; 0 decodes in this process.

    Raises:
        ConfigError: when `workers` is not a whole number, from 0 to 256.
    """

    def __init__(self, workers: int) -> None:
        if not isinstance(workers, int) or isinstance(workers, bool) or not 0 <= workers <= MOST_WORKERS:
            raise ConfigError(f"workers must be a whole number, at least 0 and at most {MOST_WORKERS}, got {workers!r}")
        self._lock = threading.Lock()
        self._closed = False
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._all: list[_Worker] = []
        self.workers = workers

    def __enter__(self) -> Self:
        try:
            for _ in range(self.workers):
                self._idle.put(self._start())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._closed = True
        for worker in self._all:
            worker.kill()

    @property
    def process_ids(self) -> list[int]:
        """The ids of the processes that are running."""
        return [worker.process.pid for worker in self._all]

    def map(
        self,
        pictures: Iterable[SourcePicture],
        config: PreprocessingConfig,
        *,
        ahead: int,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> Iterator[tuple[SourcePicture, PreparedPicture | ImageError]]:
        """Decode pictures.

        Args:
            pictures: drawn from only as far as is decoded ahead.
            config: of the model.
            ahead: decoded pictures that are held, at most.
            limits: of pixels and bytes.

        Yields:
            Each picture and what came of it, in their order.

        Raises:
            CaptionerError: when no process can be started.
        """
        tasks = (Task(picture, config, limits) for picture in pictures)
        if not self.workers:
            yield from ((task.picture, decode(task)) for task in tasks)
            return
        with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
            window = deque((task, threads.submit(self._decode, task)) for task in itertools.islice(tasks, ahead))
            try:
                while window:
                    task, future = window.popleft()
                    result = future.result()
                    if isinstance(result, WorkerDiedError):
                        concurrent.futures.wait([other for _, other in window])
                        result = self._alone(task)
                    yield task.picture, result
                    window.extend((task, threads.submit(self._decode, task)) for task in itertools.islice(tasks, 1))
            finally:
                for _, future in window:
                    future.cancel()

    def _alone(self, task: Task) -> PreparedPicture | ImageError:
        """Decode, while nothing else does, a picture that a process died of: it may have been the memory."""
        result = self._decode(task)
        if not isinstance(result, WorkerDiedError):
            return result
        return ImageReadError(
            f"{task.picture.name}: decoding it ended the process twice ({result}); it is damaged, or too large for "
            "the memory: save it again, smaller"
        )

    def _decode(self, task: Task) -> PreparedPicture | ImageError | WorkerDiedError:
        worker = self._idle.get()
        try:
            return worker.decode(task)
        except WorkerDiedError as err:
            worker = self._start(instead=worker)
            return err
        finally:
            self._idle.put(worker)

    def _start(self, instead: _Worker | None = None) -> _Worker:
        with self._lock:
            if instead is not None:
                if self._closed:
                    return instead
                self._all.remove(instead)
                instead.kill()
            self._all.append(worker := _Worker())
            return worker


class _Worker:
    """One process and its pipes."""

    def __init__(self) -> None:
        # The same package as here, wherever it is imported from, and nothing from the current folder.
        paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from captioner.decoding import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # an interrupt at the terminal is not for it
            )
        except OSError as err:
            raise CaptionerError(
                f"no process can be started to decode pictures: {err.strerror or err}; use workers=0"
            ) from err
        self._ready = False

    def decode(self, task: Task) -> PreparedPicture | ImageError:
        """Have a picture decoded; raises WorkerDiedError, and whatever other error there was in the process."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            if not self._ready:
                self._ready = pickle.load(stdout) == _READY
            pickle.dump(task, stdin)
            stdin.flush()
            result: PreparedPicture | Exception = pickle.load(stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as err:
            status = self.process.wait()
            if not self._ready and status > 0:
                raise CaptionerError(
                    f"a process that decodes pictures cannot start, it ends with status {status}; use workers=0"
                ) from err
            raise WorkerDiedError(_how_it_ended(status)) from err
        if isinstance(result, Exception) and not isinstance(result, ImageError):
            raise result
        return result

    def kill(self) -> None:
        """End the process at once; it holds nothing that is not read again."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it had not yet read
                    pipe.close()


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    with contextlib.suppress(ValueError):
        return f"signal {-status}, {signal.Signals(-status).name}"
    return f"signal {-status}"


def serve(tasks: IO[bytes], results: IO[bytes]) -> None:
    """Decode what comes in until there is no more.

    Args:
        tasks: pickled `Task`s, from the process that started this one.
        results: where what comes of each is written.
    """
    with contextlib.suppress(EOFError, BrokenPipeError):  # the other process has ended
        while True:
            task: Task = pickle.load(tasks)
            try:
                result: PreparedPicture | Exception = decode(task)
            except Exception as err:  # a fault of ours: it is raised where it is seen
                result = err
            pickle.dump(result, results, protocol=pickle.HIGHEST_PROTOCOL)
            results.flush()


def main() -> None:
    """Serve on standard input and output."""
    for wanted in (signal.SIGINT, signal.SIGTERM):  # the process that started this one decides when to stop
        signal.signal(wanted, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "wb")
    pickle.dump(_READY, results)
    results.flush()
    # Libraries of C print what they think of a picture; its record says it.
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (1, 2):
        os.dup2(null, standard)
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, results)
