"""The formulas of which no recording is at hand, against a few independent lines each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ldm.models.diffusion import loss
from ldm.models.diffusion.noise_schedule import build_noise_schedule
from ldm.modules.diffusionmodules import util as layers
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.modules.encoders.modules import SpatialRescaler
from tests.parity.fill import fill
from tests.unit.models.small import build_text_model, unet_config

BETAS = [0.1, 0.2, 0.3]


def test_the_loss_combines_its_terms_with_their_weights():
    errors, logvar = torch.tensor([2.0, 4.0]), torch.tensor([0.5, -1.0])
    parts = loss.combine(errors, logvar, torch.tensor([0.1, 0.3]), 0.7, 0.2, torch.tensor([1.0, 0.5]))
    gamma = np.mean([2.0 / np.exp(0.5) + 0.5, 0.5 * 4.0 / np.exp(-1.0) - 1.0])
    vlb = np.mean([0.1 * 2.0, 0.3 * 4.0])
    assert parts.loss_simple.item() == 3.0
    assert parts.loss_gamma.item() == pytest.approx(gamma)
    assert parts.loss_vlb.item() == pytest.approx(vlb)
    assert parts.loss.item() == pytest.approx(0.7 * gamma + 0.2 * vlb)


@pytest.mark.parametrize("v_posterior", [0.0, 0.25, 1.0])
def test_given_betas_make_the_tables_and_v_mixes_the_posterior_variance(v_posterior):
    schedule = build_noise_schedule(given_betas=BETAS, v_posterior=v_posterior)
    alpha_bar = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7]
    tilde = [0.0, 0.2 * (1 - alpha_bar[0]) / (1 - alpha_bar[1]), 0.3 * (1 - alpha_bar[1]) / (1 - alpha_bar[2])]
    expected = [(1 - v_posterior) * t + v_posterior * beta for t, beta in zip(tilde, BETAS, strict=True)]
    assert schedule.alphas_cumprod == pytest.approx(alpha_bar)
    assert schedule.posterior_variance == pytest.approx(expected)


def test_the_bounds_weights_follow_the_parameterisation():
    schedule = build_noise_schedule(given_betas=BETAS)
    alpha_bar = schedule.alphas_cumprod
    x0 = 0.5 * np.sqrt(alpha_bar) / (2.0 - alpha_bar)
    x0[0] = x0[1]
    eps = [
        b**2 / (2 * v * (1 - b) * (1 - a))
        for b, v, a in zip(BETAS, schedule.posterior_variance, alpha_bar, strict=True)
        if v > 0
    ]
    assert loss.lvlb_weights(schedule, "x0").tolist() == pytest.approx(x0.tolist(), rel=1e-6)
    assert loss.lvlb_weights(schedule, "eps").tolist() == pytest.approx([eps[0], *eps], rel=1e-5)
    assert loss.lvlb_weights(schedule, "v").tolist() == [1.0, 1.0, 1.0]


def test_a_models_keywords_reach_its_loss():
    params = {"l_simple_weight": 0.7, "original_elbo_weight": 0.2, "learn_logvar": True, "logvar_init": 0.3}
    model = build_text_model(**params)
    x, c, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 32), torch.randn(2, 4, 8, 8)
    t = torch.tensor([3, 700])
    value, logged = model.p_losses(x, c, t, noise)
    errors = (model.apply_model(model.q_sample(x, t, noise), t, c) - noise).square().mean(dim=(1, 2, 3))
    gamma = (errors / np.exp(0.3) + 0.3).mean()
    vlb = (model.lvlb_weights[t] * errors).mean()
    assert logged["train/loss_gamma"].item() == pytest.approx(gamma.item(), rel=1e-5)
    assert value.item() == pytest.approx((0.7 * gamma + 0.2 * vlb).item(), rel=1e-5)


def norm(x, layer):
    return F.group_norm(x, 32, layer.weight, layer.bias, 1e-5)


@pytest.mark.parametrize("way", [None, "up", "down"])
@pytest.mark.parametrize("use_scale_shift_norm", [False, True])
@torch.no_grad()
def test_a_residual_block_is_its_formula(way, use_scale_shift_norm):
    options = {way: True} if way else {}
    block = ResBlock(32, 8, 0.0, out_channels=64, use_scale_shift_norm=use_scale_shift_norm, **options)
    fill(block)
    x, emb = torch.randn(2, 32, 6, 6), torch.randn(2, 8)

    def resampled(tensor):
        if way == "up":
            return tensor.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.avg_pool2d(tensor, 2) if way == "down" else tensor

    h = block.in_layers[2](resampled(F.silu(norm(x, block.in_layers[0]))))
    shift = block.emb_layers[1](F.silu(emb))[:, :, None, None]
    if use_scale_shift_norm:
        h = norm(h, block.out_layers[0]) * (1 + shift[:, :64]) + shift[:, 64:]
    else:
        h = norm(h + shift, block.out_layers[0])
    expected = block.out_layers[3](F.silu(h)) + block.skip_connection(resampled(x))
    assert torch.allclose(block(x, emb), expected, atol=1e-5)


def test_heads_come_from_their_number_or_their_width():
    def first_heads(**params):
        config = unet_config(use_spatial_transformer=True, context_dim=8, model_channels=64, legacy=False, **params)
        model = UNetModel(**config["params"])
        return model.input_blocks[1][1].transformer_blocks[0].attn1.heads

    assert first_heads(num_heads=4) == 4
    assert first_heads(num_heads=-1, num_head_channels=32) == 2


def test_levels_are_resampled_with_or_without_convolutions():
    def downsample(**params):
        return UNetModel(**unet_config(channel_mult=[1, 1], **params)["params"]).input_blocks[2][0].op

    assert isinstance(downsample(), torch.nn.Conv2d)
    assert isinstance(downsample(conv_resample=False), torch.nn.AvgPool2d)


def test_recomputation_runs_the_function_twice():
    calls = []

    def function(x):
        calls.append(1)
        return x.square()

    for flag, expected in ((True, 2), (False, 1)):
        calls.clear()
        x = torch.ones(2, requires_grad=True)
        layers.checkpoint(function, (x,), flag=flag).sum().backward()
        assert len(calls) == expected


def test_maps_are_rescaled_bilinearly():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = x.reshape(1, 1, 2, 2, 2, 2).mean(dim=(3, 5))
    assert torch.allclose(SpatialRescaler(in_channels=1)(x), expected)
