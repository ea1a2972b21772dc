"""Mosaics whose maps are known: all attention in the right quadrant is 1, an even map a quarter."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import TINY_DECODERS
from PIL import Image

from captioner import Captioner, ConfigError, DataError
from captioner.checkpoint import Checkpoint
from captioner.metrics import Interval
from captioner.model import build_model
from training.mosaics import make_mosaics, quadrant_shares
from training.pointing import PointingScore, lay_out, pointing
from training.sources import CaptionedPicture

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
CAPTIONS = ("A dog runs on the grass .", "A man with the red ball .")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Photos of one colour each, of different shapes, with captions that the tiny models know."""
    folder = tmp_path_factory.mktemp("photos")
    made = []
    for index, colour in enumerate(COLOURS):
        path = folder / f"{index}.png"
        Image.new("RGB", (40 + 10 * index, 64), colour).save(path)
        made.append(CaptionedPicture(path.name, path, (CAPTIONS[index % 2],)))
    return made


@pytest.fixture
def tiny(tiny_checkpoint):
    return lambda decoder="multihead": Captioner(tiny_checkpoint(decoder), device="cpu")


class Looking:
    """A captioner of which every word looks where it is told to; it keeps what it was asked."""

    def __init__(self, captioner, maps):
        self._captioner, self._maps, self.asked = captioner, maps, []

    def __getattr__(self, name):
        return getattr(self._captioner, name)

    def score(self, picture, sentence):
        attention = self._maps(len(self.asked)).astype(np.float32)
        self.asked.append((picture, sentence))
        caption = self._captioner.score(picture, sentence)
        words = [
            dataclasses.replace(word, attention=attention, attention_heads=attention[None, None])
            for word in caption.words
        ]
        return dataclasses.replace(caption, words=tuple(words))


def in_quadrant(grid_hw, quadrant):
    """All weight in one cell, a corner of the quadrant."""
    weights = np.zeros(grid_hw)
    weights[-(quadrant // 2), -(quadrant % 2)] = 1  # -0 is the first
    return weights


def test_attention_wholly_in_the_right_quadrant_is_1(tiny, pictures):
    captioner = tiny()
    grid_hw = captioner.model.encoder.grid_hw
    looking = Looking(captioner, lambda index: in_quadrant(grid_hw, index % 4))
    score = pointing(looking, pictures, mosaics=8)
    assert score.share == 1.0
    assert score.by_quadrant == (1.0, 1.0, 1.0, 1.0)
    assert score.by_head == ((1.0,),)
    assert score.interval == Interval(1.0, 1.0)


def test_attention_wholly_in_a_wrong_quadrant_is_0(tiny, pictures):
    captioner = tiny()
    grid_hw = captioner.model.encoder.grid_hw
    assert (
        pointing(Looking(captioner, lambda index: in_quadrant(grid_hw, (index + 1) % 4)), pictures, mosaics=8).share
        == 0
    )


def test_attention_that_looks_into_one_quadrant_alone_shows_by_quadrant(tiny, pictures):
    captioner = tiny()
    grid_hw = captioner.model.encoder.grid_hw
    score = pointing(Looking(captioner, lambda index: in_quadrant(grid_hw, 2)), pictures, mosaics=8)
    assert score.by_quadrant == (0.0, 0.0, 1.0, 0.0)


def test_cells_on_the_border_are_shared_by_area():
    odd = quadrant_shares((3, 3)).reshape(4, 3, 3)
    assert torch.allclose(odd[0], torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.25, 0.0], [0.0, 0.0, 0.0]]), atol=1e-6)
    uneven = quadrant_shares((2, 5)).reshape(4, 2, 5)
    assert torch.allclose(uneven[3], torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0.5, 1, 1]]), atol=1e-6)


def test_the_mean_decoder_comes_out_at_chance(tiny, pictures):
    score = pointing(tiny("mean"), pictures, mosaics=5)
    assert score.share == pytest.approx(0.25, abs=1e-7)
    assert score.by_quadrant == pytest.approx([0.25] * 4, abs=1e-7)
    assert score.by_layer == pytest.approx([0.25], abs=1e-7)
    assert (score.interval.low, score.interval.high) == pytest.approx((0.25, 0.25), abs=1e-7)
    assert score.map_layers == ()


@pytest.mark.parametrize("decoder", TINY_DECODERS)
def test_layers_are_means_of_heads_and_the_map_the_mean_of_its_layers(tiny, pictures, decoder):
    score = pointing(tiny(decoder), pictures, mosaics=6)
    settings = TINY_DECODERS[decoder]
    assert np.shape(score.by_head) == (settings.get("layers", 1), settings.get("heads", 1))
    assert score.by_layer == pytest.approx(np.mean(score.by_head, axis=1))
    assert score.share == pytest.approx(np.mean(score.by_layer), abs=1e-6)  # all layers are in the map
    assert score.map_layers == (tuple(range(settings["layers"])) if decoder == "multihead" else ())
    assert score.interval.low <= score.share <= score.interval.high


