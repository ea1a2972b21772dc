"""What a batch run may replace: what it wrote itself, and nobody else's work. The captions are made up."""

import csv
import errno
import json
import os
import shutil
import threading
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import pytest
from pictures import encode, gradient

from captioner import CaptionerError, ConfigError
from captioner import batch as module
from captioner import writers as writers_module
from captioner.caption import Caption
from captioner.errors import ImageReadError
from captioner.geometry import Geometry
from captioner.journal import Journal, name_hash
from captioner.merge import merge
from captioner.templates import alt_text

JPEG = encode(gradient(), "JPEG")
DC = "{http://purl.org/dc/elements/1.1/}description"
IPTC = "{http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/}AltTextAccessibility"
EVERYTHING = {"formats": ["jsonl", "txt", "xmp"], "alt_text": True}


class Saying:
    """An engine that says of each picture what it is told to, two pictures at a time."""

    def __init__(self, say):
        self.identity = {"model": "a", "search": {"method": "greedy"}}
        self._say = say

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def captions(self, pictures):
        batch = []
        for picture in pictures:
            batch.append((picture, self._result(picture)))
            if len(batch) == 2:
                yield batch
                batch = []
        if batch:
            yield batch

    def _result(self, picture):
        try:
            picture.read()
        except ImageReadError as err:
            return err
        return Caption(
            text=self._say(picture),
            score=-0.5,
            words=(),
            end_probability=0.9,
            finished=True,
            geometry=Geometry(picture_hw_px=(40, 64), input_hw_px=(96, 96), grid_hw=(2, 3)),
        )


class Blind(Saying):
    """Does not find what is missing; the real engines open the files."""

    def _result(self, picture):
        return ImageReadError("gone") if picture.size_bytes is None else super()._result(picture)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / name).write_bytes(JPEG)
    return folder


@pytest.fixture
def batch(tmp_path):
    """Run with an engine that says one sentence of every picture."""

    def call(source, sentence="A picture of a dog.", output="out.jsonl", **options):
        sources = source if isinstance(source, list) else [source]
        say = sentence if callable(sentence) else lambda picture: sentence
        return module.run(sources, tmp_path / output, **({"engine": Saying(say)} | options))

    return call


def touch(path):
    status = path.stat()
    os.utime(path, ns=(status.st_mtime_ns + 1, status.st_mtime_ns + 1))


def records_of(path):
    return {Path(record["image"]).name: record for record in map(json.loads, path.read_text().splitlines())}


def in_sidecar(path, name=DC):
    (element,) = ET.parse(path).getroot().iter(name)
    return "".join(element.itertext()).strip()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- Texts ---


@pytest.mark.parametrize("file", ["a.txt", "a.jpg.xmp"])
def test_a_text_that_somebody_has_corrected_is_kept_when_its_picture_changes(batch, photos, tmp_path, file):
    batch(photos, **EVERYTHING)
    edit(photos / file, "A picture of a dog.", "My dog Rex.")
    corrected = (photos / file).read_bytes()
    for number, retry in ((1, False), (2, True)):
        touch(photos / "a.jpg")
        summary = batch(photos, f"A cat {number}.", **EVERYTHING, retry_failed=retry)
        assert summary.failed == {"DataError": 1}
        assert (photos / file).read_bytes() == corrected
        record = records_of(tmp_path / "out.jsonl")["a.jpg"]
        assert file in record["error"]["message"]
        assert record["caption"] == f"A cat {number}."
    # Once it is moved away, or says again what we wrote, the picture is captioned like any other.
    (photos / file).unlink()
    assert batch(photos, "A cat 3.", **EVERYTHING, retry_failed=True).failed == {}
    assert (photos / "a.txt").read_text() == "A cat 3.\n"
    assert in_sidecar(photos / "a.jpg.xmp") == "A cat 3."


