from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ldm.training.checkpoint_io import StreamingCheckpointIO

CHECKPOINT = {"state_dict": {"w": torch.arange(4.0)}, "global_step": 7, "loops": {"fit_loop": {"epoch": 1}}}


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


def test_a_failed_write_names_the_file_and_keeps_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"previous")

    def fill_the_disk(checkpoint: object, stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match=r"a\.ckpt.*file write failed"):
        StreamingCheckpointIO().save_checkpoint(CHECKPOINT, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
    assert path.read_bytes() == b"previous"


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
    source.write_bytes(b"content")
    StreamingCheckpointIO().duplicate(source, last)
    assert last.read_bytes() == b"content"
    assert not os.path.samefile(source, last)


def test_removing_a_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    StreamingCheckpointIO().remove_checkpoint(tmp_path / "gone.ckpt")
