"""DPM-Solver++(2M) beside an independent implementation, a known answer, and the rest of the samplers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.sampling import StepNoise, StepTable
from tests.unit.models.small import build_text_model

SHAPE = (4, 8, 8)
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.0120,
    "beta_schedule": "scaled_linear",
}


@pytest.fixture(scope="module")
def model():
    """A text-to-image model on Stable Diffusion's schedule; tests must leave it as it is."""
    return build_text_model(linear_start=0.00085, linear_end=0.0120)


@pytest.fixture(scope="module")
def start():
    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(2, *SHAPE, generator=generator)
    cond, uncond = (torch.randn(2, 3, 32, generator=generator) for _ in range(2))
    return x_T, cond, uncond


@torch.no_grad()
def sample_by_scheduler(scheduler, model, start, scale):
    x, cond, uncond = start
    for t in scheduler.timesteps:
        times = torch.full((len(x),), int(t))
        eps_uncond, eps_cond = model.apply_model(x, times, uncond), model.apply_model(x, times, cond)
        x = scheduler.step(eps_uncond + scale * (eps_cond - eps_uncond), t, x).prev_sample
    return x


def sample(sampler, steps, start, scale):
    x_T, cond, uncond = start
    options = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond}
    return sampler.sample(steps, len(x_T), SHAPE, cond, x_T=x_T, verbose=False, **options)[0]


def relative_difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("steps", [1, 2, 10, 14, 15, 20, 30])
@pytest.mark.parametrize(("final_sigmas_type", "denoise_to_zero"), [("sigma_min", False), ("zero", True)])
def test_dpm_solver_agrees_with_diffusers(model, start, steps, final_sigmas_type, denoise_to_zero):
    scheduler = DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type=final_sigmas_type
    )
    scheduler.set_timesteps(steps)
    sampler = DPMSolverSampler(model, denoise_to_zero=denoise_to_zero)
    found = sample(sampler, steps, start, 7.5)
    assert sampler.ddim_timesteps[::-1].tolist() == scheduler.timesteps.tolist()
    assert relative_difference(found, sample_by_scheduler(scheduler, model, start, 7.5)) < 1e-4


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_agrees_with_diffusers(model, start, steps):
    scheduler = DDIMScheduler(**SCHEDULE, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(steps)
    sampler = DDIMSampler(model)
    found = sample(sampler, steps, start, 7.5)
    assert sampler.ddim_timesteps[::-1].tolist() == scheduler.timesteps.tolist()
    assert relative_difference(found, sample_by_scheduler(scheduler, model, start, 7.5)) < 1e-4


class GaussianData:
    """The exact network for data that are normal around 1 with standard deviation 0.5."""

    parameterization = "eps"
    mean, deviation = 1.0, 0.5

    def __init__(self):
        betas = np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2
        self.alphas_cumprod = torch.tensor(np.cumprod(1.0 - betas))
        self.num_timesteps = 1000
        self.betas = torch.tensor(betas)
        self.sqrt_recip_alphas_cumprod = self.alphas_cumprod.rsqrt()
        self.sqrt_recipm1_alphas_cumprod = (1.0 / self.alphas_cumprod - 1.0).sqrt()

    def variance(self, signal):
        return signal * self.deviation**2 + 1.0 - signal

    def apply_model(self, x, t, cond):
        signal = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (1.0 - signal).sqrt() * (x - signal.sqrt() * self.mean) / self.variance(signal)

    def exact(self, x_T, start, end):
        """Follow the probability flow, which for normal data keeps the number of deviations from the mean."""
        spread = (self.variance(end) / self.variance(start)).sqrt()
        return end.sqrt() * self.mean + spread * (x_T - start.sqrt() * self.mean)


def error_on_gaussian_data(sampler_class, steps):
    model = GaussianData()
    x_T = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    sampler = sampler_class(model)
    found, _ = sampler.sample(steps, 1, (1, 8, 8), x_T=x_T, verbose=False)
    signals = model.alphas_cumprod
    exact = model.exact(x_T, signals[int(sampler.ddim_timesteps[-1])], signals[0])
    return float((found - exact).abs().max())


@pytest.mark.parametrize(("sampler_class", "order"), [(DDIMSampler, 1), (DPMSolverSampler, 2)])
def test_three_times_the_steps_lower_the_error_by_the_samplers_order(sampler_class, order):
    coarse, fine = (error_on_gaussian_data(sampler_class, steps) for steps in (333, 999))
    assert 3.0 ** (order - 0.2) < coarse / fine < 3.0 ** (order + 0.2)


@pytest.mark.parametrize("total", [10, 50, 1000])
def test_any_number_of_steps_gives_exactly_that_many_valid_timesteps(total):
    sampler = DPMSolverSampler(type("Model", (), {"num_timesteps": total}))
    for steps in range(1, total + 1):
        timesteps = sampler.choose_timesteps("uniform", steps)
        assert len(timesteps) == steps
        assert (timesteps[1:] > timesteps[:-1]).all()
        assert timesteps[0] >= 0
        assert timesteps[-1] == total - 1


def test_every_timestep_can_be_visited():
    sampler = DPMSolverSampler(build_text_model(timesteps=16))
    out, _ = sampler.sample(16, 1, SHAPE, torch.randn(1, 3, 32), verbose=False)
    assert torch.isfinite(out).all()


def test_a_first_timestep_without_signal_is_bridged(model, start):
    sampler = DPMSolverSampler(model)
    signals = model.alphas_cumprod.double().numpy()
    timesteps = np.array([333, 666, 999])
    alphas = np.append(signals[timesteps[:-1]], 0.0)
    table = StepTable(timesteps, alphas, np.append(signals[0], signals[timesteps[:-1]]), np.zeros(3))
    model_output = torch.zeros(2, *SHAPE)
    sampler.predict_x0 = lambda x, t, guide: model_output
    x, history = start[0], []
    for index in (2, 1, 0):
        x, _ = sampler.step(x, table, index, None, StepNoise(), history)
    assert torch.isfinite(x).all()


def test_dpm_solver_refuses_noise(model):
    with pytest.raises(ValueError, match=r"eta is 0\.5, it must be 0"):
        DPMSolverSampler(model).sample(5, 1, SHAPE, eta=0.5, verbose=False)


@pytest.mark.parametrize("steps", [0, 1001])
def test_an_impossible_number_of_steps_is_an_error(model, steps):
    with pytest.raises(ValueError, match="must lie within 1 and 1000"):
        DPMSolverSampler(model).sample(steps, 1, SHAPE, verbose=False)


def test_a_noise_source_makes_samples_independent_of_their_batch(model, start):
    def seeded(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return lambda like: torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])

    _, cond, _ = start
    options = {"eta": 1.0, "verbose": False}
    both, _ = DDIMSampler(model).sample(4, 2, SHAPE, cond, noise_source=seeded([5, 6]), **options)
    alone, _ = DDIMSampler(model).sample(4, 1, SHAPE, cond[1:], noise_source=seeded([6]), **options)
    assert torch.allclose(both[1:], alone, atol=1e-5)


