"""Whatever a run is like, and wherever and however it is broken off: continued, it equals the unbroken one."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.checkpoint import read_checkpoint
from ldm.modules.ema import LitEma
from ldm.training.recovery import newest_valid_checkpoint
from ldm.training.stop_signals import Interrupted
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run

EXAMPLES = int(os.environ.get("RESUME_EXAMPLES", "15"))
"""Set it to some hundreds for a longer search."""

SHAPES = {"one shape": [(16, 16)] * 5, "several shapes": [(16, 16), (24, 12), (12, 24), (24, 12), (16, 16)]}


class Averaging(ToyDiffusion):
    """Keeps moving averages."""

    def __init__(self) -> None:
        super().__init__()
        self.model_ema = LitEma(self.model)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.model_ema(self.model)


@dataclass(frozen=True)
class Kind:
    """What a run is like."""

    shapes: str
    accumulate: int
    ema: bool
    every_n_train_steps: int | None
    keep_last_n: int
    background: bool

    def options(self) -> dict[str, Any]:
        saving = {"keep_last_n": self.keep_last_n, "save_top_k": 2, "background": self.background}
        if self.every_n_train_steps:
            saving["every_n_train_steps"] = self.every_n_train_steps
        torch.manual_seed(0)
        return {
            "lightning": {"modelcheckpoint": {"params": saving}},
            "accumulate_grad_batches": self.accumulate,
            "max_epochs": 3,
            "repeats": 1,
            "model": Averaging() if self.ema else ToyDiffusion(),
        }


class Break(pl.Callback):
    """Breaks a run off at the beginning of a batch, counted over all epochs from 0."""

    def __init__(self, how: str, at: int, folder: Path) -> None:
        self.how = how
        self.at = at
        self.checkpoints = folder / "checkpoints"
        self.aside = folder / "aside"
        self.seen = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen += 1
        if self.seen != self.at + 1:
            return
        if self.how == "signal":
            os.kill(os.getpid(), signal.SIGINT)
            return
        if self.how == "kill":  # what is there now is all that a killed process leaves
            trainer.strategy.checkpoint_io.finish()  # type: ignore[attr-defined]
            shutil.copytree(self.checkpoints, self.aside)
        raise RuntimeError("broken off")

    def restore(self) -> None:
        """Put back what a killed process has left."""
        if self.how == "kill":
            shutil.rmtree(self.checkpoints)
            self.aside.rename(self.checkpoints)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    for name, sizes in SHAPES.items():
        (root / name / "folder").mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", size, (40 * number, 90, 200)).save(root / name / "folder" / f"a picture {number}_.png")
    return root


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, ToyRun]:
    """Runs that were needed already."""
    return {}


def names(run: ToyRun) -> list[str]:
    return sorted(path.name for path in run.directory.checkpoints.iterdir())


def broken_run(folder: Path, pictures: Path, kind: Kind, how: str, at: int, workers: int) -> ToyRun | None:
    """Train until the break; None if the run was at its end before."""
    stop = Break(how, at, folder)
    run, data = prepare_toy_run(folder, pictures / kind.shapes, num_workers=workers, extra=[stop], **kind.options())
    try:
        with run.signals:
            run.trainer.fit(run.model, datamodule=data)
    except (Interrupted, RuntimeError):
        stop.restore()
        return run
    return None


kinds = st.builds(
    Kind,
    shapes=st.sampled_from(sorted(SHAPES)),
    accumulate=st.integers(1, 3),
    ema=st.booleans(),
    every_n_train_steps=st.sampled_from([None, 1, 2, 3]),
    keep_last_n=st.sampled_from([0, 1]),
    background=st.booleans(),
)
workers = st.sampled_from([0, 0, 0, 1])


@settings(max_examples=EXAMPLES, phases=[Phase.generate])
@given(
    kind=kinds,
    how=st.sampled_from(["signal", "exception", "kill"]),
    at=st.integers(0, 8),
    before=workers,
    after=workers,
)
def test_a_continued_run_equals_the_unbroken_one(
    pictures: Path, unbroken: dict[Any, ToyRun], kind: Kind, how: str, at: int, before: int, after: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        if kind not in unbroken:
            unbroken[kind] = toy_run(Path(place) / "whole", pictures / kind.shapes, **kind.options())
            unbroken[kind].model.names = names(unbroken[kind])  # type: ignore[assignment]
        whole = unbroken[kind]
        first = broken_run(Path(place) / "run", pictures, kind, how, at, before)
        if first is None:
            return
        has_saved = any(first.directory.checkpoints.glob("*.ckpt"))
        checkpoint = newest_valid_checkpoint(first.last) if has_saved else None
        folder = Path(place) / ("run" if has_saved else "anew")
        second = toy_run(folder, pictures / kind.shapes, checkpoint, num_workers=after, **kind.options())
        again = len(whole.model.shown) - len(second.model.shown)
        assert first.model.shown[:again] + second.model.shown == whole.model.shown
        assert (
            second.model.validated == whole.model.validated[len(whole.model.validated) - len(second.model.validated) :]
        )
        assert torch.equal(second.weights, whole.weights)
        averages = [run.model.state_dict() for run in (second, whole)]
        assert all(torch.equal(value, averages[1][key]) for key, value in averages[0].items())
        assert second.trainer.global_step == whole.trainer.global_step
        assert names(second) == whole.model.names


@settings(max_examples=max(5, EXAMPLES // 5), phases=[Phase.generate])
@given(
    at=st.integers(1, 8), sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), shapes=st.sampled_from(sorted(SHAPES))
)
def test_a_run_continued_with_another_batch_size_shows_every_picture_once_an_epoch(
    pictures: Path, at: int, sizes: tuple[int, int], shapes: str
) -> None:
    saving = {"lightning": {"modelcheckpoint": {"params": {"every_n_train_steps": 1}}}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        options: dict[str, Any] = {**saving, "repeats": 1}
        first = toy_run(folder, pictures / shapes, batch_size=sizes[0], max_steps=at, **options)
        steps = read_checkpoint(first.last)["global_step"]
        second = toy_run(folder, pictures / shapes, first.last, batch_size=sizes[1], max_epochs=4, **options)
        shown = Counter(row[1:3] for row in [*first.model.shown, *second.model.shown] if row[1] < 4)
        assert steps <= at
        assert set(shown.values()) == {1}
        assert len(shown) == 4 * len(SHAPES[shapes])
