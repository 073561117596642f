"""Runs of the real program at its smallest: the tiny config, four pictures, a few steps on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.training.run import main
from tests.conftest import ROOT
from tests.end_to_end.two_devices import own_port
from tests.unit.training.toy import make_pictures

TINY = ROOT / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"

SMALL = [
    "data.params.batch_size=2",
    "data.params.num_workers=0",
    "data.params.train.params.size=32",
    "data.params.train.params.repeats=2",
    "data.params.validation.params.size=32",
    "lightning.callbacks.image_logger.params.disabled=true",
    "lightning.trainer.log_every_n_steps=1",
]
"""Four pictures, two repeats, batches of two: four steps an epoch, a tenth of a second each."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended."""

    path: Path
    output: str = ""

    @property
    def last(self) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.path / "checkpoints" / "last.ckpt", weights_only=True)
        return content


Train = Callable[..., FinishedRun]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("workplace")
    make_pictures(folder / "MyProject", per_folder=2, folders=2, size=48)
    spec = importlib.util.spec_from_file_location("make_tiny_checkpoint", ROOT / "scripts" / "make_tiny_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make_tiny_checkpoint(TINY, folder / "tiny.ckpt", seed=0)
    return folder


@pytest.fixture(scope="session")
def command(workplace: Path) -> list[str]:
    """The everyday command, but for the name and what a test adds."""
    return [
        *("--base", str(TINY), "-t", "--no-test"),
        *("--actual_resume", str(workplace / "tiny.ckpt")),
        *("--data_root", str(workplace / "MyProject")),
        *SMALL,
    ]


@pytest.fixture
def train(command: list[str], tmp_path: Path) -> Train:
    """Train in this process; gives the run, or a run's continuation where ``resume`` names it."""

    def train(*words: str, name: str = "run", resume: Path | None = None) -> FinishedRun:
        logdir = tmp_path / name
        if resume is not None:
            status = main(["-t", "-r", str(resume), *words])
            assert status == 0
            return FinishedRun(resume)
        assert main([*command, "-n", name, "-l", str(logdir), *words]) == 0
        return FinishedRun(next(logdir.iterdir()))

    return train


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """Start main.py as a user does."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *words],
        cwd=cwd,
        env={**os.environ, "MASTER_PORT": own_port()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
