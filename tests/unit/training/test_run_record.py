"""``run.json``: what it says at the beginning, at each end, and in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.training.run import main
from ldm.training.run_record import git_state, is_alive, plain, process_mark, read_record, write_record, zip_checksum
from ldm.training.stop_signals import Interrupted
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import ToyDiffusion


class Breaks(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise ValueError("a fault inside the model\nwith a second line")
        return super().training_step(batch, batch_idx)


class Stops(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise Interrupted(2)
        return super().training_step(batch, batch_idx)


class Slow(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        time.sleep(0.4)
        return super().training_step(batch, batch_idx)


class Looks(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        (record,) = Path("logs").glob("*/run.json")
        Path("seen.json").write_text(record.read_text())
        return super().training_step(batch, batch_idx)


@pytest.fixture
def command(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    return ["-b", "toy.yaml", "-t", "-n", "toy", "--data_root", str(pictures)]


def here(name: str) -> str:
    return f"model.target=tests.unit.training.test_run_record.{name}"


def folder() -> Path:
    return next(Path("logs").iterdir())


def record() -> dict[str, Any]:
    found = read_record(folder())
    assert found is not None
    return found


def test_a_finished_run_says_what_it_was_and_why_it_ended(command: list[str]) -> None:
    assert main(command) == 0
    found = record()
    assert (found["state"], found["reason"], found["step"], found["epoch"]) == ("finished", "max_epochs 1", 6, 1)
    assert list(found["losses"]) == ["train/loss"]
    (session,) = found["sessions"]
    assert session["command"] == command
    assert session["seed"] == 23
    assert session["config"]["data"]["params"]["batch_size"] == 2
    assert session["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert session["device"]["kind"] == "cpu"
    assert session["wall_seconds"] == found["wall_seconds"] > 0
    assert len(found["data_sets"][session["data"]]["sets"]["train"]["pictures"]) == 6


def test_the_checkpoints_are_listed_with_size_and_checksum(command: list[str]) -> None:
    assert main(command) == 0
    listed = {entry["name"]: entry for entry in record()["checkpoints"]}
    assert set(listed) == {path.name for path in (folder() / "checkpoints").iterdir()}
    last = folder() / "checkpoints" / "last.ckpt"
    assert listed["last.ckpt"]["bytes"] == last.stat().st_size
    assert listed["last.ckpt"]["checksum"] == zip_checksum(last)


def test_while_a_run_lasts_its_record_says_so(command: list[str]) -> None:
    assert main([*command, here("Looks")]) == 0
    seen = json.loads(Path("seen.json").read_text())
    assert (seen["state"], seen["sessions"][0]["ended"]) == ("running", None)
    assert is_alive(seen["sessions"][0])


def test_a_failure_is_the_reason_in_one_line(command: list[str]) -> None:
    assert main([*command, here("Breaks")]) == 1
    found = record()
    assert found["state"] == "failed"
    assert found["reason"] == "training failed at step 3: ValueError: a fault inside the model"
    assert found["step"] == 3


def test_a_signal_is_the_reason_that_it_gave(command: list[str]) -> None:
    assert main([*command, here("Stops")]) == 130
    assert (record()["state"], record()["reason"]) == ("stopped", "Ctrl-C")


def test_a_limit_of_steps_or_of_time_is_named(command: list[str]) -> None:
    assert main([*command, "--max_steps", "2"]) == 0
    assert record()["reason"] == "max_steps 2"
    limits = ["--max_steps=-1", "--max_epochs", "99", "--max_time", "00:00:00:01", here("Slow")]
    assert main(["-t", "-r", str(folder()), "--accept_changes", *limits]) == 0
    assert record()["reason"] == "max_time"


def test_each_resume_is_a_session_of_its_own(command: list[str]) -> None:
    assert main(command) == 0
    assert main(["-t", "-r", str(folder()), "--max_epochs", "2"]) == 0
    first, second = record()["sessions"]
    assert (first["continued_from"], first["first_step"], first["last_step"]) == (None, 0, 6)
    assert (second["continued_from"], second["first_step"], second["last_step"]) == ("checkpoints/last.ckpt", 6, 12)
    assert second["config"]["lightning"]["trainer"]["max_epochs"] == 2
    assert record()["wall_seconds"] == pytest.approx(first["wall_seconds"] + second["wall_seconds"])
    assert len(record()["data_sets"]) == 1


def test_a_session_that_was_killed_is_called_so_by_the_next(command: list[str]) -> None:
    assert main(command) == 0
    found = record()
    found["sessions"][0] |= {"state": "running", "ended": None, "wall_seconds": None}
    write_record(folder(), found)
    assert main(["-t", "-r", str(folder()), "--max_epochs", "2"]) == 0
    assert [session["state"] for session in record()["sessions"]] == ["killed", "finished"]


def test_a_resume_that_is_refused_leaves_the_record_alone(command: list[str]) -> None:
    assert main(command) == 0
    before = record()
    (folder() / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    assert main(["-t", "-r", str(folder() / "checkpoints" / "last.ckpt"), "--max_epochs", "2"]) == 2
    assert record() == before


def test_a_damaged_record_is_set_aside_and_the_run_goes_on(command: list[str], capsys: Any) -> None:
    assert main(command) == 0
    (folder() / "run.json").write_text("{")
    assert main(["-t", "-r", str(folder()), "--max_epochs", "2"]) == 0
    assert (folder() / "run.json.damaged").read_text() == "{"
    assert len(record()["sessions"]) == 1
    assert "run.json cannot be read" in capsys.readouterr().out


def test_a_record_that_cannot_be_written_is_told_and_the_run_goes_on(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(run: Path, record: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr("ldm.training.run_record.write_record", refuse)
    assert main(command) == 0
    assert "run.json could not be written: no room" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "{}", '{"sessions": [{}], "data_sets": {}}', "\udcff", "[" * 100_000])
def test_what_is_no_record_is_a_clean_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"run\.json"):
        read_record(tmp_path)


def test_a_folder_without_a_record_has_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None


def test_a_write_that_fails_leaves_the_record_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, {"step": 1})

    def fail(descriptor: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no room"):
        write_record(tmp_path, {"step": 2})
    assert json.loads((tmp_path / "run.json").read_text()) == {"step": 1}


def test_numbers_that_are_not_finite_are_written_as_text() -> None:
    assert plain({"loss": float("nan"), "path": Path("a")}) == {"loss": "nan", "path": "a"}


def test_the_checksum_depends_on_the_tensors_and_not_on_the_files_name(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        torch.save({"weight": torch.full((3,), value)}, tmp_path / name)
    one, same, other = (zip_checksum(tmp_path / name) for name in "abc")
    assert one is not None
    assert one == same != other
    (tmp_path / "d").write_bytes(b"no checkpoint")
    assert zip_checksum(tmp_path / "d") is None


def test_a_process_that_has_gone_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    session = {"process": {"id": process.pid, "host": os.uname().nodename, "mark": process_mark(process.pid)}}
    process.wait()
    assert is_alive(session) is False
    assert is_alive({"process": {"id": os.getpid(), "host": "another", "mark": None}}) is None


def test_the_commit_is_known_in_a_checkout_alone(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        named = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *named, *words], check=True, capture_output=True)

    assert git_state(tmp_path) is None
    (tmp_path / "a").write_text("1")
    for words in (("init",), ("add", "a"), ("commit", "-m", "first")):
        git(*words)
    state = git_state(tmp_path)
    assert state is not None
    assert (len(state["commit"]), state["dirty"]) == (40, False)
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == state | {"dirty": True}
    (tmp_path / "inner").mkdir()
    assert git_state(tmp_path / "inner") is None


def test_the_folder_is_named_as_the_checkpoints_place_even_when_given_otherwise(command: list[str]) -> None:
    assert main(command) == 0
    checkpoint = folder().resolve() / "checkpoints" / "last.ckpt"
    assert main(["-t", "-r", str(checkpoint), "--max_epochs", "2"]) == 0
    assert record()["sessions"][1]["continued_from"] == "checkpoints/last.ckpt"


@pytest.mark.parametrize("word", ["last", "auto"])
def test_the_newest_run_is_continued_by_a_word(word: str, command: list[str], capsys: Any) -> None:
    assert main([*command, "-l", "runs"]) == 0
    (run,) = Path("runs").iterdir()
    assert main(["-t", "-r", word, "-l", "runs", "--max_epochs", "2"]) == 0
    assert f"the newest run: {run}\n" in capsys.readouterr().out
    found = read_record(run)
    assert found is not None
    assert found["step"] == 12


def test_a_run_that_another_process_is_training_is_left_to_it(command: list[str], capsys: Any) -> None:
    assert main(command) == 0
    found = record()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = {**found["sessions"][0]["process"], "id": process.pid, "mark": process_mark(process.pid)}
        found["sessions"][0] |= {"state": "running", "process": owner}
        write_record(folder(), found)
        assert main(["-t", "-r", str(folder()), "--max_epochs", "2"]) == 2
    assert f"process {process.pid} is still training this run" in capsys.readouterr().err
    assert main(["-t", "-r", str(folder()), "--max_epochs", "2"]) == 0


@pytest.mark.parametrize(
    ("limits", "complete"),
    [
        (["--max_epochs", "2"], 2),
        (["--max_epochs", "9", "--max_steps", "8"], 1),
        (["--max_epochs", "9", "--max_steps", "6"], 1),
        (["--max_epochs", "9", "--max_steps", "4"], 0),
    ],
)
def test_an_epoch_that_a_limit_breaks_off_is_not_counted(limits: list[str], complete: int, command: list[str]) -> None:
    assert main([*command, *limits, "data.params.batch_size=2"]) == 0
    assert record()["epoch"] == complete
