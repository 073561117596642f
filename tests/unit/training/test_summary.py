from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
from torch import nn

from ldm.training.summary import RunSummary, StepPlan, limited_batches, model_parts, plan_steps
from tests.unit.training.toy_run import prepare_toy_run


def summary(plan: StepPlan, **changed: object) -> RunSummary:
    fields: dict[str, object] = {
        "run_folder": "logs/run",
        "weights": "sd_v1-5_vae.ckpt",
        "images": {"man": 300, "man_laion": 200},
        "training_set": "EveryDreamBatch",
        "repeats": 10,
        "left_out": ["man/notes.txt"],
        "batch_size": 6,
        "devices": "1 x cuda",
        "precision": "32-true",
        "learning_rates": ["1e-06 (base_learning_rate; not scaled)"],
        "plan": plan,
        "parts": model_parts(nn.ModuleDict({"model": nn.Linear(2, 2)})),
        "seed": 23,
    }
    return RunSummary(**{**fields, **changed})  # type: ignore[arg-type]


def plan_for(images: int, repeats: int, batch: int, **trainer: object) -> StepPlan:
    arguments = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 2, **trainer}
    return plan_steps(pl.Trainer(**arguments), -(-images * repeats // batch), -(-images // batch))


def test_the_seeds_example_states_834_and_84_steps() -> None:
    lines = summary(plan_for(500, 10, 6)).lines()
    assert "training steps per epoch: 834" in lines
    assert "validation steps per epoch: 84" in lines


def test_images_are_stated_by_folder() -> None:
    text = "\n".join(summary(plan_for(500, 10, 6)).lines())
    assert "images: 500 in 2 folders\n    man        300\n    man_laion  200\n" in text


def test_files_that_are_left_out_are_named() -> None:
    assert "left out: 1 file (named above)" in summary(plan_for(500, 10, 6)).lines()


def test_optimiser_steps_are_stated_where_they_differ_from_batches() -> None:
    lines = summary(plan_for(500, 10, 2, accumulate_grad_batches=3)).lines()
    assert "training steps per epoch: 2500" in lines
    assert "optimiser steps per epoch: 834" in lines


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"max_epochs": 2}, "length of the run: 2 epochs = 1,668 optimiser steps"),
        ({"max_steps": 1000}, "length of the run: 2 epochs, at most 1,000 optimiser steps = 1,000 optimiser steps"),
        ({"max_epochs": -1}, "length of the run: until it is stopped"),
    ],
)
def test_the_length_of_the_run_is_stated(limits: dict[str, int], line: str) -> None:
    assert line in summary(plan_for(500, 10, 6, **limits)).lines()


@pytest.mark.parametrize(("limit", "batches"), [(None, 10), (1.0, 10), (0.25, 2), (3, 3), (30, 10), (0, 0)])
def test_limits_on_batches_count(limit: float | None, batches: int) -> None:
    assert limited_batches(10, limit) == batches


def test_parameters_are_counted_as_trained_or_frozen() -> None:
    model = nn.Module()
    model.model = nn.Linear(3, 2)
    model.first_stage_model = nn.Linear(3, 1).requires_grad_(False)
    model.cond_stage_model = nn.Linear(1, 1)
    model.logvar = nn.Parameter(nn.Linear(5, 1).weight.detach()[0])
    text = "\n".join(summary(plan_for(500, 10, 6), parts=model_parts(model)).lines())
    assert "trained parameters: UNet 8 + condition encoder 2 + other parameters 5" in text
    assert "frozen parameters: VAE 4" in text


def test_a_part_that_is_used_twice_is_counted_once() -> None:
    model = nn.Module()
    model.model = nn.Linear(3, 2)
    model.cond_stage_model = model.model
    assert [(part.name, part.trained) for part in model_parts(model)] == [("UNet", 8)]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": 5, "accumulate_grad_batches": 2},
        {"limit_train_batches": 3, "limit_val_batches": 0.5},
        {"validation": False},
    ],
)
def test_the_stated_steps_are_the_ones_that_happen(options: dict[str, object], pictures: Path, tmp_path: Path) -> None:
    run, data = prepare_toy_run(tmp_path, pictures, **options)  # type: ignore[arg-type]
    data.setup()
    validation = data.steps_per_epoch("validation") if "validation" in data.datasets else 0
    plan = plan_steps(run.trainer, data.steps_per_epoch("train"), validation)
    run.trainer.fit(run.model, datamodule=data)
    assert run.trainer.num_training_batches == plan.training
    assert len(run.model.validated) == plan.validation * run.trainer.current_epoch
    assert run.trainer.global_step == plan.total


def test_a_limit_on_steps_ends_the_run_at_the_stated_step(pictures: Path, tmp_path: Path) -> None:
    run, data = prepare_toy_run(tmp_path, pictures, batch_size=5, max_steps=4)
    data.setup()
    plan = plan_steps(run.trainer, data.steps_per_epoch("train"), 0)
    run.trainer.fit(run.model, datamodule=data)
    assert run.trainer.global_step == plan.total == 4


def test_a_run_without_limits_ends_where_lightning_ends_it() -> None:
    assert plan_for(6, 1, 6, max_epochs=None).epochs == 1000
    assert plan_for(6, 1, 6, max_epochs=None, max_steps=5).total == 5
    assert plan_for(6, 1, 6, max_epochs=None, max_time="00:01:00:00").total is None
