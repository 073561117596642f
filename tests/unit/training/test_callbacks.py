from __future__ import annotations

import os
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.training.callbacks import NewestCheckpoints, model_checkpoint_params, time_span
from ldm.training.checkpoint_io import CheckpointWriteError, StreamingCheckpointIO, file_size, format_size
from ldm.training.disk import Disk
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run

EPOCHS = ["epoch=00-step=00006.ckpt", "epoch=01-step=00012.ckpt"]


def names(run: ToyRun) -> list[str]:
    return sorted(path.name for path in run.directory.checkpoints.iterdir())


def saving(**params: Any) -> dict[str, Any]:
    return {"lightning": {"modelcheckpoint": {"params": params}}}


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def failing_run(folder: Path, pictures: Path, model: ToyDiffusion, match: str = "the toy broke") -> ToyRun:
    run, data = prepare_toy_run(folder, pictures, model=model)
    with pytest.raises(RuntimeError, match=match):
        run.trainer.fit(run.model, datamodule=data)
    return run


def test_every_epoch_leaves_a_checkpoint_and_last_ckpt_is_the_newest(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures)
    assert names(run) == ["epoch=00-step=00006.ckpt", "epoch=01-step=00012.ckpt", "last.ckpt"]
    assert os.path.samefile(run.last, run.directory.checkpoints / "epoch=01-step=00012.ckpt")


def test_last_ckpt_is_kept_up_to_date_when_only_the_best_is_kept(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, model=GetsWorse(monitor="val/loss"), **saving(save_top_k=1, save_last=False))
    assert names(run) == ["epoch=00-step=00006.ckpt", "last.ckpt"]
    assert step_of(run.last) == 12


def test_the_best_checkpoints_are_kept_by_the_models_monitor(pictures: Path, tmp_path: Path) -> None:
    class GetsBetterThenWorse(ToyDiffusion):
        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            self.log("val/loss", [3.0, 1.0, 2.0][self.current_epoch], batch_size=len(batch["image"]))

    model = GetsBetterThenWorse(monitor="val/loss")
    run = toy_run(tmp_path, pictures, model=model, max_epochs=3, **saving(save_top_k=2))
    assert names(run) == ["epoch=01-step=00012.ckpt", "epoch=02-step=00018.ckpt", "last.ckpt"]


def test_checkpoints_can_be_made_every_few_epochs(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_epochs=5, **saving(every_n_epochs=2))
    assert names(run) == ["epoch=01-step=00012.ckpt", "epoch=03-step=00024.ckpt", "last.ckpt"]
    assert step_of(run.last) == 30


def test_checkpoints_can_be_made_every_few_steps(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, **saving(every_n_train_steps=5, save_top_k=-1))
    assert names(run) == ["epoch=00-step=00005.ckpt", "epoch=01-step=00010.ckpt", "last.ckpt"]
    assert step_of(run.last) == 12


