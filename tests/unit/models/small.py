"""Small diffusion models in every shape of conditioning, for the tests beside this file."""

from __future__ import annotations

from typing import Any

import torch

from ldm.models.diffusion.ddpm import LatentDiffusion

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


def unet_config(**params: Any) -> dict[str, Any]:
    """Describe a UNet of one level and 32 channels."""
    defaults = {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "channel_mult": [1],
        "num_heads": 2,
    }
    return {"target": UNET, "params": defaults | params}


def first_stage_config() -> dict[str, Any]:
    """Describe an autoencoder that halves the size."""
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    }
    return {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {"embed_dim": 4, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}},
    }


def text_config() -> dict[str, Any]:
    """Describe a text encoder of 32 channels and one layer."""
    return {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        },
    }


def build_text_model(unet: dict[str, Any] | None = None, **params: Any) -> LatentDiffusion:
    """Build a text-to-image model with random weights, none of them zero."""
    torch.manual_seed(0)
    defaults = {
        "unet_config": unet_config(use_spatial_transformer=True, context_dim=32, legacy=False, **(unet or {})),
        "first_stage_config": first_stage_config(),
        "cond_stage_config": text_config(),
        "cond_stage_key": "caption",
        "cond_stage_trainable": True,
        "conditioning_key": "crossattn",
        "use_ema": False,
        "monitor": "val/loss_simple_ema",
    }
    return with_random_weights(LatentDiffusion(**(defaults | params)))


def with_random_weights(model: Any) -> Any:
    """Fill what starts at zero, so that every path has an effect."""
    with torch.no_grad():
        for parameter in model.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


def picture_batch(count: int = 2, size: tuple[int, int] = (16, 16)) -> dict[str, Any]:
    """Make a batch as the data set does."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((count, *size, 3), generator=generator) * 2 - 1
    exposures = torch.stack([torch.tensor([23, 0, item, 0]) for item in range(count)])
    return {"image": image, "caption": ["a cat", "a dog", "a hat", "a car"][:count], "exposure": exposures}
