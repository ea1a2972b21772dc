"""A batch run that ends in any way goes on to the records of one that never ended. Real processes, really killed."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if os.name == "nt":
    pytest.skip("processes are forked and signalled in another way there", allow_module_level=True)

import batch_runs
from batch_runs import CHANGED, FIRST, journal_run, make_pictures

from captioner.errors import CaptionerError, ConfigError
from captioner.journal import Entry, Journal, name_hash

COUNT, BAD, BATCH = 60, (7, 8, 31), 4
FED = 2 * BATCH


# --- The journal alone ---


def test_a_kill_at_every_operation_on_the_disk_loses_and_doubles_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, batch_runs.__file__, "journal", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50  # it was killed that often


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The two files of a run of the journal that came to its end."""
    folder = tmp_path_factory.mktemp("finished")
    journal_run(folder, FIRST)
    return (folder / "out.jsonl").read_bytes(), (folder / "out.progress").read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_is_cut_off_the_two_files_is_made_again(finished, tmp_path_factory, data):
    records, journal = finished
    header = journal.index(b"\n") + 1  # it is put in place whole
    folder = tmp_path_factory.mktemp("cut")
    (folder / "out.jsonl").write_bytes(records[: data.draw(st.integers(0, len(records)), label="records")])
    (folder / "out.progress").write_bytes(journal[: data.draw(st.integers(header, len(journal)), label="journal")])
    journal_run(folder, FIRST)
    assert ((folder / "out.jsonl").read_bytes(), (folder / "out.progress").read_bytes()) == finished
    shutil.rmtree(folder)


@settings(max_examples=30)
@given(data=st.data())
def test_records_that_something_else_has_changed_are_refused_and_left_alone(finished, tmp_path_factory, data):
    records, journal = finished
    at = data.draw(st.integers(0, len(records) - 1))
    changed = records[:at] + bytes([records[at] ^ data.draw(st.integers(1, 255))]) + records[at + 1 :]
    folder = tmp_path_factory.mktemp("changed")
    (folder / "out.jsonl").write_bytes(changed)
    (folder / "out.progress").write_bytes(journal)
    with pytest.raises(ConfigError, match="changed by something else"):
        journal_run(folder, FIRST)
    assert ((folder / "out.jsonl").read_bytes(), (folder / "out.progress").read_bytes()) == (changed, journal)
    shutil.rmtree(folder)