class GetsWorse(ToyDiffusion):
    """Is best in its first epoch."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", float(self.current_epoch), batch_size=len(batch["image"]))


def test_the_newest_are_kept_beside_the_best_if_asked_for(pictures: Path, tmp_path: Path) -> None:
    model = GetsWorse(monitor="val/loss")
    run = toy_run(tmp_path, pictures, model=model, max_epochs=4, **saving(save_top_k=1, keep_last_n=2))
    newest = ["newest-epoch=02-step=00018.ckpt", "newest-epoch=03-step=00024.ckpt"]
    assert names(run) == ["epoch=00-step=00006.ckpt", "last.ckpt", *newest]
    assert [step_of(run.directory.checkpoints / name) for name in newest] == [18, 24]
    assert os.path.samefile(run.last, run.directory.checkpoints / newest[1])


def test_a_checkpoint_that_is_best_and_newest_takes_the_room_of_one(pictures: Path, tmp_path: Path) -> None:
    model = GetsWorse(monitor="val/loss")
    run = toy_run(tmp_path, pictures, model=model, max_epochs=1, **saving(save_top_k=1, keep_last_n=2))
    assert names(run) == ["epoch=00-step=00006.ckpt", "last.ckpt", "newest-epoch=00-step=00006.ckpt"]
    assert run.last.stat().st_nlink == 3


def test_where_no_metric_decides_keep_last_n_is_how_many_are_kept(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_epochs=3, **saving(keep_last_n=1))
    assert names(run) == ["epoch=02-step=00018.ckpt", "last.ckpt"]


def test_the_newest_are_still_counted_in_a_resumed_run(pictures: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**saving(save_top_k=1, keep_last_n=1)}
    first = toy_run(tmp_path, pictures, model=GetsWorse(monitor="val/loss"), max_epochs=2, **options)
    second = toy_run(tmp_path, pictures, first.last, model=GetsWorse(monitor="val/loss"), max_epochs=3, **options)
    assert names(second) == ["epoch=00-step=00006.ckpt", "last.ckpt", "newest-epoch=02-step=00018.ckpt"]


@pytest.mark.parametrize("params", [{}, {"save_top_k": 1, "keep_last_n": 1}, {"keep_last_n": 2, "background": True}])
def test_a_run_killed_before_last_ckpt_was_renewed_leaves_no_checkpoint_twice_when_continued(
    params: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    model = ToyDiffusion(monitor="val/loss")
    whole = toy_run(tmp_path / "whole", pictures, model=model, max_epochs=4, **saving(**params))
    first = toy_run(tmp_path / "a", pictures, model=ToyDiffusion(monitor="val/loss"), max_epochs=2, **saving(**params))
    earlier = first.last.read_bytes()
    second = toy_run(
        tmp_path / "a", pictures, first.last, model=ToyDiffusion(monitor="val/loss"), max_epochs=3, **saving(**params)
    )
    second.last.unlink()
    second.last.write_bytes(earlier)
    third = toy_run(
        tmp_path / "a", pictures, second.last, model=ToyDiffusion(monitor="val/loss"), max_epochs=4, **saving(**params)
    )
    assert names(third) == names(whole)


def test_a_run_continued_from_a_file_written_before_it_got_its_newest_name_still_counts_that(
    pictures: Path, tmp_path: Path
) -> None:
    options = saving(save_top_k=-1, keep_last_n=2, every_n_epochs=1)
    first = toy_run(tmp_path, pictures, model=GetsWorse(monitor="val/loss"), max_epochs=3, **options)
    third_epoch = first.directory.checkpoints / "epoch=02-step=00018.ckpt"
    second = toy_run(tmp_path, pictures, third_epoch, model=GetsWorse(monitor="val/loss"), max_epochs=4, **options)
    newest = [name for name in names(second) if name.startswith("newest")]
    assert newest == ["newest-epoch=02-step=00018.ckpt", "newest-epoch=03-step=00024.ckpt"]


def test_a_checkpoint_that_is_kept_is_not_written_over_by_one_of_the_same_name(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, **saving(every_n_train_steps=3, filename="{epoch:02d}", save_top_k=-1))
    assert names(run) == ["epoch=00-v1.ckpt", "epoch=00.ckpt", "epoch=01-v1.ckpt", "epoch=01.ckpt", "last.ckpt"]


@pytest.mark.parametrize(("before", "after"), [(3, 1), (-1, 1), (3, 2), (1, 3), (2, 2)])
def test_a_resumed_run_can_keep_more_or_fewer_of_the_best(
    before: int, after: int, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(top_k: int, epochs: int, **more: Any) -> ToyRun:
        model = ToyDiffusion(monitor="val/loss")
        return toy_run(tmp_path, pictures, model=model, max_epochs=epochs, **saving(save_top_k=top_k), **more)

    first = run(before, 3)
    surplus = max(0, len(list(first.directory.checkpoints.glob("epoch*"))) - after)
    with caplog.at_level("INFO"):
        resumed = run(after, 5, checkpoint=first.last)
    assert resumed.trainer.current_epoch == 5
    assert len(list(first.directory.checkpoints.glob("epoch*"))) == after + surplus
    assert ("never deleted by the run" in caplog.text) == (surplus > 0)


def test_checkpoints_by_time_are_made_at_complete_steps_and_last_ckpt_follows(pictures: Path, tmp_path: Path) -> None:
    class TwoHoursPass(pl.Callback):
        """Lets the clock jump between two batches of one optimiser step."""

        found: list[str]

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            self.found = names(run)
            if batch_idx == 2:
                regular: Any = trainer.checkpoint_callbacks[0]
                regular._last_time_checked -= 7200

    clock = TwoHoursPass()
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "extra": [clock]}
    run, data = prepare_toy_run(tmp_path, pictures, **options, **saving(train_time_interval="00:02:00:00"))
    run.trainer.fit(run.model, datamodule=data)
    assert clock.found == ["epoch=00-step=00002.ckpt", "last.ckpt"]
    assert names(run) == ["epoch=00-step=00002.ckpt", "last.ckpt"]
    assert step_of(run.last) == 3


def test_a_span_of_time_without_its_parts_is_told() -> None:
    assert time_span("01:02:03:04").total_seconds() == 93784
    with pytest.raises(ValueError, match=r"'2h' is no time span; write days:hours:minutes:seconds"):
        time_span("2h")


def test_checkpoints_are_made_in_epochs_without_validation(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, check_val_every_n_epoch=2, max_epochs=3, model=ToyDiffusion(monitor="val/loss"))
    assert names(run) == [*EPOCHS, "epoch=02-step=00018.ckpt", "last.ckpt"]
    assert step_of(run.last) == 18


def test_epochs_without_validation_are_not_judged_by_an_earlier_one(pictures: Path, tmp_path: Path) -> None:
    model = ToyDiffusion(monitor="val/loss")
    run = toy_run(tmp_path, pictures, check_val_every_n_epoch=2, max_epochs=4, model=model, **saving(save_top_k=1))
    kept = {path.name for path in run.directory.checkpoints.iterdir()}
    assert len(kept & {"epoch=01-step=00012.ckpt", "epoch=03-step=00024.ckpt"}) == 1
    assert kept & {"epoch=00-step=00006.ckpt", "epoch=02-step=00018.ckpt"} == {"epoch=02-step=00018.ckpt"}


@pytest.mark.parametrize("limit", [0, 0.0])
def test_checkpoints_are_made_where_validation_is_switched_off(limit: float, pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, limit_val_batches=limit, model=ToyDiffusion(monitor="val/loss"))
    assert names(run) == [*EPOCHS, "last.ckpt"]


def test_checkpoints_are_made_without_a_validation_set(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, validation=False, model=ToyDiffusion(monitor="val/loss"))
    assert names(run) == [*EPOCHS, "last.ckpt"]


def test_checkpoints_are_made_where_the_monitored_metric_does_not_exist(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = toy_run(tmp_path, pictures, model=ToyDiffusion(monitor="val/los"))
    assert names(run) == [*EPOCHS, "last.ckpt"]
    told = [record.getMessage() for record in caplog.records if "val/los " in record.getMessage()]
    assert told == [
        "monitor val/los is not among what the validation measures (val/loss): checkpoints are kept by their step"
    ]


def test_a_run_that_ends_within_its_first_epoch_has_last_ckpt(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_steps=4, model=ToyDiffusion(monitor="val/loss"))
    assert step_of(run.last) == 4


def test_a_short_rehearsal_does_not_claim_to_have_saved(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, data = prepare_toy_run(tmp_path, pictures, fast_dev_run=3, model=ToyDiffusion(fail_at_step=2))
    caplog.set_level("INFO")
    with pytest.raises(RuntimeError, match="the toy broke"):
        run.trainer.fit(run.model, datamodule=data)
    assert "saved" not in caplog.text


def test_a_name_in_the_yaml_is_followed(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_epochs=1, **saving(filename="{epoch:03d}-{global_step:.0f}-mine"))
    assert any(name.startswith("epoch=000-global_step=") and name.endswith("-mine.ckpt") for name in names(run))


def test_without_validation_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    params = model_checkpoint_params({}, "val/loss_simple_ema", validates=False, folder=tmp_path)
    assert (params["monitor"], params["mode"], params["save_top_k"]) == ("step", "max", 3)


def test_a_monitor_in_the_yaml_wins_over_the_models(tmp_path: Path) -> None:
    params = model_checkpoint_params({"monitor": "val/loss"}, "val/loss_simple_ema", validates=True, folder=tmp_path)
    assert params["monitor"] == "val/loss"


def test_a_failure_is_shown_and_leaves_what_was_reached(pictures: Path, tmp_path: Path) -> None:
    run = failing_run(tmp_path, pictures, ToyDiffusion(fail_at_step=4))
    assert step_of(run.last) == 4


def test_a_failure_in_the_first_step_leaves_no_checkpoint(pictures: Path, tmp_path: Path) -> None:
    run = failing_run(tmp_path, pictures, ToyDiffusion(fail_at_step=0))
    assert names(run) == []


def test_weights_that_blew_up_do_not_replace_last_ckpt(pictures: Path, tmp_path: Path) -> None:
    class BlowsUp(ToyDiffusion):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            if self.global_step == 8:
                torch.nn.init.constant_(self.model[0].weight, float("nan"))
                raise RuntimeError("the toy broke")
            return super().training_step(batch, batch_idx)

    run = failing_run(tmp_path, pictures, BlowsUp())
    assert step_of(run.last) == 6


def test_a_run_whose_weights_blew_up_does_not_cost_its_only_good_checkpoint(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class BlowsUp(ToyDiffusion):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_step == 12:  # the last step of the second epoch, whose own loss was still finite
                torch.nn.init.constant_(self.model[0].weight, float("nan"))

    run = toy_run(tmp_path, pictures, model=BlowsUp(), max_epochs=2, **saving(save_top_k=1))
    assert names(run) == [EPOCHS[0], "last.ckpt"]
    assert step_of(run.last) == 6
    assert "step 12 is not saved: the model's weights are no longer finite numbers" in caplog.text


def test_a_failure_to_save_does_not_hide_the_failure_before_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(StreamingCheckpointIO, "save_checkpoint", refuse)
    failing_run(tmp_path, pictures, ToyDiffusion(fail_at_step=4))
    assert "disk full" in caplog.text


def test_a_disk_that_is_full_ends_the_run_with_the_files_name(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(checkpoint: object, stream: object) -> None:
        raise RuntimeError("file write failed")

    run, data = prepare_toy_run(tmp_path, pictures)
    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match=r"epoch=00-step=00006\.ckpt"):
        run.trainer.fit(run.model, datamodule=data)


def test_a_disk_that_fills_up_during_the_run_stops_it_and_says_which_checkpoints_could_go(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FillsUp(Disk):
        def free(self, folder: Path) -> int:
            return 0 if (folder / "epoch=01-step=00012.ckpt").exists() else super().free(folder)

    run, data = prepare_toy_run(tmp_path, pictures, max_epochs=3)
    checkpoint_io = run.trainer.strategy.checkpoint_io
    assert isinstance(checkpoint_io, StreamingCheckpointIO)
    checkpoint_io.disk = FillsUp()
    with pytest.raises(CheckpointWriteError, match=r"epoch=02-step=00018\.ckpt needs .*\(epoch=00-step=00006\.ckpt \("):
        run.trainer.fit(run.model, datamodule=data)
    assert names(run) == [*EPOCHS, "last.ckpt"]
    assert step_of(run.last) == 12
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_disk_without_room_for_one_checkpoint_is_told_before_the_first_step(pictures: Path, tmp_path: Path) -> None:
    class Full(Disk):
        def free(self, folder: Path) -> int:
            return 1000

    run, data = prepare_toy_run(tmp_path, pictures)
    checkpoint_io = run.trainer.strategy.checkpoint_io
    assert isinstance(checkpoint_io, StreamingCheckpointIO)
    checkpoint_io.disk = Full()
    with pytest.raises(CheckpointWriteError, match=r"last\.ckpt needs .* has 0\.0 MB free"):
        run.trainer.fit(run.model, datamodule=data)
    assert run.model.losses == []
    assert names(run) == []


def test_a_checkpoint_holds_step_weights_and_optimiser_and_loads_safely(pictures: Path, tmp_path: Path) -> None:
    content = torch.load(toy_run(tmp_path, pictures).last, weights_only=True)
    assert content["global_step"] == 12
    assert "model.0.weight" in content["state_dict"]
    assert content["optimizer_states"][0]["state"]


@pytest.mark.parametrize("more", [0, 1])
def test_a_checkpoint_whose_second_name_a_kill_prevented_gets_it_when_the_run_goes_on(
    more: int, pictures: Path, tmp_path: Path
) -> None:
    options = saving(every_n_train_steps=2, save_top_k=3, keep_last_n=2, filename="{step}", monitor="train/loss")
    run = toy_run(tmp_path / "a", pictures, max_steps=6 + 2 * more, **options)
    toy_run(tmp_path / "b", pictures, max_steps=6, **options)
    killed = tmp_path / "b" / "checkpoints"
    (killed / "last.ckpt").unlink()
    (killed / "newest-step=6.ckpt").unlink()
    shutil.copy(killed / "step=2.ckpt", killed / "newest-step=2.ckpt")
    toy = toy_run(tmp_path / "b", pictures, killed / "step=6.ckpt", max_steps=6 + 2 * more, **options)
    if not more:
        next(each for each in toy.trainer.callbacks if isinstance(each, NewestCheckpoints)).take_up(  # type: ignore[attr-defined]
            toy.trainer, killed / "step=6.ckpt", is_end=True
        )
    newest = [name for name in names(run) if name.startswith("newest-")]
    assert [name for name in names(toy) if name.startswith("newest-")] == newest
    assert newest == [f"newest-step={step + 2 * more}.ckpt" for step in (4, 6)]


def test_a_signal_that_arrives_while_a_failure_is_saved_after_does_not_hide_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, data = prepare_toy_run(tmp_path, pictures, model=ToyDiffusion(fail_at_step=3))
    save = toy.trainer.save_checkpoint

    def save_slowly(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments, **options)

    monkeypatch.setattr(toy.trainer, "save_checkpoint", save_slowly)
    with toy.signals, pytest.raises(RuntimeError, match="the toy broke"):
        toy.trainer.fit(toy.model, datamodule=data)
    assert step_of(toy.last) == 3
    assert toy.signals.requested is None


def judged() -> ToyDiffusion:
    """Build the toy with the same weights each time, and checkpoints judged by its validation."""
    torch.manual_seed(0)
    return ToyDiffusion("val/loss")


class LosesAPicture(Callback):
    """Takes a picture away when a validation begins."""

    def __init__(self, picture: Path, validation: int) -> None:
        self.picture = picture
        self.validation = validation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation -= 1
        if self.validation == 0:
            self.picture.rename(self.picture.with_suffix(".away"))


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 12}, {"max_steps": 14}])
@pytest.mark.parametrize("validation", [1, 2])
@pytest.mark.parametrize("number", [0, 5])
def test_a_validation_that_failed_over_a_picture_is_done_again(
    number: int, validation: int, limit: dict[str, int], pictures: Path, tmp_path: Path
) -> None:
    whole = toy_run(tmp_path / "whole", pictures, model=judged(), **limit)
    picture = sorted(pictures.glob("*/*.png"))[number]
    first, data = prepare_toy_run(
        tmp_path / "run", pictures, model=judged(), extra=[LosesAPicture(picture, validation)], **limit
    )
    with pytest.raises(OSError, match="vanished"):
        first.trainer.fit(first.model, datamodule=data)
    picture.with_suffix(".away").rename(picture)
    second = toy_run(tmp_path / "run", pictures, first.last, model=judged(), **limit)
    assert second.model.validated == whole.model.validated[len(whole.model.validated) // 2 * (validation - 1) :]
    assert names(second) == names(whole)
    assert torch.equal(second.weights, whole.weights)


@pytest.mark.parametrize("held", [np.zeros(2), Path("x"), torch.zeros(2).to_sparse(), defaultdict(int, a=1), lambda: 0])
def test_a_callback_whose_state_no_checkpoint_can_give_back_is_refused_before_the_first_step(
    held: Any, pictures: Path, tmp_path: Path
) -> None:
    class Holds(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"fine": [1, "two", torch.zeros(1)], "held": held}

    with pytest.raises(CheckpointWriteError, match="the state of the callback Holds could not be read back"):
        toy_run(tmp_path, pictures, extra=[Holds()])


def test_a_file_that_could_not_be_continued_does_not_replace_the_one_before(pictures: Path, tmp_path: Path) -> None:
    class Turns(Callback):
        held: Any = 1

        def on_train_batch_end(self, trainer: pl.Trainer, *others: Any) -> None:
            self.held = np.zeros(2) if trainer.global_step > 7 else 1

        def state_dict(self) -> dict[str, Any]:
            return {"held": self.held}

    with pytest.raises(CheckpointWriteError, match="could not write the checkpoint"):
        toy_run(tmp_path, pictures, extra=[Turns()])
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 6


def test_little_room_is_told_before_the_first_step(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy, data = prepare_toy_run(tmp_path, pictures)
    weights = file_size(toy.model.state_dict())

    class Small(Disk):
        def free(self, folder: Path) -> int:
            return weights

    toy.trainer.strategy.checkpoint_io.disk = Small()  # type: ignore[attr-defined]
    with pytest.raises(CheckpointWriteError):
        toy.trainer.fit(toy.model, datamodule=data)
    told = [
        record.getMessage() for record in caplog.records if "make room before the first save" in record.getMessage()
    ]
    assert len(told) == 1
    assert f"has {format_size(weights)} free" in told[0]
