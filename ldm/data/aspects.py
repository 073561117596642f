"""Aspect buckets: the picture shapes that a model is trained on, and which of them a picture gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

COARSE_STEP: Final = 64
"""Step between bucket sides in pixels from ``size`` 512 up: SD's networks halve a picture six times."""

FINEST_STEP: Final = 8
"""Pixels to a latent cell, which no side may cut."""


def bucket_step(size: int) -> int:
    """Give the step between the sides of a size's buckets.

    Args:
        size: side of the square picture in pixels, a multiple of 8.

    Returns:
        64 from 512 pixels up; below, an eighth of the size, rounded down to a multiple of 8 (at least 8), so
        that every size has about as many shapes.
    """
    if size >= 8 * COARSE_STEP:
        return COARSE_STEP
    return max(FINEST_STEP, size // 8 // FINEST_STEP * FINEST_STEP)


@lru_cache(maxsize=64)
def bucket_sizes(size: int) -> tuple[tuple[int, int], ...]:
    """List the buckets of a size.

    Beside the square, every width that is a multiple of :func:`bucket_step` between half and twice the size
    gets the greatest height on the same grid that keeps the area within the square's; and the same with
    width and height exchanged. So a batch of any shape costs no more than one of squares.

    Args:
        size: side of the square bucket in pixels, a multiple of 8.

    Returns:
        ``(width, height)`` pairs, each a multiple of 8, from the tallest to the widest; the square is among them.

    Raises:
        ValueError: the size is not a multiple of 8 of at least 8.
    """
    if size < FINEST_STEP or size % FINEST_STEP:
        raise ValueError(f"size {size!r} is not allowed; give a multiple of 8 (pixels), such as 512")
    step = bucket_step(size)
    shapes = {(size, size)}
    for long_side in range(math.ceil(size / step) * step, 2 * size + 1, step):
        short_side = size * size // long_side // step * step
        if 2 * short_side >= size:
            shapes |= {(long_side, short_side), (short_side, long_side)}
    return tuple(sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape)))


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> int:
    """Choose the bucket whose shape is nearest to a picture's.

    Args:
        width: the picture's width in pixels, at least 1.
        height: its height in pixels, at least 1.
        buckets: ``(width, height)`` pairs.

    Returns:
        Index of the bucket with the least difference of log ratios, so that wide and tall pictures are treated
        alike; the larger one of two with the same ratio.
    """
    return int(nearest_buckets(np.array([[width, height]]), buckets)[0])


def nearest_buckets(sizes: npt.NDArray[np.integer], buckets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Choose a bucket for each of many pictures; see :func:`nearest_bucket`.

    Args:
        sizes: integers (N, 2), width and height in pixels.
        buckets: ``(width, height)`` pairs.

    Returns:
        int64 (N,), indices of buckets.
    """
    shapes = np.asarray(buckets, dtype=np.float64)
    bucket_ratios = np.log(shapes[:, 0] / shapes[:, 1])
    # Candidates by ratio, the largest of equal ratios first: argmin takes the first of equals.
    preference = np.lexsort((-shapes.prod(axis=1), bucket_ratios))
    ratios = np.log(sizes[:, 0] / sizes[:, 1])
    distances = np.abs(ratios[:, None] - bucket_ratios[None, preference])
    # Widths and heights that mirror each other give ratios that differ in the last bit: compare rounded.
    return preference[np.argmin(np.round(distances, 12), axis=1)]