def test_a_text_that_holds_what_we_wrote_is_replaced_when_its_picture_changes(batch, photos):
    batch(photos, **EVERYTHING)
    edit(photos / "a.jpg.xmp", "</rdf:RDF>", "<!-- rated by hand --></rdf:RDF>")
    for number in range(3):
        touch(photos / "a.jpg")
        assert batch(photos, f"A picture of a cat {number}.", **EVERYTHING).failed == {}
        assert (photos / "a.txt").read_text() == f"A picture of a cat {number}.\n"
        assert in_sidecar(photos / "a.jpg.xmp") == f"A picture of a cat {number}."
        assert in_sidecar(photos / "a.jpg.xmp", IPTC) == f"A cat {number}."
        assert "rated by hand" in (photos / "a.jpg.xmp").read_text()
    assert (photos / "b.txt").read_text() == "A picture of a dog.\n"


def test_an_alt_text_or_a_second_language_that_somebody_wrote_is_kept(batch, photos):
    batch(photos, **EVERYTHING)
    edit(photos / "a.jpg.xmp", "A dog.", "Rex on the sofa.")
    ours = "A picture of a dog.</rdf:li>"
    edit(photos / "b.jpg.xmp", ours, f'{ours}<rdf:li xml:lang="de">Rex</rdf:li>')
    before = [(photos / f"{name}.jpg.xmp").read_bytes() for name in "ab"]
    for name in "ab":
        touch(photos / f"{name}.jpg")
    assert batch(photos, "A cat.", **EVERYTHING).failed == {"DataError": 2}
    assert [(photos / f"{name}.jpg.xmp").read_bytes() for name in "ab"] == before


def test_what_we_wrote_is_remembered_while_its_picture_cannot_be_read(batch, photos):
    batch(photos, **EVERYTHING)
    (photos / "a.jpg").rename(photos / "kept")
    (photos / "a.jpg").symlink_to("nowhere")

    assert batch(photos, **EVERYTHING, engine=Blind(lambda _: "A cat.")).failed == {"ImageReadError": 1}
    (photos / "kept").replace(photos / "a.jpg")
    touch(photos / "a.jpg")
    assert batch(photos, "A cat.", **EVERYTHING).failed == {}
    assert (photos / "a.txt").read_text() == "A cat.\n"


class Killed(BaseException):
    """Stands for a signal: nothing is put in order."""


def kill(*_, **__):
    raise Killed


@pytest.mark.parametrize("moment", ["before the files", "between the files", "before the journal"])
def test_texts_of_a_run_that_was_killed_are_ours_though_the_next_says_something_else(
    batch, photos, monkeypatch, moment
):
    for number in range(3):
        with monkeypatch.context() as patch:
            if moment == "before the files":
                patch.setattr(writers_module.TextWriter, "write", kill)
            elif moment == "between the files":
                patch.setattr(writers_module.XmpWriter, "write", kill)
            else:
                patch.setattr(Journal, "append", kill)
            with pytest.raises(Killed):
                batch(photos, f"A cat {number}.", **EVERYTHING)
    assert batch(photos, "A dog.", **EVERYTHING).failed == {}
    for name in "abc":
        assert (photos / f"{name}.txt").read_text() == "A dog.\n"
        assert in_sidecar(photos / f"{name}.jpg.xmp") == "A dog."


def test_a_text_that_somebody_else_wrote_is_kept_after_a_kill_too(batch, photos, monkeypatch):
    (photos / "a.txt").write_text("Mine.\n")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", kill)
        with pytest.raises(Killed):
            batch(photos, "A cat.", **EVERYTHING)
    assert batch(photos, "A dog.", **EVERYTHING).failed == {"DataError": 1}
    assert (photos / "a.txt").read_text() == "Mine.\n"


def test_what_we_wrote_is_remembered_through_compaction_and_merge(batch, photos, tmp_path):
    for number in (1, 2):
        batch(photos, output=f"{number}.jsonl", shard=f"{number}/2", formats=["jsonl", "txt"])
    merge([tmp_path / "1.jsonl", tmp_path / "2.jsonl"], tmp_path / "out.jsonl")
    for number in range(2):  # each run supersedes a record, and so writes the journal anew
        touch(photos / "a.jpg")
        assert batch(photos, f"A cat {number}.", formats=["jsonl", "txt"]).failed == {}
    edit(photos / "a.txt", "A cat 1.", "Mine.")
    touch(photos / "a.jpg")
    touch(photos / "b.jpg")
    assert batch(photos, "A bird.", formats=["jsonl", "txt"]).failed == {"DataError": 1}
    assert [(photos / f"{name}.txt").read_text() for name in "ab"] == ["Mine.\n", "A bird.\n"]


