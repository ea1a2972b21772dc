"""More data beside the first source: training pictures are joined, all else stays the first source's."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from training_runs import DEV, TRAIN, Recorder, command, error_line, fit, recipe, save_picture, write_table

from captioner import Captioner, ConfigError, DataError
from captioner.metrics import java
from training.data import CaptionData
from training.export import load_run
from training.sources import DataSource

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers", "ignore:(?s).*serialize")
EVERYDAY = Path(__file__).resolve().parents[1] / "training" / "everyday" / "captions.csv"
WORDS = ("zebra", "teapot")


def write_more(root, *, train=3, dev=2, images="photos", word=WORDS[0]):
    """A table beside a folder of pictures, with names of their own."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for index in range(train + dev):
            save_picture(root / images / f"more-{index}.jpg", index)
            writer.writerow([f"more-{index}.jpg", f"one {word} stands here", "train" if index < train else "dev"])
    return root


@pytest.fixture
def root(tmp_path):
    return write_table(tmp_path / "first")


@pytest.fixture
def more(tmp_path):
    return write_more(tmp_path / "more")


def data_with(root, more=None, **options):
    extra = None if more is None else DataSource(root=str(more), images="photos")
    data = CaptionData(str(root), min_count=1, workers=0, extra=extra, **options)
    data.setup("fit")
    return data


# --- What is joined ---


def test_training_pictures_are_joined_behind_the_first_and_the_other_splits_stay(root, more):
    alone, joined = data_with(root), data_with(root, more)
    assert joined.pictures.keys() == alone.pictures.keys()
    assert joined.pictures["train"][:TRAIN] == alone.pictures["train"]
    added = joined.pictures["train"][TRAIN:]
    assert [picture.name for picture in added] == ["more-0.jpg", "more-1.jpg", "more-2.jpg"]
    assert {picture.path.parent for picture in added} == {more / "photos"}
    assert joined.pictures["dev"] == alone.pictures["dev"]
    assert joined.references() == alone.references()
    assert not joined.bad


def test_the_vocabulary_has_the_words_of_the_extra_training_captions_alone(root, more):
    with (more / "captions.csv").open("a") as file:
        file.write("more-4.jpg,an unseen armadillo,dev\n")
    joined = data_with(root, more).tokenizer
    assert [joined.knows(word) for word in ("circle", "zebra", "armadillo")] == [True, True, False]
    assert not data_with(root).tokenizer.knows("zebra")


def test_the_hash_has_the_extra_training_captions_and_not_where_they_are(root, more, tmp_path):
    original = data_with(root, more).data_hash()
    assert original != data_with(root).data_hash()
    moved = tmp_path / "moved"
    shutil.copytree(more, moved)
    assert data_with(root, moved).data_hash() == original
    assert data_with(root, write_more(tmp_path / "other", word=WORDS[1])).data_hash() != original


def test_batches_come_from_both(root, more):
    data = data_with(root, more, batch_size=TRAIN + 3)
    (batch,) = data.train_dataloader()
    assert sorted(batch.names) == sorted([*(f"{i}.jpg" for i in range(TRAIN)), *(f"more-{i}.jpg" for i in range(3))])
    assert {name for batch in data.val_dataloader() for name in batch.names} == set(data.references())


def test_the_extra_source_has_a_format_of_its_own(root, tmp_path):
    names = [f"{kind}-{index}.jpg" for kind in ("train", "dev") for index in range(2)]
    for index, name in enumerate(names):
        save_picture(tmp_path / "flickr" / "Images" / name, index)
    (tmp_path / "flickr" / "Flickr8k.token.txt").write_text("".join(f"{name}#0\tA zebra .\n" for name in names))
    for kind in ("train", "dev"):
        (tmp_path / "flickr" / f"Flickr_8k.{kind}Images.txt").write_text(f"{kind}-0.jpg\n{kind}-1.jpg\n")
    data = CaptionData(str(root), min_count=1, extra=DataSource(root=str(tmp_path / "flickr"), format="flickr8k"))
    data.setup("fit")
    assert [picture.name for picture in data.pictures["train"][TRAIN:]] == ["train-0.jpg", "train-1.jpg"]


# --- Faults ---


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_name_in_both_sources_is_refused_by_name(root, tmp_path, split):
    more = write_table(tmp_path / "more", train=2, dev=1) if split == "train" else tmp_path / "more"
    if split == "dev":  # a picture that scores are taken on must not be trained on
        more.mkdir()
        save_picture(more / f"{TRAIN}.jpg", 0)
        save_picture(more / "new.jpg", 0)
        (more / "captions.csv").write_text(f"image,caption,split\n{TRAIN}.jpg,a zebra,train\nnew.jpg,a zebra,dev\n")
    name = "0.jpg" if split == "train" else f"{TRAIN}.jpg"
    data = CaptionData(str(root), min_count=1, extra=DataSource(root=str(more)))
    with pytest.raises(DataError, match=f"more: {name} is in .*first too; name every picture once"):
        data.setup("fit")


