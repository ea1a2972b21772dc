"""Anything a user hands over → an upright sRGB picture, or a clear error.

    path, binary file, bytes ──bounded read──▶ bytes ──magic number──▶ decoder ──┐
    PIL.Image, uint8 array, uint8 tensor ────────────────────────────────────────┴──▶ sRGB over white, upright

Nothing is fetched, nothing of the caller's is changed or closed, and no setting of Pillow's is touched: the
limits are our own (`ImageLimits`) and are checked on the header, before any pixel is decoded.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from captioner.errors import ConfigError, ImageError, ImageReadError, ImageTooLargeError
from captioner.pixels import finished

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Source: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image"
    " | npt.NDArray[np.uint8] | torch.Tensor"
)
"""A path, the bytes of a file, a binary file object, a `PIL.Image`, a `uint8` numpy array `[H, W, 3]`,
`[H, W]` (grey) or `[H, W, 4]` (with alpha), or a `uint8` torch tensor `[3, H, W]`."""

_SOURCES = "a path, bytes, a binary file, a PIL.Image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]"
_FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
_CHUNK = 2**20
_HEAD_BYTES = 4096


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """How large a picture may be. Decoding takes up to about 20 bytes of memory per pixel.

    Args:
        max_pixels: the most pixels, height times width; more is refused before decoding.
        max_bytes: the most bytes of a file; no more than that is ever read.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 100 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_bytes"):
            value = getattr(self, name)
            if not _is_count(value):
                raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}")


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class Picture:
    """A picture as everything after this module sees it.

    Args:
        image: mode RGB, sRGB, upright, in memory and shared with nobody.
        name: the path as given, or "<bytes>", "<array>" and the like; for messages.
        full_hw_px: height and width, upright, at full resolution; `image` is smaller when it was decoded at
            reduced scale.
    """

    image: Image.Image
    name: str
    full_hw_px: tuple[int, int]


def open_picture(
    source: Source,
    *,
    name: str | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    side_px: int | None = None,
) -> Picture:
    """Open a picture: upright by its EXIF orientation, first frame, in sRGB, alpha laid over white.

    Samples of more than 8 bits are scaled, not clipped (`captioner.pixels`). A `PIL.Image` is taken at its
    current frame; a file object is read from its position to its end. Safe to call from many threads.

    Args:
        source: any of `Source`.
        name: what to call the picture; default: its path, or "<bytes>", "<array>" and the like.
        limits: of pixels and bytes.
        side_px: side of the square to which the caller will resize the picture. A JPEG that is much larger is
            decoded at reduced scale, both sides still at least this long. None decodes in full.

    Returns:
        The picture.

    Raises:
        ImageReadError: when the source is missing, unreadable, damaged or not a picture.
        ImageTooLargeError: when it exceeds a limit.
        ConfigError: when `side_px` is not a whole number, at least 1.
    """
    if side_px is not None and not _is_count(side_px):
        raise ConfigError(f"side_px must be a whole number, at least 1, got {side_px!r}")
    name = _default_name(source) if name is None else name
    label = _one_line(name) or "''"
    try:
        with _pillow_warnings_ignored():
            image, full_hw_px = _read(source, limits, side_px)
    except ImageReadError as err:
        raise ImageReadError(f"{label}: {err}") from err.__cause__
    except ImageTooLargeError as err:
        raise ImageTooLargeError(f"{label}: {err}") from err.__cause__
    except MemoryError as err:
        raise ImageReadError(f"{label}: not enough memory to decode it; make the picture smaller") from err
    except Image.DecompressionBombError as err:  # A frame of a GIF may be larger than its header says.
        raise ImageTooLargeError(f"{label}: more pixels than Pillow allows: {_one_line(str(err))}") from err
    except Exception as err:  # A user's file object or image may fail in its own ways.
        raise ImageReadError(f"{label}: cannot be read as a picture: {_one_line(repr(err))}") from err
    return Picture(image=image, name=name, full_hw_px=full_hw_px)


# --- Sources. Messages below lack the picture's name; `open_picture` puts it before them. ---


