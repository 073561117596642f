"""Loader processes that die, or do not get what they need."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

from ldm.data.every_dream import EveryDreamBatch
from ldm.training.loader_failures import explain_loader_failure
from ldm.training.run import main
from tests.unit.training.toy import ToyDiffusion

YAML = """
model:
  base_learning_rate: 0.01
  target: tests.unit.training.toy.ToyDiffusion
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 2
    train: {target: ldm.data.every_dream.EveryDreamBatch, params: {size: 16, repeats: 10}}
lightning:
  callbacks: {image_logger: {params: {disabled: true}}}
  trainer: {max_epochs: 1}
"""

CONFIG = {"data": {"params": {"batch_size": 2, "num_workers": 8}}}
FEWER = "data.params.num_workers=4"


class KillsALoader(ToyDiffusion):
    """Kills a loader process in the middle of a step, and goes on for a while before the step's end."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            worker = multiprocessing.active_children()[0]
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return super().training_step(batch, batch_idx)


class Dies(EveryDreamBatch):
    """A set whose loader processes end at a showing in the middle of the epoch."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if get_worker_info() is not None and index == 30:
            self.die()
        return super().__getitem__(index)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(Dies):
    def die(self) -> None:
        os._exit(3)


class LacksMemory(Dies):
    def die(self) -> None:
        raise MemoryError


class LacksSharedMemory(Dies):
    def die(self) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.fixture
def command(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(YAML)
    return ["-b", "toy.yaml", "-t", "-n", "toy", "--data_root", str(pictures)]


def run_folder() -> Path:
    return next(Path("logs").iterdir())


def steps_saved() -> int:
    steps: int = torch.load(run_folder() / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    return steps


def test_a_loader_process_that_is_killed_ends_the_run_in_one_line_after_the_step(
    command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "model.target=tests.unit.training.test_loader_failures.KillsALoader"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: loader process ")
    assert "was killed (SIGKILL); most likely the host memory ran out (dmesg tells)" in line
    resume = f"; then type python main.py -t -r {run_folder()} data.params.num_workers=1"
    assert line.endswith(f"lower data.params.num_workers (2 now){resume}")
    assert steps_saved() == 4, "the step in whose middle it died is whole"
    again = ["-t", "-r", str(run_folder()), "data.params.num_workers=1", "--accept_changes"]
    assert main([*again, "model.target=tests.unit.training.toy.ToyDiffusion"]) == 0


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("Dies", "was killed (SIGKILL); most likely the host memory ran out"),
        ("Exits", "ended with exit code 3; if nobody ended it"),
        ("LacksMemory", "found no host memory for a picture: close other programs"),
        ("LacksSharedMemory", "got no shared memory (/dev/shm is full): give it more (Docker: --shm-size=8g)"),
    ],
)
def test_what_becomes_of_a_loader_process_while_it_is_awaited_is_told_in_one_line(
    dataset: str, says: str, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    train = f"data.params.train.target=tests.unit.training.test_loader_failures.{dataset}"
    assert main([*command, train, "data.params.num_workers=1"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert says in line
    assert "data.params.num_workers=0" in line
    assert steps_saved() > 0


@pytest.mark.parametrize(
    ("error", "says", "words"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's"),
            "loader process 7 died of SIGBUS; most likely the shared memory (/dev/shm) is full: give it more",
            FEWER,
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "),
            "loader process 7 died of SIGSEGV: a fault in a library that reads pictures",
            "data.params.num_workers=0",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            "loader process 7, 8 ended unexpectedly; if nobody ended it, the host memory may have run out",
            FEWER,
        ),
        (
            RuntimeError("Too many open files. Communication with the workers is no longer possible."),
            "the loader processes hit the limit of open files: type ulimit -n 65536 first",
            FEWER,
        ),
    ],
)
def test_a_death_is_told_with_its_likely_reason_and_what_to_type(error: Exception, says: str, words: str) -> None:
    explained = explain_loader_failure(error, CONFIG)
    assert explained is not None
    assert explained[0].startswith(says)
    assert explained[1] == words


class NoRoom:
    """Stands where a context's process class does, and finds no memory for another one."""

    def start(self) -> None:
        code = compile("def fork(): raise OSError(number, text)", "lib/multiprocessing/popen_fork.py", "exec")
        names: dict[str, Any] = {"number": errno.ENOMEM, "text": os.strerror(errno.ENOMEM)}
        exec(code, names)
        names["fork"]()


def test_the_first_notice_of_a_death_is_the_one_to_tell() -> None:
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    explained = explain_loader_failure(error, CONFIG)
    assert explained is not None
    assert explained[0].startswith("loader process 7 was killed (SIGKILL)")


def test_processes_that_cannot_be_started_are_told() -> None:
    with pytest.raises(OSError, match="Cannot allocate memory") as raised:
        NoRoom().start()
    explained = explain_loader_failure(raised.value, CONFIG)
    assert explained is not None
    assert explained[0].startswith(
        "a loader process could not be started (Cannot allocate memory): close other programs"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the toy broke"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        MemoryError("on the card"),
        ValueError("DataLoader worker (pid 7) is a phrase"),
    ],
)
def test_other_failures_are_left_to_others(error: Exception) -> None:
    assert explain_loader_failure(error, CONFIG) is None
