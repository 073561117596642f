from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.training.stop_signals import Interrupted
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import StopAt, ToyRun, prepare_toy_run, toy_run

# 6 pictures x 2 repeats, batch 2: 6 batches an epoch, 12 in two epochs. Pieces, each with its own trouble.
CASES: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 2},
    "max_steps far away": {"max_epochs": 2, "max_steps": 99000},
    "accumulation": {"max_epochs": 2, "accumulate_grad_batches": 2},
    "uneven accumulation": {"max_epochs": 2, "accumulate_grad_batches": 4},
    "uneven accumulation and max_steps": {"max_epochs": 2, "accumulate_grad_batches": 4, "max_steps": 99000},
    "validation every second epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "validation twice an epoch": {"max_epochs": 2, "val_check_interval": 0.5},
    "validation twice an epoch and max_steps": {"max_epochs": 2, "val_check_interval": 0.5, "max_steps": 99000},
    "validation every four batches of all epochs": {"check_val_every_n_epoch": None, "val_check_interval": 4},
    "no validation": {"max_epochs": 2, "validation": False},
}


MOMENTS = [
    (name, step)
    for name, case in CASES.items()
    for step in range(1, min(8, 2 * math.ceil(6 / case.get("accumulate_grad_batches", 1))))
]
"""Every step of the first epoch, the first of the second, and no step at which a run ends."""


def stopped_run(folder: Path, pictures: Path, case: dict[str, Any], **moment: int) -> ToyRun:
    """Train until the moment, stop, and hand back the stopped run."""
    stop = StopAt(**moment)
    run, data = prepare_toy_run(folder, pictures, extra=[stop], **case)
    stop.signals = run.signals
    with run.signals, pytest.raises(Interrupted):
        run.trainer.fit(run.model, datamodule=data)
    return run


def assert_same_run(first: ToyRun, second: ToyRun, whole: ToyRun) -> None:
    assert first.model.shown + second.model.shown == whole.model.shown
    assert first.model.losses + second.model.losses == whole.model.losses
    assert torch.equal(second.weights, whole.weights)
    assert second.trainer.global_step == whole.trainer.global_step
    assert second.trainer.current_epoch == whole.trainer.current_epoch
    logged = whole.trainer.fit_loop.epoch_loop._batches_that_stepped
    assert second.trainer.fit_loop.epoch_loop._batches_that_stepped == logged


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, ToyRun]:
    return {name: toy_run(tmp_path_factory.mktemp("whole"), pictures, **case) for name, case in CASES.items()}


@pytest.mark.parametrize(("name", "step"), MOMENTS)
def test_a_run_stopped_at_any_step_continues_as_if_unbroken(
    name: str, step: int, whole_runs: dict[str, ToyRun], pictures: Path, tmp_path: Path
) -> None:
    whole = whole_runs[name]
    first = stopped_run(tmp_path, pictures, CASES[name], step=step)
    second = toy_run(tmp_path, pictures, checkpoint=first.last, **CASES[name])
    assert first.trainer.global_step == step
    assert_same_run(first, second, whole)
    assert first.model.validated + second.model.validated == whole.model.validated


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("validation", True)])
def test_a_validation_that_was_broken_off_is_run_again_from_its_beginning(
    name: str, batch: int, whole_runs: dict[str, ToyRun], pictures: Path, tmp_path: Path
) -> None:
    whole = whole_runs[name]
    first = stopped_run(tmp_path, pictures, CASES[name], validation_batch=batch)
    second = toy_run(tmp_path, pictures, checkpoint=first.last, **CASES[name])
    assert len(first.model.validated) == batch
    assert_same_run(first, second, whole)
    assert second.model.validated == whole.model.validated


@pytest.mark.parametrize("name", ["epochs", "accumulation", "uneven accumulation and max_steps"])
def test_a_run_that_reached_max_steps_goes_on_where_it_ended_when_they_are_raised(
    name: str, whole_runs: dict[str, ToyRun], pictures: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    for steps in (1, 2, 3):
        first = toy_run(tmp_path / str(steps), pictures, **{**case, "max_steps": steps})
        second = toy_run(tmp_path / str(steps), pictures, checkpoint=first.last, **{**case, "max_steps": 99000})
        assert_same_run(first, second, whole_runs[name])


@pytest.mark.parametrize("name", CASES)
def test_the_checkpoint_of_the_first_epoch_continues_with_the_second(name: str, pictures: Path, tmp_path: Path) -> None:
    every = {"lightning": {"modelcheckpoint": {"params": {"save_top_k": -1}}}}
    whole = toy_run(tmp_path / "whole", pictures, **CASES[name], **every)
    checkpoint = next(whole.directory.checkpoints.glob("epoch=00-*.ckpt"))
    second = toy_run(tmp_path / "second", pictures, checkpoint=checkpoint, **CASES[name])
    assert second.model.shown == [row for row in whole.model.shown if row[1] > 0]
    assert torch.equal(second.weights, whole.weights)
    assert second.trainer.global_step == whole.trainer.global_step


def test_a_checkpoint_saved_by_steps_at_the_end_of_an_epoch_continues_with_its_validation(
    pictures: Path, tmp_path: Path
) -> None:
    case: dict[str, Any] = {"lightning": {"modelcheckpoint": {"params": {"every_n_train_steps": 3, "save_top_k": -1}}}}
    whole = toy_run(tmp_path / "whole", pictures, **case)
    checkpoint = next((tmp_path / "whole" / "checkpoints").glob("*step=00006.ckpt"))
    second = toy_run(tmp_path / "second", pictures, checkpoint=checkpoint, **case)
    assert second.model.shown == [row for row in whole.model.shown if row[1] > 0]
    assert second.model.validated == whole.model.validated
    assert torch.equal(second.weights, whole.weights)


def test_a_failure_inside_an_accumulation_continues_with_its_first_batch(pictures: Path, tmp_path: Path) -> None:
    case: dict[str, Any] = {"accumulate_grad_batches": 3}
    whole = toy_run(tmp_path / "whole", pictures, **case)

    class FailsInside(ToyDiffusion):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            if self.global_step == 2 and batch_idx == 1:
                raise RuntimeError("the toy broke")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    model = FailsInside()
    run, data = prepare_toy_run(tmp_path, pictures, model=model, **case)
    with pytest.raises(RuntimeError, match="the toy broke"):
        run.trainer.fit(run.model, datamodule=data)
    second = toy_run(tmp_path, pictures, checkpoint=run.last, **case)
    assert len(run.model.shown) == 14  # an epoch of 12, and 2 of the 6 of the third step
    assert run.model.shown[:12] + second.model.shown == whole.model.shown
    assert torch.equal(second.weights, whole.weights)
