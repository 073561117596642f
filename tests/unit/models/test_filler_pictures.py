"""First stages and pictures that do not count alike: fillers, and folders with a weight of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ldm.models.autoencoder import AutoencoderKL, VQModel

PICTURES = 3


def pictures(*weights: float) -> dict[str, Any]:
    image = torch.rand(PICTURES, 8, 8, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    keys = torch.tensor([[23, 0, item, 0] for item in range(PICTURES)])
    batch = {"image": image[: len(weights)], "exposure": keys[: len(weights)]}
    return batch | {"loss_weight": torch.tensor(weights)}


def without_weights(batch: dict[str, Any], count: int) -> dict[str, Any]:
    return {key: value[:count] for key, value in batch.items() if key != "loss_weight"}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"z_channels": 2, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1]}
    ddconfig = {**sizes, "double_z": kind == "kl", "num_res_blocks": 1, "attn_resolutions": []}
    params = {"disc_start": 0, "perceptual_weight": 0.0, "disc_num_layers": 1}
    name = "LPIPSWithDiscriminator" if kind == "kl" else "VQLPIPSWithDiscriminator"
    lossconfig = {"target": f"ldm.modules.losses.{name}", "params": params}
    if kind == "kl":
        return AutoencoderKL(ddconfig, lossconfig, 2)
    return VQModel(ddconfig, lossconfig, n_embed=4, embed_dim=2)


class Recorder(pl.Callback):
    """Keeps each network's gradient of each step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append(named)


def train(model: Any, *batches: dict[str, Any]) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
    """Train at a learning rate of 0; give the gradients and what was logged."""
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[recorder],
    )
    trainer.fit(copy.deepcopy(model), torch.utils.data.DataLoader(list(batches), batch_size=None))
    return recorder.gradients, {name: value.item() for name, value in trainer.callback_metrics.items()}


def length(gradients: dict[str, torch.Tensor]) -> float:
    return sum(gradient.square().sum().item() for gradient in gradients.values()) ** 0.5


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_fillers_count_only_as_rows_of_a_first_stages_batch(kind):
    model = build(kind)
    filled, logged = train(model, pictures(1.0, 1.0, 0.0))
    alone, expected = train(model, without_weights(pictures(1.0, 1.0, 0.0), 2))
    for ours, theirs in zip(filled, alone, strict=True):
        assert length({name: ours[name] * 3 - theirs[name] * 2 for name in theirs}) < 1e-5 * length(theirs)
    assert logged == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_batch_of_fillers_trains_no_first_stage_and_is_not_logged(kind):
    gradients, logged = train(build(kind), pictures(0.0, 0.0))
    assert len(gradients) == 2
    assert not any(gradient.any() for step in gradients for gradient in step.values())
    assert not logged


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_validating_a_first_stage_leaves_fillers_out(kind):
    model = build(kind)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def validated(*batches: dict[str, Any]) -> Any:
        return trainer.validate(model, torch.utils.data.DataLoader(list(batches), batch_size=None), verbose=False)[0]

    filled = validated(pictures(1.0, 1.0, 0.0), pictures(0.0))
    assert filled == pytest.approx(validated(without_weights(pictures(1.0, 1.0, 0.0), 2)), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("optimizer_idx", [0, 1])
def test_each_term_of_a_first_stages_loss_follows_the_weights(kind, optimizer_idx):
    model = build(kind).eval()  # batch statistics would tie the pictures together

    def loss(count: slice, weights: torch.Tensor | None) -> float:
        batch = pictures(1.0, 1.0, 1.0)
        x = model.get_input(batch, "image")[count]
        made = model.reconstruct(x, batch["exposure"][count], "posterior")
        return model.compute_loss(x, made, optimizer_idx, 0, "train", weights)[0].item()

    weights = torch.tensor([2.0, 0.5, 0.25])
    singly = [weights[row].item() * loss(slice(row, row + 1), None) for row in range(3)]
    if kind == "vq" and optimizer_idx == 0:
        # The quantiser gives one number for the batch, which their mean weighs.
        model.loss.codebook_weight = 0.0
        singly = [weights[row].item() * loss(slice(row, row + 1), None) for row in range(3)]
    assert loss(slice(0, 3), weights) == pytest.approx(sum(singly) / 3, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_halving_every_weight_halves_a_first_stages_gradients(kind):
    model = build(kind)
    halves, _ = train(model, pictures(0.5, 0.5))
    wholes, _ = train(model, pictures(1.0, 1.0))
    for ours, theirs in zip(halves, wholes, strict=True):
        # The adversarial weight adds 1e-4 to a norm that is halved.
        assert length({name: ours[name] * 2 - theirs[name] for name in theirs}) < 1e-3 * length(theirs)
