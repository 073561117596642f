"""A toy that can be trained on latents: the mean colours of a picture's cells."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import exposure
from tests.unit.training.toy import ToyDiffusion

FACTOR = 8


class LatentToy(ToyDiffusion):
    """Encodes pictures as a first stage does, and counts how often; trains on the colour either way."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.encoded = 0

    def encode_moments(self, pictures: Tensor) -> Tensor:
        """Give the mean colour of each cell, and a log-variance of zero: (B, 6, H / 8, W / 8)."""
        self.encoded += len(pictures)
        mean = F.avg_pool2d(pictures.permute(0, 3, 1, 2), FACTOR)
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        if "image" in batch:
            return super().loss(batch)
        noise = exposure.randn("noise", batch["exposure"].cpu(), (3,)).to(self.device)
        return F.mse_loss(self.model(batch["moments"][:, :3].mean(dim=(2, 3)) + noise), noise)
