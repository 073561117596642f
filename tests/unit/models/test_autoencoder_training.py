"""Training a first stage through Lightning, against a plain loop that says what is meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ldm import exposure
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.training.accumulation import EqualWeights
from ldm.training.own_optimisation import leave_to_model

BATCH = 2
PICTURES = 6
RATE = 1e-3


class Pictures(Dataset[dict[str, Any]]):
    """Noise, with the exposure keys of a training set."""

    def __len__(self) -> int:
        return PICTURES

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(index)) * 2 - 1
        return {"image": image, "exposure": torch.tensor([23, 0, index, 0])}


def loader() -> DataLoader[dict[str, Any]]:
    return DataLoader(Pictures(), batch_size=BATCH)


def build(kind: str, **params: Any) -> Any:
    torch.manual_seed(0)
    ddconfig = {
        "double_z": kind == "kl",
        "z_channels": 2,
        "resolution": 8,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    }
    loss = {"disc_start": 1, "perceptual_weight": 0.0, "disc_num_layers": 1}
    if kind == "kl":
        target = "ldm.modules.losses.LPIPSWithDiscriminator"
        model: Any = AutoencoderKL(ddconfig, {"target": target, "params": loss}, 2, **params)
    else:
        target = "ldm.modules.losses.VQLPIPSWithDiscriminator"
        model = VQModel(ddconfig, {"target": target, "params": loss}, n_embed=4, embed_dim=2, **params)
    model.learning_rate = RATE
    return model


def fit(model: Any, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    leave_to_model(trainer, model)
    trainer.fit(model, loader())
    return trainer


def losses(model: Any, batch: dict[str, Any], index: int, step: int) -> torch.Tensor:
    """One network's loss, from the public methods alone."""
    x = batch["image"].permute(0, 3, 1, 2)
    last = model.decoder.conv_out.weight
    if isinstance(model, AutoencoderKL):
        posterior = model.encode(x)
        purpose = ["posterior", "posterior_discriminator"][index]
        z = posterior.mean + posterior.std * exposure.randn(purpose, batch["exposure"], posterior.mean.shape[1:])
        return model.loss(x, model.decode(z), posterior, index, step, last_layer=last)[0]
    quant, codebook_loss, _ = model.encode(x)
    return model.loss(codebook_loss, x, model.decode(quant), index, step, last_layer=last)[0]


def plain_loop(model: Any, accumulate: int = 1, clip: float | None = None) -> None:
    """Train as the lineage does: the autoencoder, then the discriminator on what the new autoencoder makes."""
    model.train()
    judges = list(model.loss.discriminator.parameters())
    makers = [p for name, p in model.named_parameters() if not name.startswith("loss.discriminator.")]
    optimizers = [torch.optim.Adam(group, lr=RATE, betas=(0.5, 0.9)) for group in (makers, judges)]
    gathered = [[torch.zeros_like(p) for p in group] for group in (makers, judges)]
    batches = list(loader())
    step = 0
    for number, batch in enumerate(batches):
        due = (number + 1) % accumulate == 0 or number + 1 == len(batches)
        for index, group in enumerate((makers, judges)):
            gradients = torch.autograd.grad(losses(model, batch, index, step), group, allow_unused=True)
            for total, gradient in zip(gathered[index], gradients, strict=True):
                total += 0.0 if gradient is None else gradient
            if due:
                for parameter, total in zip(group, gathered[index], strict=True):
                    parameter.grad = total / accumulate
                    total.zero_()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(group, clip)
                optimizers[index].step()
        step += due


def difference(one: Any, two: Any, start: Any) -> float:
    """How far two models ended apart, as a share of the way that they went."""
    # A group norm over one channel removes any bias before it: the gradient is rounding noise, of which Adam makes
    # full steps. Some of that noise reaches the weights too.
    moved = [
        name
        for name, _ in one.named_parameters()
        if not (name.endswith(".bias") and name.startswith(("encoder.", "decoder.")))
    ]
    ends, others, starts = (dict(model.named_parameters()) for model in (one, two, start))
    apart = sum((ends[name] - others[name]).square().sum().item() for name in moved)
    way = sum((ends[name] - starts[name]).square().sum().item() for name in moved)
    return (apart / way) ** 0.5


