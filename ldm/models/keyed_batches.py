"""What a batch says of its pictures beside the pictures: the keys of their draws, and how much they count."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ldm import exposure

Batch = Mapping[str, Any]

STAYS_ON_CPU: Final = ("exposure", "loss_weight", "training_size", "crop", "flip", "dropped")
"""What is needed on the CPU, for draws and for the ledger: fetching it back would wait for the device."""


def batch_exposures(
    batch: Mapping[str, Any], key: str, batch_idx: int, epoch: int, global_rank: int, training: bool
) -> Tensor:
    """Give the batch's exposure keys on the CPU; batches of foreign data sets get them by position.

    Args:
        batch: the batch; ``exposure`` int64 (B, 4) is taken from it where it is there.
        key: name of the pictures, by which others are counted.
        batch_idx: number of the batch in its epoch.
        epoch: number of the epoch.
        global_rank: number of the process.
        training: whether seed and epoch count; in validation every run and epoch draws the same.

    Returns:
        int64 (B, 4).
    """
    if "exposure" in batch:
        return batch["exposure"].cpu()
    positions = torch.arange(len(batch[key])) + (global_rank << 32)
    seed, epoch = (int(os.environ.get("PL_GLOBAL_SEED", "0")), epoch) if training else (0, 0)
    return torch.stack([exposure.exposure_row(seed, epoch, batch_idx, int(position)) for position in positions])


def move_draw(draw: Tensor, device: torch.device) -> Tensor:
    """Move a draw from the CPU without waiting for the device, as copying from pageable memory would."""
    return draw.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draw.to(device)


def move_pictures(batch: Any, move: Callable[[Any], Any]) -> Any:
    """Move a batch, but leave on the CPU what is needed there: see :data:`STAYS_ON_CPU`.

    Args:
        batch: the batch; one that has none of these, or is of another kind, is moved whole.
        move: moves a batch.

    Returns:
        The moved batch.
    """
    if not isinstance(batch, Mapping) or not any(name in batch for name in STAYS_ON_CPU):
        return move(batch)
    staying = {name: batch[name] for name in STAYS_ON_CPU if name in batch}
    moved = move({name: value for name, value in batch.items() if name not in staying})
    return {**moved, **staying}


def slice_rows(content: Any, rows: int, start: int, stop: int) -> Any:
    """Take some pictures of a batch, with all that it says of them.

    Args:
        content: the batch, or anything inside it.
        rows: pictures of the batch.
        start: the first picture to take.
        stop: the first one after it not to take.

    Returns:
        The same nest of mappings; tensors, lists and tuples with an entry a picture are cut, all else is as it was.
    """
    if isinstance(content, Mapping):
        return {name: slice_rows(value, rows, start, stop) for name, value in content.items()}
    if isinstance(content, Tensor):
        return content[start:stop] if content.ndim and len(content) == rows else content
    if isinstance(content, (list, tuple)) and len(content) == rows:
        return content[start:stop]
    return content


def loss_weights(batch: Mapping[str, Any], rows: int) -> Tensor | None:
    """Read how much each picture of a batch counts in its loss.

    Args:
        batch: the batch; ``loss_weight`` (B,) is taken from it where it is there. 0 marks a filler, which only keeps a
            device busy.
        rows: its pictures B, fillers included.

    Returns:
        float32 (B,) on the CPU; None where each picture counts 1.

    Raises:
        ValueError: there is not one weight a picture, or one is negative or no number.
    """
    if batch.get("loss_weight") is None:
        return None
    weights = torch.as_tensor(batch["loss_weight"], dtype=torch.float32).cpu()
    if weights.shape != (rows,):
        raise ValueError(
            f"loss_weight of a batch has shape {tuple(weights.shape)}; give one weight a picture, shape ({rows},)"
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"loss_weight of a batch is {weights.tolist()}; each must be a number of at least 0")
    return None if bool((weights == 1).all()) else weights


def count_real(weights: Tensor | None, rows: int) -> float:
    """Count the pictures of a batch that are no fillers, for Lightning's ``log``.

    Args:
        weights: from :func:`loss_weights`.
        rows: pictures of the batch, fillers included.

    Returns:
        The count. Lightning averages counts over the devices, and cuts off what follows the point of a whole number's
        average; so it gets no whole number.
    """
    return float(rows if weights is None else weights.count_nonzero())
