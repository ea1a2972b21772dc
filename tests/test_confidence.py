"""Confidence: how far a caption can be trusted."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captioner import Captioner, ConfigError
from captioner.checkpoint import Checkpoint
from captioner.confidence import confidence, strangeness
from captioner.config import ConfidenceConfig, ModelConfig
from captioner.familiarity import Familiarity
from captioner.model import build_model

CONFIG = ConfidenceConfig(directions=3, intercept=1.5, score_weight=0.8, least_weight=0.2, familiar=0.5, strange=2.0)
LOG_PROBABILITIES = st.lists(st.floats(-20, 0), min_size=1, max_size=20)
STRANGENESS = st.floats(0, 1e6)


def trust(log_probabilities, strangeness, config=CONFIG):
    score = sum(log_probabilities) / len(log_probabilities)
    return confidence(config, score=score, log_probabilities=log_probabilities, strangeness=strangeness)


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint):
    """A tiny captioner with a made-up calibration, and the same without."""
    plain = tiny_checkpoint("multihead")
    model = build_model(dataclasses.replace(plain.model.config, confidence=CONFIG))
    model.load_state_dict(plain.model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    basis_CK, _ = torch.linalg.qr(torch.randn(model.encoder.feature_dim, CONFIG.directions, generator=generator))
    model.familiarity.basis_KC.copy_(basis_CK.T)
    return Captioner(Checkpoint(model.eval(), plain.tokenizer, plain.card), device="cpu")


@given(LOG_PROBABILITIES, STRANGENESS)
def test_it_is_a_probability(log_probabilities, strangeness):
    assert 0 <= trust(log_probabilities, strangeness) <= 1


@given(LOG_PROBABILITIES, STRANGENESS, st.floats(0, 100))
def test_it_never_grows_with_strangeness(log_probabilities, strangeness, more):
    assert trust(log_probabilities, strangeness + more) <= trust(log_probabilities, strangeness)


@given(LOG_PROBABILITIES, st.floats(0, 3))
def test_it_never_falls_with_the_probability_of_words(log_probabilities, more):
    surer = [min(0.0, value + more) for value in log_probabilities]
    assert trust(surer, 0.1) >= trust(log_probabilities, 0.1) - 1e-12


def test_it_is_the_stated_formula():
    good = 1 / (1 + math.exp(-(1.5 + 0.8 * -0.7 + 0.2 * -1.1)))
    found = confidence(CONFIG, score=-0.7, log_probabilities=[-0.3, -1.1], strangeness=2.0)
    assert found == pytest.approx(good / math.e)
    assert confidence(CONFIG, score=-0.7, log_probabilities=[-0.3, -1.1], strangeness=0.5) == pytest.approx(good)


def test_an_impossible_sentence_has_none():
    assert confidence(CONFIG, score=-math.inf, log_probabilities=[-math.inf], strangeness=0.0) == 0


def test_strangeness_is_the_squared_distance_from_the_subspace():
    generator = torch.Generator().manual_seed(1)
    familiarity = Familiarity(feature_dim=10, directions=3)
    basis_CK, _ = torch.linalg.qr(torch.randn(10, 3, generator=generator))
    familiarity.basis_KC.copy_(basis_CK.T)
    familiarity.mean_C.copy_(torch.randn(10, generator=generator))
    grid_BPC = torch.randn(4, 6, 10, generator=generator)
    away_BC = grid_BPC.mean(dim=1) - familiarity.mean_C
    nearest = torch.linalg.lstsq(basis_CK, away_BC.T).solution
    expected_B = (away_BC.T - basis_CK @ nearest).square().sum(dim=0)
    torch.testing.assert_close(familiarity(grid_BPC), expected_B)
    inside_BPC = (torch.randn(4, 3, generator=generator) @ basis_CK.T + familiarity.mean_C)[:, None]
    torch.testing.assert_close(familiarity(inside_BPC), torch.zeros(4), atol=1e-4, rtol=0)


def test_strangeness_is_the_same_for_numpy_and_torch():
    generator = np.random.default_rng(3)
    grid_BPC, mean_C = generator.normal(size=(4, 6, 10)), generator.normal(size=10)
    basis_KC = np.linalg.qr(generator.normal(size=(10, 3)))[0].T
    given = [np.ascontiguousarray(values, dtype=np.float32) for values in (grid_BPC, mean_C, basis_KC)]
    found = strangeness(given[0], mean_C=given[1], basis_KC=given[2])
    assert found.dtype == np.float32
    familiarity = Familiarity(feature_dim=10, directions=3)
    familiarity.mean_C.copy_(torch.from_numpy(given[1]))
    familiarity.basis_KC.copy_(torch.from_numpy(given[2]))
    torch.testing.assert_close(torch.from_numpy(found), familiarity(torch.from_numpy(given[0])))


def test_captions_of_a_calibrated_model_have_it_and_of_another_do_not(calibrated, tiny_captioner, example_photos):
    caption = calibrated.caption(example_photos[0], n_best=3)
    for found in (caption, *caption.alternatives):
        strangeness = float(calibrated.model.familiarity(calibrated.features([example_photos[0]])))
        least = math.log(min(word.probability for word in found.words))
        assert found.confidence == pytest.approx(
            confidence(CONFIG, score=found.score, log_probabilities=[least], strangeness=strangeness)
        )
    assert caption.to_record("x")["confidence"] == caption.confidence
    assert tiny_captioner.caption(example_photos[0]).confidence is None


def test_a_given_sentence_has_it_too(calibrated, example_photos):
    caption = calibrated.caption(example_photos[0])
    assert calibrated.score(example_photos[0], caption.text).confidence == pytest.approx(caption.confidence, abs=1e-5)


def test_a_batch_has_the_confidences_of_singles(calibrated, example_photos):
    singles = [calibrated.caption(path).confidence for path in example_photos]
    batch = [caption.confidence for caption in calibrated.caption_batch(example_photos, batch_size=4)]
    assert batch == pytest.approx(singles, abs=1e-5)


def test_a_saved_calibration_is_the_calibration(calibrated, example_photos, tmp_path):
    calibrated.save(tmp_path / "model")
    again = Captioner.load(tmp_path / "model", device="cpu")
    assert again.config == calibrated.config
    assert again.caption(example_photos[0]).confidence == calibrated.caption(example_photos[0]).confidence


def test_features_are_what_the_decoder_attends_to(calibrated, example_photos):
    grid_BPC = calibrated.features(example_photos[:2])
    rows, columns = calibrated.model.encoder.grid_hw
    assert grid_BPC.shape == (2, rows * columns, calibrated.model.encoder.feature_dim)
    with pytest.raises(ConfigError, match="at least one picture"):
        calibrated.features([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strange": 0.5}, "strange must be a finite number, above 0.5"),
        ({"directions": 0}, "directions must be a whole number"),
        ({"intercept": math.nan}, "intercept must be a finite number"),
        ({"familiar": -1.0}, "familiar must be a finite number, at least 0"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_settings_survive_plain_values():
    config = ModelConfig(decoder="mean", vocabulary_size=10, confidence=CONFIG)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="confidence must be"):
        ModelConfig(decoder="mean", vocabulary_size=10, confidence=3)


def test_numpy_numbers_become_plain():
    config = dataclasses.replace(CONFIG, intercept=np.float32(0.5))
    assert type(config.intercept) is float