@pytest.mark.parametrize("place", ["data.format", "data.extra.format"])
def test_shards_are_refused_on_either_side(tmp_path, place):
    shards = {"format": "shards", "train_shards": "train-0.tar", "dev_shards": "dev-0.tar"}
    first, extra = (shards, {}) if place == "data.format" else ({}, shards)
    with pytest.raises(ConfigError, match=r"neither data\.format nor data\.extra\.format is shards"):
        CaptionData(str(tmp_path), **first, extra=DataSource(root=str(tmp_path), **extra))


def test_missing_pictures_of_the_extra_source_are_counted_as_bad(root, more):
    (more / "photos" / "more-1.jpg").unlink()
    data = data_with(root, more, bad_picture_limit=0.1)
    assert list(data.bad) == ["more-1.jpg"]
    assert [picture.name for picture in data.pictures["train"][TRAIN:]] == ["more-0.jpg", "more-2.jpg"]
    with pytest.raises(DataError, match=rf"1 of {TRAIN + DEV + 3} pictures cannot be used.*more-1\.jpg"):
        data_with(root, more, bad_picture_limit=0.01)


def test_an_extra_folder_without_its_pictures_is_named(root, more):
    data = CaptionData(str(root), min_count=1, extra=DataSource(root=str(more), images="nowhere"))
    with pytest.raises(DataError, match=r"more: none of the 3 pictures of split 'train' can be used.*nowhere"):
        data.setup("fit")


# --- Resume ---


