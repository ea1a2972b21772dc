"""Streams from tar files: each sample once, the same stream for the same arguments, damage named and never fatal."""

import io
import json
import os
import re
import tarfile
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import ConfigError, DataError
from captioner.images import open_picture
from training import tar_samples
from training.shards import StreamedPicture, expand_shards, find_shards, read_captions, stream_samples
from training.sources import BadPicture, DataSource, data_hash


def photo(value=0, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, 0, 0)).save(file, kind)
    return file.getvalue()


PHOTO = photo()


def write_tar(path, files, tar_format=tarfile.PAX_FORMAT):
    """Files are (name, bytes) pairs; a tar entry may stand in place of the bytes."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files:
            if isinstance(data, tarfile.TarInfo):
                data.name = name
                tar.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def sample_files(key, captions=("A dog.",)):
    return [(f"{key}.jpg", PHOTO), (f"{key}.txt", "\n".join(captions).encode())]


def write_shards(folder, counts):
    folder.mkdir(exist_ok=True)
    shards = []
    for number, count in enumerate(counts):
        files = [file for k in range(count) for file in sample_files(f"{number}-{k}", (f"Caption {number}-{k}.",))]
        shards.append(write_tar(folder / f"train-{number:03d}.tar", files))
    return shards


def names_of(samples):
    return [sample.name for sample in samples]


def read_all(path):
    """Good and bad samples of one tar file."""
    return list(stream_samples([path]))


def messages(path):
    return [sample.message for sample in read_all(path) if isinstance(sample, BadPicture)]


# --- Samples ---


def test_samples_are_read_in_order_with_their_bytes_and_captions(tmp_path):
    webp = photo(9, "WEBP")
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", PHOTO),
            ("a.txt", "A dog.\r\n\n  Ein Hund über Gras. \n".encode()),
            ("sub/b.json", b'{"captions": ["One cat.", "A cat."], "url": "x"}'),
            ("sub/b.webp", webp),
            ("./c.JPEG", PHOTO),
            ("./c.json", b'{"caption": "A ball."}'),
            ("d.seg.png", b"mask"),
            ("d.png", PHOTO),
            ("d.cls", b"3"),
            ("d.txt", b"Two men."),
            ("d.json", b'{"caption": "Text comes first."}'),
        ],
    )
    assert read_all(path) == [
        StreamedPicture("x.tar/a.jpg", PHOTO, ("A dog.", "Ein Hund über Gras.")),
        StreamedPicture("x.tar/sub/b.webp", webp, ("One cat.", "A cat.")),
        StreamedPicture("x.tar/c.JPEG", PHOTO, ("A ball.",)),
        StreamedPicture("x.tar/d.png", PHOTO, ("Two men.",)),
    ]
    assert open_picture(read_all(path)[1].data).image.size == (4, 4)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read(tmp_path, tar_format):
    key = "folder/" * 12 + "x" * 80
    path = write_tar(tmp_path / "x.tar", [file for k in range(3) for file in sample_files(f"{key}{k}")], tar_format)
    assert names_of(read_all(path)) == [f"x.tar/{key}{k}.jpg" for k in range(3)]


def test_what_is_no_sample_is_passed_over(tmp_path):
    folder = tarfile.TarInfo()
    folder.type = tarfile.DIRTYPE
    others = [("photos", folder), ("README", b"x"), (".hidden.jpg", b"x"), ("._a.txt", b"x"), ("z.cls", b"1")]
    path = write_tar(tmp_path / "x.tar", others + sample_files("a"))
    assert names_of(read_all(path)) == ["x.tar/a.jpg"]


def link(kind, target):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ([("b.jpg", PHOTO)], "x.tar/b.jpg: a picture without captions"),
        ([("b.txt", b"A dog.")], "x.tar/b: captions without a picture"),
        ([("b.jpg", PHOTO), ("b.txt", b" \n\n")], "b.jpg: no caption in its txt"),
        ([("b.jpg", PHOTO), ("b.txt", b"\xff\xfe")], "b.jpg: its txt is not UTF-8"),
        ([("b.jpg", PHOTO), ("b.json", b"{")], "b.jpg: its json cannot be read"),
        ([("b.jpg", PHOTO), ("b.json", b"[" * 100_000)], "b.jpg: its json cannot be read"),
        ([("b.jpg", PHOTO), ("b.json", b'{"text": "A dog."}')], "b.jpg: its json must hold"),
        ([("b.jpg", PHOTO), ("b.json", b'{"captions": [3]}')], "b.jpg: its json must hold"),
        ([("b.jpg", PHOTO), ("b.json", b'{"captions": []}')], "b.jpg: no caption in its json"),
        ([("b.jpg", PHOTO), ("b.png", PHOTO), ("b.txt", b"A dog.")], "b.png is a second file of its kind"),
        ([("b.jpg", PHOTO), ("b.txt", b"A dog."), ("b.txt", b"A cat.")], "b.txt is a second file of its kind"),
        ([("b.jpg", link(tarfile.SYMTYPE, "a.jpg")), ("b.txt", b"A dog.")], "b.jpg is a link"),
        ([("b.jpg", link(tarfile.LNKTYPE, "a.jpg")), ("b.txt", b"A dog.")], "b.jpg is a link"),
        ([("b.npy", PHOTO), ("b.txt", b"A dog.")], "x.tar/b: captions without a picture"),
    ],
)
def test_a_bad_sample_is_named_and_its_neighbours_are_read(tmp_path, files, fault):
    path = write_tar(tmp_path / "x.tar", sample_files("a") + files + sample_files("c"))
    first, bad, last = read_all(path)
    assert (first.name, last.name) == ("x.tar/a.jpg", "x.tar/c.jpg")
    assert isinstance(bad, BadPicture)
    assert fault in bad.message


def test_files_of_a_sample_that_lie_apart_are_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", PHOTO), ("b.jpg", PHOTO), ("a.txt", b"A."), ("b.txt", b"B.")])
    assert len(messages(path)) == 4
    assert all("side by side" in message for message in messages(path))


def test_a_file_over_the_limit_is_named_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "DEFAULT_LIMITS", tar_samples.DEFAULT_LIMITS.__class__(max_bytes=len(PHOTO)))
    large = [("b.jpg", PHOTO + b"x"), ("b.txt", b"A dog.")]
    path = write_tar(tmp_path / "x.tar", sample_files("a") + large + sample_files("c"))
    assert messages(path) == [f"x.tar/b.jpg: b.jpg is over the limit of {len(PHOTO)} bytes; make it smaller"]
    assert len(read_all(path)) == 3


# --- Damage ---


def test_a_tar_cut_off_anywhere_gives_what_lies_before_and_is_named(tmp_path):
    whole = write_shards(tmp_path, [4])[0]
    content = whole.read_bytes()
    expected = read_all(whole)
    end = len(content.rstrip(b"\0"))
    cut = tmp_path / "train-cut.tar"
    for size in range(0, len(content), 97):
        cut.write_bytes(content[:size])
        try:
            found = read_all(cut)
        except DataError as error:
            # Nothing at all could be read: the first sample is cut, or comes first of all.
            assert str(cut) in str(error)  # noqa: PT017
            assert size < 2 * (512 + 1024)
            continue
        good = [sample for sample in found if isinstance(sample, StreamedPicture)]
        assert [(s.data, s.captions) for s in good] == [(s.data, s.captions) for s in expected[: len(good)]]
        if size < end:
            assert len(good) < 4 or "cut off" in found[-1].message
        if len(good) < 4:
            assert isinstance(found[-1], BadPicture)
            assert found[-1].name == "train-cut.tar"
            assert "ends within" in found[-1].message or "damaged" in found[-1].message or "cut" in found[-1].message


def header_offsets(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("damage", [b"\xff" * 512, bytes(512), b"x" * 100])
def test_a_damaged_header_is_named_and_ends_the_shard(tmp_path, damage):
    path = write_shards(tmp_path, [4])[0]
    offset = header_offsets(path)[4]
    content = bytearray(path.read_bytes())
    content[offset : offset + len(damage)] = damage
    path.write_bytes(content)
    first, second, bad = read_all(path)
    assert names_of([first, second]) == ["train-000.tar/0-0.jpg", "train-000.tar/0-1.jpg"]
    assert bad.name == "train-000.tar"
    assert str(offset) in bad.message
    assert "what follows is lost" in bad.message


def test_after_a_damaged_shard_comes_the_next(tmp_path):
    shards = write_shards(tmp_path, [3, 3])
    shards[0].write_bytes(shards[0].read_bytes()[: header_offsets(shards[0])[3] + 100])
    found = list(stream_samples(shards))
    assert [type(sample).__name__ for sample in found] == ["StreamedPicture", "BadPicture"] + 3 * ["StreamedPicture"]


def test_two_tars_joined_end_to_end_are_not_taken_for_one(tmp_path):
    shards = write_shards(tmp_path, [2, 2])
    shards[0].write_bytes(shards[0].read_bytes() + shards[1].read_bytes())
    assert len(read_all(shards[0])) == 3
    assert "joined" in messages(shards[0])[0]


@pytest.mark.parametrize(("size", "fault"), [(2**60, "ends within 9.jpg"), (-(2**12), "a negative size")])
def test_a_size_that_cannot_be_ends_at_once(tmp_path, size, fault):
    path = write_shards(tmp_path, [2])[0]
    content = bytearray(path.read_bytes())
    info = tarfile.TarInfo("9.jpg")
    info.size = size
    offset = header_offsets(path)[2]
    content[offset : offset + 512] = info.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(content)
    assert fault in messages(path)[0]
    assert fault in list(read_captions([path]))[-1].message


@pytest.mark.parametrize("content", [b"", bytes(10240), b"x" * 3000, b"\x1f\x8b\x08" + bytes(50)])
def test_a_shard_without_a_sample_is_an_error(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    for read in (read_all, lambda path: list(read_captions([path]))):
        with pytest.raises(DataError, match=re.escape(str(path))):
            read(path)


def test_a_missing_shard_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.tar: cannot be read: No such file"):
        read_all(tmp_path / "none.tar")
    with pytest.raises(DataError, match="no shards"):
        stream_samples([])


@settings(max_examples=150)
@given(st.data())
def test_any_damage_is_survived_and_seen_the_same_with_and_without_pictures(tmp_path_factory, data):
    path = write_shards(tmp_path_factory.mktemp("damage"), [3])[0]
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1) | st.sampled_from(header_offsets(path)))
        piece = data.draw(st.binary(min_size=1, max_size=40))
        content[at + data.draw(st.integers(0, 300)) :][: len(piece)] = piece
        content[at : at + len(piece)] = piece
    path.write_bytes(content)
    try:
        found = read_all(path)
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert all(s.name.isprintable() for s in found)
        assert all(s.message.isprintable() for s in found if isinstance(s, BadPicture))
        seen = [(s.name, getattr(s, "captions", None)) for s in read_captions([path])]
        assert seen == [(s.name, getattr(s, "captions", None)) for s in found]


# --- Who gets what ---


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Seven shards of different sizes."""
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 1, 8, 3, 5, 2, 6])


