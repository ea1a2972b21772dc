"""Runs of `captioner batch` that tests can kill: real processes, forked from one that has torch loaded already.

python tests/batch_runs.py          serves requests, one JSON object a line, see `Server`
python tests/batch_runs.py journal FOLDER
                                    kills a run of the journal at every operation on the disk, see `kill_everywhere`
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from captioner.sources import SourcePicture

# --- Pictures ---


def make_pictures(folder, count=20, *, bad=()):
    """Write small pictures that differ in their large parts, and files that are none."""
    rng = np.random.default_rng(count)
    for index in range(count):
        path = folder / f"{index % 3}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index in bad:
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(index))
        else:
            coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((40, 30), Image.Resampling.NEAREST).save(path)
    return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadly(SourcePicture):
    """A picture that kills the process which reads it, as long as its file `path` is there; and then once less."""

    lives: int = 10**6

    def read(self):
        died = self.path.with_name(f"{self.path.name}.died")
        before = len(died.read_bytes()) if died.exists() else 0
        if before < self.lives:
            with died.open("ab") as file:
                file.write(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read()


# --- A server of runs ---


@dataclasses.dataclass
class Running:
    """A process of the server's."""

    server: subprocess.Popen
    pid: int
    out: Path
    err: Path

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def is_over(self):
        """Tell whether it is a zombie, which the server has not yet taken note of, or gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    def wait(self):
        """Return its exit status, negative for a signal."""
        self.server.stdin.write("wait\n")
        self.server.stdin.flush()
        return os.waitstatus_to_exitcode(int(self.server.stdout.readline()))


class Server:
    """Starts the command line in processes that have torch loaded; one at a time."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, *arguments, folder, stdin=os.devnull, file_limit=None):
        out, err = folder / "stdout", folder / "stderr"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "out": str(out),
            "err": str(err),
            "stdin": str(stdin),
            "file_limit": file_limit,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Running(self._process, int(self._process.stdout.readline()), out, err)

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve():
    import torch

    import captioner.batch
    import captioner.cli
    import captioner.progress

    torch.set_num_threads(1)  # threads do not survive a fork
    # All that is imported only when it is needed, so that no run has to.
    captioner.Captioner.load(device="cpu").caption(np.zeros((9, 9, 3), np.uint8))
    captioner.progress.make_display(quiet=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run_forked(request)
        print(pid, flush=True)
        sys.stdin.readline()  # "wait"
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)


def run_forked(request):
    status = 99
    try:
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if request["file_limit"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
        sys.argv = ["captioner", *request["arguments"]]
        from captioner.__main__ import main

        try:
            main()
            status = 0
        except SystemExit as err:
            status = err.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# --- The journal alone, killed at every operation on the disk ---


def journal_run(folder, states, *, overwrite=False, header="a"):
    """Do with a journal what a run does, with records that are made up; go on where it ended."""
    from captioner.journal import Entry, Journal, name_hash, state_hash

    with Journal(folder / "out.progress", folder / "out.jsonl", earlier=folder / "out.records.jsonl") as journal:
        if not journal.exists:
            assert not (folder / "out.jsonl").exists(), "an output without a journal"
        begun = folder / f"begun-{header}"
        journal.begin({"header": header}, overwrite=overwrite and not begun.exists())
        begun.touch()
        batch = []

        def write():
            journal.intend({entry.name: entry.texts for entry, _ in batch})
            journal.append(batch)

        for place, (name, state) in enumerate(states):
            known = journal.known(name_hash(name))
            if known is None or known[0] != state_hash(state, None):
                texts = b"t" + state_hash(state, place)  # a hash of the right length
                entry = Entry(name_hash(name), state_hash(state, None), place, "", 0, texts)
                batch.append((entry, {"image": name, "caption": made_up(name, state, header)}))
            if len(batch) == 3:
                write()
                batch.clear()
        if batch:
            write()
        journal.finish({"pictures": len(states)})
        journal.compact()
        journal.claim(".csv", header)
        journal.end_overwriting()
        assert journal.tables(".csv")[-1] == header
        for name, state in states:
            assert len(journal.written(name_hash(name))) == 1, (name, state)


def made_up(name, state, header):
    """Return a text whose length differs from picture to picture."""
    digest = hashlib.sha256(f"{name} {state} {header}".encode()).hexdigest()
    return digest[: 1 + int(digest[:2], 16) % 60]


FIRST = [(f"{index}.jpg", 1) for index in range(10)]
CHANGED = [(name, 2 if index in (0, 4, 5) else 1) for index, (name, _) in enumerate(FIRST)] + [("new.jpg", 1)]
SCENARIO = (
    {"states": FIRST},
    {"states": CHANGED},
    {"states": FIRST[:7], "overwrite": True, "header": "b"},
)


class Killer:
    """Kills this process, with SIGKILL, at its n-th operation on the disk; half of what it was to write is written."""

    def __init__(self, at):
        self._at, self.count = at, 0

    def _is_now(self):
        self.count += 1
        return self.count == self._at

    def before(self, function):
        def call(*arguments, **options):
            if self._is_now():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def amid(self, write):
        def call(file, data, **options):
            if self._is_now():
                file.write(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data, **options)

        return call


def kill_everywhere(folder):
    """Kill each step of the scenario at each operation, go on, and compare with the step unbroken; print how often."""
    from captioner import journal

    def forked(work, at):
        pid = os.fork()
        if pid:
            _, status = os.waitpid(pid, 0)
            return os.waitstatus_to_exitcode(status)
        try:
            killer = Killer(at)
            journal._write_all = killer.amid(journal._write_all)
            journal.os.fsync = killer.before(os.fsync)
            for name in ("replace", "unlink", "touch"):
                setattr(Path, name, killer.before(getattr(Path, name)))
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)

    def contents(where):
        return {path.name: path.read_bytes() for path in where.iterdir() if not path.name.endswith(".lock")}

    def copy(files, where):
        where.mkdir()
        for name, data in files.items():
            (where / name).write_bytes(data)

    before, killed = {}, 0
    for number, step in enumerate(SCENARIO):
        whole = folder / f"{number}"
        copy(before, whole)
        journal_run(whole, **step)
        after = contents(whole)
        for at in range(1, 1000):
            broken = folder / f"{number}-{at}"
            copy(before, broken)
            status = forked(lambda where=broken, step=step: journal_run(where, **step), at)
            if status == 0:
                break
            assert status == -signal.SIGKILL, (number, at, status)
            killed += 1
            journal_run(broken, **step)
            found = contents(broken)
            assert found["out.jsonl"] == after["out.jsonl"], (number, at)
            assert found.keys() == after.keys(), (number, at, found.keys())
        before = after
    print(killed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["journal"]:
        kill_everywhere(Path(sys.argv[2]))
    else:
        serve()
