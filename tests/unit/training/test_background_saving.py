from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from ldm.checkpoint import read_checkpoint
from ldm.training.background_saving import BackgroundCheckpointIO, HostMemory
from ldm.training.checkpoint_io import CheckpointWriteError
from ldm.training.disk import Disk
from tests.unit.training.faulty_disk import FaultyDisk
from tests.unit.training.test_callbacks import EPOCHS, names, saving, step_of
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import prepare_toy_run, toy_run


class WaitingDisk(Disk):
    """Begins to write when it is told to."""

    def __init__(self) -> None:
        self.may_write = threading.Event()

    def create(self, path: Path) -> BinaryIO:
        assert self.may_write.wait(timeout=30)
        return super().create(path)


def checkpoint(step: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((1000,), float(step))}, "global_step": step, "optimizer_states": []}


def test_training_goes_on_while_the_file_is_written_and_what_it_changes_is_not_in_it(tmp_path: Path) -> None:
    disk = WaitingDisk()
    checkpoint_io = BackgroundCheckpointIO(disk=disk)
    content = checkpoint(1)
    checkpoint_io.save_checkpoint(content, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []
    content["state_dict"]["w"] += 5
    content["state_dict"]["more"] = torch.zeros(1)
    disk.may_write.set()
    checkpoint_io.finish()
    assert read_checkpoint(tmp_path / "a.ckpt")["state_dict"].keys() == {"w"}
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["state_dict"]["w"], torch.ones(1000))


def test_a_second_name_and_a_deletion_wait_for_the_file(tmp_path: Path) -> None:
    disk = WaitingDisk()
    checkpoint_io = BackgroundCheckpointIO(disk=disk)
    (tmp_path / "older.ckpt").write_bytes(b"older")
    checkpoint_io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    assert checkpoint_io.has(tmp_path / "a.ckpt")
    checkpoint_io.duplicate(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    checkpoint_io.remove_checkpoint(tmp_path / "older.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["older.ckpt"]
    disk.may_write.set()
    checkpoint_io.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "last.ckpt"]


def test_a_failure_is_raised_by_the_next_save_and_nothing_was_deleted_for_it(tmp_path: Path) -> None:
    checkpoint_io = BackgroundCheckpointIO(disk=FaultyDisk(8, errno.ENOSPC))
    (tmp_path / "older.ckpt").write_bytes(b"older")
    (tmp_path / "last.ckpt").write_bytes(b"last")
    checkpoint_io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    checkpoint_io.duplicate(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    checkpoint_io.remove_checkpoint(tmp_path / "older.ckpt")
    with pytest.raises(CheckpointWriteError, match=r"the disk is full: the checkpoint .*a\.ckpt"):
        checkpoint_io.save_checkpoint(checkpoint(2), tmp_path / "b.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "older.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == b"last"


def test_a_failure_is_raised_at_the_end_once(tmp_path: Path) -> None:
    checkpoint_io = BackgroundCheckpointIO(disk=FaultyDisk(8, errno.EIO))
    checkpoint_io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointWriteError, match="Input/output error"):
        checkpoint_io.finish()
    checkpoint_io.finish()


def test_a_failure_that_nobody_asks_for_any_more_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint_io = BackgroundCheckpointIO(disk=FaultyDisk(8, errno.EIO))
    checkpoint_io.save_checkpoint(checkpoint(1), tmp_path / "a.ckpt")
    checkpoint_io.teardown()
    assert "could not write the checkpoint" in caplog.text


def test_files_are_read_once_they_are_written(tmp_path: Path) -> None:
    checkpoint_io = BackgroundCheckpointIO()
    checkpoint_io.save_checkpoint(checkpoint(3), tmp_path / "a.ckpt")
    assert checkpoint_io.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 3


def test_the_copy_has_the_values_the_sharing_and_the_shapes_of_what_it_is_of() -> None:
    shared = torch.arange(12.0)
    content = {
        "weights": OrderedDict(a=shared, b=shared.view(3, 4).T, c=shared[4:6]),
        "numbers": [torch.tensor(3), torch.zeros(0, dtype=torch.int8), torch.ones(2, dtype=torch.float16)],
        "step": (5, "text"),
    }
    memory = HostMemory()
    for _ in range(2):
        copy = memory.hold(content)
        assert isinstance(copy["weights"], OrderedDict)
        assert copy["step"] == (5, "text")
        assert [copy["weights"][key].tolist() for key in "abc"] == [content["weights"][key].tolist() for key in "abc"]
        assert [each.tolist() for each in copy["numbers"]] == [3, [], [1.0, 1.0]]
        assert copy["weights"]["a"].data_ptr() == copy["weights"]["b"].data_ptr() != shared.data_ptr()


def test_the_memory_is_used_again(tmp_path: Path) -> None:
    memory = HostMemory()
    first = memory.hold(checkpoint(1))["state_dict"]["w"].data_ptr()
    assert memory.hold(checkpoint(2))["state_dict"]["w"].data_ptr() == first


def test_a_run_that_saves_in_the_background_leaves_what_any_run_leaves(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path / "a", pictures, max_epochs=3, **saving(background=True, save_top_k=2))
    plain = toy_run(tmp_path / "b", pictures, max_epochs=3, **saving(save_top_k=2))
    assert names(run) == names(plain) == [EPOCHS[1], "epoch=02-step=00018.ckpt", "last.ckpt"]
    one, other = (read_checkpoint(each.last) for each in (run, plain))
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    assert one["loops"] == other["loops"]


def test_a_run_that_fails_while_a_file_is_on_its_way_saves_what_was_reached(pictures: Path, tmp_path: Path) -> None:
    run, data = prepare_toy_run(tmp_path, pictures, model=ToyDiffusion(fail_at_step=8), **saving(background=True))
    with pytest.raises(RuntimeError, match="the toy broke"):
        run.trainer.fit(run.model, datamodule=data)
    assert names(run) == [EPOCHS[0], "last.ckpt"]
    assert step_of(run.last) == 8


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_run_whose_disk_fills_up_ends_with_the_reason(pictures: Path, tmp_path: Path, full_at: int) -> None:
    class FillsUp(Disk):
        asked = 0

        def free(self, folder: Path) -> int:
            self.asked += 1
            return 0 if self.asked > full_at + 1 else super().free(folder)  # the first is asked at the start

    run, data = prepare_toy_run(tmp_path, pictures, max_epochs=3, **saving(background=True))
    checkpoint_io = run.trainer.strategy.checkpoint_io
    assert isinstance(checkpoint_io, BackgroundCheckpointIO)
    checkpoint_io.disk = FillsUp()
    with pytest.raises(CheckpointWriteError, match="the disk is full"):
        run.trainer.fit(run.model, datamodule=data)
    assert names(run) == [*EPOCHS[:full_at], *(["last.ckpt"] if full_at else [])]
    assert full_at == 0 or step_of(run.last) == 6 * full_at


def test_the_memory_for_a_run_s_checkpoints_is_taken_before_its_first_step(pictures: Path, tmp_path: Path) -> None:
    taken: list[int] = []

    class Count(ToyDiffusion):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            taken.append(sum(block.nbytes() for block in self.trainer.strategy.checkpoint_io._memory._blocks))

    toy_run(tmp_path, pictures, model=Count(), **saving(background=True, every_n_train_steps=1))
    assert taken[0] == taken[-1] > 0
