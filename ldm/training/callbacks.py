"""The run's checkpoints and its small observers."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn

from ldm.training.checkpoint_io import CheckpointWriteError, StreamingCheckpointIO
from ldm.training.stop_signals import Interrupted, StopSignals

logger = logging.getLogger(__name__)

DEFAULT_TOP_K: Final = 3
DEFAULT_FILENAME: Final = "{epoch:02d}-{step:05d}"
NEWEST: Final = {"monitor": "step", "mode": "max"}
"""What makes Lightning's ``ModelCheckpoint`` keep the newest files."""


def model_checkpoint_params(
    given: dict[str, Any], monitor: str | None, validates: bool, folder: Path
) -> dict[str, Any]:
    """Complete the arguments of Lightning's ``ModelCheckpoint``.

    Args:
        given: ``lightning.modelcheckpoint.params`` of the configuration; it wins.
        monitor: the model's ``monitor``, the metric that says which checkpoints are best.
        validates: whether the run has a validation to measure that metric in.
        folder: where the files go.

    Returns:
        Keyword arguments. ``last.ckpt`` is :class:`LastCheckpoint`'s, so ``save_last`` is always off.
    """
    params: dict[str, Any] = {
        "dirpath": str(folder),
        "filename": DEFAULT_FILENAME,
        "save_top_k": DEFAULT_TOP_K,
        # Also in epochs without validation, and where validation runs several times an epoch.
        "save_on_train_epoch_end": True,
        **given,
        "save_last": False,
    }
    by_steps = bool(given.get("every_n_train_steps") or given.get("train_time_interval"))
    if params.get("monitor") is None:
        if monitor is not None and not by_steps and (validates or not monitor.startswith("val")):
            params["monitor"] = monitor
        else:
            # Between validations there is nothing to judge by: keep the newest.
            params.update(NEWEST)
    return params


class MeasuredCheckpoint(ModelCheckpoint):
    """Keeps the best epochs among those whose metric has just been measured.

    Lightning would judge an epoch without a validation by the figure of an earlier one, or drop it.
    """

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self._has_validated = False
        self._has_warned = False

    def is_measured(self, trainer: pl.Trainer) -> bool:
        """Tell whether the metric of the epoch that ends is there."""
        if self.monitor not in self._monitor_candidates(trainer):
            return False
        return self._has_validated or not str(self.monitor).startswith("val")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for a validation."""
        self._has_validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that there was one, and save if that is when to."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._has_validated = True
        if self.is_measured(trainer):
            super().on_validation_end(trainer, pl_module)
        elif not self._has_warned and trainer.is_global_zero:
            self._has_warned = True
            found = ", ".join(name for name in trainer.callback_metrics if name.startswith("val"))
            logger.warning(
                "monitor %s is not among what the validation measures (%s): checkpoints are kept by their step",
                self.monitor,
                found or "nothing",
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the metric is there."""
        if self.is_measured(trainer):
            super().on_train_epoch_end(trainer, pl_module)