def test_the_state_names_both_sources_and_fits_the_same_data_alone(root, more, tmp_path):
    data = data_with(root, more)
    torch.save(data.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == data.state_dict()
    assert DataSource(**state["source"]) == data.source
    assert DataSource(**state["extra"]) == data.extra
    again = CaptionData(**state["source"], extra=DataSource(**state["extra"]), min_count=1, workers=0)
    again.setup("fit")
    again.load_state_dict(state)
    path = more / "captions.csv"
    path.write_text(path.read_text().replace(*WORDS))
    for other in (data_with(root), data_with(root, more)):
        with pytest.raises(DataError, match="names or captions have changed"):
            other.load_state_dict(state)
    assert "extra" not in data_with(root).state_dict()


# --- From the command line to a model folder ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training with extra data that is named on the command line: its folder, its data, what happened."""
    folder = tmp_path_factory.mktemp("run")
    root, more = write_table(folder / "first"), write_more(folder / "more")
    settings = recipe(
        root,
        folder / "run",
        "mean",
        stages=[{"epochs": 1}],
        callbacks=[{"class_path": "training_runs.Recorder"}],
        data={"batch_size": TRAIN + 3},
    )
    extra = ["--data.extra.root", more, "--data.extra.format", "table", "--data.extra.images", "photos"]
    assert fit(folder / "run", settings, *extra) == 0
    return folder, root, more, Recorder.last


def test_extra_data_can_be_named_on_the_command_line(run):
    folder, _, more, happened = run
    (names,) = happened.pictures[0]
    assert len(names) == TRAIN + 3
    assert {f"more-{index}.jpg" for index in range(3)} < set(names)
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["pictures"]["train"] == TRAIN + 3
    assert load_run(folder / "run" / "checkpoints" / "last.ckpt").data["extra"] == DataSource(
        root=str(more), images="photos"
    )


def test_one_setting_of_the_extra_data_of_a_recipe_can_be_replaced(run, tmp_path, capsys):
    _, root, more, _ = run
    settings = recipe(root, tmp_path, "mean", stages=[{"epochs": 1}], data={"extra": {"root": str(more)}})
    settings["trainer"]["fast_dev_run"] = 1
    assert fit(tmp_path, settings) == 1  # the pictures are not beside the table
    assert "none of the 3 pictures" in error_line(capsys)
    assert fit(tmp_path, settings, "--data.extra.images", more / "photos") == 0


def test_a_wrong_setting_of_the_extra_data_is_named(run, tmp_path, capsys):
    _, root, more, _ = run
    settings = recipe(root, tmp_path, "mean", stages=[{"epochs": 1}], data={"extra": {"root": str(more)}})
    for option, words in (("format=csv", "flickr8k, karpathy, coco, table, shards"), ("dev_share=2", "below 1, got 2")):
        assert fit(tmp_path, settings, f"--data.extra.{option}") != 0
        assert words in error_line(capsys)


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(java, "missing", lambda metric: "left out")  # METEOR takes its time


@pytest.mark.usefixtures("no_java")
def test_a_run_with_extra_data_is_exported(run, tmp_path):
    folder, root, _, _ = run
    path = folder / "run" / "checkpoints" / "last.ckpt"
    assert command("export", path, "--folder", tmp_path / "model", "--beam-size", 1) == 0
    captioner = Captioner.load(tmp_path / "model", device="cpu")
    assert captioner.tokenizer.knows("zebra")
    assert f"{TRAIN + 3} pictures with {2 * TRAIN + 3} captions, format table and table." in captioner.card
    assert load_run(path).data_sha256 in captioner.card
    assert f"{DEV} pictures" in captioner.card  # scores are of the first source's
    assert captioner.caption(root / "0.jpg").text


@pytest.mark.usefixtures("no_java")
def test_extra_pictures_that_have_moved_are_named_and_captions_that_have_changed_are_refused(run, tmp_path, capsys):
    folder, root, more, _ = run
    moved, captions = tmp_path / "moved", more / "captions.csv"
    kept = captions.read_text()
    shutil.copytree(root, moved)
    shutil.move(more / "photos", tmp_path / "photos")
    try:
        arguments = ["export", folder / "run" / "checkpoints" / "last.ckpt", "--folder", tmp_path / "model"]
        assert command(*arguments) == 1
        assert "none of the 3 pictures" in error_line(capsys)
        given = ["--beam-size", 1, "--data-root", moved, "--extra-images", tmp_path / "photos"]
        assert command(*arguments, *given) == 0
        captions.write_text(kept.replace(*WORDS))
        capsys.readouterr()
        assert command(*arguments, *given) == 1
        line = error_line(capsys)
        assert "not the data of the run" in line
        assert str(more) in line
    finally:
        shutil.move(tmp_path / "photos", more / "photos")
        captions.write_text(kept)


def test_extra_images_of_a_run_without_extra_data_are_refused(root, tmp_path, capsys):
    settings = recipe(root, tmp_path / "run", "mean", stages=[{"epochs": 1}])
    settings["trainer"]["max_steps"] = 1
    assert fit(tmp_path / "run", settings) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert "extra" not in load_run(path).data
    arguments = ["export", path, "--folder", tmp_path / "model", "--extra-images", root]
    assert command(*arguments) == 1
    assert "the run had no data.extra; leave it out" in error_line(capsys)


# --- The captions of everyday photos ---


@pytest.fixture(scope="module")
def everyday():
    with EVERYDAY.open(newline="", encoding="ascii") as file:
        rows = list(csv.DictReader(file))
    assert {tuple(row) for row in rows} == {("image", "caption", "split")}
    return rows


def test_every_everyday_photo_has_three_different_captions_and_one_split(everyday):
    captions, splits = {}, {}
    for row in everyday:
        captions.setdefault(row["image"], []).append(row["caption"])
        splits.setdefault(row["image"], set()).add(row["split"])
    assert len(captions) == 2500
    assert {len(own) for own in captions.values()} == {3}
    assert {len(set(own)) for own in captions.values()} == {3}
    assert Counter(split for own in splits.values() for split in own) == {"train": 2000, "dev": 500}
    assert list(captions) == sorted(captions)
    assert all(re.fullmatch(r"COCO_train2014_\d{12}\.jpg", name) for name in captions)
    dev = [number for number, own in enumerate(splits.values()) if own == {"dev"}]
    assert dev == list(range(4, 2500, 5))  # every fifth


def test_everyday_captions_are_plain_text_of_four_to_twenty_words(everyday):
    for row in everyday:
        assert re.fullmatch(r"[a-z ,'-]+", row["caption"]), row
        assert row["caption"] == " ".join(row["caption"].split()), row
        assert 4 <= len([word for word in row["caption"].split() if word != ","]) <= 20, row


def test_everyday_captions_are_a_table_that_training_reads(everyday, tmp_path):
    images = tmp_path / "photos"
    images.mkdir()
    for name in {row["image"] for row in everyday}:
        (images / name).touch()  # no picture is opened
    root = write_table(tmp_path / "first")
    extra = DataSource(root=str(EVERYDAY.parent), annotations=EVERYDAY.name, images=str(images))
    data = CaptionData(str(root), extra=extra)
    data.setup("fit")
    assert len(data.pictures["train"]) == TRAIN + 2000
    assert len(data.pictures["dev"]) == DEV
    assert all(data.tokenizer.knows(word) for word in ("kitchen", "pizza", "giraffe", "toilet"))
