"""Scripts that are given files which were made to do harm: one line, nothing run, nothing steered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import autoprune_all
import captions
import convert
import prune_ckpt
import pytest
import torch
from PIL import Image

from ldm.training import console


class Bomb:
    """Makes a folder when an unsafe reader meets it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("code_was_run",)


@pytest.fixture(autouse=True)
def bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a run with code among its callbacks, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    path = Path("logs/run/checkpoints/last.ckpt")
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {"model.w": torch.ones(2)}, "callbacks": {"x": Bomb()}}, path)
    return path


@pytest.mark.parametrize("script", ["prune_ckpt", "convert", "autoprune_all"])
def test_a_checkpoint_with_code_is_refused_and_not_run(
    script: str, bomb: Path, capsys: pytest.CaptureFixture[str], project_root: Path
) -> None:
    tiny = str(project_root / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml")
    if script == "prune_ckpt":
        status = prune_ckpt.main(["--ckpt", str(bomb)])
    elif script == "convert":
        status = convert.main([str(bomb), "out", "--config", tiny])
    else:
        status = autoprune_all.main(["--logdir", "logs"])
    told = "".join(capsys.readouterr())
    assert status != 0
    assert "last.ckpt' was refused" in told
    assert "mkdir" in told
    assert sorted(os.listdir()) == ["logs"]


def test_a_config_with_a_bomb_of_aliases_is_refused(bomb: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    Path("a.yaml").write_text("\n".join(["a0: &a0 [ha]", *lines]))
    assert convert.main([str(bomb), "out", "--config", "a.yaml"]) == 2
    assert "a.yaml: has" in capsys.readouterr().err


def test_a_caption_does_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data/cats").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("data/cats/a.png")
    Path("data/cats/a.txt").write_text("a cat\x1b[2J")
    monkeypatch.setattr(captions, "is_terminal", lambda: True)
    captions.main(["show", "--data_root", "data"])
    assert r"a cat\x1b[2J" in capsys.readouterr().out
    monkeypatch.setattr(captions, "is_terminal", lambda: False)
    captions.main(["show", "--data_root", "data"])
    assert "a cat\x1b[2J" in capsys.readouterr().out


def test_names_in_error_lines_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert prune_ckpt.main(["--ckpt", "no\x1b]0;such\x07.ckpt"]) == 2
    assert console.STEERING.search(capsys.readouterr().err) is None
