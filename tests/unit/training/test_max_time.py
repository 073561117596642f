"""``--max_time``: what it saves when, and that nothing is lost or shown twice when the run goes on."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.training.run import main
from ldm.training.run_record import read_record
from tests.unit.training.test_resume import CASES, assert_same_run
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run

LIMIT = timedelta(seconds=0.4)
AMPLE = timedelta(hours=1)


class SlowBatch(Callback):
    """Takes all of the time in one batch of the run, and remembers what was saved when the validation began."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.saved: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            time.sleep(LIMIT.total_seconds())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        self.saved.append(torch.load(last, weights_only=True)["global_step"] if last.exists() else 0)


def timed_run(folder: Path, pictures: Path, batch: int, **case: Any) -> tuple[ToyRun, SlowBatch]:
    slow = SlowBatch(batch)
    run, data = prepare_toy_run(folder, pictures, extra=[slow], **{**case, "max_time": LIMIT})
    with run.signals:
        run.trainer.fit(run.model, datamodule=data)
    return run, slow


class TakesItsTime(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            time.sleep(1.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("name", "batch"), [("epochs", 2), ("epochs", 6), ("accumulation", 4), ("validation twice an epoch", 3)]
)
def test_a_run_whose_time_is_over_goes_on_exactly_where_it_ended(
    name: str, batch: int, pictures: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    whole = toy_run(tmp_path / "whole", pictures, **case)
    first, _ = timed_run(tmp_path, pictures, batch, **case)
    second = toy_run(tmp_path, pictures, checkpoint=first.last, **{**case, "max_time": AMPLE})
    assert len(first.model.shown) == 2 * batch
    assert_same_run(first, second, whole)


def test_a_step_that_was_being_accumulated_when_time_was_over_is_begun_again(pictures: Path, tmp_path: Path) -> None:
    case = CASES["uneven accumulation"]
    whole = toy_run(tmp_path / "whole", pictures, **case)
    first, _ = timed_run(tmp_path, pictures, 3, **case)
    second = toy_run(tmp_path, pictures, checkpoint=first.last, **{**case, "max_time": AMPLE})
    assert second.model.shown == whole.model.shown
    assert torch.equal(second.weights, whole.weights)


def test_last_ckpt_is_saved_before_the_validation_that_follows_the_end_of_the_time(
    pictures: Path, tmp_path: Path
) -> None:
    run, slow = timed_run(tmp_path, pictures, 2)
    assert slow.saved == [2]
    assert torch.load(run.last, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 0


def test_a_run_that_is_out_of_time_says_so_and_ends_with_0(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(YAML.format(model="x").replace("test_run.x", "test_max_time.TakesItsTime"))
    begin = ["-t", "-b", "toy.yaml", "--data_root", str(pictures), "--max_time", "00:00:00:01"]
    assert main(begin) == 0
    (run,) = Path("logs").iterdir()
    text = capsys.readouterr().out
    assert "saved step 3 as" in text
    assert f"to go on, raise it: python main.py -t -r {run} --max_time" in text
    assert main(["-t", "-r", str(run)]) == 0
    text = capsys.readouterr().out
    assert "nothing is left to train" in text
    assert "raise --max_time to go on" in text
    assert main(["-t", "-r", str(run), "--max_time", "00:00:10:00"]) == 0
    record = read_record(run)
    assert record is not None
    assert [session["reason"] for session in record["sessions"]] == ["max_time", "max_epochs 1"]
    assert record["step"] == 6
