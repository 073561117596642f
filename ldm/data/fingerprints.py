"""Finds pictures that a data set holds twice: files of the same content, and pictures that look the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

THUMBNAIL_SIDE: Final = 16
"""Side in pixels of the thumbnails that pictures are compared by."""

MOST_BITS_APART: Final = 8
"""Bits of 112 in which the hashes of two pictures that look the same may differ."""

MOST_LEVELS_APART: Final = 10.0
"""Mean difference of their thumbnails, in levels of 0 to 255."""

LEAST_CORRELATION: Final = 0.96
"""Correlation of their thumbnails about the mean colour."""

MOST_LOCAL_DIFFERENCE: Final = 0.25
"""Greatest difference of one part, beyond that in brightness, as a share of the standard deviation. It holds for
pictures without much detail (drawings, signs, an object before a plain wall), where one small part may be all that
tells them apart."""

DETAILED: Final = 0.45
"""Share of its parts that stand out from their neighbours in a picture with much detail, where a difference of a few
parts may come from trimming an edge."""

STANDS_OUT: Final = 4.0
"""Levels by which such a part is brighter or darker than its four neighbours are on average."""

FLAT_LEVELS: Final = 3.0
"""Standard deviation, in levels, below which a thumbnail shows too little to be compared."""

_GRID: Final = THUMBNAIL_SIDE // 2
_READ_BYTES: Final = 1 << 20
_MOST_COMPARED: Final = 4096
_AT_A_TIME: Final = 4096
_BITS_SET: Final = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def content_hash(path: str) -> bytes:
    """Read a file's digest, a piece at a time.

    Args:
        path: the file.

    Returns:
        16 bytes, the same for files of the same content.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.digest()


def same_size(sizes: Mapping[str, int]) -> list[str]:
    """Choose the files that can have copies: those whose length in bytes is not unique.

    Args:
        sizes: bytes by path.

    Returns:
        Paths, in the order given; empty files are never among them.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for path, size in sizes.items():
        if size:
            by_size[size].append(path)
    chosen = {path for paths in by_size.values() if len(paths) > 1 for path in paths}
    return [path for path in sizes if path in chosen]


def groups_of_equals(digests: Mapping[str, bytes]) -> list[list[str]]:
    """Gather paths with the same digest.

    Args:
        digests: digest by path.

    Returns:
        Groups of two or more, in the order given.
    """
    groups: dict[bytes, list[str]] = defaultdict(list)
    for path, digest in digests.items():
        groups[digest].append(path)
    return [group for group in groups.values() if len(group) > 1]


def thumbnail(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Shrink a picture to the few pixels that it is compared by.

    Args:
        image: a picture in mode RGB.

    Returns:
        uint8 (16, 16, 3), each the mean of its part of the picture.
    """
    return np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))


def difference_hashes(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Hash thumbnails by which of two neighbouring parts is the brighter one, across and down.

    Args:
        thumbnails: uint8 (N, 16, 16, 3).

    Returns:
        uint8 (N, 14): 112 bits, of which pictures that look the same share nearly all.
    """
    count = len(thumbnails)
    parts = thumbnails.reshape(count, _GRID, 2, _GRID, 2, 3).sum(axis=(2, 4), dtype=np.int64)
    grey = parts @ np.array([299, 587, 114])
    across = (grey[:, :, 1:] > grey[:, :, :-1]).reshape(count, -1)
    down = (grey[:, 1:, :] > grey[:, :-1, :]).reshape(count, -1)
    return np.packbits(np.concatenate([across, down], axis=1), axis=1)


def groups_of_lookalikes(thumbnails: npt.NDArray[np.uint8]) -> list[list[int]]:
    """Find pictures that look the same: resized, compressed anew, slightly retouched or brightened.

    Hashes that differ in at most ``MOST_BITS_APART`` bits agree in one of so many parts and one more, so only
    pictures that share a part are compared; then the thumbnails decide. Nearly blank pictures are left out,
    for at this size they all look alike.

    Args:
        thumbnails: uint8 (N, 16, 16, 3).

    Returns:
        Groups of two or more numbers of pictures, sorted.
    """
    if len(thumbnails) < 2:
        return []
    parts = [thumbnails[start : start + _AT_A_TIME] for start in range(0, len(thumbnails), _AT_A_TIME)]
    numbers = np.flatnonzero(np.concatenate([_spread(part) for part in parts]) >= FLAT_LEVELS)
    hashes = np.concatenate([difference_hashes(part) for part in parts])[numbers]
    bits = np.unpackbits(hashes, axis=1)
    groups = np.arange(len(numbers))  # of each picture, the first one that it looks like
    for part in np.array_split(np.arange(bits.shape[1]), MOST_BITS_APART + 1):
        for members in _equal_rows(np.packbits(bits[:, part], axis=1)):
            _join_lookalikes(groups, members, hashes, lambda number: thumbnails[numbers[number]])
    return [numbers[members].tolist() for members in _equal_rows(groups[:, None])]


def _spread(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Give the standard deviation of each thumbnail's most varied channel."""
    return thumbnails.reshape(len(thumbnails), -1, 3).std(axis=1, dtype=np.float32).max(axis=1)


def _equal_rows(rows: npt.NDArray[np.integer]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the numbers of rows that are equal, two or more at a time."""
    if not len(rows):
        return
    kinds = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(kinds, kind="stable")
    borders = np.flatnonzero(np.diff(kinds[order])) + 1
    yield from (members for members in np.split(order, borders) if len(members) > 1)


def _join_lookalikes(
    groups: npt.NDArray[np.int64],
    members: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint8],
    thumbnail_of: Callable[[int], npt.NDArray[np.uint8]],
) -> None:
    """Give members that look the same one group, in place.

    All of a group look like its first picture, so that a film's frames do not make one group because each looks like
    the next.
    """
    # Each is compared with those after it; where very many share a part, with the next few thousand alone.
    for place in range(len(members) - 1):
        first = int(members[place])
        if groups[first] != first:
            continue
        after = members[place + 1 : place + 1 + _MOST_COMPARED]
        after = after[groups[after] == after]
        if not len(after):
            continue
        apart = _BITS_SET[hashes[after] ^ hashes[first]].sum(axis=1)
        for other in after[apart <= MOST_BITS_APART].tolist():
            if _look_alike(thumbnail_of(first), thumbnail_of(other)):
                for one in np.flatnonzero(groups == other).tolist():
                    groups[one] = first if _look_alike(thumbnail_of(first), thumbnail_of(one)) else one


def _look_alike(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> bool:
    """Compare two thumbnails."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    difference = one - other
    if np.abs(difference).mean() > MOST_LEVELS_APART:
        return False
    if not (_is_detailed(one) and _is_detailed(other)):
        return bool(np.abs(difference - difference.mean()).max() <= MOST_LOCAL_DIFFERENCE * one.std())
    one, other = one - one.mean(axis=(0, 1)), other - other.mean(axis=(0, 1))
    lengths = np.sqrt((one**2).sum() * (other**2).sum())
    return bool((one * other).sum() >= LEAST_CORRELATION * lengths)


def _is_detailed(thumbnail: npt.NDArray[np.float64]) -> bool:
    grey = thumbnail @ np.array([0.299, 0.587, 0.114])
    neighbours = (grey[2:, 1:-1] + grey[:-2, 1:-1] + grey[1:-1, 2:] + grey[1:-1, :-2]) / 4
    return bool((np.abs(grey[1:-1, 1:-1] - neighbours) > STANDS_OUT).mean() >= DETAILED)
