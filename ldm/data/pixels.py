"""One look at the pixels of every picture: which cannot be decoded, which look alike, which are transparent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm.data.fingerprints import THUMBNAIL_SIDE, thumbnail
from ldm.data.image_transform import find_broken_pictures, to_rgb
from ldm.data.picture_header import PictureHeader

_SAMPLED_SIDE: Final = 16 * THUMBNAIL_SIDE
_STRIP_PIXELS: Final = 1 << 22

# As ldm.data.image_transform turns them.
_QUARTER_TURNS: Final = {
    3: (2, False),
    2: (0, True),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}


@dataclass
class Pixels:
    """What a look at the pixels has told.

    Attributes:
        broken: by path of the pictures that cannot be decoded, why.
        thumbnails: uint8 (16, 16, 3) of the others, upright, by path.
        opaque: those that can be transparent and nowhere are.
    """

    broken: dict[str, str] = field(default_factory=dict)
    thumbnails: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)


def look_at_pixels(
    headers: Mapping[str, PictureHeader | str],
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Pixels:
    """Decode every picture once, several at a time.

    Args:
        headers: by path; pictures whose header cannot be read are passed over.
        threads: how many are decoded at a time; None: one for each processor core.
        progress: called with 1 after each picture, in the calling thread.

    Returns:
        What they show; some 800 bytes for each.
    """
    pixels = Pixels()
    sound = {path: header for path, header in headers.items() if not isinstance(header, str)}

    def look(path: str, image: Image.Image) -> None:
        if sound[path].transparent and is_opaque(image):
            pixels.opaque.add(path)
        pixels.thumbnails[path] = _upright(_small(image), sound[path].orientation)

    pixels.broken = find_broken_pictures(list(sound), threads, progress, look)
    pixels.thumbnails = {path: pixels.thumbnails[path] for path in sound if path in pixels.thumbnails}
    return pixels


def is_opaque(image: Image.Image) -> bool:
    """Tell whether a picture that can be transparent is so nowhere.

    Args:
        image: a loaded picture.

    Returns:
        True where each pixel is opaque; a picture whose transparency is one of its colours counts as transparent.
    """
    if image.mode.endswith(("A", "a")):
        # In strips, for a band is copied to be looked at.
        rows = max(1, _STRIP_PIXELS // image.width)
        strips = (
            image.crop((0, top, image.width, min(top + rows, image.height))) for top in range(0, image.height, rows)
        )
        return all(strip.getchannel(strip.getbands()[-1]).getextrema() == (255, 255) for strip in strips)
    transparency = image.info.get("transparency")
    if image.mode != "P" or transparency is None:
        return transparency is None
    alphas = transparency if isinstance(transparency, bytes) else b"\xff" * int(transparency) + b"\0"
    return not any(count and alpha < 255 for count, alpha in zip(image.histogram(), alphas, strict=False))


def _small(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Shrink a picture of any mode to a thumbnail, without a copy of its full size."""
    if image.mode not in ("RGB", "L", "CMYK", "YCbCr"):
        # Palettes, single bits and wide numbers cannot be averaged as they are, and Pillow copies what has an alpha
        # channel to average it: sample them first.
        image = image.resize([min(side, _SAMPLED_SIDE) for side in image.size], Image.Resampling.NEAREST)
    elif max(image.size) > _SAMPLED_SIDE:
        image = image.resize([min(side, _SAMPLED_SIDE) for side in image.size], Image.Resampling.BOX)
    return thumbnail(to_rgb(image))


def _upright(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    turns, mirrored = _QUARTER_TURNS.get(orientation, (0, False))
    turned = np.rot90(pixels, turns)
    return turned[:, ::-1] if mirrored else turned
