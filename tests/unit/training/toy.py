"""A model of a few dozen weights that follows the interfaces of the real one, so that runs take milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import exposure


class ToyDiffusion(pl.LightningModule):
    """Predicts noise from a noisy picture's mean colour; records what it was shown."""

    learning_rate: float

    def __init__(self, monitor: str | None = None, fail_at_step: int = -1, model_lr: float | None = None) -> None:
        super().__init__()
        self.monitor = monitor
        self.fail_at_step = fail_at_step
        self.model_lr = model_lr
        self.model = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Dropout(0.0), nn.Linear(8, 3))
        self.first_stage_model = nn.Linear(3, 3)
        self.first_stage_model.requires_grad_(False)
        self.shown: list[tuple[int, ...]] = []
        self.losses: list[float] = []
        self.validated: list[float] = []

    def loss(self, batch: dict[str, Any]) -> Tensor:
        noise = exposure.randn("noise", batch["exposure"].cpu(), (3,)).to(self.device)
        colour = batch["image"].mean(dim=(1, 2))
        return F.mse_loss(self.model(colour + noise), noise)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at_step:
            raise RuntimeError("the toy broke")
        loss = self.loss(batch)
        self.shown += [tuple(row) for row in batch["exposure"].tolist()]
        self.losses.append(loss.item())
        self.log("train/loss", loss, batch_size=len(batch["exposure"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.validated.append(loss.item())
        self.log("val/loss", loss, on_epoch=True, batch_size=len(batch["exposure"]))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), batch_size=len(batch["exposure"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def log_images(self, batch: dict[str, Any], N: int = 8, scale: float = 5.0) -> dict[str, Tensor]:
        images = batch["image"][:N].permute(0, 3, 1, 2)
        samples = torch.randn_like(images)
        return {"inputs": images, "reconstruction": images, "samples": samples, "samples_cfg_scale_5.00": samples}


def make_pictures(root: Path, per_folder: int = 3, folders: int = 2, size: int = 16) -> Path:
    """Write plain pictures of different colours into subfolders."""
    for folder in range(folders):
        (root / f"folder{folder}").mkdir(parents=True, exist_ok=True)
        for number in range(per_folder):
            colour = (40 * number % 256, 100 * folder % 256, 17 * (number + folder) % 256)
            Image.new("RGB", (size, size), colour).save(root / f"folder{folder}" / f"a plain square {number}_.png")
    return root
