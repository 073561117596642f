"""Shares a diffusion model's trained networks out over several devices, block by block (FSDP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from ldm.modules.ema import LitEma


def is_trained(module: nn.Module) -> bool:
    """Tell whether anything of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def network_blocks(network: nn.Module) -> list[nn.Module]:
    """Give the parts of a denoising network that are whole on a device one at a time, the network itself last."""
    return [*(each for each in network.modules() if isinstance(each, TimestepEmbedSequential)), network]


def text_encoder_blocks(encoder: nn.Module) -> list[nn.Module]:
    """Give the parts of a text encoder that are whole on a device one at a time, the encoder itself last.

    Empty for an encoder that is no CLIP text model.
    """
    model = getattr(getattr(encoder, "transformer", None), "text_model", None)
    if model is None:
        return []
    # The last norm is also called by itself (clip_skip).
    return [*model.encoder.layers, model.final_layer_norm, model]


@torch.no_grad()
def shard(blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Leave each device its share of the blocks' weights; they are gathered while a block computes, and only then.

    Args:
        blocks: inner ones first; nothing happens to those that are shared out already.
        mesh: the devices, one-dimensional.
    """
    for block in blocks:
        if not isinstance(block, FSDPModule):
            # Also the outermost: weights that stay whole after a validation would miss what is copied into them.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def shard_averages(averages: LitEma, network: nn.Module) -> None:
    """Share moving averages out as the weights that they follow."""
    shadows = dict(averages.named_buffers())
    for name, parameter in network.named_parameters():
        shadow_name = averages.m_name2s_name.get(name)
        if shadow_name is None or not isinstance(parameter, DTensor):
            continue
        shadow = shadows[shadow_name]
        if not isinstance(shadow, DTensor):
            shared = distribute_tensor(
                shadow.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            averages.register_buffer(shadow_name, shared)