# --- the public surface that k-diffusion's wrapper for CompVis models uses -------------------------------------------


class CompVisDenoiser:
    """What k-diffusion does with a CompVis model: sigmas from its tables, x_0 from its answer."""

    def __init__(self, model):
        self.model = model
        self.sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod) ** 0.5

    def __call__(self, x, sigma, cond):
        t = (self.sigmas - sigma).abs().argmin().repeat(len(x))
        output = self.model.apply_model(x / (sigma**2 + 1) ** 0.5, t, cond=cond)
        if self.model.parameterization == "v":
            return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5
        return x - sigma * output


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@torch.no_grad()
def test_eulers_method_through_a_k_diffusion_wrapper_is_ddim(start, parameterization):
    model = build_text_model(linear_start=0.00085, linear_end=0.0120, parameterization=parameterization)
    x_T, cond, _ = start
    sampler = DDIMSampler(model)
    expected, _ = sampler.sample(10, 2, SHAPE, cond, x_T=x_T, verbose=False)
    denoise = CompVisDenoiser(model)
    sigmas = denoise.sigmas[[0, *sampler.ddim_timesteps.tolist()]].flip(0)
    x = x_T * (1 + sigmas[0] ** 2) ** 0.5
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (x - denoise(x, sigma, cond)) / sigma * (sigma_next - sigma)
    assert relative_difference(x / (1 + sigmas[-1] ** 2) ** 0.5, expected) < 1e-4
