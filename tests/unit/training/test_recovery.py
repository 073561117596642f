from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ldm.training.recovery import newest_valid_checkpoint


def write(path: Path, step: int, **more: object) -> Path:
    content = {"state_dict": {"layer.weight": torch.arange(64.0)}, "global_step": step, "optimizer_states": [], **more}
    torch.save(content, path)
    return path


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(64.0).numpy().tobytes()) + 5] ^= 4
    path.write_bytes(content)


def test_last_ckpt_is_taken_where_it_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "epoch=03.ckpt", 9)
    assert newest_valid_checkpoint(write(tmp_path / "last.ckpt", 6)).name == "last.ckpt"


def test_a_damaged_last_ckpt_is_named_and_the_next_older_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, step in (("epoch=01.ckpt", 6), ("epoch=02.ckpt", 9), ("epoch=00.ckpt", 3), ("last.ckpt", 12)):
        write(tmp_path / name, step)
    damage(tmp_path / "last.ckpt")
    assert newest_valid_checkpoint(tmp_path / "last.ckpt").name == "epoch=02.ckpt"
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"checkpoint '{tmp_path / 'last.ckpt'}' is damaged at tensor layer.weight: it is not what was written",
        f"continuing from {tmp_path / 'epoch=02.ckpt'} instead",
    ]


def test_another_name_of_a_damaged_file_is_no_other_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "epoch=00.ckpt", 3)
    damage(write(tmp_path / "last.ckpt", 6))
    os.link(tmp_path / "last.ckpt", tmp_path / "epoch=01.ckpt")
    assert newest_valid_checkpoint(tmp_path / "last.ckpt").name == "epoch=00.ckpt"
    assert len(caplog.records) == 2


def test_every_damaged_one_on_the_way_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "epoch=00.ckpt", 3)
    damage(write(tmp_path / "epoch=01.ckpt", 6))
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert newest_valid_checkpoint(tmp_path / "last.ckpt").name == "epoch=00.ckpt"
    assert "last.ckpt" in caplog.records[0].getMessage()
    assert "epoch=01.ckpt" in caplog.records[1].getMessage()


def test_weights_alone_are_not_what_a_run_continues_from(tmp_path: Path) -> None:
    write(tmp_path / "epoch=00.ckpt", 3)
    torch.save({"state_dict": {"w": torch.zeros(1)}, "global_step": 6}, tmp_path / "epoch=01.ckpt")
    assert newest_valid_checkpoint(tmp_path / "last.ckpt").name == "epoch=00.ckpt"


def test_a_last_ckpt_of_weights_alone_is_named_and_the_next_older_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "epoch=00.ckpt", 3)
    torch.save({"state_dict": {"w": torch.zeros(1)}, "global_step": 6}, tmp_path / "last.ckpt")
    assert newest_valid_checkpoint(tmp_path / "last.ckpt").name == "epoch=00.ckpt"
    assert "last.ckpt' holds the weights alone" in caplog.records[0].getMessage()


def test_where_no_checkpoint_is_whole_each_has_its_line(tmp_path: Path) -> None:
    damage(write(tmp_path / "epoch=00.ckpt", 3))
    damage(write(tmp_path / "last.ckpt", 6))
    with pytest.raises(ValueError, match=r"last\.ckpt' is damaged.*\n.*epoch=00\.ckpt' is damaged.*\nno checkpoint in"):
        newest_valid_checkpoint(tmp_path / "last.ckpt")


def test_no_checkpoint_at_all_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        newest_valid_checkpoint(tmp_path / "last.ckpt")
