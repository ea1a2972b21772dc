"""Laws of `captioner.images`: whatever is handed over becomes an upright sRGB picture, or a clear error."""

import io
import os
import random
import re
import shutil
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner.errors import ConfigError, ImageReadError, ImageTooLargeError
from captioner.images import ImageLimits, Picture, open_picture, pixels_to_decode

FILES = pictures.files()
COLOUR_MODES = ["RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
PIL_MODES = [*COLOUR_MODES, "1", "L", "LA", "La", "P", "PA", "I", "F", "I;16", "I;16B"]
LOSSLESS = [
    "png",
    "apng",
    "webp-lossless",
    "webp-animated",
    "tiff",
    "tiff-lzw",
    "tiff-pages",
    "bmp",
    "bmp-alpha",
    "dib",
]


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def first_pixel(source, **options) -> tuple[int, int, int]:
    return open_picture(source, **options).image.getpixel((0, 0))


def message(source, error=ImageReadError, **options) -> str:
    with pytest.raises(error) as caught:
        open_picture(source, **options)
    text = str(caught.value)
    assert text.isprintable(), "one line that any terminal can show"
    return text


# --- Sources ---


def test_every_source_gives_the_same_picture(tmp_path):
    image = pictures.gradient()
    data = pictures.encode(image, "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    array = np.asarray(image)
    sources = {
        "str": str(path),
        "Path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "BytesIO": io.BytesIO(data),
        "PIL": image,
        "PIL file": Image.open(path),
        "array": array,
        "strided array": np.repeat(array, 2, axis=1)[:, ::2],
        "opaque array": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
    }
    with path.open("rb") as file:
        results = {kind: open_picture(source) for kind, source in {**sources, "file": file}.items()}
    for kind, picture in results.items():
        assert type(picture.image) is Image.Image, kind
        assert (picture.image.mode, picture.full_hw_px) == ("RGB", (40, 64)), kind
        assert picture.image.tobytes() == image.tobytes(), kind


def test_grey_array_is_grey():
    grey_HW = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (pixels(open_picture(grey_HW)) == grey_HW[..., None]).all()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (b"", "<bytes>"),
        (io.BytesIO(), "<file>"),
        (np.zeros((0, 1), np.uint8), "<array>"),
        (torch.zeros(3, 0, 1, dtype=torch.uint8), "<tensor>"),
        (Image.new("RGB", (0, 1)), "<image>"),
        ("nowhere.jpg", "nowhere.jpg"),
        (Path("nowhere.jpg"), "nowhere.jpg"),
        (None, "<nonetype>"),
        ("", "''"),
    ],
)
def test_message_begins_with_the_name(source, name):
    assert message(source).startswith(f"{name}: ")
    assert message(source, name="holiday").startswith("holiday: ")


def test_picture_has_the_path_as_its_name():
    assert open_picture(pictures.EXAMPLES[0]).name == str(pictures.EXAMPLES[0])
    with pictures.EXAMPLES[0].open("rb") as file:
        assert open_picture(file).name == str(pictures.EXAMPLES[0])


def test_file_object_is_read_from_its_position_and_left_open():
    file = io.BytesIO(b"head" + FILES["png"])
    file.seek(4)
    assert open_picture(file).full_hw_px == (40, 64)
    assert not file.closed
    assert "0 bytes" in message(file)


