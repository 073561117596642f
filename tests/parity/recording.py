"""The recorded numbers of the original code, and the model that gave them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.util import instantiate_from_config
from tests.parity.fill import fill

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "oracle"


class Recording:
    """Arrays and scalars recorded from the original code, with their tolerances."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(ASSETS / f"oracle_{name}.npz")
        self.scalars: dict[str, Any] = json.loads((ASSETS / f"oracle_{name}.json").read_text())
        with (ASSETS / "index.tsv").open() as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        self.tolerance = {row["key"]: row["suggested_atol"] for row in rows if row["file"] == f"oracle_{name}.npz"}

    def __getitem__(self, key: str) -> Tensor:
        """Give an array as a tensor."""
        return torch.from_numpy(self.arrays[key])

    def keys(self, prefix: str) -> list[str]:
        """List the arrays whose names begin so."""
        return [key for key in self.arrays.files if key.startswith(prefix)]

    def check(self, key: str, value: Any, at_least: float = 0.0) -> None:
        """Compare a value with the array recorded under a name, within its tolerance (``at_least`` widens it)."""
        value = value.detach().double().numpy() if isinstance(value, Tensor) else np.asarray(value)
        expected = self.arrays[key]
        assert value.shape == expected.shape, f"{key}: shape {value.shape}, recorded {expected.shape}"
        tolerance = self.tolerance[key]
        limit = 0.0 if tolerance == "exact" else max(float(tolerance), at_least)
        difference = float(np.abs(value.astype(np.float64) - expected).max())
        assert difference <= limit, f"{key}: differs by {difference:.3g}, allowed {limit:.3g}"


def build_tiny_sd() -> Any:
    """Build the recorded model with its synthetic weights."""
    config = OmegaConf.to_container(OmegaConf.load(ASSETS / "tiny_A.yaml").model)
    model = instantiate_from_config(config)
    model.filled = fill(model)
    return model.train()