@pytest.mark.parametrize(
    ("kind", "accumulate", "clip"),
    [("kl", 1, None), ("kl", 1, 0.5), ("kl", 2, None), ("vq", 1, None), ("vq", 2, None)],
)
def test_training_is_the_plain_loop(kind, accumulate, clip):
    model = build(kind)
    start, plain = copy.deepcopy(model), copy.deepcopy(model)
    fit(model, EqualWeights(BATCH), accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    plain_loop(plain, accumulate, clip)
    # Mostly 1e-4; a pixel whose error is about 0 may change the sign of its gradient, which gives a few per cent.
    assert difference(model, plain, start) < 0.07


@pytest.mark.parametrize(("accumulate", "clip"), [(2, None), (1, 0.5)])
def test_the_plain_loop_tells_accumulation_and_clipping_apart(accumulate, clip):
    start = build("kl")
    plain, other = copy.deepcopy(start), copy.deepcopy(start)
    plain_loop(plain)
    plain_loop(other, accumulate, clip)
    assert difference(other, plain, start) > 0.1


def test_the_log_variance_is_trained():
    model = build("kl")
    fit(model)
    assert model.loss.logvar.item() != 0.0


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 3), (2, 2)])
def test_a_run_counts_the_autoencoders_steps(accumulate, steps):
    model = build("kl")
    assert fit(model, accumulate_grad_batches=accumulate).global_step == steps


def test_max_steps_limits_the_autoencoders_steps():
    assert fit(build("vq"), max_steps=2).global_step == 2


def test_the_trainer_has_its_settings_again_while_it_trains():
    trainer = fit(build("kl"), accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (2, 0.5)


def test_the_averages_move_once_a_step():
    model = build("vq", use_ema=True)
    fit(model, accumulate_grad_batches=2)
    assert model.model_ema.num_updates == 2


def test_the_learning_rates_move_once_a_step():
    schedule = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [10], "cycle_lengths": [100], "f_start": [0.0], "f_max": [1.0], "f_min": [1.0]},
    }
    model = build("vq", scheduler_config=schedule)
    trainer = fit(model)
    assert [group["lr"] for each in trainer.optimizers for group in each.param_groups] == pytest.approx([3e-4, 3e-4])


def test_both_networks_train_again_after_a_step():
    model = build("kl")
    fit(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_logged_has_the_lineages_names():
    model = build("kl")
    names = set(fit(model).logged_metrics)
    figures = "total_loss logvar kl_loss nll_loss rec_loss d_weight disc_factor g_loss"
    figures += " disc_loss logits_real logits_fake"
    assert {f"train/{figure}" for figure in figures.split()} <= names
    assert {"aeloss_step", "discloss_step", "aeloss_epoch", "discloss_epoch"} <= names


def validated(model: Any) -> dict[str, Any]:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1
    )
    return dict(trainer.validate(model, loader(), verbose=False)[0])


def test_a_validation_gives_the_same_figures_each_time():
    model = build("kl")
    first = validated(model)
    assert first == validated(model)
    assert first["val/d_weight"] == 0.0
    assert first["val/rec_loss"] > 0.0


def test_a_validation_also_measures_the_averaged_weights():
    model = build("vq", use_ema=True)
    with torch.no_grad():
        model.decoder.conv_out.bias.add_(1.0)
    figures = validated(model)
    assert figures["val/rec_loss"] != figures["val_ema/rec_loss"]


def test_a_batch_without_exposure_keys_is_drawn_for_by_position():
    model = build("kl").eval()
    batch = {"image": torch.zeros(2, 8, 8, 3)}
    rows = model._exposures(batch, batch_idx=5)
    assert rows.tolist() == [[0, 0, 5, 0], [0, 0, 5, 1]]
