"""Laws of augmentation: a function of its generator alone, that leaves captions true."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from captioner import ConfigError
from captioner.config import PreprocessingConfig
from captioner.prepared import side_to_open_px
from training.augmentation import Augmentation, augment, mirror_allowed, side_to_open_part_px

NOTHING = {"mirror": 0.0, "min_area": 1.0, "colour": 0.0}
EVERYTHING = {"mirror": 0.5, "min_area": 0.5, "colour": 0.5, "rand_augment": 2, "erase": 0.5}
settings_of_all_kinds = st.builds(
    Augmentation,
    mirror=st.floats(0, 1),
    min_area=st.floats(0.05, 1),
    colour=st.floats(0, 0.95),
    rand_augment=st.integers(1, 4),
    rand_augment_magnitude=st.none() | st.integers(0, 30),
    erase=st.floats(0, 1),
)


def picture(size_wh=(40, 30)):
    """A picture without symmetry."""
    across = Image.linear_gradient("L").rotate(90).resize(size_wh)
    down = Image.linear_gradient("L").resize(size_wh)
    return Image.merge("RGB", (across, down, ImageChops.invert(across)))


def changed(seed, image=None, **settings):
    image = picture() if image is None else image
    return augment(image, Augmentation(**NOTHING | settings), mirror=True, rng=random.Random(seed))


@pytest.mark.parametrize(
    ("captions", "allowed"),
    [
        (["A dog runs ."], True),
        (["A dog .", "A man on the left ."], False),
        (["He turns RIGHT ."], False),
        (["The leftmost boy ."], False),
        (["A bright light upright in the cleft ."], True),
        ([], True),
    ],
)
def test_a_picture_whose_captions_name_a_side_is_not_mirrored(captions, allowed):
    assert mirror_allowed(captions) is allowed


def test_a_mirrored_picture_is_the_mirror_image_and_only_where_allowed():
    image, always = picture(), Augmentation(**NOTHING | {"mirror": 1.0})
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert augment(image, always, mirror=True, rng=random.Random(0)).tobytes() == flipped.tobytes()
    assert augment(image, always, mirror=False, rng=random.Random(0)).tobytes() == image.tobytes()
    assert image.tobytes() != flipped.tobytes()


@given(settings_of_all_kinds, st.integers(0, 999), st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_an_augmented_picture_keeps_its_size_and_the_original_its_pixels(settings, seed, size_wh):
    image = picture(size_wh)
    before = image.tobytes()
    result = augment(image, settings, mirror=True, rng=random.Random(seed))
    assert (result.size, result.mode) == (size_wh, "RGB")
    assert image.tobytes() == before


@given(settings=settings_of_all_kinds, side_px=st.integers(32, 2000))
def test_the_smallest_part_of_what_is_opened_has_as_many_pixels_as_a_whole_picture(settings, side_px):
    config = PreprocessingConfig(side_px=side_px)
    whole_px, opened_px = side_to_open_px(config), side_to_open_part_px(config, settings)
    assert opened_px * settings.min_area**0.5 >= whole_px * (1 - 1e-9)
    assert (opened_px - 1) * settings.min_area**0.5 <= whole_px * (1 + 1e-9)
    assert side_to_open_part_px(config, None) == whole_px


@given(settings_of_all_kinds, st.integers(0, 999))
def test_the_same_generator_gives_the_same_picture_whatever_the_global_ones_do(settings, seed):
    results = []
    for disturbance in (1, 2):
        random.seed(disturbance)
        torch.manual_seed(disturbance)
        results.append(augment(picture(), settings, mirror=True, rng=random.Random(seed)).tobytes())
    assert results[0] == results[1]


def test_global_generators_are_left_as_they_were():
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    changed(0, **EVERYTHING)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("option", [{"min_area": 0.5}, {"colour": 0.5}, {"rand_augment": 2}, {"erase": 1.0}])
def test_each_change_alone_depends_on_the_generator(option):
    assert len({changed(seed, **option).tobytes() for seed in range(12)}) > 6
    assert changed(0).tobytes() == picture().tobytes()


def test_no_operation_of_rand_augment_mirrors():
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 32, 64))
    mirrored = 0
    for seed in range(200):
        result = changed(seed, image, rand_augment=1).convert("L").resize((2, 1), Image.Resampling.BOX)
        mirrored += result.getpixel((0, 0)) < result.getpixel((1, 0))
    assert mirrored == 0


def test_a_greater_magnitude_changes_more():
    def distance(magnitude):
        results = (changed(seed, rand_augment=1, rand_augment_magnitude=magnitude) for seed in range(150))
        return sum(sum(ImageChops.difference(picture(), result).convert("L").tobytes()) for result in results)

    assert distance(3) < distance(12) < distance(30)


def test_erasing_blanks_one_rectangle_of_the_stated_size():
    image = Image.new("RGB", (60, 60), "white")
    for seed in range(30):
        difference = ImageChops.difference(image, changed(seed, image, erase=1.0)).convert("L")
        left, top, right, bottom = difference.getbbox()
        area = (right - left) * (bottom - top)
        assert sum(value > 0 for value in difference.tobytes()) == area
        assert 0.01 * 60 * 60 < area < 0.36 * 60 * 60


def test_the_share_of_erased_pictures_is_the_probability():
    share = sum(changed(seed, erase=0.3).tobytes() != picture().tobytes() for seed in range(300)) / 300
    assert 0.2 < share < 0.4


@pytest.mark.parametrize(
    "wrong",
    [
        {"mirror": 1.1},
        {"min_area": 0.0},
        {"colour": -0.1},
        {"mirror": float("nan")},
        {"mirror": True},
        {"erase": 1.5},
        {"erase": "0.5"},
        {"rand_augment": -1},
        {"rand_augment": 2.0},
        {"rand_augment": 11},
        {"rand_augment_magnitude": 31, "rand_augment": 2},
        {"rand_augment_magnitude": 9},
    ],
)
def test_an_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Augmentation(**wrong)
