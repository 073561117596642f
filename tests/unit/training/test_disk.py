from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ldm.training.disk import write_text
from ldm.training.run import main
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import make_pictures


def test_a_write_that_is_broken_off_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, 10_000 * "after" + "\udcff")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_configuration_and_a_ledger_without_room_are_told_in_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "mine", per_folder=2)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    assert main(["-b", "toy.yaml", "-t", "--data_root", "mine"]) == 0
    run = next(Path("logs").iterdir())
    (run / "exposure.jsonl.tmp").mkdir()
    assert main(["-t", "-r", str(run), "--max_epochs", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot take the exposures that come again out of {run / 'exposure.jsonl'}: ")
    assert error.count("\n") == 1

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ldm.training.run.write_text", full)
    assert main(["-b", "toy.yaml", "-t", "--data_root", "mine"]) == 2
    error = capsys.readouterr().err
    assert "-project.yaml: No space left on device (make room on its disk" in error
    assert error.count("\n") == 1


def test_a_configuration_of_which_a_killed_process_wrote_a_part_is_not_what_the_run_continues_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "mine", per_folder=2)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    assert main(["-b", "toy.yaml", "-t", "--data_root", "mine"]) == 0
    run = next(Path("logs").iterdir())

    config = next((run / "configs").iterdir())
    later = config.with_name(f"9{config.name}")
    with pytest.raises(UnicodeEncodeError):
        write_text(later, 10_000 * "model:\n" + "\udcff")
    assert main(["-t", "-r", str(run), "--max_epochs", "2"]) == 0


def test_a_run_killed_before_its_end_was_called_last_ckpt_gets_that_when_nothing_is_left_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "mine", per_folder=2)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    assert main(["-b", "toy.yaml", "-t", "--data_root", "mine", "--max_steps", "4"]) == 0
    last = next(Path("logs").iterdir()) / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    last.rename(last.with_name("epoch=00-step=00004.ckpt"))
    last.with_name("last.ckpt.partial").touch()
    assert main(["-t", "-r", str(last.parent.parent)]) == 0
    assert last.read_bytes() == content
    assert not last.with_name("last.ckpt.partial").exists()
