"""The loop that every sampler shares; each sampler adds one step function.

A sampler visits the timesteps of a table from the last to the first. Devices and dtypes come from the
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.models.diffusion.conditioning import Condition, guided_output
from ldm.models.diffusion.gaussian_diffusion import to_eps, to_x0
from ldm.modules.diffusionmodules.util import (
    extract_into_tensor,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)

NoiseSource = Callable[[Tensor], Tensor]
"""Gives standard normals of a tensor's shape, on its device and of its dtype."""


@dataclass(frozen=True)
class StepTable:
    """The coefficients of the visited timesteps, in increasing order of time.

    Attributes:
        timesteps: int64 (S,).
        alphas: alpha-bar at each timestep, (S,).
        alphas_prev: alpha-bar at the timestep before it, (S,).
        sigmas: standard deviation of the noise that the step adds, (S,).
    """

    timesteps: NDArray[np.int64]
    alphas: NDArray[Any]
    alphas_prev: NDArray[Any]
    sigmas: NDArray[Any]

    def first(self, count: int) -> StepTable:
        """Give the table of the ``count`` lowest timesteps, which are the last ones visited."""
        return StepTable(self.timesteps[:count], self.alphas[:count], self.alphas_prev[:count], self.sigmas[:count])


@dataclass(frozen=True)
class Guide:
    """What steers the network during sampling.

    Attributes:
        cond: the condition.
        uncond: the condition to move away from, or None.
        scale: guidance scale; 1 for none.
        score_corrector: object with ``modify_score(model, eps, x, t, cond, **kwargs)``, or None.
        corrector_kwargs: those keyword arguments.
    """

    cond: Condition = None
    uncond: Condition = None
    scale: float = 1.0
    score_corrector: Any = None
    corrector_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class StepNoise:
    """How a step makes and uses noise.

    Attributes:
        temperature: factor on the added noise.
        dropout: probability of zeroing elements of it.
        repeat: give every batch element the same noise.
        quantize_x0: replace the estimate of x_0 by its nearest codes.
        source: where normals come from; torch's generators if None.
    """

    temperature: float = 1.0
    dropout: float = 0.0
    repeat: bool = False
    quantize_x0: bool = False
    source: NoiseSource | None = None


