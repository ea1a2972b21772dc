"""Writers: files that appear whole, never in the place of another's, and tables that say what the records say."""

import csv
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pictures import encode, gradient
from PIL import Image

from captioner import tables, xmp
from captioner.atomic import replacing
from captioner.caption import Caption, Word, error_record
from captioner.errors import ConfigError, DataError, ImageReadError
from captioner.geometry import Geometry
from captioner.sources import find_pictures
from captioner.writers import (
    FORMATS,
    MapsWriter,
    Template,
    TextWriter,
    XmpWriter,
    alt_text,
    require_parquet,
    write_csv,
    write_parquet,
)

JPEG = encode(gradient(), "JPEG")
GRID_HW = (2, 3)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def caption(text="A dog runs.", *, score=-0.5, confidence=0.625):
    maps = np.random.default_rng(len(text)).dirichlet(np.ones(6), size=len(text.split())).astype(np.float32)
    return Caption(
        text=text,
        score=score,
        words=tuple(
            Word(
                text=word,
                probability=0.5,
                attention=weights.reshape(GRID_HW),
                attention_heads=weights.reshape(1, 1, *GRID_HW),
            )
            for word, weights in zip(text.split(), maps, strict=True)
        ),
        end_probability=0.9,
        finished=True,
        geometry=Geometry(picture_hw_px=(40, 64), input_hw_px=(96, 96), grid_hw=GRID_HW),
        confidence=confidence,
    )


def make(folder, *files, data=JPEG):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return folder


def pictures(*sources):
    return list(find_pictures([str(source) for source in sources]))


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


# --- Names ---


def test_texts_mirror_the_folders_of_their_pictures(tmp_path):
    make(tmp_path / "in", "a.jpg", "s/b.png", "s/t/c.webp")
    writer = TextWriter(tmp_path / "out", Template("{caption} ({stem})"))
    for picture in pictures(tmp_path / "in"):
        assert writer.write(picture, caption("A dog.")) == writer.path_of(picture)
    assert tree(tmp_path / "out") == ["a.txt", "s/b.txt", "s/t/c.txt"]
    assert (tmp_path / "out/s/b.txt").read_text() == "A dog. (b)\n"


def test_texts_lie_beside_their_pictures_when_asked_to_or_when_the_folder_is_the_source(tmp_path):
    make(tmp_path, "a.jpg", "s/b.png", "a/notes")
    for folder in (None, tmp_path):
        assert [TextWriter(folder).path_of(p) for p in pictures(tmp_path)] == [tmp_path / "a.txt", tmp_path / "s/b.txt"]


def test_pictures_of_one_stem_keep_their_suffixes(tmp_path):
    make(
        tmp_path / "in",
        "a.jpg",
        "A.png",
        "b.jpg",
        "b.txt.jpg",
        "s/a.jpg",
        "é.jpg",
        "e\u0301.png",
        "c",
        "c.jpg",
        "d.d",
        "x.jpg",
        "x.jpg.png",
    )
    writer = TextWriter(tmp_path / "out")
    found = pictures(tmp_path / "in", tmp_path / "in/c", tmp_path / "in/d.d")
    names = {str(p.relative): writer.path_of(p).relative_to(tmp_path / "out").as_posix() for p in found}
    assert names == {
        "A.png": "A.png.txt",
        "a.jpg": "a.jpg.txt",
        "b.jpg": "b.txt",
        "b.txt.jpg": "b.txt.txt",
        "c": "c.txt",
        "c.jpg": "c.jpg.txt",
        "d.d": "d.d.txt",
        "e\u0301.png": "e\u0301.png.txt",
        "s/a.jpg": "s/a.txt",
        "x.jpg": "x.txt",
        "x.jpg.png": "x.jpg.png.txt",
        "é.jpg": "é.jpg.txt",
    }