# --- Overwriting ---


def test_overwriting_ends_with_its_run(batch, photos, tmp_path):
    options = {"formats": ["jsonl", "csv", "txt"]}
    for file, text in ((photos / "a.txt", "Mine.\n"), (tmp_path / "out.csv", "mine\n")):
        file.write_text(text)
    stop = threading.Event()
    batch(photos, **options, overwrite=True, stop=stop, progress=lambda _: stop.set())
    assert batch(photos, **options).failed == {}  # what goes on from it overwrites too
    assert (photos / "a.txt").read_text() == "A picture of a dog.\n"
    (photos / "a.txt").write_text("Mine.\n")
    (photos / "d.txt").write_text("Mine.\n")
    shutil.copy(photos / "a.jpg", photos / "d.jpg")
    touch(photos / "a.jpg")
    assert batch(photos, "A cat.", **options).failed == {"DataError": 2}
    assert [(photos / f"{name}.txt").read_text() for name in "ad"] == ["Mine.\n", "Mine.\n"]
    (tmp_path / "out.csv").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"out\.csv: was changed"):
        batch(photos, **options)


def test_what_goes_on_from_an_overwriting_run_replaces_no_text_that_was_corrected_since(batch, photos):
    stop = threading.Event()
    batch(photos, formats=["jsonl", "txt"], overwrite=True, stop=stop, progress=lambda _: stop.set())
    (photos / "a.txt").write_text("Mine.\n")
    (photos / "c.txt").write_text("Another's.\n")
    touch(photos / "a.jpg")
    assert batch(photos, "A cat.", formats=["jsonl", "txt"]).failed == {"DataError": 1}
    assert [(photos / f"{name}.txt").read_text() for name in "ac"] == ["Mine.\n", "A cat.\n"]


# --- Tables ---


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_that_somebody_has_changed_is_kept_and_refused(batch, photos, tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet")
    table = tmp_path / f"out.{kind}"
    for number in range(3):  # it grows, and stays ours
        shutil.copy(photos / "a.jpg", photos / f"new{number}.jpg")
        batch(photos, formats=["jsonl", kind])
    ours = table.read_bytes()
    table.write_bytes(ours + b"edited")
    with pytest.raises(ConfigError, match=rf"out\.{kind}: was changed, .* move it away, and it is made anew"):
        batch(photos, formats=["jsonl", kind])
    assert table.read_bytes() == ours + b"edited"
    table.unlink()
    batch(photos, formats=["jsonl", kind])
    assert table.read_bytes() == ours


def test_a_table_that_is_added_later_replaces_no_other(batch, photos, tmp_path):
    batch(photos)
    (tmp_path / "out.csv").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"out\.csv: was changed, or made by something else"):
        batch(photos, formats=["jsonl", "csv"])
    assert (tmp_path / "out.csv").read_text() == "mine\n"


def test_a_table_that_is_changed_while_the_run_goes_on_is_kept(batch, photos, tmp_path):
    batch(photos, formats=["jsonl", "csv"])
    shutil.copy(photos / "a.jpg", photos / "new.jpg")
    with pytest.raises(CaptionerError, match=r"out\.csv: was changed"):
        batch(photos, formats=["jsonl", "csv"], progress=lambda _: (tmp_path / "out.csv").write_text("mine\n"))
    assert (tmp_path / "out.csv").read_text() == "mine\n"
    assert "new.jpg" in records_of(tmp_path / "out.jsonl")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_table_is_ours_when_the_run_was_killed_as_it_was_put_in_place(batch, photos, tmp_path, monkeypatch, moment):
    batch(photos, formats=["jsonl", "csv"])
    replace = Path.replace

    def kill_there(self, target):
        if Path(target).name != "out.csv":
            return replace(self, target)
        if moment == "after":
            replace(self, target)
        raise Killed

    for number in range(2):
        shutil.copy(photos / "a.jpg", photos / f"new{number}.jpg")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", kill_there)
            with pytest.raises(Killed):
                batch(photos, formats=["jsonl", "csv"])
    batch(photos, formats=["jsonl", "csv"])
    assert len(list(csv.DictReader((tmp_path / "out.csv").open()))) == 5


