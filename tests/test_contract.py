"""The public contract: its examples as they are written, and the types, shapes and units that it states."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from captions import assert_map, assert_same, everything
from PIL import Image

from captioner import Caption, Captioner, SearchOptions, Word

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """
from captioner import Captioner

captioner = Captioner.load()                  # the bundled model; or a folder, or a hub id "user/name"
caption = captioner.caption("photo.jpg", beam_size=5, n_best=3)
caption.text                                  # 'A black dog runs through the grass.'
caption.score                                 # mean log-probability per token, end token included
caption.words[2].text, caption.words[2].probability, caption.words[2].attention
caption.alternatives                          # the other n_best - 1, best first, no two with one text
batch = captioner.caption_batch(pictures, batch_size=32)  # any iterable -> iterator in order, bounded memory
stream = captioner.stream("photo.jpg")        # yields Word as it is found (greedy or sampling)
scored = captioner.score("photo.jpg", "A dog runs.")   # the Caption of a given sentence
figure = caption.figure()                     # matplotlib figure: the picture under each word's map
captioner.save("folder")
"""


@pytest.fixture(scope="module")
def contract(example_photos, tmp_path_factory):
    """The names that the examples of the contract define, run in a folder with photo.jpg."""
    folder = tmp_path_factory.mktemp("contract")
    shutil.copy(example_photos[0], folder / "photo.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = {"pictures": (folder / "photo.jpg" for _ in range(3)), "folder": folder / "folder"}
        exec(EXAMPLES, names)
        names["batch"] = list(names["batch"])
        names["stream"] = list(names["stream"])
        yield names


def test_a_caption_is_a_sentence_with_a_score(contract):
    caption = contract["caption"]
    assert isinstance(caption, Caption)
    assert isinstance(caption.text, str)
    assert caption.text[0].isupper()
    assert caption.text.endswith(".")
    assert str(caption) == caption.text
    assert isinstance(caption.score, float)


def test_the_score_is_the_mean_log_probability_with_the_end(contract):
    for caption in everything(contract["caption"]):
        probabilities = [word.probability for word in caption.words] + [caption.end_probability]
        assert caption.score == pytest.approx(np.log(probabilities).mean(), abs=1e-6)


def test_every_word_has_text_probability_and_a_map_over_the_picture(contract):
    rows_columns = contract["captioner"].model.encoder.grid_hw
    for caption in everything(contract["caption"]):
        assert isinstance(caption.words, tuple)
        assert " ".join(word.text for word in caption.words).replace(" '", "'") + "." == caption.text
        for word in caption.words:
            assert isinstance(word, Word)
            assert isinstance(word.probability, float)
            assert 0 < word.probability <= 1
            assert_map(word.attention, rows_columns)
            assert_map(word.attention_heads, rows_columns)
            assert word.attention_heads.ndim == 4


def test_alternatives_are_the_others_best_first_and_all_differ(contract):
    captions = everything(contract["caption"])
    assert len(captions) == 3
    assert len({caption.text for caption in captions}) == 3
    scores = [caption.score for caption in captions]
    assert scores == sorted(scores, reverse=True)
    assert all(caption.alternatives == () for caption in captions[1:])


def test_a_batch_gives_one_caption_per_picture(contract):
    assert len(contract["batch"]) == 3
    for caption in contract["batch"]:
        assert_same(caption, contract["batch"][0])


def test_a_stream_gives_words(contract):
    assert contract["stream"]
    assert all(isinstance(word, Word) for word in contract["stream"])


def test_a_given_sentence_is_scored_as_it_stands(contract):
    scored = contract["scored"]
    assert isinstance(scored, Caption)
    assert scored.text == "A dog runs."
    assert len(scored.words) == 3


def test_a_figure_belongs_to_matplotlib_and_can_be_saved(contract):
    from matplotlib.figure import Figure

    assert isinstance(contract["figure"], Figure)
    file = io.BytesIO()
    contract["figure"].savefig(file, format="png")
    assert Image.open(file).format == "PNG"


def test_a_saved_model_is_the_model(contract):
    again = Captioner.load(contract["folder"], device=str(contract["captioner"].device))
    assert_same(again.caption("photo.jpg", beam_size=5, n_best=3), contract["caption"])


def test_a_record_is_as_stated(contract):
    caption = contract["caption"]
    record = json.loads(json.dumps(caption.to_record("photo.jpg")))
    assert record == {
        "image": "photo.jpg",
        "caption": caption.text,
        "score": caption.score,
        "confidence": caption.confidence,
        "words": [{"word": word.text, "probability": word.probability} for word in caption.words],
        "alternatives": [{"caption": c.text, "score": c.score} for c in caption.alternatives],
        "error": None,
    }
    assert list(record) == ["image", "caption", "score", "confidence", "words", "alternatives", "error"]


def test_the_options_of_a_search_are_the_stated_ones():
    stated = (
        "method beam_size n_best min_words max_words length_penalty no_repeat_ngram must_include ban groups "
        "diversity temperature top_k top_p seed"
    )
    assert set(SearchOptions().to_dict()) == set(stated.split())


def rgb_array(path):
    return np.asarray(Image.open(path))


def opaque_array(path):
    rgb_HW3 = rgb_array(path)
    return np.concatenate([rgb_HW3, np.full((*rgb_HW3.shape[:2], 1), 255, np.uint8)], axis=2)


KINDS = {
    "a path as text": str,
    "a Path": Path,
    "bytes": Path.read_bytes,
    "a bytearray": lambda path: bytearray(path.read_bytes()),
    "a memoryview": lambda path: memoryview(path.read_bytes()),
    "a binary file": lambda path: path.open("rb"),
    "a BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "a PIL image": Image.open,
    "an array HW3": rgb_array,
    "an array HW4": opaque_array,
    "an array of other strides": lambda path: np.asfortranarray(rgb_array(path)),
    "a tensor 3HW": lambda path: torch.from_numpy(rgb_array(path).copy()).permute(2, 0, 1),
}


@pytest.fixture(scope="module")
def cat(example_photos):
    (path,) = (photo for photo in example_photos if photo.stem == "cat")
    return path


@pytest.fixture(scope="module")
def caption_of_cat(captioner, cat):
    return captioner.caption(cat, n_best=2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_gives_the_same_caption(captioner, cat, caption_of_cat, kind):
    assert_same(captioner.caption(KINDS[kind](cat), n_best=2), caption_of_cat)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_drawn_again_after_it_was_closed(tiny_captioner, cat, kind):
    picture = KINDS[kind](cat)
    caption = tiny_captioner.caption(picture, max_words=1)
    if hasattr(picture, "read"):
        picture.close()
    drawn = caption.figure().axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn, rgb_array(cat))  # it is smaller than a panel


def test_a_grey_array_is_a_grey_picture(captioner):
    grey_HW = (np.indices((90, 120)).sum(axis=0) % 256).astype(np.uint8)
    expected = captioner.caption(np.repeat(grey_HW[..., None], 3, axis=2))
    assert_same(captioner.caption(grey_HW), expected)


def test_a_relative_path_is_drawn_after_the_folder_changed(tiny_captioner, cat, tmp_path, monkeypatch):
    monkeypatch.chdir(cat.parent)
    caption = tiny_captioner.caption(cat.name, max_words=1)
    monkeypatch.chdir(tmp_path)
    assert caption.figure().axes[0].images


def test_the_python_of_the_readme_runs_as_written(example_photos, tmp_path, monkeypatch):
    shutil.copy(example_photos[0], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    _, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")
    code, fence, _ = rest.partition("```")
    assert fence
    exec(code, {"paths": ["photo.jpg"]})
    assert (tmp_path / "figure.png").is_file()
    assert (tmp_path / "folder" / "model.safetensors").is_file()
