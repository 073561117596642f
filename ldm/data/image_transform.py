"""From a picture file to the numbers a model trains on."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

INTERPOLATIONS: Final = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Resampling filters by the names that the YAML files use; ``linear`` and ``bilinear`` are the same."""

RESIZE_MODES: Final = ("squash", "center_crop")
"""Ways to bring a picture to its training size: stretch it, or cut out its middle square first."""

_EXIF_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT_MAX: Final = 65535

# What Pillow's decoders raise on damaged files, beside OSError.
_DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)

# value / 127.5 - 1 for the 256 values, rounded once: looking a value up is exact and faster than computing it.
_TO_UNIT_RANGE: Final = (np.arange(256) / 127.5 - 1.0).astype(np.float32)


def read_picture(path: str) -> Image.Image:
    """Read a picture file as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit values are scaled to 8 bit,
    floats are scaled from their own range, other modes (grey, palette, CMYK, ...) are converted, and of an
    animation the first frame is taken.

    Args:
        path: the file; its content decides the format, not its suffix.

    Returns:
        A loaded picture in mode RGB.

    Raises:
        OSError: the file cannot be read or decoded; says which file and why.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            return to_rgb(_upright(opened))
    except _DECODER_ERRORS as error:
        raise OSError(f"{path}: {describe_damage(error)}") from error


def describe_damage(error: BaseException) -> str:
    """Say in a few words why a picture could not be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture, or a damaged one (its format cannot be told)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except _DECODER_ERRORS:
        return image  # damaged camera data beside sound pixels: there is no orientation to apply
    transpose = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if transpose is None else image.transpose(transpose)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to RGB; transparency is laid on white.

    Args:
        image: a loaded picture.

    Returns:
        A picture in mode RGB and of the same size; the same object where it is RGB already.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_eight_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bit(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Scale one channel of 16-bit, 32-bit or float values to 0..255, rounding to nearest."""
    numbers = values.astype(np.float64)
    is_integer = np.issubdtype(values.dtype, np.integer)
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if is_integer and low >= 0 and high <= _SIXTEEN_BIT_MAX:
        low, high = 0.0, float(_SIXTEEN_BIT_MAX)  # 16-bit files may also open in a wider mode
    span = high - low if high > low else 1.0
    scaled = np.nan_to_num((numbers - low) / span, nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(scaled.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def resample_filter(interpolation: str) -> Image.Resampling:
    """Look a resampling filter up by its name.

    Args:
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        ValueError: another name.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation {interpolation!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[interpolation]


def resolve_resize_mode(resize_mode: str | None, center_crop: bool) -> str:
    """Settle on one resize mode from the two keys that name it.

    Args:
        resize_mode: one of ``RESIZE_MODES``, or None to go by ``center_crop``.
        center_crop: True is the older way to say ``resize_mode: center_crop``.

    Returns:
        One of ``RESIZE_MODES``.

    Raises:
        ValueError: an unknown mode, one that is not available yet, or two keys that contradict each other.
    """
    choices = " or ".join(RESIZE_MODES)
    if resize_mode is None:
        return "center_crop" if center_crop else "squash"
    if resize_mode == "bucket":
        raise ValueError(f"resize_mode 'bucket' is not available yet; choose {choices}")
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode {resize_mode!r} is unknown; choose {choices}")
    if center_crop and resize_mode != "center_crop":
        raise ValueError(f"resize_mode {resize_mode!r} contradicts center_crop True; give only one of the two")
    return resize_mode


def crop_center_square(image: Image.Image) -> Image.Image:
    """Cut the largest square out of a picture's middle."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_training_array(
    image: Image.Image, size: int | None, resize_mode: str, resample: Image.Resampling, flip: bool
) -> npt.NDArray[np.float32]:
    """Bring an RGB picture to its training size and range.

    Args:
        image: a picture in mode RGB.
        size: side of the square result in pixels; None keeps the picture's own size.
        resize_mode: one of ``RESIZE_MODES``.
        resample: the filter to resize with.
        flip: mirror left to right.

    Returns:
        float32 (H, W, 3), value / 127.5 - 1, so in [-1, 1].
    """
    if resize_mode == "center_crop":
        image = crop_center_square(image)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), resample=resample)
    pixels = np.asarray(image)
    return _TO_UNIT_RANGE[pixels[:, ::-1] if flip else pixels]


def find_broken_pictures(paths: Sequence[str], threads: int | None = None) -> dict[str, str]:
    """Decode every picture once, and tell which cannot be trained on.

    Args:
        paths: picture files; one that is named twice is decoded once.
        threads: how many are decoded at a time (decoding runs beside Python); None: one for each processor core.

    Returns:
        The reason for each broken picture, in the order of ``paths``.
    """
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(max_workers=threads or min(32, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(_damage, distinct))
    return {path: reason for path, reason in zip(distinct, reasons, strict=True) if reason is not None}


def _damage(path: str) -> str | None:
    try:
        read_picture(path)
    except OSError as error:
        return describe_damage(error.__cause__ or error)
    return None
