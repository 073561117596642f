"""Gradients in which each picture weighs the same, however an epoch is cut into batches."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from ldm.training.batches import batch_length


class EqualWeights(pl.Callback):
    """Weighs each picture of an epoch alike, also those in a batch that is not full.

    A batch's loss is a mean over its pictures, so each picture of a short batch (the last one of an epoch, or of a
    bucket) would weigh more than others. Here every loss is multiplied by the share of a full batch that it
    stands for. The gradients of an epoch then add up to those of batch size 1, up to one factor for all; the
    gradient of batches that are accumulated is that of one large batch, also where the data run out; and so is
    the mean of several devices' gradients where their shares differ.

    Args:
        batch_size: pictures in a full batch of one device.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._pictures_in_batch = batch_size

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the pictures of the coming backward pass."""
        self._pictures_in_batch = batch_length(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Weigh a short batch's loss by its pictures."""
        if self._pictures_in_batch != self.batch_size:
            # In place: the strategy goes on to differentiate this very tensor. What was logged is a copy.
            loss.mul_(self._pictures_in_batch / self.batch_size)
