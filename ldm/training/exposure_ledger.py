"""Keeps a run's exposure ledger."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
from torch import Tensor

from ldm.data.ledger import keep_entries_before, ledger_entries, write_entries
from ldm.data.resume import TrainerProgress

logger = logging.getLogger(__name__)

LEDGER: Final = "exposure.jsonl"
NEEDED: Final = ("path", "exposure", "caption", "dropped", "training_size", "crop", "flip", "loss_weight")


class ExposureLedger(pl.Callback):
    """Writes down every exposure that a run trains on, in ``<run>/exposure.jsonl``.

    An entry also has ``batch`` (its number in the epoch) and ``step`` (optimiser steps before it). On several
    devices each writes a file of its own: ``exposure.rank1.jsonl`` is the second one's. A resumed run goes on in
    the same file; entries beyond the checkpoint it starts from are taken out, for their exposures come again.

    Args:
        enabled: False keeps none: a line takes some 300 bytes.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def _file(self, trainer: pl.Trainer) -> Path:
        name = LEDGER if trainer.global_rank == 0 else f"exposure.rank{trainer.global_rank}.jsonl"
        return Path(trainer.default_root_dir) / name

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take out what comes again."""
        if not self.enabled or not Path(trainer.default_root_dir).is_dir():
            return
        again = keep_entries_before(self._file(trainer), trainer.current_epoch, TrainerProgress(trainer).batches_done)
        if again:
            logger.info("%s: %d exposures after the checkpoint come again", self._file(trainer).name, again)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a batch's exposures down."""
        if not self.enabled or not isinstance(batch, Mapping) or not all(key in batch for key in NEEDED):
            return
        on_cpu = {key: value.cpu() if isinstance(value := batch[key], Tensor) else value for key in NEEDED}
        place = {"batch": batch_idx, "step": trainer.global_step}
        write_entries(self._file(trainer), [{**entry, **place} for entry in ledger_entries(on_cpu)])
