"""Laws of pictures that are prepared elsewhere: the captioner cannot tell them from those it prepares itself."""

import io
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from captions import assert_same, assert_same_words
from pictures import EXAMPLES
from PIL import Image

from captioner import Captioner, ConfigError, ImageError
from captioner.config import PreprocessingConfig
from captioner.images import open_picture
from captioner.prepared import FIGURE_SIDE_PX, PreparedPicture, prepare, prepare_side_by_side, side_to_open_px

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


def test_a_jpeg_little_short_of_twice_the_square_is_decoded_at_half_scale_and_looks_the_same():
    config = PreprocessingConfig(side_px=256)
    photo = Image.open(EXAMPLES[0]).convert("RGB").resize((640, 480), Image.Resampling.BICUBIC)
    files = {name: io.BytesIO() for name in ("JPEG", "PNG")}
    photo.save(files["JPEG"], "JPEG", quality=95)
    Image.open(files["JPEG"]).save(files["PNG"], "PNG")
    assert open_picture(files["JPEG"].getvalue(), side_px=side_to_open_px(config)).image.size == (320, 240)
    half, whole = (prepare(files[name].getvalue(), config) for name in ("JPEG", "PNG"))
    assert half.picture_hw_px == whole.picture_hw_px == (480, 640)
    assert np.abs(half.pixels_u8.astype(int) - whole.pixels_u8).mean() < 1.5


# --- Side by side ---

CONFIG = PreprocessingConfig(side_px=32)


def attempt(source):
    return prepare(source, CONFIG)


def test_side_by_side_gives_what_one_after_the_other_gives_in_order(tmp_path):
    missing = tmp_path / "missing.jpg"
    sources = [*EXAMPLES, missing, *(path.read_bytes() for path in EXAMPLES), b"no picture", str(EXAMPLES[0])]
    found = list(prepare_side_by_side(sources, attempt, threads=3))
    assert [isinstance(item, ImageError) for item in found] == [
        source in (missing, b"no picture") for source in sources
    ]
    for source, item in zip(sources, found, strict=True):
        if isinstance(item, ImageError):
            with pytest.raises(type(item), match=re.escape(str(item))):
                attempt(source)
        else:
            assert np.array_equal(item.pixels_u8, attempt(source).pixels_u8)
    assert str(missing) in str(found[len(EXAMPLES)])


def test_only_paths_and_bytes_leave_the_callers_thread():
    threads = {}
    file = EXAMPLES[0].open("rb")

    def watched(source):
        threads.setdefault(type(source).__name__, set()).add(threading.get_ident())
        return attempt(source)

    with file, Image.open(EXAMPLES[1]) as image:
        sources = [EXAMPLES[0], file, EXAMPLES[1].read_bytes(), image, str(EXAMPLES[2]), np.zeros((9, 9, 3), np.uint8)]
        found = list(prepare_side_by_side(sources, watched, threads=2))
    assert all(isinstance(item, PreparedPicture) for item in found)
    here = threading.get_ident()
    assert {name for name, used in threads.items() if here in used} == {
        type(file).__name__,
        type(image).__name__,
        "ndarray",
    }


def test_what_is_no_fault_of_a_picture_comes_in_its_turn_and_ends_it():
    def failing(source):
        if source == b"other":
            raise ConfigError("of the whole run")
        return attempt(source)

    found = prepare_side_by_side([EXAMPLES[0], b"no picture", b"other", EXAMPLES[1]], failing, threads=2)
    assert isinstance(next(found), PreparedPicture)
    assert isinstance(next(found), ImageError)
    with pytest.raises(ConfigError, match="of the whole run"):
        next(found)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_decoded_on_as_many_threads_as_the_captioner_may_use(example_photos, threads, monkeypatch):
    captioner, used = Captioner.load(runtime="onnx", threads=threads), set()
    as_it_was = captioner.prepare

    def watched(picture):
        used.add(threading.get_ident())
        return as_it_was(picture)

    monkeypatch.setattr(captioner, "prepare", watched)
    for found, photo in zip(captioner.caption_batch(example_photos), example_photos, strict=True):
        assert_same(found, captioner.caption(as_it_was(photo)))
    assert used - {threading.get_ident()} if threads > 1 else used == {threading.get_ident()}
