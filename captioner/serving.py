"""What the page needs of the machine that serves it: settings, a port, a folder for uploads, an end. Imports no Gradio.

settings ──▶ prepare_environment ──▶ open_uploads ──▶ the page runs ──▶ SIGTERM or Ctrl-C ──▶ finish
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

from filelock import FileLock, Timeout

from captioner.api import Captioner
from captioner.door import wait_for_answers
from captioner.errors import ConfigError
from captioner.page import Model
from captioner.payloads import sweep
from captioner.service import Service, ServiceLimits
from captioner.telemetry import Telemetry

UPLOAD_AGE_S = 3600.0
SWEEP_S = 300.0
DRAIN_S = 30.0
AUTH_VARIABLE = "CAPTIONER_AUTH"
KINDS = {"mean": "no attention", "additive": "additive attention", "multihead": "multi-head attention"}
"""What the page says of each decoder."""

_PREFIX = "captioner-uploads-"
# What a platform says of where it runs the page. Every other variable of Gradio is left out: some publish the page,
# open folders, start servers beside this one, or run code that a client sends.
_KEPT = {"GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_ROOT_PATH"}


# --- Settings ---


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How the page is served.

    Args:
        model: folder or hub id; None for the bundled model.
        device: as in `Captioner.load`.
        runtime: as in `Captioner.load`.
        threads: as in `Captioner.load`.
        compare: more models, shown beside it.
        host: address to listen on.
        port: to listen on, as text, as it comes from a command line or a variable.
        users: names and passwords; None asks for none.
        limits: of the service.
        trust_proxy: addresses and networks of proxies, between commas, that are believed whom a request comes from;
            "*" is all of them.
        mcp: whether the endpoints are tools of the Model Context Protocol too.
        log: whether a structured log goes to standard error.
        log_captions: whether captions stand in it.
    """

    model: str | None = None
    device: str = "auto"
    runtime: str = "auto"
    threads: int | None = None
    compare: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: str = "7860"
    users: tuple[tuple[str, str], ...] | None = None
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    trust_proxy: str = ""
    mcp: bool = False
    log: bool = False
    log_captions: bool = False

    def __post_init__(self) -> None:
        if not (self.port.isascii() and self.port.isdecimal() and 1 <= int(self.port[:6]) <= 65535):
            raise ConfigError(
                f"--port (or GRADIO_SERVER_PORT) must be a whole number from 1 to 65535, got {self.port[:100]!r}"
            )
        for proxy in filter(None, map(str.strip, self.trust_proxy.split(","))):
            if proxy != "*" and not _is_network(proxy):
                raise ConfigError(
                    f"--trust-proxy (or FORWARDED_ALLOW_IPS) must be addresses or networks, such as 10.0.0.0/8, "
                    f"got {proxy[:100]!r}"
                )
        if self.log_captions and not self.log:
            raise ConfigError("--log-captions needs --log")
        if self.mcp and importlib.util.find_spec("mcp") is None:
            raise ConfigError("--mcp needs the package mcp, which is not installed; pip install 'captioner[mcp]'")


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def read_users(auth: str | None, auth_file: Path | None) -> tuple[tuple[str, str], ...] | None:
    """Return who may use the page.

    Args:
        auth: "user:password"; where neither this nor a file is given, the variable `AUTH_VARIABLE` counts.
        auth_file: a file with one "user:password" a line.

    Returns:
        Names and passwords; None when there is nothing given.

    Raises:
        ConfigError: when both are given, the file cannot be read, or a line is no such pair.
    """
    if auth is not None and auth_file is not None:
        raise ConfigError("--auth and --auth-file exclude each other; put all users into the file")
    if auth_file is not None:
        try:
            # The ends of lines alone are taken away: a password may begin or end with a blank.
            lines = [line.removesuffix("\r") for line in auth_file.read_text(encoding="utf-8").split("\n")]
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"{auth_file}: cannot be read: {getattr(err, 'strerror', None) or err}") from err
        return _pairs([line for line in lines if line.strip()], str(auth_file))
    given = os.environ.get(AUTH_VARIABLE) if auth is None else auth
    return None if given is None else _pairs([given], AUTH_VARIABLE if auth is None else "--auth")


def _pairs(lines: list[str], where: str) -> tuple[tuple[str, str], ...]:
    pairs = [line.partition(":")[::2] for line in lines]
    # Gradio takes the blanks around a user's name away before it looks the name up.
    if not pairs or not all(user.strip() and user == user.strip() and password for user, password in pairs):
        raise ConfigError(
            f"{where} must be USER:PASSWORD, neither of them empty, and no blank before or after the user's name"
        )
    names = [user for user, _ in pairs]
    if twice := [user for user in dict.fromkeys(names) if names.count(user) > 1]:
        raise ConfigError(f"{where} names {twice[0][:100]!r} twice; leave one line for each user")
    return tuple(pairs)