def _read(source: Any, limits: ImageLimits, side_px: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """Return the finished picture and its full height and width."""
    torch = sys.modules.get("torch")  # Where torch was never imported, nothing is a tensor.
    if isinstance(source, Image.Image):
        _check_pixels(source.size, limits)
        return finished(source, source.size)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if torch is not None and isinstance(source, torch.Tensor):
        return _from_tensor(source, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        _check_bytes(memoryview(source).nbytes, limits)
        return _decode(bytes(source), limits, side_px)
    if isinstance(source, str | os.PathLike):
        return _decode(_read_path(os.fsdecode(source), limits), limits, side_px)
    if hasattr(source, "read"):
        return _decode(_read_file(source, limits), limits, side_px)
    raise ImageReadError(f"{type(source).__name__} is not a picture; give {_SOURCES}")


def _default_name(source: Any) -> str:
    with contextlib.suppress(Exception):  # A foreign __fspath__ or name may fail; reading will say so.
        if isinstance(source, str | os.PathLike):
            return os.fsdecode(source)
        for attribute in ("name", "filename"):  # of a file object, of a PIL.Image that was opened from a path
            if isinstance(value := getattr(source, attribute, None), str) and value:
                return value
    if hasattr(source, "read"):
        return "<file>"
    kinds = {Image.Image: "<image>", np.ndarray: "<array>"}
    known = (name for kind, name in kinds.items() if isinstance(source, kind))
    return next(known, f"<{type(source).__name__.lower()}>")


def _check_pixels(size_wh_px: tuple[int, int], limits: ImageLimits) -> None:
    width_px, height_px = size_wh_px
    if width_px * height_px > limits.max_pixels:
        raise ImageTooLargeError(
            f"{width_px} x {height_px} pixels are more than the limit of {limits.max_pixels} pixels; "
            "make the picture smaller or raise max_pixels"
        )


def _check_bytes(size_bytes: int, limits: ImageLimits) -> None:
    if size_bytes > limits.max_bytes:
        raise ImageTooLargeError(
            f"the file is over the limit of {limits.max_bytes} bytes; make it smaller or raise max_bytes"
        )


def _read_path(path: str, limits: ImageLimits) -> bytes:
    if not path:
        raise ImageReadError("the file name is empty; give the path of a picture")
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageReadError("a folder, not a picture; give the files in it")
        if not stat.S_ISREG(status.st_mode):  # It may block for ever, or never end.
            raise ImageReadError("a pipe, device or socket, not a file; give the picture's bytes instead")
        _check_bytes(status.st_size, limits)
        with Path(path).open("rb") as file:
            return _read_file(file, limits)
    except (OSError, ValueError) as err:
        raise ImageReadError(_why_unreadable(path, err)) from err


def _why_unreadable(path: str, err: OSError | ValueError) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:", path):
        return "a URL, and nothing is fetched here; download it first and give the file"
    if isinstance(err, FileNotFoundError):
        return "no such file; check the path"
    if isinstance(err, PermissionError):
        return "no permission to read it; change the file's permissions"
    if isinstance(err, OSError):
        return f"cannot be read ({_one_line(err.strerror or str(err))}); check the path and the disk"
    # A NUL, or a surrogate that stands for no byte.
    return f"not a possible file name ({_one_line(str(err))}); check the path"


def _read_file(file: Any, limits: ImageLimits) -> bytes:
    chunks: list[bytes] = []
    size_bytes = 0
    while True:  # One read may return less than was asked for: sockets, archives.
        chunk = file.read(min(_CHUNK, limits.max_bytes + 1 - size_bytes))
        if isinstance(chunk, str):
            raise ImageReadError("the file is open in text mode; open it with mode 'rb'")
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise ImageReadError(f"its read() gave {type(chunk).__name__}, not bytes; give {_SOURCES}")
        if not chunk:
            return b"".join(chunks)
        chunks.append(bytes(chunk))
        size_bytes += len(chunks[-1])
        _check_bytes(size_bytes, limits)


_UINT8_REMEDY = "if its values are in [0, 1], multiply by 255, round and convert to uint8"


def _from_array(array: Any, limits: ImageLimits) -> tuple[Image.Image, tuple[int, int]]:
    if array.dtype != np.uint8:
        raise ImageReadError(f"expected a uint8 array, got {_one_line(str(array.dtype))}; {_UINT8_REMEDY}")
    shape = list(array.shape)
    if array.ndim != 2 and (array.ndim != 3 or shape[2] not in (3, 4)):
        remedy = "give one picture of 1, 3 or 4 channels, channels last"
        raise ImageReadError(f"expected an array [H, W, 3], [H, W] or [H, W, 4], got {shape}; {remedy}")
    if 0 in shape:
        raise ImageReadError(f"the array is empty, {shape}; give at least one pixel")
    _check_pixels((shape[1], shape[0]), limits)
    image = Image.fromarray(np.ascontiguousarray(array))
    return finished(image, image.size)


def _from_tensor(tensor: torch.Tensor, limits: ImageLimits) -> tuple[Image.Image, tuple[int, int]]:
    if str(tensor.dtype) != "torch.uint8":
        raise ImageReadError(f"expected a uint8 tensor, got {tensor.dtype}; {_UINT8_REMEDY}")
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        shape = list(tensor.shape)
        raise ImageReadError(f"expected a tensor [3, H, W], got {shape}; give one picture, channels first")
    return _from_array(tensor.detach().cpu().permute(1, 2, 0).numpy(), limits)


# --- Bytes ---


def pixels_to_decode(source: Source, *, limits: ImageLimits = DEFAULT_LIMITS, side_px: int | None = None) -> int:
    """Return how many pixels memory is needed for while a picture is opened, from its head alone.

    Args:
        source: any of `Source`.
        limits: of pixels; more are never decoded.
        side_px: as for `open_picture`.

    Returns:
        The pixels; 1 for what is no picture, or is decoded already.
    """
    try:
        if isinstance(source, bytes):
            size_wh_px, format_name = _head(io.BytesIO(source))
        elif isinstance(source, str | os.PathLike) and Path(source).is_file():
            with Path(source).open("rb") as file:
                size_wh_px, format_name = _head(file)
        else:
            return limits.max_pixels if hasattr(source, "read") else 1
    except Exception:  # as of damaged bytes: `open_picture` says what is wrong with it
        return 1
    if size_wh_px is None:
        return limits.max_pixels
    # A JPEG at reduced scale: libjpeg holds the coefficients of all pixels, and at most a quarter of the pixels.
    reduced = format_name == "JPEG" and side_px is not None and min(size_wh_px) >= 2 * side_px
    return max(1, min(size_wh_px[0] * size_wh_px[1], limits.max_pixels) // (4 if reduced else 1))


def _head(file: IO[bytes]) -> tuple[tuple[int, int] | None, str | None]:
    """Return width and height, unless all would have to be decoded for them, and the format."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    format_name = _format_of(head)
    if format_name == "WebP":
        return _webp_canvas_wh(head), format_name
    if format_name is None:
        return (1, 1), None
    return (None if format_name in ("AVIF", "HEIC") else _DECODERS[format_name](file).size), format_name


def _decode(data: bytes, limits: ImageLimits, side_px: int | None) -> tuple[Image.Image, tuple[int, int]]:
    format_name = _format_of(data)
    if not data:
        raise ImageReadError("0 bytes: an empty file, or one already read to its end; give the whole picture")
    if format_name is None:
        raise ImageReadError(_what_it_is(data))
    if format_name == "WebP":
        # libwebp reserves its canvas, twice, as soon as it has read the header: look into the header first.
        _check_pixels(_webp_canvas_wh(data), limits)
    try:
        image = _DECODERS[format_name](io.BytesIO(data))
        _check_pixels(image.size, limits)
        full_wh_px = image.size
        if side_px is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            # libjpeg decodes at 1/2, 1/4 or 1/8; Pillow never goes below the size that is asked for. Squares of 256 px
            # from photos of 640 x 480 differ by one level of 255 in the mean from those of the whole, at half the time.
            image.draft(None, (side_px, side_px))
        elif isinstance(image, TiffImagePlugin.TiffImageFile):
            # Pillow checks its own pixel limit where it makes this memory; ours has been checked.
            sideways = image.tag_v2.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            image.im = Image.new(image.mode, image.size[::-1] if sideways else image.size).im
        image.load()
        return finished(image, full_wh_px, owned=True)
    except (ImageError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception as err:  # Decoders raise nearly anything on damaged bytes.
        reason = _one_line(str(err)) or type(err).__name__
        message = f"the {format_name} file is damaged, incomplete or of a rare kind ({reason}); save it again"
        raise ImageReadError(message) from err


def _open_heic(file: IO[bytes]) -> ImageFile.ImageFile:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as err:
        raise ImageReadError("a HEIC picture needs pillow-heif: pip install captioner[heic]") from err
    return cast("ImageFile.ImageFile", HeifImageFile(file))  # type: ignore[no-untyped-call]


# The allow-list. The classes are called without `Image.open`, which would apply the global MAX_IMAGE_PIXELS.
# A multi-picture JPEG (MPO) is opened as what it begins with, a JPEG.
_DECODERS: dict[str, Callable[[IO[bytes]], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "DIB": BmpImagePlugin.DibImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "HEIC": _open_heic,
}
_MAGIC_NUMBERS = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM", "BMP"),
    (rb"[\x28\x6c\x7c]\0\0\0", "DIB"),  # a BMP without its file header; begins with the size of the next one
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def _format_of(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":  # ISO/IEC 14496-12: size, "ftyp", major brand, version, compatible brands
        end = min(int.from_bytes(data[:4], "big"), _HEAD_BYTES)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
        return "AVIF" if brands & _AVIF_BRANDS else "HEIC" if brands & _HEIC_BRANDS else None
    return next((name for magic, name in _MAGIC_NUMBERS if re.match(magic, data, re.DOTALL)), None)


def _webp_canvas_wh(data: bytes) -> tuple[int, int]:
    """Read the size of the canvas from the header (RFC 9649, sections 2.5 to 2.7)."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


_NOT_PICTURES = (
    (rb"<!doctype html|<html", "a web page (HTML), not a picture; download the picture itself"),
    (rb"<.*<svg|<svg", "SVG is a drawing, not a photo; convert it to PNG first"),
    (rb"%pdf", "a PDF document, not a picture; export the page as PNG or JPEG first"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the picture itself; run 'git lfs pull' first"),
    (
        rb"pk\x03\x04|\x1f\x8b|\xfd7zxz|bzh[1-9]|.{257}ustar",
        "an archive, not a picture; name it as a source of its own, or unpack it",
    ),
    (rb"....ftyp", "a video or unknown media file, not a picture; export a frame as JPEG or PNG first"),
)


def _what_it_is(data: bytes) -> str:
    """Name what was handed over instead of a picture, and what to do about it."""
    head = data[:_HEAD_BYTES]
    for pattern, message in _NOT_PICTURES:
        if re.match(rb"(?:\xef\xbb\xbf)?\s*(?:%s)" % pattern, head, re.DOTALL | re.IGNORECASE):
            return message
    with contextlib.suppress(UnicodeDecodeError):  # This decoder lets the last character be cut off.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        if all(character.isprintable() or character.isspace() for character in text):
            return f"a text file, not a picture; expected {_FORMATS}"
    return f"not a picture, or of an unknown format; expected {_FORMATS}"


# --- Messages and warnings ---


def _one_line(text: str) -> str:
    """Escape what does not print, such as line breaks and surrogates, and shorten a very long text."""
    text = text if len(text) <= 300 else f"{text[:200]}...{text[-80:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


_quiet_lock = threading.Lock()
_quiet_users = 0
_QUIET_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@contextlib.contextmanager
def _pillow_warnings_ignored() -> Iterator[None]:
    """Ignore Pillow's warnings about broken metadata, which say nothing about the pixels.

    `warnings.catch_warnings` is not safe with threads: one that leaves would restore the filters of another.
    This adds one filter, for the modules of Pillow alone, while any thread is inside, and then takes it out.
    """
    global _quiet_users  # noqa: PLW0603
    with _quiet_lock:
        _quiet_users += 1
        if _quiet_users == 1:
            cast("list[Any]", warnings.filters).insert(0, _QUIET_FILTER)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            while _quiet_users == 0 and _QUIET_FILTER in warnings.filters:
                cast("list[Any]", warnings.filters).remove(_QUIET_FILTER)
