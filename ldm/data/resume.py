"""Where a resumed run goes on: the trainer's saved counters, read as batches of an epoch.

Lightning restores its counters from a checkpoint and neither fast-forwards a loader nor always goes on
where it stopped: with a limit on steps it counts an epoch that was saved at its end a second time (and so
leaves one out), it passes over the validation of an epoch that was saved at its last batch, and it goes on
in the middle of a gradient accumulation whose first part is lost. :func:`settle_resume` puts the counters
into the form that makes it continue exactly, and :class:`ldm.data.sampler.EpochLoader` begins where they say.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

logger = logging.getLogger(__name__)


class TrainerProgress:
    """Reads Lightning's count of the current epoch's batches (an :class:`ldm.data.sampler.EpochProgress`)."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def batches_done(self) -> int:
        """Batches of the current epoch whose optimiser step, or share of one, is done."""
        counters: Any = self._trainer.fit_loop.epoch_loop.batch_progress
        return counters.current.processed


def saved_position(trainer: Trainer, exposures_per_epoch: int, exposures_per_batch: int) -> dict[str, int]:
    """Return what a checkpoint needs beside Lightning's counters.

    Args:
        trainer: the running trainer.
        exposures_per_epoch: pictures times repeats.
        exposures_per_batch: exposures in a batch of all ranks together.
    """
    batches = trainer.num_training_batches
    return {
        "exposures_per_epoch": exposures_per_epoch,
        "exposures_per_batch": exposures_per_batch,
        "batches_per_epoch": int(batches)
        if math.isfinite(batches)
        else math.ceil(exposures_per_epoch / exposures_per_batch),
    }


def settle_resume(
    trainer: Trainer, saved: Mapping[str, int], exposures_per_epoch: int, exposures_per_batch: int
) -> None:
    """Make the trainer, whose counters come from a checkpoint, go on exactly where the run stopped.

    To be called once, when the trainer asks for its training loader.

    - Saved at the end of an epoch: the next one begins.
    - Saved within an epoch: it goes on with the first batch that no optimiser step has taken in. (Gradients
      that were being accumulated are not in a checkpoint, so their batches come again.) This also holds
      where a limit on steps ended the run.
    - Saved where a validation falls due, before its end: it follows, from its beginning.

    Where the batch size or the number of ranks has changed, the count of batches is converted.

    Args:
        trainer: a trainer that has loaded a checkpoint.
        saved: from :func:`saved_position`.
        exposures_per_epoch: pictures times repeats, now.
        exposures_per_batch: exposures in a batch of all ranks together, now.
    """
    fit_loop: Any = trainer.fit_loop
    epochs, batches = fit_loop.epoch_progress, fit_loop.epoch_loop.batch_progress
    if epochs.current.started < epochs.current.ready or epochs.current.ready == 0:
        _begin_epoch(fit_loop, epochs.current.processed)
        return
    epoch = epochs.current.ready - 1
    limit = trainer.limit_train_batches
    loader_batches = math.ceil(exposures_per_epoch / exposures_per_batch)
    batches_per_epoch = min(loader_batches, limit) if isinstance(limit, int) else int(loader_batches * limit)
    done = batches.current.processed
    if done >= saved["batches_per_epoch"]:
        if epochs.current.processed > epoch:
            _begin_epoch(fit_loop, epoch + 1)
        else:
            due = _validation_falls_due(trainer, epoch, batches_per_epoch, batches_per_epoch)
            _go_on_after_last_batch(fit_loop, epoch, batches_per_epoch, due)
        return

    if saved["exposures_per_epoch"] != exposures_per_epoch:
        logger.warning(
            "an epoch has %d exposures and had %d when the checkpoint was saved: the rest of this epoch is taken "
            "from the new order, so until its end some pictures come twice and some not at all",
            exposures_per_epoch,
            saved["exposures_per_epoch"],
        )
    shown = done * saved["exposures_per_batch"]
    step = trainer.accumulate_grad_batches
    position = shown // (exposures_per_batch * step) * step
    again = shown - position * exposures_per_batch
    logger.info(
        "going on in epoch %d after batch %d/%d%s",
        epoch + 1,
        position,
        batches_per_epoch,
        f"; {again} exposures of an unfinished optimiser step come again" if again else "",
    )
    if position == 0:
        _begin_epoch(fit_loop, epoch)
    else:
        due = again == 0 and _validation_falls_due(trainer, epoch, position, batches_per_epoch)
        _go_on_within_epoch(fit_loop, epoch, position, due)


