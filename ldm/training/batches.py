"""What the callbacks need to know about a batch, whatever data set it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def batch_length(batch: Any) -> int:
    """Count the pictures in a batch.

    Args:
        batch: a dictionary with ``image`` (B, H, W, 3), or anything that holds tensors with B rows.

    Returns:
        B, the rows of ``image`` or else of the first tensor found.

    Raises:
        ValueError: if the batch holds no tensor.
    """
    length = _first_length(batch["image"]) if isinstance(batch, Mapping) and "image" in batch else _first_length(batch)
    if length is None:
        raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor, so its pictures cannot be counted")
    return length


def batch_captions(batch: Any) -> list[str] | None:
    """Read the captions of a batch.

    Args:
        batch: a dictionary with ``caption`` or, as older data sets name it, ``txt``.

    Returns:
        One text a picture, or None if the batch carries none.
    """
    if isinstance(batch, Mapping):
        for key in ("caption", "txt"):
            if key in batch:
                return [str(caption) for caption in batch[key]]
    return None


def _first_length(value: Any) -> int | None:
    """Find the first dimension of the first tensor inside a nest of containers."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((length for length in map(_first_length, value) if length is not None), None)
    return None
