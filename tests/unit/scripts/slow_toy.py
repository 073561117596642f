"""A toy that leaves time to be killed in."""

from __future__ import annotations

import time
from typing import Any

import torch

from tests.unit.training.toy import ToyDiffusion


class SlowToy(ToyDiffusion):
    """Takes a tenth of a second for each step."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        time.sleep(0.1)
        return super().training_step(batch, batch_idx)
