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


def readable_rows(batch: Any) -> Any:
    """Leave out of a batch the pictures that could not be read and are grey in it.

    Args:
        batch: the batch; a dictionary whose ``unreadable`` says of each picture why, or is empty.

    Returns:
        The batch, itself where all could be read; None where none could.
    """
    if not isinstance(batch, Mapping) or not any(batch.get("unreadable", ())):
        return batch
    rows = [row for row, reason in enumerate(batch["unreadable"]) if not reason]
    length = len(batch["unreadable"])
    return {name: _rows_of(value, rows, length) for name, value in batch.items()} if rows else None


def share_that_counts(batch: Any) -> float:
    """Measure how many of a batch's pictures count in its loss.

    Args:
        batch: the batch; a dictionary with ``loss_weight`` (B,), or any other, of which all count.

    Returns:
        The share of those whose weight is above 0, in [0, 1].
    """
    weights = batch.get("loss_weight") if isinstance(batch, Mapping) else None
    return float((weights > 0).float().mean()) if isinstance(weights, Tensor) and len(weights) else 1.0


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


def _rows_of(value: Any, rows: list[int], length: int) -> Any:
    """Choose rows of what has one for each picture."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == length else value
    if isinstance(value, (list, tuple)) and len(value) == length:
        return [value[row] for row in rows]
    return value


def _first_length(value: Any) -> int | None:
    """Find the first dimension of the first tensor inside a nest of containers."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((length for length in map(_first_length, value) if length is not None), None)
    return None
