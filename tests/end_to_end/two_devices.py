"""One of two processes that train together on the CPU: does one command line after the other, as torchrun would.

Started by :func:`train_together` as ``python -m tests.end_to_end.two_devices RANK PORT COMMANDS STATUSES``.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from tests.conftest import ROOT

MOST_SECONDS = 300


def own_port() -> str:
    """Draw a port for the processes of a run to meet at, among those that the system gives to nobody by itself.

    One that it calls free may be taken by the time they get there.
    """
    return str(20_000 + random.SystemRandom().randrange(10_000))


class FailsAlone(pl.Callback):
    """Fails in the second process alone, at the second step."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 1:
            raise OSError("the picture is gone")


def train_together(folder: Path, commands: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[str]]:
    """Do command lines in two processes that share them; gives each process's exit statuses, and what it said."""
    (folder / "commands.json").write_text(json.dumps([list(words) for words in commands]))
    port = own_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.two_devices", str(rank), port, "commands.json", f"{rank}.json"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=MOST_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else [] for file in files], said


def take_part(rank: str, port: str, commands: str, statuses: str) -> None:
    """Do all command lines as one of the two processes, and write down their exit statuses."""
    os.environ.update(
        LOCAL_RANK=rank,
        NODE_RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    from ldm.training.run import main  # it reads the environment

    ended = []
    for words in json.loads(Path(commands).read_text()):
        ended.append(main(words))
        Path(statuses).write_text(json.dumps(ended))


if __name__ == "__main__":
    take_part(*sys.argv[1:])
