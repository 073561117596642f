"""The model of a configuration, built from diffusers' and transformers' parts with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

# The text encoder of Stable Diffusion v1, where the configuration gives no numbers of its own.
CLIP_VIT_L_14: Final = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


@dataclass
class Parts:
    """The parts of a latent diffusion model.

    Attributes:
        unet: ``UNet2DConditionModel``.
        vae: ``AutoencoderKL``.
        text_encoder: ``CLIPTextModel``.
        scheduler: ``DDPMScheduler``, which adds the noise.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: Any


def block_types(levels: int, attention_resolutions: Sequence[int], attended: str, plain: str) -> tuple[str, ...]:
    """Choose each level's kind of block.

    Args:
        levels: number of resolutions.
        attention_resolutions: downsampling factors that have attention.
        attended: name of a block with attention.
        plain: name of a block without.

    Returns:
        One name a level, the finest first.
    """
    return tuple(attended if 2**level in attention_resolutions else plain for level in range(levels))


def build_parts(params: Mapping[str, Any]) -> Parts:
    """Build the parts with the numbers of a CompVis configuration.

    Args:
        params: ``model.params``; the UNet is one with a spatial transformer and ``num_heads``.

    Returns:
        The parts, on the current default device.
    """
    unet = params["unet_config"]["params"]
    levels = len(unet["channel_mult"])
    attention = unet["attention_resolutions"]
    down = block_types(levels, attention, "CrossAttnDownBlock2D", "DownBlock2D")
    up = block_types(levels, attention, "CrossAttnUpBlock2D", "UpBlock2D")
    dd = params["first_stage_config"]["params"]["ddconfig"]
    text = dict((params["cond_stage_config"].get("params") or {}).get("text_config") or CLIP_VIT_L_14)
    return Parts(
        unet=UNet2DConditionModel(
            sample_size=params["image_size"],
            in_channels=unet["in_channels"],
            out_channels=unet["out_channels"],
            block_out_channels=tuple(unet["model_channels"] * factor for factor in unet["channel_mult"]),
            layers_per_block=unet["num_res_blocks"],
            down_block_types=down,
            up_block_types=tuple(reversed(up)),
            cross_attention_dim=unet["context_dim"],
            attention_head_dim=unet["num_heads"],  # in diffusers' UNets of Stable Diffusion v1: the number of heads
        ),
        vae=AutoencoderKL(
            in_channels=dd["in_channels"],
            out_channels=dd["out_ch"],
            latent_channels=dd["z_channels"],
            block_out_channels=tuple(dd["ch"] * factor for factor in dd["ch_mult"]),
            layers_per_block=dd["num_res_blocks"],
            down_block_types=("DownEncoderBlock2D",) * len(dd["ch_mult"]),
            up_block_types=("UpDecoderBlock2D",) * len(dd["ch_mult"]),
            sample_size=dd["resolution"],
            scaling_factor=params["scale_factor"],
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        scheduler=DDPMScheduler(
            num_train_timesteps=params["timesteps"],
            beta_start=params["linear_start"],
            beta_end=params["linear_end"],
            beta_schedule="scaled_linear",
        ),
    )
