"""Ancestral sampling: one step for each timestep that the model was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.models.diffusion import gaussian_diffusion
from ldm.modules.diffusionmodules.util import noise_like

if TYPE_CHECKING:
    from ldm.models.diffusion.conditioning import Condition
    from ldm.models.diffusion.ddpm import DDPM


def p_mean_variance(
    model: DDPM,
    x: Tensor,
    cond: Condition,
    t: Tensor,
    clip_denoised: bool,
    quantize_denoised: bool = False,
    score_corrector: Any = None,
    corrector_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give mean, variance and clipped log-variance of p(x_{t-1} | x_t), and the estimate of x_0.

    Args:
        model: the diffusion model.
        x: x_t, (B, C, H, W).
        cond: the condition, or None.
        t: int64 (B,).
        clip_denoised: clip the estimate of x_0 to [-1, 1].
        quantize_denoised: replace it by its nearest codes (VQ first stages).
        score_corrector: see :class:`~ldm.models.diffusion.sampling.Guide`.
        corrector_kwargs: see there.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 11.
    """
    output = model.apply_model(x, t, cond)
    if score_corrector is not None:
        output = score_corrector.modify_score(model, output, x, t, cond, **(corrector_kwargs or {}))
    x_recon = gaussian_diffusion.to_x0(model, model.parameterization, x, t, output)
    if clip_denoised:
        x_recon = x_recon.clamp(-1.0, 1.0)
    if quantize_denoised:
        x_recon = model.first_stage_model.quantize(x_recon)[0]
    mean, variance, log_variance = model.q_posterior(x_recon, x, t)
    return mean, variance, log_variance, x_recon


@torch.no_grad()
def p_sample(
    model: DDPM,
    x: Tensor,
    cond: Condition,
    t: Tensor,
    clip_denoised: bool,
    repeat_noise: bool = False,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Draw x_{t-1} given x_t; no noise is added where t is 0.

    Args:
        model: the diffusion model.
        x: x_t, (B, C, H, W).
        cond: the condition, or None.
        t: int64 (B,).
        clip_denoised: clip the estimate of x_0 to [-1, 1].
        repeat_noise: give every batch element the same noise.
        temperature: factor on the noise.
        noise_dropout: probability of zeroing elements of it.
        **kwargs: further arguments of :func:`p_mean_variance`.

    Returns:
        x_{t-1}, and the estimate of x_0.
    """
    mean, _, log_variance, x0 = p_mean_variance(model, x, cond, t, clip_denoised, **kwargs)
    noise = noise_like(x.shape, x.device, repeat_noise).to(x.dtype) * temperature
    if noise_dropout > 0.0:
        noise = F.dropout(noise, p=noise_dropout)
    moves = (t != 0).to(x.dtype).reshape(-1, *([1] * (x.ndim - 1)))
    return mean + moves * torch.exp(0.5 * log_variance) * noise, x0


@torch.no_grad()
def p_sample_loop(
    model: DDPM,
    cond: Condition,
    shape: Sequence[int],
    x_T: Tensor | None = None,
    verbose: bool = True,
    callback: Callable[[int], None] | None = None,
    timesteps: int | None = None,
    quantize_denoised: bool = False,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    img_callback: Callable[[Tensor, int], None] | None = None,
    start_T: int | None = None,
    log_every_t: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Sample by stepping through every timestep.

    Args:
        model: the diffusion model.
        cond: the condition, or None.
        shape: (B, C, H, W).
        x_T: starting noise; drawn if None.
        verbose: show a progress bar.
        callback: called with t after each step.
        timesteps: begin this many steps before the end; all if None.
        quantize_denoised: see :func:`p_mean_variance`.
        mask: inpainting: 1 where x0 is to be kept.
        x0: what to keep there.
        img_callback: called with x and t after each step.
        start_T: upper bound on ``timesteps``.
        log_every_t: timesteps between intermediates; the model's if None.

    Returns:
        The samples, and the intermediates, beginning with x_T.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, algorithm 2.
    """
    log_every_t = log_every_t or model.log_every_t
    x = torch.randn(tuple(shape), device=model.betas.device) if x_T is None else x_T
    steps = min(timesteps or model.num_timesteps, start_T or model.num_timesteps)
    intermediates = [x]
    for index in tqdm(reversed(range(steps)), total=steps, desc="sampling", disable=not verbose):
        t = torch.full((shape[0],), index, device=x.device, dtype=torch.int64)
        cond_t = model.noised_condition(cond, t)
        x, _ = p_sample(model, x, cond_t, t, model.clip_denoised, quantize_denoised=quantize_denoised)
        if mask is not None and x0 is not None:
            x = model.q_sample(x0, t) * mask + (1.0 - mask) * x
        if index % log_every_t == 0 or index == steps - 1:
            intermediates.append(x)
        if callback is not None:
            callback(index)
        if img_callback is not None:
            img_callback(x, index)
    return x, intermediates
