from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.training.curves import Curves
from ldm.training.disk import Disk
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import toy_run


class Room(Disk):
    """A disk whose room can be set."""

    def __init__(self) -> None:
        self.left = 1 << 40

    def free(self, folder: Path) -> int:
        return self.left


def size(folder: Path) -> int:
    """Count the bytes of the curves' files."""
    return sum(path.stat().st_size for path in folder.glob("curves/events*"))


def test_points_that_find_no_room_are_left_out_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    room = Room()
    curves = Curves(str(tmp_path), "curves", room)
    curves.log_metrics({"loss": 1.0}, 1)
    curves.save()
    before = size(tmp_path)
    room.left = 100
    for step in range(2, 30):
        curves.log_metrics({"loss": 1.0}, step)
        curves.save()
    assert size(tmp_path) == before
    room.left = 1 << 40
    curves.log_metrics({"loss": 1.0}, 30)
    curves.save()
    assert size(tmp_path) > before
    assert [record.getMessage().partition(" in ")[0] for record in caplog.records] == [
        "the disk is full: no curves are written",
        "curves are written again",
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_curves_that_cannot_be_written_neither_end_a_run_nor_hide_its_failure(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class TakeFolder(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *others: Any) -> None:
            if trainer.global_step == 2:
                shutil.rmtree(Path(trainer.default_root_dir) / "tensorboard")

    def run(folder: Path, **arguments: Any) -> int:
        extra: list[Callback] = [TakeFolder()]
        arguments = {"logger": True, "log_every_n_steps": 1, "extra": extra, **arguments}
        return toy_run(folder, pictures, **arguments).trainer.global_step

    assert run(tmp_path / "a") == 12
    assert caplog.text.count("curves cannot be written any more") == 1
    with pytest.raises(RuntimeError, match="the toy broke"):
        run(tmp_path / "b", model=ToyDiffusion(fail_at_step=3))


def points(run: Path) -> list[tuple[str, int, float]]:
    """Read what TensorBoard would show."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


@pytest.mark.parametrize("every", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}])
def test_the_curves_of_a_killed_and_continued_run_are_those_of_an_unbroken_one(
    every: dict[str, int], pictures: Path, tmp_path: Path
) -> None:
    class KilledError(Exception):
        """Stands for a kill: what was saved until then is all there is."""

    class Kill(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *others: Any) -> None:
            if trainer.global_step == 9:
                shutil.copytree(tmp_path / "broken", tmp_path / "killed")
                raise KilledError

    options: dict[str, Any] = {
        "logger": True,
        "log_every_n_steps": 1,
        "max_epochs": 3,
        "lightning": {"modelcheckpoint": {"params": {**every, "save_top_k": 0}}},
    }
    toy_run(tmp_path / "unbroken", pictures, **options)
    with pytest.raises(KilledError):
        toy_run(tmp_path / "broken", pictures, extra=[Kill()], **options)
    (file,) = (tmp_path / "killed" / "tensorboard").glob("events*")
    file.rename(file.with_name("events.out.tfevents.1.then"))  # files are read in the order of their seconds
    toy_run(tmp_path / "killed", pictures, checkpoint=tmp_path / "killed" / "checkpoints" / "last.ckpt", **options)
    unbroken, continued = points(tmp_path / "unbroken"), points(tmp_path / "killed")
    assert set(continued) == set(unbroken)
    # Only points of the very step that was saved may be there twice: some are written after the checkpoint.
    assert {step for _, step, _ in (Counter(continued) - Counter(unbroken))} <= {6, 8}
