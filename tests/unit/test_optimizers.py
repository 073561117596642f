"""The optimisers that a config may name: what they learn, and that their state survives a checkpoint bit for bit."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.checkpoint import read_checkpoint
from ldm.optimizers import (
    OptimizerStateError,
    build_optimizer,
    evaluate,
    evaluation_copies,
    evaluation_weights,
    set_rate,
    step_context,
)

OPTIMIZERS: Final[Mapping[str, Mapping[str, Any] | None]] = {
    "default": None,
    "AdamW": {"target": "torch.optim.AdamW", "params": {"weight_decay": 0.1, "amsgrad": True}},
    "Adafactor": {"target": "torch.optim.Adafactor", "params": {"lr": 0.05}},
    "NAdam": {"target": "torch.optim.NAdam", "params": {"decoupled_weight_decay": True}},
    "SGD": {"target": "torch.optim.SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "RMSprop": {"target": "torch.optim.RMSprop"},
    "Adamax": {"target": "torch.optim.Adamax"},
    "Adagrad": {"target": "torch.optim.Adagrad"},
    "Adadelta": {"target": "torch.optim.Adadelta", "params": {"lr": 10.0}},
    "ASGD": {"target": "torch.optim.ASGD", "params": {"lr": 1.0}},
    "RAdam": {"target": "torch.optim.RAdam", "params": {"lr": 0.05}},
    "Rprop": {"target": "torch.optim.Rprop"},
    "AdamW8bit": {"target": "torchao.optim.AdamW8bit"},
    "AdamW4bit": {"target": "torchao.optim.AdamW4bit"},
    "AdamWFp8": {"target": "torchao.optim.AdamWFp8"},
    "Lion": {"target": "lion_pytorch.Lion", "params": {"lr": 0.002, "weight_decay": 0.1}},
    "Prodigy": {"target": "prodigyopt.Prodigy", "params": {"lr": 1.0, "d0": 1e-3}},
    "schedule-free AdamW": {"target": "schedulefree.AdamWScheduleFree", "params": {"warmup_steps": 2}},
    "schedule-free SGD": {"target": "schedulefree.SGDScheduleFree", "params": {"lr": 2.0}},
}

STEPS: Final = 6


def usable(name: str) -> Any:
    """A case that is left out where its package is not installed."""
    package = str((OPTIMIZERS[name] or {}).get("target", "torch")).partition(".")[0]
    missing = importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


EVERY: Final = list(map(usable, OPTIMIZERS))


class Training:
    """A small net on ever new numbers, with two groups of parameters, a schedule and clipped gradients."""

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3))
        rate = ((config or {}).get("params") or {}).get("lr", 0.01)
        own = {} if "Prodigy" in str(config) else {"lr": rate / 2}
        groups: list[dict[str, Any]] = [
            {"params": list(self.net[0].parameters()), **own},
            {"params": list(self.net[2].parameters())},
        ]
        self.optimizer = build_optimizer(config, groups, lr=0.01)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))

    def loss(self, seed: int) -> Tensor:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        return (self.net(x) - x[:, :3]).square().mean()

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            with step_context([self.optimizer]):
                self.loss(step).backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    def save(self, path: Path) -> None:
        content = {
            "state_dict": {**self.net.state_dict(), **evaluation_copies(self.net, [self.optimizer])},
            "optimizer_states": [self.optimizer.state_dict()],
            "lr_schedulers": [self.schedule.state_dict()],
        }
        torch.save(content, path)

    def load(self, path: Path) -> None:
        content = read_checkpoint(path)
        self.net.load_state_dict(content["state_dict"])
        self.optimizer.load_state_dict(content["optimizer_states"][0])
        self.schedule.load_state_dict(content["lr_schedulers"][0])

    @property
    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.net.parameters()])


@pytest.mark.parametrize("name", EVERY)
def test_each_optimiser_goes_on_from_a_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    unbroken, first, second = (Training(OPTIMIZERS[name]) for _ in range(3))
    unbroken.steps(0, STEPS)
    first.steps(0, 3)
    first.save(tmp_path / "a.ckpt")
    second.load(tmp_path / "a.ckpt")
    assert torch.equal(first.weights, second.weights)
    second.steps(3, STEPS)
    assert torch.equal(unbroken.weights, second.weights)
    unbroken.save(tmp_path / "unbroken.ckpt")
    second.save(tmp_path / "second.ckpt")
    assert_same(read_checkpoint(tmp_path / "unbroken.ckpt"), read_checkpoint(tmp_path / "second.ckpt"))


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_same(*pair)
    elif isinstance(one, Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("name", EVERY)
def test_each_optimiser_lowers_the_loss(name: str) -> None:
    training = Training(OPTIMIZERS[name])
    before = float(training.loss(1000).detach())
    training.steps(0, 40)
    evaluate([training.optimizer])
    assert float(training.loss(1000).detach()) < 0.9 * before


def test_the_default_is_adamw_with_its_state_as_torch_gives_it() -> None:
    training = Training(None)
    training.steps(0, 1)
    plain = torch.optim.AdamW(training.net.parameters())
    assert type(training.optimizer) is torch.optim.AdamW
    assert training.optimizer.state_dict().keys() == plain.state_dict().keys()
    assert [group["lr"] for group in training.optimizer.param_groups] != [0.01, 0.01]
    assert training.optimizer.defaults["lr"] == 0.01


def test_a_rate_among_the_parameters_goes_before_the_runs() -> None:
    weight = nn.Parameter(torch.zeros(2))
    config = {"target": "torch.optim.AdamW", "params": {"lr": 0.3}}
    assert build_optimizer(config, [{"params": [weight]}], lr=0.01).param_groups[0]["lr"] == 0.3


def test_eight_bit_states_are_stored_as_plain_tensors_and_stay_eight_bit(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    first, second = Training(OPTIMIZERS["AdamW8bit"]), Training(OPTIMIZERS["AdamW8bit"])
    first.steps(0, 1)
    first.save(tmp_path / "a.ckpt")
    stored = read_checkpoint(tmp_path / "a.ckpt")["optimizer_states"][0]["state"][0]["exp_avg"]
    assert {name: value.dtype for name, value in stored.items()} == {
        "codes": torch.uint8,
        "scale": torch.float32,
        "qmap": torch.float32,
    }
    second.load(tmp_path / "a.ckpt")
    moment = second.optimizer.state[second.net[0].weight]["exp_avg"]
    assert type(moment) is type(first.optimizer.state[first.net[0].weight]["exp_avg"])
    assert moment.signed
    assert not second.optimizer.state[second.net[0].weight]["exp_avg_sq"].signed


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"target": "torch.optim.Adam"}, "of another optimiser (torchao.AdamW8bit; now torch.Adam)"),
        (None, "of another optimiser (torchao.AdamW8bit; now torch.AdamW)"),
        ({"target": "torchao.optim.AdamW8bit", "params": {"block_size": 128}}, "of other sizes (parameter 0: codes"),
    ],
)
def test_another_optimisers_state_is_refused_in_one_line(now: Any, words: str) -> None:
    pytest.importorskip("torchao")
    then = Training(OPTIMIZERS["AdamW8bit"])
    then.steps(0, 1)
    with pytest.raises(OptimizerStateError) as refused:
        Training(now).optimizer.load_state_dict(then.optimizer.state_dict())
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_adamw_state_is_refused_by_another_optimiser() -> None:
    then = Training(None)
    then.steps(0, 1)
    with pytest.raises(OptimizerStateError, match=r"\(torch.AdamW; now torch.SGD\)"):
        Training(OPTIMIZERS["SGD"]).optimizer.load_state_dict(then.optimizer.state_dict())


@pytest.mark.parametrize("name", ["schedule-free AdamW", "schedule-free SGD"])
def test_schedule_free_weights_are_the_librarys_while_evaluated_and_untouched_afterwards(name: str) -> None:
    pytest.importorskip("schedulefree")
    training = Training(OPTIMIZERS[name])
    training.steps(0, 3)
    y = training.weights
    librarys = copy.deepcopy(training)
    librarys.optimizer.eval()  # type: ignore[attr-defined]
    with evaluation_weights([training.optimizer]):
        x = training.weights
    copies = evaluation_copies(training.net, [training.optimizer])
    assert torch.equal(x, librarys.weights)
    assert not torch.equal(x, y)
    assert torch.equal(training.weights, y)
    assert torch.equal(torch.cat([value.flatten() for value in copies.values()]), x)


def test_a_schedule_free_state_saved_at_the_evaluation_weights_is_trained_on() -> None:
    pytest.importorskip("schedulefree")
    first, second = (Training(OPTIMIZERS["schedule-free AdamW"]) for _ in range(2))
    first.steps(0, 3)
    y = first.weights
    evaluate([first.optimizer])
    second.net.load_state_dict(first.net.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.steps(3, 3)
    assert torch.allclose(second.weights, y, atol=1e-6)
    second.steps(3, 4)


def test_nothing_is_copied_for_optimisers_without_other_weights() -> None:
    training = Training(None)
    training.steps(0, 1)
    assert evaluation_copies(training.net, [training.optimizer]) == {}


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)])
def test_a_rate_that_is_a_tensor_stays_one(rate: float | Tensor) -> None:
    held = torch.tensor(0.1)
    group: dict[str, Any] = {"lr": held, "initial_lr": 0.1}
    set_rate(group, "lr", rate)
    set_rate(group, "initial_lr", rate)
    assert group["lr"] is held
    assert float(held) == 0.5
    assert type(group["initial_lr"]) is float


def prodigy(**rates: float) -> Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates.values()]
    return build_optimizer({"target": "prodigyopt.Prodigy"}, groups, lr=1.0)


def test_prodigy_warns_of_another_rate_than_one(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("prodigyopt")
    with caplog.at_level(logging.WARNING):
        prodigy(all=1.0)
        assert not caplog.records
        prodigy(all=1e-6)
    (record,) = caplog.records
    assert "1 by convention and 1e-06 here: set model.params.optimizer_config.params.lr=1.0" in record.getMessage()


def test_prodigy_with_two_rates_is_refused() -> None:
    pytest.importorskip("prodigyopt")
    with pytest.raises(ValueError, match=r"one step size for all parameters, and the groups have .* 0.5, 1: remove"):
        prodigy(network=0.5, rest=1.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target": "torch.optim.LBFGS"}, "takes no groups of parameters"),
        ({"target": "torch.optim.SparseAdam"}, "takes sparse gradients alone"),
        ({"target": "torch.optim.Muon"}, "takes matrices alone"),
        ({"target": "torch.nn.Linear"}, "is not a Optimizer"),
        ({"target": "torch.optim.AdamW", "params": {"betas": [2.0, 0.9]}}, "refuses its parameters: Invalid beta"),
        ({"target": "lion_pytorch.Lion", "params": {"betas": [2.0, 0.9]}}, "refuses its parameters: AssertionError"),
    ],
)
def test_what_cannot_be_the_optimiser_is_refused_in_one_line(config: Any, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        build_optimizer(config, [{"params": [nn.Parameter(torch.zeros(2))]}], lr=0.1)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_fused_step_is_refused_where_gradients_could_not_be_clipped() -> None:
    config = {"target": "torch.optim.AdamW", "params": {"fused": True}}
    with pytest.raises(ValueError, match="remove it, or set --gradient_clip_val 0"):
        build_optimizer(config, [{"params": [nn.Parameter(torch.zeros(2))]}], lr=0.1, may_fuse=False)


def test_rounding_at_random_is_told_to_have_no_effect_on_32_bit_weights(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torchao")
    config = {"target": "torchao.optim.AdamW8bit", "params": {"bf16_stochastic_round": True}}
    with caplog.at_level(logging.WARNING):
        build_optimizer(config, [{"params": [nn.Parameter(torch.zeros(2))]}], lr=0.1)
    assert "has no effect" in caplog.text
