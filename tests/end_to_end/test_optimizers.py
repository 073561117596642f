"""Runs of the real program with optimisers that a config names."""

from __future__ import annotations

import pytest
import torch

from ldm.training.run import main
from tests.end_to_end.conftest import FinishedRun, Train
from tests.unit.test_optimizers import assert_same

SCHEDULE_FREE = [
    "model.params.optimizer_config.target=schedulefree.AdamWScheduleFree",
    "model.params.model_lr=0.005",
    "model.base_learning_rate=0.01",
    "model.params.use_ema=true",
    "lightning.trainer.accumulate_grad_batches=2",
    "lightning.trainer.gradient_clip_val=0.5",
    "lightning.trainer.max_epochs=2",
    "lightning.trainer.log_every_n_steps=1",
]
"""Two epochs of two optimiser steps each, with everything that touches an optimiser."""


@pytest.fixture
def whole(train: Train) -> FinishedRun:
    pytest.importorskip("schedulefree")
    return train(*SCHEDULE_FREE, name="whole")


def test_a_schedule_free_run_continues_as_if_unbroken_and_leaves_the_weights_to_evaluate(
    whole: FinishedRun, train: Train
) -> None:
    first = train(*SCHEDULE_FREE, "--max_steps", "3", name="broken")
    broken = first.last
    second = train("--max_steps", "99", resume=first.path)
    assert broken["global_step"] == 3
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole.last[part], second.last[part])
    weights, state = broken["state_dict"], broken["optimizer_states"][0]["state"][0]
    x = state["y"].lerp(state["z"], 1 - 1 / 0.9)
    assert torch.equal(weights["model.diffusion_model.time_embed.0.weight"], x)
    assert not torch.equal(state["y"], x)


def test_another_optimiser_is_a_change_that_is_told_in_one_line_and_then_has_no_state(
    whole: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-t", "-r", str(whole.path), "--max_epochs", "3", "model.params.optimizer_config.target=torch.optim.SGD"]
    assert main(words) == 2
    refused = capsys.readouterr().err.splitlines()
    assert main([*words, "--accept_changes"]) == 2
    (other,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    told = [line for line in refused if "optimizer_config" in line]
    assert told[0].endswith("optimizer_config.target schedulefree.AdamWScheduleFree -> torch.optim.SGD")
    assert "holds the state of another optimiser (schedulefree.AdamWScheduleFree; now torch.SGD" in other
    assert "or start a new run from its weights with --actual_resume" in other