def test_no_list_is_replaced_by_an_output_or_a_text(batch, photos, tmp_path):
    for name in ("out", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"image": str(photos / "a.jpg")}) + "\n")
    with pytest.raises(ConfigError, match="is a source itself"):
        batch([f"{tmp_path}/{{other,out}}.jsonl"], overwrite=True)
    (photos / "a.txt").write_text("a.jpg\n")
    summary = batch([photos / "a.txt", photos / "b.jpg"], formats=["jsonl", "txt"], overwrite=True)
    assert summary.failed == {"DataError": 1}
    assert (photos / "a.txt").read_text() == "a.jpg\n"
    assert "a source, which is kept" in records_of(tmp_path / "out.jsonl")["a.jpg"]["error"]["message"]


@pytest.mark.parametrize("appended", ["mine\n", '{"image": "mine.jpg", "caption":"by hand"}\n', "mine", '{"a": 1}\n'])
def test_lines_that_somebody_has_appended_to_the_records_are_kept_and_refused(batch, photos, tmp_path, appended):
    batch(photos)
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write(appended)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="something else has appended to it"):
        batch(photos)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_what_a_power_cut_has_left_behind_the_records_is_cut_off(batch, photos, tmp_path):
    batch(photos)
    before = (tmp_path / "out.jsonl").read_bytes()
    for left in (before[:40], before[:7], before.splitlines(keepends=True)[0], b"\0" * 99, b'{"image": "x\0\0\0'):
        with (tmp_path / "out.jsonl").open("ab") as file:
            file.write(left)
        batch(photos)
        assert (tmp_path / "out.jsonl").read_bytes() == before


# --- Places where nothing can be written ---


def failing(name, number):
    """A way to put files in place that fails for one name."""
    real = writers_module.replacing

    def replacing(path):
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path.with_name(".captioner-0.part")))
        return real(path)

    return replacing


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("file", ["b.txt", "b.jpg.xmp"])
def test_a_file_that_may_not_be_written_fails_its_picture_alone(batch, photos, tmp_path, monkeypatch, number, file):
    monkeypatch.setattr(writers_module, "replacing", failing(file, number))
    summary = batch(photos, **EVERYTHING)
    assert (summary.captioned, summary.failed, summary.stopped) == (2, {"DataError": 1}, None)
    message = records_of(tmp_path / "out.jsonl")["b.jpg"]["error"]["message"]
    assert message.startswith(f"{photos / file}: cannot be written ({os.strerror(number)})")
    assert len([path for path in photos.iterdir() if path.suffix in (".txt", ".xmp")]) == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_stops_the_run_and_the_file_is_named(batch, photos, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(writers_module, "replacing", failing("c.txt", number))
        with pytest.raises(CaptionerError) as caught:
            batch(photos, formats=["jsonl", "txt"])
    assert str(caught.value).startswith(f"{photos / 'c.txt'}: cannot be written: {os.strerror(number)}")
    assert "without --overwrite" in str(caught.value)
    assert list(records_of(tmp_path / "out.jsonl")) == ["a.jpg", "b.jpg"]
    assert batch(photos, "A cat.", formats=["jsonl", "txt"]).failed == {}


def test_a_caption_stays_in_its_record_when_a_file_is_in_the_way_and_the_other_formats_are_written(
    batch, photos, tmp_path
):
    (photos / "a.txt").write_text("Mine.\n")
    (photos / "b.txt").write_text("Mine.\n")
    (photos / "b.jpg.xmp").write_text("no sidecar")
    assert batch(photos, **EVERYTHING).failed == {"DataError": 2}
    records = records_of(tmp_path / "out.jsonl")
    assert [record["caption"] for record in records.values()] == ["A picture of a dog."] * 3
    assert [record["error"] is None for record in records.values()] == [False, False, True]
    assert in_sidecar(photos / "a.jpg.xmp") == "A picture of a dog."
    for file in ("b.txt", "b.jpg.xmp"):
        assert f"{photos / file}: " in records["b.jpg"]["error"]["message"]


# --- Alternative texts ---


def test_alternative_texts_stand_in_records_and_tables(batch, photos, tmp_path):
    (photos / "bad.jpg").symlink_to("nowhere")

    formats = ["jsonl", "csv"]
    try:
        from pyarrow import parquet
    except ImportError:
        parquet = None
    else:
        formats.append("parquet")
    long = "A picture of " + "a very long train " * 20
    batch(photos, engine=Blind(lambda _: long), formats=formats, alt_text=True)
    records = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    assert [list(record)[:3] for record in records] == [["image", "caption", "alt_text"]] * 4
    assert [record["alt_text"] for record in records] == [*[alt_text(long)] * 2, None, alt_text(long)]
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["alt_text"] for row in rows] == [record["alt_text"] or "" for record in records]
    assert list(rows[0])[:3] == ["image", "caption", "alt_text"]
    if parquet is not None:
        assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == records
    with pytest.raises(ConfigError, match="alt_text was true, now false"):
        batch(photos, formats=formats)


