"""Data of every format through the data module into batches; bad pictures; what a resumed run must find again."""

import json

import lightning
import pytest
from test_training_shards import write_tar
from training_runs import Recorder, captions_of, fit, recipe, save_picture, write_table

from captioner import ConfigError, DataError
from captioner.config import PreprocessingConfig
from captioner.tokenizer import Tokenizer
from training.data import CaptionData

pytestmark = pytest.mark.filterwarnings("ignore:(?si).*deprecat", "ignore:.*many workers")
TRAIN, DEV = 8, 4
SPLITS = ["train"] * TRAIN + ["dev"] * DEV


# --- Formats ---


def pictures_in(folder):
    for index in range(TRAIN + DEV):
        save_picture(folder / f"{index}.jpg", index)


def write_flickr8k(root):
    pictures_in(root / "Images")
    names = [f"{index}.jpg" for index in range(TRAIN + DEV)]
    lines = [f"{name}#{k}\t{text}" for i, name in enumerate(names) for k, text in enumerate(captions_of(i))]
    (root / "Flickr8k.token.txt").write_text("\n".join(lines))
    (root / "Flickr_8k.trainImages.txt").write_text("\n".join(names[:TRAIN]))
    (root / "Flickr_8k.devImages.txt").write_text("\n".join(names[TRAIN:]))
    return {"format": "flickr8k"}


def write_karpathy(root):
    pictures_in(root / "photos")
    images = [
        {
            "filename": f"{i}.jpg",
            "split": "val" if split == "dev" else split,
            "sentences": [{"raw": c} for c in captions_of(i)],
        }
        for i, split in enumerate(SPLITS)
    ]
    (root / "dataset.json").write_text(json.dumps({"images": images}))
    return {"format": "karpathy", "annotations": "dataset.json", "images": "photos"}


def write_coco(root):
    (root / "annotations").mkdir(parents=True)
    for split, folder in (("train", "train2017"), ("dev", "val2017")):
        own = [index for index, of in enumerate(SPLITS) if of == split]
        for index in own:
            save_picture(root / folder / f"{index}.jpg", index)
        content = {
            "images": [{"id": index, "file_name": f"{index}.jpg"} for index in own],
            "annotations": [
                {"id": 10 * i + k, "image_id": i, "caption": c} for i in own for k, c in enumerate(captions_of(i))
            ],
        }
        (root / "annotations" / f"captions_{folder}.json").write_text(json.dumps(content))
    return {"format": "coco"}


def write_csv(root):
    write_table(root)
    return {}


def write_jsonl(root):
    pictures_in(root)
    rows = [{"image": f"{i}.jpg", "captions": captions_of(i), "split": split} for i, split in enumerate(SPLITS)]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"format": "table"}


def write_shards(root):
    root.mkdir(parents=True)
    pictures_in(root / "photos")

    def files(index):
        return [
            (f"{index}.jpg", (root / "photos" / f"{index}.jpg").read_bytes()),
            (f"{index}.txt", "\n".join(captions_of(index)).encode()),
        ]

    for number in range(2):
        write_tar(root / f"train-{number}.tar", [file for i in range(number, TRAIN, 2) for file in files(i)])
    write_tar(root / "dev-0.tar", [file for i in range(TRAIN, TRAIN + DEV) for file in files(i)])
    return {"format": "shards", "train_shards": "train-{0..1}.tar", "dev_shards": "dev-0.tar", "shuffle_buffer": 3}


WRITERS = {
    "flickr8k": write_flickr8k,
    "karpathy": write_karpathy,
    "coco": write_coco,
    "csv": write_csv,
    "jsonl": write_jsonl,
    "shards": write_shards,
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in WRITERS), ("csv", 2), ("shards", 2)])
def test_every_format_trains_for_an_epoch_on_each_picture(tmp_path, name, workers):

    root = tmp_path / "data"
    options = WRITERS[name](root)
    settings = recipe(
        root,
        tmp_path,
        "mean",
        stages=[{"epochs": 1}],
        callbacks=[{"class_path": "training_runs.Recorder"}],
        data={"workers": workers, **options},
    )
    assert fit(tmp_path, settings) == 0
    shown = sorted(name for names in Recorder.last.pictures[0] for name in names)
    assert len(shown) == TRAIN
    assert len(set(shown)) == TRAIN
    (line,) = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(line)["scores"]["CIDEr-D"] >= 0


