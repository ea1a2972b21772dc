"""The command line: what it prints, where, and with which exit status."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from captions import everything, with_nan
from command import run
from PIL import Image

import captioner as package
from captioner import SearchOptions
from captioner.cli import app

FULL = Path("/dev/full")


def process(*arguments, **settings):
    """Start the command line in a process of its own."""
    command = [sys.executable, "-m", "captioner", *map(os.fspath, arguments)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    if os.name != "nt":
        # A shell's background job ignores the interrupt, and so would everything that it starts.
        settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, **settings)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


# --- Captions ---


def test_a_photo_is_captioned_on_one_line(captioner, example_photos):
    result = run("caption", *example_photos, "--device", "cpu")
    assert (result.exit_code, result.stderr) == (0, "")
    found = {path: captioner.caption(path) for path in example_photos}
    expected = [f"{path}: {caption.text} ({caption.confidence:.0%} confident)" for path, caption in found.items()]
    assert result.stdout.splitlines() == expected


def test_a_model_without_a_confidence_says_nothing_of_it(tiny_captioner, photo, tmp_path):
    tiny_captioner.save(tmp_path / "model")
    result = run("caption", photo, "--device", "cpu", "--model", tmp_path / "model")
    assert result.stdout.splitlines() == [f"{photo}: {tiny_captioner.caption(photo).text}"]


def test_alternatives_stand_below_their_caption(captioner, example_photos):
    path = example_photos[0]
    result = run("caption", path, "--n-best", 3, "--device", "cpu")
    captions = everything(captioner.caption(path, n_best=3))
    indent = " " * len(str(path))
    sure = f" ({captions[0].confidence:.0%} confident)"
    expected = [f"{path}: {captions[0].text}{sure}", *(f"{indent}  {other.text}" for other in captions[1:])]
    assert result.stdout.splitlines() == expected


def test_a_json_record_is_that_of_the_contract(captioner, example_photos):
    path = example_photos[0]
    options = {"beam_size": 4, "n_best": 3, "max_words": 9, "ban": ["man", "red ball"]}
    arguments = ["--beam-size", 4, "--n-best", 3, "--max-words", 9, "--ban", "man", "--ban", "red ball"]
    result = run("caption", path, "--json", "--device", "cpu", *arguments)
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    record = json.loads(line)
    assert record == captioner.caption(path, **options).to_record(str(path))
    assert list(record) == ["image", "caption", "score", "confidence", "words", "alternatives", "error"]
    assert all(list(word) == ["word", "probability"] for word in record["words"])
    assert [list(other) for other in record["alternatives"]] == [["caption", "score"]] * 2


def test_a_file_name_that_is_no_text_is_captioned_and_its_record_gives_it_back(photo):
    named = photo.rename(photo.with_name(os.fsdecode(b"\xff\xe9.png")))
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    running = process("caption", named, "--json", env=strict)
    stdout, stderr = running.communicate()
    assert (running.returncode, stderr) == (0, b"")
    assert json.loads(stdout)["image"] == str(named)


UNSAFE = ["new\nline.png", "red\x1b[31m.png", "tab\t.png", "back\x08space.png"]


@pytest.mark.skipif(os.name == "nt", reason="such names cannot be there")
@pytest.mark.parametrize("name", UNSAFE)
def test_a_file_name_of_control_characters_is_shown_on_one_line_escaped(photo, name):
    named = photo.rename(photo.with_name(name))
    for arguments in (["caption", named], ["explain", named, "-o", photo.parent / "figure.png"]):
        first = run(*arguments).stdout.splitlines()[0]
        assert first.startswith(f"{photo.parent}{os.sep}{name.encode('unicode_escape').decode()}: ")
    assert len(run("caption", named, named).stdout.splitlines()) == 2
    missing = run("caption", f"{named}.lost")
    assert len(missing.stderr.splitlines()) == 1
    assert missing.stderr.rstrip("\n").isprintable()


# --- Bad pictures among good ones ---


def test_a_missing_photo_is_named_and_the_status_is_3():
    result = run("caption", "no/such/photo.jpg")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == "error: no/such/photo.jpg: no such file; check the path\n"


def test_bad_photos_are_named_and_the_good_ones_captioned(photo, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff" + bytes(100))
    result = run("caption", photo, bad, photo, "nowhere.png", "--batch-size", 2)
    assert result.exit_code == 3
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [str(photo), str(photo)]
    first, second, total = result.stderr.splitlines()
    assert str(bad) in first
    assert "nowhere.png" in second
    assert "2 of 4" in total


def test_the_record_of_a_bad_photo_stands_in_its_place(photo):
    result = run("caption", "nowhere.png", photo, "--json")
    bad, good = (json.loads(line) for line in result.stdout.splitlines())
    assert result.exit_code == 3
    assert bad == {
        "image": "nowhere.png",
        "caption": None,
        "score": None,
        "confidence": None,
        "words": [],
        "alternatives": [],
        "error": {"type": "ImageReadError", "message": "nowhere.png: no such file; check the path"},
    }
    assert list(good) == list(bad)
    assert good["error"] is None


# --- Wrong use ---


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["caption", "PHOTO", "--beam-sise", "2"], "--beam-sise"),
        (["caption", "PHOTO", "--beam-size", "two"], "--beam-size"),
        (["caption", "PHOTO", "--beam-size", "0"], "beam_size must be"),
        (["caption", "PHOTO", "--top-p", "1.5"], "top_p must be"),
        (["caption", "PHOTO", "--temperature", "nan"], "temperature must be"),
        (["caption", "PHOTO", "--n-best", "9"], "raise beam_size to 9"),
        (["caption", "PHOTO", "--method", "magic"], "beam, greedy, sample"),
        (["caption", "PHOTO", "--method", "greedy", "--must-include", "dog"], "must_include"),
        (["caption", "PHOTO", "--device", "gpu"], "'gpu'"),
        (["caption", "PHOTO", "--batch-size", "0"], "batch_size"),
        (["caption"], "PHOTO"),
        (["describe", "PHOTO"], "describe"),
        (["explain", "PHOTO"], "--output"),
        (["explain", "PHOTO", "-o", "figure.docx"], ".png"),
        (["explain", "PHOTO", "-o", "no/such/folder/figure.png"], "no/such/folder"),
        (["explain", "PHOTO", "-o", "figure.png", "--sentence", "A dog.", "--seed", "1"], "seed"),
        (["info", "PHOTO"], "PHOTO"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_named_and_the_status_is_2(photo, arguments, named):
    result = run(*(photo if argument == "PHOTO" else argument for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert named.lower() in result.stderr.lower()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["caption", "PHOTO", "--must-include", "qwyzzle"], "'qwyzzle'"),
        (["caption", "PHOTO", "--must-include", "dog", "--ban", "dog"], "'dog'"),
        (["caption", "PHOTO", "--must-include", "a man with a dog", "--max-words", "3"], "3"),
        (["caption", "PHOTO", "--max-words", "150"], "max_words=150"),
        (["caption", "PHOTO", "--model", "no/such/folder/here"], "no/such/folder/here"),
        (["explain", "PHOTO", "-o", "FOLDER/figure.png", "--sentence", "A qwyzzle."], "'qwyzzle'"),
        (["info", "--model", "FOLDER"], "config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_impossible_fails_with_one_line_and_the_status_is_1(photo, arguments, named):
    places = {"PHOTO": str(photo), "FOLDER": str(photo.parent)}
    filled = [re.sub("PHOTO|FOLDER", lambda match: places[match[0]], argument) for argument in arguments]
    result = run(*filled)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line


# --- The other commands ---


def test_explain_writes_a_figure_and_tells_each_word(captioner, example_photos, tmp_path):
    path = example_photos[0]
    result = run("explain", path, "-o", tmp_path / "figure.png", "--device", "cpu", "--beam-size", 2)
    assert result.exit_code == 0
    caption = captioner.caption(path, beam_size=2)
    first, _, *lines = result.stdout.splitlines()
    assert first == f"{path}: {caption.text} ({caption.confidence:.0%} confident)"
    for word, line in zip(caption.words, lines, strict=False):
        row, column = np.unravel_index(word.attention.argmax(), word.attention.shape)
        assert line.split()[:2] == [word.text, f"{word.probability:.2f}"]
        assert f"({row + 1}, {column + 1})" in line
    assert len(lines) == len(caption.words) + 1
    assert Image.open(tmp_path / "figure.png").format == "PNG"


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".jpg", ".PNG"])
def test_explain_draws_a_given_sentence_into_every_kind_of_file(photo, suffix):
    figure = photo.parent / f"figure{suffix}"
    result = run("explain", photo, "-o", figure, "--sentence", "a dog")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{photo}: A dog. (")
    assert figure.stat().st_size > 1000


def test_explain_of_a_bad_photo_has_status_3_and_writes_nothing(tmp_path):
    result = run("explain", tmp_path / "nowhere.jpg", "-o", tmp_path / "figure.png")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "nowhere.jpg" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("through", ["the same name", "a link", "another spelling"])
def test_explain_never_replaces_the_photo_itself(photo, through):
    content, output = photo.read_bytes(), photo
    if through == "a link":
        output = photo.with_name("link.png")
        output.symlink_to(photo)
    if through == "another spelling":
        output = photo.parent / ".." / photo.parent.name / photo.name
    result = run("explain", photo, "-o", output, "--sentence", "a dog")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is the photo itself" in result.stderr
    assert photo.read_bytes() == content


def test_a_figure_that_fails_leaves_the_one_before_it_and_nothing_else(photo, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    figure = photo.with_name("figure.png")
    figure.write_bytes(b"before")
    monkeypatch.setattr(Figure, "savefig", fail)
    result = run("explain", photo, "-o", figure, "--sentence", "a dog")
    assert result.exit_code == 1
    assert "figure.png: the figure cannot be written: No space left" in result.stderr
    assert figure.read_bytes() == b"before"
    assert {path.name for path in photo.parent.iterdir()} == {photo.name, figure.name}


def test_a_figure_that_cannot_be_written_is_named(photo, tmp_path):
    (tmp_path / "figure.png").mkdir()
    result = run("explain", photo, "-o", tmp_path / "figure.png", "--sentence", "a dog")
    assert result.exit_code == 1
    assert f"error: {tmp_path / 'figure.png'}: the figure cannot be written" in result.stderr


def test_info_tells_the_model_and_its_card(captioner):
    facts = json.loads(run("info", "--json").stdout)
    assert facts["captioner"] == package.__version__
    assert facts["model"] == "bundled"
    assert facts["decoder"] == captioner.config.decoder
    assert facts["encoder"]["backbone"] == captioner.config.encoder.backbone
    assert facts["grid"] == list(captioner.model.encoder.grid_hw)
    assert facts["vocabulary_size"] == captioner.tokenizer.vocabulary_size
    assert facts["card"] == captioner.card
    assert facts["runtimes"] == list(captioner.runtimes) == ["torch", "onnx"]
    text = run("info").stdout
    assert re.search("^runtimes +torch, onnx$", text, re.MULTILINE)
    for name in ("captioner", "torch", "device", "decoder", "encoder", "grid", "parameters"):
        assert re.search(rf"^{name} ", text, re.MULTILINE)
    assert captioner.card.strip() in text


def test_a_fault_of_another_file_is_not_blamed_on_standard_output(monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr("captioner.cli._load", fail)
    result = run("info")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: [Errno 13] Permission denied: 'some/file'\n"


@pytest.mark.parametrize("name", ["a" * 300, "a\tb", ""])
def test_an_impossible_name_of_a_model_is_one_line(photo, name):
    result = run("caption", photo, "--model", name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "standard output" not in result.stderr


def test_a_photo_without_a_caption_is_named_and_the_good_ones_captioned(photo, monkeypatch):
    from captioner.api import Captioner

    encode = Captioner._encode
    bad = photo.with_name("bad.png")
    bad.write_bytes(photo.read_bytes())

    def spoil(self, inputs):
        return with_nan(encode(self, inputs), [item.name == str(bad) for item in inputs])

    monkeypatch.setattr(Captioner, "_encode", spoil)
    result = run("caption", bad, photo, "--json")
    assert result.exit_code == 3
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["error"]["type"] == "SearchError"
    assert second["caption"]
    assert str(bad) in result.stderr


def test_a_model_folder_is_used(tiny_captioner, photo, tmp_path):
    tiny_captioner.save(tmp_path / "model")
    result = run("caption", photo, "--model", tmp_path / "model", "--device", "cpu")
    assert result.stdout == f"{photo}: {tiny_captioner.caption(photo).text}\n"


def test_the_version_is_shown():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"captioner {package.__version__}\n")


@pytest.mark.parametrize("command", ["caption", "explain"])
def test_the_search_options_are_the_fields_of_search_options_with_their_help(command):
    options = {parameter.name: parameter for parameter in command_of(command).params}
    fields = dataclasses.fields(SearchOptions)
    computing = {"model", "device", "runtime", "threads"}
    others = {"caption": {"photos", "as_json", "batch_size"} | computing}
    others["explain"] = {"photo", "output", "sentence"} | computing
    assert set(options) - {"help"} == {field.name for field in fields} | others[command]
    for field in fields:
        option = options[field.name]
        assert option.opts == ["--" + field.name.replace("_", "-")]
        assert len(option.help) > 15
        if field.default not in (None, ()):
            assert f"[default: {field.default}]" in option.help
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert all(f"--{field.name.replace('_', '-')}" in shown.stdout for field in fields)


def command_of(name):
    from typer.main import get_command

    return get_command(app).commands[name]


# --- Processes: signals and pipes ---


@pytest.mark.skipif(os.name == "nt", reason="signals are sent in another way there")
def test_an_interrupt_ends_with_one_line_and_status_130(photo):
    running = process("caption", "--batch-size", "1", *[photo] * 5000)
    assert running.stdout.readline().startswith(os.fsencode(photo))  # it captions
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate()
    assert (running.returncode, stderr) == (130, b"error: interrupted\n")


def test_an_interrupt_of_the_import_is_one_line_and_status_130(monkeypatch, capsys):
    import builtins

    from captioner.__main__ import main

    real = builtins.__import__

    def interrupted(name, *arguments, **options):
        if name == "captioner.cli":
            raise KeyboardInterrupt
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="a shell closes it in another way there")
def test_a_closed_standard_output_is_a_fault(photo):
    command = f"exec {shlex.join([sys.executable, '-m', 'captioner', 'caption', str(photo)])} >&-"
    done = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: standard output is closed")


@pytest.mark.skipif(os.name == "nt", reason="pipes close in another way there")
def test_a_reader_that_has_seen_enough_ends_it_quietly(photo):
    running = process("caption", "--batch-size", "1", *[photo] * 5000)
    assert running.stdout.readline().startswith(os.fsencode(photo))
    running.stdout.close()
    assert (running.wait(), running.stderr.read()) == (1, b"")
    running.stderr.close()


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line(photo):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with FULL.open("wb") as full:
        running = process("caption", photo, stdout=full, env=buffered)
        _, stderr = running.communicate()
    assert running.returncode == 1
    assert stderr == b"error: standard output cannot be written: No space left on device\n"
