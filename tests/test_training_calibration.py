"""The fit of the confidence, and the pictures of other worlds that it is measured with."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import Captioner, ConfigError, DataError
from training.calibration import (
    auroc,
    calibrate,
    calibration_error,
    fit_familiarity,
    logistic_regression,
    pooled_features,
)
from training.other_worlds import KINDS, other_worlds
from training.sources import CaptionedPicture


def test_the_regression_finds_the_weights_that_made_the_data():
    rng = np.random.default_rng(0)
    figures = rng.normal(size=(20_000, 2)) * [3.0, 0.5] + [-4.0, 2.0]
    logits = 1.0 + 0.4 * figures[:, 0] - 1.5 * figures[:, 1]
    good = rng.random(len(figures)) < 1 / (1 + np.exp(-logits))
    found = logistic_regression(figures, good)
    assert found == pytest.approx([1.0, 0.4, -1.5], abs=0.25)
    probabilities = 1 / (1 + np.exp(-(found[0] + figures @ found[1:])))
    assert calibration_error(probabilities, good) < 0.02


def test_what_says_nothing_gets_no_weight():
    rng = np.random.default_rng(0)
    found = logistic_regression(rng.normal(size=(5000, 2)), rng.random(5000) < 0.3)
    assert found[1:] == pytest.approx([0, 0], abs=0.1)
    assert 1 / (1 + np.exp(-found[0])) == pytest.approx(0.3, abs=0.03)


def test_calibration_error_is_the_mean_gap_of_the_bins():
    confidences = np.array([0.1, 0.1, 0.9, 0.9])
    assert calibration_error(confidences, np.array([False, False, True, True])) == pytest.approx(0.1)
    assert calibration_error(confidences, np.array([True, True, False, False])) == pytest.approx(0.9)
    assert calibration_error(np.array([0.5, 0.5]), np.array([True, False])) == 0
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_auroc_is_the_share_of_ordered_pairs(higher, lower):
    pairs = [(high > low) + 0.5 * (high == low) for high in higher for low in lower]
    assert auroc(np.array(higher, float), np.array(lower, float)) == pytest.approx(sum(pairs) / len(pairs))


def test_familiar_features_are_not_strange_and_others_are():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(200, 20, generator=generator))[0].T
    familiar = torch.randn(400, 20, generator=generator) @ directions + 3.0
    familiarity = fit_familiarity(familiar)
    strange = familiar + torch.randn(400, 200, generator=generator)
    assert familiarity(familiar[:, None]).max() < 0.01 * familiarity(strange[:, None]).min()


def test_pooled_features_do_not_depend_on_the_batch(tiny_captioner, example_photos):
    together = pooled_features(tiny_captioner, example_photos[:3], batch_size=3)
    alone = pooled_features(tiny_captioner, example_photos[:3], batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_pictures_of_other_worlds_follow_from_the_seed():
    first, again = list(other_worlds(12, seed=3)), list(other_worlds(12, seed=3))
    assert [kind for kind, _ in first] == list(KINDS) * 2
    assert all(one.tobytes() == other.tobytes() for (_, one), (_, other) in zip(first, again, strict=True))
    another = list(other_worlds(12, seed=4))
    assert all(one.tobytes() != other.tobytes() for (_, one), (_, other) in zip(first, another, strict=True))
    assert {image.size for _, image in other_worlds(6, side_px=64)} == {(64, 64)}
    with pytest.raises(ConfigError, match="side_px"):
        list(other_worlds(1, side_px=8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """400 pictures of coloured noise, half for training, each with two captions."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    made = []
    words = ["a red dog runs", "a man with the ball", "the dog on grass", "a red ball on the grass"]
    for index in range(400):
        path = folder / f"{index}.png"
        colour = rng.integers(0, 256, 3)
        spots = rng.integers(-40, 40, (4, 4, 3))
        Image.fromarray((colour + spots).clip(0, 255).astype(np.uint8)).resize((64, 64)).save(path)
        captions = tuple(words[k] for k in rng.choice(4, 2, replace=False))
        made.append(CaptionedPicture(path.name, path, captions))
    return made


def test_a_calibrated_model_is_the_model_with_a_confidence(tiny_captioner, pictures, example_photos):
    checkpoint, report = calibrate(tiny_captioner, train=pictures[:200], dev=pictures[200:])
    calibrated = Captioner(checkpoint, device="cpu")
    before, after = tiny_captioner.caption(example_photos[0]), calibrated.caption(example_photos[0])
    assert (after.text, after.score) == (before.text, before.score)
    assert before.confidence is None
    found = [caption.confidence for caption in calibrated.caption_batch([p.path for p in pictures[200:]])]
    assert report.mean_dev == pytest.approx(np.mean(found), abs=1e-3)
    assert report.pictures == 200
    assert 0 <= report.error <= 0.3  # of 200 captions of a random model; 0.5 would be a regression that is of no use
    strangers = [image for _, image in other_worlds(report.strangers)]
    theirs = [caption.confidence for caption in calibrated.caption_batch(strangers)]
    assert report.mean_strange == pytest.approx(np.mean(theirs), abs=1e-3)
    assert report.auroc_strange == pytest.approx(auroc(np.array(found), np.array(theirs)), abs=1e-3)
    assert f"{report.auroc_strange:.3f}" in report.sentence()


def test_too_few_pictures_are_refused(tiny_captioner, pictures):
    with pytest.raises(DataError, match="at least 200 training and 200 dev pictures"):
        calibrate(tiny_captioner, train=pictures[:200], dev=pictures[200:300])
