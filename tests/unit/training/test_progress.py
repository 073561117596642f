from __future__ import annotations

import io
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.training.progress import RunProgress, _metrics_text, format_duration
from tests.unit.training.toy_run import ToyRun, toy_run

SHOWN: dict[str, Any] = {"enable_progress_bar": True}


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def progress_of(run: ToyRun) -> RunProgress:
    return next(callback for callback in run.trainer.callbacks if isinstance(callback, RunProgress))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.4, "0:59"), (61, "1:01"), (3599.6, "1:00:00"), (36610, "10:10:10")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_lines_state_epoch_batch_loss_speed_and_time_left(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ldm")
    run = toy_run(tmp_path, pictures, **SHOWN)
    lines = [line for line in caplog.messages if "images/s" in line]
    assert lines[0].startswith("epoch 1/2  batch 1/6  step 1  loss ")
    assert lines[-1].startswith("epoch 2/2  batch 6/6  step 12  loss ")
    assert lines[-1].endswith("0:00 left")
    mean = sum(run.model.losses) / len(run.model.losses)
    assert f"loss {mean:.4f}" in lines[-1]


def test_the_loss_is_the_batches_own_under_accumulation(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ldm")
    run = toy_run(tmp_path, pictures, accumulate_grad_batches=3, **SHOWN)
    first = next(line for line in caplog.messages if "images/s" in line)
    assert f"loss {run.model.losses[0]:.4f}" in first


def test_validation_results_get_a_line(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ldm")
    toy_run(tmp_path, pictures, **SHOWN)
    assert sum("validation val/loss " in line for line in caplog.messages) == 2


def test_without_a_terminal_nothing_is_written_but_log_lines(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_run(tmp_path, pictures, **SHOWN)
    assert "\r" not in "".join(capsys.readouterr())


def test_a_terminal_gets_a_bar_an_epoch(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    toy_run(tmp_path, pictures, **SHOWN)
    shown = terminal.getvalue()
    assert "epoch 1/2 100%|" in shown.replace("epoch 1/2 (validating)", "epoch 1/2")
    assert "epoch 2/2" in shown
    assert "| 6/6 " in shown
    assert "images/s" in shown
    assert "left" in shown


def test_the_time_left_covers_later_epochs_and_their_validations(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, **SHOWN)
    progress, trainer = progress_of(run), run.trainer
    progress._seconds_per_batch, progress._seconds_per_validation = 2.0, 5.0
    trainer.fit_loop.epoch_progress.current.completed = 0
    assert progress.seconds_left(trainer, 2) == (4 + 6) * 2.0 + 2 * 5.0


def test_the_time_left_ends_with_max_steps(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_steps=13, max_epochs=-1, validation=False, **SHOWN)
    progress, trainer = progress_of(run), run.trainer
    progress._seconds_per_batch = 2.0
    trainer.fit_loop.epoch_loop.max_steps = 20
    assert progress.seconds_left(trainer, 1) == 7 * 2.0


def test_a_run_without_end_has_no_time_left(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_epochs=1, **SHOWN)
    run.trainer.fit_loop.max_epochs = -1
    assert math.isinf(progress_of(run).seconds_left(run.trainer, 3))


def test_figures_of_averaged_weights_are_shown_where_they_differ() -> None:
    metrics = {name: torch.tensor(value) for name, value in {"val/a": 1.0, "val/a_ema": 1.0, "val/b_ema": 2.0}.items()}
    assert _metrics_text(metrics, "val/") == "val/a 1.0000  val/b_ema 2.0000"
