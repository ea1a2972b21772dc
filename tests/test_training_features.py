"""Features of a frozen encoder: computed once, never stale, whole or not there."""

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from training_runs import captions_of, save_picture

from captioner import DataError
from captioner.config import PreprocessingConfig
from captioner.encoder import Encoder
from training import features
from training.augmentation import Augmentation
from training.features import features_key, prepare_features
from training.sources import BadPicture, CaptionedPicture

SETTINGS = {
    "preprocessing": PreprocessingConfig(side_px=64),
    "augmentation": Augmentation(mirror=0.5),
    "views": 2,
    "seed": 0,
}


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(backbone="mobilenet_v3_small", side_px=64)


@pytest.fixture
def pictures(tmp_path):
    found = []
    for index in range(3):
        save_picture(tmp_path / f"{index}.jpg", index)
        found.append(CaptionedPicture(f"{index}.jpg", tmp_path / f"{index}.jpg", tuple(captions_of(index))))
    return found


def prepare(folder, encoder, pictures, **changed):
    return prepare_features(folder, encoder=encoder, pictures=pictures, workers=0, **{**SETTINGS, **changed})


def key(encoder, pictures, **changed):
    return features_key(encoder, pictures, **{**SETTINGS, **changed})


def test_features_are_those_of_the_encoder_up_to_float16(tmp_path, encoder, pictures):
    from captioner.images import open_picture
    from captioner.preprocessing import to_pixels

    store = prepare(tmp_path / "cache", encoder, pictures)
    encoder.eval()
    for index, picture in enumerate(pictures):
        pixels = to_pixels(open_picture(picture.path, side_px=64).image, SETTINGS["preprocessing"])
        with torch.no_grad():
            torch.testing.assert_close(store.read(index, 0).float(), encoder(pixels[None])[0], rtol=1e-2, atol=1e-3)
    assert any(not torch.equal(store.read(index, 0), store.read(index, 1)) for index in range(3))


def test_the_same_key_is_read_again_without_opening_a_picture(tmp_path, encoder, pictures, monkeypatch):
    first = prepare(tmp_path / "cache", encoder, pictures)
    monkeypatch.setattr(features, "open_picture", lambda *_, **__: pytest.fail("a picture was opened"))
    again = prepare(tmp_path / "cache", encoder, pictures)
    assert again.path == first.path
    assert torch.equal(again.read(1, 1), first.read(1, 1))


def test_whatever_the_features_depend_on_changes_the_key(encoder, pictures):
    keys = [
        key(encoder, pictures),
        key(encoder, pictures[:2]),
        key(encoder, pictures, preprocessing=PreprocessingConfig(side_px=64, mean=(0.5, 0.5, 0.5))),
        key(encoder, pictures, augmentation=Augmentation(mirror=0.4)),
        key(encoder, pictures, augmentation=None),
        key(encoder, pictures, seed=1),
        key(encoder, pictures, views=1),
        key(encoder, [CaptionedPicture("0.jpg", pictures[0].path, ("Look left .",)), *pictures[1:]]),
    ]
    os.utime(pictures[1].path, ns=(1, 1))
    keys.append(key(encoder, pictures))
    other = Encoder(backbone="mobilenet_v3_small", side_px=64)
    keys.append(key(other, pictures))
    assert len(set(keys)) == len(keys)
    assert key(encoder, pictures) == keys[-2]
    # Captions alone do not count, nor seed and augmentation where every picture is taken as it is.
    assert key(encoder, [CaptionedPicture(p.name, p.path, ("Other .",)) for p in pictures]) == keys[-2]
    assert key(encoder, pictures, views=1, seed=5, augmentation=None) == key(encoder, pictures, views=1)


def test_bad_pictures_are_kept_with_their_fault_and_the_others_in_place(tmp_path, encoder, pictures):
    whole = prepare(tmp_path / "whole", encoder, pictures)
    pictures[2].path.write_bytes(b"no picture")
    for _ in range(2):
        store = prepare(tmp_path / "cache", encoder, pictures)
        assert isinstance(store.read(2, 0), BadPicture)
        assert store.bad.keys() == {2}
        assert torch.equal(store.read(1, 0), whole.read(1, 0))


def test_a_cache_that_was_broken_off_is_not_used(tmp_path, encoder, pictures, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(features, "_encoded", _broken_off)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, encoder, pictures)
    assert not list(folder.glob("*.npy"))
    monkeypatch.undo()
    # What a kill leaves: the file under its other name.
    partial = folder / f"features-{key(encoder, pictures)[:32]}.partial"
    partial.write_bytes(b"half")
    store = prepare(folder, encoder, pictures)
    assert not partial.exists()
    assert np.isfinite(store.read(2, 1).numpy()).all()


def _broken_off(encoder, batches):
    yield 0, np.zeros((2, 4, encoder.feature_dim), np.float16)
    raise KeyboardInterrupt


def test_a_disk_without_room_is_an_error_of_one_line_before_the_work(tmp_path, encoder, pictures, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    monkeypatch.setattr(features, "open_picture", lambda *_, **__: pytest.fail("a picture was opened"))
    with pytest.raises(DataError, match=r"cache needs .* GB, 0\.0 GB are free; .*cached: false"):
        prepare(tmp_path / "cache", encoder, pictures)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, encoder, pictures):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        prepare(tmp_path / "file", encoder, pictures)


def test_features_beyond_float16_are_refused(tmp_path, pictures):
    encoder = Encoder(backbone="mobilenet_v3_small", side_px=64)
    with torch.no_grad():
        encoder.stages[-1][1].bias.fill_(1e6)
    with pytest.raises(DataError, match="do not fit float16"):
        prepare(tmp_path / "cache", encoder, pictures)


def test_of_two_processes_one_computes(tmp_path, encoder, pictures):
    log = tmp_path / "log"
    processes = [
        multiprocessing.get_context("fork").Process(target=_count, args=(tmp_path / "cache", encoder, pictures, log))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(log.read_text()) == len(pictures)


def _count(folder, encoder, pictures, log):
    opened = features.open_picture

    def counted(*arguments, **options):
        with log.open("a") as file:
            file.write("x")
        return opened(*arguments, **options)

    features.open_picture = counted
    torch.set_num_threads(1)
    store = prepare(folder, encoder, pictures)
    assert json.loads(store.path.with_suffix(".json").read_text()) == {"bad": {}}
