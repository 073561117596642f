"""What the items of all data sets of this project have in common."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch

from ldm.data.image_transform import Placement, describe_damage, to_unit_range
from ldm.exposure import EXPOSURE_COLUMNS, exposure_row

GREY: Final = 127
"""What each pixel of a picture is that could not be read."""

_SYSTEMS_FAULTS: Final = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class UnreadableError(OSError):
    """A picture that cannot be read during a run, though it was sound when the run began.

    Attributes:
        remedy: what helps, for a run to show; ``{resume}`` in it stands for the command that continues the run.
    """

    remedy: ClassVar[str] = (
        "put it back and type {resume}; to go on without it, type {resume} --on_bad_image skip --accept_changes"
    )


class DataGoneError(OSError):
    """The whole folder of a data set has gone during a run.

    Attributes:
        remedy: as for :class:`UnreadableError`.
    """

    remedy: ClassVar[str] = "bring it back (is its drive connected?) and type {resume}"


def on_one_line(path: str) -> str:
    """Write a path on one line: a name can hold the end of one, and what follows would look like another message."""
    return "\\n".join(path.splitlines())


def why_unreadable(path: str, error: OSError | ValueError) -> str:
    """Say in one line what has become of a picture that cannot be read during a run.

    Args:
        path: the picture.
        error: what reading it raised.

    Returns:
        The path and the reason.

    Raises:
        MemoryError: memory was short, which is no fault of the picture.
        OSError: ``error`` itself, where the system ran out of something else.
    """
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, MemoryError):
        raise MemoryError(str(error)) from error
    if isinstance(cause, OSError) and cause.errno in _SYSTEMS_FAULTS:
        raise error
    shown = on_one_line(path)
    if isinstance(cause, (FileNotFoundError, NotADirectoryError)):
        return f"{shown}: has vanished since the run began"
    said = describe_damage(cause) if cause is not error or getattr(error, "errno", None) else str(error)
    return f"{shown}: cannot be read: {' '.join(said.removeprefix(f'{path}: ').split())}"


def blank_picture(size: tuple[int, int], as_bytes: bool) -> npt.NDArray[Any]:
    """Give a grey picture to stand where one could not be read.

    Args:
        size: width and height in pixels.
        as_bytes: uint8 in 0..255 instead of float32 in [-1, 1].

    Returns:
        (height, width, 3).
    """
    pixels = np.full((size[1], size[0], 3), GREY, dtype=np.uint8)
    return pixels if as_bytes else to_unit_range(pixels)


def placed(path: str, placement: Placement, unreadable: str = "") -> dict[str, Any]:
    """Say which part of a picture an item shows.

    Args:
        path: the picture.
        placement: which part of it, at what size.
        unreadable: why the picture could not be read, where that is so.

    Returns:
        ``path``; ``training_size`` int64 (2,), width and height; ``crop`` float64 (4,), left, top, right and bottom in
        pixels of the upright picture; ``flip``; ``unreadable``.
    """
    return {
        "unreadable": unreadable,
        "path": path,
        "training_size": torch.tensor(placement.size, dtype=torch.int64),
        "crop": torch.tensor(placement.box, dtype=torch.float64),
        "flip": placement.flip,
    }


def replayed(entry: Mapping[str, Any], read_pixels: Callable[[str, Placement], dict[str, Any]]) -> dict[str, Any]:
    """Build the item of a ledger's entry again.

    Args:
        entry: from :func:`ldm.ledger.read_ledger`.
        read_pixels: gives the picture, and the fields of :func:`placed`, for a path and a placement.

    Returns:
        The item that the model was trained on.
    """
    left, top, right, bottom = entry["crop"]
    width, height = entry["size"]
    return {
        **read_pixels(entry["path"], Placement((width, height), (left, top, right, bottom), entry["flip"])),
        "caption": entry["caption"],
        "dropped": entry["dropped"],
        "exposure": exposure_row(*(entry[column] for column in EXPOSURE_COLUMNS)),
        "loss_weight": torch.tensor(entry["loss_weight"], dtype=torch.float32),
    }
