"""The run's checkpoints and its small observers."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn

from ldm.checkpoint import read_checkpoint
from ldm.training.checkpoint_io import CheckpointWriteError, StreamingCheckpointIO, file_size
from ldm.training.loss_guard import NotFiniteError
from ldm.training.run_directory import LAST_CHECKPOINT
from ldm.training.sharding import weights_are_finite
from ldm.training.stop_signals import NOTHING, Interrupted, StopSignals, stop_of

logger = logging.getLogger(__name__)

DEFAULT_TOP_K: Final = 3
DEFAULT_FILENAME: Final = "{epoch:02d}-{step:05d}"
NEWEST_PREFIX: Final = "newest-"
"""What the names of the newest checkpoints begin with where a metric chooses others beside them."""

NOT_FINITE: Final = "the model's weights are no longer finite numbers"
TIME_SPAN: Final = re.compile(r"\d+(:\d+){3}")
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
    keep_last_n = given.get("keep_last_n", 0)
    params: dict[str, Any] = {
        "dirpath": str(folder),
        "filename": DEFAULT_FILENAME,
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
    if params["monitor"] == NEWEST["monitor"] and keep_last_n:
        top_k = params.get("save_top_k", 0)
        params.update(save_top_k=top_k if top_k == -1 else max(top_k, keep_last_n), keep_last_n=0)
    params.setdefault("save_top_k", DEFAULT_TOP_K)
    return params


def time_span(text: str) -> timedelta:
    """Read a span of time.

    Args:
        text: days, hours, minutes and seconds, such as ``00:02:00:00``.

    Returns:
        The span.

    Raises:
        ValueError: the text is no such thing.
    """
    if not TIME_SPAN.fullmatch(text):
        raise ValueError(f"{text!r} is no time span; write days:hours:minutes:seconds: 00:02:00:00")
    days, hours, minutes, seconds = map(int, text.split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` at complete optimiser steps, and with what YAML cannot say to that one.

    Args:
        keep_last_n: how many of the newest checkpoints to keep beside the best; 0: only the best.
        verify: whether each file is read back before an older one may go.
        background: whether a thread writes the files, from a copy in the host's memory.
        train_time_interval: the time between two checkpoints, as days:hours:minutes:seconds.
        params: Lightning's own.
    """

    def __init__(
        self,
        keep_last_n: int = 0,
        verify: bool = True,
        background: bool = False,
        train_time_interval: str | None = None,
        **params: Any,
    ) -> None:
        interval = None if train_time_interval is None else time_span(train_time_interval)
        super().__init__(train_time_interval=interval, **params)
        self.keep_last_n = keep_last_n
        self.verify = verify
        self.background = background
        self._seen_step = 0

    @property
    def state_key(self) -> str:
        """What this one's state is called inside a checkpoint: as Lightning's own, which older files hold."""
        return super().state_key.replace("RunCheckpoint", "ModelCheckpoint", 1)

    @property
    def saved_step(self) -> int:
        """The optimiser step of the newest file."""
        return self._last_global_step_saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back which checkpoints are the best, as many of them as this run keeps (Lightning takes all).

        Files beyond those stay where they are: a lower ``save_top_k`` deletes nothing of what was kept before.
        """
        super().load_state_dict(_with_own_files(state_dict, Path(self.dirpath or "")))
        best_first = sorted(self.best_k_models, key=lambda path: self.best_k_models[path], reverse=self.mode == "max")
        surplus = best_first[self.save_top_k :] if self.save_top_k >= 0 else []
        for path in surplus:
            del self.best_k_models[path]
        if surplus:
            logger.info(
                "save_top_k is %d now; left to you, and never deleted by the run: %s",
                self.save_top_k,
                ", ".join(surplus),
            )
        if self.best_k_models and len(self.best_k_models) == self.save_top_k:
            self.kth_best_model_path = best_first[self.save_top_k - 1]
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting."""
        super().on_train_start(trainer, pl_module)
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, but not while gradients wait for others: no file holds those."""
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def file_exists(self, filepath: Any, trainer: pl.Trainer) -> bool:
        """Tell whether a file's name is taken, so that a new file needs another one (``…-v1``).

        A file of this very step that is not among those kept is what the run itself wrote after the checkpoint that
        it was continued from, and before it was killed: it is written anew, and must not stay beside its like.
        """
        exists = super().file_exists(filepath, trainer)
        if not exists or str(filepath) in self.best_k_models:
            return exists
        again = trainer.is_global_zero and _step_of(Path(filepath)) == trainer.global_step
        return not trainer.strategy.broadcast(again)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        """Save, and delete what that replaces, unless the weights are good for nothing."""
        if weights_are_finite(trainer, trainer.lightning_module):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif trainer.is_global_zero:
            logger.error("step %d is not saved: %s", trainer.global_step, NOT_FINITE)


class MeasuredCheckpoint(RunCheckpoint):
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


class UnmeasuredCheckpoint(RunCheckpoint):
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


class NewestCheckpoints(RunCheckpoint):
    """Keeps the newest checkpoints beside the best, as second names of those where they are the same.

    Args:
        checkpoint_io: what writes the run's checkpoints.
        params: as for the best, but for the metric; ``keep_last_n`` says how many.
    """

    def __init__(self, checkpoint_io: StreamingCheckpointIO, **params: Any) -> None:
        own = {"save_top_k": params["keep_last_n"], "filename": NEWEST_PREFIX + params["filename"]}
        super().__init__(**{**params, **NEWEST, **own})
        self.checkpoint_io = checkpoint_io

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for what a kill left undone."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None:
            self.take_up(trainer, Path(trainer.ckpt_path))

    def take_up(self, trainer: pl.Trainer, checkpoint: Path, is_end: bool = False) -> None:
        """Give the checkpoint that a run goes on from its second name, and count it among those kept.

        A file gets that name after it has been written, and cannot know of it; a kill may have kept it from it.

        Args:
            trainer: the trainer, with the checkpoint's state.
            checkpoint: the checkpoint, which has been read through.
            is_end: whether nothing is going to be saved any more: then what is too old is deleted now, and not after
                the next save.
        """
        if self.dirpath is None:
            return
        named = checkpoint.with_name(NEWEST_PREFIX + checkpoint.name)
        is_regular = checkpoint.parent == Path(self.dirpath) and checkpoint.name != LAST_CHECKPOINT
        is_regular = is_regular and not checkpoint.name.startswith(NEWEST_PREFIX)
        if trainer.is_global_zero and is_regular and not named.exists():
            self.checkpoint_io.duplicate(checkpoint, named)
        unknown = [
            path for path in Path(self.dirpath).glob(f"{NEWEST_PREFIX}*.ckpt") if str(path) not in self.best_k_models
        ]
        own = [str(path) for path in unknown if _step_of(path) == trainer.global_step]
        for path in trainer.strategy.broadcast(own):
            self.best_k_models[path] = torch.tensor(trainer.global_step)
        for path in self._take_out_oldest() if is_end else ():
            if trainer.is_global_zero:
                self.checkpoint_io.disk.remove(Path(path))
        if self.best_k_models:
            self.kth_best_model_path = min(self.best_k_models, key=lambda path: self.best_k_models[path])
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def _update_best_and_save(
        self, current: torch.Tensor, trainer: pl.Trainer, monitor_candidates: dict[str, torch.Tensor]
    ) -> None:
        """Save, and delete what is then too old."""
        super()._update_best_and_save(current, trainer, monitor_candidates)
        for path in self._take_out_oldest():
            self._remove_checkpoint(trainer, path)

    def _take_out_oldest(self) -> list[str]:
        """Count what is too old no longer among those kept; gives the files."""
        oldest_first = sorted(self.best_k_models, key=lambda path: self.best_k_models[path])
        oldest = oldest_first[: max(0, len(oldest_first) - self.save_top_k)]
        for path in oldest:
            del self.best_k_models[path]
        return oldest

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write a file, or give the one that has just been written another name."""
        if self.save_weights_only or not give_second_name(trainer, self.checkpoint_io, Path(filepath)):
            super()._save_checkpoint(trainer, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath


def _with_own_files(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Leave out the files outside a folder that a checkpoint names: what drops out of the best is deleted."""

    def is_own(path: Any) -> bool:
        return isinstance(path, str) and Path(os.path.abspath(path)).parent == folder and path.endswith(".ckpt")

    if state.get("dirpath") != str(folder):
        return dict(state)  # Lightning takes no files from another folder
    best = state.get("best_k_models") or {}
    strangers = [path for path in best if not is_own(path)]
    strangers += [
        path for path in map(state.get, ("kth_best_model_path", "last_model_path")) if path and not is_own(path)
    ]
    if strangers:
        logger.warning(
            "left alone: the checkpoint names files as the run's that do not lie in %s: %s",
            folder,
            ", ".join(map(repr, dict.fromkeys(strangers))),
        )
    own = {path: value for path, value in best.items() if is_own(path)}
    paths = {key: state[key] for key in ("kth_best_model_path", "last_model_path") if is_own(state.get(key))}
    return {**state, "kth_best_model_path": "", "last_model_path": "", **paths, "best_k_models": own}


def epoch_checkpoints(params: dict[str, Any], checkpoint_io: StreamingCheckpointIO) -> list[RunCheckpoint]:
    """Build what keeps the regular checkpoints.

    Args:
        params: from :func:`model_checkpoint_params`.
        checkpoint_io: what writes the run's checkpoints.

    Returns:
        One callback; two where a metric decides, which some epochs may lack; one more for the newest.
    """
    by_steps = bool(params.get("every_n_train_steps") or params.get("train_time_interval"))
    if by_steps or params["monitor"] in ("step", "epoch"):
        regular: list[RunCheckpoint] = [RunCheckpoint(**params)]
    else:
        measured = MeasuredCheckpoint(**params)
        regular = [measured, UnmeasuredCheckpoint(measured, **params)]
    if params.get("keep_last_n"):
        regular.append(NewestCheckpoints(checkpoint_io, **params))
    return regular


def give_second_name(trainer: pl.Trainer, checkpoint_io: StreamingCheckpointIO, path: Path) -> bool:
    """Give the newest checkpoint file another name, if it holds what the trainer would save now.

    Args:
        trainer: the trainer, between two optimiser steps.
        checkpoint_io: what writes the run's checkpoints.
        path: the name.

    Returns:
        Whether it did.

    Raises:
        OSError: if it should have, and could not.
    """
    source = checkpoint_io.newest_path
    is_written = (
        source is not None
        and source != path
        and checkpoint_io.has(source)
        and checkpoint_io.newest_can_be_continued
        and checkpoint_io.newest_loops == trainer.fit_loop.state_dict()
    )
    is_written = trainer.strategy.broadcast(is_written)  # only the first process writes, and knows what it wrote
    if is_written:
        if trainer.is_global_zero and source is not None:
            checkpoint_io.duplicate(source, path)
        trainer.strategy.barrier(path.name)
    return is_written


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` at the newest complete optimiser step, however the run ends.

    It is written with every regular checkpoint (whether or not that one was among the best), at the end
    of training, when a signal asks for it or for the end, when ``max_time`` or another callback ends the run
    within an epoch, and when training fails after it had made progress. Saving never raises over the failure
    that it follows.

    Args:
        path: the file.
        checkpoint_io: what writes the run's checkpoints.
        signals: the run's stop signals.
        every_n_epochs: as for the regular checkpoints; 0: not by epochs.
        every_n_train_steps: as for the regular checkpoints, in optimiser steps; 0: not by steps.
        follows: regular checkpoints whose times are not known beforehand.
    """

    def __init__(
        self,
        path: Path,
        checkpoint_io: StreamingCheckpointIO,
        signals: StopSignals,
        every_n_epochs: int = 1,
        every_n_train_steps: int = 0,
        follows: Sequence[RunCheckpoint] = (),
    ) -> None:
        self.path = path
        self.checkpoint_io = checkpoint_io
        self.signals = signals
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.follows = follows
        self._saved: tuple[int, int, int] | None = None
        self._broken_off_at: int | None = None
        self._first_step: int | None = None
        self._has_validated = False
        self._seen_step = 0
        self._stepping_batch: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals, which Lightning has just claimed for itself; see that there is room.

        Raises:
            OSError: if not even the weights fit on the disk, or a callback's state cannot be read back: the first save
                would fail, hours from now.
        """
        self.signals.install()
        self.signals.deferred = True
        self._first_step = self._seen_step = trainer.global_step
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._check_states(trainer)
            size = _checkpoint_size(trainer)
            self.checkpoint_io.check_room(pl_module.state_dict(), self.path, expected=size)
            self.checkpoint_io.reserve(size)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note that the weights are about to change."""
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        self._stepping_batch = batches.started

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by steps, where the run is to end within an epoch, and as signals ask."""
        if self._is_broken_off(trainer):
            # Lightning is going to validate and to call this the epoch's end, which it is not.
            self._broken_off_at = trainer.global_step if self._save_and_tell(trainer) else None
        if trainer.global_step == self._seen_step:
            return  # a batch whose gradient waits for others
        self._seen_step = trainer.global_step
        by_steps = self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0
        if by_steps or any(regular.saved_step == trainer.global_step for regular in self.follows):
            self.save(trainer)
        if not self._epoch_ends_here(trainer):
            self._answer(trainer)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save within a validation, or break it off, if asked to; a resumed run begins it again."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        almost_done = trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch
        if not almost_done:
            self._answer(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note it: a continued run may owe no more than this."""
        self._has_validated = self._has_validated or trainer.state.fn == TrainerFn.FITTING

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save by epochs, and as signals ask."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.save(trainer)
        self._answer(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end; a signal that arrives meanwhile ends the run after that."""
        if self._has_progressed(trainer):
            self.save(trainer)
        self.checkpoint_io.finish()
        self.signals.deferred = False
        stop = stop_of(self._asked(trainer))
        if stop is not None:
            raise Interrupted(stop)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save what was reached before a failure, if that is worth anything."""
        asked_before = self.signals.requested
        try:
            self._save_after(trainer, exception)
        finally:
            self.signals.deferred = False
            # The end that was asked for meanwhile comes by itself, and its reason is the failure.
            self.signals.requested = asked_before

    def _save_after(self, trainer: pl.Trainer, exception: BaseException) -> None:
        """Save after a failure."""
        if isinstance(exception, (Interrupted, NotFiniteError)) or trainer.state.fn != TrainerFn.FITTING:
            return
        try:
            self.checkpoint_io.finish()
        except CheckpointWriteError as error:
            logger.error("%s", error)
            return
        if not self._has_progressed(trainer) or isinstance(exception, CheckpointWriteError):
            return  # there is nothing to save, or a second try would fail like the first
        if self._is_stepping(trainer):
            logger.warning("%s stays as it was: step %d was broken off half-way", self.path, trainer.global_step + 1)
            return
        if trainer.world_size > 1:
            logger.warning("%s stays as it was: the other devices may not answer any more", self.path)
            return
        try:
            self._save_and_tell(trainer)
        except Exception as error:  # noqa: BLE001 - whatever this is, it must not hide the failure in flight
            logger.error("%s could not be saved: %s", self.path, error)

    def save(self, trainer: pl.Trainer) -> bool:
        """Bring ``last.ckpt`` up to date.

        Args:
            trainer: the trainer, between two optimiser steps.

        Returns:
            Whether it is now; not in a rehearsal, nor where the weights have blown up.

        Raises:
            OSError: if the file cannot be written.
        """
        if getattr(trainer, "fast_dev_run", False):
            return False
        loop: Any = trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        now = (trainer.global_step, epochs.processed, batches.processed)
        if self._saved == now or self._broken_off_at == trainer.global_step:
            return True
        if not weights_are_finite(trainer, trainer.lightning_module):
            if trainer.is_global_zero:
                logger.error("%s stays as it was: %s", self.path, NOT_FINITE)
            return False
        # The regular checkpoint of this very moment has just been written: the same content needs no second copy.
        if not give_second_name(trainer, self.checkpoint_io, self.path):
            trainer.save_checkpoint(self.path, weights_only=False)
        self._saved = now
        return True

    def _save_and_tell(self, trainer: pl.Trainer) -> bool:
        """Save, and say so; tells whether it could be done, as :meth:`save`."""
        is_saved = self.save(trainer)
        self.checkpoint_io.finish()
        if is_saved:
            logger.info("saved step %d as %s", trainer.global_step, self.path)
        return is_saved

    def _check_states(self, trainer: pl.Trainer) -> None:
        """Refuse callbacks whose state no checkpoint could give back: the run could not be continued."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = callback.state_dict()
            if state and not self.checkpoint_io.can_give_back(state):
                raise CheckpointWriteError(
                    f"the state of the callback {type(callback).__name__} could not be read back from a checkpoint, so"
                    " that the run could not be continued: keep tensors, numbers, texts, lists and dictionaries in its"
                    " state_dict"
                )

    def _has_progressed(self, trainer: pl.Trainer) -> bool:
        """Tell whether training has begun, and made a step or a validation since."""
        return self._first_step is not None and (trainer.global_step > self._first_step or self._has_validated)

    def _is_stepping(self, trainer: pl.Trainer) -> bool:
        """Tell whether an optimiser step has begun and not ended: some weights may have changed, and some not."""
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        return bool(self._stepping_batch == batches.started and batches.processed < batches.started)

    def _asked(self, trainer: pl.Trainer) -> int:
        """Find the most urgent request among those of all the run's processes, in all of them alike."""
        asked = self.signals.asked
        if trainer.world_size > 1:
            own = torch.tensor(asked, device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(own, reduce_op="max"))
        return asked

    def _answer(self, trainer: pl.Trainer) -> None:
        """Save if any process got a signal, then leave the training loop if that was one to stop."""
        asked = self._asked(trainer)
        if asked == NOTHING:
            return
        self.signals.save_requested = False
        self._save_and_tell(trainer)
        stop = stop_of(asked)
        if stop is not None:
            self.signals.deferred = False
            raise Interrupted(stop)

    def _is_broken_off(self, trainer: pl.Trainer) -> bool:
        """Tell whether a callback, such as the timer of ``max_time``, ends the run within an epoch."""
        loop = trainer.fit_loop
        return trainer.should_stop and loop._can_stop_early and not loop.epoch_loop.batch_progress.is_last_batch

    def _epoch_ends_here(self, trainer: pl.Trainer) -> bool:
        """Tell whether the epoch is over with this batch and no validation holds up its end."""
        loop = trainer.fit_loop.epoch_loop
        return loop.batch_progress.is_last_batch and not loop._should_check_val_epoch()


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


def _step_of(path: Path) -> int | None:
    """Read which optimiser step a checkpoint was saved at; None where it does not tell."""
    try:
        step = read_checkpoint(path, verify=False).get("global_step")
    except (ValueError, OSError):
        return None
    return step if isinstance(step, int) else None


def _checkpoint_size(trainer: pl.Trainer) -> int:
    """Estimate a checkpoint's size in bytes; of optimisers that have no state yet as AdamW's, twice what they train."""
    size = file_size({"state_dict": trainer.lightning_module.state_dict()})
    for optimizer in trainer.optimizers:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        size += (
            file_size({"state": optimizer.state_dict()["state"]}) if optimizer.state else 2 * file_size({"p": trained})
        )
    return size
