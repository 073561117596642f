"""What is told of changes between a save and a resume, and which of them have to be accepted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ldm.training.run import main
from ldm.training.run_changes import HARMLESS, Changes, find_changes, question, session_of
from ldm.training.run_record import read_record, write_record
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import make_pictures

DATA = Path("mine")
FIRST = DATA / "folder0" / "a plain square 0_.png"
SECOND = DATA / "folder0" / "a plain square 1_.png"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one epoch on pictures of its own, with a validation set."""
    monkeypatch.chdir(tmp_path)
    make_pictures(DATA, per_folder=3, folders=2, size=16)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    validation = [
        "data.params.validation.target=ldm.data.ed_validate.EDValidateBatch",
        "data.params.validation.params.size=16",
    ]
    assert main(["-b", "toy.yaml", "-t", "-n", "toy", "--data_root", str(DATA), *validation]) == 0
    return next(Path("logs").iterdir())


def resume(folder: Path, *words: str) -> int:
    return main(["-t", "-r", str(folder), "--max_epochs", "2", *words])


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Resume in vain; gives what is told to have changed."""
    capsys.readouterr()
    assert resume(folder, *words) == 2
    *lines, remedy = capsys.readouterr().err.splitlines()
    assert remedy.endswith("--accept_changes")
    return [line.removeprefix("error: changed since the checkpoint was saved: ") for line in lines]


# --- what needs no flag ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        "data.params.num_workers=1",
        "lightning.trainer.max_steps=7",
        "lightning.trainer.log_every_n_steps=3",
        "lightning.trainer.precision=32-true",
        "lightning.modelcheckpoint.params.every_n_epochs=2",
        "lightning.callbacks.image_logger.params.max_images=2",
        "data.params.train.params.flip_p=0.0",
        "data.params.train.params.on_bad_image=skip",
        "run.name=another",
    ],
)
def test_what_changes_nothing_that_is_learnt_is_let_through(folder: Path, word: str) -> None:
    assert resume(folder, word) == 0


def test_harmless_changes_are_told_and_recorded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(folder, "data.params.num_workers=1") == 0
    told = "data.params.num_workers 0 -> 1; lightning.trainer.max_epochs 1 -> 2"
    assert f"changed since the checkpoint was saved: {told}\n" in capsys.readouterr().out
    record = read_record(folder)
    assert record is not None
    assert record["sessions"][1]["changes"] == told.split("; ")


@pytest.mark.parametrize("name", ["data_root", "shards", "cache_dir"])
def test_where_data_lies_is_harmless_also_inside_a_mixture(name: str) -> None:
    assert HARMLESS.match(f"data.params.train.params.{name}")
    assert HARMLESS.match(f"data.params.train.params.sets.my faces.params.{name}")
    assert not HARMLESS.match(f"data.params.train.params.{name}_else")


def test_data_that_was_moved_or_touched_has_not_changed(folder: Path) -> None:
    os.utime(FIRST, (1, 1))
    DATA.rename("moved")
    assert resume(folder, "--data_root", "moved") == 0


# --- what needs it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.base_learning_rate=5e-7", "learning rate 0.01 -> 5e-7"),
        ("run.seed=7", "seed 23 -> 7"),
        ("data.params.train.params.flip_p=0.5", "data.params.train.params.flip_p 0 -> 0.5"),
        ("data.params.batch_size=3", "batch size x devices 2 x 1 -> 3 x 1 (data.params.batch_size)"),
        ("lightning.trainer.accumulate_grad_batches=2", "lightning.trainer.accumulate_grad_batches 1 -> 2"),
        ("data.params.validation.params.size=24", "data.params.validation.params.size 16 -> 24"),
    ],
)
def test_a_setting_that_makes_it_another_run_is_told_and_asked_for(
    folder: Path, word: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(folder, capsys, word)


def test_pictures_and_captions_that_changed_are_counted_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        (DATA / "folder1" / f"new {number}_.png").write_bytes(FIRST.read_bytes() + bytes([number]))
    FIRST.with_suffix(".txt").write_text("a tall square")
    SECOND.write_bytes(SECOND.read_bytes() + b"\0")
    (DATA / "folder1" / "a plain square 0_.png").unlink()
    new = "; ".join(f"folder1/new {number}_.png" for number in range(3))
    assert refused(folder, capsys) == [
        f"4 pictures added [{new} and 1 more], 1 picture removed [folder1/a plain square 0_.png], "
        "1 caption changed [folder0/a plain square 0_.png], "
        "1 picture changed [folder0/a plain square 1_.png] (data: train and validation)"
    ]


def test_a_file_whose_name_is_its_caption_counts_as_a_changed_caption(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FIRST.rename(FIRST.with_name("a tall square_.png"))
    SECOND.rename(SECOND.with_name("a plain square 1_b.png"))
    (told,) = refused(folder, capsys)
    assert told.startswith("1 picture renamed [folder0/a plain square 1_.png -> folder0/a plain square 1_b.png], ")
    assert "1 caption changed [folder0/a plain square 0_.png -> folder0/a tall square_.png]" in told


def test_a_folders_settings_that_changed_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (DATA / "folder1" / "multiply.txt").write_text("2")
    assert "1 folder's settings changed [folder1]" in refused(folder, capsys)[0]


def test_a_saved_config_that_was_edited_is_seen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved,) = (folder / "configs").iterdir()
    saved.write_text(saved.read_text().replace("base_learning_rate: 0.01", "base_learning_rate: 0.02"))
    assert refused(folder, capsys) == ["learning rate 0.01 -> 0.02"]


def test_nothing_is_written_by_a_resume_that_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused(folder, capsys, "run.seed=7")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# --- accepting it ------------------------------------------------------------------------------------------


def test_an_accepted_change_is_told_recorded_and_not_asked_for_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FIRST.unlink()
    assert resume(folder, "--accept_changes") == 0
    told = "1 picture removed [folder0/a plain square 0_.png] (data: train and validation)"
    assert f"changed since the checkpoint was saved, and accepted: {told}\n" in capsys.readouterr().out
    record = read_record(folder)
    assert record is not None
    assert record["sessions"][1]["changes"][0] == told
    assert len(record["data_sets"]) == 2
    assert main(["-t", "-r", str(folder), "--max_epochs", "3"]) == 0


def test_a_checkpoint_from_before_an_accepted_change_is_compared_with_its_own_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(folder, "model.base_learning_rate=0.02", "--accept_changes") == 0
    (older,) = (folder / "checkpoints").glob("epoch=00*")
    assert refused(older, capsys) == ["learning rate 0.01 -> 0.02"]


# --- runs that say less ------------------------------------------------------------------------------------


def test_a_run_without_a_record_is_compared_by_its_saved_config(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.json").unlink()
    FIRST.unlink()
    assert refused(folder, capsys, "run.seed=7") == ["seed 23 -> 7"]
    assert resume(folder) == 0


def changes_of(folder: Path, devices: int, batch_size: int) -> Changes:
    record = read_record(folder)
    assert record is not None
    config: dict[str, Any] = record["sessions"][0]["config"]
    data = record["data_sets"][record["sessions"][0]["data"]]
    params = {**config["data"]["params"], "batch_size": batch_size}
    trainer = {**config["lightning"]["trainer"], "devices": devices}
    changed = {
        **config,
        "data": {**config["data"], "params": params},
        "lightning": {**config["lightning"], "trainer": trainer},
    }
    return find_changes(folder, folder / "checkpoints" / "last.ckpt", changed, data, devices)


def test_other_devices_with_as_many_pictures_at_once_need_no_flag(folder: Path) -> None:
    assert changes_of(folder, devices=2, batch_size=1).breaking == []
    assert changes_of(folder, devices=2, batch_size=2).breaking == [
        "batch size x devices 2 x 1 -> 2 x 2 (data.params.batch_size)"
    ]


def test_a_session_is_found_by_when_its_checkpoint_was_saved(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    sessions = [{"began": f"2026-01-0{day}T00:00:00+00:00"} for day in (1, 2, 3)]
    os.utime(tmp_path / "a.ckpt", (1767400000, 1767400000))  # the third, after midnight
    assert session_of({"sessions": sessions}, tmp_path / "a.ckpt") == sessions[2]
    os.utime(tmp_path / "a.ckpt", (1767350000, 1767350000))
    assert session_of({"sessions": sessions}, tmp_path / "a.ckpt") == sessions[1]


def test_the_question_ends_with_what_to_type() -> None:
    changes = Changes(["seed 1 -> 2"])
    assert question(changes, "COMMAND --accept_changes").splitlines()[-1].endswith("COMMAND --accept_changes")


def test_a_record_with_odd_parts_does_not_stop_a_resume(folder: Path) -> None:
    record = read_record(folder)
    assert record is not None
    record["data_sets"] = {record["sessions"][0]["data"]: {"sets": 3}}
    write_record(folder, record)
    assert resume(folder) == 0