class StopAt(lightning.Callback):
    """Ends the run, as if it had been broken off."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/three.ckpt")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_run_resumed_in_the_middle_of_an_epoch_sees_the_same_batches(tmp_path, workers):
    options = write_shards(tmp_path / "data")
    callbacks = [{"class_path": "training_runs.Recorder"}, {"class_path": f"{__name__}.StopAt"}]
    settings = recipe(
        tmp_path / "data",
        tmp_path,
        "mean",
        stages=[{"epochs": 2}],
        callbacks=callbacks,
        data={"workers": workers, "batch_size": 2, **options},
    )
    assert fit(tmp_path, settings) == 0
    whole = Recorder.last
    assert fit(tmp_path, settings, "--ckpt_path", tmp_path / "three.ckpt") == 0
    assert Recorder.last.pictures[0] == whole.pictures[0][3:]
    assert Recorder.last.pictures[1] == whole.pictures[1]
    assert Recorder.last.losses[1] == whole.losses[1]


def test_dev_pictures_of_shards_come_once_whatever_the_processes(tmp_path, monkeypatch):
    options = write_shards(tmp_path / "data")
    data = CaptionData(str(tmp_path / "data"), min_count=1, batch_size=3, **options)
    data.setup("fit")
    shown = []
    for rank in range(3):
        monkeypatch.setattr(data, "_processes", lambda rank=rank: (rank, 3))
        shown += [name for batch in data.val_dataloader() for name in batch.names]
    assert sorted(shown) == sorted(data.references())


# --- Items ---


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_a_batch_holds_whole_captions_side_by_side_per_picture(tmp_path, wanted):
    data = CaptionData(
        str(write_table(tmp_path)),
        batch_size=3,
        captions_per_picture=wanted,
        min_count=1,
        max_tokens=6,
        workers=0,
        preprocessing=PreprocessingConfig(side_px=32),
    )
    data.setup("fit")
    tokenizer = data.tokenizer
    captions = {picture.name: picture.captions for picture in data.pictures["train"]}
    for batch in data.train_dataloader():
        assert batch.pictures.shape == (3, 3, 32, 32)
        assert batch.tokens.shape[0] == 3 * wanted
        for row, ids in enumerate(batch.tokens.tolist()):
            length = ids.index(tokenizer.end_id)
            assert ids[0] == tokenizer.start_id
            assert set(ids[length + 1 :]) <= {tokenizer.pad_id}
            allowed = [tokenizer.encode(text)[:5] for text in captions[batch.names[row // wanted]]]
            assert tuple(ids[1:length]) in allowed


# --- Bad pictures ---


def test_missing_pictures_beyond_the_limit_stop_at_once_with_the_list(tmp_path):
    root = write_table(tmp_path)
    for index in range(7):
        (root / f"{index}.jpg").unlink()
    data = CaptionData(str(root), min_count=1)
    with pytest.raises(DataError, match=r"7 of 12 pictures cannot be used.*0\.jpg.*and 2 more; mend them") as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value)


def test_missing_pictures_within_the_limit_are_counted_and_left_out(tmp_path):
    root = write_table(tmp_path)
    (root / "3.jpg").unlink()
    data = CaptionData(str(root), min_count=1, bad_picture_limit=0.1)
    data.setup("fit")
    assert list(data.bad) == ["3.jpg"]
    assert len(data.pictures["train"]) == TRAIN - 1
    data.note_bad(list(data.bad.values()))  # the same one again is still one
    with pytest.raises(DataError, match="2 of 12"):
        data.note_bad([type(data.bad["3.jpg"])("4.jpg", "4.jpg: damaged")])


# --- Vocabulary and resume ---


def test_the_vocabulary_of_the_model_that_training_starts_from_is_kept_and_extended(tmp_path, tiny_checkpoint):
    from captioner.checkpoint import save_checkpoint

    base = tiny_checkpoint()
    save_checkpoint(base, tmp_path / "model")
    data = CaptionData(str(write_table(tmp_path / "data")), min_count=1, init_from=str(tmp_path / "model"))
    data.setup("fit")
    words = [base.tokenizer.word(index) for index in range(base.tokenizer.vocabulary_size)]
    assert [data.tokenizer.word(index) for index in range(len(words))] == words
    assert data.tokenizer.knows("square")
    assert not base.tokenizer.knows("square")
    assert (data.max_tokens, data.preprocessing) == (base.model.config.max_tokens, base.model.config.preprocessing)


@pytest.mark.parametrize("option", [{"max_tokens": 9}, {"preprocessing": PreprocessingConfig(mean=(0.1, 0.2, 0.3))}])
def test_options_that_contradict_the_model_that_training_starts_from_are_refused(tmp_path, tiny_checkpoint, option):
    from captioner.checkpoint import save_checkpoint

    save_checkpoint(tiny_checkpoint(), tmp_path / "model")
    data = CaptionData(str(write_table(tmp_path / "data")), min_count=1, init_from=str(tmp_path / "model"), **option)
    with pytest.raises(ConfigError, match=f"data.{next(iter(option))}=.* differs from that of the model"):
        data.setup("fit")


def test_the_hash_of_the_data_changes_with_a_caption(tmp_path):
    hashes = set()
    for index, words in enumerate([("red", "red"), ("red", "red"), ("red", "pink")]):
        root = write_table(tmp_path / str(index))
        path = root / "captions.csv"
        path.write_text(path.read_text().replace(*words))
        data = CaptionData(str(root), min_count=1)
        data.setup("fit")
        hashes.add(data.data_hash())
    assert len(hashes) == 2


def test_rare_words_are_not_learned(tmp_path):
    root = write_table(tmp_path)
    with (root / "captions.csv").open("a") as file:
        file.write("0.jpg,A zebra .,train\n")
    data = CaptionData(str(root), min_count=2)
    data.setup("fit")
    assert isinstance(data.tokenizer, Tokenizer)
    assert not data.tokenizer.knows("zebra")
    assert data.tokenizer.knows("circle")


def test_one_dev_picture_is_refused(tmp_path):
    data = CaptionData(str(write_table(tmp_path / "data", train=3, dev=1)), min_count=1)
    with pytest.raises(DataError, match="one dev picture"):
        data.setup("fit")


def test_beyond_the_limit_every_bad_picture_is_listed_before_any_work(tmp_path):
    root = write_table(tmp_path / "data", train=8, dev=3)
    for index in range(6):
        (root / f"{index}.jpg").write_bytes(b"no picture")
    data = CaptionData(str(root), min_count=1, bad_picture_limit=0.3)
    with pytest.raises(DataError, match="6 of 11 pictures cannot be used"):
        data.setup("fit")
    assert sorted(data.bad) == [f"{index}.jpg" for index in range(6)]
