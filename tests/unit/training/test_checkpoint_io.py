from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from ldm.checkpoint import read_checkpoint, verify_checkpoint
from ldm.training.checkpoint_io import CheckpointWriteError, StreamingCheckpointIO, file_size, remove_leftovers
from ldm.training.disk import Disk
from tests.unit.training.faulty_disk import FaultyDisk

CHECKPOINT = {"state_dict": {"w": torch.arange(4.0)}, "global_step": 7, "loops": {"fit_loop": {"epoch": 1}}}


class FullDisk(Disk):
    """Has a few bytes left, and lets nobody write."""

    def free(self, folder: Path) -> int:
        return 1_500_000

    def create(self, path: Path) -> BinaryIO:
        raise AssertionError("written to without looking for room first")


class ForgetfulDisk(Disk):
    """Turns over one bit of what it was given, without a word."""

    def sync(self, stream: BinaryIO) -> None:
        super().sync(stream)
        with Path(stream.name).open("r+b") as file:
            content = file.read()
            place = content.index(CHECKPOINT["state_dict"]["w"].numpy().tobytes())  # type: ignore[index]
            file.seek(place)
            file.write(bytes([content[place] ^ 1]))


class CuttingDisk(Disk):
    """Loses the end of what it was given, without a word."""

    def sync(self, stream: BinaryIO) -> None:
        super().sync(stream)
        os.truncate(stream.name, os.path.getsize(stream.name) - 50)


def large_checkpoint(megabytes: int) -> dict[str, object]:
    return {"state_dict": {f"w{number}": torch.zeros(2**18) for number in range(megabytes)}}


