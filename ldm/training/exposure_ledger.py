"""Keeps a run's exposure ledger."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
from torch import Tensor

from ldm.ledger import keep_entries_before, ledger_entries, write_entries

logger = logging.getLogger(__name__)

LEDGER: Final = "exposure.jsonl"
RANK_PREFIX: Final = "exposure.rank"
NEEDED: Final = ("path", "exposure", "caption", "dropped", "training_size", "crop", "flip", "loss_weight")


class ExposureLedger(pl.Callback):
    """Writes down every exposure that a run trains on, in ``<run>/exposure.jsonl``.

    An entry also has ``run_epoch`` (the run's epoch; ``epoch`` is the data set's own count of its passes, which differs
    where shards are mixed in), ``batch`` (its number in the run's epoch, from 0) and ``step`` (optimiser steps when it
    was done). On several devices each writes a file of its own: ``exposure.rank1.jsonl`` is the second one's. A resumed
    run goes on in the same file; entries beyond the checkpoint it starts from are taken out, for their exposures come
    again.

    Args:
        enabled: False keeps none: a line takes some 300 bytes.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._file: Path | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take out what comes again."""
        # The other ranks have named a folder of their own, by the time at which they started.
        folder = Path(trainer.strategy.broadcast(str(trainer.default_root_dir)))
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rank = trainer.global_rank
        file = folder / (LEDGER if rank == 0 else f"{RANK_PREFIX}{rank}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)  # on another node it may not be there
        counters: Any = trainer.fit_loop.epoch_loop.batch_progress
        batches_done = counters.current.processed
        files = [file, *_files_of_ranks_from(folder, trainer.world_size)] if rank == 0 else [file]
        for kept in files:
            try:
                again = keep_entries_before(kept, trainer.current_epoch, batches_done)
            except OSError as error:
                raise OSError(
                    f"cannot take the exposures that come again out of {kept}: {error.strerror or error}; make room on "
                    "its disk, or keep no ledger with lightning.callbacks.exposure_ledger.params.enabled=false"
                ) from error
            except (ValueError, KeyError, TypeError) as error:
                again = 0
                damaged = kept.with_name(f"{kept.name}.damaged")
                kept.replace(damaged)
                reason = str(error).partition(";")[0] if isinstance(error, ValueError) else f"{kept}: no exposures"
                logger.warning("%s; it is kept as %s, and a new one is begun", reason, damaged.name)
            if again:
                logger.info("%s: %d exposures after the checkpoint come again", kept.name, again)
        self._file = file

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a batch's exposures down."""
        if self._file is None or not isinstance(batch, Mapping) or not all(key in batch for key in NEEDED):
            return
        on_cpu = {key: value.cpu() if isinstance(value := batch[key], Tensor) else value for key in NEEDED}
        place = {"run_epoch": trainer.current_epoch, "batch": batch_idx, "step": trainer.global_step}
        try:
            write_entries(self._file, [{**entry, **place} for entry in ledger_entries(on_cpu)])
        except OSError as error:
            logger.warning("%s cannot be written, and is not kept any more: %s", self._file, error.strerror or error)
            self._file = None


def _files_of_ranks_from(folder: Path, first: int) -> list[Path]:
    """Find the ledgers of devices that a run had and has no more."""
    ranks = {file: file.stem.removeprefix(RANK_PREFIX) for file in folder.glob(f"{RANK_PREFIX}*.jsonl")}
    return [file for file, rank in ranks.items() if rank.isdecimal() and int(rank) >= first]
