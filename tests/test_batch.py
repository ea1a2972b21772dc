"""`captioner.batch.run`: what is captioned, what is written, what is done again; and the processes that decode."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import batch_runs
import pytest
from batch_runs import Deadly, make_pictures
from captions import with_nan

from captioner import CaptionerError, ConfigError, ImageReadError, SearchError
from captioner.batch import Progress, Shard, run
from captioner.caption import error_record
from captioner.decoding import Decoders, Task, decode, default_workers
from captioner.engine import LocalEngine, fingerprint
from captioner.images import ImageLimits
from captioner.journal import name_hash
from captioner.merge import merge
from captioner.prepared import PreparedPicture
from captioner.sources import SourcePicture, find_pictures

COUNT, BAD = 11, (2, 9)
FAST = {"method": "greedy", "max_words": 5}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Pictures that no test changes."""
    return make_pictures(tmp_path_factory.mktemp("source") / "pictures", COUNT, bad=BAD)


@pytest.fixture
def own(tmp_path):
    """Pictures that a test may change."""
    return make_pictures(tmp_path / "pictures", COUNT, bad=BAD)


@pytest.fixture
def batch(tiny_captioner, tmp_path):
    """Run with the tiny model, in this process."""

    def call(source, output="out.jsonl", **options):
        sources = source if isinstance(source, list) else [source]
        defaults = {"captioner": tiny_captioner, "workers": 0, "batch_size": 3, **FAST}
        return run(sources, tmp_path / output, **(defaults | options))

    return call


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts(summary):
    return summary.captioned, summary.skipped, sum(summary.failed.values()), summary.failed_before


# --- Records ---


def test_a_run_writes_the_records_of_single_captions_in_the_order_of_the_source(
    batch, source, tiny_captioner, tmp_path
):
    summary = batch(source)
    expected = []
    for picture in find_pictures([source]):
        try:
            expected.append(tiny_captioner.caption(picture.path, **FAST).to_record(picture.name))
        except ImageReadError as err:
            expected.append(error_record(picture.name, err))
    found = records_of(tmp_path / "out.jsonl")
    for left, right in zip(found, expected, strict=True):
        assert list(left) == list(right)
        rounded = {"score", "confidence", "words"}
        assert {k: v for k, v in left.items() if k not in rounded} == {
            k: v for k, v in right.items() if k not in rounded
        }
        assert left["score"] == (None if right["score"] is None else pytest.approx(right["score"], abs=1e-4))
    assert counts(summary) == (COUNT - len(BAD), 0, len(BAD), 0)
    assert summary.failed == {"ImageReadError": 2}
    assert summary.stopped is None