stems = st.text("ab.", min_size=1, max_size=3).filter(lambda s: s.strip("."))
file_names = st.builds("{}{}".format, stems, st.sampled_from(["", ".jpg", ".png", ".txt", ".jpg.png", ".maps.png"]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(file_names, max_size=8, unique=True))
@example(["a.jpg", "a.jpg.png", "a", "a.png"])
def test_no_two_pictures_share_a_file_in_folders_and_archives(found_names):
    found_names = [name for name in found_names if not name.startswith(".")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "in").mkdir()
        make(folder / "in", *found_names, data=b"")
        with zipfile.ZipFile(folder / "in.zip", "w") as archive:
            for name in found_names:
                archive.writestr(f"i/{name}", b"")
        for found in (
            pictures(*[folder / "in", *(folder / "in" / name for name in found_names if not name.endswith(".txt"))]),
            pictures(folder / "in.zip"),
        ):
            for writer in (
                TextWriter(folder / "o"),
                XmpWriter(folder / "o", sidecar="name"),
                XmpWriter(folder / "o"),
            ):
                paths = [str(writer.path_of(picture)) for picture in found]
                assert len({unicodedata.normalize("NFC", path).casefold() for path in paths}) == len(paths)
                assert paths == [str(writer.path_of(picture)) for picture in reversed(found)][::-1]


def test_names_are_the_same_in_every_shard_and_for_a_picture_alone(tmp_path):
    make(tmp_path, "a.jpg", "a.png", "b.jpg")
    whole = [TextWriter(None).path_of(picture) for picture in pictures(tmp_path)]
    alone = [TextWriter(None).path_of(*pictures(tmp_path / name)) for name in ("a.jpg", "a.png", "b.jpg")]
    assert whole == alone


def test_members_have_places_below_the_folder_and_none_beside_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for name in ("../../a.jpg", "/b.jpg", "s/b.jpg", "s/b.png"):
            archive.writestr(name, JPEG)
    writer = TextWriter(tmp_path / "out")
    for picture in pictures(tmp_path / "p.zip"):
        writer.write(picture, caption())
        with pytest.raises(ConfigError, match="nothing can lie beside a picture in an archive"):
            TextWriter(None).write(picture, caption())
    assert tree(tmp_path) == ["out/__/__/a.txt", "out/b.txt", "out/s/b.jpg.txt", "out/s/b.png.txt", "p.zip"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text there")
def test_files_of_odd_names_are_written(tmp_path):
    for name in (b"\xff.jpg", b"two\nlines.jpg", b"x" * 250 + b".jpg"):
        (tmp_path / os.fsdecode(name)).write_bytes(JPEG)
    for picture in pictures(tmp_path):
        path = TextWriter(None, Template("{image}: {caption}")).write(picture, caption())
        assert path.read_text(encoding="utf-8").endswith(": A dog runs.\n")
    (long,) = (picture for picture in pictures(tmp_path) if "xxx" in picture.name)
    with pytest.raises(DataError, match=r"cannot be written \(File name too long\)"):
        XmpWriter(None).write(long, caption())


# --- Whole or not there ---


def test_writing_again_changes_nothing_and_leaves_no_other_file(tmp_path):
    make(tmp_path / "in", "a.jpg")
    (picture,) = pictures(tmp_path / "in")
    writers = [TextWriter(tmp_path / "o"), XmpWriter(tmp_path / "o", alt_text=True)]
    paths = [writer.write(picture, caption()) for writer in writers]
    before = [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in paths]
    assert [writer.write(picture, caption()) for writer in writers] == paths
    assert [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in paths] == before
    assert tree(tmp_path / "o") == ["a.jpg.xmp", "a.txt"]


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path):
    class Killed(BaseException):
        pass

    def write_half():
        with replacing(tmp_path / "a.txt") as file:
            file.write(b"half")
            parts.extend(tree(tmp_path))
            raise Killed

    parts = []
    with pytest.raises(Killed):
        write_half()
    (part,) = parts
    assert tree(tmp_path) == []
    (tmp_path / part).write_bytes(b"half")  # as SIGKILL leaves it
    with replacing(tmp_path / "a.txt") as file:
        file.write(b"whole")
    assert tree(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"whole"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "a.csv").write_text("old")

    def records():
        yield caption().to_record("a.jpg")
        raise OSError(errno.ENOSPC, "No space left on device")

    for write in (write_csv, write_parquet) if _has_parquet() else (write_csv,):
        with pytest.raises(OSError, match="No space left"):
            write(records(), tmp_path / "a.csv")
        assert tree(tmp_path) == ["a.csv"]
        assert (tmp_path / "a.csv").read_text() == "old"


def test_a_full_disk_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for writer in (TextWriter(None), XmpWriter(None), MapsWriter(None)):
        with pytest.raises(OSError, match="No space left"):
            writer.write(*pictures(tmp_path), caption())
    assert tree(tmp_path) == ["a.jpg"]


def test_a_part_that_is_a_link_is_not_followed(tmp_path):
    with replacing(tmp_path / "a.txt") as file:
        part = Path(file.name)
    (tmp_path / "precious").write_text("mine")
    part.symlink_to(tmp_path / "precious")
    with replacing(tmp_path / "a.txt") as file:
        file.write(b"text")
    assert (tmp_path / "precious").read_text() == "mine"


# --- Files of others ---


def test_a_text_of_someone_else_is_kept_unless_it_is_to_be_replaced(tmp_path):
    make(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_text("By hand.")
    (picture,) = pictures(tmp_path)
    with pytest.raises(DataError, match=r"a.txt: holds another text, which is kept; .*--into, .*--overwrite"):
        TextWriter(None).write(picture, caption())
    assert (tmp_path / "a.txt").read_text() == "By hand."
    TextWriter(None, replace=True).write(picture, caption())
    assert (tmp_path / "a.txt").read_text() == "A dog runs.\n"


@pytest.mark.parametrize("kind", [TextWriter, XmpWriter, MapsWriter])
def test_a_folder_in_the_way_fails_the_picture_alone(tmp_path, kind):
    make(tmp_path, "a.jpg")
    (picture,) = pictures(tmp_path)
    kind(None).path_of(picture).mkdir()
    with pytest.raises(DataError, match="in the way, and no file"):
        kind(None).write(picture, caption())
    assert tree(tmp_path) == ["a.jpg"]


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
@pytest.mark.parametrize("kind", [TextWriter, XmpWriter, MapsWriter])
def test_a_pipe_in_the_way_is_not_waited_for(tmp_path, kind):
    make(tmp_path, "a.jpg")
    (picture,) = pictures(tmp_path)
    os.mkfifo(kind(None).path_of(picture))
    with pytest.raises(DataError, match="in the way, and no file"):
        kind(None, **({} if kind is MapsWriter else {"replace": True})).write(picture, caption())


def test_a_file_in_the_way_of_maps_is_replaced_only_when_it_was_written_here(tmp_path):
    make(tmp_path, "a.jpg")
    (picture,) = pictures(tmp_path)
    for kind in ("npz", "figure"):
        writer = MapsWriter(None, kind)
        writer.path_of(picture).write_bytes(JPEG)
        with pytest.raises(DataError, match="a file that was not written here"):
            writer.write(picture, caption())
        assert writer.path_of(picture).read_bytes() == JPEG
        writer.path_of(picture).unlink()
        writer.write(picture, caption())
        assert writer.write(picture, caption()) == writer.path_of(picture)


def test_a_folder_in_the_way_of_a_folder_or_the_other_way_round_fails_the_picture_alone(tmp_path):
    make(tmp_path / "in", "s/a.jpg")
    (picture,) = pictures(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/s").write_text("a file")
    with pytest.raises(DataError, match=r"out/s/a.txt: cannot be written"):
        TextWriter(tmp_path / "out").write(picture, caption())


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    for kind in (TextWriter, XmpWriter, MapsWriter):
        with pytest.raises(ConfigError, match="file: the folder cannot be made"):
            kind(tmp_path / "file")


def test_impossible_choices_are_refused():
    with pytest.raises(ConfigError, match="sidecar must be one of"):
        XmpWriter(None, sidecar="a.xmp")
    with pytest.raises(ConfigError, match="kind of maps must be one of"):
        MapsWriter(None, "png")


def test_originals_stay_as_they_are_whatever_is_written(tmp_path):
    make(tmp_path, "a.jpg", "b.png", "a.maps.jpg")
    for picture in pictures(tmp_path):
        for writer in (TextWriter(None), XmpWriter(None, True), MapsWriter(None), MapsWriter(None, "figure")):
            writer.write(picture, caption())
    assert [(tmp_path / name).read_bytes() == JPEG for name in ("a.jpg", "b.png", "a.maps.jpg")] == [True] * 3
    assert [picture.relative.name for picture in pictures(tmp_path)] == ["a.jpg", "a.maps.jpg", "b.png"]
    for name in ("a.png", "photos/A.JPG"):
        with pytest.raises(ConfigError, match="the name of a picture"):
            write_csv([], tmp_path / name)


# --- XMP ---

SIDECAR = """\ufeff<?xml version="1.0" encoding="UTF-8"?>
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<!-- edited by hand -->
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0">
 <r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <r:Description r:about="uuid:1&amp;2" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4"
    xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/" crs:Exposure2012="+0.35"
    xmlns:d="http://purl.org/dc/elements/1.1/">
   <d:subject><r:Bag><r:li>Käfer &gt; 1</r:li></r:Bag></d:subject>
   DESCRIPTION
   <d:rights><r:Alt><r:li xml:lang="x-default">Me</r:li></r:Alt></d:rights>
  </r:Description>
 </r:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""
THEIRS = (
    '<d:description><r:Alt><r:li xml:lang="x-default">Mine</r:li>'
    '<r:li xml:lang="de">Meins</r:li></r:Alt></d:description>'
)
DC = "{http://purl.org/dc/elements/1.1/}description"
IPTC = "{http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/}AltTextAccessibility"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


def properties(data):
    """The texts of our two properties, by an XML reader that is not ours."""
    root = ET.fromstring(data.decode("utf-8-sig").encode())
    return {
        name: [item.text or "" for element in root.iter(name) for item in element.iter(f"{RDF}li")]
        for name in (DC, IPTC)
    }


xml_texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), max_size=40)


@given(xml_texts, st.none() | xml_texts)
def test_a_sidecar_says_what_it_was_given(description, alt):
    expected = {DC: [description], IPTC: [] if alt is None else [alt]}
    assert properties(xmp.packet(description, alt)) == expected
    for before in ("", THEIRS, "<d:description/>", "<d:description>Mine</d:description>"):
        sidecar = SIDECAR.replace("DESCRIPTION", before).encode()
        assert properties(xmp.merged(sidecar, description, alt, replace=True)) == expected


@given(st.text(max_size=30))
def test_any_text_makes_a_sidecar_that_can_be_read_and_is_not_written_twice(description):
    made = xmp.packet(description, description)
    properties(made)
    assert xmp.merged(made, description, description, replace=False) == made


@pytest.mark.parametrize("before", ["", THEIRS, "<d:description />"])
def test_what_else_a_sidecar_holds_is_kept_byte_for_byte(before):
    sidecar = SIDECAR.replace("DESCRIPTION", before)
    made = xmp.merged(sidecar.encode(), "A dog.", "Alt", replace=True).decode()
    start, end = made.index(" <rdf:Description"), made.index("</rdf:Description>\n") + len("</rdf:Description>\n")
    assert made[:start] + made[end:] == SIDECAR.replace("DESCRIPTION", "")
    assert 'rdf:about="uuid:1&amp;2"' in made[start:end]
    assert xmp.merged(made.encode(), "A dog.", "Alt", replace=False) == made.encode()


def test_a_description_of_someone_else_is_kept_unless_it_is_to_be_replaced(tmp_path):
    make(tmp_path, "a.jpg")
    sidecar = tmp_path / "a.jpg.xmp"
    sidecar.write_text(SIDECAR.replace("DESCRIPTION", THEIRS))
    before = sidecar.read_bytes()
    (picture,) = pictures(tmp_path)
    with pytest.raises(DataError, match=r"a.jpg.xmp: it has another dc:description already \('Mine'\)"):
        XmpWriter(None).write(picture, caption())
    assert sidecar.read_bytes() == before
    XmpWriter(None, replace=True).write(picture, caption())
    assert properties(sidecar.read_bytes())[DC] == ["A dog runs."]
    assert 'xmp:Rating="4"' in sidecar.read_text()


def test_without_alt_text_an_alt_text_that_is_there_is_left_alone():
    sidecar = xmp.packet("A dog.", "Theirs")
    assert properties(xmp.merged(sidecar, "A cat.", None, replace=True)) == {DC: ["A cat."], IPTC: ["Theirs"]}


LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (f"{LAUGHS}<x>&b;</x>", "DOCTYPE"),
        (f"{OUTSIDE}<x>&a;</x>", "DOCTYPE"),
        ('<!DOCTYPE x SYSTEM "http://localhost/x.dtd"><x/>', "DOCTYPE"),
        ("", "not the XML of a sidecar"),
        ("A dog.", "not the XML of a sidecar"),
        ("<x>&undefined;</x>", "not the XML of a sidecar"),
        ("<x:a/>", "not the XML of a sidecar"),
        ("<svg/>", "no rdf:RDF"),
        ('<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>', "no rdf:RDF"),
        ('<?xml version="1.0" encoding="latin-1"?><x/>', "not in UTF-8"),
        (SIDECAR.replace("DESCRIPTION", "").replace("xmp:Rating=", 'd:description="" xmp:Rating='), "as an attribute"),
        (
            SIDECAR.replace("DESCRIPTION", "").replace("xmp:Rating=", 'd:description="Mine" xmp:Rating='),
            "as an attribute",
        ),
        ('<x><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/></x>', "no rdf:RDF"),
        ("x" * (16 * 2**20 + 1), "more than 16777216 bytes"),
    ],
)
def test_a_sidecar_that_cannot_be_changed_safely_is_refused_and_kept(tmp_path, content, fault):
    make(tmp_path, "a.jpg")
    (tmp_path / "a.jpg.xmp").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"a.jpg.xmp: .*{fault}"):
        XmpWriter(None, replace=True).write(*pictures(tmp_path), caption())
    assert (tmp_path / "a.jpg.xmp").read_text(encoding="utf-8") == content


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_sidecar_that_is_not_in_utf8_is_refused(encoding, declared):
    sidecar = SIDECAR.removeprefix("\ufeff").replace("\ufeff", "").replace("DESCRIPTION", "")
    sidecar = sidecar.replace("UTF-8", encoding.upper()) if declared else sidecar.partition("?>")[2].lstrip()
    with pytest.raises(DataError, match=r"UTF-8|not the XML"):
        xmp.merged(sidecar.encode(encoding), "A dog.", None, replace=True)


@settings(max_examples=60)
@given(st.integers(0), st.binary(max_size=12))
def test_a_damaged_sidecar_is_refused_or_still_says_it(at, noise):
    data = bytearray(SIDECAR.replace("DESCRIPTION", THEIRS).encode())
    at %= len(data)
    data[at : at + len(noise)] = noise
    try:
        made = xmp.merged(bytes(data), "A dog.", None, replace=True)
    except DataError:
        return
    assert "A dog." in properties(made)[DC]


def test_the_way_of_naming_sidecars_is_chosen(tmp_path):
    make(tmp_path, "a.jpg", "b.jpg", "b.png")
    found = pictures(tmp_path)
    assert [XmpWriter(None).path_of(p).name for p in found] == ["a.jpg.xmp", "b.jpg.xmp", "b.png.xmp"]
    assert [XmpWriter(None, sidecar="name").path_of(p).name for p in found] == ["a.xmp", "b.jpg.xmp", "b.png.xmp"]


def test_a_picture_never_gets_two_sidecars(tmp_path):
    make(tmp_path, "a.jpg")
    (picture,) = pictures(tmp_path)
    other = XmpWriter(None, sidecar="name").write(picture, caption())
    with pytest.raises(DataError, match=r"a.xmp is there already, .*; write with --sidecar name"):
        XmpWriter(None).write(picture, caption())
    other.unlink()
    XmpWriter(None).write(picture, caption())
    with pytest.raises(DataError, match=r"a.jpg.xmp is there already, .*; write with --sidecar picture"):
        XmpWriter(None, sidecar="name").write(picture, caption())


def test_exiftool_reads_what_was_written(tmp_path):
    exiftool = shutil.which("exiftool")
    if exiftool is None:
        pytest.skip("exiftool is not installed; it is libimage-exiftool-perl in Debian")
    make(tmp_path, "new.jpg", "old.jpg")
    (tmp_path / "old.jpg.xmp").write_text(SIDECAR.replace("DESCRIPTION", THEIRS), encoding="utf-8")
    text = 'A picture of a "dog" & <two> cats – ☃.'
    for picture in pictures(tmp_path):
        XmpWriter(None, alt_text=True, replace=True).write(picture, caption(text))
    command = [exiftool, "-j", "-G1", "-validate", "-warning", "-a", "new.jpg.xmp", "old.jpg.xmp"]
    everything = [exiftool, "-j", "-G1", "new.jpg.xmp", "old.jpg.xmp"]
    checked, read = (
        json.loads(subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
        for line in (command, everything)
    )
    assert [tags["ExifTool:Validate"] for tags in checked] == ["OK", "OK"]
    for tags in read:
        assert tags["XMP-dc:Description"] == text
        assert tags["XMP-iptcCore:AltTextAccessibility"] == 'A "dog" & <two> cats – ☃.'
        assert not [name for name in tags if "Warning" in name or "Description-" in name]
    assert read[1]["XMP-xmp:Rating"] == 4
    assert read[1]["XMP-dc:Subject"] == "Käfer > 1"
    assert read[1]["XMP-crs:Exposure2012"] in (0.35, "+0.35")


# --- Maps ---


def test_the_maps_of_a_file_are_the_maps_of_the_words(tmp_path):
    make(tmp_path, "a.jpg", "s/b.jpg")
    result = caption("A dog runs.")
    for picture in pictures(tmp_path):
        path = MapsWriter(tmp_path / "o").write(picture, result)
        MapsWriter(tmp_path / "o").write(picture, result)
        with np.load(path, allow_pickle=False) as held:
            assert held["words"].tolist() == ["A", "dog", "runs."]
            np.testing.assert_array_equal(held["maps"], [word.attention for word in result.words])
            assert held["probabilities"].tolist() == [0.5] * 3
            assert held["picture_hw_px"].tolist() == [40, 64]
            assert str(held["caption"]) == "A dog runs."
    assert tree(tmp_path / "o") == ["a.maps.npz", "s/b.maps.npz"]


def test_a_caption_of_no_word_has_no_map(tmp_path):
    make(tmp_path, "a.jpg")
    with np.load(MapsWriter(tmp_path).write(*pictures(tmp_path), caption(""))) as held:
        assert held["maps"].shape == (0, *GRID_HW)
        assert held["words"].shape == (0,)


def test_a_figure_is_drawn_of_files_and_of_members(tmp_path):
    make(tmp_path, "a.jpg")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("a.jpg", JPEG)
    sizes = set()
    for source in ("a.jpg", "p.zip"):
        path = MapsWriter(tmp_path / f"o-{source}", "figure").write(*pictures(tmp_path / source), caption())
        assert path.name == "a.maps.png"
        with Image.open(path) as image:
            sizes.add(image.size)
    assert len(sizes) == 1


# --- Tables ---


def _has_parquet():
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


numbers = st.floats(allow_nan=False, allow_infinity=False)
records = st.builds(
    lambda image, text, score, confidence, words, others, fault: (
        error_record(image, ImageReadError(text))
        if fault
        else {
            "image": image,
            "caption": text,
            "score": score,
            "confidence": confidence,
            "words": [{"word": word, "probability": p} for word, p in words],
            "alternatives": [{"caption": other, "score": p} for other, p in others],
            "error": None,
        }
    ),
    texts,
    texts,
    numbers,
    st.none() | numbers,
    st.lists(st.tuples(texts, numbers), max_size=3),
    st.lists(st.tuples(texts, numbers), max_size=2),
    st.booleans(),
)


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


@settings(max_examples=50)
@given(st.lists(records, max_size=5))
def test_a_csv_says_what_the_records_say(rows):
    with tempfile.TemporaryDirectory() as folder:
        write_csv(iter(rows), Path(folder) / "t.csv")
        data = (Path(folder) / "t.csv").read_bytes()
        found = read_csv(Path(folder) / "t.csv")
    assert data.startswith(b"image,caption,score,confidence,alternatives,error_type,error_message\r\n")
    assert data.endswith(b"\r\n")
    assert len(found) == len(rows)
    for row, record in zip(found, rows, strict=True):
        error = record["error"] or {}
        assert (
            row["image"].removeprefix("./" if record["image"][:1] in ("=", "+", "-", "@", "\t", "\r") else "")
            == record["image"]
        )
        assert row["caption"].removeprefix("'" if (record["caption"] or "")[:1] in tuple("=+-@\t\r") else "") == (
            record["caption"] or ""
        )
        assert row["score"] == ("" if record["score"] is None else repr(record["score"]))
        assert row["confidence"] == ("" if record["confidence"] is None else repr(record["confidence"]))
        assert json.loads(row["alternatives"] or "[]") == record["alternatives"]
        assert row["error_type"] == error.get("type", "")
        for name in ("image", "caption", "error_message"):
            assert not row[name].startswith(("=", "+", "-", "@", "\t", "\r"))


def test_a_name_that_a_spreadsheet_would_run_names_the_same_file_still(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "=cmd|' -C calc'!A0.jpg")
    write_csv([caption().to_record(picture.name) for picture in pictures("=cmd|' -C calc'!A0.jpg")], tmp_path / "t.csv")
    (row,) = read_csv(tmp_path / "t.csv")
    assert Path(row["image"]).read_bytes() == JPEG
    assert row["image"].startswith("./=")
    assert float(row["score"]) == -0.5  # a number below zero is no formula


def test_names_that_are_no_utf8_are_escaped_in_tables(tmp_path):
    record = error_record("\udcff.jpg", ImageReadError("\udcff.jpg: gone"))
    write_csv([record], tmp_path / "t.csv")
    assert read_csv(tmp_path / "t.csv")[0]["image"] == "\\udcff.jpg"
    if _has_parquet():
        from pyarrow import parquet

        write_parquet([record], tmp_path / "t.parquet")
        (row,) = parquet.read_table(tmp_path / "t.parquet").to_pylist()
        assert row["image"] == "\\udcff.jpg"
        assert row["error"] == {"type": "ImageReadError", "message": "\\udcff.jpg: gone"}


@settings(max_examples=30)
@given(st.lists(records, max_size=5))
def test_a_parquet_holds_the_records(rows):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed; pip install captioner[parquet]")
    with tempfile.TemporaryDirectory() as folder:
        write_parquet(iter(rows), Path(folder) / "t.parquet")
        assert parquet.read_table(Path(folder) / "t.parquet").to_pylist() == rows


def test_a_parquet_is_typed_and_in_groups_of_bounded_size(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed; pip install captioner[parquet]")
    monkeypatch.setattr(tables, "ROW_GROUP", 4)
    held = []

    def stream():
        for i in range(10):
            held.append(i)
            yield caption(score=-float(i)).to_record(f"{i}.jpg")

    write_parquet(stream(), tmp_path / "t.parquet")
    file = parquet.ParquetFile(tmp_path / "t.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]
    assert "list<element: struct<word: string, probability: double>>" in str(file.schema_arrow.field("words").type)
    assert str(file.schema_arrow.field("score").type) == "double"
    write_parquet([], tmp_path / "empty.parquet")
    assert parquet.read_table(tmp_path / "empty.parquet").schema.names == file.schema_arrow.names


def test_without_pyarrow_the_remedy_is_said_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for ask in (require_parquet, lambda: write_parquet([], tmp_path / "t.parquet")):
        with pytest.raises(ConfigError, match=r"pip install captioner\[parquet\]"):
            ask()
    assert tree(tmp_path) == []


# --- Texts ---


def fill(template, text="A dog.", **options):
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), "s/x.y.jpg")
        (picture,) = pictures(folder)
        return Template(template).fill(picture, caption(text, **options)).replace(folder, "F")


def test_a_template_puts_values_for_fields_and_nothing_else():
    assert fill("{caption}|{image}|{stem}|{score}|{confidence}") == "A dog.|F/s/x.y.jpg|x.y|-0.5000|0.62"
    assert fill("{{caption}} is {caption}") == "{caption} is A dog."
    assert fill("{caption}", "{score} {0} }{") == "{score} {0} }{"
    assert fill("[{confidence}]", confidence=None) == "[]"
    assert fill("", "A dog.") == ""


@pytest.mark.parametrize(
    ("sentence", "phrase"),
    [
        ("A dog runs.", "a dog runs"),
        ("Dogs run.", "dogs run"),
        ("TV on a desk.", "TV on a desk"),
        ("T-shirt on a rug.", "T-shirt on a rug"),
        ("A.", "a"),
    ],
)
def test_a_phrase_is_the_caption_as_part_of_a_longer_text(sentence, phrase):
    assert fill("a photo of {phrase}!", sentence) == f"a photo of {phrase}!"


@pytest.mark.parametrize(
    "template",
    [
        "{",
        "}",
        "{caption",
        "{}",
        "{0}",
        "{title}",
        "{caption.__class__}",
        "{caption[0]}",
        "{caption!r}",
        "{score:.2f}",
        "{caption:{score}}",
        "{ caption }",
    ],
)
def test_a_template_with_anything_else_is_refused_with_the_fields_it_may_have(template):
    with pytest.raises(
        ConfigError, match=r"template .*fields are \{caption\}, \{phrase\}, \{image\}, \{stem\}, \{score\}"
    ):
        Template(template)


@given(texts)
def test_a_template_is_the_text_or_an_error(template):
    try:
        made = Template(template)
    except ConfigError as err:
        assert str(err).isprintable()  # noqa: PT017 - it may also be raised by nothing
    else:
        if "{" not in template and "}" not in template:
            assert made._parts == ([(template, None)] if template else [])


@given(st.text(max_size=300), st.integers(2, 200))
@example("A picture of a dog.", 125)
def test_an_alt_text_is_short_one_line_and_stays_as_it_is(text, limit):
    made = alt_text(text, limit)
    assert len(made) <= limit
    assert made == " ".join(made.split())
    assert alt_text(made, limit) == made
    if len(" ".join(text.split())) <= limit:
        assert made == " ".join(text.split()) or made != text


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=60), st.integers(10, 130))
def test_a_long_alt_text_is_cut_at_a_word(words, limit):
    text = " ".join(words)
    made = alt_text(text, limit)
    if len(text) <= limit:
        assert made == text
    else:
        kept = made.removesuffix("…").split()
        assert made.endswith("…")
        assert kept == words[: len(kept)]
        assert len(" ".join(words[: len(kept) + 1])) + 1 > limit  # no whole word more would fit


def test_an_alt_text_does_not_say_that_it_is_a_picture():
    cases = {
        "A picture of a dog.": "A dog.",
        "an image of two cats": "two cats",
        "A black and white photo of a man.": "A black and white photo of a man.",
        "A close-up of a bee.": "A bee.",
        "A blurry photo showing cars.": "Cars.",
        "A photo of a picture of a dog": "A dog",
        "Picture of a cat.": "A cat.",
        "This is an image of a dog.": "A dog.",
        "A close up picture of a cat.": "A cat.",
        "A man takes a picture of a dog.": "A man takes a picture of a dog.",
        "Pictures of dogs": "Pictures of dogs",
        "A picture hangs on the wall.": "A picture hangs on the wall.",
        "A view of": "A view of",
    }
    assert {text: alt_text(text) for text in cases} == cases
    with pytest.raises(ConfigError, match="at least 2"):
        alt_text("A dog.", 1)


def test_the_formats_are_those_of_the_command_line():
    assert FORMATS == ("jsonl", "csv", "parquet", "txt", "xmp")
    assert math.isclose(float(fill("{score}", score=-1 / 3)), -1 / 3, abs_tol=1e-4)
