"""Schedules, timestep embeddings and the small layers that the UNet is made of."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.utils.checkpoint
from numpy.typing import NDArray
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

logger = logging.getLogger(__name__)


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> NDArray[np.float64]:
    """Compute the noise variances beta_t.

    Args:
        schedule: ``linear`` (a misnomer that is a contract: evenly spaced square roots, squared),
            ``cosine``, ``sqrt_linear`` (evenly spaced) or ``sqrt`` (square roots of evenly spaced values).
        n_timestep: number of steps T.
        linear_start: first beta (``linear``, ``sqrt_linear``) or its square (``sqrt``).
        linear_end: last beta, likewise.
        cosine_s: offset s of the cosine schedule.

    Returns:
        float64 (T,).

    Raises:
        ValueError: unknown schedule name.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, section 4; Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17 (cosine).
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "cosine":
        fractions = np.arange(n_timestep + 1, dtype=np.float64) / n_timestep
        alphas_cumprod = np.cos((fractions + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    raise ValueError(f"beta_schedule '{schedule}' is unknown; use one of linear, cosine, sqrt_linear, sqrt")


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> NDArray[np.int64]:
    """Choose the S of T timesteps that a sampler visits, in increasing order.

    Where S divides T, ``uniform`` gives the lineage's table: every (T/S)-th step, counted from 1. For any
    other S it gives exactly S evenly spread steps below T, where the lineage gave more or failed.

    Args:
        ddim_discr_method: ``uniform``, or ``quad`` (dense near t = 0).
        num_ddim_timesteps: S, within 1..T.
        num_ddpm_timesteps: T.
        verbose: log the chosen steps.

    Returns:
        int64 (S,), strictly increasing for ``uniform``, each within [0, T).

    Raises:
        ValueError: unknown method, or S out of range.

    Reference:
        Song et al. 2020, arXiv 2010.02502, section 4.2 and appendix D.2.
    """
    steps, total = num_ddim_timesteps, num_ddpm_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"the number of sampling steps is {steps}; it must lie within 1 and {total}")
    if ddim_discr_method == "uniform":
        # Counting from 1 would put the last of T steps at T, one past the end of every table.
        first = 0 if steps == total else 1
        timesteps = np.arange(steps, dtype=np.int64) * total // steps + first
    elif ddim_discr_method == "quad":
        timesteps = (np.linspace(0, np.sqrt(total * 0.8), steps) ** 2).astype(np.int64) + 1
        timesteps = np.minimum(timesteps, total - 1)
    else:
        raise ValueError(f"ddim_discr_method '{ddim_discr_method}' is unknown; use uniform or quad")
    if verbose:
        logger.info("sampling timesteps: %s", timesteps)
    return timesteps


def make_ddim_sampling_parameters(
    alphacums: NDArray[Any], ddim_timesteps: NDArray[np.int64], eta: float, verbose: bool = True
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Look up the DDIM coefficients of the visited timesteps.

    The step that leaves the lowest visited timestep arrives at alphas_cumprod[0], not at 1.

    Args:
        alphacums: (T,) cumulative products of alpha.
        ddim_timesteps: (S,) increasing timesteps.
        eta: 0 gives the deterministic DDIM, 1 the noise of DDPM.
        verbose: log the sigmas.

    Returns:
        ``(sigmas, alphas, alphas_prev)``, each (S,).

    Reference:
        Song et al. 2020, arXiv 2010.02502, eq. 16.
    """
    alphas = alphacums[ddim_timesteps]
    alphas_prev = np.concatenate([alphacums[:1], alphacums[ddim_timesteps[:-1]]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    if verbose:
        logger.info("sampling sigmas for eta %s: %s", eta, sigmas)
    return sigmas, alphas, alphas_prev


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> NDArray[np.float64]:
    """Discretise a continuous cumulative product: beta_i = 1 - alpha_bar((i+1)/T) / alpha_bar(i/T).

    Args:
        num_diffusion_timesteps: T.
        alpha_bar: function of a time in [0, 1] with values in (0, 1].
        max_beta: upper bound of each beta, below 1.

    Returns:
        float64 (T,).
    """
    values = np.array([alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)])
    return np.minimum(1 - values[1:] / values[:-1], max_beta)


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Pick a table's values at timesteps and shape them to broadcast over images.

    Args:
        a: (T,) table.
        t: int64 (B,) timesteps.
        x_shape: shape (B, ...) to broadcast against.

    Returns:
        (B, 1, ..., 1) with as many dimensions as ``x_shape``.
    """
    return a.gather(-1, t).reshape(t.shape[0], *([1] * (len(x_shape) - 1)))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Draw standard normals; ``repeat`` gives every batch element the same ones."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).expand(*shape).clone()
    return torch.randn(tuple(shape), device=device)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Embed timesteps as sinusoids of geometrically spaced frequencies: cosines first, then sines.

    Args:
        timesteps: (B,) timesteps; fractions are allowed.
        dim: width of the embedding; an odd one is padded with a zero.
        max_period: longest wavelength.
        repeat_only: give the plain timestep ``dim`` times instead.

    Returns:
        float32 (B, dim).

    Reference:
        Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    if repeat_only:
        return timesteps[:, None].expand(-1, dim).float()
    half = dim // 2
    # Multiplied before it is divided, as models were trained: at t = 999 one rounding more is visible.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def checkpoint(
    func: Callable[..., Any],
    inputs: Sequence[Any],
    params: Iterable[Tensor] | None = None,
    flag: bool = True,
    draws_random: bool = True,
) -> Any:
    """Call a function, and under ``flag`` recompute its activations in the backward pass.

    Args:
        func: the function.
        inputs: its positional arguments.
        params: accepted for CompVis callers; autograd finds the parameters by itself.
        flag: whether to recompute (only where a gradient is being recorded).
        draws_random: whether the function draws random numbers (dropout), which must then come again; without,
            the generators' states need not be saved and restored, which costs more than a small layer.

    Returns:
        What the function returns.

    Reference:
        Chen et al. 2016, arXiv 1604.06174.
    """
    if flag and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False, preserve_rng_state=draws_random)
    return func(*inputs)


def zero_module(module: ModuleT) -> ModuleT:
    """Set a module's parameters to zero, so that it starts as a no-op, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def scale_module(module: ModuleT, scale: float) -> ModuleT:
    """Multiply a module's parameters by a number and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a convolution over 1, 2 or 3 dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Build an average pooling over 1, 2 or 3 dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """Build a linear layer."""
    return nn.Linear(*args, **kwargs)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in the precision of its parameters, returned in the input's dtype.

    Under autocast the parameters are float32, and half-precision features are normalised in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        return super().forward(x.to(self.weight.dtype)).type(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Build the UNet's normalisation: 32 groups, epsilon 1e-5."""
    return GroupNorm32(32, channels)
