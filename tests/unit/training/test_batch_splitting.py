"""Runs whose memory does not suffice for a batch, with and without ``--on_oom split``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy

from ldm.models.diffusion.ddpm import DDPM
from ldm.training.batch_splitting import BatchSplitting
from ldm.training.memory_advice import advise_on_memory
from ldm.training.run import main
from ldm.training.stop_signals import Interrupted
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import StopAt, ToyRun, prepare_toy_run, toy_run

YAML = """
model:
  base_learning_rate: 0.01
  target: tests.unit.training.test_batch_splitting.{model}
data:
  target: ldm.data.data_module.DataModuleFromConfig
  params:
    batch_size: {batch_size}
    num_workers: 0
    train: {{target: ldm.data.every_dream.EveryDreamBatch, params: {{size: 16, repeats: 1}}}}
lightning:
  callbacks: {{image_logger: {{params: {{disabled: true}}}}}}
  trainer: {{max_epochs: 1}}
"""

LACK = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore lines"


class Greedy(torch.nn.Module):
    """One convolution that needs the more memory, the more pictures it is given with gradients."""

    most = 99

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(x) > self.most:
            raise torch.OutOfMemoryError(LACK)
        return self.convolution(x)


class GreedyForTwo(Greedy):
    most = 2


class GreedyForNone(Greedy):
    most = 0


class Splittable(DDPM):
    """The real model with the toy's interfaces."""

    network = "Greedy"

    def __init__(self) -> None:
        torch.manual_seed(0)
        target = f"tests.unit.training.test_batch_splitting.{self.network}"
        super().__init__({"target": target}, image_size=16, use_ema=False, monitor=None)


class SplittableForTwo(Splittable):
    network = "GreedyForTwo"


class SplittableForNone(Splittable):
    network = "GreedyForNone"


