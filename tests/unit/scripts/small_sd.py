"""A small Stable Diffusion v1 model on disk, with synthetic weights that make every part's output matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.util import instantiate_from_config
from tests.parity.fill import fill

CONFIG = Path(__file__).resolve().parents[2] / "assets" / "oracle" / "tiny_A.yaml"


def small_config() -> dict[str, Any]:
    """Give the config as plain containers."""
    config: Any = OmegaConf.to_container(OmegaConf.load(CONFIG))
    return config


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """Write a config as YAML."""
    OmegaConf.save(OmegaConf.create(dict(config)), path)
    return path


def build(config: Mapping[str, Any]) -> Any:
    """Build a config's model with synthetic weights."""
    model = instantiate_from_config(config["model"])
    fill(model)
    return model


def lightning_checkpoint(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Surround weights by what Lightning saves with them."""
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": dict(weights),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"Logger": {"seen": 1}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(50_000)}}}],
        "lr_schedulers": [{"last_epoch": 120}],
        "hyper_parameters": {"base_learning_rate": 1e-6},
    }
