"""Runs that are stopped and continued with each optimiser, in the real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.optimizers import build_optimizer, evaluation_copies, step_context
from tests.unit.test_optimizers import OPTIMIZERS, assert_same, usable
from tests.unit.training.test_resume import assert_same_run, stopped_run
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import toy_run


class Chosen(ToyDiffusion):
    """Is trained with an optimiser of choice, in two groups, and does with it what the real model does."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.name = name
        self.model = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3))

    def configure_optimizers(self) -> Any:
        own = {} if self.name == "Prodigy" else {"lr": 0.02}
        groups: list[dict[str, Any]] = [
            {"params": list(self.model[0].parameters()), **own},
            {"params": list(self.model[2:].parameters())},
        ]
        optimizer = build_optimizer(OPTIMIZERS[self.name], groups, self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with step_context(self.trainer.optimizers):
            super().optimizer_step(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **evaluation_copies(self, self.trainer.optimizers)}


@pytest.mark.parametrize(
    "name",
    [
        usable(name)
        for name in ("default", "Adafactor", "AdamW8bit", "AdamWFp8", "Lion", "Prodigy", "schedule-free AdamW")
    ],
)
def test_a_run_stopped_between_saves_continues_as_if_unbroken_with_every_optimiser(
    name: str, pictures: Path, tmp_path: Path
) -> None:
    case = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "validation": False}
    step = 1 + list(OPTIMIZERS).index(name) % 5
    whole = toy_run(tmp_path / "whole", pictures, model=Chosen(name), **case)
    first = stopped_run(tmp_path / "broken", pictures, {**case, "model": Chosen(name)}, step=step)
    second = toy_run(tmp_path / "broken", pictures, checkpoint=first.last, model=Chosen(name), **case)
    assert first.trainer.global_step == step
    assert_same_run(first, second, whole)
    one, two = (torch.load(run.last, weights_only=True) for run in (whole, second))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(one[part], two[part])
