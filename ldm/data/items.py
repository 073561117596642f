"""What the items of all data sets of this project have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ldm.data.image_transform import Placement
from ldm.exposure import EXPOSURE_COLUMNS, exposure_row


def placed(path: str, placement: Placement) -> dict[str, Any]:
    """Say which part of a picture an item shows.

    Args:
        path: the picture.
        placement: which part of it, at what size.

    Returns:
        ``path``; ``training_size`` int64 (2,), width and height; ``crop`` float64 (4,), left, top, right and bottom in
        pixels of the upright picture; ``flip``.
    """
    return {
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
