"""A run that starts from a diffusers folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import read_weights
from ldm.training.run import main
from tests.conftest import ROOT
from tests.end_to_end.conftest import TINY, Train


@pytest.fixture
def folder(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import convert

    assert convert.main([str(workplace / "tiny.ckpt"), str(tmp_path / "tiny"), "--config", str(TINY)]) == 0
    return tmp_path / "tiny"


def test_a_run_starts_from_a_diffusers_folder(folder: Path, workplace: Path, train: Train) -> None:
    run = train("--actual_resume", str(folder), "--max_steps", "1", "model.base_learning_rate=1e-12")
    before, after = read_weights(workplace / "tiny.ckpt"), run.last["state_dict"]
    assert set(before) == set(after)
    assert all(torch.allclose(before[key].double(), after[key].double(), atol=1e-9) for key in before)


def test_a_folder_with_a_missing_part_is_one_line(
    folder: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert main([*command, "--actual_resume", str(folder), "-l", str(tmp_path / "logs")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "--actual_resume" in line
    assert "vae/diffusion_pytorch_model.safetensors" in line
    assert not (tmp_path / "logs").exists()


def test_a_folder_that_is_no_models_says_what_it_lacks(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--actual_resume", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_the_scripts_say_what_they_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("convert", "prune_ckpt", "autoprune_all"):
        __import__(name)
        with pytest.raises(SystemExit) as ended:
            sys.modules[name].main(["--help"])
        assert ended.value.code == 0
        assert f"scripts/{name}.py" in capsys.readouterr().out
