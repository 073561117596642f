"""The noise schedule: betas and the coefficient tables that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.modules.diffusionmodules.util import make_beta_schedule

Table = NDArray[np.float64]


@dataclass(frozen=True)
class NoiseSchedule:
    """Coefficient tables over the timesteps 0..T-1, each float64 (T,).

    The names are the checkpoint's. ``alphas_cumprod`` is the alpha-bar of the papers.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 4, 7 and 15.
    """

    betas: Table
    alphas_cumprod: Table
    alphas_cumprod_prev: Table
    sqrt_alphas_cumprod: Table
    sqrt_one_minus_alphas_cumprod: Table
    log_one_minus_alphas_cumprod: Table
    sqrt_recip_alphas_cumprod: Table
    sqrt_recipm1_alphas_cumprod: Table
    posterior_variance: Table
    posterior_log_variance_clipped: Table
    posterior_mean_coef1: Table
    posterior_mean_coef2: Table

    def tensors(self) -> dict[str, Tensor]:
        """Give the tables as float32 tensors (T,) by name, each rounded once from float64."""
        return {item.name: torch.tensor(getattr(self, item.name), dtype=torch.float32) for item in fields(self)}


def build_noise_schedule(
    given_betas: Sequence[float] | Table | None = None,
    beta_schedule: str = "linear",
    timesteps: int = 1000,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
    v_posterior: float = 0.0,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Compute a noise schedule.

    Args:
        given_betas: the betas themselves; the four arguments after it are then unused.
        beta_schedule: see :func:`~ldm.modules.diffusionmodules.util.make_beta_schedule`.
        timesteps: T.
        linear_start: see there.
        linear_end: see there.
        cosine_s: see there.
        v_posterior: weight v of beta in the variance (1 - v) * beta_tilde + v * beta.
        zero_terminal_snr: leave no signal at the last timestep; see :func:`rescale_zero_terminal_snr`.

    Returns:
        The tables.

    Raises:
        ValueError: unknown schedule, or betas outside (0, 1).
    """
    if given_betas is not None:
        betas = np.asarray(given_betas, dtype=np.float64)
    else:
        betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
    if betas.ndim != 1 or len(betas) == 0 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError("the noise schedule's betas must be a list of numbers above 0 and below 1")
    if zero_terminal_snr:
        betas = rescale_zero_terminal_snr(betas)
    alphas_cumprod = np.cumprod(1.0 - betas, dtype=np.float64)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = (1 - v_posterior) * betas * (1 - alphas_cumprod_prev) / (
        1 - alphas_cumprod
    ) + v_posterior * betas
    with np.errstate(divide="ignore"):  # without a signal at the last step, its reciprocal is infinite
        sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod = (
            np.sqrt(1 / alphas_cumprod),
            np.sqrt(1 / alphas_cumprod - 1),
        )
    return NoiseSchedule(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=alphas_cumprod_prev,
        sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - alphas_cumprod),
        log_one_minus_alphas_cumprod=np.log(1 - alphas_cumprod),
        sqrt_recip_alphas_cumprod=sqrt_recip_alphas_cumprod,
        sqrt_recipm1_alphas_cumprod=sqrt_recipm1_alphas_cumprod,
        posterior_variance=posterior_variance,
        # The posterior of the first step has variance 0 when v is 0: its logarithm is cut off.
        posterior_log_variance_clipped=np.log(np.maximum(posterior_variance, 1e-20)),
        posterior_mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
    )


def rescale_zero_terminal_snr(betas: Table) -> Table:
    """Shift and scale sqrt(alpha-bar) so that it keeps its first value and ends at 0.

    Args:
        betas: float64 (T,), T at least 2.

    Returns:
        float64 (T,); the last is 1.

    Reference:
        Lin et al. 2023, arXiv 2305.08891, algorithm 1.
    """
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def condition_timesteps(num_timesteps: int, num_timesteps_cond: int) -> Tensor:
    """Choose the timestep at which the condition is noised, for each timestep of the image.

    The first ``num_timesteps_cond`` entries are spread evenly over the timesteps, the others are the last.

    Args:
        num_timesteps: T.
        num_timesteps_cond: number of levels of noise on the condition.

    Returns:
        int64 (T,).
    """
    ids = torch.full((num_timesteps,), num_timesteps - 1, dtype=torch.int64)
    ids[:num_timesteps_cond] = torch.round(torch.linspace(0, num_timesteps - 1, num_timesteps_cond)).long()
    return ids
