from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.models.diffusion import loss
from ldm.models.diffusion.gaussian_diffusion import to_eps, to_x0, training_target
from ldm.models.diffusion.noise_schedule import build_noise_schedule
from tests.unit.models.small import build_text_model, picture_batch

SCHEDULE = build_noise_schedule(timesteps=1000, linear_start=0.00085, linear_end=0.012)
ALPHAS_CUMPROD = torch.tensor(SCHEDULE.alphas_cumprod)
SNR = ALPHAS_CUMPROD / (1 - ALPHAS_CUMPROD)


class Tables:
    """A schedule's tables as the conversions take them."""

    def __init__(self, schedule):
        self.__dict__.update(schedule.tensors())


@pytest.mark.parametrize(
    ("parameterization", "expected"),
    [("eps", SNR.clamp(max=5) / SNR), ("x0", SNR.clamp(max=5)), ("v", SNR.clamp(max=5) / (SNR + 1))],
)
def test_min_snr_weights_bound_the_weight_of_x0(parameterization, expected):
    assert torch.allclose(loss.min_snr_weights(ALPHAS_CUMPROD, 5.0, parameterization), expected)


def test_debiased_weights_grow_with_the_noise():
    weights = loss.debiased_weights(ALPHAS_CUMPROD, "eps")
    assert torch.allclose(weights, SNR**-0.5)
    assert (weights.diff() > 0).all()


@pytest.mark.parametrize("weights_of", [lambda *a: loss.min_snr_weights(a[0], 5.0, a[1]), loss.debiased_weights])
def test_weighted_losses_agree_whatever_the_network_predicts(weights_of):
    tables = Tables(SCHEDULE)
    x_start, noise, guess = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([100, 700])
    x_t = tables.sqrt_alphas_cumprod[t].reshape(2, 1, 1, 1) * x_start
    x_t = x_t + tables.sqrt_one_minus_alphas_cumprod[t].reshape(2, 1, 1, 1) * noise
    losses = []
    for parameterization in ("eps", "x0", "v"):
        target = training_target(tables, parameterization, x_start, noise, t)
        eps = guess
        x0 = to_x0(tables, "eps", x_t, t, eps)
        output = {"eps": eps, "x0": x0, "v": training_target(tables, "v", x0, eps, t)}[parameterization]
        errors = (output - target).square().mean(dim=(1, 2, 3))
        losses.append((weights_of(tables.alphas_cumprod[t], parameterization) * errors).mean().item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_rescaling_leaves_no_signal_at_the_end_and_the_beginning_as_it_was():
    rescaled = build_noise_schedule(timesteps=1000, linear_start=0.00085, linear_end=0.012, zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.alphas_cumprod[0] == pytest.approx(SCHEDULE.alphas_cumprod[0])
    assert (np.diff(rescaled.alphas_cumprod) < 0).all()


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_conversions_stay_finite_without_signal(parameterization):
    tables = Tables(build_noise_schedule(zero_terminal_snr=True))
    x, t, output = torch.randn(1, 4, 2, 2), torch.tensor([999]), torch.randn(1, 4, 2, 2)
    assert torch.isfinite(to_x0(tables, parameterization, x, t, output)).all()
    assert torch.isfinite(to_eps(tables, parameterization, x, t, output)).all()


def loss_of(**params):
    model = build_text_model(**params)
    batch = picture_batch()
    return model.shared_step(batch, batch["exposure"])[0].item()


@pytest.mark.parametrize(
    "params",
    [{"min_snr_gamma": 0.01}, {"debiased_estimation": True}, {"offset_noise": 0.1}, {"input_perturbation": 0.1}],
)
def test_each_weighting_changes_the_loss_and_gives_the_same_one_again(params):
    assert loss_of(**params) != loss_of()
    assert loss_of(**params) == loss_of(**params)


def test_a_rescaled_schedule_trains():
    assert np.isfinite(loss_of(zero_terminal_snr=True, parameterization="v", min_snr_gamma=5.0))


def test_offset_noise_is_one_number_a_channel():
    noise = torch.zeros(2, 4, 3, 3)
    offsets = torch.arange(8.0).reshape(2, 4, 1, 1)
    assert torch.equal(loss.offset_noise(noise, offsets, 0.1), 0.1 * offsets.expand(2, 4, 3, 3))


def test_perturbed_input_leaves_the_target_alone(monkeypatch):
    model = build_text_model(input_perturbation=0.5)
    batch = picture_batch()
    x = torch.zeros(2, 4, 8, 8)
    noise, shown = model._draw_noise(x, batch["exposure"])
    plain, nothing = build_text_model()._draw_noise(x, batch["exposure"])
    assert nothing is None
    assert torch.equal(noise, plain)
    assert (shown - noise).std() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_snr_gamma": 5.0, "debiased_estimation": True}, "give one"),
        ({"min_snr_gamma": 0.0}, "above 0"),
        ({"offset_noise": -0.1}, "offset_noise"),
        ({"input_perturbation": -0.1}, "input_perturbation"),
        ({"zero_terminal_snr": True}, "needs parameterization v or x0"),
    ],
)
def test_contradictory_weightings_are_errors(params, message):
    with pytest.raises(ValueError, match=message):
        build_text_model(**params)


def parts_of(loss_weight):
    generator = torch.Generator().manual_seed(0)
    errors, logvar, vlb_weights, weights = torch.rand(4, 3, generator=generator)
    return loss.combine(errors, logvar, vlb_weights, 0.7, 0.3, weights, loss_weight)


def test_weights_of_one_leave_every_part_as_it_is():
    assert parts_of(torch.ones(3)) == parts_of(None)


def test_the_loss_is_the_weighted_sum_over_all_rows():
    singly = [parts_of(torch.eye(3)[row]).loss.item() * 3 for row in range(3)]
    weighted = parts_of(torch.tensor([2.0, 0.5, 0.0])).loss.item()
    assert weighted == pytest.approx((2.0 * singly[0] + 0.5 * singly[1]) / 3)


def test_figures_are_means_over_the_pictures_that_are_no_fillers():
    heavy, light = parts_of(torch.tensor([2.0, 2.0, 0.0])), parts_of(torch.tensor([1.0, 1.0, 0.0]))
    assert heavy.loss_shown.item() == pytest.approx(heavy.loss.item() * 3 / 2)
    assert heavy.loss_shown.item() == pytest.approx(2 * light.loss_shown.item())
    for name in ("loss_simple", "loss_vlb", "loss_gamma"):
        alone = [getattr(parts_of(torch.eye(3)[row]), name).item() for row in range(2)]
        assert getattr(heavy, name).item() == getattr(light, name).item()
        assert getattr(heavy, name).item() == pytest.approx(sum(alone) / 2)


def test_a_batch_of_fillers_has_figures_of_zero():
    parts = parts_of(torch.zeros(3))
    assert [parts.loss, parts.loss_shown, parts.loss_simple, parts.loss_vlb, parts.loss_gamma] == [0.0] * 5
