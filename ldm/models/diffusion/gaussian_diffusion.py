"""The Gaussian diffusion process: noising, its posterior, and conversions between noise, x_0 and v.

Pure functions. ``tables`` is whatever holds the schedule's coefficient tables as (T,) tensors under their
checkpoint names: the diffusion model itself, in practice. ``t`` is always int64 (B,) in [0, T).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ldm.modules.diffusionmodules.util import extract_into_tensor

PARAMETERIZATIONS = ("eps", "x0", "v")
"""What a network may be trained to predict: the noise, the clean latent, or the velocity."""


class NoiseTables(Protocol):
    """The coefficient tables, each (T,); see :class:`~ldm.models.diffusion.noise_schedule.NoiseSchedule`."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor


def q_sample(tables: NoiseTables, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Noise x_0 to timestep t: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

    Args:
        tables: the schedule.
        x_start: (B, C, H, W).
        t: (B,).
        noise: standard normals of x_start's shape.

    Returns:
        x_t of x_start's shape.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 4.
    """
    signal = extract_into_tensor(tables.sqrt_alphas_cumprod, t, x_start.shape)
    spread = extract_into_tensor(tables.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
    return signal * x_start + spread * noise


def q_mean_variance(tables: NoiseTables, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give mean, variance and log-variance of q(x_t | x_0); the last two are (B, 1, 1, 1).

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 4.
    """
    mean = extract_into_tensor(tables.sqrt_alphas_cumprod, t, x_start.shape) * x_start
    log_variance = extract_into_tensor(tables.log_one_minus_alphas_cumprod, t, x_start.shape)
    return mean, extract_into_tensor(tables.sqrt_one_minus_alphas_cumprod, t, x_start.shape) ** 2, log_variance


def q_posterior(tables: NoiseTables, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give mean, variance and log-variance (clipped) of q(x_{t-1} | x_t, x_0); the last two are (B, 1, 1, 1).

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7.
    """
    mean = (
        extract_into_tensor(tables.posterior_mean_coef1, t, x_t.shape) * x_start
        + extract_into_tensor(tables.posterior_mean_coef2, t, x_t.shape) * x_t
    )
    variance = extract_into_tensor(tables.posterior_variance, t, x_t.shape)
    return mean, variance, extract_into_tensor(tables.posterior_log_variance_clipped, t, x_t.shape)


def predict_start_from_noise(tables: NoiseTables, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Recover x_0 from x_t and the noise: sqrt(1/abar_t) x_t - sqrt(1/abar_t - 1) noise.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 15.
    """
    return (
        extract_into_tensor(tables.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        - extract_into_tensor(tables.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise
    )


def velocity(tables: NoiseTables, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Combine x_0 and noise to v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0.

    Reference:
        Salimans & Ho 2022, arXiv 2202.00512, section 2.4.
    """
    return (
        extract_into_tensor(tables.sqrt_alphas_cumprod, t, x_start.shape) * noise
        - extract_into_tensor(tables.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * x_start
    )


def training_target(tables: NoiseTables, parameterization: str, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Give what the network should output, of x_start's shape: noise, x_0 or v."""
    if parameterization == "eps":
        return noise
    if parameterization == "x0":
        return x_start
    if parameterization == "v":
        return velocity(tables, x_start, noise, t)
    raise ValueError(unknown_parameterization(parameterization))


def to_x0(tables: NoiseTables, parameterization: str, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
    """Convert the network's output to its estimate of x_0."""
    if parameterization == "eps":
        return predict_start_from_noise(tables, x_t, t, model_output)
    if parameterization == "x0":
        return model_output
    if parameterization == "v":
        return (
            extract_into_tensor(tables.sqrt_alphas_cumprod, t, x_t.shape) * x_t
            - extract_into_tensor(tables.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * model_output
        )
    raise ValueError(unknown_parameterization(parameterization))


def to_eps(tables: NoiseTables, parameterization: str, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
    """Convert the network's output to its estimate of the noise."""
    if parameterization == "eps":
        return model_output
    if parameterization == "x0":
        signal = extract_into_tensor(tables.sqrt_alphas_cumprod, t, x_t.shape)
        return (x_t - signal * model_output) / extract_into_tensor(tables.sqrt_one_minus_alphas_cumprod, t, x_t.shape)
    if parameterization == "v":
        return (
            extract_into_tensor(tables.sqrt_alphas_cumprod, t, x_t.shape) * model_output
            + extract_into_tensor(tables.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * x_t
        )
    raise ValueError(unknown_parameterization(parameterization))


def unknown_parameterization(name: str) -> str:
    """Word the error for an unknown parameterisation."""
    return f"model.params.parameterization is '{name}'; use one of {', '.join(PARAMETERIZATIONS)}"