class NotSplittable(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        raise torch.OutOfMemoryError(LACK)


class LoaderWithoutMemory(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        raise MemoryError("cannot allocate an array")


class TooLarge(ToyDiffusion):
    def __init__(self) -> None:
        super().__init__()
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def command(folder: Path, pictures: Path, model: str, batch_size: int = 4) -> list[str]:
    config = folder / f"{model}.yaml"
    config.write_text(YAML.format(model=model, batch_size=batch_size))
    return ["-b", str(config), "-t", "-n", "greedy", "-l", str(folder / "logs"), "--data_root", str(pictures)]


def run_folder(folder: Path) -> Path:
    return next((folder / "logs").iterdir())


def weights(path: Path) -> torch.Tensor:
    checkpoint = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
    return torch.cat([value.flatten().float() for value in checkpoint["state_dict"].values()])


def splitting(run: ToyRun) -> BatchSplitting:
    found = [each for each in run.trainer.callbacks if isinstance(each, BatchSplitting)]  # type: ignore[attr-defined]
    assert len(found) == 1
    return found[0]


def test_a_run_goes_on_in_parts_says_so_and_learns_the_same(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert main(command(tmp_path / "whole", pictures, "Splittable")) == 0
    capsys.readouterr()
    assert main([*command(tmp_path / "parts", pictures, "SplittableForTwo"), "--on_oom", "split"]) == 0
    said = capsys.readouterr()
    line = (
        "step 1: out of memory with 4 pictures at once; taking 2 at a time from here on, with the same effective batch"
    )
    assert (said.out + said.err).count(line) == 1
    assert (said.out + said.err).count("out of memory") == 1
    # A sum of parts rounds elsewhere than one over the batch.
    whole, parts = (weights(run_folder(tmp_path / name)) for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_oom", ["stop", "split"])
def test_a_picture_that_does_not_fit_ends_the_run_with_one_line(
    on_oom: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tmp_path, pictures, "SplittableForNone"), "--on_oom", on_oom]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    if on_oom == "stop":
        assert line.startswith("error: out of memory: 4 pictures of size 16 at once are too much for cpu (")
        assert line.index("add --on_oom split") < line.index("lower data.params.batch_size (4 now)")
    else:
        assert line.startswith("error: out of memory in spite of --on_oom split, on cpu (")
        assert "batch_size" not in line
    assert "bf16-mixed" in line
    assert line.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has)")


def test_a_batch_of_one_is_not_advised_to_be_split(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, pictures, "SplittableForNone", batch_size=1)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: 1 picture of size 16 is too much for cpu")
    assert "split" not in line


def test_splitting_is_not_proposed_for_a_model_that_cannot(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, pictures, "NotSplittable")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--on_oom" not in line
    assert "lower data.params.batch_size (4 now)" in line


def test_a_model_that_cannot_be_split_is_refused_before_a_folder_is_made(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tmp_path, pictures, "NotSplittable"), "--on_oom", "split"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --on_oom split: NotSplittable cannot take a batch in parts; type --on_oom stop")
    assert not (tmp_path / "logs").exists()


def test_several_devices_are_refused_with_what_to_do_instead(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="single device, and this run has 1 with the strategy DDPStrategy; type"):
        toy_run(tmp_path, pictures, model=Splittable(), on_oom="split", strategy=DDPStrategy())  # type: ignore[arg-type]


def test_the_computers_memory_is_told_apart_from_the_devices(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command(tmp_path, pictures, "LoaderWithoutMemory"), "data.params.num_workers=0"]
    assert main([*words, "lightning.modelcheckpoint.params.background=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: the computer's memory (")
    assert "close other programs, or set lightning.modelcheckpoint.params.background=false (cannot allocate" in line


@pytest.mark.parametrize(("caching", "batch_size"), [("off", False), ("disk", True)])
def test_memory_that_runs_out_before_the_first_step_is_no_matter_of_a_step(
    caching: str, batch_size: bool, pictures: Path, tmp_path: Path
) -> None:
    toy, _ = prepare_toy_run(tmp_path, pictures)
    data = {"batch_size": 4, "train": {"params": {"size": 16, "cache_latents": caching}}}
    config = {"data": {"params": data}, "model": {}, "run": {"on_oom": "stop"}}
    line = advise_on_memory(torch.OutOfMemoryError(LACK), toy.trainer, config, has_begun=False)
    assert line.startswith("out of memory before the first step, on cpu")
    assert ("lower data.params.batch_size (4 now)" in line) == batch_size
    assert "split" not in line


def test_memory_that_runs_out_while_the_model_is_built_gives_one_line(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, pictures, "TooLarge")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory before training: close other programs")


def test_a_continued_run_takes_parts_of_the_known_size_at_once(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments: dict[str, Any] = {"batch_size": 4, "on_oom": "split", "validation": False}
    unbroken = toy_run(tmp_path / "unbroken", pictures, model=SplittableForTwo(), **arguments)  # type: ignore[arg-type]
    broken, data = prepare_toy_run(tmp_path / "broken", pictures, model=SplittableForTwo(), **arguments)  # type: ignore[arg-type]
    broken.trainer.callbacks.append(StopAt(broken.signals, step=2))  # type: ignore[attr-defined]
    with broken.signals, pytest.raises(Interrupted):
        broken.trainer.fit(broken.model, datamodule=data)
    assert broken.trainer.global_step == 2
    caplog.clear()
    with caplog.at_level("INFO"):
        continued = toy_run(tmp_path / "broken", pictures, broken.last, model=SplittableForTwo(), **arguments)  # type: ignore[arg-type]
    assert "out of memory" not in caplog.text
    assert "as memory ran out before: 2 in training" in caplog.text
    assert splitting(continued).at_once == {"training": 2}
    ours, theirs = (torch.nn.utils.parameters_to_vector(run.model.parameters()) for run in (continued, unbroken))
    assert torch.equal(ours, theirs)


def test_a_run_that_shall_stop_instead_forgets_the_parts() -> None:
    callback = BatchSplitting("stop")
    callback.load_state_dict({"at_once": {"training": 2}})
    assert not callback.at_once
    assert not callback.state_dict()


class BreaksHalfWay(torch.optim.AdamW):
    """Finds no memory when its third step has changed one of the weights."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps < 3:
            return super().step(closure)
        closure()
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise torch.OutOfMemoryError(LACK)


class SteppedHalfWay(ToyDiffusion):
    def configure_optimizers(self) -> Any:
        return BreaksHalfWay(self.model.parameters(), lr=self.learning_rate)


class SteppedWhole(ToyDiffusion):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)


def seeded(kind: type[ToyDiffusion]) -> ToyDiffusion:
    torch.manual_seed(0)
    return kind()


def test_a_step_that_memory_broke_off_half_way_is_neither_tried_again_nor_saved(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving: dict[str, Any] = {"lightning": {"modelcheckpoint": {"params": {"every_n_train_steps": 1}}}}
    unbroken = toy_run(tmp_path / "unbroken", pictures, model=seeded(SteppedWhole), **saving)
    with pytest.raises(torch.OutOfMemoryError):
        toy_run(tmp_path / "broken", pictures, model=seeded(SteppedHalfWay), **saving)
    assert "last.ckpt stays as it was: step 3 was broken off half-way" in caplog.text
    last = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    continued = toy_run(tmp_path / "broken", pictures, last, model=seeded(SteppedWhole), **saving)
    assert torch.equal(continued.weights, unbroken.weights)
