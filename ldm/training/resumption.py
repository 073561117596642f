"""What a resumed run takes from its configuration rather than from the checkpoint, and what it says of itself."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from ldm.checkpoint import read_checkpoint
from ldm.optimizers import set_rate
from ldm.training.curves import Curves
from ldm.training.summary import limited_batches

logger = logging.getLogger(__name__)


class Resumption(pl.Callback):
    """Gives a resumed run the learning rates that its configuration states, and says what is to come.

    A checkpoint holds the rates of the run that wrote it, and Lightning puts them back. Where the
    configuration says something else now, that counts: the schedule goes on where it was, at the new height.
    """

    def __init__(self) -> None:
        self._configured: list[list[float]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the rates that the model has just been given; the checkpoint's come after this hook."""
        self._configured = [
            [_initial_rate(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers
        ]
        self._max_steps = trainer.max_steps

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the limit on steps back."""
        if trainer.state.fn == TrainerFn.FITTING:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the configured rates in place of the checkpoint's, and tell."""
        if trainer.ckpt_path is None:
            return
        changes = [
            change
            for optimizer, rates in zip(trainer.optimizers, self._configured, strict=True)
            for change in _take_rates(trainer, optimizer, rates)
        ]
        if trainer.is_global_zero:
            if changes:
                logger.info("learning rate %s", ", ".join(dict.fromkeys(changes)))
            left = steps_to_come(trainer)
            for curves in trainer.loggers:
                if isinstance(curves, Curves):
                    curves.forget_after(trainer.fit_loop.epoch_loop._batches_that_stepped)
            if left is not None:
                steps = f"{left:,} optimiser step" + ("" if left == 1 else "s")
                logger.info("from step %d: %s to come", trainer.global_step, steps)


def steps_to_come(trainer: pl.Trainer) -> int | None:
    """Count the optimiser steps that a run has still to do.

    Args:
        trainer: a trainer whose training loop is about to start, with its counters restored.

    Returns:
        Optimiser steps; None if nothing limits the run.
    """
    per_epoch = trainer.num_training_batches
    step = trainer.accumulate_grad_batches
    limits: list[float] = []
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps - trainer.global_step)
    if trainer.max_epochs not in (None, -1) and math.isfinite(per_epoch):
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done = batches.processed if trainer.fit_loop.restarting else 0
        after = _batches_of_epochs(trainer, range(trainer.current_epoch + 1, trainer.max_epochs))
        limits.append(math.ceil((per_epoch - done) / step) + sum(math.ceil(batches / step) for batches in after))
    return max(0, int(min(limits))) if limits else None


def _batches_of_epochs(trainer: pl.Trainer, epochs: range) -> list[int]:
    """Count the batches of epochs to come, which the current one need not tell: it may have begun with another size."""
    data: Any = getattr(trainer, "datamodule", None)
    dataset = getattr(data, "datasets", {}).get("train")
    current: Any = trainer.num_training_batches
    known = hasattr(data, "steps_per_epoch") and getattr(dataset, "known_ahead", True)
    if not known or trainer.overfit_batches:  # type: ignore[attr-defined]
        return [int(current)] * len(epochs)

    def batches(epoch: int) -> int:
        return limited_batches(data.steps_per_epoch("train", epoch=epoch), trainer.limit_train_batches)

    if getattr(dataset, "epochs_differ", False):
        return [batches(epoch) for epoch in epochs]
    return [batches(epochs.start)] * len(epochs) if epochs else []


def warn_of_going_back(checkpoint: Path, last: Path) -> None:
    """Say so where a run is continued from an older checkpoint than its last.

    Args:
        checkpoint: the checkpoint to continue from.
        last: the run's ``last.ckpt``, which may be missing or damaged.
    """
    if not last.is_file() or checkpoint.samefile(last):
        return
    try:
        step, reached = (read_checkpoint(path, verify=False).get("global_step") for path in (checkpoint, last))
    except (ValueError, OSError):
        return  # a damaged last.ckpt is a reason to go back; a damaged checkpoint is told when it is loaded
    if isinstance(step, int) and isinstance(reached, int) and step < reached:
        logger.warning(
            "going back to step %d (%s): %s, at step %d, will be replaced", step, checkpoint.name, last.name, reached
        )


def _take_rates(trainer: pl.Trainer, optimizer: Any, rates: list[float]) -> list[str]:
    """Write one optimiser's configured rates into it and its schedules; gives the changes in words."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs if config.scheduler.optimizer is optimizer]
    changes = []
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        saved = _initial_rate(group)
        # Without a schedule (any more), nothing but the configuration says what the rate is.
        was = saved if schedules else group["lr"]
        if was == rate:
            continue
        # From a rate of 0 the schedule's height does not show; it sets the rate again after the first step.
        set_rate(group, "lr", group["lr"] * rate / saved if schedules and saved else rate)
        set_rate(group, "initial_lr", rate)
        changes.append(f"{was:.3g} -> {rate:.3g}")
    if changes:
        for schedule in schedules:
            _set_base(schedule, rates, [float(group["lr"]) for group in optimizer.param_groups])
    return changes


def _initial_rate(group: dict[str, Any]) -> float:
    """Read the rate that a schedule multiplies, or the rate itself where there is none."""
    return float(group.get("initial_lr", group["lr"]))


def _set_base(schedule: Any, rates: list[float], current: list[float]) -> None:
    """Give a schedule, and those it is composed of, new base rates."""
    for inner in getattr(schedule, "_schedulers", ()):
        _set_base(inner, rates, current)
    if hasattr(schedule, "base_lrs"):
        schedule.base_lrs = list(rates)
    if hasattr(schedule, "_last_lr"):
        schedule._last_lr = list(current)
