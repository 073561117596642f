"""The picture rows that ``log_images`` returns: what the model was shown and what it makes of the captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import log_txt_as_img

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion


@torch.no_grad()
def latent_rows(
    model: LatentDiffusion,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 4,
    sample: bool = True,
    ddim_steps: int = 40,
    ddim_eta: float = 1.0,
    unconditional_guidance_scale: float = 5.0,
    unconditional_guidance_label: str = "",
) -> dict[str, Tensor]:
    """Make rows of pictures from a batch: inputs, reconstructions, samples without and with guidance.

    Samples have the size and aspect of the batch, and use the averaged weights where there are any. Random
    numbers are drawn from torch's generators.

    Args:
        model: a latent diffusion model.
        batch: as the model is trained on.
        N: pictures of the batch to use, at most.
        n_row: accepted for CompVis configs; grids are laid out by the logger.
        sample: make samples.
        ddim_steps: sampling steps.
        ddim_eta: 0 for DDIM, 1 for DDPM's noise.
        unconditional_guidance_scale: guidance scale of the guided samples; none are made at 1 and below.
        unconditional_guidance_label: the prompt to move away from.

    Returns:
        Pictures float32 (n, 3, H, W), about within [-1, 1], by name: ``inputs``, ``reconstruction``,
        ``conditioning`` (captions, drawn), ``samples``, ``samples_cfg_scale_5.00``.
    """
    z, cond, pictures, captions = model.get_input(
        batch, model.first_stage_key, force_c_encode=True, return_pictures=True, return_original_cond=True, bs=N
    )
    rows = {"inputs": pictures, "reconstruction": decode_one_by_one(model, z)}
    if isinstance(captions, (list, tuple)) and captions and isinstance(captions[0], str):
        rows["conditioning"] = log_txt_as_img((pictures.shape[3], pictures.shape[2]), captions)
    if not sample:
        return rows
    sampler = DDIMSampler(model)
    ddim_steps = min(ddim_steps, model.num_timesteps)
    count, shape = len(z), tuple(z.shape[1:])
    with model.ema_scope():
        plain, _ = sampler.sample(ddim_steps, count, shape, cond, eta=ddim_eta, verbose=False)
        rows["samples"] = decode_one_by_one(model, plain)
        if unconditional_guidance_scale > 1.0 and "conditioning" in rows:
            guided, _ = sampler.sample(
                ddim_steps,
                count,
                shape,
                cond,
                eta=ddim_eta,
                verbose=False,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=model.get_learned_conditioning([unconditional_guidance_label] * count),
            )
            rows[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = decode_one_by_one(model, guided)
    return rows


@torch.no_grad()
def pixel_rows(
    model: DDPM,
    batch: Mapping[str, Any],
    N: int = 8,
    sample: bool = True,
    ddim_steps: int = 40,
    ddim_eta: float = 1.0,
) -> dict[str, Tensor]:
    """Make the rows of an unconditional model on pictures: ``inputs`` and ``samples``; see :func:`latent_rows`."""
    pictures = model.get_input(batch, model.first_stage_key)[:N].to(model.device)
    rows = {"inputs": pictures}
    if sample:
        shape = (pictures.shape[1], pictures.shape[2], pictures.shape[3])
        with model.ema_scope():
            rows["samples"], _ = DDIMSampler(model).sample(
                min(ddim_steps, model.num_timesteps), len(pictures), shape, eta=ddim_eta, verbose=False
            )
    return rows


def decode_one_by_one(model: LatentDiffusion, z: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) singly: a whole batch would need more memory than a training step."""
    return torch.cat([model.decode_first_stage(single) for single in z.split(1)])
