from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.training.callbacks import CUDACallback
from ldm.training.checkpoint_io import StreamingCheckpointIO
from ldm.training.image_logger import ImageLogger
from ldm.training.run_directory import RunDirectory
from ldm.training.stop_signals import StopSignals
from ldm.training.trainer import build_trainer, merged_callbacks
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run


def prepared(tmp_path: Path, pictures: Path, **options: Any) -> ToyRun:
    return prepare_toy_run(tmp_path, pictures, **options)[0]


def test_a_run_has_its_usual_callbacks_without_being_told(pictures: Path, tmp_path: Path) -> None:
    kinds = [type(callback) for callback in prepared(tmp_path, pictures, logger=True).trainer.callbacks]  # type: ignore[attr-defined]
    assert {ImageLogger, LearningRateMonitor, CUDACallback} <= set(kinds)


def test_a_yaml_changes_single_parameters_of_a_usual_callback() -> None:
    merged = merged_callbacks({"image_logger": {"params": {"batch_frequency": 300}}})["image_logger"]
    assert merged == {"target": "main.ImageLogger", "params": {"batch_frequency": 300, "max_images": 4}}


def test_another_target_takes_nothing_from_the_usual_callback() -> None:
    merged = merged_callbacks({"image_logger": {"target": "mine.Logger"}})["image_logger"]
    assert merged == {"target": "mine.Logger", "params": {}}


def test_a_yaml_adds_callbacks_of_its_own(pictures: Path, tmp_path: Path) -> None:
    section = {"callbacks": {"timer": {"target": "pytorch_lightning.callbacks.Timer"}}}
    kinds = [type(callback).__name__ for callback in prepared(tmp_path, pictures, lightning=section).trainer.callbacks]  # type: ignore[attr-defined]
    assert "Timer" in kinds


def test_curves_go_to_tensorboard_inside_the_run(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, logger=True, images=True)
    assert isinstance(run.trainer.logger, TensorBoardLogger)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "val/loss", "lr-AdamW"} <= set(events.Tags()["scalars"])
    assert {"train/samples", "train/overview"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Scalars("val/loss")] == [5, 11]


def test_a_logger_in_the_yaml_replaces_tensorboard_and_writes_inside_the_run(pictures: Path, tmp_path: Path) -> None:
    section = {"logger": {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"name": "csv"}}}
    run = toy_run(tmp_path, pictures, lightning=section, logger=True)
    assert isinstance(run.trainer.logger, CSVLogger)
    assert list((tmp_path / "csv").rglob("metrics.csv"))


def test_checkpoints_are_written_by_the_projects_own_writer(pictures: Path, tmp_path: Path) -> None:
    assert isinstance(prepared(tmp_path, pictures).trainer.strategy.checkpoint_io, StreamingCheckpointIO)


@pytest.mark.parametrize(("options", "steps"), [({"max_steps": 5}, 5), ({"max_epochs": 1}, 6), ({}, 12)])
def test_limits_on_epochs_and_steps_act(options: dict[str, int], steps: int, pictures: Path, tmp_path: Path) -> None:
    assert toy_run(tmp_path, pictures, **options).trainer.global_step == steps


@pytest.mark.parametrize(("every", "batches"), [(1, 12), (2, 6), (4, 3)])
def test_validation_runs_every_few_epochs(every: int, batches: int, pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_epochs=4, check_val_every_n_epoch=every)
    assert len(run.model.validated) == batches


def test_validation_is_not_rehearsed_before_training(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_steps=1)
    assert run.model.validated == []


def test_precision_acts(pictures: Path, tmp_path: Path) -> None:
    full = toy_run(tmp_path / "full", pictures)
    half = toy_run(tmp_path / "half", pictures, precision="bf16-mixed")
    assert half.model.losses != full.model.losses
    assert half.model.losses == pytest.approx(full.model.losses, rel=0.1)


@pytest.mark.parametrize("find_unused", [True, False])
def test_several_devices_train_together_as_the_yaml_says(find_unused: bool, pictures: Path, tmp_path: Path) -> None:
    section = {"find_unused_parameters": find_unused}
    strategy = prepared(tmp_path, pictures, lightning=section, devices=2).trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is find_unused


def test_devices_expect_no_gradient_of_a_part_that_stops(tmp_path: Path) -> None:
    section = {"trainer": {"accelerator": "cpu", "devices": 2}}
    directory = RunDirectory(tmp_path, "stamp")
    trainer = build_trainer(section, directory, StopSignals(), 2, monitor=None, validates=False, parts_stop=True)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._ddp_kwargs["find_unused_parameters"] is True


def test_a_strategy_in_the_yaml_is_kept(pictures: Path, tmp_path: Path) -> None:
    strategy = prepared(tmp_path, pictures, strategy="ddp_spawn", devices=2).trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    assert strategy._start_method == "spawn"


def test_checkpoints_can_be_switched_off(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, enable_checkpointing=False)
    assert list(run.directory.checkpoints.iterdir()) == []
