"""A page that is served in this process or in one of its own, and what a client does there, as curl would."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
from browser import free_port

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 180  # a machine may be busy with other work; nothing waits longer than it must
API = "/gradio_api"
HTTP = httpx.Client(timeout=WAIT_S)
META = {"_type": "gradio.FileData"}


@contextlib.contextmanager
def served(model, **options):
    """Serve a page without examples; yield its url."""
    import app

    page = app.build_app(model, examples=app.Examples(model, [], {}))
    url = app.start(page, host="127.0.0.1", port=free_port(), **options)
    try:
        yield url.rstrip("/")
    finally:
        page.close(verbose=False)


def post(url, route, body, **options):
    """Send JSON to a route of the API."""
    return HTTP.post(f"{url}{API}/{route}", json=body, **options)


def upload(url, data, name="photo.png", **options):
    """Upload a file and return its path there."""
    answer = HTTP.post(f"{url}{API}/upload", files={"files": (name, data)}, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def events(text):
    """Return the last of the events that a stream tells: its name and its value."""
    kind, value = None, None
    for line in text.splitlines():
        name, _, rest = line.partition(": ")
        if name == "event":
            kind = rest
        elif name == "data":
            value = json.loads(rest)
    return SimpleNamespace(kind=kind, value=value)


def ask(url, endpoint, *, route="call/v2", **values):
    """Call an endpoint by names and wait for what it says."""
    call = post(url, f"{route}/{endpoint}", values)
    assert call.status_code == 200, call.text
    event = call.json()["event_id"]
    return events(HTTP.get(f"{url}{API}/{route}/{endpoint}/{event}").text)


class Process:
    """`captioner serve` in a process of its own.

    Args:
        folder: where it keeps what it keeps: its home, and the folder for temporary files.
        arguments: of the command.
        variables: of its environment.
    """

    def __init__(self, folder, *arguments, **variables):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.temporary = folder
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
        environment |= {"TMPDIR": str(folder), "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.log = folder / f"log-{self.port}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "captioner", "serve", "--port", str(self.port), *arguments],
                cwd=folder,
                env=environment | variables,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self):
        line = "begin"
        while line and " is at " not in line:  # Gradio has a line of its own about tools
            line = self.process.stdout.readline()
        assert line, self.errors()
        return self

    def __exit__(self, *raised):
        self.process.kill()
        self.process.wait(WAIT_S)
        self.process.stdout.close()

    def stop(self, number=signal.SIGTERM):
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def errors(self):
        """Return what it wrote to standard error."""
        return self.log.read_text()

    def uploads(self):
        """Return what is there of folders for uploads, those of other processes too."""
        return sorted(self.temporary.glob("captioner-uploads-*"))
