"""Gradient accumulation that equals one large batch, also where the data run out."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from ldm.training.batches import batch_length


class ExactAccumulation(pl.Callback):
    """Weighs each picture of an optimiser step alike, however the step is cut into batches.

    Lightning divides every batch's mean loss by ``accumulate_grad_batches``. The last optimiser step of
    an epoch may gather fewer batches, and its last batch may be short; its gradient would then come
    out too small, and differ from that of the same pictures in one batch. Each loss is weighed here by
    the pictures it stands for, and the sum is divided by the pictures that were there.

    Args:
        batch_size: pictures in a full batch of one device.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._pictures_in_batch = batch_size
        self._pictures_in_step = 0
        self._batches_in_step = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the pictures of the coming backward pass."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._pictures_in_step = 0
            self._batches_in_step = 0
        self._pictures_in_batch = batch_length(batch)
        self._pictures_in_step += self._pictures_in_batch
        self._batches_in_step += 1

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Weigh a short batch's loss by its pictures."""
        if trainer.accumulate_grad_batches > 1 and self._pictures_in_batch != self.batch_size:
            # In place: the strategy goes on to differentiate this very tensor. What was logged is a copy.
            loss.mul_(self._pictures_in_batch / self.batch_size)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Divide by the pictures that were there, before the gradient is clipped."""
        expected = trainer.accumulate_grad_batches * self.batch_size
        if trainer.accumulate_grad_batches == 1 or self._pictures_in_step == expected:
            return
        factor = expected / self._pictures_in_step
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