consumers = st.tuples(st.integers(1, 4), st.integers(1, 4))
orders = st.fixed_dictionaries(
    {"epoch": st.integers(0, 9), "seed": st.integers(0, 9), "shuffle_buffer": st.sampled_from([0, 1, 4, 100])}
)


@settings(max_examples=40)
@given(st.integers(1, 7), consumers, orders)
def test_each_sample_goes_to_exactly_one_consumer(shards, count, size, order):
    world_size, workers = size
    shares = [
        names_of(stream_samples(shards[:count], rank=rank, world_size=world_size, worker=w, workers=workers, **order))
        for rank in range(world_size)
        for w in range(workers)
    ]
    everything = Counter(names_of(read_captions(shards[:count])))
    assert Counter(name for share in shares for name in share) == everything
    assert max(everything.values()) == 1


@settings(max_examples=40)
@given(consumers, orders, st.integers(0, 40))
def test_a_stream_depends_on_its_arguments_alone_and_resumes_anywhere(shards, size, order, skip):
    world_size, workers = size
    place = {"rank": world_size - 1, "world_size": world_size, "worker": workers - 1, "workers": workers}
    whole = list(stream_samples(shards, **place, **order))
    assert list(stream_samples(shards, **place, **order, skip=skip)) == whole[skip:]