def test_short_reads_are_completed():
    class Trickle(io.RawIOBase):
        data = io.BytesIO(FILES["jpeg"])

        def read(self, size=-1):
            return self.data.read(min(size, 7))

    assert open_picture(Trickle()).full_hw_px == (40, 64)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (None, "NoneType is not a picture"),
        (3, "int is not a picture"),
        ([[0]], "list is not a picture"),
        (io.StringIO("text"), "text mode"),
        (np.zeros((4, 4, 3)), "float64; if its values are in"),
        (np.zeros((4, 4), bool), "got bool"),
        (np.zeros((4, 4), object), "got object"),
        (np.zeros((3, 4, 5), np.uint8), r"got \[3, 4, 5\]; give one picture .*channels last"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got \[1, 4, 4, 3\]"),
        (np.zeros(4, np.uint8), r"got \[4\]"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (torch.zeros(3, 4, 4), "torch.float32; if its values are in"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "channels first"),
        (torch.zeros(3, 4, 0, dtype=torch.uint8), "empty"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"), "cannot be read as a picture"),
        (Image.new("RGB", (3, 0)), "empty"),
    ],
)
def test_what_is_no_picture_is_said_to_be_none(source, fault):
    assert re.search(fault, message(source))


def test_failing_file_object_is_an_image_error():
    class Broken:
        def read(self, size):
            raise RuntimeError("line\nbreak")

    assert "RuntimeError" in message(Broken())
    closed = io.BytesIO(FILES["png"])
    closed.close()
    assert "closed" in message(closed)


def test_closed_pil_image_is_an_image_error(tmp_path):
    (path := tmp_path / "a.png").write_bytes(FILES["png"])
    image = Image.open(path)
    image.close()
    assert message(image).startswith(str(path))


@pytest.mark.parametrize("mode", PIL_MODES)
def test_pil_image_of_any_mode_is_read_and_never_modified(mode):
    start = pictures.gradient()
    if mode in ("La", "RGBa"):
        start = start.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    elif mode.startswith("I;16"):
        start = start.convert("I")
    image = start.convert(mode)
    if mode == "P":
        image.info["transparency"] = b"\0\x80"
    image.info["exif"] = pictures.exif(6).tobytes()
    before = (
        image.tobytes(),
        image.size,
        dict(image.info),
        image.getpalette("RGBA") if mode == "P" else None,
    )
    picture = open_picture(image)
    assert picture.full_hw_px == (64, 40)
    assert picture.image.info == {}
    assert not picture.image.getexif()
    if mode in COLOUR_MODES:
        upright = np.asarray(pictures.gradient().transpose(Image.Transpose.ROTATE_270))
        assert abs(pixels(picture) - upright).mean() < 4
    assert before == (image.tobytes(), image.size, dict(image.info), before[3] and image.getpalette("RGBA"))


def test_picture_shares_nothing_with_its_source():
    array = np.zeros((4, 4, 3), np.uint8)
    image = Image.new("RGB", (4, 4))
    from_array, from_image = open_picture(array), open_picture(image)
    array[:] = 255
    image.paste("white", (0, 0, 4, 4))
    assert pixels(from_array).max() == pixels(from_image).max() == 0


# --- Upright, first frame ---


@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("MPO", {"save_all": True, "append_images": [pictures.gradient()]}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"save_all": True, "append_images": [pictures.gradient()]}),
        ("AVIF", {"quality": 95, "speed": 10}),
    ],
)
def test_all_eight_orientations_give_one_picture(format_name, options):
    upright = pictures.gradient(128, 80)
    for orientation, turn in pictures.STORED_AS.items():
        stored = upright if turn is None else upright.transpose(turn)
        data = pictures.encode(stored, format_name, exif=pictures.exif(orientation), **options)
        for source in (data, Image.open(io.BytesIO(data))):
            picture = open_picture(source)
            assert picture.full_hw_px == (80, 128), orientation
            assert picture.image.size == (128, 80), orientation
            assert abs(pixels(picture) - np.asarray(upright)).mean() < 3, orientation


def test_heic_is_read_upright():
    heif = pytest.importorskip("pillow_heif")
    upright = pictures.gradient(128, 80)
    for orientation, turn in pictures.STORED_AS.items():
        stored = upright if turn is None else upright.transpose(turn)
        file = io.BytesIO()
        heif.from_pillow(stored).save(file, quality=95, exif=pictures.exif(orientation).tobytes())
        picture = open_picture(file.getvalue())
        assert picture.full_hw_px == (80, 128), orientation
        assert abs(pixels(picture) - np.asarray(upright)).mean() < 3, orientation


def test_heic_without_pillow_heif_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    header = struct.pack(">I", 24) + b"ftypmif1" + bytes(4) + b"mif1heic"
    assert "pip install captioner[heic]" in message(header)


