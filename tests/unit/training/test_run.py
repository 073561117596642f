from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.training.run import main
from tests.unit.training.toy import ToyDiffusion

YAML = """
model:
  base_learning_rate: 0.01
  target: tests.unit.training.test_run.{model}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: {{target: ldm.data.every_dream.EveryDreamBatch, params: {{size: 16, repeats: 2}}}}
lightning:
  callbacks: {{image_logger: {{params: {{disabled: true}}}}}}
  trainer: {{max_epochs: 1}}
"""


class BreaksLate(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise ValueError("a fault inside the model")
        return super().training_step(batch, batch_idx)


class NeedsMemory(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


class NeedsHostMemory(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.fixture
def command(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command for a toy run; ``model.target`` may be overridden."""
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    return ["-b", "toy.yaml", "-t", "-n", "toy", "--data_root", str(pictures)]


def target(name: str) -> str:
    return f"model.target=tests.unit.training.test_run.{name}"


def run_folder() -> Path:
    return next(Path("logs").iterdir())


def test_a_run_that_succeeds_returns_0_and_says_where_everything_is(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"checkpoint: {run_folder() / 'checkpoints' / 'last.ckpt'}" in text
    assert "curves: tensorboard --logdir logs" in text


def test_a_fault_in_training_returns_1_with_its_own_traceback_last(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, target("BreaksLate")]) == 1
    errors = capsys.readouterr().err
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("error: training failed at step 3: ValueError: a fault inside the model")


def test_a_fault_in_training_leaves_a_checkpoint_to_continue_from(command: list[str]) -> None:
    assert main([*command, target("BreaksLate")]) == 1
    folder = run_folder()
    assert main(["-t", "-r", str(folder), target("ToyDiffusion")]) == 0
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6


@pytest.mark.parametrize("model", ["NeedsMemory", "NeedsHostMemory"])
def test_lack_of_memory_returns_2_and_says_what_to_lower(
    model: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, target(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory")
    assert "data.params.batch_size (2 now)" in line
    assert "bf16-mixed" in line


def test_debug_shows_where_a_users_mistake_was_noticed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--debug", "data.params.batch_size=1000"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_damaged_last_checkpoint_is_told_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    last = run_folder() / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert main(["-t", "-r", str(run_folder())]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "last.ckpt" in line


def test_a_checkpoint_that_the_model_has_outgrown_is_told_in_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    last = run_folder() / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    del content["state_dict"]["model.0.weight"]
    last.unlink()
    torch.save(content, last)
    capsys.readouterr()
    assert main(["-t", "-r", str(run_folder())]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "last.ckpt" in line
    assert "model.0.weight" in line


def test_fewer_epochs_than_a_run_has_done_are_told_in_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--max_epochs", "3"]) == 0
    capsys.readouterr()
    assert main(["-t", "-r", str(run_folder()), "--max_epochs", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "max_epochs=1" in line


def test_a_failed_continuation_leaves_the_checkpoint_alone(command: list[str]) -> None:
    assert main([*command, "--max_epochs", "3"]) == 0
    last = run_folder() / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    assert main(["-t", "-r", str(run_folder()), "--max_epochs", "1"]) == 2
    assert last.read_bytes() == before


def test_a_refused_run_leaves_no_folder(command: list[str]) -> None:
    assert main([*command, "data.params.batch_size=1000"]) == 2
    assert not Path("logs").exists()


def test_the_printed_config_starts_nothing(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--print_config"]) == 0
    assert "batch_size: 2" in capsys.readouterr().out
    assert not Path("logs").exists()


def test_notices_of_old_words_come_before_the_run(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "data.params.wrap=falsegit"]) == 0
    assert "falsegit" in capsys.readouterr().out.partition("images: ")[0]


def test_nothing_of_a_run_stays_in_the_loggers(command: list[str]) -> None:
    before = list(logging.getLogger("ldm").handlers)
    main(command)
    assert logging.getLogger("ldm").handlers == before


def test_two_sessions_of_a_run_keep_their_configs(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(command) == 0
    (first,) = (run_folder() / "configs").iterdir()
    first.rename(first.with_name("2022-10-25T20-37-40-project.yaml"))
    assert main(["-t", "-r", str(run_folder()), "--max_epochs", "2"]) == 0
    assert len(list((run_folder() / "configs").iterdir())) == 2