# --- Going on ---


def test_a_damaged_source_is_an_error_and_the_run_goes_on_and_comes_to_its_end(batch, photos, tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        archive.writestr("z.jpg", JPEG)
    (tmp_path / "list.jsonl").write_text('{"image": "photos/a.jpg"}\nno line\n{"image": "photos/b.jpg"}\n')
    sources = [tmp_path / name for name in ("bad.zip", "list.jsonl", "good.zip")]
    for captioned in (3, 0):
        summary = batch(sources)
        assert (summary.captioned, summary.failed, summary.stopped) == (captioned, {"ImageReadError": 2}, None)
    records = records_of(tmp_path / "out.jsonl")
    assert list(records) == ["bad.zip", "a.jpg", "list.jsonl:2", "b.jpg", "z.jpg"]
    assert "not JSON" in records["list.jsonl:2"]["error"]["message"]


def test_a_setting_that_an_earlier_version_did_not_know_was_then_its_default(batch, photos, tmp_path):
    batch(photos)
    journal = tmp_path / "out.progress"
    header, _, rest = journal.read_text().partition("\n")
    before = json.loads(header)
    del before["sidecar"]
    journal.write_text(json.dumps({**before, "version": 1}) + "\n" + rest)
    newer = Saying(lambda _: "A dog.")
    newer.identity = {"model": "a", "search": {"method": "greedy", "beam_size": 3}}
    assert batch(photos, engine=newer).skipped == 3
    newer.identity = {"model": "a", "search": {"method": "greedy", "beam_size": 5}}
    with pytest.raises(ConfigError, match="beam_size was 3, now 5"):
        batch(photos, engine=newer)
    newer.identity = {"model": "b", "search": {"method": "greedy"}}
    with pytest.raises(ConfigError, match="begun otherwise: it was another model; keep"):
        batch(photos, engine=newer)


def test_a_source_of_which_nothing_is_on_record_is_said(batch, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch("photos", output="out.jsonl")
    notes = []
    batch("./photos/", note=notes.append)
    assert notes == []
    monkeypatch.chdir(photos)
    batch(".", note=notes.append)
    (note,) = notes
    assert "none of the 3 pictures on record is among the first 3 of the source" in note


def test_sidecars_are_named_as_it_is_asked_for_and_the_message_names_the_option(batch, photos, tmp_path):
    batch(photos, formats=["jsonl", "xmp"], sidecar="name")
    assert in_sidecar(photos / "a.xmp") == "A picture of a dog."
    with pytest.raises(ConfigError, match='sidecar was "name", now "picture"'):
        batch(photos, formats=["jsonl", "xmp"])
    summary = batch(photos, formats=["jsonl", "xmp"], output="other.jsonl")
    assert summary.failed == {"DataError": 3}
    assert "--sidecar name" in records_of(tmp_path / "other.jsonl")["a.jpg"]["error"]["message"]


def test_a_hash_of_every_text_costs_the_journal_nine_bytes_and_no_more(batch, photos, tmp_path):
    batch(photos, **EVERYTHING)
    with Journal(tmp_path / "out.progress", tmp_path / "out.jsonl") as journal:
        journal.read()
        written = journal.written(name_hash(str(photos / "a.jpg")))
    assert sorted(text[:1] for text in written) == [b"a", b"d", b"t"]
    assert all(len(text) == 9 for text in written)
