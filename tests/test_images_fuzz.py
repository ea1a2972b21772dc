"""Whatever the bytes: an ImageError or a picture, never anything else, and bounded memory."""

import sys

import pictures
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner.errors import ImageError
from captioner.images import ImageLimits, Picture, open_picture

FILES = pictures.files()
LIMITS = ImageLimits(max_pixels=2_000_000, max_bytes=2**20)
quick = settings(max_examples=300, deadline=None, derandomize=True)
names = st.sampled_from(sorted(FILES))
bytes_at = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Let the most memory ever used grow by no more than 512 MiB, over all the examples together."""
    if sys.platform != "linux":
        yield  # other systems count it in other units, or not at all
        return
    import resource

    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 2**19


def check(data: bytes, side_px: int | None = None) -> Image.Image | None:
    """Open the bytes; return the picture, or None where they were refused in the right way."""
    try:
        picture = open_picture(data, limits=LIMITS, side_px=side_px)
    except ImageError as err:
        text = str(err)
    else:
        check_picture(picture)
        return picture.image
    assert text.startswith("<bytes>: ")
    assert text.isprintable()
    assert "memory" not in text
    return None


def check_picture(picture: Picture) -> None:
    image = picture.image
    assert type(image) is Image.Image
    assert image.mode == "RGB"
    assert len(image.tobytes()) == 3 * image.width * image.height > 0
    height, width = picture.full_hw_px
    assert 0 < image.width <= width
    assert 0 < image.height <= height
    assert width * height <= LIMITS.max_pixels


@quick
@given(st.binary(max_size=300))
def test_random_bytes(data):
    check(data)


@quick
@given(names, st.integers(0, 40), st.binary(max_size=200))
def test_random_bytes_after_a_real_beginning(name, kept, data):
    check(FILES[name][:kept] + data)


@settings(quick, max_examples=800)
@given(names, st.lists(bytes_at, min_size=1, max_size=12), st.sampled_from([None, 8]))
def test_changed_bytes(name, changes, side_px):
    data = bytearray(FILES[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    check(bytes(data), side_px)


@settings(quick, max_examples=800)
@given(names, st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_headers(name, changes):
    data = bytearray(FILES[name])
    for place, value in changes:
        data[place % len(data)] = value
    check(bytes(data))


@quick
@given(names, names, st.floats(0, 1), st.floats(0, 1))
def test_spliced_files(first, second, end, start):
    check(FILES[first][: int(end * len(FILES[first]))] + FILES[second][int(start * len(FILES[second])) :])


@quick
@given(names, st.floats(0, 1, exclude_max=True))
def test_cut_files_are_refused_or_whole(name, end):
    image = check(FILES[name][: int(end * len(FILES[name]))])
    assert image is None or image.tobytes() == check(FILES[name]).tobytes()


@quick
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.binary(max_size=120), st.booleans())
@example("JPEG", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0", True)
def test_any_exif_block_leaves_a_picture(format_name, block, with_header):
    data = pictures.encode(pictures.gradient(8, 4), format_name, exif=b"Exif\0\0" * with_header + block or b"\0")
    assert sorted(check(data).size) == [4, 8]


@settings(quick, max_examples=120)
@given(
    st.sampled_from(
        [
            ("RGB", pictures.srgb_profile),
            ("L", pictures.linear_grey_profile),
            ("CMYK", pictures.negative_cmyk_profile),
        ]
    ),
    st.lists(bytes_at, max_size=12),
    st.none() | st.integers(1, 600),
)
def test_any_colour_profile_leaves_a_picture(kind, changes, kept):
    mode, make = kind
    profile = bytearray(make())
    for place, value in changes:
        profile[int(place * len(profile))] = value
    image = pictures.gradient(8, 4).convert(mode)
    assert check(pictures.encode(image, "TIFF", icc_profile=bytes(profile[:kept]))) is not None
