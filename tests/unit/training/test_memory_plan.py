from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ldm.training.memory_count import FORWARD, Growth
from ldm.training.memory_plan import MemoryPlan, _state_bytes, plan_memory, planned_devices
from ldm.training.run import main
from ldm.util import instantiate_from_config
from tests.conftest import ROOT
from tests.unit.training.toy import make_pictures

TINY = ROOT / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"

MIB = 2**20


def build_plan(state: int = 0) -> MemoryPlan:
    growth = Growth(np.array([100.0 * MIB]), np.array([10.0 * MIB]), (FORWARD,))
    return MemoryPlan(6, (640, 384), "bf16-mixed", {"UNet": 60 * MIB}, 40 * MIB, "AdamW", state, 0, growth)


def test_the_optimisers_state_leaves_room_for_fewer_pictures() -> None:
    capacity = 3000 * MIB
    assert build_plan(state=500 * MIB).largest_batch(capacity) == build_plan().largest_batch(capacity) - 50


def test_the_peak_grows_with_the_batch_and_the_state() -> None:
    plan = build_plan()
    assert plan.peak(6) < plan.peak(7) < build_plan(state=500 * MIB).peak(7)


def test_the_line_names_shape_and_moment() -> None:
    assert build_plan().line().endswith("in the forward pass of 6 x 640x384")


def test_a_card_that_holds_no_picture_is_said_to() -> None:
    assert build_plan().lines([("small", 700 * MIB)])[-1].endswith("not even one picture fits")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ("AdamW", 8)),
        ({"target": "torch.optim.SGD", "params": {"momentum": 0.9}}, ("SGD", 4)),
        ({"target": "torch.optim.SGD"}, ("SGD", 0)),
        ({"target": "torchao.optim.AdamW8bit"}, ("AdamW8bit", 2.03)),
    ],
)
def test_the_state_is_the_configured_optimisers(config: dict[str, object] | None, expected: tuple[str, float]) -> None:
    assert _state_bytes(config, torch.float32) == expected


def test_a_size_that_is_given_is_planned_for() -> None:
    assert planned_devices(24) == [("a card of 24 GB", 0.975 * 24 * 2**30)]


def test_averages_in_the_hosts_memory_take_none_of_the_gpus() -> None:
    config: dict[str, Any] = yaml.safe_load(TINY.read_text())
    item = {"image": torch.zeros(32, 32, 3), "caption": "a square"}
    peaks = []
    for device in (None, "cpu"):
        config["model"]["params"] |= {"use_ema": True, "ema_device": device}
        peaks.append(plan_memory(config, [item]).peak(1))
    averages = unet_bytes(config)
    assert peaks[0] - peaks[1] == pytest.approx(averages, rel=0.1)


def unet_bytes(config: dict[str, Any]) -> int:
    """Bytes of the UNet's weights, which averages are kept of."""
    unet = instantiate_from_config(config["model"]["params"]["unet_config"], torch.nn.Module)
    return sum(each.numel() * each.element_size() for each in unet.parameters())


def test_the_plan_is_shown_and_nothing_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = make_pictures(tmp_path / "pictures", size=48)
    words = ["--base", str(TINY), "--data_root", str(pictures), "-l", str(tmp_path / "logs"), "--memory_plan", "8"]
    assert main([*words, "data.params.train.params.size=32"]) == 0
    shown = capsys.readouterr().out
    assert "memory plan: batches of 4 pictures of 32x32" in shown
    assert "a card of 8 GB" in shown
    assert not (tmp_path / "logs").exists()