def test_a_changed_picture_takes_the_place_of_its_old_record(tmp_path):
    journal_run(tmp_path, FIRST)
    journal_run(tmp_path, CHANGED)
    names = [json.loads(line)["image"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert names == [name for name, _ in CHANGED]
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    journal_run(unbroken, CHANGED)
    assert (tmp_path / "out.jsonl").read_bytes() == (unbroken / "out.jsonl").read_bytes()


def test_of_two_runs_on_one_output_the_second_is_refused(tmp_path):
    with Journal(tmp_path / "out.progress", tmp_path / "out.jsonl") as journal:
        journal.begin({}, overwrite=False)
        with pytest.raises(CaptionerError, match="another run"), Journal(journal.progress, journal.records):
            pytest.fail("two runs write to one output")
    with Journal(journal.progress, journal.records):
        pass  # the first has let go


class FullDiskError(OSError):
    pass


@pytest.mark.parametrize("file", ["records", "journal"])
def test_after_a_fault_of_the_disk_what_was_written_is_intact_and_the_journal_goes_on(tmp_path, monkeypatch, file):
    from captioner import journal as module

    real = module._write_all

    def full(handle, data, **options):
        if handle.name == str(tmp_path / f"out.{'jsonl' if file == 'records' else 'progress'}"):
            handle.write(data[:5])
            raise FullDiskError(28, "No space left on device")
        real(handle, data, **options)

    def append(journal, name):
        journal.append([(Entry(name_hash(name), bytes(8), 0, "", 0), {"image": name})])

    with Journal(tmp_path / "out.progress", tmp_path / "out.jsonl") as journal:
        journal.begin({}, overwrite=False)
        append(journal, "a")
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write_all", full)
            with pytest.raises(CaptionerError, match="No space left on device; what was written before is intact"):
                append(journal, "b")
        assert journal.records.read_text() == '{"image": "a"}\n'
        append(journal, "c")
        assert journal.records.read_text() == '{"image": "a"}\n{"image": "c"}\n'
        assert journal.known(name_hash("b")) is None
    with Journal(journal.progress, journal.records) as again:
        again.begin({}, overwrite=False)
        assert len(again) == 2


# --- Whole runs ---


@pytest.fixture(scope="module")
def server():
    running = batch_runs.Server()
    yield running
    running.close()


@pytest.fixture(scope="module")
def model(tiny_captioner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_captioner.save(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("source") / "pictures", COUNT, bad=BAD)


@pytest.fixture(scope="module")
def command(model):
    def make(source, output, *more, workers=0):
        arguments = ["batch", source, "-o", output, "--model", model, "--device", "cpu", "--batch-size", BATCH]
        # Short captions: what counts is when a run ends, not what it says.
        return [*arguments, "--workers", workers, "--method", "greedy", "--max-words", 4, *more]

    return make


@pytest.fixture(scope="module")
def unbroken(server, command, pictures, tmp_path_factory):
    """The output of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    running = server.start(*command(pictures, folder / "out.jsonl", "--format", "jsonl,csv"), folder=folder)
    assert running.wait() == 3, running.err.read_text()
    return folder


def size(*paths):
    return sum(path.stat().st_size for path in paths if path.exists())


def test_twenty_kills_at_random_moments_leave_the_records_of_an_unbroken_run(
    server, command, pictures, unbroken, tmp_path
):
    files = [tmp_path / "out.jsonl", tmp_path / "out.progress"]
    total = size(unbroken / "out.jsonl", unbroken / "out.progress")
    moments = sorted(random.Random(6).sample(range(1, total), 20))
    expected = (unbroken / "out.jsonl").read_bytes()
    killed = 0
    for number, moment in enumerate(moments):
        more = ["--format", "jsonl,csv,txt", "--into", tmp_path / "texts"]
        running = server.start(*command(pictures, tmp_path / "out.jsonl", *more, workers=number % 2), folder=tmp_path)
        while size(*files) < moment and not running.is_over():
            os.sched_yield()
        running.signal(signal.SIGKILL)
        killed += running.wait() == -signal.SIGKILL
        found = files[0].read_bytes() if files[0].exists() else b""
        assert expected.startswith(found)
    assert killed == 20
    last = server.start(*command(pictures, tmp_path / "out.jsonl", *more), folder=tmp_path)
    assert last.wait() == 3, last.err.read_text()
    assert files[0].read_bytes() == expected
    assert (tmp_path / "out.csv").read_bytes() == (unbroken / "out.csv").read_bytes()
    texts = {path.name: path.read_text().strip() for path in (tmp_path / "texts").rglob("*.txt")}
    records = [json.loads(line) for line in expected.decode().splitlines()]
    assert texts == {Path(r["image"]).stem + ".txt": r["caption"] for r in records if r["error"] is None}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("out.jsonl", "out.progress", "out.progress.lock", "out.csv", "texts", "stdout", "stderr")
    }


def test_no_process_that_decodes_outlives_a_kill(server, command, pictures, tmp_path):
    running = server.start(*command(pictures, tmp_path / "out.jsonl", workers=2), folder=tmp_path)
    while not size(tmp_path / "out.jsonl") and not running.is_over():
        os.sched_yield()
    running.signal(signal.SIGSTOP)
    workers = [int(pid) for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
    running.signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert len(workers) == 2
    while any(is_decoding(pid) for pid in workers):  # they end by themselves, else this test never does
        os.sched_yield()


def is_decoding(pid):
    try:
        return b"captioner.decoding" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_finishes_the_batch_in_flight_and_the_status_is_130(
    server, command, pictures, unbroken, tmp_path, number
):
    running, feed = fed_by_pipe(server, command, pictures, tmp_path)
    running.signal(number)
    wait_for(running, "stopping after this batch")
    feed.write("\n".join(in_order(pictures)) + "\n")  # a run that was not asked to stop would caption them all
    with contextlib.suppress(BrokenPipeError):
        feed.close()
    assert running.wait() == 130
    assert "the same command goes on from here" in running.err.read_text()
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    # The second batch was in flight still, or the third was being made ready.
    assert len(lines) in (FED, FED + BATCH)
    assert (tmp_path / "out.csv").read_text().count("\n") == len(lines) + 1  # the tables are made of what there is
    again = server.start(*command(pictures, tmp_path / "out.jsonl", "--format", "jsonl,csv"), folder=tmp_path)
    assert again.wait() == 3
    assert (tmp_path / "out.jsonl").read_bytes() == (unbroken / "out.jsonl").read_bytes()


def test_the_second_interrupt_stops_at_once_and_nothing_is_lost(server, command, pictures, unbroken, tmp_path):
    running, feed = fed_by_pipe(server, command, pictures, tmp_path)
    running.signal(signal.SIGINT)
    wait_for(running, "stopping after this batch")
    running.signal(signal.SIGINT)  # the pipe, which it waits for, stays open
    assert running.wait() == 130
    feed.close()
    # The second comes too late only where the first met the last batch still in flight.
    assert "error: interrupted" in running.err.read_text()
    assert "Traceback" not in running.err.read_text()
    assert (unbroken / "out.jsonl").read_bytes().startswith((tmp_path / "out.jsonl").read_bytes())
    again = server.start(*command(pictures, tmp_path / "out.jsonl", "--format", "jsonl,csv"), folder=tmp_path)
    assert again.wait() == 3
    assert (tmp_path / "out.jsonl").read_bytes() == (unbroken / "out.jsonl").read_bytes()


def fed_by_pipe(server, command, pictures, folder):
    """Start a run on paths from a pipe; return it, as it waits for more than the first of them, and the pipe."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    arguments = command("-", folder / "out.jsonl", "--format", "jsonl,csv")
    running = server.start(*arguments, folder=folder, stdin=pipe)
    feed = pipe.open("w")
    # Over and over: doubles are left out, but some kilobytes are read before the first picture is looked at.
    feed.write("\n".join(in_order(pictures)[:FED] * 100) + "\n")
    feed.flush()
    output = folder / "out.jsonl"
    while not output.exists() or output.read_bytes().count(b"\n") < FED:
        assert not running.is_over(), running.err.read_text()
        os.sched_yield()
    return running, feed


def in_order(pictures):
    return sorted(str(path) for path in pictures.rglob("*.png"))


def wait_for(running, text):
    while text not in running.err.read_text():
        assert not running.is_over(), running.err.read_text()
        os.sched_yield()


def test_a_file_that_may_not_grow_stops_the_run_with_what_was_written_intact(
    server, command, pictures, unbroken, tmp_path
):
    limit = size(unbroken / "out.jsonl") // 2
    arguments = command(pictures, tmp_path / "out.jsonl", "--format", "jsonl,csv")
    running = server.start(*arguments, folder=tmp_path, file_limit=limit)
    assert running.wait() == 1
    (line,) = [line for line in running.err.read_text().splitlines() if "cannot be written" in line]
    assert str(tmp_path / "out.jsonl") in line
    assert "the same command goes on from there" in line
    assert_intact_and_goes_on(server, arguments, tmp_path, unbroken)


def test_a_full_disk_stops_the_run_with_what_was_written_intact(server, command, pictures, unbroken, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    kilobytes = size(unbroken / "out.jsonl") // 2048
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        arguments = command(pictures, disk / "out.jsonl", "--format", "jsonl,csv")
        running = server.start(*arguments, folder=tmp_path)
        assert running.wait() == 1
        assert "cannot be written: No space left on device" in running.err.read_text()
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        assert_intact_and_goes_on(server, arguments, disk, unbroken, folder=tmp_path)
    finally:
        subprocess.run(["umount", disk], check=True)


def assert_intact_and_goes_on(server, arguments, where, unbroken, folder=None):
    expected = (unbroken / "out.jsonl").read_bytes()
    written = (where / "out.jsonl").read_bytes()
    assert 0 < len(written) < len(expected)
    assert written.endswith(b"\n")
    assert expected.startswith(written)
    again = server.start(*arguments, folder=folder or where)
    assert again.wait() == 3, again.err.read_text()
    assert (where / "out.jsonl").read_bytes() == expected
    assert (where / "out.csv").read_bytes() == (unbroken / "out.csv").read_bytes()
