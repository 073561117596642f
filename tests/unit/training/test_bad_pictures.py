"""Runs whose pictures break while they train."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import exposure
from ldm.data.every_dream import EveryDreamBatch
from ldm.training.batches import readable_rows, share_that_counts
from ldm.training.run import main
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import toy_run

LOST = "mine/folder0/a plain square 0_.png"

YAML = """
model:
  base_learning_rate: 0.01
  target: tests.unit.training.test_bad_pictures.WeighedToy
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: {target: ldm.data.every_dream.EveryDreamBatch, params: {size: 16, repeats: 2}}
    validation: {target: ldm.data.ed_validate.EDValidateBatch, params: {size: 16}}
lightning:
  callbacks:
    image_logger: {params: {disabled: true}}
    fault: {target: tests.unit.training.test_bad_pictures.LosesOne}
  trainer: {max_epochs: 2}
"""


class WeighedToy(ToyDiffusion):
    """The toy, minding how much each picture counts."""

    def loss(self, batch: dict[str, Any]) -> Tensor:
        noise = exposure.randn("noise", batch["exposure"].cpu(), (3,))
        colour = batch["image"].mean(dim=(1, 2))
        each = F.mse_loss(self.model(colour + noise), noise, reduction="none").mean(dim=1)
        return (each * batch["loss_weight"]).mean()


class Breaks(WeighedToy):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.current_epoch == 1 and batch_idx == 5:
            raise RuntimeError("the toy broke")
        return super().training_step(batch, batch_idx)


class IsStopped(WeighedToy):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.current_epoch == 1 and batch_idx == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, batch_idx)


class WithoutOne(EveryDreamBatch):
    """A set in which one picture counts nothing."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "loss_weight": torch.zeros(())} if item["path"] == LOST else item


