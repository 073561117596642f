"""Functions without a network give the original's numbers."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from ldm import lr_scheduler
from ldm.modules.diffusionmodules.util import make_beta_schedule, make_ddim_timesteps, timestep_embedding
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl
from ldm.modules.ema import LitEma
from tests.parity.fill import fill_value

BETAS = {
    "linear_sd": ("linear", 1000, {"linear_start": 0.00085, "linear_end": 0.0120}),
    "linear_ldm": ("linear", 1000, {"linear_start": 0.0015, "linear_end": 0.0195}),
    "linear_default": ("linear", 1000, {}),
    "cosine": ("cosine", 1000, {}),
    "cosine50": ("cosine", 50, {"cosine_s": 0.02}),
    "sqrt_linear": ("sqrt_linear", 1000, {}),
    "sqrt": ("sqrt", 100, {}),
}


@pytest.mark.parametrize("name", BETAS)
def test_betas_are_the_recorded_ones(oracle_g, name):
    schedule, steps, kwargs = BETAS[name]
    oracle_g.check(f"betas64/{name}", make_beta_schedule(schedule, steps, **kwargs))


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50, 100, 200, 250, 500])
def test_uniform_timesteps_are_the_recorded_ones_where_the_steps_divide_1000(oracle_g, steps):
    oracle_g.check(f"ddim_ts/uniform_{steps}", make_ddim_timesteps("uniform", steps, 1000, verbose=False))


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_quadratic_timesteps_are_the_recorded_ones(oracle_g, steps):
    oracle_g.check(f"ddim_ts/quad_{steps}", make_ddim_timesteps("quad", steps, 1000, verbose=False))


@pytest.mark.parametrize("width", [32, 33, 320])
def test_timestep_embeddings_are_the_recorded_ones(oracle_g, width):
    # Processors differ in the last bit of exp, and that bit of a frequency moves the angle of t = 999 by 999 * 2**-24.
    oracle_g.check(f"temb/{width}", timestep_embedding(oracle_g["in/temb/t"], width), at_least=999 * 2**-24)


@pytest.mark.parametrize("name", ["linear_sd", "linear_cycles", "warmupcos", "warmupcos_small", "warmupcos2_cycles"])
def test_learning_rate_multipliers_are_the_recorded_ones(oracle_g, name):
    recorded = oracle_g.scalars["schedulers"][name]
    schedule = getattr(lr_scheduler, recorded["cls"].rpartition(".")[2])(**recorded["params"])
    oracle_g.check(f"lr/{name}/f", np.array([schedule(int(step)) for step in oracle_g.arrays[f"lr/{name}/n"]]))


@pytest.mark.parametrize(
    ("recorded", "name"), [("linear_cycles", "linear_cycles"), ("cos2_cycles", "warmupcos2_cycles")]
)
def test_learning_rate_cycles_meet_as_recorded(oracle_g, recorded, name):
    config = oracle_g.scalars["schedulers"][name]
    schedule = getattr(lr_scheduler, config["cls"].rpartition(".")[2])(**config["params"])
    boundary = {int(step): value for step, value in oracle_g.scalars[f"{recorded}_boundary"].items()}
    assert {step: schedule(step) for step in boundary} == pytest.approx(boundary, rel=1e-12)


def test_gaussian_moments_are_the_recorded_ones(oracle_g):
    gaussian = DiagonalGaussianDistribution(oracle_g["in/gauss/params"])
    oracle_g.check("gauss/logvar_clamped", gaussian.logvar)
    oracle_g.check("gauss/mode", gaussian.mode())


def test_gaussian_divergences_and_likelihoods_are_the_recorded_ones(oracle_g):
    mild = DiagonalGaussianDistribution(oracle_g["in/gauss/params_mild"])
    other = DiagonalGaussianDistribution(oracle_g["in/gauss/other"])
    oracle_g.check("gauss/kl", mild.kl())
    oracle_g.check("gauss/kl_other", mild.kl(other))
    oracle_g.check("gauss/kl_Q", other.kl())
    oracle_g.check("gauss/nll", other.nll(oracle_g["in/gauss/sample"]))
    oracle_g.check("gauss/nll_dims23", other.nll(oracle_g["in/gauss/sample"], dims=[2, 3]))


def test_gaussian_samples_are_the_recorded_ones(oracle_g, scripted_noise):
    other = DiagonalGaussianDistribution(oracle_g["in/gauss/other"])
    with scripted_noise([oracle_g["in/gauss/noise"]]):
        oracle_g.check("gauss/sample_out", other.sample())


def test_a_deterministic_gaussian_is_its_mean(oracle_g):
    gaussian = DiagonalGaussianDistribution(oracle_g["in/gauss/other"], deterministic=True)
    oracle_g.check("gauss/det_sample", gaussian.sample())
    assert gaussian.kl().tolist() == oracle_g.scalars["gauss_deterministic"]["kl"]
    assert gaussian.nll(gaussian.mean).tolist() == oracle_g.scalars["gauss_deterministic"]["nll"]


def test_normal_kl_is_the_recorded_one(oracle_g):
    mean1, logvar1, mean2, logvar2 = (oracle_g[f"in/nkl/{index}"] for index in range(4))
    oracle_g.check("normal_kl/out", normal_kl(mean1, logvar1, mean2, logvar2))
    oracle_g.check("normal_kl/scalar", normal_kl(mean1, logvar1, 0.0, 0.0))


@pytest.mark.parametrize(
    ("key", "warm_up", "decay"), [("shadow", True, 0.9999), ("no_num_updates_decay0.5", False, 0.5)]
)
def test_the_moving_average_follows_the_recorded_trace(oracle_g, key, warm_up, decay):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.from_numpy(fill_value("ema_test.weight", (2, 3))))
            self.bias = torch.nn.Parameter(torch.from_numpy(fill_value("ema_test.bias", (2,))))

    model = Holder()
    average = LitEma(model, decay=decay, use_num_updates=warm_up)
    shadows = []
    for step in range(12):
        for name, parameter in model.named_parameters():
            draw = np.random.Generator(
                np.random.PCG64(zlib.crc32(f"input/G/ema/{step}/{name}".encode()))
            ).standard_normal(parameter.shape)
            parameter.data += 0.1 * torch.from_numpy(draw.astype(np.float32))
        average(model)
        shadows.append(torch.cat([average.weight.flatten(), average.bias]))
    recorded = oracle_g[f"ema_trace/{key}"]
    oracle_g.check(f"ema_trace/{key}", torch.stack(shadows) if recorded.ndim == 2 else shadows[-1])
    assert int(average.num_updates) == oracle_g.scalars["ema_trace"]["num_updates" if warm_up else "no_num_updates"]
