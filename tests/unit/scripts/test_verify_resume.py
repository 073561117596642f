from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_resume
from verify_resume import Result, Trial, compare, compare_runs, format_results

from ldm.training.run import main
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import make_pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_pictures(folder / "mine", per_folder=2, folders=2, size=16)
    (folder / "toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    return folder


def train(place: Path, name: str, *words: str) -> Path:
    logdir = place / name
    params = "data.params.validation.params.size=16"
    validation = ["data.params.validation.target=ldm.data.ed_validate.EDValidateBatch", params]
    base = ["-b", str(place / "toy.yaml"), "-t", "--data_root", str(place / "mine"), "-l", str(logdir), *validation]
    assert main([*base, *words]) == 0
    return next(logdir.iterdir())


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return train(place, "whole", "--max_epochs", "2")


def verdicts(one: Path, two: Path) -> dict[str, bool]:
    return {result.what: result.is_same for result in compare_runs(one, two)}


def test_a_run_that_was_continued_equals_the_unbroken_one(place: Path, whole: Path) -> None:
    broken = train(place, "broken", "--max_epochs", "1")
    assert main(["-t", "-r", str(broken), "--max_epochs", "2"]) == 0
    parts = ("weights", "optimiser state", "learning rates", "epoch and step", "exposures", "validation values")
    assert verdicts(whole, broken) == dict.fromkeys((*parts, "checkpoint names"), True)


def test_another_run_is_told_apart_by_weights_and_exposures(place: Path, whole: Path) -> None:
    other = train(place, "other", "--max_epochs", "2", "--seed", "7")
    found = verdicts(whole, other)
    assert {name for name, is_same in found.items() if not is_same} == {"weights", "optimiser state", "exposures"} | (
        {"validation values"} if not found["validation values"] else set()
    )


def test_one_exposure_one_checkpoint_or_one_curve_that_is_missing_is_seen(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    lines = (copy / "exposure.jsonl").read_text().splitlines(keepends=True)
    (copy / "exposure.jsonl").write_text("".join(lines[:-1]))
    next((copy / "checkpoints").glob("epoch=00*")).unlink()
    for path in (copy / "tensorboard").iterdir():
        path.unlink()
    wrong = {name for name, is_same in verdicts(whole, copy).items() if not is_same}
    assert wrong == {"exposures", "checkpoint names", "validation values"}


@pytest.mark.parametrize(
    ("one", "two", "difference"),
    [
        ({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 0.25])}, 0.25),
        ({"a": torch.tensor([math.nan])}, {"a": torch.tensor([math.nan])}, 0.0),
        ({"a": torch.tensor([math.nan])}, {"a": torch.tensor([1.0])}, math.inf),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, math.inf),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2).half()}, math.inf),
        ({"a": 1}, {"b": 1}, math.inf),
        ([1, 2], [1], math.inf),
        ([1.5], [1.0], 0.5),
        (["x"], ["y"], math.inf),
        ([True], [False], math.inf),
    ],
)
def test_the_largest_difference_is_found(one: Any, two: Any, difference: float) -> None:
    result = compare("numbers", one, two)
    assert result.difference == difference
    assert result.is_same == (difference == 0)


def test_a_difference_is_written_with_its_place() -> None:
    text = format_results([compare("numbers", {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.5}), Result("names", 3)])
    assert text.splitlines() == ["  numbers (2)  DIFFERENT 0.5 (most at b: 2.0 and 2.5)", "  names (3)    0"]


def test_a_command_that_fails_is_told_with_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.py").write_text("import sys\nprint('error: no such thing')\nsys.exit(2)\n")
    monkeypatch.setattr(verify_resume, "ROOT", tmp_path)
    with pytest.raises(OSError, match="exit status 2; it wrote last:\nerror: no such thing"):
        Trial(tmp_path, "failing").train([])


@pytest.mark.slow
def test_a_run_that_is_killed_and_continued_is_proved_to_be_the_same(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "slow.yaml").write_text(
        YAML.replace("tests.unit.training.test_run.{model}", "tests.unit.scripts.slow_toy.SlowToy").format()
    )
    words = ["--data_root", str(place / "mine"), "--max_epochs", "9"]
    options = ["--steps", "8", "--save_every", "3", "--breaks", "1", "--seed", "3", "--keep", str(place / "kept")]
    assert verify_resume.main(["--base", str(place / "slow.yaml"), *options, *words]) == 0
    text = capsys.readouterr().out
    assert "broken run: killed at step " in text
    assert text.endswith("The continued run equals the unbroken one: the largest difference is 0.\n")
