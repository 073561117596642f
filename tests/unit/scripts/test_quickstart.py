from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import quickstart
from environment import SetupError

Run = Callable[[list[object]], int]


def leave_run(logs: Path, stamp: str = "2026-01-01T00-00-00") -> Path:
    run = logs / f"quickstart{stamp}_quickstart"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(b"x" * 2_000_000)
    (run / "images" / "train").mkdir(parents=True)
    (run / "images" / "train" / "overview_gs-000010.jpg").touch()
    (run / "images" / "train" / "inputs_gs-000010.jpg").touch()
    return run


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "ensure_environment", lambda *args, **kwargs: Path("python"))
    return tmp_path


def test_the_command_is_the_documented_one() -> None:
    assert " ".join(["python", *quickstart.COMMAND]) == (
        "python main.py --base configs/stable-diffusion/v1-finetune_tiny.yaml -t --actual_resume "
        "models/tiny/tiny_random.ckpt -n quickstart --data_root training_samples/quickstart"
    )


def test_it_prepares_trains_and_names_what_the_run_left(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(root / "logs", "2025-12-31T00-00-00")
    commands = []

    def run_live(command: list[object]) -> int:
        commands.append([str(part) for part in command])
        if "main.py" in command:
            leave_run(root / "logs")
        return 0

    monkeypatch.setattr(quickstart, "run_live", run_live)
    assert quickstart.main([]) == 0
    assert [command[1] for command in commands] == [
        "scripts/prepare_quickstart.py",
        "scripts/make_tiny_checkpoint.py",
        "main.py",
    ]
    shown = capsys.readouterr().out
    assert " ".join(["python", *quickstart.COMMAND]) in shown
    assert "quickstart2026-01-01T00-00-00_quickstart" in shown
    assert "2025" not in shown
    assert "last.ckpt (2 MB)" in shown
    assert "overview_gs-000010.jpg" in shown
    assert "-m tensorboard.main --logdir" in shown


@pytest.mark.parametrize("failing", ["scripts/prepare_quickstart.py", "scripts/make_tiny_checkpoint.py", "main.py"])
def test_a_failing_step_ends_it_with_that_step_s_status(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    monkeypatch.setattr(quickstart, "run_live", lambda command: 5 if failing in command else 0)
    assert quickstart.main([]) == 5
    assert "failed with exit status 5" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["checkpoints/last.ckpt", "images/train/overview_gs-000010.jpg"])
def test_a_run_without_its_results_is_a_failure(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    def run_live(command: list[object]) -> int:
        if "main.py" in command:
            (leave_run(root / "logs") / missing).unlink()
        return 0

    monkeypatch.setattr(quickstart, "run_live", run_live)
    assert quickstart.main([]) == 1
    assert "the run ended without" in capsys.readouterr().err


def test_an_earlier_run_is_not_taken_for_this_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(root / "logs")
    monkeypatch.setattr(quickstart, "run_live", lambda command: 0)
    assert quickstart.main([]) == 1
    assert "the run left no folder" in capsys.readouterr().err


def test_an_environment_that_cannot_be_made_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> Path:
        raise SetupError("Python 3.10 or newer is needed")

    monkeypatch.setattr(quickstart, "ensure_environment", fail)
    assert quickstart.main([]) == 1
    assert capsys.readouterr().err == "quickstart: Python 3.10 or newer is needed\n"
