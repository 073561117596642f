from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest
import torch

from ldm.training.run_directory import RunDirectory, find_run, last_part, list_runs, new_run_directory, newest_run

NOW = datetime(2022, 10, 25, 20, 37, 40)


def new_run(tmp_path: Path, **changed: object) -> RunDirectory:
    arguments: dict[str, object] = {
        "logdir": str(tmp_path),
        "data_root": "training_samples/MyProject",
        "name": "MyProjectName",
        "postfix": "",
        "datadir_in_name": True,
        "bases": ["configs/stable-diffusion/v1-finetune_everydream.yaml"],
        "now": NOW,
    }
    return new_run_directory(**{**arguments, **changed})  # type: ignore[arg-type]


def make_run(path: Path, *checkpoints: str) -> Path:
    for folder in ("checkpoints", "configs"):
        (path / folder).mkdir(parents=True)
    for age, name in enumerate(checkpoints):
        file = path / "checkpoints" / name
        torch.save({"state_dict": {"w": torch.zeros(1)}, "optimizer_states": []}, file)
        os.utime(file, (1000 + age, 1000 + age))
    return path


def test_a_run_folder_is_named_by_data_date_and_name(tmp_path: Path) -> None:
    assert new_run(tmp_path).path == tmp_path / "MyProject2022-10-25T20-37-40_MyProjectName"


def test_a_run_folder_can_leave_the_data_out_and_end_in_a_postfix(tmp_path: Path) -> None:
    path = new_run(tmp_path, datadir_in_name=False, postfix="_b").path
    assert path.name == "2022-10-25T20-37-40_MyProjectName_b"


def test_a_run_without_a_name_is_called_after_its_config(tmp_path: Path) -> None:
    assert new_run(tmp_path, name=None).path.name == "MyProject2022-10-25T20-37-40_v1-finetune_everydream"


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    first = new_run(tmp_path)
    first.create()
    assert new_run(tmp_path).path.name == first.path.name + "-2"


@pytest.mark.parametrize("name", ["a/b", "a\\b", "a:b", "a\nb"])
def test_a_name_that_no_folder_can_have_is_an_error_that_names_the_flag(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="-n/--name"):
        new_run(tmp_path, name=name)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("training_samples/MyProject", "MyProject"),
        ("training_samples/MyProject/", "MyProject"),
        ("training_samples\\MyProject", "MyProject"),
        ("C:\\pictures\\My Project\\", "My Project"),
        ("MyProject", "MyProject"),
    ],
)
def test_the_data_folders_name_is_read_from_paths_of_any_system(path: str, name: str) -> None:
    assert last_part(path) == name


def test_the_present_folder_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert last_part(".") == tmp_path.name


def test_creating_a_run_makes_its_three_folders(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.create()
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "configs", "images"]


def test_checking_whether_a_run_can_be_written_writes_nothing(tmp_path: Path) -> None:
    new_run(tmp_path, logdir=str(tmp_path / "logs")).check_writable()
    assert list(tmp_path.iterdir()) == []


def test_a_log_folder_that_is_a_file_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(OSError, match="--logdir"):
        new_run(tmp_path, logdir=str(tmp_path / "logs")).check_writable()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is closed to the superuser")
def test_a_log_folder_without_permission_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="--logdir"):
            new_run(tmp_path).check_writable()
    finally:
        tmp_path.chmod(0o700)


def test_a_run_is_continued_from_its_last_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "last.ckpt", "epoch=01-step=00010.ckpt")
    directory, checkpoint = find_run(str(run), NOW)
    assert directory.path == run
    assert checkpoint == run / "checkpoints" / "last.ckpt"


def test_a_run_without_last_ckpt_is_continued_from_the_newest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "epoch=01.ckpt", "epoch=00.ckpt")
    assert find_run(str(run), NOW)[1].name == "epoch=00.ckpt"


def test_a_checkpoint_stands_for_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "last.ckpt", "epoch=01.ckpt")
    directory, checkpoint = find_run(str(run / "checkpoints" / "epoch=01.ckpt"), NOW)
    assert (directory.path, checkpoint.name) == (run, "epoch=01.ckpt")


def test_the_checkpoint_folder_stands_for_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "last.ckpt")
    assert find_run(str(run / "checkpoints"), NOW)[0].path == run


def test_a_run_without_checkpoints_cannot_be_continued(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint"):
        find_run(str(run), NOW)


def test_a_checkpoint_outside_a_run_is_pointed_to_actual_resume(tmp_path: Path) -> None:
    (tmp_path / "sd.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="--actual_resume"):
        find_run(str(tmp_path / "sd.ckpt"), NOW)


def test_a_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--resume"):
        find_run(str(tmp_path / "gone"), NOW)


def at_work(run: Path, when: int) -> Path:
    for path in [run, *run.rglob("*")]:
        os.utime(path, (when, when))
    return run


def test_the_run_that_was_last_at_work_comes_first(tmp_path: Path) -> None:
    older, newer = (at_work(make_run(tmp_path / name, "last.ckpt"), when) for name, when in (("b", 1), ("a", 2)))
    (tmp_path / "no run").mkdir()
    assert list_runs(tmp_path) == [newer, older]


def test_the_newest_run_with_a_checkpoint_is_found_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, empty = make_run(tmp_path / "b", "last.ckpt"), make_run(tmp_path / "a")
    (older / "configs" / "2026-project.yaml").write_text("")
    at_work(older, 1)
    at_work(empty, 2)
    assert newest_run(tmp_path) == older
    assert caplog.messages == [f"{empty} is passed over: it has no checkpoint to continue from"]


def test_without_a_run_to_continue_the_log_folder_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="none of 1 runs has a checkpoint"):
        newest_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="--logdir"):
        newest_run(tmp_path / "gone")
