"""Sources: files, folders, globs, manifests, archives, standard input → pictures in a stable order, each once."""

import bz2
import contextlib
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from itertools import islice
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pictures import encode, gradient

from captioner.archives import ArchiveLimits, NoContent
from captioner.errors import ConfigError, DataError, ImageReadError
from captioner.images import open_picture
from captioner.manifests import expand_braces, stream_paths
from captioner.sources import find_pictures, member_place

JPEG = encode(gradient(), "JPEG")
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def names(*sources, **options):
    return [picture.name for picture in find_pictures([str(source) for source in sources], **options)]


def below(folder, *sources, **options):
    """The names below a folder, and the notes."""
    notes = []
    found = names(*sources or [folder], note=notes.append, **options)
    return [name.removeprefix(f"{folder}/") for name in found], notes


def make(folder, *files, data=JPEG):
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tar_bytes(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_tar(path, members, packer=bytes, **options):
    path.write_bytes(packer(tar_bytes(members, **options)))
    return path


def make_zip(path, members, method=zipfile.ZIP_DEFLATED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, data in members:
            archive.writestr(name, data)
    return path


def collect(iterator):
    """The pictures that were found, and what stands for those that cannot be: the last such error."""
    found, error = [], None
    for picture in iterator:
        if isinstance(picture.content, NoContent) and picture.member is None:
            with pytest.raises(ImageReadError) as caught:
                picture.read()
            error = str(caught.value)
        else:
            found.append(picture)
    return found, error


# --- Files and folders ---


def test_a_folder_gives_its_pictures_and_those_of_its_folders(tmp_path):
    make(tmp_path, "b.JPG", "a/x.png", "a/deep/er/y.webp", "notes.txt", "c.pdf", "jpg", ".jpg")
    assert below(tmp_path)[0] == ["a/deep/er/y.webp", "a/x.png", "b.JPG"]


def test_paths_come_by_their_code_points(tmp_path):
    make(tmp_path, "a-b.jpg", "a/x.jpg", "a.jpg", "B.jpg", "ä.jpg", "a0/x.jpg")
    found = below(tmp_path)[0]
    assert found == sorted(found)
    assert len(found) == 6


name_texts = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
folder_names = st.sampled_from(["a", "a-b", "a.b", "a0", "Z", "é"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sets(
        st.tuples(st.lists(folder_names, max_size=3), name_texts).map(lambda t: (*t[0], f"x{t[1]}.jpg")), max_size=12
    )
)
def test_every_picture_comes_once_sorted_and_with_a_place_of_its_own(paths):
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            make(Path(folder), str(PurePosixPath(*path)), data=b"")
        found = list(find_pictures([folder]))
    relative = [str(picture.relative) for picture in found]
    assert relative == sorted(str(PurePosixPath(*path)) for path in paths)
    assert [picture.name for picture in found] == [f"{folder}/{path}" for path in relative]


def test_a_picture_says_its_size_and_when_it_was_changed(tmp_path):
    make(tmp_path, "a.jpg")
    (picture,) = find_pictures([tmp_path / "a.jpg"])
    status = (tmp_path / "a.jpg").stat()
    assert (picture.size_bytes, picture.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert picture.member is None
    assert open_picture(picture.read()).full_hw_px == (40, 64)


def test_names_are_as_the_user_writes_them(tmp_path, monkeypatch):
    make(tmp_path, "photos/sub/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert names("photos") == names("photos/") == names("photos/sub/a.jpg") == ["photos/sub/a.jpg"]
    assert names(".") == ["photos/sub/a.jpg"]
    monkeypatch.chdir(tmp_path / "photos")
    assert names("../photos") == ["../photos/sub/a.jpg"]


def test_a_named_file_is_taken_whatever_its_suffix_and_if_it_is_missing_too(tmp_path):
    make(tmp_path, "scan.dat", "plain")
    found = list(find_pictures([tmp_path / "scan.dat", tmp_path / "gone.jpg", tmp_path / "plain", tmp_path / "x.what"]))
    assert [picture.size_bytes is None for picture in found] == [False, True, False, True]
    with pytest.raises(ImageReadError, match="no such file"):
        open_picture(found[1].read())


def test_a_broken_link_in_a_folder_is_a_picture_that_fails(tmp_path):
    (tmp_path / "a.jpg").symlink_to("nowhere")
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    found = list(find_pictures([tmp_path]))
    assert [picture.size_bytes for picture in found] == [None, None]


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (picture,) = find_pictures([tmp_path])
    assert picture.size_bytes is None
    with pytest.raises(ImageReadError, match="pipe"):
        open_picture(picture.read())


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text there")
def test_names_that_are_no_utf8_and_names_of_two_lines_are_found_and_read(tmp_path):
    odd = [b"\xff\xfe.jpg", b"two\nlines.jpg", "snö ☃.jpg".encode(), b"\x1b[31m.jpg"]
    for name in odd:
        (tmp_path / os.fsdecode(name)).write_bytes(JPEG)
    found = list(find_pictures([tmp_path]))
    assert {os.fsencode(picture.name).rpartition(b"/")[2] for picture in found} == set(odd)
    for picture in found:
        assert open_picture(pickle.loads(pickle.dumps(picture)).read()).full_hw_px == (40, 64)


def test_a_folder_that_cannot_be_read_is_one_picture_that_fails(tmp_path, monkeypatch):
    make(tmp_path, "a/x.jpg", "locked/y.jpg", "z.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # permissions do not stop root, who may run the tests
    found = list(find_pictures([tmp_path]))
    assert [picture.relative.as_posix() for picture in found] == ["a/x.jpg", "locked", "z.jpg"]
    with pytest.raises(ImageReadError, match=r"locked/: the folder cannot be read \(Permission denied\)"):
        found[1].read()


def test_a_folder_is_read_only_when_its_turn_comes(tmp_path, monkeypatch):
    make(tmp_path, *(f"{folder}/x.jpg" for folder in "abcdefgh"))
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scandir(path))
    list(islice(find_pictures([tmp_path]), 2))
    assert not any(path.rstrip("/").endswith("/h") for path in scanned)


# --- Left out, and said once ---


def test_hidden_files_and_folders_are_left_out_and_counted_unless_asked_for(tmp_path):
    make(tmp_path, "a.jpg", ".b.jpg", ".git/c.jpg", "d/._e.jpg", "d/.DS_Store")
    found, notes = below(tmp_path)
    assert found == ["a.jpg"]
    assert len(notes) == 1
    assert "hidden files and folders: 3 (first: " in notes[0]
    found, notes = below(tmp_path, hidden=True)
    assert found == [".b.jpg", ".git/c.jpg", "a.jpg", "d/._e.jpg"]
    assert notes == [f"left out, no pictures by their names: 1 (first: {tmp_path}/d/.DS_Store)"]


def test_a_hidden_folder_that_is_named_is_taken(tmp_path):
    make(tmp_path, ".photos/a.jpg")
    assert below(tmp_path, tmp_path / ".photos") == ([".photos/a.jpg"], [])


def test_links_in_a_circle_end_and_are_said_once(tmp_path):
    make(tmp_path, "a/x.jpg", "b/y.jpg")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(".")
    (tmp_path / "b/to_a").symlink_to("../a")
    found, notes = below(tmp_path)
    assert found == ["a/x.jpg", "b/y.jpg"]
    assert len(notes) == 1
    assert "folders that links lead to again: 3" in notes[0]


def test_a_linked_folder_elsewhere_is_walked_under_the_name_of_the_link(tmp_path):
    make(tmp_path, "here/a.jpg", "there/b.jpg")
    (tmp_path / "here/link").symlink_to(tmp_path / "there")
    assert below(tmp_path, tmp_path / "here") == (["here/a.jpg", "here/link/b.jpg"], [])


def test_a_file_comes_once_however_often_it_is_reached(tmp_path):
    make(tmp_path, "a.jpg", "sub/b.jpg")
    (tmp_path / "c.jpg").symlink_to("a.jpg")
    sources = [tmp_path / "sub/b.jpg", tmp_path, tmp_path / "sub", f"{tmp_path}/sub/../a.jpg", tmp_path / "gone.jpg"]
    found, notes = below(tmp_path, *sources, tmp_path / "gone.jpg")
    assert found == ["sub/b.jpg", "a.jpg", "gone.jpg"]
    assert len(notes) == 1
    assert "reached before: 5" in notes[0]


def test_two_hard_links_are_two_files_but_each_comes_once(tmp_path):
    make(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").hardlink_to(tmp_path / "a.jpg")
    assert below(tmp_path, tmp_path, tmp_path)[0] == ["a.jpg", "b.jpg"]


def test_figures_of_our_own_are_no_pictures(tmp_path):
    make(tmp_path, "a.jpg", "a.maps.png")
    found, notes = below(tmp_path)
    assert found == ["a.jpg"]
    assert "figures that captioner drew: 1" in notes[0]


# --- Patterns and globs ---


def test_a_pattern_takes_pictures_and_other_files_only_where_it_names_their_suffix(tmp_path):
    make(tmp_path, "a.JPG", "b.png", "c.dat", "x/d.jpg", "x/c.dat", "a.b/c")
    assert below(tmp_path, pattern="*.jpg")[0] == ["a.JPG", "x/d.jpg"]
    assert below(tmp_path, pattern="c.*")[0] == []
    assert below(tmp_path, pattern="*.dat")[0] == ["c.dat", "x/c.dat"]
    assert below(tmp_path, pattern="x/*")[0] == ["x/d.jpg"]
    assert below(tmp_path, pattern="a.b/*")[0] == []
    assert below(tmp_path, pattern="*.xyz")[0] == []


def test_what_a_run_has_written_is_never_a_picture(tmp_path):
    written = ["a.txt", "a.jpg.xmp", "a.maps.npz", "a.maps.png", "captions.jsonl", "captions.csv", "captions.parquet"]
    make(tmp_path, "a.jpg", *written, "captions.progress", "captions.progress.lock", "captions.records.jsonl")
    for pattern in (None, "*", "*a*"):
        assert below(tmp_path, pattern=pattern)[0] == ["a.jpg"]
    for suffix in ("txt", "xmp", "npz", "png", "progress", "lock", "jsonl", "csv", "parquet"):
        assert below(tmp_path, pattern=f"*.{suffix}")[0] == []
    assert below(tmp_path, f"{tmp_path}/*")[0] == ["a.jpg"]
    with pytest.raises(ConfigError, match="fits no picture"):
        find_pictures([f"{tmp_path}/*.progress"])


# --- Nothing is left out in silence ---


def test_files_that_are_no_pictures_and_archives_in_folders_are_counted(tmp_path):
    make(tmp_path, "a.jpg", "b.pdf", "s/c.mov", "s/more.zip", "s/old.tar.gz", "a.txt")
    found, notes = below(tmp_path)
    assert found == ["a.jpg"]
    assert [note.partition(" (first")[0] for note in notes] == [
        "left out, no pictures by their names: 2",
        "left out, archives in folders, which are opened only when they are named: 2",
    ]


def test_a_source_that_gives_no_picture_is_said(tmp_path):
    make(tmp_path / "texts", "a.txt")
    make(tmp_path / "photos", "a.jpg")
    make_zip(tmp_path / "p.zip", [("readme.txt", b"no")])
    (tmp_path / "list.txt").write_text("\n")
    sources = [tmp_path / name for name in ("texts", "photos", "p.zip", "list.txt")]
    found, notes = below(tmp_path, *sources, "-", stdin=io.StringIO(""))
    assert found == ["photos/a.jpg"]
    assert notes == [f"{name}: gives no picture" for name in (*map(str, (sources[0], *sources[2:])), "-")]


def test_a_glob_finds_what_a_shell_would(tmp_path):
    make(tmp_path, "a.jpg", "s/b.jpg", "s/t/c.jpg", "s/t/d.png", "s/.h.jpg", ".h/e.jpg", "s/n.txt", "u/f.jpg")
    expected = {
        "*.jpg": ["a.jpg"],
        "**/*.jpg": ["a.jpg", "s/b.jpg", "s/t/c.jpg", "u/f.jpg"],
        "s/**/[cd].*": ["s/t/c.jpg", "s/t/d.png"],
        "?/b.jpg": ["s/b.jpg"],
        "s/*": ["s/b.jpg", "s/t/c.jpg", "s/t/d.png"],  # the folder s/t is one that fits
        "[su]": ["s/b.jpg", "s/t/c.jpg", "s/t/d.png", "u/f.jpg"],
        "**": ["a.jpg", "s/b.jpg", "s/t/c.jpg", "s/t/d.png", "u/f.jpg"],
        "s/.h*": ["s/.h.jpg"],
        "*/t/*.png": ["s/t/d.png"],
    }
    assert {pattern: below(tmp_path, f"{tmp_path}/{pattern}")[0] for pattern in expected} == expected


def test_a_glob_takes_other_suffixes_only_where_it_names_them(tmp_path):
    make(tmp_path, "a.jpg", "b.dat", "c.txt")
    found, notes = below(tmp_path, f"{tmp_path}/*")
    assert found == ["a.jpg"]
    assert "no pictures by their names: 2" in notes[0]
    assert below(tmp_path, f"{tmp_path}/*.dat") == (["b.dat"], [])


def test_a_glob_is_not_led_astray_by_a_link_to_the_folder_it_means(tmp_path):
    make(tmp_path, "real/a.jpg")
    (tmp_path / "link").symlink_to("real")
    assert below(tmp_path, f"{tmp_path}/[r]eal/*.jpg")[0] == ["real/a.jpg"]


def test_a_name_that_is_there_is_no_glob_and_has_no_braces(tmp_path):
    make(tmp_path, "a[1].jpg", "a1.jpg", "b{1,2}.jpg")
    assert below(tmp_path, tmp_path / "a[1].jpg", tmp_path / "b{1,2}.jpg")[0] == ["a[1].jpg", "b{1,2}.jpg"]


def test_braces_are_written_out_as_a_shell_does():
    assert expand_braces("s-{08..11}.tar") == [f"s-{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand_braces("a{}{b}{c") == ["a{}{b}{c"]
    for bad in ("s-{2..1}.tar", "s-{0..9999999}.tar", "{0..999}{0..999}{0..9}"):
        with pytest.raises(ConfigError, match="must rise"):
            expand_braces(bad)


# --- Manifests and standard input ---


def test_the_lines_of_a_manifest_are_relative_to_it(tmp_path, monkeypatch):
    make(tmp_path, "lists/p/a.jpg", "b.jpg")
    lines = f"\ufeffp/a.jpg\r\n\r\n../b.jpg\n{tmp_path}/b.jpg\n# c.jpg"
    (tmp_path / "lists/all.txt").write_text(lines)
    monkeypatch.chdir(tmp_path)
    assert names("lists/all.txt") == ["lists/p/a.jpg", "b.jpg", "lists/# c.jpg"]


def test_a_picture_has_one_name_however_a_list_spells_it(tmp_path, monkeypatch):
    make(tmp_path, "p/a.jpg", "q/b.jpg")
    (tmp_path / "p/link").symlink_to(tmp_path / "q")
    monkeypatch.chdir(tmp_path)
    for spelling in ("p/a.jpg", "./p/a.jpg", "p//a.jpg", "p/./a.jpg", "q/../p/a.jpg", "./q/.././p/a.jpg"):
        assert names("-", stdin=io.StringIO(spelling)) == ["p/a.jpg"]
        (tmp_path / "list.txt").write_text(spelling)
        assert names("list.txt") == names("./list.txt") == ["p/a.jpg"]
    # Out of a link, ".." leads to where the link leads: this is no other name of p/a.jpg.
    assert names("-", stdin=io.StringIO("p/link/../a.jpg")) == ["p/link/../a.jpg"]


@pytest.mark.parametrize("column", ["image", "path", "file", "filename", "file_name", " Image "])
def test_a_csv_and_a_jsonl_name_their_column(tmp_path, column):
    (tmp_path / "m.csv").write_text(f'id,{column}\r\n1,"a, b.jpg"\r\n2,\r\n\r\n3,"x\ny.jpg"\r\n')
    lines = [{"id": 1, column: "a, b.jpg"}, {column: ""}, {column: "x\ny.jpg"}]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert below(tmp_path, tmp_path / "m.csv")[0] == ["a, b.jpg", "x\ny.jpg"]
    assert below(tmp_path, tmp_path / "m.jsonl")[0] == ["a, b.jpg", "x\ny.jpg"]


def test_image_goes_before_other_columns(tmp_path):
    (tmp_path / "m.csv").write_text("file,image\nx.jpg,a.jpg\n")
    assert below(tmp_path, tmp_path / "m.csv")[0] == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("m.csv", "id,caption\n1,dog\n", r"m.csv:1: no column image, path, .* among id, caption"),
        ("m.csv", "", "empty; give a header"),
        ("m.jsonl", '{"caption": "dog"}\n', "m.jsonl:1: no column"),
        ("m.jsonl", "[1]\n", "m.jsonl:1: not a JSON object"),
        ("m.jsonl", "{\n", "m.jsonl:1: not JSON"),
        ("m.jsonl", '{"image": 3}\n', "m.jsonl:1: the path must be text, got 3"),
        ("m.txt", "x" * (2**20 + 1), "m.txt:1: a line of more than"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_refused_at_once(tmp_path, name, text, fault):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=fault):
        find_pictures([tmp_path / name])


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("m.csv", "id,image\n1,a.jpg\n2\n", "m.csv:3: only 1 values"),
        ("m.csv", 'image\na.jpg\n"b\n', "m.csv:3: not comma-separated"),
        ("m.jsonl", '{"image": "a.jpg"}\n{"caption": ""}\n', "m.jsonl:2: no column"),
    ],
)
def test_a_bad_line_further_down_is_a_picture_that_fails_and_the_next_ones_are_read(tmp_path, name, text, fault):
    later = {"m.csv": "3,b.jpg\n", "m.jsonl": '{"image": "b.jpg"}\n'}[name] if "not comma" not in fault else ""
    (tmp_path / name).write_text(text + later)
    found, error = collect(find_pictures([tmp_path / name]))
    assert [picture.relative.name for picture in found] == (["a.jpg", "b.jpg"] if later else ["a.jpg"])
    assert error is not None
    assert fault in str(error)


def test_a_manifest_names_bytes_that_are_no_text_and_what_no_file_can_be_called(tmp_path):
    (tmp_path / "m.txt").write_bytes(b"\xff.jpg\n")
    (tmp_path / "m.jsonl").write_text(
        '{"image": "a\\u0000b.jpg"}\n{"image": "\\ud800.jpg"}\n{"image": "' + "x" * 999 + '"}'
    )
    found = list(find_pictures([tmp_path / "m.txt", tmp_path / "m.jsonl"]))
    assert found[0].name.endswith("/\udcff.jpg")
    assert [picture.size_bytes for picture in found] == [None] * 4
    for picture in found:
        with pytest.raises(ImageReadError):
            open_picture(picture.read())


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=6).map(lambda ps: [p.replace(b"\0", b"/") for p in ps]))
def test_paths_on_standard_input_are_read_as_they_are_written(paths):
    assume(not paths or paths[0][:2] not in (b"\xff\xfe", b"\xfe\xff"))  # with which UTF-16 begins
    assert [os.fsencode(path) for path in stream_paths(io.BytesIO(b"".join(p + b"\0" for p in paths)))] == paths
    lines = [path for path in (p.replace(b"\n", b"").rstrip(b"\r") for p in paths) if path]
    for end in (b"", b"\n"):
        read = stream_paths(io.BytesIO(b"\n".join(lines) + end))
        assert [path.encode("utf-8", "surrogateescape") for path in read] == lines


def test_nul_separates_even_where_the_first_name_has_many_lines():
    class Trickle(io.RawIOBase):
        chunks = iter([b"a\n", b"b\n" * 2000, b"c.jpg\0", b"d.jpg", b"\0", b""])

        def read(self, size=-1):
            return next(self.chunks)

    assert list(stream_paths(Trickle())) == ["a\n" + "b\n" * 2000 + "c.jpg", "d.jpg"]


def test_standard_input_is_a_source_beside_others(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg", "b.jpg")
    monkeypatch.chdir(tmp_path)
    assert names("-", "a.jpg", stdin=io.StringIO("b.jpg\nphotos/gone.jpg")) == ["b.jpg", "photos/gone.jpg", "a.jpg"]
    with pytest.raises(ConfigError, match="'-' is given twice"):
        find_pictures(["-", "-"])
    found, error = collect(find_pictures(["-", "a.jpg"], stdin=io.BytesIO(b"b.jpg\n" + b"x" * 10_000)))
    assert [picture.name for picture in found] == ["b.jpg", "a.jpg"]
    assert "standard input: a path of more than" in str(error)


def test_a_closed_standard_input_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="-: standard input is closed"):
        find_pictures(["-"])
    closed = io.StringIO()
    closed.close()
    with pytest.raises(ConfigError, match="-: standard input is closed"):
        find_pictures(["-"], stdin=closed)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["m.txt", "m.csv", "m.jsonl"])
def test_a_list_in_utf16_is_refused_at_once(tmp_path, encoding, name):
    make(tmp_path, "a.jpg")
    (tmp_path / name).write_bytes("image\r\na.jpg\r\n".encode(encoding))
    with pytest.raises(ConfigError, match=f"{name}: in UTF-16, .* save it as UTF-8"):
        find_pictures([tmp_path / name, tmp_path / "a.jpg"])
    if encoding == "utf-16":
        with pytest.raises(ConfigError, match="standard input: in UTF-16"):
            list(find_pictures(["-"], stdin=io.BytesIO((tmp_path / name).read_bytes())))


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_csv_may_be_parted_by_semicolons_or_tabs(tmp_path, sign):
    (tmp_path / "m.csv").write_text(f'id{sign}image\n1{sign}a.jpg\n2{sign}"b{sign} c,d.jpg"\n')
    assert below(tmp_path, tmp_path / "m.csv")[0] == ["a.jpg", f"b{sign} c,d.jpg"]


# --- Sources that cannot be understood ---


def test_a_damaged_source_is_one_picture_that_fails_and_the_others_are_read(tmp_path):
    make(tmp_path, "p/a.jpg")
    make_zip(tmp_path / "good.zip", [("b.jpg", JPEG)])
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    (tmp_path / "cut.tar").write_bytes(tar_bytes([("c.jpg", JPEG), ("d.jpg", JPEG)])[: 512 + 512 * (len(JPEG) // 512)])
    (tmp_path / "bad.csv").write_text("id,caption\n1,dog\n")
    order = ["bad.zip", "p", "bad.csv", "gone.tar", "cut.tar", "good.zip"]
    notes = []
    found = list(find_pictures([tmp_path / name for name in order], note=notes.append))
    names_found = [picture.name.removeprefix(f"{tmp_path}/") for picture in found]
    assert [name for name in names_found if name not in ("cut.tar!/c.jpg",)] == [
        *("bad.zip", "p/a.jpg", "bad.csv", "gone.tar", "cut.tar", "good.zip!/b.jpg")
    ]
    for picture, fault in ((found[0], "not a zip file"), (found[2], "no column"), (found[3], "No such file")):
        with pytest.raises(ImageReadError, match=fault) as caught:
            picture.read()
        assert str(caught.value).count(picture.name) == 1 or picture.name.endswith("bad.csv")
    assert sum("bad.zip" in note for note in notes) == 1  # it is said at once
    (tmp_path / "bad-1.zip").write_bytes(b"no zip")
    good = [picture.name for picture in find_pictures([f"{tmp_path}/*.zip"]) if picture.member is not None]
    assert good == [f"{tmp_path}/good.zip!/b.jpg"]


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("gone", "no such file or folder"),
        ("gone/", "no such file or folder"),
        ("*.jpg", "fits no picture"),
        ("gone/*.jpg", r"gone: the folder cannot be read \(No such file"),
        ("gone.zip", r"gone.zip: cannot be read \(No such file"),
        ("gone-{0..1}.tar", r"gone-0.tar: cannot be read \(No such file"),
        ("gone.txt", r"gone.txt: cannot be read \(No such file"),
        ("https://example.org/a.jpg", "a URL, and nothing is fetched"),
        ("", "not the name of a file"),
        ("a\0b", "not the name of a file"),
    ],
)
def test_a_source_that_cannot_be_understood_is_refused_before_anything_runs(tmp_path, monkeypatch, source, fault):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=fault):
        find_pictures([source])


def test_no_source_and_a_bare_text_are_refused():
    for sources in ([], "photos", Path("photos")):
        with pytest.raises(ConfigError, match="sources must be a list"):
            find_pictures(sources)


def test_what_goes_wrong_is_said_in_one_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        find_pictures([f"{tmp_path}/two\nlines\x1b/*.jpg"])
    assert str(caught.value).isprintable()


# --- Archives ---

MEMBERS = [
    ("b/2.jpg", JPEG),
    ("a/1.png", JPEG + b"1"),
    ("readme.txt", b"no"),
    ("0.webp", b""),
    ("ü/ß.jpg", b"x" * 70_000),
]
PICTURES = [(name, data) for name, data in MEMBERS if name != "readme.txt"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_members_of_a_zip_are_its_bytes_in_its_order(tmp_path, method):
    archive = make_zip(tmp_path / "p.zip", MEMBERS, method)
    found = [pickle.loads(pickle.dumps(picture)) for picture in find_pictures([archive])]
    assert [(picture.member, picture.read()) for picture in found] == PICTURES
    assert [picture.name for picture in found] == [f"{archive}!/{name}" for name, _ in PICTURES]
    assert [picture.size_bytes for picture in found] == [len(data) for _, data in PICTURES]
    assert {picture.mtime_ns for picture in found} == {archive.stat().st_mtime_ns}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_tar_are_its_bytes_in_its_order(tmp_path, suffix, form):
    archive = make_tar(tmp_path / f"p.tar{suffix}", MEMBERS, PACKERS[suffix], format=form)
    found = [pickle.loads(pickle.dumps(picture)) for picture in find_pictures([archive])]
    assert [(picture.member, picture.read()) for picture in found] == PICTURES


member_names = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=150).map("x{}.jpg".format),
    max_size=5,
    unique=True,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(member_names, st.data())
def test_any_names_and_bytes_come_back_from_any_archive(found_names, data):
    members = [(name, data.draw(st.binary(max_size=1500))) for name in found_names]
    first = {member_place(name): name for name, _ in reversed(members)}  # of two that share a place
    expected = [
        (name, content)
        for name, content in members
        if not any(p.startswith(".") for p in member_place(name).parts) and first[member_place(name)] == name
    ]
    with tempfile.TemporaryDirectory() as folder:
        archives = [make_zip(Path(folder) / "p.zip", members)]
        archives += [make_tar(Path(folder) / f"p.tar{suffix}", members, packer) for suffix, packer in PACKERS.items()]
        for archive in archives:
            found = list(find_pictures([archive]))
            assert [(picture.member, picture.read()) for picture in found] == expected


def test_a_tar_is_known_by_what_it_holds_not_by_its_suffix(tmp_path):
    for name, packer in {
        "a.tar": gzip.compress,
        "b.tgz": bytes,
        "c.tar": lambda d: gzip.compress(d[:700]) + gzip.compress(d[700:]),
    }.items():
        archive = make_tar(tmp_path / name, MEMBERS, packer)
        assert [(picture.member, picture.read()) for picture in find_pictures([archive])] == PICTURES


def test_shards_are_named_with_braces_or_a_glob(tmp_path):
    for shard in ("000", "001", "002"):
        samples = [
            (f"{shard}7.jpg", JPEG),
            (f"{shard}7.json", b"{}"),
            (f"{shard}8.left.png", JPEG),
            (f"{shard}8.cls", b"3"),
        ]
        make_tar(tmp_path / f"s-{shard}.tar", samples)
    expected = [f"s-{s}.tar!/{s}{member}" for s in ("000", "001", "002") for member in ("7.jpg", "8.left.png")]
    assert below(tmp_path, f"{tmp_path}/s-{{000..002}}.tar")[0] == expected
    assert below(tmp_path, f"{tmp_path}/s-*.tar")[0] == expected
    assert below(tmp_path)[0] == []  # what lies in a folder is not unpacked


def test_names_in_an_archive_lead_nowhere_else(tmp_path):
    odd = ["../../etc/a.jpg", "/abs/b.jpg", "..\\c.jpg", "./d.jpg", "x/./y/../e.jpg", "C:\\f.jpg"]
    for archive in (
        make_zip(tmp_path / "p.zip", [(n, JPEG) for n in odd]),
        make_tar(tmp_path / "p.tar", [(n, JPEG) for n in odd]),
    ):
        found = list(find_pictures([archive]))
        assert len(found) == len(odd)
        for picture in found:
            assert not picture.relative.is_absolute()
            assert ".." not in picture.relative.parts
            assert picture.read() == JPEG


def test_of_two_members_that_share_a_place_the_second_is_left_out_and_said(tmp_path):
    members = [(name, JPEG) for name in ("a.jpg", "/a.jpg", "x/b.jpg", "x\\b.jpg", "x//b.jpg", "./a.jpg")]
    for archive in (make_zip(tmp_path / "p.zip", members), make_tar(tmp_path / "p.tar", members)):
        found, notes = below(f"{archive}!", archive)
        assert found == ["a.jpg", "x/b.jpg"]
        assert any("members of the same name as one before: 4" in note for note in notes)


@given(st.text(st.sampled_from("./\\:a"), min_size=1))
def test_a_place_in_an_archive_never_leaves_it(name):
    place = member_place(name)
    assert not place.is_absolute()
    assert ".." not in place.parts
    assert member_place(str(place)) == place


def test_links_folders_and_hidden_members_are_left_out_and_said(tmp_path):
    link, hard, folder = tarfile.TarInfo("l.jpg"), tarfile.TarInfo("h.jpg"), tarfile.TarInfo("dir.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.jpg"
    folder.type = tarfile.DIRTYPE
    pipe = tarfile.TarInfo("p.jpg")
    pipe.type = tarfile.FIFOTYPE
    plain = [("a.jpg", JPEG), ("__MACOSX/._a.jpg", b"x"), (".h/b.jpg", b"x"), ("a.jpg", b"later")]
    tar = make_tar(tmp_path / "p.tar", [*plain, (link, b""), (hard, b""), (folder, b""), (pipe, b"")])
    symlink = zipfile.ZipInfo("l.jpg")
    symlink.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed = make_zip(tmp_path / "p.zip", [*plain, ("dir.jpg/", b""), (symlink, "/etc/passwd"), ("h.jpg/", b"")])
    for archive, links in ((tar, 2), (packed, 1)):
        found, notes = below(f"{archive}!", archive)
        assert found == ["a.jpg"]
        assert any(f"links within archives: {links}" in line for line in notes)
        assert any("hidden files and folders: 2" in line for line in notes)
        assert any("members of the same name as one before: 1" in line for line in notes)


def test_an_archive_that_is_named_twice_comes_once(tmp_path):
    make_zip(tmp_path / "p.zip", MEMBERS)
    (tmp_path / "q.zip").symlink_to("p.zip")
    found, notes = below(tmp_path, tmp_path / "p.zip", tmp_path / "q.zip", f"{tmp_path}/*.zip")
    assert len(found) == len(PICTURES)
    assert "reached before: 3" in notes[0]


def test_an_encrypted_or_rarely_packed_member_is_a_picture_that_fails(tmp_path):
    archive = make_zip(tmp_path / "p.zip", [("a.jpg", JPEG), ("b.jpg", JPEG)])
    data = bytearray(archive.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 8] |= 1  # APPNOTE 4.4.4: bit 0 of the flags says that it is encrypted
    archive.write_bytes(data)
    first, second = find_pictures([archive])
    with pytest.raises(ImageReadError, match=r"p.zip!/a.jpg: encrypted within the zip"):
        first.read()
    assert second.read() == JPEG
    (rare,) = find_pictures([make_zip(tmp_path / "q.zip", [("a.jpg", JPEG)], zipfile.ZIP_LZMA)])
    with pytest.raises(ImageReadError, match="a rare method"):
        rare.read()


def test_a_member_over_the_limit_is_a_picture_that_fails(tmp_path):
    limits = ArchiveLimits(max_member_bytes=1000)
    members = [("a.jpg", b"x" * 1000), ("b.jpg", os.urandom(1001)), ("c.jpg", b"x")]
    archives = [make_zip(tmp_path / "p.zip", members, zipfile.ZIP_STORED)]
    archives += [make_tar(tmp_path / f"p.tar{suffix}", members, packer) for suffix, packer in PACKERS.items()]
    for archive in archives:
        first, large, last = find_pictures([archive], limits=limits)
        assert (first.read(), last.read()) == (b"x" * 1000, b"x")
        with pytest.raises(ImageReadError, match="over the limit of 1000 bytes"):
            large.read()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    zeros = [("a.jpg", b"\0" * 2_000_000), ("b.jpg", b"\0" * 2_000_000)]
    limits = ArchiveLimits(max_member_bytes=3_000_000, max_ratio=100)
    with pytest.raises(ConfigError, match=r"more than 100 times its own size; .* raise --max-ratio"):
        find_pictures([make_zip(tmp_path / "p.zip", zeros)], limits=limits)
    found, error = collect(find_pictures([make_tar(tmp_path / "p.tar.xz", zeros, lzma.compress)], limits=limits))
    assert [picture.member for picture in found] == ["a.jpg"]
    assert "raise --max-ratio" in str(error)
    few = ArchiveLimits(max_members=1)
    with pytest.raises(ConfigError, match="more than the limit of 1 members"):
        find_pictures([tmp_path / "p.zip"], limits=few)
    total = ArchiveLimits(max_total_bytes=3_000_000)
    with pytest.raises(ConfigError, match="more than the limit of 3000000 bytes"):
        find_pictures([tmp_path / "p.zip"], limits=total)


def test_a_zip_that_promises_less_than_it_holds_is_not_unpacked_further(tmp_path):
    archive = make_zip(tmp_path / "p.zip", [("a.jpg", b"\0" * 5_000_000)])
    data = bytearray(archive.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 24, 100)  # APPNOTE 4.3.12: the uncompressed size
    archive.write_bytes(data)
    (picture,) = find_pictures([archive])
    with pytest.raises(ImageReadError, match="its checksum or size is wrong"):
        picture.read()


def test_a_false_header_fills_no_memory(tmp_path):
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**33
    header = long_name.tobuf(tarfile.GNU_FORMAT)
    for name, packer in (("p.tar", bytes), ("p.tar.gz", gzip.compress)):
        (tmp_path / name).write_bytes(packer(tar_bytes([("a.jpg", b"x" * 512)])[:1024] + header + bytes(4096)))
        found, error = collect(find_pictures([tmp_path / name]))
        assert error is not None
        assert [picture.member for picture in found] == ["a.jpg"]


def test_an_archive_that_was_changed_is_not_read_at_the_old_places(tmp_path):
    for archive in (make_zip(tmp_path / "p.zip", MEMBERS), make_tar(tmp_path / "p.tar", MEMBERS)):
        picture = next(find_pictures([archive]))
        os.utime(archive, ns=(0, 12345))
        with pytest.raises(ImageReadError, match="was changed after it was listed"):
            picture.read()
        archive.unlink()
        with pytest.raises(ImageReadError, match="cannot be read"):
            picture.read()


@pytest.mark.parametrize("name", ["p.zip", "p.tar", "p.tar.gz", "p.tar.xz", "p.tar.zst"])
@pytest.mark.parametrize(
    "data", [b"", b"no archive", b"\x28\xb5\x2f\xfd no", b"\x1f\x8b no", b"PK\5\6", bytes(range(256)) * 40]
)
def test_what_is_no_archive_is_refused_at_once(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=name):
        find_pictures([tmp_path / name])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(PACKERS)), st.floats(0, 1, exclude_max=True))
def test_before_a_cut_all_is_read_and_then_the_damage_is_said(suffix, share):
    whole = PACKERS[suffix](tar_bytes([(f"{i}.jpg", bytes([i]) * 600 * i) for i in range(6)]))
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / f"p.tar{suffix}"
        archive.write_bytes(whole[: int(share * len(whole))])
        try:
            found, error = collect(find_pictures([archive]))
        except ConfigError as err:
            found, error = [], err
        for i, picture in enumerate(found):
            assert (picture.member, picture.read()) == (f"{i}.jpg", bytes([i]) * 600 * i)
    # Beyond the first empty block there is only padding.
    content = sum(512 + -(-600 * i // 512) * 512 for i in range(6))
    if suffix or int(share * len(whole)) < content + 512:
        assert error is not None
        assert archive.name in str(error)


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["p.zip", *(f"p.tar{suffix}" for suffix in PACKERS)]),
    st.integers(0),
    st.binary(min_size=1, max_size=40),
)
def test_damaged_archives_raise_only_our_errors(name, at, noise):
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / name
        if name == "p.zip":
            make_zip(archive, MEMBERS)
        else:
            make_tar(archive, MEMBERS, PACKERS[name.removeprefix("p.tar")])
        data = bytearray(archive.read_bytes())
        at %= len(data)
        data[at : at + len(noise)] = noise
        archive.write_bytes(data)
        try:
            for picture in find_pictures([archive]):
                assert picture.relative.parts
                with contextlib.suppress(ImageReadError):
                    picture.read()
        except (ConfigError, DataError) as err:
            assert name in str(err)  # noqa: PT017 - it may also be raised by nothing


# --- Places ---


def test_a_place_is_below_the_folder_that_holds_all_sources(tmp_path, monkeypatch):
    make(tmp_path, "x/a.jpg", "x/s/b.jpg", "y/a.jpg")
    make_zip(tmp_path / "x/p.zip", [("i/a.jpg", JPEG)])
    monkeypatch.chdir(tmp_path)

    def places(*sources, **options):
        return [str(picture.relative) for picture in find_pictures(sources, **options)]

    assert places("x") == ["a.jpg", "s/b.jpg"]
    assert places("x/a.jpg") == ["a.jpg"]
    assert places("x/a.jpg", "x/s/b.jpg") == ["a.jpg", "s/b.jpg"]
    assert places("x", "y") == ["x/a.jpg", "x/s/b.jpg", "y/a.jpg"]
    assert places("x/**/*.jpg") == ["a.jpg", "s/b.jpg"]
    assert places("x/p.zip") == ["i/a.jpg"]
    assert places("x/p.zip", "x/a.jpg") == ["p.zip/i/a.jpg", "a.jpg"]
    assert places("-", stdin=io.StringIO("x/a.jpg\n../z.jpg")) == ["x/a.jpg", f"_outside{tmp_path.parent}/z.jpg"]


def test_finding_pictures_needs_no_torch():
    code = (
        "import sys, captioner.sources, captioner.writers; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_tar_behind_another_is_not_lost_in_silence(tmp_path):
    both = tar_bytes([("a.jpg", JPEG)]) + tar_bytes([("b.jpg", JPEG)])
    for name, packer in (("p.tar", bytes), ("p.tar.gz", gzip.compress)):
        (tmp_path / name).write_bytes(packer(both))
        found, error = collect(find_pictures([tmp_path / name]))
        assert [picture.member for picture in found] == ["a.jpg"]
        assert "more follows the end" in str(error)


def test_a_zip_behind_other_bytes_and_one_that_was_written_as_a_stream_are_read(tmp_path):
    class Stream(io.RawIOBase):
        def __init__(self, file):
            self.file = file

        def writable(self):
            return True

        def write(self, data):
            return self.file.write(data)

    make_zip(tmp_path / "p.zip", MEMBERS)
    (tmp_path / "p.zip").write_bytes(b"#!/bin/sh\n" * 99 + (tmp_path / "p.zip").read_bytes())
    with (tmp_path / "q.zip").open("wb") as file, zipfile.ZipFile(Stream(file), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in MEMBERS:
            archive.writestr(name, data)
    for name in ("p.zip", "q.zip"):
        assert [(picture.member, picture.read()) for picture in find_pictures([tmp_path / name])] == PICTURES


def test_a_sparse_member_is_a_picture_that_fails(tmp_path):
    sparse = tarfile.TarInfo("a.jpg")
    sparse.pax_headers = {"GNU.sparse.map": "0,9", "GNU.sparse.size": str(2**40)}
    for suffix, packer in PACKERS.items():
        archive = make_tar(tmp_path / f"p.tar{suffix}", [(sparse, b"x" * 9), ("b.jpg", JPEG)], packer)
        first, second = find_pictures([archive])
        assert second.read() == JPEG
        with pytest.raises(ImageReadError, match="a sparse file"):
            first.read()


glob_parts = st.sampled_from(["a", "*", "**", "[ab]", "?", "a*"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sets(st.lists(st.sampled_from(["a", "b", "ab"]), max_size=3).map(lambda parts: "/".join([*parts, "x.jpg"]))),
    st.lists(glob_parts, max_size=3),
)
def test_a_glob_is_the_glob_of_python(files, parts):
    pattern = "/".join([*parts, "*.jpg"])
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), *files, data=b"")
        expected = sorted(set(glob.glob(pattern, root_dir=folder, recursive=True)))  # noqa: PTH207 - its words are the law
        try:
            found = [str(picture.relative) for picture in find_pictures([f"{folder}/{pattern}"])]
        except ConfigError:
            found = []
        prefix = "/".join(itertools.takewhile(lambda part: part == "a", parts))
    assert [f"{prefix}/{name}" if prefix else name for name in found] == expected