def require_free(host: str, port: int) -> None:
    """Say in one line what Gradio would say in the traceback of a thread.

    Args:
        host: address to listen on.
        port: to listen on.

    Raises:
        OSError: when nothing can listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server((str(address[0]), port), family=family).close()
    except (OSError, UnicodeError) as err:  # a host name with an impossible part is a UnicodeError
        reason = err.strerror if isinstance(err, OSError) else "not a possible name"
        raise OSError(
            f"cannot listen on {host[:200]!r}, port {port}: {reason}; choose others with --host, --port"
        ) from err


# --- Models ---


def open_services(settings: ServeSettings, closing: contextlib.ExitStack) -> tuple[Service, dict[str, Model]]:
    """Load the models, each behind a service.

    Args:
        settings: which models, and their limits.
        closing: closes the services.

    Returns:
        The service of the page's own model, and the others by the names to show.

    Raises:
        CheckpointError: when a model cannot be loaded.
        ConfigError: for a model that is no path.
    """
    telemetry = Telemetry(log="stderr" if settings.log else None, log_captions=settings.log_captions)
    how: Any = {"device": settings.device, "runtime": settings.runtime, "threads": settings.threads}
    service = Service(Captioner.load(settings.model, **how), limits=settings.limits, telemetry=telemetry)
    closing.callback(service.close, drain_s=0)
    others: dict[str, Model] = {}
    for number, model in enumerate(settings.compare, 2):
        other = Service(Captioner.load(model, **how), limits=settings.limits)
        closing.callback(other.close, drain_s=0)
        others[title(model, number, other.captioner.config.decoder)] = other
    return service, others


def title(model: str | None, number: int, decoder: str | None = None) -> str:
    """Return the name of a model on the page: no path of this machine belongs there.

    Args:
        model: folder or hub id; None for the bundled model.
        number: its place on the page, which tells two of one name apart.
        decoder: its kind, one of `KINDS`, to be said too.

    Returns:
        The name.
    """
    name = f"{'The bundled model' if model is None else Path(model).name} ({number})"
    return name if decoder is None else f"{name}, {KINDS[decoder]}"


# --- Environment and uploads ---


@functools.cache
def prepare_environment() -> Path:
    """Set what Gradio reads when it is imported and when a page is built: it comes before both.

    Returns:
        The folder of this process for uploaded files, its name not to be guessed; `open_uploads` makes it.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_") and name not in _KEPT]:
        del os.environ[name]
    folder = Path(tempfile.gettempdir()).resolve() / f"{_PREFIX}{secrets.token_hex(12)}"
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    # Gradio would make statistics of the last 10 000 calls after every call, for a page that is turned off.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    return folder


@functools.cache
def open_uploads(folder: Path) -> None:
    """Make the folder for uploads, which is deleted when the process ends, and delete those that dead processes left.

    Args:
        folder: from `prepare_environment`.

    Raises:
        OSError: when it cannot be made.
    """
    for lock_file in folder.parent.glob(f"{_PREFIX}*.lock"):
        _delete_abandoned(lock_file)
    # The lock ends with the process, however that ends: so it is known whose folders are of no use any more.
    lock = FileLock(f"{folder}.lock", mode=0o600)
    lock.acquire(timeout=10)
    folder.mkdir(mode=0o700)
    atexit.register(_delete, folder, lock)


def _delete(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


def _delete_abandoned(lock_file: Path) -> None:
    with contextlib.suppress(OSError, Timeout):  # it is in use, gone, or another user's
        found = lock_file.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid():
            lock = FileLock(lock_file, mode=0o600)
            lock.acquire(timeout=0)
            _delete(lock_file.with_suffix(""), lock)


@contextlib.contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Delete old uploads again and again, as long as the block lasts.

    Args:
        folder: of the uploads.

    Yields:
        Nothing.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(SWEEP_S):
            sweep(folder, older_than_s=UPLOAD_AGE_S)

    thread = threading.Thread(target=run, name="captioner-sweep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --- The end ---


class Stopping:
    """Turns SIGTERM and Ctrl-C into the end of a wait. Used in the main thread, as a context manager.

    While nobody waits, Ctrl-C is a `KeyboardInterrupt` as ever, and a SIGTERM is kept for the wait.
    """

    def __init__(self) -> None:
        # A pipe, since a handler may come at any moment: even an event's own lock could be held by this thread.
        self._read, self._write = os.pipe()

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait
        os.write(self._write, bytes([number]))

    def wait(self) -> bool:
        """Wait for a signal.

        Returns:
            Whether it was Ctrl-C.
        """
        signal.signal(signal.SIGINT, self._note)
        return os.read(self._read, 1) == bytes([signal.SIGINT])


def finish(service: Service) -> None:
    """Refuse new requests, and wait until those that are open have their answers; the page is closed after it.

    Args:
        service: before the model.
    """
    end_s = time.monotonic() + DRAIN_S  # one for both: whoever ends us waits no longer either
    service.drain()
    wait_for_answers(service.telemetry, timeout_s=DRAIN_S)
    service.close(max(0.0, end_s - time.monotonic()))
