from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import runs

from ldm.training.run import main
from ldm.training.run_record import read_record, write_record
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import make_pictures


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log folder with one finished run."""
    place = tmp_path_factory.mktemp("place")
    make_pictures(place / "mine", per_folder=2, folders=2, size=16)
    (place / "toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    words = ["--data_root", str(place / "mine"), "-l", str(place / "logs"), "--log_every_n_steps", "1"]
    assert main(["-b", str(place / "toy.yaml"), "-t", "-n", "toy", *words]) == 0
    return place / "logs"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    (original,) = finished.iterdir()
    copy = tmp_path / "logs" / original.name
    for path in original.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(original)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copy


def running(run: Path, **process: Any) -> None:
    """Make a run's record say that it runs."""
    record = read_record(run)
    assert record is not None
    session = record["sessions"][0]
    session |= {"state": "running", "process": {**session["process"], **process}}
    write_record(run, record | {"step": 0, "losses": {}})


def test_a_finished_run_is_described(run: Path) -> None:
    found = runs.describe_run(run)
    assert (found["state"], found["reason"], found["step"], found["epoch"]) == ("finished", "max_epochs 1", 4, 1)
    assert found["checkpoints"] == 2
    assert found["losses"].keys() == {"train/loss"}
    assert found["resume"] == f"python main.py -t -r {run} --max_epochs 2"


def test_a_run_that_was_killed_is_told_from_one_that_runs(run: Path) -> None:
    running(run)
    assert runs.describe_run(run)["state"] == "running"
    running(run, mark="another process of this number")
    assert runs.describe_run(run)["state"] == "killed"
    running(run, host=f"not {socket.gethostname()}")
    assert "when last heard of" in runs.describe_run(run)["reason"]


def test_of_a_run_that_was_killed_the_ledger_and_the_curves_tell(run: Path) -> None:
    running(run, mark="another process of this number")
    found = runs.describe_run(run)
    assert found["step"] == 4
    assert found["losses"]["train/loss"] == pytest.approx(1.0, abs=1.0)
    assert found["resume"] == f"python main.py -t -r {run}"


def test_a_run_without_a_record_is_described_by_what_it_left(run: Path) -> None:
    (run / "run.json").unlink()
    found = runs.describe_run(run)
    assert (found["state"], found["step"], found["wall_seconds"]) == ("unknown", 4, None)
    assert "train/loss" in found["losses"]
    assert found["resume"] == f"python main.py -t -r {run}"


def test_a_run_without_a_ledger_is_described_by_its_checkpoints_names(run: Path) -> None:
    (run / "run.json").unlink()
    (run / "exposure.jsonl").unlink()
    assert {name: runs.describe_run(run)[name] for name in ("step", "epoch")} == {"step": 4, "epoch": 1}


def test_a_damaged_record_is_named(run: Path) -> None:
    (run / "run.json").write_text("{")
    assert "run.json cannot be read" in runs.describe_run(run)["reason"]


def test_without_a_checkpoint_there_is_no_command(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert runs.describe_run(run)["resume"] is None
    assert "nothing to continue from" in runs.format_runs([runs.describe_run(run)], run.parent, 80)


def test_a_checkpoint_of_two_names_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    os.link(tmp_path / "a", tmp_path / "b")
    assert runs.size_on_disk(tmp_path) == 1000


@pytest.mark.parametrize("width", [40, 80, 160])
def test_nothing_but_names_and_commands_is_wider_than_the_terminal(run: Path, width: int) -> None:
    text = runs.format_runs([runs.describe_run(run)], Path("logs"), width)
    facts = [line for line in text.splitlines() if line.startswith("  ") and "main.py" not in line]
    assert max(map(len, facts)) <= width
    assert re.search(r"finished \(max_epochs 1\)\s+step 4\s+1 complete epoch\s+train/loss \d\.\d{4}\s", text)


def test_runs_are_listed_with_the_command_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main([str(run.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run.parent}: 1 run, ")
    assert lines[2] == run.name
    assert lines[-1] == f"  python main.py -t -r {run} --max_epochs 2"


def test_json_is_for_other_programs_also_with_losses_that_are_not_numbers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_record(run)
    assert record is not None
    write_record(run, record | {"losses": {"train/loss": float("nan")}})
    assert runs.main([str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["losses"] == {"train/loss": "nan"}


def test_a_missing_log_folder_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main([str(tmp_path / "gone")]) == 2
    assert "does not exist" in capsys.readouterr().err