def test_real_photos_are_the_same_however_they_are_stored():
    assert len(pictures.EXAMPLES) >= 4
    for path in pictures.EXAMPLES:
        upright = open_picture(path)
        assert upright.full_hw_px == (upright.image.height, upright.image.width)
        assert np.asarray(upright.image).std() > 20
        for orientation, turn in pictures.STORED_AS.items():
            stored = upright.image if turn is None else upright.image.transpose(turn)
            data = pictures.encode(stored, "PNG", compress_level=0, exif=pictures.exif(orientation))
            assert open_picture(data).image.tobytes() == upright.image.tobytes(), (path, orientation)


def test_one_example_is_stored_turned():
    orientations = [Image.open(path).getexif().get(0x0112, 1) for path in pictures.EXAMPLES]
    assert any(orientation != 1 for orientation in orientations)


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*", b"junk" * 9])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_costs_only_the_orientation(block, format_name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = pictures.encode(pictures.gradient(), format_name, exif=block)
        assert open_picture(data).full_hw_px == (40, 64)


@pytest.mark.parametrize("name", ["apng", "gif-animated", "webp-animated", "tiff-pages", "mpo"])
def test_first_frame_of_many_is_taken(name):
    assert abs(pixels(open_picture(FILES[name])) - np.asarray(pictures.gradient())).mean() < 6


# --- Colours ---


@pytest.mark.parametrize("name", FILES)
def test_every_format_shows_the_picture(name):
    picture = open_picture(FILES[name])
    expected = np.asarray(pictures.gradient()).astype(int)
    if name in ("jpeg-grey", "png-16", "tiff-float", "tiff-int"):
        expected = np.repeat(np.asarray(pictures.gradient().getchannel("R"))[..., None], 3, axis=2).astype(int)
    if name == "png-palette":
        reference = Image.open(io.BytesIO(FILES[name])).convert("RGBA")
        white = Image.new("RGBA", reference.size, "white")
        expected = np.asarray(Image.alpha_composite(white, reference).convert("RGB")).astype(int)
    assert picture.full_hw_px == (40, 64)
    assert abs(pixels(picture) - expected).mean() < (1 if name in LOSSLESS else 6)


def test_alpha_is_laid_over_white():
    half = np.full((1, 1, 4), (200, 0, 0, 128), np.uint8)
    over_white = (227, 127, 127)
    assert first_pixel(half) == over_white
    assert first_pixel(pictures.encode(Image.fromarray(half), "PNG")) == over_white
    assert first_pixel(Image.fromarray(half).convert("RGBa")) == over_white
    assert first_pixel(Image.fromarray(np.array([[[0, 127]]], np.uint8))) == (128, 128, 128)  # mode LA
    assert first_pixel(Image.fromarray(half).convert("PA")) == over_white


def test_transparency_of_palettes_and_keys_is_laid_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for transparency in (0, b"\0"):
        picture = open_picture(pictures.encode(image, "PNG", transparency=transparency))
        assert [picture.image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]
    for mode, colour in (("RGB", (9, 8, 7)), ("L", 9), ("1", 0)):
        data = pictures.encode(Image.new(mode, (1, 1), colour), "PNG", transparency=colour)
        assert first_pixel(data) == (255,) * 3, mode
    key = pictures.png_chunk(b"tRNS", struct.pack(">H", 1000))
    assert first_pixel(pictures.png((1, 1), 16, 0, b"\0" + struct.pack(">H", 1000), key)) == (255,) * 3
    assert first_pixel(pictures.encode(Image.new("P", (1, 1)), "GIF", transparency=0)) == (255,) * 3


def test_profile_is_applied():
    image = Image.new("RGB", (4, 4), (200, 0, 0))
    for format_name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        options = {"quality": 100} if format_name != "PNG" else {}
        data = pictures.encode(image, format_name, icc_profile=pictures.red_is_green_profile(), **options)
        red, green, blue = first_pixel(data)
        assert green > 190, format_name
        assert red < 15, format_name
        assert blue < 15, format_name


