"""From a picture file to the numbers a model trains on."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from ldm.data.picture_header import (
    DECODER_ERRORS,
    MAX_DECODE_BYTES,
    MAX_PIXELS,
    PictureHeader,
    PictureSource,
    count_scans,
    decode_bytes,
    describe_damage,
    map_in_threads,
    open_picture,
    read_header,
    read_headers,
    read_orientation,
    source_name,
    turns_itself,
    upright_size,
)

__all__ = [
    "CROPS",
    "DEFAULT_RESIZE_MODE",
    "INTERPOLATIONS",
    "RESIZE_MODES",
    "PictureHeader",
    "Placement",
    "crop_center_square",
    "describe_damage",
    "draft_scale",
    "enlargement",
    "find_broken_pictures",
    "place",
    "read_header",
    "read_headers",
    "read_picture",
    "read_training_bytes",
    "resample_filter",
    "resolve_resize_mode",
    "to_rgb",
    "to_training_array",
    "to_unit_range",
]

INTERPOLATIONS: Final = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Resampling filters by the names that the YAML files use; ``linear`` and ``bilinear`` are the same."""

RESIZE_MODES: Final = ("bucket", "squash", "center_crop")
"""Ways to bring a picture to its training size: cut out the most of it that has the training shape, stretch it,
or cut out its middle square."""

DEFAULT_RESIZE_MODE: Final = "bucket"
"""The resize mode where no key names one."""

CROPS: Final = ("center", "random", "jitter")
"""Where ``bucket`` cuts: out of the middle, anywhere, or close to the middle."""

JITTER: Final = 0.04
"""How far ``crop: jitter`` strays from the middle at most, as a share of the cut-out's side."""

_LEAST_TO_LOOK_AT: Final = 64  # pixels of the shorter side

# A JPEG decoded at reduced scale keeps this many times the training size in the part that is shown. On photographs the
# result then differs from a whole decoding's by 0.2 to 1.7 of 255 on average (41 to 55 dB).
_DRAFT_MARGIN: Final = 1.5

_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RIGHT_TO_LEFT: Final = (2, 3, 6, 7)  # orientations whose upright left edge is stored last
_BOTTOM_TO_TOP: Final = (3, 4, 7, 8)
_SIXTEEN_BIT_MAX: Final = 65535
_STRIP_PIXELS: Final = 1 << 22
_LARGE_BYTES: Final = 8_000_000
_MOST_PASSES: Final = 20 * MAX_PIXELS  # scans times pixels; encoders write about ten scans

