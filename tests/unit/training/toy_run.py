"""Runs of the toy model, with the real trainer, callbacks and data, in milliseconds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.data.data_module import DataModuleFromConfig
from ldm.training.run_directory import RunDirectory
from ldm.training.stop_signals import StopSignals
from ldm.training.trainer import build_trainer
from tests.unit.training.toy import ToyDiffusion


@dataclass
class ToyRun:
    """What a toy run leaves behind."""

    trainer: pl.Trainer
    model: ToyDiffusion
    directory: RunDirectory
    signals: StopSignals

    @property
    def last(self) -> Path:
        return self.directory.last_checkpoint

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.model.parameters()])


def toy_run(
    folder: Path,
    pictures: Path,
    checkpoint: Path | None = None,
    **options: Any,
) -> ToyRun:
    """Train the toy as :func:`prepare_toy_run` builds it; exceptions come through."""
    toy, data = prepare_toy_run(folder, pictures, **options)
    with warnings.catch_warnings(), toy.signals:
        warnings.simplefilter("ignore")
        toy.trainer.fit(toy.model, datamodule=data, ckpt_path=checkpoint)
    return toy


def prepare_toy_run(
    folder: Path,
    pictures: Path,
    batch_size: int = 2,
    repeats: int = 2,
    num_workers: int = 0,
    lightning: dict[str, Any] | None = None,
    extra: list[Callback] | None = None,
    model: ToyDiffusion | None = None,
    validation: bool = True,
    images: bool = False,
    on_nan: str = "stop",
    on_oom: str = "stop",
    **trainer_arguments: Any,
) -> tuple[ToyRun, DataModuleFromConfig]:
    """Build the toy's trainer and data as a run does."""
    torch.manual_seed(0)
    model = model or ToyDiffusion()
    model.learning_rate = 0.01
    directory = RunDirectory(folder, "stamp")
    directory.create()
    root = str(pictures)
    data = DataModuleFromConfig(
        batch_size=batch_size,
        num_workers=num_workers,
        train={
            "target": "ldm.data.every_dream.EveryDreamBatch",
            "params": {"data_root": root, "size": 16, "repeats": repeats},
        },
        validation=(
            {"target": "ldm.data.ed_validate.EDValidateBatch", "params": {"data_root": root, "size": 16}}
            if validation
            else None
        ),
    )
    signals = StopSignals()
    section = {
        "callbacks": {"image_logger": {"params": {"batch_frequency": 1, "max_images": 2, "disabled": not images}}},
        **(lightning or {}),
    }
    section["trainer"] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        **section.get("trainer", {}),
        **trainer_arguments,
    }
    trainer = build_trainer(section, directory, signals, batch_size, model.monitor, validation, on_nan, on_oom=on_oom)
    trainer.callbacks[0:0] = extra or []  # type: ignore[attr-defined]
    return ToyRun(trainer, model, directory, signals), data


class StopAt(Callback):
    """Sends the run a stop signal's request at a chosen moment."""

    def __init__(self, signals: StopSignals | None = None, step: int = -1, validation_batch: int = -1) -> None:
        self.signals = signals
        self.step = step
        self.validation_batch = validation_batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step + 1 == self.step:
            self._stop()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == self.validation_batch:
            self._stop()

    def _stop(self) -> None:
        assert self.signals is not None
        self.signals.requested = 2
