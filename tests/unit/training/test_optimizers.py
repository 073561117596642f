"""Runs that are stopped and continued with each optimiser, in the real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.optimizers import build_optimizer, evaluation_copies, step_context
from ldm.training.learning_rate import optimizers_own_rate
from ldm.training.run_changes import Changes, _compare_configs
from ldm.training.warm_optimizer import describe_state, take_state
from tests.unit.test_optimizers import OPTIMIZERS, assert_same, usable
from tests.unit.training.test_resume import assert_same_run, stopped_run
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import prepare_toy_run, toy_run


class Chosen(ToyDiffusion):
    """Is trained with an optimiser of choice, in two groups, and does with it what the real model does."""

    warm: torch.optim.Optimizer

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.name = name
        self.model = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3))

    def configure_optimizers(self) -> Any:
        own = {} if self.name == "Prodigy" else {"lr": 0.02}
        groups: list[dict[str, Any]] = [
            {"params": list(self.model[0].parameters()), **own},
            {"params": list(self.model[2:].parameters())},
        ]
        optimizer = build_optimizer(OPTIMIZERS[self.name], groups, self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with step_context(self.trainer.optimizers):
            super().optimizer_step(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **evaluation_copies(self, self.trainer.optimizers)}


@pytest.mark.parametrize(
    "name",
    [
        usable(name)
        for name in ("default", "Adafactor", "AdamW8bit", "AdamWFp8", "Lion", "Prodigy", "schedule-free AdamW")
    ],
)
def test_a_run_stopped_between_saves_continues_as_if_unbroken_with_every_optimiser(
    name: str, pictures: Path, tmp_path: Path
) -> None:
    case = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "validation": False}
    step = 1 + list(OPTIMIZERS).index(name) % 5
    whole = toy_run(tmp_path / "whole", pictures, model=Chosen(name), **case)
    first = stopped_run(tmp_path / "broken", pictures, {**case, "model": Chosen(name)}, step=step)
    second = toy_run(tmp_path / "broken", pictures, checkpoint=first.last, model=Chosen(name), **case)
    assert first.trainer.global_step == step
    assert_same_run(first, second, whole)
    one, two = (torch.load(run.last, weights_only=True) for run in (whole, second))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(one[part], two[part])


def warm(name: str, checkpoint: Path, folder: Path, pictures: Path) -> tuple[Chosen, str]:
    """A run that has not begun, with a checkpoint's optimiser state; and what is said of that."""
    run, _ = prepare_toy_run(folder, pictures, model=Chosen(name))
    said = describe_state(run.trainer, run.model, checkpoint)
    (optimizer,), _ = run.model.configure_optimizers()
    take_state([optimizer], run.model, checkpoint)
    run.model.warm = optimizer
    return run.model, said


@pytest.mark.parametrize("name", [usable("Adafactor"), usable("AdamW8bit"), usable("Lion")])
def test_a_new_run_takes_the_state_of_each_parameter(name: str, pictures: Path, tmp_path: Path) -> None:
    old = toy_run(tmp_path / "old", pictures, model=Chosen(name), max_steps=2, validation=False)
    model, said = warm(name, old.last, tmp_path / "new", pictures)
    assert "6 parameters'" in said
    saved = torch.load(old.last, weights_only=True)["optimizer_states"][0]["state"]
    assert_same(model.warm.state_dict()["state"], saved)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Lion", "AdamW8bit", "another optimiser's (lion_pytorch.Lion; now torchao.AdamW8bit)"),
        ("default", "Adafactor", "another optimiser's (torch.AdamW; now torch.Adafactor)"),
        ("Prodigy", "Prodigy", "prodigyopt.Prodigy learns of all parameters together"),
        ("schedule-free AdamW", "schedule-free AdamW", "learns of all parameters together"),
    ],
)
def test_a_new_run_refuses_what_it_cannot_take(old: str, new: str, words: str, pictures: Path, tmp_path: Path) -> None:
    for name in (old, new):
        pytest.importorskip(str((OPTIMIZERS[name] or {}).get("target", "torch")).partition(".")[0])
    run = toy_run(tmp_path / "old", pictures, model=Chosen(old), max_steps=1, validation=False)
    with pytest.raises(ValueError, match="--warm_optimizer") as refused:
        warm(new, run.last, tmp_path / "new", pictures)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_lower_rate_is_taken_by_an_optimiser_whose_rate_is_a_tensor(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    case: dict[str, Any] = {"validation": False}
    toy_run(tmp_path, pictures, model=Chosen("AdamW8bit"), max_steps=2, **case)
    second, data = prepare_toy_run(tmp_path, pictures, model=Chosen("AdamW8bit"), max_steps=4, **case)
    second.model.learning_rate = 0.001
    second.trainer.fit(second.model, datamodule=data, ckpt_path=second.last)
    rates = [float(group["lr"]) for group in second.trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.02 / 5, 0.001 / 5])


def test_a_step_that_is_left_out_changes_neither_weights_nor_moments(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")

    class Breaks(Chosen):
        kept: list[torch.Tensor] = []

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            self.kept = [*self.kept, torch.cat([each.detach().flatten() for each in self.model.parameters()])]
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 1 else loss

    run = toy_run(tmp_path, pictures, model=Breaks("schedule-free AdamW"), on_nan="skip", max_steps=3, validation=False)
    assert torch.equal(run.model.kept[1], run.model.kept[2])
    assert not torch.equal(run.model.kept[0], run.model.kept[1])


def test_adamw_by_name_is_no_change_and_another_optimiser_is_one_line() -> None:
    def changed(**then_and_now: Any) -> list[str]:
        configs = [
            {"model": {"params": {} if section is None else {"optimizer_config": section}}}
            for section in then_and_now.values()
        ]
        changes = Changes()
        _compare_configs(configs[0], configs[1], 1, 1, changes)
        return changes.lines

    adamw = {"target": "torch.optim.AdamW"}
    prodigy = {"target": "prodigyopt.Prodigy", "params": {"lr": 1.0, "d_coef": 2.0}}
    assert changed(then=None, now=adamw) == []
    assert changed(then=None, now=prodigy) == [
        "model.params.optimizer_config.target torch.optim.AdamW -> prodigyopt.Prodigy"
    ]
    assert changed(then=prodigy, now={**prodigy, "params": {"lr": 1.0}}) == [
        "model.params.optimizer_config.params.d_coef 2 -> 1"
    ]


def test_a_rate_of_the_optimisers_own_is_shown_as_such() -> None:
    rate = optimizers_own_rate({"optimizer_config": {"target": "prodigyopt.Prodigy", "params": {"lr": 1.0}}})
    assert rate is not None
    assert (rate.value, rate.arithmetic) == (1.0, "1 (optimizer_config.params.lr)")
    assert optimizers_own_rate({"optimizer_config": {"target": "torch.optim.AdamW"}}) is None
    assert optimizers_own_rate({}) is None