class UnmeasuredCheckpoint(ModelCheckpoint):
    """Keeps the newest of the epochs that :class:`MeasuredCheckpoint` cannot judge.

    Args:
        measured: the other one.
        params: as for that one, but for the metric.
    """

    def __init__(self, measured: MeasuredCheckpoint, **params: Any) -> None:
        super().__init__(**{**params, **NEWEST, "save_on_train_epoch_end": True})
        self.measured = measured

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the metric is not there."""
        if not self.measured.is_measured(trainer):
            super().on_train_epoch_end(trainer, pl_module)


def epoch_checkpoints(params: dict[str, Any]) -> list[ModelCheckpoint]:
    """Build what keeps the regular checkpoints.

    Args:
        params: from :func:`model_checkpoint_params`.

    Returns:
        One callback; two where a metric decides, which some epochs may lack.
    """
    by_steps = bool(params.get("every_n_train_steps") or params.get("train_time_interval"))
    if by_steps or params["monitor"] in ("step", "epoch"):
        return [ModelCheckpoint(**params)]
    measured = MeasuredCheckpoint(**params)
    return [measured, UnmeasuredCheckpoint(measured, **params)]


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` at the newest complete optimiser step, however the run ends.

    It is written with every regular checkpoint (whether or not that one was among the best), at the end
    of training, when the run is told to stop, and when training fails after it had made progress. Saving
    never raises over the failure that it follows.

    Args:
        path: the file.
        checkpoint_io: what writes the run's checkpoints.
        signals: the run's stop signals.
        every_n_epochs: as for the regular checkpoints; 0: not by epochs.
        every_n_train_steps: as for the regular checkpoints, in optimiser steps; 0: not by steps.
    """

    def __init__(
        self,
        path: Path,
        checkpoint_io: StreamingCheckpointIO,
        signals: StopSignals,
        every_n_epochs: int = 1,
        every_n_train_steps: int = 0,
    ) -> None:
        self.path = path
        self.checkpoint_io = checkpoint_io
        self.signals = signals
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self._saved: tuple[int, int, int] | None = None
        self._first_step: int | None = None
        self._seen_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals, which Lightning has just claimed for itself."""
        self.signals.install()
        self.signals.deferred = True
        self._first_step = self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by steps, and stop here if asked to."""
        if trainer.global_step == self._seen_step:
            return  # a batch whose gradient waits for others
        self._seen_step = trainer.global_step
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            self.save(trainer)
        if self._asked_to_stop(trainer) and not self._epoch_ends_here(trainer):
            self._save_and_stop(trainer)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Break off a validation if asked to; a resumed run begins it again."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        almost_done = trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch
        if not almost_done and self._asked_to_stop(trainer):
            self._save_and_stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save by epochs, and stop here if asked to."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.save(trainer)
        if self._asked_to_stop(trainer):
            self._save_and_stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end."""
        self.signals.deferred = False
        if self._has_progressed(trainer):
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save what was reached before a failure, if that is worth anything."""
        self.signals.deferred = False
        if isinstance(exception, Interrupted) or trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._has_progressed(trainer) or isinstance(exception, CheckpointWriteError):
            return  # there is nothing to save, or a second try would fail like the first
        if trainer.world_size > 1:
            logger.warning("%s stays as it was: the other devices may not answer any more", self.path)
            return
        try:
            if not _weights_are_finite(pl_module):
                logger.error("%s stays as it was: the model's weights are no longer finite numbers", self.path)
                return
            self._save_and_tell(trainer)
        except Exception as error:  # noqa: BLE001 - whatever this is, it must not hide the failure in flight
            logger.error("%s could not be saved: %s", self.path, error)

    def save(self, trainer: pl.Trainer) -> None:
        """Bring ``last.ckpt`` up to date.

        Args:
            trainer: the trainer, between two optimiser steps.

        Raises:
            OSError: if the file cannot be written.
        """
        if getattr(trainer, "fast_dev_run", False):
            return
        loop: Any = trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        now = (trainer.global_step, epochs.processed, batches.processed)
        if self._saved == now:
            return
        # The regular checkpoint of this very moment has just been written: the same content needs no second copy.
        source = self.checkpoint_io.newest_path
        is_written = (
            source is not None
            and source != self.path
            and source.exists()
            and self.checkpoint_io.newest_can_be_continued
            and self.checkpoint_io.newest_loops == trainer.fit_loop.state_dict()
        )
        if trainer.strategy.broadcast(is_written):  # only the first process writes, and knows what it wrote
            if trainer.is_global_zero and source is not None:
                self.checkpoint_io.duplicate(source, self.path)
            trainer.strategy.barrier("last.ckpt")
        else:
            trainer.save_checkpoint(self.path, weights_only=False)
        self._saved = now

    def _save_and_tell(self, trainer: pl.Trainer) -> None:
        """Save, and say so."""
        self.save(trainer)
        if not getattr(trainer, "fast_dev_run", False):
            logger.info("saved step %d as %s", trainer.global_step, self.path)

    def _has_progressed(self, trainer: pl.Trainer) -> bool:
        """Tell whether training has begun, and made a step since."""
        return self._first_step is not None and trainer.global_step > self._first_step

    def _asked_to_stop(self, trainer: pl.Trainer) -> bool:
        """Tell whether any of the run's processes got a signal, in all of them alike."""
        asked = self.signals.requested is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        return asked

    def _epoch_ends_here(self, trainer: pl.Trainer) -> bool:
        """Tell whether the epoch is over with this batch and no validation holds up its end."""
        loop = trainer.fit_loop.epoch_loop
        return loop.batch_progress.is_last_batch and not loop._should_check_val_epoch()

    def _save_and_stop(self, trainer: pl.Trainer) -> None:
        """Save, then leave the training loop."""
        self._save_and_tell(trainer)
        self.signals.deferred = False
        raise Interrupted(self.signals.requested or signal.SIGINT)


class Beginning(pl.Callback):
    """Remembers whether the training loop was reached, and does what has to wait for that.

    Attributes:
        has_begun: False while Lightning still prepares: places the model, reads the checkpoint to continue.
        first: what the run's first process does then, or None.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.first: Callable[[], None] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note it, and do that."""
        self.has_begun = True
        if self.first is not None and trainer.is_global_zero:
            self.first()


class CUDACallback(pl.Callback):
    """Logs each epoch's time and peak GPU memory."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock also for an epoch that is resumed half-way."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the memory gauge."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report both."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - self._started
        line = f"epoch {trainer.current_epoch + 1} took {seconds:.1f} s"
        if device.type == "cuda":
            line += f", peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        if trainer.is_global_zero:
            logger.info("%s", line)


def _weights_are_finite(module: torch.nn.Module) -> bool:
    """Tell whether training has not blown up."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters() if parameter.requires_grad)
