"""Models that take their optimiser steps themselves, as two networks trained against each other must."""

from __future__ import annotations

import pytorch_lightning as pl


def leave_to_model(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Let a model with manual optimisation apply the trainer's accumulation and gradient clipping itself.

    Lightning refuses to start such a model with either, as most models ignore them then. One that sets
    ``accumulates_and_clips`` reads both from its trainer; they are out of sight until Lightning has checked.

    Args:
        trainer: the trainer, before ``fit``.
        model: the model; nothing happens to any other.
    """
    if model.automatic_optimization or not getattr(model, "accumulates_and_clips", False):
        return
    trainer.callbacks.insert(0, _GiveBack(trainer.accumulate_grad_batches, trainer.gradient_clip_val))  # type: ignore[attr-defined]
    trainer.accumulate_grad_batches = 1
    trainer.gradient_clip_val = None


class _GiveBack(pl.Callback):
    """Gives the trainer its settings back once Lightning has checked them."""

    def __init__(self, accumulate_grad_batches: int, gradient_clip_val: int | float | None) -> None:
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do so; this is the first hook after the check."""
        if stage == "fit":
            trainer.accumulate_grad_batches = self.accumulate_grad_batches
            trainer.gradient_clip_val = self.gradient_clip_val
