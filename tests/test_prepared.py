"""Laws of pictures that are prepared elsewhere: the captioner cannot tell them from those it prepares itself."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from captions import assert_same, assert_same_words
from pictures import EXAMPLES
from PIL import Image

from captioner import ConfigError, ImageError
from captioner.config import PreprocessingConfig
from captioner.prepared import FIGURE_SIDE_PX, PreparedPicture, prepare

PHOTO = next(path for path in EXAMPLES if path.name == "cat.jpg")


def test_a_prepared_picture_is_captioned_scored_and_streamed_like_its_photo(captioner):
    prepared = pickle.loads(pickle.dumps(captioner.prepare(PHOTO)))
    direct = captioner.caption(PHOTO, n_best=2)
    assert_same(captioner.caption(prepared, n_best=2), direct)
    assert_same(captioner.score(prepared, direct.text), captioner.score(PHOTO, direct.text))
    assert_same_words(list(captioner.stream(prepared)), list(captioner.stream(PHOTO)))
    assert captioner.prepare(prepared) is prepared


def test_prepared_and_other_pictures_go_through_one_batch_in_order(captioner, example_photos):
    mixed = [captioner.prepare(p) if i % 2 else p for i, p in enumerate(example_photos)]
    for found, expected in zip(captioner.caption_batch(mixed), captioner.caption_batch(example_photos), strict=True):
        assert_same(found, expected)


def test_a_figure_is_drawn_from_a_prepared_picture_whose_source_was_kept(captioner):
    found = captioner.caption(prepare(PHOTO, captioner.config.preprocessing))
    assert len(found.figure().axes) > len(found.words)
    without = captioner.caption(prepare(PHOTO, captioner.config.preprocessing, keep_source=False))
    assert without.picture is None
    with pytest.raises(ConfigError, match="hand it over"):
        without.figure()


def test_what_an_owner_may_change_is_copied_small():
    array = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    kept = prepare(array, PreprocessingConfig(side_px=64)).source
    assert isinstance(kept, Image.Image)
    assert max(kept.size) == FIGURE_SIDE_PX
    data = bytearray(PHOTO.read_bytes())
    assert prepare(data, PreprocessingConfig(side_px=64)).source == bytes(data)
    assert prepare(io.BytesIO(data), PreprocessingConfig(side_px=64)).source == bytes(data)


def test_a_picture_prepared_for_another_side_is_refused_with_the_remedy(captioner):
    small = prepare(PHOTO, PreprocessingConfig(side_px=64), name="my cat")
    for use in (captioner.caption, captioner.prepare, lambda p: captioner.features([p])):
        with pytest.raises(ConfigError, match=r"my cat.*\[3, 64, 64\].*config.preprocessing"):
            use(small)


def test_the_name_given_is_the_name_in_the_error(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"^holiday: "):
        prepare(tmp_path / "bad.jpg", PreprocessingConfig(), name="holiday")


def test_preparing_needs_no_torch():
    """So that processes that only decode start fast and stay small."""
    program = (
        "import sys; from captioner.prepared import PreparedPicture, prepare;"
        "from captioner.config import PreprocessingConfig;"
        f"prepare({str(PHOTO)!r}, PreprocessingConfig());"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert PreparedPicture.__module__ == "captioner.prepared"
