"""Rates, stops, averages and schedules of a run as a user starts it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ldm.training.run import main
from tests.end_to_end.conftest import FinishedRun, Train
from tests.end_to_end.test_training import assert_same_end

SETTINGS = [
    "model.params.cond_lr=5.0e-04",
    "model.params.cond_stop_after=2",
    "model.params.cond_train_embeddings=false",
    "model.params.use_ema=true",
    "model.params.ema_device=cpu",
    "model.params.ema_every=2",
    "model.params.scheduler_config.target=ldm.lr_scheduler.CosineScheduler",
    "model.params.scheduler_config.params.warm_up_steps=1",
    "model.params.scheduler_config.params.f_start=0.5",
    "lightning.trainer.max_epochs=1",
    "lightning.modelcheckpoint.params.every_n_epochs=null",
    "lightning.modelcheckpoint.params.every_n_train_steps=1",
    "lightning.modelcheckpoint.params.save_top_k=-1",
]
"""Four steps, of which the encoder takes part in two."""


def test_a_run_with_all_of_them_says_what_it_does_and_resumes_exactly(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = train(*SETTINGS, "--scale_lr", "true", name="unbroken")
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    rates = [line.partition("learning rate: ")[2] for line in lines if "learning rate: " in line]
    assert [rate.partition("; CosineScheduler: ")[2] for rate in rates] == [
        "first 0.001, peak 0.002 (step 1), last 0.0005 (step 3)",
        "first 0.0005, peak 0.001 (step 1), last 0.00025 (step 3)",
    ]
    assert "x 0.0005 (cond_lr)" in rates[1]
    for told in (
        "the text encoder is trained for 2 optimiser steps",
        "moving average: in the host's memory, moved every 2 optimiser steps",
        "step 2: the text encoder is trained no more",
    ):
        assert sum(line.endswith(told) for line in lines) == 1

    broken = FinishedRun(tmp_path / "broken" / unbroken.path.name)
    shutil.copytree(unbroken.path, broken.path)
    checkpoints = broken.path / "checkpoints"
    (checkpoints / "last.ckpt").unlink()
    saved = {int(torch.load(path, weights_only=True)["global_step"]): path for path in checkpoints.glob("*.ckpt")}
    train(resume=saved[1])
    assert_same_end(unbroken, broken)


def test_a_key_of_these_that_is_out_of_range_is_told_before_the_run(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("cond_lr", "cond_stop_after", "model_stop_after", "cond_train_last_layers", "ema_every")
    wrong = [f"model.params.{key}=0" for key in keys]
    assert main([*command, "-n", "run", "-l", str(tmp_path), *wrong, "model.params.ema_device=gpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert all(sum(f"model.params.{key}: " in line for line in lines) == 1 for key in (*keys, "ema_device"))


def test_settings_without_an_effect_are_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model.params.cond_stage_trainable=false", "model.params.cond_lr=1.0e-06"]
    assert main([*command, "-n", "run", "-l", str(tmp_path), *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "cond_lr has no effect: the condition's encoder is not trained" in line


def test_a_schedule_that_spans_the_run_is_not_made_longer_unasked(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("model.params.scheduler_config.target=ldm.lr_scheduler.LinearScheduler", "--max_epochs", "1")
    capsys.readouterr()
    assert main(["-t", "-r", str(run.path), "--max_epochs", "2"]) == 2
    assert "max_epochs 1 -> 2 (the learning rates decay over the length of the run" in capsys.readouterr().err