def peak_memory() -> int:
    """Read the most memory that this process has had since the last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_a_written_checkpoint_loads_safely_with_torch_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "a.ckpt"
    StreamingCheckpointIO().save_checkpoint(CHECKPOINT, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["global_step"] == 7
    assert torch.equal(loaded["state_dict"]["w"], CHECKPOINT["state_dict"]["w"])


def test_a_written_checkpoint_comes_back(tmp_path: Path) -> None:
    checkpoint_io = StreamingCheckpointIO()
    checkpoint_io.save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    loaded = checkpoint_io.load_checkpoint(tmp_path / "a.ckpt")
    assert loaded["loops"] == CHECKPOINT["loops"]


def test_writing_leaves_one_file(tmp_path: Path) -> None:
    StreamingCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_second_name_takes_no_room_and_keeps_its_content(tmp_path: Path) -> None:
    checkpoint_io = StreamingCheckpointIO()
    source, last = tmp_path / "epoch=00.ckpt", tmp_path / "last.ckpt"
    checkpoint_io.save_checkpoint(CHECKPOINT, source)
    last.write_bytes(b"older")
    checkpoint_io.duplicate(source, last)
    assert os.path.samefile(source, last)
    content = last.read_bytes()
    checkpoint_io.save_checkpoint({**CHECKPOINT, "global_step": 8}, source)
    assert last.read_bytes() == content


def test_a_second_name_is_a_copy_where_the_disk_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    source, last = tmp_path / "a.ckpt", tmp_path / "last.ckpt"
    StreamingCheckpointIO().save_checkpoint(CHECKPOINT, source)
    StreamingCheckpointIO().duplicate(source, last)
    assert last.read_bytes() == source.read_bytes()
    assert not os.path.samefile(source, last)


def test_a_second_name_of_the_file_itself_changes_nothing(tmp_path: Path) -> None:
    checkpoint_io = StreamingCheckpointIO()
    source, last = tmp_path / "a.ckpt", tmp_path / "last.ckpt"
    checkpoint_io.save_checkpoint(CHECKPOINT, source)
    checkpoint_io.duplicate(source, last)
    checkpoint_io.duplicate(source, last)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "last.ckpt"]


def test_removing_a_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    checkpoint_io = StreamingCheckpointIO()
    checkpoint_io.save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    checkpoint_io.remove_checkpoint(tmp_path / "gone.ckpt")
    assert (tmp_path / "a.ckpt").exists()


def test_a_checkpoint_is_removed_only_once_another_has_been_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = tmp_path / "epoch=00.ckpt", tmp_path / "epoch=01.ckpt"
    StreamingCheckpointIO().save_checkpoint(CHECKPOINT, older)
    checkpoint_io = StreamingCheckpointIO()
    checkpoint_io.remove_checkpoint(older)
    assert older.exists()
    assert "epoch=00.ckpt stays" in caplog.text
    checkpoint_io.save_checkpoint(CHECKPOINT, newer)
    checkpoint_io.remove_checkpoint(newer)
    checkpoint_io.remove_checkpoint(older)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=01.ckpt"]


def test_a_file_that_cannot_be_removed_is_told_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint_io = StreamingCheckpointIO()
    checkpoint_io.save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    checkpoint_io.disk = FaultyDisk(0, errno.EACCES)
    checkpoint_io.remove_checkpoint(tmp_path / "b.ckpt")
    assert "b.ckpt could not be deleted (Permission denied); delete it by hand" in caplog.text


def test_a_checkpoint_carries_a_checksum_for_each_tensor(tmp_path: Path) -> None:
    StreamingCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    assert verify_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("disk", "place"), [(ForgetfulDisk(), "tensor w"), (CuttingDisk(), "cut short")], ids=["flipped bit", "cut short"]
)
def test_a_disk_that_loses_what_it_was_given_does_not_cost_the_previous_file(
    tmp_path: Path, disk: Disk, place: str
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"previous")
    with pytest.raises(
        CheckpointWriteError, match=r"last\.ckpt: what was read back is not what was written .*" + place
    ):
        StreamingCheckpointIO(disk=disk).save_checkpoint(CHECKPOINT, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_bytes() == b"previous"


def test_reading_back_can_be_switched_off(tmp_path: Path) -> None:
    StreamingCheckpointIO(verify=False, disk=ForgetfulDisk()).save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").exists()


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError, match=r"needs 3\.1 MB, .* has 1\.5 MB free; make room"):
        StreamingCheckpointIO(disk=FullDisk()).save_checkpoint(large_checkpoint(2), tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_lists_the_checkpoints_that_could_go(tmp_path: Path) -> None:
    for age, name in enumerate(["epoch=02.ckpt", "epoch=00.ckpt", "epoch=01.ckpt"]):
        (tmp_path / name).write_bytes(bytes(10**5 * (age + 1)))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    os.link(tmp_path / "epoch=02.ckpt", tmp_path / "last.ckpt")
    os.link(tmp_path / "epoch=00.ckpt", tmp_path / "newest-epoch=00.ckpt")
    with pytest.raises(CheckpointWriteError) as raised:
        StreamingCheckpointIO(disk=FullDisk()).save_checkpoint(large_checkpoint(2), tmp_path / "epoch=03.ckpt")
    could_go = "epoch=01.ckpt (0.3 MB), epoch=00.ckpt with newest-epoch=00.ckpt (0.2 MB)"
    assert f"delete older checkpoints of the run ({could_go})" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_room_that_is_looked_for_is_what_the_file_takes(tmp_path: Path) -> None:
    shared = torch.zeros(2**20)
    checkpoint = {**large_checkpoint(4), "ema": [shared, shared.view(2, -1), shared[:10]], "step": torch.tensor(3)}
    StreamingCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    written = (tmp_path / "a.ckpt").stat().st_size
    assert written <= file_size(checkpoint) < written + 2**21


def test_a_leftover_of_a_killed_process_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt.partial").write_bytes(b"half")
    StreamingCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_leftovers_are_removed_and_checkpoints_are_not(tmp_path: Path) -> None:
    for name in ("a.ckpt", "a.ckpt.partial", "last.ckpt"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "last.ckpt"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
def test_writing_takes_little_memory_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = large_checkpoint(64)
    StreamingCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "warm.ckpt")
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    StreamingCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    assert peak_memory() - before < 0.1 * 64 * 2**20


# --- faults at every step ----------------------------------------------------------------------------------

OLDER = {**CHECKPOINT, "global_step": 6}
FAULTS = {
    "full": {"fault": errno.ENOSPC, "stays": True},
    "full half-way through a write": {"fault": errno.ENOSPC, "partial": True, "stays": True},
    "full for a moment": {"fault": errno.ENOSPC},
    "broken": {"fault": errno.EIO, "stays": True},
    "broken for a moment": {"fault": errno.EIO, "partial": True},
    "forbidden": {"fault": errno.EACCES},
}
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EIO: "Input/output error; check the disk that",
    errno.EACCES: "writable for this user",
}


def each_fault(
    folder: Path, act: Callable[[StreamingCheckpointIO], None], **options: object
) -> Iterator[tuple[BaseException | None, Path]]:
    """Do something once for each moment at which the disk can fail; gives what came of it."""
    last = folder / "last.ckpt"
    for at in itertools.count():
        last.unlink(missing_ok=True)
        StreamingCheckpointIO().save_checkpoint(OLDER, last)
        disk = FaultyDisk(at, **options)  # type: ignore[arg-type]
        raised: BaseException | None = None
        try:
            act(StreamingCheckpointIO(disk=disk))
        except BaseException as error:  # noqa: BLE001 - which one it is is looked at below
            raised = error
        if not disk.has_failed:
            assert raised is None
            assert at > 3
            return
        yield raised, last


@pytest.mark.parametrize("options", FAULTS.values(), ids=FAULTS.keys())
def test_whenever_the_disk_fails_the_last_good_checkpoint_is_whole(tmp_path: Path, options: dict[str, object]) -> None:
    def save(checkpoint_io: StreamingCheckpointIO) -> None:
        checkpoint_io.save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")

    for raised, last in each_fault(tmp_path, save, **options):
        assert isinstance(raised, CheckpointWriteError)
        line = str(raised)
        assert "\n" not in line
        assert str(last) in line
        assert REMEDIES[options["fault"]] in line  # type: ignore[index]
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
        assert read_checkpoint(last)["global_step"] in (6, 7)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_whenever_the_disk_fails_a_second_name_has_its_old_content_or_the_new(tmp_path: Path, links: bool) -> None:
    source = tmp_path / "epoch=00.ckpt"
    StreamingCheckpointIO().save_checkpoint(CHECKPOINT, source)

    def duplicate(checkpoint_io: StreamingCheckpointIO) -> None:
        checkpoint_io.duplicate(source, tmp_path / "last.ckpt")

    for raised, last in each_fault(tmp_path, duplicate, fault=errno.EIO, links=links):
        assert raised is None or isinstance(raised, CheckpointWriteError)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=00.ckpt", "last.ckpt"]
        assert read_checkpoint(last)["global_step"] in ((7,) if raised is None else (6, 7))


def test_whenever_it_is_interrupted_the_interruption_comes_through_and_nothing_is_left(tmp_path: Path) -> None:
    def save(checkpoint_io: StreamingCheckpointIO) -> None:
        checkpoint_io.save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")

    for raised, last in each_fault(tmp_path, save, fault=KeyboardInterrupt()):
        assert isinstance(raised, KeyboardInterrupt)
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
        assert read_checkpoint(last)["global_step"] in (6, 7)
