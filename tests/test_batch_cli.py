"""The commands `batch` and `merge`: what they print, where, and with which exit status."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from batch_runs import make_pictures
from command import run
from rich.console import Console

from captioner import CaptionerError, ConfigError, ImageReadError, SearchOptions
from captioner.batch import Progress
from captioner.cli import app
from captioner.errors import DataError
from captioner.progress import BarDisplay, LineDisplay, Unbreakable, duration, make_display

COUNT, BAD = 7, (2,)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("source") / "pictures", COUNT, bad=BAD)


@pytest.fixture(scope="module")
def model(tiny_captioner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_captioner.save(folder)
    return folder


@pytest.fixture
def batch(model):
    def call(*arguments):
        options = ["--model", model, "--device", "cpu", "--workers", 0, "--method", "greedy", "--max-words", 4]
        return run("batch", *arguments, *options)

    return call


def command_of(name):
    from typer.main import get_command

    return get_command(app).commands[name]


def test_a_folder_is_captioned_and_the_status_says_that_some_failed(batch, source, tmp_path):
    result = batch(source, "-o", tmp_path / "out.jsonl")
    (bad,) = source.rglob("002.png")
    assert (result.exit_code, result.stdout) == (3, "")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == COUNT
    lines = result.stderr.splitlines()
    assert any(line.startswith(f"error: {bad}: ") for line in lines)
    assert f"{COUNT - 1} captioned: {tmp_path / 'out.jsonl'}" in lines
    assert lines[-1] == f"error: 1 of {COUNT} pictures have an error on record: 1 ImageReadError"
    again = batch(source, "-o", tmp_path / "out.jsonl")
    assert again.exit_code == 3
    assert f"0 captioned, {COUNT - 1} done before" in again.stderr
    assert "1 of them before, --retry-failed tries again" in again.stderr


def test_all_well_is_status_0_and_quiet_says_nothing(batch, source, tmp_path):
    result = batch(source / "0", "-o", tmp_path / "out.csv", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 3


def test_the_summary_is_json_on_standard_output(batch, source, tmp_path):
    formats = ["--format", "jsonl,csv", "--format", "txt", "--into", tmp_path / "texts"]
    result = batch(source, "-o", tmp_path / "out.jsonl", "--json", *formats)
    summary = json.loads(result.stdout)
    assert summary.pop("seconds") > 0
    assert summary == {
        "outputs": [str(tmp_path / name) for name in ("out.jsonl", "out.csv", "texts")],
        "captioned": COUNT - 1,
        "skipped": 0,
        "failed": {"ImageReadError": 1},
        "failed_before": 0,
        "stopped": None,
    }


def test_too_many_errors_are_status_1(batch, source, tmp_path):
    result = batch(source, "-o", tmp_path / "out.jsonl", "--max-errors", 0, "--batch-size", 3)
    assert result.exit_code == 1
    assert "too many pictures failed; the same command goes on from here" in result.stderr


def test_after_an_overwriting_run_the_message_says_what_goes_on_from_it(batch, source, tmp_path):
    options = ["-o", tmp_path / "out.jsonl", "--max-errors", 0, "--batch-size", 3]
    result = batch(source, *options, "--overwrite")
    assert result.exit_code == 1
    assert "the same command without --overwrite goes on from here" in result.stderr
    assert "done before" in batch(source, *options).stderr


@pytest.mark.parametrize("error", [CaptionerError, DataError, ConfigError])
def test_a_run_that_ends_by_an_error_has_a_summary_too(source, tmp_path, monkeypatch, error):
    def fail(*_, progress, **__):
        progress(Progress(captioned=2, failed=1, skipped=4, total=None, seconds=1.5, results=[*RESULTS, RESULTS[0]]))
        raise error("the disk is full")

    monkeypatch.setattr("captioner.batch.run", fail)
    result = run("batch", source, "-o", tmp_path / "out.jsonl", "--json")
    if error is ConfigError:  # wrong usage, and nothing was done
        assert (result.exit_code, result.stdout) == (2, "")
        return
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "outputs": [str(tmp_path / "out.jsonl")],
        "captioned": 2,
        "skipped": 4,
        "failed": {"ImageReadError": 1},
        "failed_before": 0,
        "seconds": 1.5,
        "stopped": "failed",
        "error": {"type": error.__name__, "message": "the disk is full"},
    }
    assert result.stderr.endswith("error: the disk is full\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["SOURCE"], "--output"),
        (["-o", "FOLDER/out.jsonl"], "SOURCE"),
        (["SOURCE", "-o", "FOLDER/out.docx"], ".jsonl"),
        (["SOURCE", "-o", "FOLDER/out.jsonl", "--format", "jsonl,docx"], "'docx'"),
        (["SOURCE", "-o", "FOLDER/out.jsonl", "--shard", "2"], "'2'"),
        (["SOURCE", "-o", "FOLDER/out.jsonl", "--beam-size", "0"], "beam_size must be"),
        (["FOLDER/none", "-o", "FOLDER/out.jsonl"], "FOLDER/none: no such file or folder"),
        (["SOURCE", "-o", "-"], "-: an output is a file"),
        (["SOURCE", "-o", "FOLDER/out.jsonl", "--workers", "100000"], "at most 256, got 100000"),
        (["SOURCE", "-o", "FOLDER/out.jsonl", "--max-ratio", "0"], "max_ratio must be"),
        (["SOURCE", "-o", "FOLDER/", "--format", "xmp", "--sidecar", "a"], "sidecar must be one of picture, name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_named_and_the_status_is_2(source, tmp_path, arguments, named):
    def fill(text):
        return text.replace("SOURCE", str(source)).replace("FOLDER", str(tmp_path)) if text != "SOURCE..." else text

    result = run("batch", *map(fill, arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert (named if named == "SOURCE" else fill(named)) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_options_on_an_output_are_status_2(batch, source, tmp_path):
    batch(source, "-o", tmp_path / "out.jsonl")
    result = batch(source, "-o", tmp_path / "out.jsonl", "--ban", "dog")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert 'ban was [], now ["dog"]' in line


def test_the_search_options_are_there(source):
    options = {parameter.name for parameter in command_of("batch").params}
    assert {field.name for field in dataclasses.fields(SearchOptions)} <= options
    shown = run("batch", "--help")
    assert "--overwrite" in shown.stdout
    assert "--resume" in shown.stdout


def test_shards_are_merged(batch, source, tmp_path):
    for number in (1, 2):
        batch(source, "-o", tmp_path / f"{number}.jsonl", "--shard", f"{number}/2")
    parts = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    result = run("merge", *parts, "-o", tmp_path / "all.jsonl", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "outputs": [str(tmp_path / "all.jsonl")],
        "parts": 2,
        "pictures": COUNT,
        "failed": 1,
    }
    missing = run("merge", parts[0], "-o", tmp_path / "less.jsonl")
    assert missing.exit_code == 2
    assert missing.stderr.endswith("1 of 2 shards are missing: 2/2\n")
    text = run("merge", *parts, "-o", tmp_path / "all.csv", "--overwrite")
    assert (text.exit_code, text.stdout) == (0, "")
    assert text.stderr == f"2 parts, {COUNT} pictures, 1 of them failed: {tmp_path / 'all.csv'}\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes close in another way there")
def test_a_closed_standard_output_costs_no_record(source, model, tmp_path):
    command = [sys.executable, "-m", "captioner", "batch", source, "-o", tmp_path / "out.jsonl", "--json", "--quiet"]
    command += ["--model", model, "--device", "cpu", "--workers", "0", "--method", "greedy"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*map(str, command)], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == COUNT


def test_the_limits_of_archives_are_options_and_the_message_names_them(batch, source, tmp_path):
    shutil.make_archive(str(tmp_path / "all"), "zip", source)
    result = batch(tmp_path / "all.zip", "-o", tmp_path / "out.jsonl", "--max-members", 3)
    assert result.exit_code == 2
    assert "more than the limit of 3 members; if you trust the archive, raise --max-members" in result.stderr
    assert batch(tmp_path / "all.zip", "-o", tmp_path / "out.jsonl", "--max-members", 99).exit_code == 3


@pytest.mark.skipif(os.name == "nt", reason="pipes close in another way there")
@pytest.mark.parametrize("way", ["2>&1 >/dev/null | true", "<&- 2>&-"])
def test_a_closed_standard_error_ends_no_run(source, model, tmp_path, way):
    options = f"--model {model} --device cpu --workers 0 --method greedy --max-words 4 --batch-size 1"
    command = f"{sys.executable} -m captioner batch {source} -o {tmp_path}/out.jsonl {options}"
    # The first batch comes when the reader has long ended.
    subprocess.run(["sh", "-c", f"({command}; echo $? > {tmp_path}/status) {way}"], check=False, timeout=300)
    assert (tmp_path / "status").read_text() == "3\n"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == COUNT
    assert all(json.loads(line)["image"] for line in (tmp_path / "out.jsonl").read_text().splitlines())


@pytest.mark.skipif(os.name == "nt", reason="pipes close in another way there")
def test_a_closed_standard_input_is_wrong_use(tmp_path):
    command = f"{sys.executable} -m captioner batch - -o {tmp_path}/out.jsonl <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: -: standard input is closed")
    assert list(tmp_path.iterdir()) == []


# --- What is shown ---


def state(done, *, total=None, results=()):
    return Progress(captioned=done, failed=1, skipped=3, total=total, seconds=10.0, results=results)


class Result:
    text = "A dog."


RESULTS = [("a\n.jpg", Result()), ("bad.jpg", ImageReadError("bad.jpg: not a\x1b[31m picture"))]


def test_lines_come_now_and_then_and_failures_at_once():
    out, now = io.StringIO(), [0.0]
    display = LineDisplay(Console(file=out, width=200), clock=lambda: now[0])
    with display:
        for moment, done in ((0.0, 9), (29.0, 19), (30.0, 29), (31.0, 39)):
            now[0] = moment
            display.update(state(done, total=100 if done > 9 else None, results=RESULTS if done == 19 else ()))
        display.say("left out: 2")
    assert out.getvalue().splitlines() == [
        "13 pictures, 1.0/s, 3 done before, 1 failed",
        "error: bad.jpg: not a\\x1b[31m picture",
        "33 of 100 pictures, 3.0/s, 0:22 left, 3 done before, 1 failed",
        "left out: 2",
    ]


def test_quiet_shows_errors_alone():
    out = io.StringIO()
    with make_display(quiet=True, console=Console(file=out, width=200, force_terminal=True)) as display:
        display.say("left out: 2")
        display.update(state(9, results=RESULTS))
    assert out.getvalue() == "error: bad.jpg: not a\\x1b[31m picture\n"


def test_a_terminal_shows_a_bar_with_rate_time_left_failures_and_the_last_caption():
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system=None)
    display = make_display(quiet=False, console=console)
    assert isinstance(display, BarDisplay)
    with display:
        display.say("left out: 2")
        display.update(state(29, total=100, results=RESULTS))
    shown = out.getvalue()
    for text in ("33/100", "3.0/s", "0:22 left", "1 failed", "a\\n.jpg: A dog.", "error: bad.jpg", "left out: 2"):
        assert text in shown
    assert "\x1b[31m" not in shown


def test_in_a_narrow_terminal_the_caption_gives_way():
    out = io.StringIO()
    long = [*RESULTS, ("folder/of/many/names/0123456789.jpg", Result())]
    with make_display(
        quiet=False, console=Console(file=out, width=80, force_terminal=True, color_system=None)
    ) as display:
        display.update(state(29, total=100, results=long))
    last = next(line for line in reversed(out.getvalue().splitlines()) if "33/100" in line)
    for text in ("━━━", "33/100", "0:22 left", "1 failed", "fold"):
        assert text in last


def test_advice_of_a_refused_run_can_be_followed(source, batch, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", source)
    output = tmp_path / "out.jsonl"
    for more in (["--format", "jsonl,txt"], ["--maps", "npz"]):
        refused = batch(archive, "-o", output, *more)
        assert refused.exit_code == 2
        assert "name a folder with --into" in refused.stderr
        assert not output.exists()
    assert batch(archive, "-o", output, "--format", "jsonl,txt", "--into", tmp_path / "texts").exit_code == 3
    assert len(output.read_text().splitlines()) == COUNT


def test_a_display_that_nobody_takes_goes_dumb():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    for options in ({}, {"force_terminal": True}):
        stream = Unbreakable(Gone())
        with make_display(quiet=False, console=Console(file=stream, width=200, **options)) as display:
            display.say("left out: 2")
            display.update(state(9, results=RESULTS))
        assert not stream.isatty()
    Unbreakable(None).write("text")
    kept = io.StringIO()
    Unbreakable(kept).write("text")
    assert kept.getvalue() == "text"


def test_a_file_is_no_terminal(tmp_path):
    with (tmp_path / "log").open("w") as file:
        assert isinstance(make_display(quiet=False, console=Console(file=file)), LineDisplay)


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (0, "0:00"), (61.4, "1:01"), (3723, "1:02:03")])
def test_a_duration_is_read_as_a_clock(seconds, text):
    assert duration(seconds) == text


def test_the_commands_are_imported_without_torch():
    program = "import captioner.cli, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_relative_output_lies_in_the_current_folder(batch, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch(source, "-o", "out.jsonl")
    assert {path.name for path in Path().iterdir()} == {"out.jsonl", "out.progress", "out.progress.lock"}