def test_profile_is_applied_under_alpha():
    image = Image.new("RGBA", (1, 1), (200, 0, 0, 255))
    data = pictures.encode(image, "PNG", icc_profile=pictures.red_is_green_profile())
    assert abs(np.subtract(first_pixel(data), (0, 200, 0))).max() <= 2


def test_grey_profile_is_applied():
    grey = Image.new("L", (1, 1), 55)  # 55 / 255 of the light is 128 in sRGB (IEC 61966-2-1)
    data = pictures.encode(grey, "PNG", icc_profile=pictures.linear_grey_profile())
    assert abs(np.subtract(first_pixel(data), 128)).max() <= 1
    data = pictures.encode(grey.convert("LA"), "PNG", icc_profile=pictures.linear_grey_profile())
    assert abs(np.subtract(first_pixel(data), 128)).max() <= 1


def test_srgb_profile_changes_nothing():
    plain, tagged = (
        pictures.encode(pictures.gradient(), "PNG", icc_profile=profile) for profile in (None, pictures.srgb_profile())
    )
    assert abs(pixels(open_picture(plain)) - pixels(open_picture(tagged))).max() <= 1


@pytest.mark.parametrize(
    "profile", [b"junk", b"\0" * 200, pictures.srgb_profile()[:300], pictures.linear_grey_profile()]
)
def test_broken_or_foreign_profile_is_ignored(profile):
    data = pictures.encode(pictures.gradient(), "PNG", icc_profile=profile)
    assert open_picture(data).image.tobytes() == pictures.gradient().tobytes()


def test_cmyk_comes_out_right():
    inks = {
        (0, 255, 255, 0): (255, 0, 0),
        (255, 0, 255, 0): (0, 255, 0),
        (0, 0, 0, 0): (255, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
    }
    for cmyk, rgb in inks.items():
        image = Image.new("CMYK", (8, 8), cmyk)
        jpeg = pictures.encode(image, "JPEG", quality=100)
        assert b"Adobe" in jpeg, "libjpeg marks it, and Adobe's CMYK is stored inverted"
        for data in (jpeg, pictures.encode(image, "TIFF"), image):
            assert abs(np.subtract(first_pixel(data), rgb)).max() <= 3, cmyk


def test_cmyk_profile_is_applied():
    for black, light in ((0, 0), (255, 255)):
        image = Image.new("CMYK", (8, 8), (0, 0, 0, black))
        data = pictures.encode(image, "JPEG", quality=100, icc_profile=pictures.negative_cmyk_profile())
        assert abs(np.subtract(first_pixel(data), light)).max() <= 3


def test_lab_is_read():
    data = pictures.encode(pictures.gradient().convert("LAB"), "TIFF")
    assert abs(pixels(open_picture(data)) - np.asarray(pictures.gradient())).mean() < 3


# --- More than 8 bits ---


def test_16_bit_grey_is_scaled_not_clipped():
    values_HW = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    expected_HW = np.round(values_HW / 257).astype(int)
    for data in (
        pictures.encode(Image.fromarray(values_HW), "PNG"),
        pictures.encode(Image.fromarray(values_HW), "TIFF"),
        pictures.encode(Image.fromarray(values_HW.astype(">u2")), "TIFF"),
    ):
        assert (pixels(open_picture(data)) == expected_HW[..., None]).all()


def test_16_bit_colour_is_scaled():
    rows = b"\0" + struct.pack(">3H", 65535, 32896, 0)
    assert first_pixel(pictures.png((1, 1), 16, 2, rows)) == (255, 128, 0)


def test_12_bit_and_inverted_tiff_are_scaled():
    pair = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048
    picture = open_picture(pictures.tiff_grey((2, 1), 12, 1, pair))
    assert [picture.image.getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]
    assert first_pixel(pictures.tiff_grey((1, 1), 16, 0, b"\0\0")) == (255, 255, 255)
    assert first_pixel(pictures.tiff_grey((1, 1), 16, 0, b"\xff\xff")) == (0, 0, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 5e5, 1e6], [0, 128, 255]),
        ([np.nan, np.inf, 1.0], [0, 255, 255]),
        ([-np.inf, np.nan, np.inf], [0, 0, 255]),
        ([-3.0, -3.0, -3.0], [0, 0, 0]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
    ],
)
def test_float_samples_are_scaled_by_the_smallest_customary_range(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (image, pictures.encode(image, "TIFF")):
            assert pixels(open_picture(source))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 7, 255], [0, 7, 255]), ([0, 257, 65535], [0, 1, 255]), ([-(2**31), 0, 2**31 - 1], [0, 128, 255])],
)
def test_32_bit_samples_are_scaled_by_the_smallest_customary_range(values, expected):
    image = Image.fromarray(np.array([values], np.int32))
    for source in (image, pictures.encode(image, "TIFF")):
        assert pixels(open_picture(source))[0, :, 0].tolist() == expected


