"""What is seen of a run while it trains: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections import deque
from typing import Any, Final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from ldm.training.batches import batch_length, share_that_counts
from ldm.training.console import is_terminal

logger = logging.getLogger(__name__)

RECENT_BATCHES: Final = 50
BAR_SECONDS: Final = 0.5
LINE_SECONDS: Final = 30.0
BAR_FORMAT: Final = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"


def format_duration(seconds: float) -> str:
    """Write a duration as a clock does.

    Args:
        seconds: how long, at least 0.

    Returns:
        ``m:ss`` or ``h:mm:ss``.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunProgress(ProgressBar):
    """Shows epoch, step, mean loss of the last batches, pictures a second, and the time left.

    The loss stays on the device until it is shown, so that watching does not slow training down.

    Args:
        line_seconds: time between two plain lines where standard output is no terminal.
    """

    def __init__(self, line_seconds: float = LINE_SECONDS) -> None:
        super().__init__()
        self.line_seconds = line_seconds
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._losses: deque[Tensor] = deque(maxlen=RECENT_BATCHES)
        # (when it ended, pictures in it), of the batches since the last pause for a validation.
        self._batches: deque[tuple[float, int]] = deque(maxlen=RECENT_BATCHES)
        self._seconds_per_batch = 0.0
        self._pictures_per_second = 0.0
        self._seconds_per_validation = 0.0
        self._validation_began = 0.0
        self._paused = 0.0
        self._shown = 0.0
        self._epoch_began = 0.0

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (all processes of a run but the first)."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._epoch_began = self._shown = time.monotonic()
        self._batches.append((self._epoch_began, 0))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting an epoch; its bar appears with the first batch."""
        self._epoch_began = time.monotonic()
        self._restart_clock()
        self._close_bar()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in one batch, and show the state from time to time."""
        if not self._enabled:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        share = share_that_counts(batch)
        if isinstance(loss, Tensor) and share:
            # Lightning hands back the share of the optimiser step's loss; what does not count is 0 in its mean.
            self._losses.append(loss.detach() * (trainer.accumulate_grad_batches / share))
        now = time.monotonic()
        self._batches.append((now, batch_length(batch) * trainer.world_size))
        is_last = batch_idx + 1 >= trainer.num_training_batches
        if is_terminal():
            if self._bar is None or is_last or now - self._shown >= BAR_SECONDS:
                self._show_bar(trainer, batch_idx + 1)
                self._shown = now
        elif batch_idx == 0 or is_last or now - self._shown >= self.line_seconds:
            logger.info("%s", self._line(trainer, batch_idx + 1))
            self._shown = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note when training paused."""
        self._validation_began = time.monotonic()
        if self._enabled and self._bar is not None:
            self._bar.set_description_str(f"{self._epoch_label(trainer)} (validating)")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the validation, and leave its time out of the pictures a second."""
        if trainer.sanity_checking:
            return
        self._seconds_per_validation = time.monotonic() - self._validation_began
        self._restart_clock()
        if self._enabled and trainer.state.fn == "fit":
            if self._bar is not None:
                self._bar.set_description_str(self._epoch_label(trainer), refresh=False)
            self._close_bar()
            logger.info(
                "%s  validation %s  took %s",
                self._epoch_label(trainer),
                _metrics_text(trainer.callback_metrics, "val"),
                format_duration(self._seconds_per_validation),
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the last state on the screen."""
        self._close_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the screen back."""
        self._close_bar()

    def seconds_left(self, trainer: pl.Trainer, batches_done: int) -> float:
        """Estimate the rest of the run from the recent speed.

        Args:
            trainer: the trainer.
            batches_done: batches of the current epoch that are done.

        Returns:
            Seconds for the batches and validations to come; infinite if nothing limits the run.
        """
        per_epoch = trainer.num_training_batches
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
        batches = per_epoch - batches_done + max(0, epochs - trainer.current_epoch - 1) * per_epoch
        if trainer.max_steps != -1:
            batches = min(batches, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        if math.isinf(batches):
            return math.inf
        every = trainer.check_val_every_n_epoch or 1
        validations = math.floor((batches + batches_done) / per_epoch / every) if trainer.enable_validation else 0
        return batches * self._seconds_per_batch + validations * self._seconds_per_validation

    def _restart_clock(self) -> None:
        """Forget the batches before a pause."""
        self._measure()
        self._batches.clear()
        self._batches.append((time.monotonic(), 0))

    def _measure(self) -> None:
        """Update the speed from the recent batches, if there are any."""
        if len(self._batches) < 2:
            return
        seconds = self._batches[-1][0] - self._batches[0][0]
        count = len(self._batches) - 1
        if seconds > 0:
            self._seconds_per_batch = seconds / count
            self._pictures_per_second = sum(pictures for _, pictures in list(self._batches)[1:]) / seconds

    def _figures(self, trainer: pl.Trainer, batches_done: int) -> str:
        """Loss, speed and time left."""
        self._measure()
        loss = torch.stack(list(self._losses)).float().mean().item() if self._losses else math.nan
        left = self.seconds_left(trainer, batches_done)
        return (
            f"loss {loss:.4f}  {self._pictures_per_second:.2f} images/s"
            f"  {'no end set' if math.isinf(left) else format_duration(left) + ' left'}"
        )

    def _epoch_label(self, trainer: pl.Trainer) -> str:
        """Which epoch this is, counted from 1."""
        epochs = trainer.max_epochs
        return f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs not in (None, -1) else "")

    def _line(self, trainer: pl.Trainer, batches_done: int) -> str:
        """The state as a plain line."""
        return (
            f"{self._epoch_label(trainer)}  batch {batches_done}/{trainer.num_training_batches}"
            f"  step {trainer.global_step}  {self._figures(trainer, batches_done)}"
        )

    def _show_bar(self, trainer: pl.Trainer, batches_done: int) -> None:
        """The state as a bar."""
        # Not tqdm's own measure, which shows nothing on terminals that do not tell their size.
        columns, rows = shutil.get_terminal_size()
        # The figures are part of the format: tqdm would set a comma before a postfix.
        shape = f"{BAR_FORMAT}  {self._figures(trainer, batches_done)}"
        if self._bar is None:
            self._bar = tqdm(
                desc=self._epoch_label(trainer),
                initial=batches_done,
                total=int(trainer.num_training_batches),
                bar_format=shape,
                file=sys.stdout,
                ncols=columns,
                nrows=rows,
            )
            return
        self._bar.ncols = columns
        self._bar.bar_format = shape
        self._bar.n = batches_done
        self._bar.refresh()

    def _close_bar(self) -> None:
        """Leave the bar as it stands and go on below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _metrics_text(metrics: dict[str, Tensor], prefix: str) -> str:
    """Write the metrics of a phase in one line; averaged weights' only where they say something else."""
    chosen = {name: float(value) for name, value in metrics.items() if name.startswith(prefix)}
    chosen = {
        name: value
        for name, value in chosen.items()
        if not (name.endswith("_ema") and chosen.get(name.removesuffix("_ema")) == value)
    }
    return "  ".join(f"{name} {value:.4f}" for name, value in chosen.items()) or "done"