class LosesOne(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Path(LOST).unlink(missing_ok=True)


class LosesAll(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for path in Path("mine").glob("*/*.png"):
            path.write_bytes(b"no picture")


class LosesTheFolder(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shutil.rmtree("mine")


class LosesAllBeforeValidation(pl.Callback):
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for path in Path("mine").glob("*/*.png"):
            path.unlink(missing_ok=True)


class LosesOneBeforeTheTest(pl.Callback):
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Path(LOST).unlink()


class LosesNothing(pl.Callback):
    pass


@pytest.fixture
def command(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A toy run that loses a picture when it begins, and skips such."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "mine")
    Path("toy.yaml").write_text(YAML)
    return ["-b", "toy.yaml", "-t", "-n", "toy", "--data_root", "mine", "--on_bad_image", "skip"]


def fault(name: str) -> str:
    return f"lightning.callbacks.fault.target=tests.unit.training.test_bad_pictures.{name}"


def run_folder() -> Path:
    return next(Path("logs").iterdir())


def last_checkpoint() -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run_folder() / "checkpoints" / "last.ckpt", weights_only=True)
    return content


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_skips_goes_on_names_the_picture_once_and_lists_it_at_the_end(
    workers: int, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, f"data.params.num_workers={workers}"]) == 0
    text = capsys.readouterr().out
    reason = f"{LOST}: has vanished since the run began"
    assert text.count(f"warning: skipped: {reason}\n") == 1
    listed = f"warning: 1 picture was skipped, for it could not be read during the run:\n  {reason} (6 times)\n"
    assert text.index("warning: skipped") < text.index(listed) < text.index("finished after 12 optimiser steps")
    (session,) = json.loads((run_folder() / "run.json").read_text())["sessions"]
    assert session["unreadable"] == {reason: 6}
    ledger = [json.loads(line)["path"] for line in (run_folder() / "exposure.jsonl").read_text().splitlines()]
    assert len(ledger) == 20
    assert LOST not in ledger


def test_skipping_a_picture_trains_as_if_it_had_no_weight(command: list[str]) -> None:
    assert main(command) == 0
    skipped = last_checkpoint()["state_dict"]
    shutil.rmtree("logs")
    Path(LOST).write_bytes(Path("mine/folder0/a plain square 1_.png").read_bytes())
    without = "data.params.train.target=tests.unit.training.test_bad_pictures.WithoutOne"
    assert main([*command, without, fault("LosesNothing")]) == 0
    weightless = last_checkpoint()["state_dict"]
    assert all(torch.equal(skipped[name], weightless[name]) for name in skipped)


def test_batches_of_nothing_but_such_pictures_change_no_gradient(command: list[str]) -> None:
    assert main([*command, "data.params.batch_size=1"]) == 0
    skipped = last_checkpoint()["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in skipped.values())


@pytest.mark.parametrize(("model", "status"), [("IsStopped", 130), ("Breaks", 1)])
def test_what_was_skipped_is_listed_whatever_ends_the_run(
    model: str, status: int, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, f"model.target=tests.unit.training.test_bad_pictures.{model}"]) == status
    assert "1 picture was skipped, for it could not be read during the run:\n  " in capsys.readouterr().out
    (session,) = json.loads((run_folder() / "run.json").read_text())["sessions"]
    assert len(session["unreadable"]) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_root_that_goes_away_ends_the_run_also_where_pictures_are_skipped(
    workers: int, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, fault("LosesTheFolder"), f"data.params.num_workers={workers}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: mine: the folder has gone since the run began; bring it back")


def test_a_run_that_can_read_nothing_any_more_ends(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, fault("LosesAll"), "data.params.train.params.repeats=10"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 20 pictures in a row cannot be read, the last: mine/folder")
    assert line.endswith(f"; see to the drive that they lie on, then type python main.py -t -r {run_folder()}")
    assert last_checkpoint()["global_step"] == 9


def test_a_validation_that_measures_nothing_ends_the_run(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, fault("LosesAllBeforeValidation")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: none of the 6 validation pictures can be read, for one: mine/folder1/")


@pytest.mark.parametrize(("on_bad_image", "status"), [("error", 2), ("skip", 0)])
def test_a_picture_that_breaks_before_the_test_is_told_like_one_of_the_training(
    on_bad_image: str, status: int, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    test = "data.params.test={target: ldm.data.ed_validate.EDValidateBatch, params: {size: 16, set: test}}"
    words = [*command, test, fault("LosesOneBeforeTheTest"), "--max_steps", "1", "--on_bad_image", on_bad_image]
    assert main(words) == status
    told = capsys.readouterr()
    if status:
        (line,) = told.err.splitlines()
        assert line.startswith(f"error: {LOST}: has vanished since the run began; put it back and type ")
    else:
        assert "1 picture was skipped, for it could not be read during the test:\n  " in told.out


def test_a_picture_that_is_put_back_lets_the_run_go_on(command: list[str]) -> None:
    content = Path(LOST).read_bytes()
    assert main(command) == 0
    Path(LOST).write_bytes(content)
    assert main(["-t", "-r", str(run_folder()), "--max_epochs", "3"]) == 0


def test_a_run_goes_on_without_a_picture_once_that_is_accepted(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    words = ["-t", "-r", str(run_folder()), "--max_epochs", "3"]
    assert main(words) == 2
    assert "1 picture removed" in capsys.readouterr().err
    assert main([*words, "--accept_changes"]) == 0


def test_sample_pictures_leave_out_what_is_grey(pictures: Path, tmp_path: Path) -> None:
    class HidesHalf(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch["unreadable"] = ["gone", ""] if batch_idx == 0 else ["gone", "gone"]

    toy_run(tmp_path / "run", pictures, images=True, extra=[HidesHalf()], max_steps=2)
    captions = sorted((tmp_path / "run" / "images" / "train").glob("captions_*.txt"))
    assert [len(path.read_text().splitlines()) for path in captions] == [1], "none of a batch that is all grey"


def test_rows_that_can_be_read_are_taken_of_all_that_has_a_row_a_picture() -> None:
    batch = {"image": torch.arange(3.0)[:, None], "caption": ["a", "b", "c"], "unreadable": ["", "gone", ""], "size": 8}
    chosen = readable_rows(batch)
    assert chosen["image"].flatten().tolist() == [0, 2]
    assert (chosen["caption"], chosen["unreadable"], chosen["size"]) == (["a", "c"], ["", ""], 8)
    assert readable_rows({**batch, "unreadable": ["", "", ""]})["image"] is batch["image"]
    assert readable_rows({**batch, "unreadable": ["gone"] * 3}) is None


@pytest.mark.parametrize(
    ("batch", "share"),
    [({"loss_weight": torch.tensor([0.5, 0.0])}, 0.5), ({"loss_weight": torch.zeros(2)}, 0.0), ({}, 1.0), ([], 1.0)],
)
def test_the_share_that_counts_is_known_of_any_batch(batch: Any, share: float) -> None:
    assert share_that_counts(batch) == share