# --- Reduced scale ---


def test_large_jpeg_is_decoded_at_reduced_scale_and_looks_the_same():
    photo = Image.open(pictures.EXAMPLES[0]).convert("RGB").resize((2400, 1800), Image.Resampling.BICUBIC)
    data = pictures.encode(photo, "JPEG", quality=90, exif=pictures.exif(1))
    full, reduced = open_picture(data), open_picture(data, side_px=224)
    assert full.image.size == (2400, 1800)
    assert reduced.full_hw_px == full.full_hw_px == (1800, 2400)
    assert reduced.image.size == (300, 225)
    small = [np.asarray(p.image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int) for p in (full, reduced)]
    assert abs(small[0] - small[1]).mean() < 1.5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 200), st.sampled_from([1, 6]))
def test_reduced_scale_keeps_both_sides_as_long_as_needed(width, height, side, orientation):
    data = pictures.encode(Image.new("L", (width, height)), "JPEG", exif=pictures.exif(orientation))
    picture = open_picture(data, side_px=side)
    full_hw = (height, width) if orientation == 1 else (width, height)
    assert picture.full_hw_px == full_hw
    for length, full in zip(picture.image.size[::-1], full_hw, strict=True):
        assert min(side, full) <= length <= full


@pytest.mark.parametrize("side_px", [0, -1, 2.5, True, "224"])
def test_side_must_be_a_count(side_px):
    with pytest.raises(ConfigError, match="side_px"):
        open_picture(FILES["jpeg"], side_px=side_px)


# --- Limits ---