class Sampler:
    """Base of the samplers.

    Args:
        model: a diffusion model with ``apply_model``, ``alphas_cumprod``, ``num_timesteps``,
            ``parameterization`` and ``q_sample``.
        schedule: accepted for CompVis callers; the model's own schedule is used.
    """

    def __init__(self, model: Any, schedule: str = "linear") -> None:
        self.model = model
        self.schedule = schedule
        self.ddpm_num_timesteps = int(model.num_timesteps)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the timesteps and look their coefficients up.

        Sets ``ddim_timesteps`` (numpy int64) and ``ddim_alphas``, ``ddim_alphas_prev``, ``ddim_sigmas``,
        ``ddim_sqrt_one_minus_alphas`` (float32 tensors on the CPU), each (S,).

        Args:
            ddim_num_steps: S, within 1 and T.
            ddim_discretize: ``uniform`` or ``quad``.
            ddim_eta: 0 for no added noise, 1 for DDPM's.
            verbose: log the tables.
        """
        alphas_cumprod = self.model.alphas_cumprod.double().cpu().numpy()
        timesteps = self.choose_timesteps(ddim_discretize, ddim_num_steps, verbose)
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(alphas_cumprod, timesteps, ddim_eta, verbose)
        self.table = StepTable(timesteps, alphas, alphas_prev, sigmas)
        self.ddim_timesteps = timesteps
        self.ddim_alphas = torch.tensor(alphas, dtype=torch.float32)
        self.ddim_alphas_prev = torch.tensor(alphas_prev, dtype=torch.float32)
        self.ddim_sigmas = torch.tensor(sigmas, dtype=torch.float32)
        self.ddim_sqrt_one_minus_alphas = torch.tensor(np.sqrt(1.0 - alphas), dtype=torch.float32)

    def choose_timesteps(self, method: str, steps: int, verbose: bool = False) -> NDArray[np.int64]:
        """Choose the timesteps to visit: int64 (S,), increasing; see :func:`make_ddim_timesteps`."""
        return make_ddim_timesteps(method, steps, self.ddpm_num_timesteps, verbose)

    def full_table(self, eta: float = 0.0) -> StepTable:
        """Build the table that visits every timestep of the model."""
        alphas = self.model.alphas_cumprod.double().cpu().numpy()
        alphas_prev = np.append(1.0, alphas[:-1])
        sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
        return StepTable(np.arange(self.ddpm_num_timesteps), alphas, alphas_prev, sigmas)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: tuple[int, int, int],
        conditioning: Condition = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        ddim_discretize: str = "uniform",
        noise_source: NoiseSource | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample latents.

        Args:
            S: number of steps, within 1 and T.
            batch_size: B.
            shape: (C, H, W) of one latent.
            conditioning: the condition, for B latents.
            callback: called with each step's number.
            normals_sequence: accepted for CompVis callers; without effect there too.
            img_callback: called with the estimate of x_0 and the step's number.
            quantize_x0: replace each estimate of x_0 by its nearest codes (VQ first stages).
            eta: 0 for DDIM, 1 for DDPM's noise.
            mask: inpainting: 1 where ``x0`` is to be kept, broadcast against the latents.
            x0: the latents to keep there.
            temperature: factor on the added noise.
            noise_dropout: probability of zeroing elements of it.
            score_corrector: see :class:`Guide`.
            corrector_kwargs: see :class:`Guide`.
            verbose: show a progress bar.
            x_T: (B, C, H, W) starting noise; drawn if None.
            log_every_t: keep intermediates every so many table indices.
            unconditional_guidance_scale: guidance scale s; 1 for none.
            unconditional_conditioning: the condition to move away from.
            ddim_discretize: ``uniform`` or ``quad``.
            noise_source: where the normals come from that are drawn; torch's generators if None.

        Returns:
            Latents (B, C, H, W), and intermediates: lists ``x_inter`` and ``pred_x0``, each beginning with x_T.

        Raises:
            ValueError: S out of range, or a mask without ``x0``.
        """
        if mask is not None and x0 is None:
            raise ValueError("sampling with a mask needs x0, the latents to keep under it")
        self.make_schedule(S, ddim_discretize, eta, verbose=False)
        if x_T is not None:
            x = x_T
        elif noise_source is not None:
            x = noise_source(torch.empty((batch_size, *shape), device=self.model.betas.device))
        else:
            x = torch.randn((batch_size, *shape), device=self.model.betas.device)
        return self.loop(
            self.table,
            x,
            Guide(
                conditioning,
                unconditional_conditioning,
                unconditional_guidance_scale,
                score_corrector,
                corrector_kwargs,
            ),
            StepNoise(temperature, noise_dropout, quantize_x0=quantize_x0, source=noise_source),
            mask=mask,
            x0=x0,
            callback=callback,
            img_callback=img_callback,
            log_every_t=log_every_t,
            verbose=verbose,
        )

    @torch.no_grad()
    def loop(
        self,
        table: StepTable,
        x: Tensor,
        guide: Guide,
        noise: StepNoise,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        verbose: bool = False,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Step from the table's last timestep to its first; see :meth:`sample`."""
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        history: list[Tensor] = []
        total = len(table.timesteps)
        for number in tqdm(range(total), desc=type(self).__name__, disable=not verbose):
            index = total - 1 - number
            if mask is not None and x0 is not None:
                t = timestep_batch(table, index, x)
                drawn = None if noise.source is None else noise.source(x0)
                x = self.model.q_sample(x0, t, drawn) * mask + (1.0 - mask) * x
            x, pred_x0 = self.step(x, table, index, guide, noise, history)
            if callback is not None:
                callback(number)
            if img_callback is not None:
                img_callback(pred_x0, number)
            if index % log_every_t == 0 or index == total - 1:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    def step(
        self, x: Tensor, table: StepTable, index: int, guide: Guide, noise: StepNoise, history: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Go one step from the timestep at ``index`` to the one before it.

        Args:
            x: x_t, (B, C, H, W).
            table: the visited timesteps.
            index: which of them.
            guide: what steers the network.
            noise: how noise is added.
            history: the sampler's memory within one loop; multi-step methods append to it.

        Returns:
            x at the previous timestep, and the estimate of x_0.
        """
        raise NotImplementedError

    def predict_eps(self, x: Tensor, t: Tensor, guide: Guide) -> Tensor:
        """Ask the network for the noise in x, whatever it was trained to predict."""
        output = guided_output(self.model.apply_model, x, t, guide.cond, guide.uncond, guide.scale)
        eps = to_eps(self.model, self.model.parameterization, x, t, output)
        if guide.score_corrector is not None:
            kwargs = guide.corrector_kwargs or {}
            eps = guide.score_corrector.modify_score(self.model, eps, x, t, guide.cond, **kwargs)
        return eps

    def predict_x0(self, x: Tensor, t: Tensor, guide: Guide) -> Tensor:
        """Ask the network for the x_0 of x, whatever it was trained to predict."""
        if guide.score_corrector is not None:  # it works on the noise
            return to_x0(self.model, "eps", x, t, self.predict_eps(x, t, guide))
        output = guided_output(self.model.apply_model, x, t, guide.cond, guide.uncond, guide.scale)
        return to_x0(self.model, self.model.parameterization, x, t, output)

    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise clean latents to a timestep of the table, for image-to-image.

        Args:
            x0: (B, C, H, W).
            t: int64 (B,) indices into the table (into all timesteps with ``use_original_steps``).
            use_original_steps: see there.
            noise: standard normals of x0's shape; drawn if None.

        Returns:
            (B, C, H, W).
        """
        alphas = self.model.alphas_cumprod if use_original_steps else self.ddim_alphas
        alphas = alphas.to(device=x0.device, dtype=x0.dtype)
        noise = torch.randn_like(x0) if noise is None else noise
        signal = extract_into_tensor(alphas.sqrt(), t, x0.shape)
        return signal * x0 + extract_into_tensor((1.0 - alphas).sqrt(), t, x0.shape) * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Condition,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        noise_source: NoiseSource | None = None,
        verbose: bool = False,
    ) -> Tensor:
        """Sample from partly noised latents: the last ``t_start`` steps of the table.

        Args:
            x_latent: (B, C, H, W), from :meth:`stochastic_encode` at index ``t_start``.
            cond: the condition.
            t_start: number of steps to go.
            unconditional_guidance_scale: guidance scale.
            unconditional_conditioning: the condition to move away from.
            use_original_steps: visit every timestep of the model.
            callback: called with each step's number.
            mask: inpainting: 1 where ``x0`` is to be kept, broadcast against the latents.
            x0: the latents to keep there.
            noise_source: where the normals come from that are drawn; torch's generators if None.
            verbose: show a progress bar.

        Returns:
            (B, C, H, W).
        """
        table = self.full_table() if use_original_steps else self.table
        guide = Guide(cond, unconditional_conditioning, unconditional_guidance_scale)
        noise = StepNoise(source=noise_source)
        begun = table.first(t_start)
        return self.loop(begun, x_latent, guide, noise, mask, x0, callback, verbose=verbose)[0]


def timestep_batch(table: StepTable, index: int, x: Tensor) -> Tensor:
    """Give the timestep at a table index as int64 (B,) on x's device."""
    return torch.full((x.shape[0],), int(table.timesteps[index]), device=x.device, dtype=torch.int64)


def ddim_update(
    model: Any, x: Tensor, eps: Tensor, table: StepTable, index: int, noise: StepNoise
) -> tuple[Tensor, Tensor]:
    """Move x along the estimated noise to the previous timestep.

    Args:
        model: the diffusion model (for its quantiser).
        x: (B, C, H, W).
        eps: the estimated noise, of that shape.
        table: the visited timesteps.
        index: which of them x is at.
        noise: how noise is added.

    Returns:
        x at the previous timestep, and the estimate of x_0.

    Reference:
        Song et al. 2020, arXiv 2010.02502, eq. 12.
    """
    alpha, alpha_prev = float(table.alphas[index]), float(table.alphas_prev[index])
    sigma = float(table.sigmas[index])
    pred_x0 = (x - (1.0 - alpha) ** 0.5 * eps) / alpha**0.5
    if noise.quantize_x0:
        pred_x0 = model.first_stage_model.quantize(pred_x0)[0]
    if noise.source is None:
        drawn = noise_like(x.shape, x.device, noise.repeat).to(x.dtype)
    else:
        # A source may draw on another device, and a copy that is multiplied by 0 is not worth waiting for.
        drawn = noise.source(x) if sigma > 0.0 else torch.zeros_like(x)
    added = drawn * (sigma * noise.temperature)
    if noise.dropout > 0.0:
        added = F.dropout(added, p=noise.dropout)
    direction = max(0.0, 1.0 - alpha_prev - sigma**2) ** 0.5 * eps
    return alpha_prev**0.5 * pred_x0 + direction + added, pred_x0
