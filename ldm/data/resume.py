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

    from ldm.data.sampler import EpochBatches

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


def saved_position(trainer: Trainer, batches: EpochBatches) -> dict[str, Any]:
    """Return what a checkpoint needs beside Lightning's counters.

    Args:
        trainer: the running trainer.
        batches: the batches it trains on.
    """
    in_epoch = trainer.num_training_batches
    return {
        "exposures_per_epoch": batches.exposures(batches.epoch),
        "exposures_per_batch": batches.together,
        "batches_per_epoch": int(in_epoch) if math.isfinite(in_epoch) else len(batches),
        "accumulate": trainer.accumulate_grad_batches,
        "segments": [list(segment) for segment in batches.segments(batches.epoch)],
        "order": batches.fingerprint(batches.epoch),
    }


def settle_resume(trainer: Trainer, saved: Mapping[str, Any], batches: EpochBatches) -> None:
    """Make the trainer, whose counters come from a checkpoint, go on exactly where the run stopped.

    To be called once, when the trainer asks for its training loader.

    - Saved at the end of an epoch: the next one begins.
    - Saved within an epoch: it goes on with the first batch that no optimiser step has taken in. (Gradients
      that were being accumulated are not in a checkpoint, so their batches come again.) This also holds
      where a limit on steps ended the run.
    - Saved where a validation falls due, before its end: it follows, from its beginning.

    Where the batch size or the number of ranks has changed, the exposures that the epoch has not shown yet are
    planned anew: none is left out and none comes twice.

    Args:
        trainer: a trainer that has loaded a checkpoint.
        saved: from :func:`saved_position`.
        batches: the batches to train on; gets the epoch to go on in, and how it began.
    """
    fit_loop: Any = trainer.fit_loop
    epochs, progress = fit_loop.epoch_progress, fit_loop.epoch_loop.batch_progress
    if epochs.current.started < epochs.current.ready or epochs.current.ready == 0:
        batches.set_epoch(epochs.current.processed)
        _begin_epoch(fit_loop, epochs.current.processed)
        return
    epoch = epochs.current.ready - 1
    batches.set_epoch(epoch)
    done = progress.current.processed
    if done >= saved["batches_per_epoch"]:
        if epochs.current.processed > epoch:
            batches.set_epoch(epoch + 1)
            _begin_epoch(fit_loop, epoch + 1)
        else:
            _tell_how_it_began(saved, done, epoch, batches)
            in_epoch = _limited(trainer, len(batches))
            due = _validation_falls_due(trainer, epoch, in_epoch, in_epoch)
            _go_on_after_last_batch(fit_loop, epoch, in_epoch, due)
        return

    position, again = _go_on_from(saved, done, epoch, batches)
    in_epoch = _limited(trainer, len(batches))
    logger.info(
        "going on in epoch %d after batch %d/%d%s",
        epoch + 1,
        position,
        in_epoch,
        f"; {again} {'batch' if again == 1 else 'batches'} of an unfinished optimiser step come again" if again else "",
    )
    if position == 0:
        _begin_epoch(fit_loop, epoch)
    else:
        due = again == 0 and _validation_falls_due(trainer, epoch, position, in_epoch)
        _go_on_within_epoch(fit_loop, epoch, position, due)


def _go_on_from(saved: Mapping[str, Any], done: int, epoch: int, batches: EpochBatches) -> tuple[int, int]:
    """Find the batch to go on with, and tell ``batches`` how the epoch began.

    Returns:
        The batch's number in the epoch, and how many batches from there on had been seen but not taken in.
    """
    settled = sum(count for _, count in saved.get("segments", ()))
    accumulate = saved.get("accumulate", 1)
    taken_in = max(settled, done // accumulate * accumulate)
    now, then = batches.exposures(epoch), saved["exposures_per_epoch"]
    order = batches.fingerprint(epoch)
    if now != then or saved.get("order", order) != order:
        logger.warning(
            "%s when the checkpoint was saved: the rest of this epoch is taken from the new order, so until its end "
            "some pictures come twice and some not at all",
            f"an epoch has {now} exposures and had {then}"
            if now != then
            else "the seed or the pictures' shapes are others than",
        )
        shown = taken_in * saved["exposures_per_batch"]
        return min(shown // batches.together, len(batches) - 1), done - taken_in
    _tell_how_it_began(saved, taken_in, epoch, batches)
    return taken_in, done - taken_in


def _tell_how_it_began(saved: Mapping[str, Any], taken_in: int, epoch: int, batches: EpochBatches) -> None:
    """Tell ``batches`` with what batch sizes the first batches of an epoch were taken."""
    segments = [(size, count) for size, count in saved.get("segments", ())]
    if saved["exposures_per_batch"] != batches.together:
        segments.append((saved["exposures_per_batch"], taken_in - sum(count for _, count in segments)))
    batches.begin_with(epoch, [segment for segment in segments if segment[1]])


def _limited(trainer: Trainer, batches: int) -> int:
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


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
        _hold_step_limit_back(fit_loop)
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
        _hold_step_limit_back(fit_loop)
    elif saved_at_batch_end:
        # What Lightning does at the end of a batch, after its checkpoints: count the step for the loggers.
        fit_loop.epoch_loop._batches_that_stepped += 1
    _set_batches(fit_loop, batches_per_epoch)
    progress.is_last_batch = True
    _mark_epoch_unfinished(fit_loop, epoch)


def _validation_unfinished(fit_loop: Any) -> bool:
    batches = fit_loop.epoch_loop.batch_progress.current
    validation = fit_loop.epoch_loop.val_loop.batch_progress
    saved_before_validation = batches.completed < batches.processed
    done = validation.current.completed
    # A batch counts as ready when it has been fetched: a failure to fetch one shows only in that it was not the last.
    finished = done > 0 and done == validation.current.ready and validation.is_last_batch
    return saved_before_validation or not finished


def _begin_validation(fit_loop: Any) -> None:
    validation = fit_loop.epoch_loop.val_loop.batch_progress
    for counters in (validation.current, validation.total):
        # The form of a validation that stopped in its first batch, which Lightning starts again.
        _set_counters(counters, 0)
        counters.ready = counters.started = 1


def _hold_step_limit_back(fit_loop: Any) -> None:
    """Let a run that stands at its last step begin once more, for the validation that it owes.

    Lightning looks at the limit first and would not. :class:`ldm.training.resumption.Resumption` puts it back when the
    validation is done.
    """
    if fit_loop.epoch_loop.global_step >= fit_loop.epoch_loop.max_steps:
        fit_loop.epoch_loop.max_steps = -1


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