def _begin_epoch(fit_loop: Any, epoch: int) -> None:
    for counters in (fit_loop.epoch_progress.current, fit_loop.epoch_progress.total):
        _set_counters(counters, epoch)
    _set_batches(fit_loop, 0)
    _set_restarting(fit_loop, False)


def _validation_falls_due(trainer: Trainer, epoch: int, position: int, batches_per_epoch: int) -> bool:
    """Tell whether the trainer validates after this batch of an epoch, by its own rule."""
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if not trainer.enable_validation or not isinstance(interval, (int, float)):
        return False
    if every is None:
        return trainer.fit_loop.epoch_loop.total_batch_idx % int(interval) == int(interval) - 1
    batches = interval if isinstance(interval, int) else max(1, int(batches_per_epoch * interval))
    return (epoch + 1) % every == 0 and position % batches == 0


def _go_on_within_epoch(fit_loop: Any, epoch: int, position: int, validation_due: bool) -> None:
    counters = fit_loop.epoch_loop.batch_progress.current
    if validation_due and _validation_unfinished(fit_loop):
        _set_batches(fit_loop, position)
        _begin_validation(fit_loop)
    # In a checkpoint from the end of a batch, the batch is not completed yet: Lightning knows this form and
    # also counts the step for the loggers then, so it stays as it is.
    elif not (counters.processed == position == counters.completed + 1):
        _set_batches(fit_loop, position)
    _mark_epoch_unfinished(fit_loop, epoch)


def _go_on_after_last_batch(fit_loop: Any, epoch: int, batches_per_epoch: int, validation_due: bool) -> None:
    progress = fit_loop.epoch_loop.batch_progress
    saved_at_batch_end = progress.current.completed < progress.current.processed
    if validation_due and _validation_unfinished(fit_loop):
        _begin_validation(fit_loop)
    elif saved_at_batch_end:
        # What Lightning does at the end of a batch, after its checkpoints: count the step for the loggers.
        fit_loop.epoch_loop._batches_that_stepped += 1
    _set_batches(fit_loop, batches_per_epoch)
    progress.is_last_batch = True
    _mark_epoch_unfinished(fit_loop, epoch)


def _validation_unfinished(fit_loop: Any) -> bool:
    batches = fit_loop.epoch_loop.batch_progress.current
    validation = fit_loop.epoch_loop.val_loop.batch_progress.current
    saved_before_validation = batches.completed < batches.processed
    saved_within_validation = validation.ready != validation.completed
    return saved_before_validation or saved_within_validation


def _begin_validation(fit_loop: Any) -> None:
    validation = fit_loop.epoch_loop.val_loop.batch_progress
    for counters in (validation.current, validation.total):
        # The form of a validation that stopped in its first batch, which Lightning starts again.
        _set_counters(counters, 0)
        counters.ready = counters.started = 1


def _mark_epoch_unfinished(fit_loop: Any, epoch: int) -> None:
    for counters in (fit_loop.epoch_progress.current, fit_loop.epoch_progress.total):
        _set_counters(counters, epoch)
        counters.ready = counters.started = epoch + 1
    _set_restarting(fit_loop, True)


def _set_batches(fit_loop: Any, position: int) -> None:
    progress = fit_loop.epoch_loop.batch_progress
    _set_counters(progress.total, progress.total.processed - progress.current.processed + position)
    _set_counters(progress.current, position)
    progress.is_last_batch = False


def _set_counters(counters: Any, count: int) -> None:
    counters.ready = counters.started = counters.processed = counters.completed = count


def _set_restarting(fit_loop: Any, restarting: bool) -> None:
    # With a limit on steps, Lightning takes every resume for one within an epoch.
    max_steps = fit_loop.epoch_loop.max_steps
    fit_loop.epoch_loop.max_steps = -1
    fit_loop.restarting = restarting
    fit_loop.epoch_loop.max_steps = max_steps
