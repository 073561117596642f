"""Each mistake ends within seconds, with a line that says what is wrong and what to type, and status 2.

Most mistakes are in ``test_error_catalogue.py``; here is what needs more than the first line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.training.run import main
from tests.end_to_end.conftest import TINY, start
from tests.unit.training.toy import make_pictures

Refuse = Callable[..., list[str]]

BASE = ("--base", str(TINY))


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must be refused, in a folder with pictures; gives the lines on standard error."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures", per_folder=2)

    def refuse(*words: str) -> list[str]:
        assert main(list(words)) == 2
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert not (tmp_path / "logs").exists()
        return errors.splitlines()

    return refuse


def everyday(*words: str, data_root: str = "pictures") -> tuple[str, ...]:
    return (*BASE, "-t", "-n", "wrong", "--data_root", data_root, *words)


# --- configuration and command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (everyday("data.params.bach_size=2"), ["bach_size", "batch_size"]),
        (
            everyday("model.target=ldm.models.diffusion.ddpm.LatentDifusion"),
            ["model.target", "LatentDifusion", "LatentDiffusion"],
        ),
        (everyday("data.params.wrap=flase"), ["data.params.wrap", "flase", "true or false"]),
        (everyday("data.params.train.params.size=100"), ["data.params.train.params.size", "100", "multiple of 8"]),
        (everyday("data.params.train.params.flip_p=1.5"), ["flip_p", "1.5"]),
        (everyday("data.params.num_workers=-1"), ["data.params.num_workers", "-1"]),
        (everyday("data.params.batch_size=0"), ["data.params.batch_size", "0"]),
        (everyday("data.params.train.params.repeats=0"), ["repeats", "0"]),
        (everyday("model.params.timesteps=0"), ["model.params.timesteps"]),
        (
            everyday("model.params.unfreeze_model=false", "model.params.cond_stage_trainable=false"),
            ["nothing to train", "unfreeze_model", "cond_stage_trainable"],
        ),
        (everyday(data_root="gone"), ["--data_root", "gone"]),
        (everyday("--actual_resume", "gone.ckpt"), ["--actual_resume", "gone.ckpt"]),
        (("-t", "-r", "logs2/gone"), ["--resume", "logs2/gone"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_answered_with_one_line(words: tuple[str, ...], expected: list[str], refuse: Refuse) -> None:
    (line,) = refuse(*words)
    assert all(part in line for part in expected), line


# --- pictures ----------------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_read_are_named_all_at_once(refuse: Refuse) -> None:
    broken = sorted(Path("pictures").rglob("*.png"))[:2]
    for path in broken:
        path.write_bytes(b"not a picture")
    lines = refuse(*everyday())
    assert all(any(path.name in line for line in lines) for path in broken)
    assert "on_bad_image=skip" in lines[-1]


def test_a_folder_of_nothing_but_broken_pictures_is_told(refuse: Refuse) -> None:
    for path in Path("pictures").rglob("*.png"):
        path.write_bytes(b"not a picture")
    assert "4 of 4" in refuse(*everyday())[-1]


# --- checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_architecture_is_told_with_counts_and_names(refuse: Refuse) -> None:
    torch.save({"state_dict": {"other.weight": torch.ones(2)}}, "other.ckpt")
    (line,) = refuse(*everyday("--actual_resume", "other.ckpt"))
    assert "other.ckpt" in line
    assert "other.weight" in line
    assert "model.diffusion_model." in line


# --- run folders -------------------------------------------------------------------------------------------


def test_a_log_folder_that_cannot_be_written_is_told(refuse: Refuse) -> None:
    Path("file").write_text("")
    (line,) = refuse(*everyday("-l", "file"))
    assert "--logdir" in line


# --- the whole program -------------------------------------------------------------------------------------


def test_the_program_itself_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    process = start(*everyday(data_root="gone"), cwd=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
