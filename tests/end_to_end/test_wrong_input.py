"""Each mistake ends within seconds, with a line that says what is wrong and what to type, and status 2."""

from __future__ import annotations

import os
import shutil
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
        (("--base", "nope.yaml", "-t"), ["nope.yaml"]),
        (everyday("data.params.bach_size=2"), ["bach_size", "batch_size"]),
        (everyday("--max_epoch", "3"), ["--max_epoch", "--max_epochs"]),
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
        (everyday("model.base_learning_rate=0"), ["model.base_learning_rate", "above 0"]),
        (everyday("model.params.timesteps=0"), ["model.params.timesteps"]),
        (
            everyday("model.params.unfreeze_model=false", "model.params.cond_stage_trainable=false"),
            ["nothing to train", "unfreeze_model", "cond_stage_trainable"],
        ),
        ((*BASE, "-t"), ["--data_root"]),
        (everyday(data_root="gone"), ["--data_root", "gone"]),
        (everyday("--actual_resume", "gone.ckpt"), ["--actual_resume", "gone.ckpt"]),
        (("-t", "-r", "logs2/gone"), ["--resume", "logs2/gone"]),
        (("-t", "-r", "logs2/gone", "-n", "name"), ["--name", "--resume"]),
        (everyday("data.params.batch_size=1000"), ["data.params.batch_size", "1000"]),
        (everyday("-n", "a/b"), ["--name", "a/b"]),
        (BASE, ["-t"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_answered_with_one_line(words: tuple[str, ...], expected: list[str], refuse: Refuse) -> None:
    (line,) = refuse(*words)
    assert all(part in line for part in expected), line


def test_an_unreadable_yaml_is_named_with_its_line(refuse: Refuse) -> None:
    Path("bad.yaml").write_text("model: [unclosed\n")
    (line,) = refuse("--base", "bad.yaml", "-t")
    assert "bad.yaml" in line


def test_several_mistakes_are_told_at_once(refuse: Refuse) -> None:
    lines = refuse(*everyday("data.params.bach_size=2", "data.params.wrap=flase", "model.base_learning_rate=0"))
    assert len(lines) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(refuse: Refuse) -> None:
    (line,) = refuse(*everyday("--gpus", "0,"))
    assert "--gpus" in line


# --- pictures ----------------------------------------------------------------------------------------------


def test_an_empty_data_root_is_told(refuse: Refuse) -> None:
    Path("empty").mkdir()
    (line,) = refuse(*everyday(data_root="empty"))
    assert "empty" in line


def test_a_picture_in_the_root_is_named(refuse: Refuse) -> None:
    shutil.copy(next(Path("pictures").rglob("*.png")), Path("pictures") / "a cat.png")
    (line,) = refuse(*everyday())
    assert "a cat.png" in line


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


def test_a_truncated_checkpoint_is_told(refuse: Refuse, workplace: Path) -> None:
    Path("cut.ckpt").write_bytes((workplace / "tiny.ckpt").read_bytes()[:100_000])
    (line,) = refuse(*everyday("--actual_resume", "cut.ckpt"))
    assert "cut.ckpt" in line


def test_a_checkpoint_of_another_architecture_is_told_with_counts_and_names(refuse: Refuse) -> None:
    torch.save({"state_dict": {"other.weight": torch.ones(2)}}, "other.ckpt")
    (line,) = refuse(*everyday("--actual_resume", "other.ckpt"))
    assert "other.ckpt" in line
    assert "other.weight" in line
    assert "model.diffusion_model." in line


def test_a_checkpoint_that_holds_nan_is_told(refuse: Refuse, workplace: Path) -> None:
    weights = torch.load(workplace / "tiny.ckpt", weights_only=True)["state_dict"]
    weights["model.diffusion_model.out.2.weight"][0] = float("nan")
    torch.save({"state_dict": weights}, "nan.ckpt")
    (line,) = refuse(*everyday("--actual_resume", "nan.ckpt"))
    assert "NaN" in line
    assert "model.diffusion_model.out.2.weight" in line


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code-has-run",)


def test_a_checkpoint_that_holds_code_is_refused_without_running_it(refuse: Refuse) -> None:
    torch.save({"state_dict": {"weight": Malicious()}}, "malicious.ckpt")
    (line,) = refuse(*everyday("--actual_resume", "malicious.ckpt"))
    assert "malicious.ckpt" in line
    assert not Path("code-has-run").exists()


# --- run folders -------------------------------------------------------------------------------------------


def test_a_run_without_checkpoints_cannot_be_continued(refuse: Refuse) -> None:
    Path("logs2/run/checkpoints").mkdir(parents=True)
    (line,) = refuse("-t", "-r", "logs2/run")
    assert "logs2/run" in line
    assert "checkpoint" in line


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
