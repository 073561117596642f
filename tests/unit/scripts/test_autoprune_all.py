"""Pruning every run's checkpoints: names that do not meet, failures that do not stop the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import autoprune_all
import checkpoint_files
import pytest
import torch

from tests.unit.scripts.small_sd import lightning_checkpoint

WEIGHT = "model.diffusion_model.out.2.weight"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for number, run in enumerate(["catsT1_mine", "dogsT2_mine"]):
        folder = tmp_path / "logs" / run / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(lightning_checkpoint({WEIGHT: torch.full((3,), float(number))}), folder / "last.ckpt")
    return tmp_path / "logs"


def autoprune(logs: Path, *flags: str) -> int:
    return autoprune_all.main(["--logdir", str(logs), "--out", str(logs.parent / "out"), *flags])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_two_runs_last_checkpoints_get_names_of_their_runs(logs: Path) -> None:
    assert autoprune(logs) == 0
    out = logs.parent / "out"
    assert names(out) == {"catsT1_mine-last-pruned.ckpt", "dogsT2_mine-last-pruned.ckpt"}
    for number, run in enumerate(["catsT1_mine", "dogsT2_mine"]):
        pruned = torch.load(out / f"{run}-last-pruned.ckpt", weights_only=True)
        assert torch.equal(pruned["state_dict"][WEIGHT], torch.full((3,), float(number)).half())


def test_originals_stay(logs: Path) -> None:
    before = {path: path.read_bytes() for path in logs.rglob("*.ckpt")}
    autoprune(logs)
    assert {path: path.read_bytes() for path in logs.rglob("*.ckpt")} == before


def test_delete_removes_what_was_pruned(logs: Path) -> None:
    assert autoprune(logs, "--delete", "--full") == 0
    assert names(logs) == set()
    assert len(names(logs.parent / "out")) == 2


def test_links_are_pruned_before_what_they_point_to_is_removed(logs: Path) -> None:
    folder = logs / "catsT1_mine" / "checkpoints"
    (folder / "last.ckpt").rename(folder / "epoch=00.ckpt")
    (folder / "last.ckpt").symlink_to("epoch=00.ckpt")
    assert autoprune(logs, "--delete", "--full") == 0
    assert list(folder.iterdir()) == []
    assert "catsT1_mine-last-pruned.ckpt" in names(logs.parent / "out")


def test_a_failure_is_told_at_the_end_and_the_others_are_pruned(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = logs / "catsT1_mine" / "checkpoints" / "last.ckpt"
    bad.write_bytes(b"no checkpoint")
    assert autoprune(logs, "--delete") == 1
    assert names(logs.parent / "out") == {"dogsT2_mine-last-pruned.ckpt"}
    assert bad.exists()
    error = capsys.readouterr().err
    assert str(bad) in error
    assert "1 of 2 checkpoints failed" in error


def test_nothing_is_deleted_whose_copy_was_not_verified(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("what was written does not read back as it should")

    monkeypatch.setattr(checkpoint_files, "verify_file", refuse)
    assert autoprune(logs, "--delete") == 1
    assert len(list(logs.rglob("last.ckpt"))) == 2
    assert names(logs.parent / "out") == set()


def test_an_existing_copy_is_not_replaced_unasked(logs: Path) -> None:
    assert autoprune(logs) == 0
    assert autoprune(logs) == 1
    assert autoprune(logs, "--overwrite") == 0


def test_checkpoints_whose_copies_would_share_a_name_are_left_alone(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = logs / "catsT1_mine" / "last.ckpt"
    torch.save(lightning_checkpoint({WEIGHT: torch.ones(3)}), twin)
    assert autoprune(logs, "--delete") == 1
    assert twin.exists()
    assert (logs / "catsT1_mine" / "checkpoints" / "last.ckpt").exists()
    assert "named catsT1_mine-last-pruned.ckpt too" in capsys.readouterr().err


def test_pruned_copies_are_not_pruned_again(logs: Path) -> None:
    folder = str(logs / "copies")
    assert autoprune_all.main(["--logdir", str(logs), "--out", folder]) == 0
    assert autoprune_all.main(["--logdir", str(logs), "--out", folder, "--overwrite"]) == 0
    assert len(list(logs.rglob("*-pruned.ckpt"))) == 2


def test_one_runs_own_folder_can_be_named(logs: Path) -> None:
    assert autoprune(logs / "catsT1_mine", "--out", str(logs.parent / "here")) == 0
    assert names(logs.parent / "here") == {"catsT1_mine-last-pruned.ckpt"}


def test_copies_can_be_safetensors(logs: Path) -> None:
    assert autoprune(logs, "--format", "safetensors") == 0
    assert "dogsT2_mine-last-pruned.safetensors" in names(logs.parent / "out")


@pytest.mark.parametrize("folder", ["gone", "empty"])
def test_a_log_folder_without_checkpoints_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert autoprune_all.main(["--logdir", str(tmp_path / folder)]) == 2
    assert folder in capsys.readouterr().err