@pytest.mark.parametrize("field", ["max_pixels", "max_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "9"])
def test_limits_check_themselves(field, value):
    with pytest.raises(ConfigError, match=rf"{field} must be .*got {value!r}"):
        ImageLimits(**{field: value})


@pytest.mark.parametrize("name", FILES)
def test_pixel_limit_is_ours_not_pillows(name, monkeypatch):
    exact, below = ImageLimits(max_pixels=40 * 64), ImageLimits(max_pixels=40 * 64 - 1)
    assert re.search("64 x 40 pixels.*limit of 2559", message(FILES[name], ImageTooLargeError, limits=below))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name != "gif-animated":  # Pillow checks a frame that it will dispose of against its own limit
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        assert open_picture(FILES[name], limits=exact).full_hw_px == (40, 64)


def test_pixel_limit_holds_for_images_arrays_and_tensors():
    below = ImageLimits(max_pixels=15)
    for source in (
        Image.new("RGB", (4, 4)),
        np.zeros((4, 4, 3), np.uint8),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
    ):
        assert "limit of 15 pixels" in message(source, ImageTooLargeError, limits=below)


@pytest.fixture
def little_memory():
    """Let the process grow by no more than 256 MiB."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know the memory in use")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", pictures.claiming(60000))
def test_claimed_size_is_refused_before_memory_is_taken(name, little_memory):
    data = pictures.claiming(60000)[name]
    assert len(data) < 10_000
    message(data, ImageTooLargeError)
    message(data, ImageTooLargeError, side_px=224)


def test_compressed_metadata_cannot_fill_the_memory(little_memory):
    bomb = zlib.compress(bytes(2**24)) * 20
    for chunk in (
        pictures.png_chunk(b"zTXt", b"key\0\0" + bomb),
        pictures.png_chunk(b"iTXt", b"key\0\1\0\0\0" + bomb),
        pictures.png_chunk(b"iCCP", b"key\0\0" + bomb),
    ):
        message(pictures.png((1, 1), 8, 0, b"\0\0", chunk))


def test_byte_limit_is_checked_before_reading(tmp_path, monkeypatch):
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(2**30)  # sparse
    monkeypatch.delattr(Path, "open")
    assert "limit of 104857600 bytes" in message(path, ImageTooLargeError)


def test_no_more_than_the_byte_limit_is_read():
    class Endless:
        given = 0

        def read(self, size):
            self.given += size
            return bytes(size)

    source = Endless()
    message(source, ImageTooLargeError, limits=ImageLimits(max_bytes=3_000_000))
    assert source.given == 3_000_001
    message(bytes(11), ImageTooLargeError, limits=ImageLimits(max_bytes=10))
    exact = ImageLimits(max_bytes=len(FILES["png"]))
    assert open_picture(io.BytesIO(FILES["png"]), limits=exact).full_hw_px == (40, 64)


def test_extreme_shapes_are_pictures():
    for size in ((100_000, 1), (1, 100_000)):
        picture = open_picture(pictures.encode(Image.new("L", size), "PNG"), side_px=224)
        assert picture.full_hw_px == size[::-1]
    assert open_picture(pictures.encode(Image.new("L", (60_000, 1)), "JPEG"), side_px=224).full_hw_px == (
        1,
        60_000,
    )


# --- Failures ---


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "0 bytes"),
        (b"hello world", "a text file"),
        ("Grüße, 猫".encode()[:-1], "a text file"),
        (b" \n\t", "a text file"),
        (b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is a drawing"),
        (b"\xef\xbb\xbf <SVG width='3'>", "convert it to PNG"),
        (b"<!DOCTYPE html><p>not found <svg>", "a web page"),
        (b"%PDF-1.7 \x00\xff", "a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (struct.pack(">I", 20) + b"ftypisom" + bytes(8), "a video"),
        (b"\x00\x00\x01\x00\x01\x00", "unknown format"),  # ICO is not on the list
        (b"8BPS\x00\x01\xff\xff", "unknown format"),  # nor is PSD
        (b"\xff\xd8\xff", "JPEG file is damaged"),
        (b"\x89PNG\r\n\x1a\n", "PNG file is damaged"),
        (b"II*\0", "TIFF file is damaged"),
        (b"GIF89a", "GIF file is damaged"),
        (b"BM", "BMP file is damaged"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP file is damaged"),
        (b"\0\0\0\x14ftypavif\0\0\0\0avif", "AVIF file is damaged"),
        (b"\0\0\0\x14ftypheic\0\0\0\0heic", "HEIC"),
    ],
)
def test_what_the_bytes_are_is_said(data, fault):
    assert fault in message(data)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
def test_an_archive_is_called_one(kind, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    path = Path(shutil.make_archive(str(tmp_path / "archive"), kind, folder))
    assert "an archive, not a picture; name it as a source of its own" in message(path.read_bytes())


@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_refused_or_whole(name):
    data, whole = FILES[name], open_picture(FILES[name]).image.tobytes()
    cuts = random.Random(name).sample(range(len(data)), 40)
    for cut in (*cuts, len(data) // 2, len(data) - 30):
        try:
            picture = open_picture(data[:cut])
        except ImageReadError:
            continue
        assert picture.image.tobytes() == whole, cut
    if "animated" not in name and name not in ("apng", "mpo", "tiff-pages"):
        message(data[: len(data) // 2])


def test_truncated_real_photo_is_refused():
    data = pictures.EXAMPLES[0].read_bytes()
    for cut in range(0, len(data) - 2, len(data) // 23):
        for side_px in (None, 32):
            message(data[:cut], side_px=side_px)


def test_error_is_chained_to_its_cause(tmp_path):
    with pytest.raises(ImageReadError) as caught:
        open_picture(FILES["jpeg"][:400])
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ImageReadError) as caught:
        open_picture(tmp_path / "nowhere.jpg")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_folder_and_missing_file_are_named(tmp_path):
    assert message(tmp_path) == f"{tmp_path}: a folder, not a picture; give the files in it"
    assert message(tmp_path / "no.jpg") == f"{tmp_path / 'no.jpg'}: no such file; check the path"
    (tmp_path / "a.jpg").write_bytes(FILES["jpeg"])
    assert "cannot be read" in message(tmp_path / "a.jpg" / "b.jpg")


@pytest.mark.parametrize(
    "url", ["http://a.b/c.jpg", "https://a.b/c?d=e", "s3://bucket/key", "data:image/png;base64," + "A" * 9999]
)
def test_url_is_not_fetched(url):
    text = message(url)
    assert "download it first" in text
    assert len(text) < 500


@pytest.mark.parametrize(
    "name", ["nul\0byte.jpg", "\ud800.jpg", "new\nline.jpg", "bell\a.jpg", "caf\udce9.jpg", "x" * 9999]
)
def test_impossible_and_odd_names_are_clear_errors(name, tmp_path):
    text = message(str(tmp_path / "") + "/" + name)
    text.encode("utf-8")


def test_odd_names_of_real_files_are_read(tmp_path):
    for name in ("new\nline.jpg", "caf\udce9.jpg", "ünïcödé 猫.jpg", "no extension", "wrong.txt"):
        path = tmp_path / name
        try:
            path.write_bytes(FILES["jpeg"])
        except (OSError, UnicodeError):
            continue  # not a name that this file system allows
        assert open_picture(str(path)).name == str(path)


def test_missing_permission_is_named(monkeypatch, tmp_path):
    (path := tmp_path / "a.jpg").write_bytes(FILES["jpeg"])

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "no permission" in message(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_and_devices_never_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        assert "pipe, device or socket" in message(path)


def test_no_memory_is_an_image_error(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    assert "not enough memory" in message(Image.new("RGB", (1, 1)))


# --- Threads and warnings ---


def test_threads_open_pictures_without_a_warning_or_a_trace_of_one():
    bad_exif = pictures.encode(pictures.gradient(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0" + b"\xff" * 40)
    failures = []

    def work():
        for _ in range(20):
            if open_picture(bad_exif).full_hw_px != (40, 64):
                failures.append("another picture")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(bad_exif)).getexif().get(0x0112)
        assert caught, "Pillow itself warns about this file"
        caught.clear()
        before = list(warnings.filters)
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not caught
        assert not failures
        assert list(warnings.filters) == before


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF"])
def test_the_pixels_to_decode_are_known_from_the_head(tmp_path, format_name):
    data = pictures.encode(pictures.gradient(), format_name)
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, str(path), path):
        assert pixels_to_decode(source) == 64 * 40
        assert pixels_to_decode(source, limits=ImageLimits(max_pixels=100)) == 100
        assert pixels_to_decode(source, side_px=20) == 64 * 40 // (4 if format_name == "JPEG" else 1)
        assert pixels_to_decode(source, side_px=21) == 64 * 40


def test_where_the_pixels_are_not_known_they_are_as_many_as_may_be_and_of_no_picture_one(tmp_path):
    limits = ImageLimits(max_pixels=1000)
    assert pixels_to_decode(pictures.encode(pictures.gradient(), "AVIF"), limits=limits) == 1000
    assert pixels_to_decode(io.BytesIO(pictures.encode(pictures.gradient(), "PNG")), limits=limits) == 1000
    for nothing in (
        b"",
        b"no picture",
        b"\x89PNG\r\n\x1a\n cut off",
        tmp_path,
        tmp_path / "absent",
        pictures.gradient(),
        None,
    ):
        assert pixels_to_decode(nothing, limits=limits) == 1
