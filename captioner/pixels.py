"""A decoded picture → upright 8-bit sRGB over white: orientation, transparency, colour profiles, wide grey samples."""

from __future__ import annotations

import contextlib
import io
from typing import cast

import numpy as np
from PIL import ExifTags, Image, ImageCms

from captioner.errors import ImageReadError

_CHUNK = 2**20  # samples

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.32, tag 0x0112 Orientation: what turns each upright


def finished(
    image: Image.Image, full_wh_px: tuple[int, int], *, owned: bool = False
) -> tuple[Image.Image, tuple[int, int]]:
    """Return a decoded picture in RGB, sRGB, upright, and its full height and width.

    Args:
        image: of any mode that Pillow reads; loaded here, where that was not done.
        full_wh_px: width and height as the file states them: a JPEG may have been decoded smaller.
        owned: it is ours alone and needed no more, so that its pixels may become the picture's.

    Returns:
        The picture, a copy that shares nothing with `image` unless that is `owned`, and height and width in pixels.

    Raises:
        ImageReadError: for a picture without pixels.
    """
    if 0 in image.size:
        raise ImageReadError(f"the picture is empty, {image.size}; give at least one pixel")
    image.load()
    orientation = _orientation(image)
    as_it_is = owned and image.mode == "RGB" and not image.has_transparency_data and "icc_profile" not in image.info
    # Pillow's own way to a plain picture over the same pixels: to copy them takes longer than to decode some of them.
    picture = image._new(image.im) if as_it_is else _over_white(image)
    picture.info.clear()  # It describes the file: its profile and its orientation hold no more.
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    width_px, height_px = full_wh_px
    return picture, (width_px, height_px) if orientation >= 5 else (height_px, width_px)


def _orientation(image: Image.Image) -> int:
    # A broken EXIF block says nothing about the pixels: it costs the orientation, not the picture. Pillow
    # turns a TIFF upright itself when it loads it, and drops the tag.
    with contextlib.suppress(Exception):
        value = image.getexif().get(ExifTags.Base.Orientation)
        if isinstance(value, int) and value in _UPRIGHT:
            return value
    return 1


def _over_white(image: Image.Image) -> Image.Image:
    """Return a copy in sRGB, its transparent parts laid over white."""
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_srgb(_grey_from_wide(image), profile)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode != "RGBA":
        # Pillow writes the transparency of a palette into the image that it converts.
        image = (image.copy() if image.mode == "P" else image).convert("RGBA")
    picture = Image.new("RGB", image.size, "white")
    colours = image.getchannel("R") if is_grey else image.convert("RGB")
    picture.paste(_to_srgb(colours, profile), (0, 0), image.getchannel("A"))
    return picture


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return a copy in sRGB."""
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    # A profile that is broken, or made for another kind of pixels, is ignored: the numbers are taken as sRGB
    # then, as they are for a picture without a profile.
    with contextlib.suppress(ImageCms.PyCMSError, OSError, TypeError, ValueError):
        if profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip().replace("GRAY", "L") == image.mode:
                srgb = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
                return cast("Image.Image", converted)
    return image.convert("RGB")


def _grey_from_wide(image: Image.Image) -> Image.Image:
    """Scale grey samples of more than 8 bits to 8.

    16-bit samples have a known full scale, 65535 (or fewer bits, where a TIFF says so). No format states one
    for 32-bit and float samples, so the smallest customary one that holds every sample is taken: 1, 255 or
    65535. Where a sample is negative or larger still, the least becomes black and the largest white. NaN
    becomes black.
    """
    values_HW = np.asarray(image)
    tiff_tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        full = 2 ** tiff_tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        grey_by_value = np.clip(np.arange(2**16) * (255 / full) + 0.5, 0, 255).astype(np.uint8)
        if tiff_tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero; Pillow leaves it so
            grey_by_value = 255 - grey_by_value
        grey_HW = grey_by_value[values_HW]
        if "transparency" in image.info:
            grey_HW[values_HW == image.info["transparency"]] = 255
        return Image.fromarray(grey_HW)
    finite_N = values_HW[np.isfinite(values_HW)]
    low, high = (float(finite_N.min()), float(finite_N.max())) if finite_N.size else (0.0, 0.0)
    if low >= 0 and high <= 65535:
        low, high = 0.0, next(full for full in (1.0, 255.0, 65535.0) if high <= full)
    scale = 255 / (high - low) if high > low else 0.0
    grey_HW = np.empty(values_HW.shape, np.uint8)
    with np.errstate(all="ignore"):
        for start in range(0, values_HW.size, _CHUNK):  # in float64, one part after the other to spare memory
            part = slice(start, start + _CHUNK)
            scaled = np.clip((values_HW.reshape(-1)[part].astype(np.float64) - low) * scale, 0, 255)
            grey_HW.reshape(-1)[part] = np.nan_to_num(scaled) + 0.5
    return Image.fromarray(grey_HW)