# value / 127.5 - 1 for the 256 values, rounded once: looking a value up is exact and faster than computing it.
_TO_UNIT_RANGE: Final = (np.arange(256) / 127.5 - 1.0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which part of a picture is shown, how large, and whether mirrored.

    Attributes:
        size: the training width and height in pixels.
        box: left, top, right and bottom of the part, in pixels of the upright source picture.
        flip: whether the result is mirrored left to right.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    flip: bool


def place(
    source: tuple[int, int],
    size: tuple[int, int] | None,
    resize_mode: str,
    crop: str,
    draws: tuple[float, float],
    flip: bool,
) -> Placement:
    """Choose the part of a picture to train on.

    ``bucket`` takes the largest box of exactly the training shape: it has the picture's full width or its full
    height, and ``crop`` says where it lies along the other side. ``center_crop`` takes the middle square and
    ``squash`` the whole picture, whatever ``crop`` says.

    Args:
        source: width and height of the upright picture in pixels.
        size: training width and height in pixels; None: those of the part itself.
        resize_mode: one of ``RESIZE_MODES``.
        crop: one of ``CROPS``.
        draws: two uniform numbers in [0, 1): where the box lies across and down.
        flip: whether to mirror it.

    Returns:
        The placement.

    Raises:
        ValueError: an unknown ``resize_mode`` or ``crop``.
    """
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode {resize_mode!r} is unknown; choose one of {', '.join(RESIZE_MODES)}")
    if crop not in CROPS:
        raise ValueError(f"crop {crop!r} is unknown; choose one of {', '.join(CROPS)}")
    width, height = source
    if resize_mode == "center_crop":
        side = min(width, height)
        x, y = (width - side) // 2, (height - side) // 2
        return Placement(size or (side, side), (float(x), float(y), float(x + side), float(y + side)), flip)
    if resize_mode == "squash" or size is None:
        return Placement(size or source, (0.0, 0.0, float(width), float(height)), flip)
    # The side that limits the box is the one that the picture has less of; products of integers compare exactly.
    box_width = float(width) if width * size[1] <= height * size[0] else height * size[0] / size[1]
    box_height = float(height) if height * size[0] <= width * size[1] else width * size[1] / size[0]
    left, right = _span(width, box_width, crop, draws[0])
    top, bottom = _span(height, box_height, crop, draws[1])
    return Placement(size, (left, top, right, bottom), flip)


def _span(whole: int, part: float, crop: str, draw: float) -> tuple[float, float]:
    """Place a part of a side on it, so that it is as likely to lie some way left of the middle as right of it."""
    excess = max(0.0, whole - part)
    reach = excess / 2
    if crop == "center":
        reach = 0.0
    elif crop == "jitter":
        reach = min(reach, JITTER * part)
    start = min(max(excess / 2 + (2 * draw - 1) * reach, 0.0), excess)
    return start, min(start + part, float(whole))


def enlargement(placement: Placement) -> float:
    """Tell how much a placement enlarges a picture.

    Args:
        placement: from :func:`place`.

    Returns:
        Training pixels to a source pixel, along the side with more of them: above 1 the picture is upscaled.
    """
    left, top, right, bottom = placement.box
    return max(placement.size[0] / (right - left), placement.size[1] / (bottom - top))


def read_training_bytes(
    source: PictureSource, placement: Placement, resize_mode: str, resample: Image.Resampling
) -> npt.NDArray[np.uint8]:
    """Read the part of a picture that a placement names, at its training size.

    Where a JPEG holds far more pixels than are needed it is decoded at a half, a quarter or an eighth of its
    size, which is several times faster and keeps at least 1.5 times the training size in the part; not so in the
    mode ``squash``, whose numbers are the same as ever. The result is a function of the arguments and the file.

    Args:
        source: the picture file, or a stream that holds it.
        placement: from :func:`place`, for this picture's upright size.
        resize_mode: one of ``RESIZE_MODES``, the one that the placement was chosen for.
        resample: the filter to resize with.

    Returns:
        uint8 (height, width, 3), a new array.

    Raises:
        OSError: the file cannot be read or decoded, or is smaller than when it was placed; says which file and why.
    """
    try:
        with _open_to_decode(source) as opened:
            orientation = read_orientation(opened, source)
            full_size = upright_size(opened, orientation)
            if placement.box[2] > full_size[0] or placement.box[3] > full_size[1]:
                raise OSError(f"is {full_size[0]}x{full_size[1]} pixels now, less than when the data set was read")
            may_reduce = opened.format in ("JPEG", "MPO") and resize_mode != "squash"
            scale = draft_scale(placement) if may_reduce else 1
            if scale > 1:
                opened.draft(None, (opened.width // scale, opened.height // scale))
            picture = _load_upright(opened, orientation)
            box = placement.box if scale == 1 else _reduced_box(placement.box, full_size, scale, orientation)
            if resize_mode == "center_crop":
                # Nothing beyond the part's edges may enter, as when it is cut out first.
                left, top = math.floor(box[0]), math.floor(box[1])
                picture = picture.crop((left, top, math.ceil(box[2]), math.ceil(box[3])))
                box = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
            pixels = np.array(picture.resize(placement.size, resample, box))
    except DECODER_ERRORS as error:
        raise OSError(f"{source_name(source)}: {describe_damage(error)}") from error
    return np.ascontiguousarray(pixels[:, ::-1]) if placement.flip else pixels


def draft_scale(placement: Placement) -> int:
    """Choose how many times smaller a JPEG is decoded, so that 1.5 times the training size is left of the part.

    Args:
        placement: from :func:`place`.

    Returns:
        8, 4, 2 or 1.
    """
    spare = 1 / enlargement(placement)
    return next((scale for scale in (8, 4, 2) if spare >= _DRAFT_MARGIN * scale), 1)


def _reduced_box(
    box: tuple[float, float, float, float], full_size: tuple[int, int], scale: int, orientation: int
) -> tuple[float, float, float, float]:
    """Find a box of the upright picture in the same picture decoded at reduced scale."""
    left, top, right, bottom = (edge / scale for edge in box)
    # A size that the scale does not divide is rounded up. The part of a pixel that this adds lies at the stored
    # right and bottom, so a picture that is turned has it at its upright left or top.
    across, down = (math.ceil(side / scale) - side / scale for side in full_size)
    across = across if orientation in _RIGHT_TO_LEFT else 0.0
    down = down if orientation in _BOTTOM_TO_TOP else 0.0
    return left + across, top + down, right + across, bottom + down


def to_unit_range(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Bring bytes to the range that models train on.

    Args:
        pixels: uint8, any shape.

    Returns:
        float32 of the same shape, value / 127.5 - 1 rounded once, so in [-1, 1].
    """
    return _TO_UNIT_RANGE[pixels]


def read_picture(source: PictureSource) -> Image.Image:
    """Read a picture file as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit values are scaled to 8 bit,
    floats are scaled from their own range, other modes (grey, palette, CMYK, ...) are converted, and of an
    animation the first frame is taken.

    Args:
        source: the file, or a stream that holds it; its content decides the format, not its suffix.

    Returns:
        A loaded picture in mode RGB, of the size that ``read_header`` tells.

    Raises:
        OSError: the file cannot be read or decoded; says which file and why.
    """
    try:
        with _open_to_decode(source) as opened:
            return _load_upright(opened, read_orientation(opened, source))
    except DECODER_ERRORS as error:
        raise OSError(f"{source_name(source)}: {describe_damage(error)}") from error


@contextmanager
def _open_to_decode(source: PictureSource) -> Iterator[ImageFile.ImageFile]:
    """Open a picture file whose pixels are wanted, unless decoding it would never end."""
    with open_picture(source) as opened:
        if opened.info.get("progressive"):
            passes = count_scans(source) * opened.width * opened.height
            if passes > _MOST_PASSES:
                raise OSError("a progressive JPEG of so many scans that decoding it would take minutes; save it anew")
        yield opened


def _load_upright(opened: ImageFile.ImageFile, orientation: int) -> Image.Image:
    """Decode an opened picture (at the scale that its draft has set) to upright RGB."""
    size = upright_size(opened, orientation)
    turn = None if turns_itself(opened) else _UPRIGHT.get(orientation)
    opened.load()
    picture = to_rgb(opened)
    if picture is not opened:
        opened.close()  # sets its memory free before the picture is turned
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.size != size:
        raise OSError(f"its header tells of {size[0]}x{size[1]} pixels, but {picture.width}x{picture.height} came out")
    return picture


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to RGB; transparency is laid on white.

    Args:
        image: a loaded picture.

    Returns:
        A picture in mode RGB and of the same size; the same object where it is RGB already.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    values = _value_range(image) if image.mode.startswith(("I", "F")) else None
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(_strip_to_rgb(strip, values), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Cut a picture into strips, since the steps of a conversion take several times the memory of their picture."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strip_to_rgb(image: Image.Image, values: tuple[float, float] | None) -> Image.Image:
    if values is not None:
        return Image.fromarray(_to_eight_bit(np.asarray(image), *values)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _value_range(image: Image.Image) -> tuple[float, float]:
    """Find the value that stands for black in a picture of wide values, and how far above it white is."""
    lows: list[float] = []
    highs: list[float] = []
    for _, strip in _strips(image):
        values = np.asarray(strip)
        finite = values[np.isfinite(values)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    low, high = min(lows, default=0.0), max(highs, default=0.0)
    if not image.mode.startswith("F") and low >= 0 and high <= _SIXTEEN_BIT_MAX:
        return 0.0, float(_SIXTEEN_BIT_MAX)  # 16-bit files may also open in a wider mode
    return low, high - low if high > low else 1.0


def _to_eight_bit(values: npt.NDArray[np.generic], low: float, span: float) -> npt.NDArray[np.uint8]:
    """Scale one channel to 0..255, rounding to nearest."""
    scaled = np.nan_to_num((values.astype(np.float64) - low) / span, nan=0.0, posinf=1.0, neginf=0.0)
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
        ValueError: an unknown mode, or two keys that contradict each other.
    """
    if resize_mode is None:
        return "center_crop" if center_crop else DEFAULT_RESIZE_MODE
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode {resize_mode!r} is unknown; choose one of {', '.join(RESIZE_MODES)}")
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
        resize_mode: ``squash`` or ``center_crop``.
        resample: the filter to resize with.
        flip: mirror left to right.

    Returns:
        float32 (H, W, 3), value / 127.5 - 1, so in [-1, 1].

    Raises:
        ValueError: the mode ``bucket``, whose part of the picture :func:`place` has to choose.
    """
    if resize_mode == "bucket":
        raise ValueError("resize_mode 'bucket' has no square to bring a picture to; choose squash or center_crop")
    if resize_mode == "center_crop":
        image = crop_center_square(image)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), resample=resample)
    pixels = np.asarray(image)
    return to_unit_range(pixels[:, ::-1] if flip else pixels)


def find_broken_pictures(
    paths: Sequence[str],
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
    look: Callable[[str, Image.Image], object] | None = None,
) -> dict[str, str]:
    """Decode every picture once, and tell which cannot be trained on.

    However large they are, those that are decoded at the same time take less than 2 GB together.

    Args:
        paths: picture files; one that is named twice is decoded once.
        threads: how many are decoded at a time (decoding runs beside Python); None: one for each processor core.
        progress: called with 1 after each picture, such as a progress bar's ``update``; in the calling thread.
        look: called with the path and the pixels of each sound picture, as stored, a large JPEG at down to an eighth
            of its size; in the thread that decoded it.

    Returns:
        The reason for each broken picture, in the order of ``paths``.
    """
    distinct = list(dict.fromkeys(paths))
    memory = _Memory(MAX_DECODE_BYTES)
    broken: dict[str, str] = {}
    workers = threads or min(32, os.cpu_count() or 1)
    for path, reason in map_in_threads(lambda path: _damage(path, memory, look), distinct, workers):
        if reason is not None:
            broken[path] = reason
        if progress is not None:
            progress(1)
    return broken


def _damage(path: str, memory: _Memory, look: Callable[[str, Image.Image], object] | None) -> str | None:
    try:
        with _open_to_decode(path) as opened:
            needed = decode_bytes(opened)
            if opened.format in ("JPEG", "MPO"):
                # An eighth of the size: the file is read to its end and its every code checked, only faster.
                least = 1 if look is None else _LEAST_TO_LOOK_AT
                scale = next((scale for scale in (8, 4, 2) if min(opened.size) // scale >= least), 1)
                needed = decode_bytes(opened, scale)
                opened.draft(None, (opened.width // scale, opened.height // scale))
            if look is not None:  # a copy, for who looks at it in another mode
                needed = min(needed + 4 * opened.width * opened.height, MAX_DECODE_BYTES)
            with memory.reserve(needed):
                opened.load()
                to_rgb(opened.crop((0, 0, 1, 1)))
                if look is not None:
                    look(path, opened)
                opened.close()
                if needed >= _LARGE_BYTES:
                    _return_freed_memory()
    except DECODER_ERRORS as error:
        return describe_damage(error)
    return None


def _return_freed_memory() -> None:
    """Give the memory of closed pictures back to the system; glibc would keep some for each thread."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and keep less
        if trim is not None:
            trim(0)


class _Memory:
    """Memory that threads share: who needs more than is left waits until others have finished."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._changed = Condition()

    @contextmanager
    def reserve(self, needed: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._left >= needed)
            self._left -= needed
        try:
            yield
        finally:
            with self._changed:
                self._left += needed
                self._changed.notify_all()
