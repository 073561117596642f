"""``--warm_optimizer``: a new run that starts with the optimiser state of a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ldm.training.run import main
from ldm.training.run_record import read_record
from ldm.training.warm_optimizer import describe_state, take_state
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run


class TwoRates(ToyDiffusion):
    """Has two groups of parameters."""

    def configure_optimizers(self) -> Any:
        first: dict[str, Any] = {"params": self.model[0].parameters(), "lr": 0.5}
        return torch.optim.AdamW([first, {"params": self.model[3].parameters()}], lr=self.learning_rate)


class Wider(ToyDiffusion):
    """Has other shapes, and as many parameters; takes any weights."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Sequential(torch.nn.Linear(3, 9), torch.nn.SiLU(), torch.nn.Linear(9, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.other.parameters(), lr=self.learning_rate)


class Plain(ToyDiffusion):
    """Is trained with another optimiser."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=self.learning_rate, momentum=0.9)


@pytest.fixture
def command(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    return ["-b", "toy.yaml", "-t", "--data_root", str(pictures)]


@pytest.fixture(scope="module")
def first(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> ToyRun:
    """A run of two epochs."""
    return toy_run(tmp_path_factory.mktemp("first"), pictures)


def cold(folder: Path, pictures: Path, model: ToyDiffusion | None = None) -> ToyRun:
    """A run that has not begun, with its trainer and learning rate."""
    return prepare_toy_run(folder, pictures, model=model)[0]


def test_a_warm_run_is_what_torch_makes_of_the_same_moments_at_the_new_rates(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[ToyDiffusion] = []
    seen: list[dict[str, Any]] = []

    class Watched(ToyDiffusion):
        def on_fit_end(self) -> None:
            trained.append(self)

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            seen.append(copy.deepcopy(batch))
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr("tests.unit.training.test_run.ToyDiffusion", Watched)
    assert main([*command, "-n", "first"]) == 0
    checkpoint = next(Path("logs").glob("*first/checkpoints/last.ckpt"))
    seen.clear()
    warm = ["--actual_resume", str(checkpoint), "--warm_optimizer", "-s", "7", "model.base_learning_rate=0.03"]
    assert main([*command, *warm, "-n", "warm"]) == 0

    saved = torch.load(checkpoint, weights_only=True)
    by_hand = ToyDiffusion()
    by_hand.load_state_dict(saved["state_dict"])
    by_hand.learning_rate = 0.03
    (optimizer,), (schedule,) = by_hand.configure_optimizers()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["optimizer_states"][0]["state"], "param_groups": groups})
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert len(seen) == 6
    for batch in seen:
        optimizer.zero_grad()
        by_hand.loss(batch).backward()
        optimizer.step()
        schedule["scheduler"].step()

    for name, value in by_hand.state_dict().items():
        assert torch.equal(trained[-1].state_dict()[name], value), name
    ended = torch.load(next(Path("logs").glob("*warm/checkpoints/last.ckpt")), weights_only=True)
    assert (ended["global_step"], ended["epoch"]) == (6, 0)
    assert ended["optimizer_states"][0]["state"][0]["step"] == 12
    assert ended["lr_schedulers"][0]["last_epoch"] == 6
    line = f"optimiser state: 4 parameters' from {checkpoint}, after 6 optimiser steps (--warm_optimizer)"
    assert line in capsys.readouterr().out


def test_a_warm_run_that_is_continued_keeps_its_own_moments(command: list[str]) -> None:
    assert main([*command, "-n", "first"]) == 0
    checkpoint = next(Path("logs").glob("*first/checkpoints/last.ckpt"))
    warm = [*command, "--actual_resume", str(checkpoint), "--warm_optimizer", "--max_epochs", "2"]
    assert main([*warm, "-n", "whole"]) == 0
    assert main([*warm, "-n", "broken", "--max_steps", "3"]) == 0
    (broken,) = Path("logs").glob("*broken")
    checkpoint.unlink()
    assert main(["-t", "-r", str(broken), "--max_steps", "99"]) == 0
    (whole,) = Path("logs").glob("*whole")
    ended = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, broken)]
    for number, state in ended[0]["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(ended[1]["optimizer_states"][0]["state"][number][name], value)
    record = read_record(broken)
    assert record is not None
    assert record["sessions"][0]["config"]["run"]["warm_optimizer"] is True


def test_what_the_optimiser_takes_is_no_part_of_the_file(first: ToyRun, pictures: Path, tmp_path: Path) -> None:
    model = cold(tmp_path, pictures).model
    (optimizer,), _ = model.configure_optimizers()
    take_state([optimizer], model, first.last)
    before = first.last.read_bytes()
    for state in optimizer.state.values():
        state["exp_avg"].add_(1.0)
    assert first.last.read_bytes() == before
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(first.last) not in mapped.read_text()


def test_parameters_without_a_saved_state_start_cold(first: ToyRun, pictures: Path, tmp_path: Path) -> None:
    saved = torch.load(first.last, weights_only=True)
    del saved["optimizer_states"][0]["state"][1]
    torch.save(saved, tmp_path / "some.ckpt")
    model = cold(tmp_path / "run", pictures).model
    (optimizer,), _ = model.configure_optimizers()
    take_state([optimizer], model, tmp_path / "some.ckpt")
    assert ["exp_avg" in optimizer.state[parameter] for parameter in model.model.parameters()] == [True, False] + [
        True
    ] * 2


@pytest.mark.parametrize("kind", ["pruned", "empty", "safetensors", "not a state", "folder"])
def test_a_file_without_optimiser_state_is_refused_in_one_line(
    kind: str, first: ToyRun, pictures: Path, tmp_path: Path
) -> None:
    saved = torch.load(first.last, weights_only=True)
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.ckpt")
    if kind == "safetensors":
        safetensors.torch.save_file(saved["state_dict"], path)
    elif kind == "folder":
        path.mkdir()
    else:
        states: Any = {"empty": [{"state": {}, "param_groups": []}], "not a state": [{"state": 3, "param_groups": 5}]}
        content = {
            "state_dict": saved["state_dict"],
            **({} if kind == "pruned" else {"optimizer_states": states[kind]}),
        }
        torch.save(content, path)
    run = cold(tmp_path / "run", pictures)
    with pytest.raises(ValueError, match="holds no optimiser state") as refused:
        describe_state(run.trainer, run.model, path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (TwoRates(), "is of 4 parameters, and what is trained now is 2 + 2 parameters (model 4)"),
        (Wider(), "parameter 0, other.0.weight, has the shape (9, 3), and its exp_avg there (8, 3)"),
    ],
)
def test_a_state_that_does_not_fit_says_which_part_number_and_shape(
    model: ToyDiffusion, words: str, first: ToyRun, pictures: Path, tmp_path: Path
) -> None:
    run = cold(tmp_path, pictures, model)
    with pytest.raises(ValueError, match="--warm_optimizer") as refused:
        describe_state(run.trainer, run.model, first.last)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_optimisers_state_is_refused(pictures: Path, tmp_path: Path) -> None:
    plain = toy_run(tmp_path / "plain", pictures, model=Plain(), max_steps=2)
    run = cold(tmp_path, pictures)
    with pytest.raises(ValueError, match="has momentum_buffer there and needs step, exp_avg, exp_avg_sq"):
        describe_state(run.trainer, run.model, plain.last)


def test_a_refused_warm_run_leaves_no_folder(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": ToyDiffusion().state_dict()}, "weights.ckpt")
    assert main([*command, "--actual_resume", "weights.ckpt", "--warm_optimizer"]) == 2
    assert main([*command, "run.warm_optimizer=true"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in errors] == ["error", "error"]
    assert "weights.ckpt holds no optimiser state" in errors[0]
    assert "name the checkpoint with --actual_resume" in errors[1]
    assert not Path("logs").exists()
