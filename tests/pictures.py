"""Pictures, files and colour profiles made by hand for the tests of `captioner.images`."""

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.jpg"))

_TURN = Image.Transpose
STORED_AS = {  # what a camera does to an upright picture so that the EXIF orientation undoes it
    1: None,
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_90,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_270,
}


def gradient(width_px: int = 64, height_px: int = 40) -> Image.Image:
    """A smooth picture without any symmetry, every channel of another shape."""
    y_HW, x_HW = np.mgrid[:height_px, :width_px]
    x_HW, y_HW = x_HW / width_px, y_HW / height_px
    rgb_HW3 = np.stack([x_HW, y_HW**2, (x_HW + 2 * y_HW) / 3], axis=-1)
    return Image.fromarray((rgb_HW3 * 250).astype(np.uint8))


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if "append_images" in options:  # copies, because saving leaves its options in the images
        options["append_images"] = [frame.copy() for frame in options["append_images"]]
    image.copy().save(file, format_name, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "maker"
    return tags


def files() -> dict[str, bytes]:
    """One small file of every format, and of the kinds of it that are decoded differently."""
    image, animation = gradient(), {"save_all": True, "append_images": [gradient().rotate(180)]}
    grey = image.getchannel("R")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    tags = {"exif": exif(1), "icc_profile": srgb_profile()}
    made = {
        "jpeg": encode(image, "JPEG", quality=95, **tags),
        "jpeg-progressive": encode(image, "JPEG", quality=95, progressive=True),
        "jpeg-grey": encode(grey, "JPEG"),
        "jpeg-cmyk": encode(image.convert("CMYK"), "JPEG", quality=95),
        "mpo": encode(image, "MPO", quality=95, **animation),
        "png": encode(image, "PNG", **tags),
        "png-palette": encode(image.quantize(32), "PNG", transparency=b"\x00\x80\xff"),
        "png-16": encode(wide, "PNG"),
        "png-alpha": encode(image.convert("RGBA"), "PNG"),
        "apng": encode(image, "PNG", **animation),
        "gif": encode(image, "GIF"),
        "gif-animated": encode(image, "GIF", disposal=2, **animation),
        "webp": encode(image, "WEBP", quality=95, **tags),
        "webp-lossless": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "webp-animated": encode(image, "WEBP", lossless=True, **animation),
        "tiff": encode(image, "TIFF", **tags),
        "tiff-lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encode(image, "TIFF", compression="jpeg", quality=95),
        "tiff-pages": encode(image, "TIFF", compression="tiff_deflate", **animation),
        "tiff-float": encode(Image.fromarray(np.asarray(grey, np.float32)), "TIFF"),
        "tiff-int": encode(Image.fromarray(np.asarray(grey, np.int32)), "TIFF"),
        "bmp": encode(image, "BMP"),
        "bmp-palette": encode(image.quantize(200), "BMP"),
        "bmp-alpha": encode(image.convert("RGBA"), "BMP"),
        "avif": encode(image, "AVIF", quality=95, speed=10, **tags),
    }
    return made | {"dib": made["bmp"][14:]}


# --- Files by hand ---


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size_wh: tuple[int, int], depth: int, colour_type: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG: `rows` are raw, each after its filter byte; `extra` are chunks that come before the data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size_wh, depth, colour_type, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data


def tiff_grey(size_wh: tuple[int, int], bits: int, photometric: int, pixels: bytes) -> bytes:
    """An uncompressed grey TIFF of one strip, little-endian."""
    width, height = size_wh
    values = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        277: 1,
        278: height,
        279: len(pixels),
    }
    values[273] = 8 + 2 + 12 * (len(values) + 1) + 4  # where the pixels begin
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + pixels


def claiming(side_px: int) -> dict[str, bytes]:
    """Files of a few bytes whose headers claim a square of this side."""
    side_le, side_be = struct.pack("<H", side_px), struct.pack(">H", side_px)
    side_24 = struct.pack("<I", side_px - 1)[:3]
    webp_canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + side_24 * 2
    lossless = b"VP8L" + struct.pack("<IB", 8, 0x2F) + struct.pack("<I", 0x0FFFFFFF) + bytes(3)  # 16384 each
    lossy = b"VP8 " + struct.pack("<I", 10) + b"\x10\0\0\x9d\x01\x2a" + b"\xff\x3f\xff\x3f"  # 16383 each
    frame = b"," + bytes(4) + side_le * 2 + b"\0\x02\x02\x4c\x01\0;"
    jpeg_at = (jpeg := encode(gradient(), "JPEG")).index(b"\xff\xc0") + 5
    bmp = encode(gradient(), "BMP")
    return {
        "png": png((side_px, side_px), 8, 2, b"\0"),
        "gif": b"GIF89a" + side_le * 2 + b"\x80\0\0" + bytes(6) + frame,
        "gif-frame": b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + b"\x21\xf9\x04\x08\0\0\0\0" + frame,
        "tiff": tiff_grey((side_px, side_px), 8, 1, bytes(64)),
        "webp-extended": b"RIFF" + struct.pack("<I", 4 + len(webp_canvas)) + b"WEBP" + webp_canvas,
        "webp-lossless": b"RIFF" + struct.pack("<I", 4 + len(lossless)) + b"WEBP" + lossless,
        "webp-lossy": b"RIFF" + struct.pack("<I", 4 + len(lossy)) + b"WEBP" + lossy,
        "jpeg": jpeg[:jpeg_at] + side_be * 2 + jpeg[jpeg_at + 4 :],
        "bmp": bmp[:18] + struct.pack("<II", side_px, side_px) + bmp[26:],
    }


# --- Colour profiles ---


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def red_is_green_profile() -> bytes:
    """SRGB with its red and green colorants exchanged."""
    exchanged = srgb_profile().replace(b"rXYZ", b"tmp!", 1).replace(b"gXYZ", b"rXYZ", 1)
    return exchanged.replace(b"tmp!", b"gXYZ", 1)


def _profile(device_class: bytes, space: bytes, connection: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """An ICC profile, version 2.4 (ICC.1:2001-04, section 6)."""
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + d50, **tags}
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = b"lcms\x02\x40\0\0" + device_class + space + connection + bytes(12) + b"acsp" + bytes(28) + d50
    return struct.pack(">I", 128 + len(table) + len(body)) + head.ljust(124, b"\0") + table + body


def linear_grey_profile() -> bytes:
    """Grey samples that are proportional to light."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": b"curv" + bytes(8)})


def negative_cmyk_profile() -> bytes:
    """A press of which the black ink is white and the bare paper black; the other inks show nothing."""
    straight = bytes(range(256))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lab_by_ink = b"".join(bytes([255 * (inks & 1), 128, 128]) for inks in range(16))  # K varies fastest
    lookup = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + straight * 4 + lab_by_ink + straight * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lookup})
