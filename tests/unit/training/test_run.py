from __future__ import annotations

import errno
import gc
import io
import logging
import os
import re
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.data.every_dream import EveryDreamBatch
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.training.run import main
from ldm.training.run_directory import RunDirectory
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


class LosesAPicture(ToyDiffusion):
    def on_train_start(self) -> None:
        Path("mine/folder0/a plain square 0_.png").unlink()


class Captioned(ToyDiffusion):
    long_captions = "cut"

    def __init__(self) -> None:
        super().__init__()
        numbers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        self.cond_stage_model = FrozenCLIPEmbedder(text_config=numbers, max_length=22, long_captions=self.long_captions)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.cond_stage_model(batch["caption"])
        return super().training_step(batch, batch_idx)


class Chunked(Captioned):
    long_captions = "chunk"


class Faulty(EveryDreamBatch):
    def __getitem__(self, index: int) -> dict[str, Any]:
        raise ValueError("a fault inside the data set")


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
    assert main(["-t", "-r", str(folder), "--accept_changes", target("ToyDiffusion")]) == 0
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


def damage_last_checkpoint() -> Path:
    """Cut it short; other names of the file keep the whole content."""
    last = run_folder() / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[: len(content) // 2])
    return last


def test_a_damaged_last_checkpoint_is_told_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    last = damage_last_checkpoint()
    capsys.readouterr()
    assert main(["-t", "-r", str(last)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "last.ckpt" in line


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    last = damage_last_checkpoint()
    capsys.readouterr()
    assert main(["-t", "-r", str(run_folder())]) == 0
    told = capsys.readouterr().out
    assert f"warning: checkpoint '{last}' is damaged" in told
    assert "warning: continuing from" in told


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


def test_a_validation_set_that_is_null_leaves_epoch_checkpoints(command: list[str]) -> None:
    assert main([*command, "data.params.validation=null", "model.params.monitor=val/loss"]) == 0
    assert sorted(path.name for path in (run_folder() / "checkpoints").iterdir()) == [
        "epoch=00-step=00006.ckpt",
        "last.ckpt",
    ]


def test_a_folder_that_another_run_takes_meanwhile_is_left_to_it(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = RunDirectory.claim

    def be_late(directory: RunDirectory) -> RunDirectory:
        directory.create()
        return claim(directory)

    monkeypatch.setattr(RunDirectory, "claim", be_late)
    assert main(command) == 0
    first, second = sorted(Path("logs").iterdir())
    assert second.name == f"{first.name}-2"
    assert not list((first / "checkpoints").iterdir())
    parts = {"checkpoints", "configs", "exposure.jsonl", "images", "run.json", "tensorboard"}
    assert {path.name for path in second.iterdir()} == parts
    assert (second / "checkpoints" / "last.ckpt").is_file()
    text = capsys.readouterr().out
    assert f"run folder: {second}\n" in text
    assert f"checkpoint: {second / 'checkpoints' / 'last.ckpt'}\n" in text


def test_a_name_that_is_too_long_is_told(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "-n", "n" * 250]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "-n/--name" in line


def test_a_run_without_a_console_works(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(command) == 0
    assert main(["--nonsense"]) == 2


def test_a_run_with_closed_streams_works(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", closed)
    assert main(command) == 0
    assert main([*command, target("BreaksLate")]) == 1


def test_the_end_names_only_what_is_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--logger", "false", "--max_steps", "1", "-l", "my logs"]) == 0
    text = capsys.readouterr().out
    assert "finished after 1 optimiser step\n" in text
    assert "sample pictures" not in text
    assert "curves" not in text


def test_paths_in_commands_are_quoted(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "-l", "my logs"]) == 0
    assert "curves: tensorboard --logdir 'my logs'\n" in capsys.readouterr().out


def test_a_fault_in_training_says_how_to_continue(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, target("BreaksLate")]) == 1
    assert f"\nto continue: python main.py -t -r {run_folder()}\n" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes_while_training_is_named_in_one_line(
    workers: int, command: list[str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path("mine")
    shutil.copytree(pictures, mine)
    words = [f"data.params.num_workers={workers}", "--data_root", "mine", "--max_epochs", "2"]
    assert main([*command, *words, target("LosesAPicture")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    run = run_folder()
    assert line == (
        "error: mine/folder0/a plain square 0_.png: has vanished since the run began; put it back and type"
        f" python main.py -t -r {run}; to go on without it, type python main.py -t -r {run}"
        " --on_bad_image skip --accept_changes"
    )
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0


def test_without_a_checkpoint_the_remedy_is_the_same_command_with_its_flag(
    command: list[str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, "mine")
    words = ["data.params.num_workers=0", "--data_root", "mine", "--max_epochs", "2", "--enable_checkpointing", "false"]
    assert main([*command, *words, target("LosesAPicture")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "put it back and type the same command again; to go on" in line
    assert line.endswith("type the same command with --on_bad_image skip")


def test_a_fault_in_a_loader_process_is_told_with_its_own_words(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train = "data.params.train.target=tests.unit.training.test_run.Faulty"
    assert main([*command, "data.params.num_workers=1", train]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == "error: training failed at step 0: ValueError: a fault inside the data set"


def test_a_full_disk_is_told_in_one_line_with_the_room_that_is_needed(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(checkpoint: object, stream: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fill_the_disk)
    assert main(command) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.match(
        r"error: the disk is full: the checkpoint .*\.ckpt needs [\d.]+ MB, .* has [\d.]+ [MG]B free; ", line
    )
    assert "error:" not in captured.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("limit_train_batches=0.01", "0.01 of 6 batches is none; give 0.1667 or more, or a number of batches"),
        ("limit_train_batches=0", "0 leaves nothing to train on"),
        ("limit_val_batches=0.3", "0.3 of 3 batches is none"),
        ("overfit_batches=0.1", "0.1 of 6 batches is none"),
        ("val_check_interval=7", "7 is more than the 6 training batches of an epoch"),
    ],
)
def test_a_limit_that_leaves_no_batches_is_told_before_the_run(
    words: str, expected: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    validation = "data.params.validation"
    words_of_validation = [
        f"{validation}.target=ldm.data.ed_validate.EDValidateBatch",
        f"{validation}.params.size=16",
    ]
    assert main([*command, *words_of_validation, f"lightning.trainer.{words}"]) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert f"lightning.trainer.{words.partition('=')[0]}: {expected}" in line
    assert not Path("logs").exists()


def test_captions_that_are_cut_are_told_in_one_line(
    command: list[str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, "mine")
    for number in range(7):
        shutil.copy("mine/folder0/a plain square 0_.png", f"mine/folder0/{number} {'long ' * 80}.png"[:250] + ".png")
    twin = next(Path("mine/folder0").glob("0 long*")).stem
    shutil.copy("mine/folder0/a plain square 0_.png", f"mine/folder0/{twin}_2.png")
    assert main([*command, "--data_root", "mine", "--max_steps", "1", target("Captioned")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "text encoder's" in line]
    told = "warning: 7 captions (of 8 pictures) longer than the text encoder's 20 tokens are cut: '0 long long"
    assert line.startswith(told)
    assert "…' loses 'long long" in line
    assert line.endswith("and 2 more (model.params.cond_stage_config.params.long_captions=chunk trains longer ones)")


def test_captions_that_are_trained_in_chunks_are_not_told(
    command: list[str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, "mine")
    shutil.copy("mine/folder0/a plain square 0_.png", f"mine/folder0/{'long ' * 30}.png")
    assert main([*command, "--data_root", "mine", "--max_steps", "1", target("Chunked")]) == 0
    assert "loses" not in capsys.readouterr().out


def test_the_weights_as_read_are_gone_when_training_begins(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights(dict[str, torch.Tensor]):
        """A dictionary that can be watched."""

    watched: list[weakref.ref[Weights]] = []
    alive: list[bool] = []

    def read(path: str) -> Weights:
        weights = Weights(ToyDiffusion().state_dict())
        watched.append(weakref.ref(weights))
        return weights

    def look(model: ToyDiffusion) -> None:
        gc.collect()
        alive.append(watched[0]() is not None)

    monkeypatch.setattr("ldm.training.run.read_weights", read)
    monkeypatch.setattr(ToyDiffusion, "on_train_start", look)
    Path("some.ckpt").touch()
    assert main([*command, "--actual_resume", "some.ckpt"]) == 0
    assert alive == [False]


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