@pytest.mark.parametrize("count", [8, 9, 11])
def test_shares_of_even_shards_differ_by_a_sample_per_shared_shard(tmp_path, count):
    even = write_shards(tmp_path, [6] * count)
    sizes = [len(list(stream_samples(even, rank=rank, world_size=4, shuffle_buffer=3))) for rank in range(4)]
    assert max(sizes) - min(sizes) <= count % 4


def test_without_a_buffer_all_comes_in_order(shards):
    assert names_of(stream_samples(shards, epoch=3, seed=5)) == names_of(read_captions(shards))


def test_epochs_and_seeds_have_orders_of_their_own(shards):
    order = {
        (e, s): tuple(names_of(stream_samples(shards, epoch=e, seed=s, shuffle_buffer=9)))
        for e in range(4)
        for s in range(4)
    }
    assert len(set(order.values())) == 16


def test_the_buffer_mixes_samples_of_different_shards(tmp_path):
    many = write_shards(tmp_path, [20] * 4)

    def changes(buffer):
        shard_of = [name.partition("/")[0] for name in names_of(stream_samples(many, shuffle_buffer=buffer))]
        return sum(first != second for first, second in pairwise(shard_of))

    assert changes(1) == 3
    assert changes(40) > 20


def test_every_sample_can_come_first(tmp_path):
    few = write_shards(tmp_path, [2, 2])
    first = {next(stream_samples(few, epoch=epoch, shuffle_buffer=4)).name for epoch in range(60)}
    assert len(first) == 4


