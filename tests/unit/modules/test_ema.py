"""Moving averages in the host's memory, and moved once for several optimiser steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import LitEma
from tests.unit.models.small import build_text_model, picture_batch


def train(model: LatentDiffusion, folder: Path, steps: int, resume: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    batches: Any = [picture_batch() for _ in range(6)]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(model, loader, ckpt_path=resume, weights_only=True)
    return trainer


def build(**params: Any) -> LatentDiffusion:
    model = build_text_model(use_ema=True, **params)
    model.learning_rate = 1e-2
    return model


def walk(model: nn.Linear, ema: LitEma, steps: int) -> list[Tensor]:
    """Update the averages while the weights move; gives the averages after each update."""
    generator = torch.Generator().manual_seed(3)
    averages = []
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn(model.weight.shape, generator=generator))
        ema(model)
        averages.append(dict(ema.named_buffers())["weight"].clone())
    return averages


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_a_rarer_move_forgets_as_fast(decay: float) -> None:
    model = nn.Linear(2, 2, bias=False)
    start = model.weight.detach().clone()
    ema = LitEma(model, decay, every=4)
    with torch.no_grad():
        model.weight.zero_()
    for _ in range(8):
        ema(model)
    left = math.prod(min(decay, (1 + n) / (10 + n)) for n in range(1, 9))
    torch.testing.assert_close(dict(ema.named_buffers())["weight"], start * left)


def test_between_moves_the_average_stays() -> None:
    model = nn.Linear(2, 2, bias=False)
    averages = walk(model, LitEma(model, every=3), 6)
    assert torch.equal(averages[0], averages[1])
    assert not torch.equal(averages[1], averages[2])
    assert torch.equal(averages[3], averages[4])


def test_the_average_is_the_same_wherever_it_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False)
    other = nn.Linear(3, 3, bias=False)
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(walk(model, LitEma(model), 5), walk(other, LitEma(other, on_cpu=True), 5), strict=True):
        assert torch.equal(ours, theirs)


class Elsewhere(Tensor):
    """Stands for a tensor on a GPU."""

    def cpu(self, *arguments: Any, **keywords: Any) -> Tensor:
        return self.as_subclass(Tensor)


@pytest.mark.parametrize(("on_cpu", "kind"), [(True, Tensor), (False, Elsewhere)])
def test_an_average_in_host_memory_stays_there_when_its_model_moves(on_cpu: bool, kind: type) -> None:
    ema = LitEma(nn.Linear(2, 2), on_cpu=on_cpu)
    ema._apply(lambda tensor: tensor.as_subclass(Elsewhere))
    assert [type(buffer) for buffer in ema.buffers()] == [kind] * 4


@pytest.mark.parametrize("place", [None, "cpu"])
def test_the_model_has_its_own_weights_back_after_the_averages(place: str | None) -> None:
    model = build(ema_device=place)
    live = [parameter.detach().clone() for parameter in model.model.parameters()]
    for name, buffer in model.model_ema.named_buffers():
        if buffer.is_floating_point() and name != "decay":
            buffer.add_(1.0)
    with model.ema_scope():
        assert not torch.equal(next(model.model.parameters()), live[0])
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), live, strict=True))


def test_the_keys_in_a_checkpoint_are_the_same_wherever_the_average_is_kept() -> None:
    assert list(build(ema_device="cpu", ema_every=5).state_dict()) == list(build().state_dict())


def test_a_run_resumed_between_moves_equals_the_unbroken_one(tmp_path: Path) -> None:
    settings = {"ema_device": "cpu", "ema_every": 3}
    unbroken = build(**settings)
    train(unbroken, tmp_path, 4)
    train(build(**settings), tmp_path, 2).save_checkpoint(tmp_path / "saved.ckpt")
    resumed = build(**settings)
    train(resumed, tmp_path, 4, resume=tmp_path / "saved.ckpt")
    expected = unbroken.state_dict()
    assert int(resumed.model_ema.num_updates) == 4
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())


@pytest.mark.parametrize(("every", "counted"), [(0, True), (2, False)])
def test_an_interval_that_cannot_be_kept_is_an_error(every: int, counted: bool) -> None:
    with pytest.raises(ValueError, match=f"every {every} updates"):
        LitEma(nn.Linear(2, 2), use_num_updates=counted, every=every)


def test_devices_do_not_send_each_other_the_averages() -> None:
    model = build(ema_device="cpu")
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert ignored == {name for name, _ in model.named_buffers() if name.startswith("model_ema.")}
    assert ignored
