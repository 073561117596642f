"""Models that take their optimiser steps themselves, and the trainer's settings."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl

from ldm.training.own_optimisation import leave_to_model


class Model(pl.LightningModule):
    """Trains nothing; only its flags count."""

    def __init__(self, automatic: bool, applies: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.accumulates_and_clips = applies


def build_trainer() -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", accumulate_grad_batches=3, gradient_clip_val=0.5, logger=False, enable_checkpointing=False
    )


def test_settings_that_the_model_applies_are_out_of_sight_until_setup():
    trainer, model = build_trainer(), Model(automatic=False, applies=True)
    leave_to_model(trainer, model)
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (1, None)
    for callback in trainer.callbacks:
        callback.setup(trainer, model, "fit")
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (3, 0.5)


@pytest.mark.parametrize(("automatic", "applies"), [(True, True), (True, False), (False, False)])
def test_all_other_models_are_left_to_lightnings_own_check(automatic, applies):
    trainer = build_trainer()
    leave_to_model(trainer, Model(automatic, applies))
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (3, 0.5)
