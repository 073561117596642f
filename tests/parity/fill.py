"""Synthetic weights that depend on nothing but a tensor's checkpoint key and shape."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ldm.checkpoint import SCHEDULE_TABLES

COMPUTED = {*SCHEDULE_TABLES, "lvlb_weights", "logvar", "scale_factor", "cond_ids"}
CONSTANT_NAMES = {"position_ids", "num_batches_tracked", "running_mean", "running_var", "logvar", "shift", "scale"}
EMBEDDINGS = {"token_embedding", "position_embedding", "embedding", "label_emb"}


def fill_value(key: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Give the weights for a key, or None where the key keeps its own value."""
    *_, parent, name = ("", *key.split("."))
    if "model_ema" in key.split(".") or key in COMPUTED or name in CONSTANT_NAMES:
        return None
    normals = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    if name == "weight" and parent in EMBEDDINGS:
        values = normals * (1.0 if key.endswith("quantize.embedding.weight") else 0.1)
    elif name == "weight" and len(shape) > 1:
        values = normals / math.sqrt(math.prod(shape[1:]))
    elif name == "weight":
        values = 1.0 + 0.1 * normals
    elif name.endswith("bias"):
        values = 0.1 * normals
    else:
        raise ValueError(f"no rule for {key} of shape {shape}")
    return values.astype(np.float32)


def fill(module: nn.Module) -> int:
    """Overwrite a module's parameters and buffers in place; returns how many were filled."""
    filled = 0
    with torch.no_grad():
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            values = fill_value(key, tuple(tensor.shape))
            if values is not None:
                tensor.copy_(torch.from_numpy(values))
                filled += 1
    return filled