def test_bad_samples_are_shared_out_like_good_ones(tmp_path):
    files = [file for k in range(10) for file in sample_files(f"{k}")[: 1 + (k % 2)]]
    path = write_tar(tmp_path / "x.tar", files)
    shares = [list(stream_samples([path], worker=w, workers=3, shuffle_buffer=2)) for w in range(3)]
    assert sorted(map(len, shares)) == [3, 3, 4]
    assert sum(isinstance(sample, BadPicture) for share in shares for sample in share) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 1},
        {"rank": -1},
        {"worker": 2, "workers": 2},
        {"world_size": 0},
        {"workers": 0},
        {"shuffle_buffer": -1},
        {"skip": -1},
    ],
)
def test_an_impossible_consumer_is_refused(shards, wrong):
    with pytest.raises(ConfigError):
        stream_samples(shards, **wrong)


def test_memory_is_bounded_by_the_buffer(tmp_path):
    size = 2**16
    files = [
        (f"{k}.{kind}", data) for k in range(300) for kind, data in (("jpg", os.urandom(size)), ("txt", b"A dog."))
    ]
    path = write_tar(tmp_path / "x.tar", files)
    del files

    def peak(stream):
        tracemalloc.start()
        count = sum(1 for _ in stream)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 300
        return most

    assert peak(stream_samples([path], shuffle_buffer=20)) < 30 * size
    assert peak(read_captions([path])) < 4 * size


def test_an_abandoned_stream_closes_its_file(shards):
    open_before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else None
    if open_before is None:
        pytest.skip("needs /proc to count open files")
    stream = stream_samples(shards)
    assert len(list(islice(stream, 3))) == 3
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before + 1
    del stream
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


# --- Captions alone ---


def test_captions_alone_serve_vocabulary_and_hash(shards):
    found = list(read_captions(shards))
    assert [picture.captions for picture in found[:2]] == [("Caption 0-0.",), ("Caption 0-1.",)]
    assert found[0].path == shards[0]
    assert len(data_hash({"train": read_captions(shards)})) == 64
    assert data_hash({"train": found}) == data_hash({"train": read_captions(shards)})


