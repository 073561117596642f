"""What a model's random draws for a batch hang on, and how they reach the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm import exposure


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


def move_all_but_exposures(batch: Any, move: Callable[[Any], Any]) -> Any:
    """Move a batch, but leave its exposure keys on the CPU: fetching those back would wait for the device.

    Args:
        batch: the batch; one without exposure keys, or of another kind, is moved whole.
        move: moves a batch.

    Returns:
        The moved batch.
    """
    if not isinstance(batch, Mapping) or "exposure" not in batch:
        return move(batch)
    moved = move({name: value for name, value in batch.items() if name != "exposure"})
    return {**moved, "exposure": batch["exposure"]}