def test_a_map_of_some_layers_is_scored_as_their_mean(tiny_checkpoint, pictures):
    whole = tiny_checkpoint("multihead")
    score = pointing(Captioner(whole, device="cpu"), pictures, mosaics=6)
    config = dataclasses.replace(
        whole.model.config,
        decoder_settings=dataclasses.replace(whole.model.config.decoder_settings, map_layers=(-1,)),
    )
    model = build_model(config).eval()
    model.load_state_dict(whole.model.state_dict())
    last = pointing(Captioner(Checkpoint(model, whole.tokenizer), device="cpu"), pictures, mosaics=6)
    assert last.map_layers == (1,)
    assert last.by_layer == pytest.approx(score.by_layer)
    assert last.share == pytest.approx(score.by_layer[1], abs=1e-6)
    assert abs(score.by_layer[0] - score.by_layer[1]) > 1e-4  # else the test could not fail


def test_the_same_seed_asks_the_same_however_many_follow(tiny, pictures):
    captioner = tiny()
    asked = []
    for mosaics, seed in ((8, 3), (4, 3), (8, 4)):
        looking = Looking(captioner, lambda index: np.ones(captioner.model.encoder.grid_hw))
        pointing(looking, pictures, mosaics=mosaics, seed=seed)
        asked.append([(picture.tobytes(), sentence) for picture, sentence in looking.asked])
    assert asked[0][:4] == asked[1]
    assert asked[0] != asked[2]


def test_each_mosaic_shows_four_different_photos_and_asks_for_one_in_its_turn(tiny, pictures):
    captioner = tiny()
    looking = Looking(captioner, lambda index: np.ones(captioner.model.encoder.grid_hw))
    pointing(looking, pictures, mosaics=8)
    side_px = captioner.config.preprocessing.side_px
    known = {Image.new("RGB", (1, 1), colour).getpixel((0, 0)): index for index, colour in enumerate(COLOURS)}
    for number, (mosaic, sentence) in enumerate(looking.asked):
        assert mosaic.size == (side_px, side_px)
        quarter = side_px // 4
        centres = [(quarter + side_px // 2 * (part % 2), quarter + side_px // 2 * (part // 2)) for part in range(4)]
        shown = [known[mosaic.getpixel(centre)] for centre in centres]
        assert len(set(shown)) == 4
        assert sentence == pictures[shown[number % 4]].captions[0]


def test_mosaics_are_laid_out_like_those_of_training():
    parts = [Image.new("RGB", (2, 2), colour) for colour in COLOURS[:4]]
    large = torch.stack([torch.from_numpy(np.array(part.resize((4, 4)))).permute(2, 0, 1).float() for part in parts])
    wanted = make_mosaics(large, torch.arange(4))[0]
    assert torch.equal(torch.from_numpy(np.array(lay_out(parts))).permute(2, 0, 1).float(), wanted)


def test_captions_with_unknown_words_too_long_or_without_content_are_not_asked_for(tiny, pictures):
    captioner = tiny()
    long = " ".join(["dog"] * captioner.config.max_tokens)
    captions = ("A zebra runs .", long, "a the on with", "", CAPTIONS[0])
    one = [dataclasses.replace(pictures[0], captions=captions)]
    others = [dataclasses.replace(picture, captions=("A zebra .",)) for picture in pictures[1:]]
    looking = Looking(captioner, lambda index: np.ones(captioner.model.encoder.grid_hw))
    score = pointing(looking, one + others, mosaics=4)
    assert {sentence for _, sentence in looking.asked} == {CAPTIONS[0]}
    assert score.words == 4 * 3  # dog, runs, grass
    with pytest.raises(DataError, match="words that the model knows"):
        pointing(captioner, others, mosaics=4)


def test_too_few_pictures_too_few_mosaics_and_an_odd_side_are_named(tiny, pictures, monkeypatch):
    captioner = tiny()
    with pytest.raises(DataError, match="at least 4 pictures, got 3"):
        pointing(captioner, pictures[:3])
    with pytest.raises(ConfigError, match=r"at least 4.*got 3"):
        pointing(captioner, pictures, mosaics=3)
    odd = dataclasses.replace(captioner.config.preprocessing, side_px=65)
    monkeypatch.setattr(
        type(captioner), "config", dataclasses.replace(captioner.config, preprocessing=odd), raising=True
    )
    with pytest.raises(ConfigError, match=r"even side.*65 px"):
        pointing(captioner, pictures)


def test_a_score_survives_its_way_through_json(tiny, pictures):
    score = pointing(tiny(), pictures, mosaics=4)
    assert PointingScore.from_dict(json.loads(json.dumps(score.to_dict()))) == score