def test_processes_give_the_records_of_this_one(batch, source, tmp_path):
    batch(source)
    batch(source, "workers.jsonl", workers=2)
    assert (tmp_path / "workers.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_a_second_run_does_nothing_and_changes_nothing(batch, source, tmp_path):
    batch(source, formats=["jsonl", "csv"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    seen = []
    summary = batch(source, formats=["jsonl", "csv"], progress=seen.append)
    assert counts(summary) == (0, COUNT - len(BAD), len(BAD), len(BAD))
    assert seen == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_new_pictures_are_added_and_those_done_left_alone(batch, own, tmp_path):
    batch(own)
    before = (tmp_path / "out.jsonl").read_bytes()
    shutil.copy(own / "0" / "000.png", own / "0" / "another.png")
    assert counts(batch(own)) == (1, COUNT - len(BAD), len(BAD), len(BAD))
    after = (tmp_path / "out.jsonl").read_bytes()
    assert after.startswith(before)
    assert records_of(tmp_path / "out.jsonl")[-1]["image"] == str(own / "0" / "another.png")


@pytest.mark.parametrize("by", ["size", "time"])
def test_a_changed_picture_is_captioned_again_in_its_place(batch, own, tmp_path, by):
    batch(own, formats=["jsonl", "txt"], into=tmp_path / "texts")
    changed, other = own / "0" / "003.png", own / "1" / "001.png"
    stamp = changed.stat().st_mtime_ns
    before = records_of(tmp_path / "out.jsonl")
    if by == "size":
        shutil.copy(other, changed)
        changed.write_bytes(changed.read_bytes() + b" ")
        os.utime(changed, ns=(stamp, stamp))
    else:
        os.utime(changed, ns=(stamp + 1, stamp + 1))
    assert counts(batch(own, formats=["jsonl", "txt"], into=tmp_path / "texts"))[0] == 1
    after = records_of(tmp_path / "out.jsonl")
    assert [record["image"] for record in after] == [record["image"] for record in before]
    by_name = {record["image"]: record for record in after}
    if by == "size":
        assert by_name[str(changed)]["caption"] == by_name[str(other)]["caption"]
    (text,) = (tmp_path / "texts").rglob("003.txt")
    assert text.read_text() == by_name[str(changed)]["caption"] + "\n"


def test_what_failed_is_tried_again_only_when_that_is_asked_for_and_takes_its_place(batch, own, tmp_path):
    batch(own, max_errors=COUNT)
    names = [record["image"] for record in records_of(tmp_path / "out.jsonl")]
    bad = [path for index in BAD for path in own.rglob(f"{index:03}.png")]
    for path in bad:
        status = path.stat()
        mended = (own / "0" / "000.png").read_bytes()
        path.write_bytes(mended)
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert counts(batch(own, retry_failed=True)) == (len(BAD), COUNT - len(BAD), 0, 0)
    after = records_of(tmp_path / "out.jsonl")
    assert [record["image"] for record in after] == names
    assert all(record["error"] is None for record in after)


def test_a_failure_of_an_earlier_run_counts_as_long_as_its_picture_is_there(batch, own):
    batch(own)
    assert batch(own).failed == {"ImageReadError": 2}
    next(own.rglob(f"{BAD[0]:03}.png")).unlink()
    assert batch(own).failed == {"ImageReadError": 1}


def test_pictures_in_an_archive_are_captioned_and_known_again(batch, source, tmp_path):
    shutil.make_archive(str(tmp_path / "all"), "zip", source)
    shutil.make_archive(str(tmp_path / "all"), "gztar", source)
    for archive in ("all.zip", "all.tar.gz"):
        output = f"{archive}.jsonl"
        assert counts(batch(tmp_path / archive, output, workers=1))[0] == COUNT - len(BAD)
        assert counts(batch(tmp_path / archive, output))[:2] == (0, COUNT - len(BAD))
        names = [record["image"] for record in records_of(tmp_path / output)]
        assert all(name.startswith(f"{tmp_path / archive}!/") for name in names)


def test_a_source_that_breaks_off_gives_the_records_before_it_and_then_its_error(batch, source, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        yield from list(find_pictures(*arguments, **options))[:5]
        raise CaptionerError("the archive is damaged")

    monkeypatch.setattr("captioner.batch.find_pictures", broken)
    for _ in range(2):
        with pytest.raises(CaptionerError, match="the archive is damaged"):
            batch(source, formats=["jsonl", "csv"])
        assert len(records_of(tmp_path / "out.jsonl")) == 5
        assert len(list(csv.reader((tmp_path / "out.csv").open()))) == 6
    monkeypatch.undo()
    batch(source)
    assert len(records_of(tmp_path / "out.jsonl")) == COUNT


def test_records_that_were_deleted_are_made_again(batch, source, tmp_path):
    batch(source)
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    batch(source)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_no_pictures_make_an_empty_output(batch, tmp_path):
    (tmp_path / "empty").mkdir()
    assert counts(batch(tmp_path / "empty")) == (0, 0, 0, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


# --- Settings that do not mix ---


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": "beam"}, 'method was "greedy", now "beam"'),
        ({"max_words": 6}, "max_words was 5, now 6"),
        ({"ban": ["dog"]}, 'ban was [], now ["dog"]'),
        ({"shard": "1/2"}, 'shard was null, now "1/2"'),
        ({"formats": ["jsonl", "txt"]}, "txt was false, now true"),
        ({"maps": "npz"}, 'maps was null, now "npz"'),
    ],
    ids=str,
)
def test_other_settings_are_not_mixed_in_but_named_with_the_remedy(batch, source, tmp_path, change, named):
    batch(source)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ConfigError) as fault:
        batch(source, **change)
    assert named in str(fault.value)
    assert "--overwrite" in str(fault.value)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    batch(source, **change, overwrite=True)
    batch(source, **change)


def test_another_model_is_not_mixed_in(batch, source, tiny_checkpoint):
    from captioner import Captioner

    batch(source)
    with pytest.raises(ConfigError, match="it was another model"):
        batch(source, captioner=Captioner(tiny_checkpoint(seed=1), device="cpu"))


def test_the_fingerprint_of_a_model_is_that_of_its_folder_and_of_no_other(tiny_captioner, tiny_checkpoint, tmp_path):
    from captioner import Captioner

    tiny_captioner.save(tmp_path)
    assert fingerprint(Captioner.load(tmp_path, device="cpu")) == fingerprint(tiny_captioner)
    assert fingerprint(Captioner(tiny_checkpoint(seed=1), device="cpu")) != fingerprint(tiny_captioner)


def test_a_default_that_is_set_is_no_other_setting(batch, source):
    batch(source, method="beam")
    assert counts(batch(source, method="beam", beam_size=3, length_penalty=1.0))[0] == 0


def test_an_output_that_no_run_has_begun_is_left_alone(batch, source, tmp_path):
    for name, given in (("out.jsonl", {}), ("out.csv", {"formats": ["jsonl", "csv"]})):
        (tmp_path / name).write_text("mine\n")
        with pytest.raises(ConfigError, match=rf"{name}: is there already.*--overwrite"):
            batch(source, **given)
        assert (tmp_path / name).read_text() == "mine\n"
        (tmp_path / name).unlink()
    (tmp_path / "out.jsonl").write_text("mine\n")
    assert counts(batch(source, overwrite=True))[0] == COUNT - len(BAD)


def test_overwriting_leaves_the_old_files_when_the_new_run_cannot_begin(batch, source, tmp_path):
    batch(source)
    before = (tmp_path / "out.jsonl").read_bytes()
    faults = [{"captioner": None, "model": tmp_path / "no model"}, {"must_include": "qwyzzle", "method": "beam"}]
    for fault in faults:
        with pytest.raises(CaptionerError):
            batch(source, overwrite=True, **fault)
        assert (tmp_path / "out.jsonl").read_bytes() == before
    with pytest.raises(ConfigError):
        batch(tmp_path / "no folder/", overwrite=True)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_output_that_is_a_source_is_refused(batch, source, tmp_path):
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": str(next(source.rglob("*.png")))}) + "\n")
    with pytest.raises(ConfigError, match="is a source itself"):
        batch(tmp_path / "list.jsonl", "list.jsonl", overwrite=True)


@pytest.mark.parametrize(
    ("output", "options", "named"),
    [
        ("out.json", {}, "ends in .jsonl, .csv, .parquet"),
        ("out.csv", {"formats": ["jsonl"]}, "named as csv"),
        ("no/such/out.jsonl", {}, "there is no folder"),
        ("out.jsonl", {"formats": ["jsonl", "docx"]}, "'docx'"),
        ("out.jsonl", {"into": "texts"}, "--into"),
        ("out.jsonl", {"template": "{caption}"}, "--template"),
        ("out", {"formats": ["txt"], "alt_text": True}, "--alt-text"),
        ("out.jsonl", {"sidecar": "name"}, "--sidecar"),
        ("out.jsonl", {"formats": ["jsonl", "xmp"], "sidecar": "a.xmp"}, "sidecar must be one of"),
        ("out.jsonl", {"maps": "gif"}, "'gif'"),
        ("out.jsonl", {"shard": "3/2"}, "'3/2'"),
        ("out.jsonl", {"shard": "0/2"}, "'0/2'"),
        ("out.jsonl", {"batch_size": 0}, "batch_size"),
        ("out.jsonl", {"workers": -1}, "workers"),
        ("out.jsonl", {"workers": 100_000}, "at most 256, got 100000"),
        ("out.jsonl", {"max_errors": -1}, "max_errors"),
        ("out.jsonl", {"beam_sise": 3}, "beam_size"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_and_nothing_is_written(batch, source, tmp_path, output, options, named):
    with pytest.raises(ConfigError, match=named):
        batch(source, output, **options)
    assert list(tmp_path.iterdir()) == []


# --- Formats ---


def test_tables_agree_with_the_records_and_can_be_added_later(batch, source, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    batch(source, "out.csv")
    assert not (tmp_path / "out.jsonl").exists()
    assert counts(batch(source, formats=["jsonl", "csv", "parquet"]))[0] == 0
    records = records_of(tmp_path / "out.jsonl")
    assert [row["image"] for row in csv.DictReader((tmp_path / "out.csv").open())] == [r["image"] for r in records]
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == records
    assert not (tmp_path / "out.records.jsonl").exists()
    assert counts(batch(source, "out.parquet"))[0] == 0  # the records stay where they are
    assert records_of(tmp_path / "out.jsonl") == records


def test_an_output_that_is_a_folder_holds_everything(batch, source, tmp_path):
    batch(source, "out", formats=["jsonl", "txt", "xmp"], maps="npz", template="seen: {caption}")
    out = tmp_path / "out"
    good = [record for record in records_of(out / "captions.jsonl") if record["error"] is None]
    for suffix, count in ((".txt", len(good)), (".xmp", len(good)), (".npz", len(good))):
        assert len(list(out.rglob(f"*{suffix}"))) == count
    texts = {path.stem: path.read_text() for path in out.rglob("*.txt")}
    assert texts == {Path(record["image"]).stem: f"seen: {record['caption']}\n" for record in good}
    assert (out / "captions.progress").exists()


def test_texts_lie_beside_the_pictures_when_no_folder_is_named_and_the_pictures_are_untouched(batch, own, tmp_path):
    before = {path: path.read_bytes() for path in own.rglob("*.png")}
    batch(own, formats=["jsonl", "txt"])
    for record in records_of(tmp_path / "out.jsonl"):
        beside = Path(record["image"]).with_suffix(".txt")
        assert beside.exists() == (record["error"] is None)
    assert {path: path.read_bytes() for path in own.rglob("*.png")} == before


def test_a_text_that_is_not_ours_is_kept_and_its_picture_is_an_error(batch, own, tmp_path):
    mine = own / "0" / "000.txt"
    mine.write_text("mine\n")
    summary = batch(own, formats=["jsonl", "txt"])
    assert summary.failed == {"DataError": 1, "ImageReadError": 2}
    assert mine.read_text() == "mine\n"
    (record,) = [r for r in records_of(tmp_path / "out.jsonl") if r["image"] == str(own / "0" / "000.png")]
    assert record["error"]["type"] == "DataError"
    batch(own, formats=["jsonl", "txt"], retry_failed=True)
    assert mine.read_text() == "mine\n"


def test_overwriting_replaces_the_texts_of_the_run_before_however_often_it_is_broken_off(batch, own, tmp_path):
    batch(own, formats=["jsonl", "txt"])
    stop = threading.Event()
    stop.set()
    other = {"formats": ["jsonl", "txt"], "template": "another: {caption}"}
    batch(own, **other, overwrite=True, stop=stop)
    summary = batch(own, **other)
    assert summary.failed == {"ImageReadError": 2}
    assert all(path.read_text().startswith("another: ") for path in own.rglob("*.txt"))


def test_figures_are_drawn_and_not_captioned_by_the_next_run(batch, own):
    (picture,) = own.rglob("000.png")
    batch(picture.parent, maps="figure")
    assert list(picture.parent.glob("*.maps.png"))
    assert counts(batch(picture.parent, maps="figure"))[0] == 0


# --- Ends ---


def test_a_stop_ends_the_run_after_the_batch_in_flight_and_the_next_goes_on(batch, source, tmp_path):
    batch(source, "unbroken.jsonl")
    stop, runs = threading.Event(), 0
    while True:
        stop.clear()
        summary = batch(source, stop=stop, progress=lambda _: stop.set())
        runs += 1
        if summary.stopped is None:
            break
        assert summary.stopped == "interrupted"
        assert summary.captioned + sum(summary.failed.values()) - summary.failed_before == min(
            3, COUNT - 3 * (runs - 1)
        )
    assert runs == 5  # four batches, and one that finds nothing to do
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_too_many_errors_stop_the_run_and_the_next_goes_on(batch, source, tmp_path):
    summary = batch(source, max_errors=0)
    assert summary.stopped == "errors"
    assert len(records_of(tmp_path / "out.jsonl")) < COUNT
    assert batch(source, max_errors=1).stopped is None
    assert len(records_of(tmp_path / "out.jsonl")) == COUNT


def test_a_fault_of_a_callback_leaves_what_was_written(batch, source, tmp_path):
    def fail(_):
        raise RuntimeError("of the caller's own")

    with pytest.raises(RuntimeError, match="of the caller's own"):
        batch(source, progress=fail)
    assert len(records_of(tmp_path / "out.jsonl")) == 3
    batch(source)
    assert len(records_of(tmp_path / "out.jsonl")) == COUNT


# --- Progress ---


def test_progress_counts_every_picture_once_and_gives_every_result(batch, source):
    seen: list[Progress] = []
    batch(source, progress=seen.append)
    assert [item.captioned + item.failed for item in seen] == [3, 6, 9, 11]
    assert [name for item in seen for name, _ in item.results] == [p.name for p in find_pictures([source])]
    assert seen[-1].failed == len(BAD)
    assert {item.total for item in seen} <= {None, COUNT}


def test_the_time_left_is_said_only_when_the_total_is_known():
    values = {"captioned": 30, "failed": 10, "skipped": 20, "seconds": 20.0, "results": ()}
    assert Progress(**values, total=None).remaining_s is None
    assert Progress(**values, total=100).rate == 2.0
    assert Progress(**values, total=100).remaining_s == 20.0


def test_notes_of_the_sources_reach_the_caller(batch, source):
    notes = []
    batch([source, next(source.rglob("*.png"))], note=notes.append)
    assert len(notes) == 1
    assert "reached before" in notes[0]


# --- Shards ---


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_part_the_source_and_merge_gives_the_records_of_one_run(batch, source, tmp_path, count):
    batch(source, "whole.jsonl", formats=["jsonl", "csv"], batch_size=1)
    parts = []
    for number in range(1, count + 1):
        batch(source, f"part{number}.jsonl", shard=f"{number}/{count}", batch_size=1)
        parts.append(tmp_path / f"part{number}.jsonl")
    names = [{record["image"] for record in records_of(part)} for part in parts]
    assert sum(map(len, names)) == len(set().union(*names)) == COUNT
    merged = merge(parts[::-1], tmp_path / "merged.jsonl", formats=["jsonl", "csv"])
    assert (merged.parts, merged.pictures, merged.failed) == (count, COUNT, len(BAD))
    for suffix in (".jsonl", ".csv"):
        whole, joined = tmp_path / f"whole{suffix}", tmp_path / f"merged{suffix}"
        assert joined.read_bytes() == whole.read_bytes()
    assert counts(batch(source, "merged.jsonl", formats=["jsonl", "csv"]))[0] == 0  # it goes on from there


def test_a_picture_is_in_the_same_shard_wherever_it_stands():
    names = [f"{index}.jpg" for index in range(1000)]
    shards = [Shard(number, 7) for number in range(1, 8)]
    owners = [[shard.number for shard in shards if shard.holds(name_hash(name))] for name in names]
    assert all(len(owner) == 1 for owner in owners)
    assert all(100 < sum(owner == [number] for owner in owners) < 190 for number in range(1, 8))
    assert [owner for (owner,) in owners[:8]] == [5, 6, 5, 2, 4, 4, 4, 7]  # the same on every machine, for ever


def test_merge_says_what_does_not_belong_together(batch, own, tmp_path):
    for number in (1, 2, 3):
        batch(own, f"{number}.jsonl", shard=f"{number}/3")
    parts = [tmp_path / f"{number}.jsonl" for number in (1, 2, 3)]
    with pytest.raises(ConfigError, match=r"2 of 3 shards are missing: 1/3, 3/3"):
        merge(parts[1:2], tmp_path / "merged.jsonl")
    with pytest.raises(ConfigError, match="4 parts are given, but they are 3 outputs"):
        merge([*parts, parts[1]], tmp_path / "merged.jsonl")
    for path in tmp_path.glob("2.*"):
        shutil.copy(path, path.with_name(f"copy{path.suffix}"))
    with pytest.raises(ConfigError, match=r"copy\.jsonl: is shard 2/3, and so is .*2\.jsonl"):
        merge([*parts, tmp_path / "copy.jsonl"], tmp_path / "merged.jsonl")
    batch(own, "one of many.jsonl", shard="1/999999999")
    with pytest.raises(ConfigError, match=r"999999998 of 999999999 shards are missing: 2/999999999, .*21/999999999$"):
        merge([tmp_path / "one of many.jsonl"], tmp_path / "merged.jsonl")
    batch(own, "whole.jsonl")
    with pytest.raises(ConfigError, match="is no shard"):
        merge([*parts, tmp_path / "whole.jsonl"], tmp_path / "merged.jsonl")
    batch(own, "of two.jsonl", shard="2/2")
    with pytest.raises(ConfigError, match="different divisions"):
        merge([*parts, tmp_path / "of two.jsonl"], tmp_path / "merged.jsonl")
    with pytest.raises(ConfigError, match="no output of `captioner batch`"):
        merge([*parts, tmp_path / "nothing.jsonl"], tmp_path / "merged.jsonl")
    batch(own, "1.jsonl", shard="1/3", overwrite=True, max_words=4)
    with pytest.raises(ConfigError, match="another search"):
        merge(parts, tmp_path / "merged.jsonl")
    stop = threading.Event()
    stop.set()
    batch(own, "1.jsonl", shard="1/3", overwrite=True, stop=stop)
    with pytest.raises(ConfigError, match="shard 1/3 has not come to its end"):
        merge(parts, tmp_path / "merged.jsonl")
    (own / "new.png").write_bytes((own / "0" / "000.png").read_bytes())
    batch(own, "1.jsonl", shard="1/3")
    with pytest.raises(ConfigError, match="different sources"):
        merge(parts, tmp_path / "merged.jsonl")
    assert not list(tmp_path.glob("merged*"))
    os.utime(own / "0" / "003.png", ns=(5, 5))  # in one of the parts it is captioned again
    for number in (1, 2, 3):
        batch(own, f"{number}.jsonl", shard=f"{number}/3")
    assert merge(parts, tmp_path / "merged.jsonl").pictures == COUNT + 1
    with pytest.raises(ConfigError, match="is there already"):
        merge(parts, tmp_path / "merged.jsonl")
    assert merge(parts, tmp_path / "merged.jsonl", overwrite=True).pictures == COUNT + 1


# --- The processes that decode ---


@pytest.fixture
def importable(monkeypatch):
    """Let other processes import the classes of the tests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(batch_runs.__file__).parent))


def test_what_decodes_in_other_processes_imports_no_torch():
    program = "import captioner.decoding, captioner.sources, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list what a process has loaded")
def test_a_process_that_has_decoded_has_no_torch_loaded(source, tiny_captioner):
    with Decoders(1) as decoders:
        config = tiny_captioner.config.preprocessing
        assert len(list(decoders.map(find_pictures([source]), config, ahead=4))) == COUNT
        (pid,) = decoders.process_ids
        loaded = Path(f"/proc/{pid}/maps").read_text()
    assert "numpy" in loaded
    assert "torch" not in loaded


def deadly(picture, **options):
    fields = {name: getattr(picture, name) for name in ("name", "path", "member", "size_bytes", "mtime_ns", "relative")}
    return Deadly(**fields, **options)


@pytest.mark.skipif(os.name == "nt", reason="processes are killed in another way there")
def test_a_picture_that_kills_its_process_twice_is_an_error_and_the_others_are_captioned(
    batch, own, tmp_path, monkeypatch, importable
):
    killers = {"000.png": {}, "004.png": {"lives": 1}}

    def found(*arguments, **options):
        for picture in find_pictures(*arguments, **options):
            name = picture.path.name
            yield deadly(picture, **killers[name]) if name in killers else picture

    batch(own, "unharmed.jsonl")
    monkeypatch.setattr("captioner.batch.find_pictures", found)
    summary = batch(own, workers=2)
    assert summary.failed == {"ImageReadError": 1 + len(BAD)}
    expected = records_of(tmp_path / "unharmed.jsonl")
    records = records_of(tmp_path / "out.jsonl")
    assert [record["image"] for record in records] == [record["image"] for record in expected]
    for record, unharmed in zip(records, expected, strict=True):
        if record["image"].endswith("000.png"):
            assert "ended the process twice (signal 9, SIGKILL)" in record["error"]["message"]
        else:
            assert (record["caption"], record["error"]) == (unharmed["caption"], unharmed["error"])
    assert next(own.rglob("000.png.died")).read_bytes() == b"xx"


@pytest.mark.skipif(os.name == "nt", reason="processes are killed in another way there")
def test_processes_that_are_killed_while_they_wait_cost_no_picture(source, tiny_captioner):
    with Decoders(2) as decoders:
        results = decoders.map(find_pictures([source]), tiny_captioner.config.preprocessing, ahead=2)
        decoded = [next(results)]
        for pid in decoders.process_ids:
            os.kill(pid, signal.SIGKILL)
        decoded += results
    assert [picture.name for picture, _ in decoded] == [picture.name for picture in find_pictures([source])]
    assert sum(isinstance(result, PreparedPicture) for _, result in decoded) == COUNT - len(BAD)


def test_no_more_is_read_ahead_than_is_asked_for(source, tiny_captioner):
    drawn = []

    def watched():
        for picture in find_pictures([source]):
            drawn.append(picture)
            yield picture

    for workers, most in ((0, 1), (2, 4)):
        drawn.clear()
        with Decoders(workers) as decoders:
            results = decoders.map(watched(), tiny_captioner.config.preprocessing, ahead=4)
            for index in range(COUNT):
                next(results)
                assert len(drawn) <= index + most
            assert next(results, None) is None


def test_processes_end_with_the_pool(source, tiny_captioner):
    with Decoders(2) as decoders:
        next(decoders.map(find_pictures([source]), tiny_captioner.config.preprocessing, ahead=8))
        processes = [worker.process for worker in decoders._all]
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_a_process_that_cannot_start_is_an_error_of_the_run_and_of_no_picture(source, tiny_captioner, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with Decoders(1) as decoders, pytest.raises(CaptionerError, match="cannot start, it ends with status 1"):
        list(decoders.map(find_pictures([source]), tiny_captioner.config.preprocessing, ahead=4))
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(CaptionerError, match="no process can be started"), Decoders(1):
        pass


def test_a_run_needs_no_guard_in_the_script_that_calls_it(source, tiny_captioner, tmp_path):
    """Processes of `multiprocessing` would run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from captioner.decoding import Decoders\n"
        "from captioner.config import PreprocessingConfig\n"
        "from captioner.sources import find_pictures\n"
        "print('once')\n"
        "with Decoders(2) as decoders:\n"
        f"    print(len(list(decoders.map(find_pictures([{str(source)!r}]), PreprocessingConfig(), ahead=4))))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"once\n{COUNT}\n", "")


def test_a_fault_of_ours_while_decoding_is_raised_and_no_error_of_the_picture(tiny_captioner, source, importable):
    picture = next(find_pictures([source]))
    broken = SourcePicture(**{**vars(picture), "content": object()})
    config = tiny_captioner.config.preprocessing
    for workers in (0, 1):
        with Decoders(workers) as decoders, pytest.raises(AttributeError):
            list(decoders.map([broken], config, ahead=1))
    assert isinstance(decode(Task(picture, config)), PreparedPicture)


@pytest.mark.parametrize("limits", [{"max_pixels": 1000}, {"max_bytes": 50}])
def test_a_picture_over_the_limits_is_an_error_until_they_are_raised(batch, source, limits):
    options = {"formats": ["jsonl"], "workers": 1, "batch_size": COUNT}
    assert batch(source, **options, picture_limits=ImageLimits(**limits)).failed["ImageTooLargeError"] > 0
    assert counts(batch(source, **options, retry_failed=True)) == (COUNT - len(BAD), 0, len(BAD), 0)


def test_as_many_processes_decode_as_there_are_cpus_for_this_one():
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


# --- Engines ---


def test_another_engine_gives_the_records_of_the_local_one(batch, source, tiny_captioner, tmp_path):
    class Backwards(LocalEngine):
        """Captions in another order, as a cluster may, and gives the results in theirs."""

        def captions(self, pictures):
            everything = list(pictures)
            found = {p.name: r for rows in super().captions(iter(everything[::-1])) for p, r in rows}
            yield [(picture, found[picture.name]) for picture in everything]

    batch(source, batch_size=1)
    engine = Backwards(lambda: tiny_captioner, workers=0, batch_size=1, options=FAST)
    batch(source, "other.jsonl", engine=engine)
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_a_picture_without_a_caption_is_an_error_and_the_others_are_captioned(batch, source, monkeypatch):
    from captioner.api import Captioner

    encode = Captioner._encode

    def spoil(self, inputs):
        return with_nan(encode(self, inputs), [item.name.endswith("000.png") for item in inputs])

    monkeypatch.setattr(Captioner, "_encode", spoil)
    assert batch(source).failed == {"ImageReadError": 2, SearchError.__name__: 1}