# --- Names of shards ---


@pytest.fixture
def tars(tmp_path):
    for name in ["train-000.tar", "train-001.tar", "train-010.tar", "dev-0.tar", "dev-1.tar", "{x}.tar", "odd[1].tar"]:
        write_tar(tmp_path / name, sample_files("a"))
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("train-000.tar", ["train-000.tar"]),
        ("train-{000..001}.tar", ["train-000.tar", "train-001.tar"]),
        ("dev-{0..1}.tar", ["dev-0.tar", "dev-1.tar"]),
        ("train-{010,000}.tar", ["train-010.tar", "train-000.tar"]),
        ("train-{0..0}{00..01}.tar", ["train-000.tar", "train-001.tar"]),
        ("train-*.tar", ["train-000.tar", "train-001.tar", "train-010.tar"]),
        ("train-0?0.tar", ["train-000.tar", "train-010.tar"]),
        ("{dev,train}-*0.tar", ["dev-0.tar", "train-000.tar", "train-010.tar"]),
        ("odd[1].tar", ["odd[1].tar"]),
    ],
)
def test_braces_and_globs_name_shards(tars, pattern, names):
    assert expand_shards(pattern, tars) == [tars / name for name in names]
    assert expand_shards(str(tars / pattern)) == [tars / name for name in names]


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("https://host/train-{000..001}.tar", "nothing is fetched"),
        ("pipe:cat x.tar", "nothing is fetched"),
        ("train-{000..001.tar", "do not match"),
        ("train-000..001}.tar", "do not match"),
        ("train-{0{0,1},2}.tar", "do not match"),
        ("train-{000}.tar", "no range"),
        ("train-{}.tar", "no range"),
        ("train-{5..2}.tar", "must rise"),
        ("train-{0..9999999}.tar", "at most 1000000"),
        ("{0..9999}{0..9999}.tar", "at most 1000000"),
    ],
)
def test_a_malformed_pattern_is_refused(tars, pattern, fault):
    with pytest.raises(ConfigError, match=fault):
        expand_shards(pattern, tars)


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("train-{000..002}.tar", r"train-002\.tar: no such tar file"),
        ("train-{002..005}.tar", r"train-002\.tar and 3 more: no such tar file"),
        ("val-*.tar", r"val-\*\.tar: no such tar file"),
        ("{train-000,train-*}.tar", "names a tar file twice"),
        (".", "no such tar file"),
    ],
)
def test_a_missing_or_repeated_shard_is_refused(tars, pattern, fault):
    with pytest.raises(DataError, match=fault):
        expand_shards(pattern, tars)


def test_a_folder_with_braces_in_its_name_is_a_root_like_any_other(tmp_path):
    shards = write_shards(tmp_path / "a{b}[c]*", [1, 1])
    assert expand_shards("train-{000..001}.tar", shards[0].parent) == shards
    assert expand_shards("train-*.tar", shards[0].parent) == shards


def test_a_source_names_the_shards_of_both_splits(tars):
    source = DataSource(root=str(tars), format="shards", train_shards="train-*.tar", dev_shards="dev-{0..1}.tar")
    assert {split: len(shards) for split, shards in find_shards(source).items()} == {"train": 3, "dev": 2}
    both = DataSource(root=str(tars), format="shards", train_shards="*.tar", dev_shards="dev-0.tar")
    with pytest.raises(DataError, match=r"dev-0\.tar: in train_shards and in dev_shards"):
        find_shards(both)
    with pytest.raises(ConfigError, match="format table has no shards"):
        find_shards(DataSource(root=str(tars)))


def test_json_captions_come_back_as_written(tmp_path):
    captions = ['Ein "Hund".', "犬\u2028と猫", "A dog\\cat"]
    path = write_tar(tmp_path / "x.tar", [("a.jpg", PHOTO), ("a.json", json.dumps({"captions": captions}).encode())])
    assert read_all(path)[0].captions == tuple(captions)
