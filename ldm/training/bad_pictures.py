"""Tells of pictures that could not be read during a run, and ends a run that has hardly any left."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from ldm.training.batches import batch_length
from ldm.training.summary import plural

logger = logging.getLogger(__name__)

LEAST_IN_A_ROW: Final = 20
"""How many exposures in a row, at least, have to be unreadable before a run ends; or two batches, if that is more."""

NAMED_AT_THE_END: Final = 1000
"""How many pictures the list at the end names; ``run.json`` has all."""


class TooManyUnreadableError(OSError):
    """Nothing can be read any more, as when a network drive went away.

    Attributes:
        remedy: what helps; ``{resume}`` in it stands for the command that continues the run.
    """

    remedy: ClassVar[str] = "see to the drive that they lie on, then type {resume}"


class BadPictures(pl.Callback):
    """Names each picture that a run skipped because it could not be read: when it is met, and all at the end.

    Data sets that skip such pictures give an item in their place that counts nothing, whose ``unreadable`` says why.

    Attributes:
        met: how many exposures were skipped, by what was wrong (a line that names the picture).
    """

    def __init__(self) -> None:
        self.met: dict[str, int] = {}
        self._listed: dict[str, int] = {}
        self._in_a_row = 0
        self._measured = 0
        self._unmeasured = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at a batch.

        Raises:
            TooManyUnreadableError: many exposures in a row could not be read.
        """
        for reason in self._look(trainer, batch):
            self._in_a_row = self._in_a_row + 1 if reason else 0
            if self._in_a_row >= max(LEAST_IN_A_ROW, 2 * batch_length(batch)):
                raise TooManyUnreadableError(f"{self._in_a_row} pictures in a row cannot be read, the last: {reason}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count what is measured."""
        self._measured = self._unmeasured = 0

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at a batch."""
        reasons = self._look(trainer, batch)
        self._measured += sum(not reason for reason in reasons)
        self._unmeasured += sum(bool(reason) for reason in reasons)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that something was measured.

        Raises:
            TooManyUnreadableError: not one of this device's pictures could be read.
        """
        if self._unmeasured and not self._measured:
            reason = list(self.met)[-1]
            raise TooManyUnreadableError(
                f"none of the {plural(self._unmeasured, 'validation picture')} can be read, for one: {reason}"
            )

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count what is measured."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at a batch."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that something was measured, as after a validation."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """List them."""
        self._list(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """List those that the test has met."""
        self._list(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """List them, also when a signal or a failure ends the run."""
        self._list(trainer)

    def _look(self, trainer: pl.Trainer, batch: Any) -> list[str]:
        """Read why pictures of a batch could not be read, empty for the others, and name those that are new."""
        if not isinstance(batch, Mapping) or "unreadable" not in batch:
            return []
        reasons = [str(reason) for reason in batch["unreadable"]]
        for reason in filter(None, reasons):
            if reason not in self.met:
                self._say(trainer, f"skipped: {reason}")
            self.met[reason] = self.met.get(reason, 0) + 1
        return reasons

    def _list(self, trainer: pl.Trainer) -> None:
        """List what was skipped, with how often, once for each ending."""
        new = {reason: count for reason, count in self.met.items() if self._listed.get(reason) != count}
        if not new:
            return
        self._listed = dict(self.met)
        lines = [f"  {reason} ({_times(count)})" for reason, count in sorted(new.items())]
        surplus = len(lines) - NAMED_AT_THE_END
        if surplus > 0:
            lines = [*lines[:NAMED_AT_THE_END], f"  and {surplus} more (run.json names all)"]
        how = "was skipped, for it" if len(new) == 1 else "were skipped, for they"
        ending = f"during {'the test' if trainer.state.fn == TrainerFn.TESTING else 'the run'}:"
        self._say(trainer, "\n".join([f"{plural(len(new), 'picture')} {how} could not be read {ending}", *lines]))

    @staticmethod
    def _say(trainer: pl.Trainer, text: str) -> None:
        """Warn; the other devices' processes show nothing below an error."""
        if trainer.is_global_zero:
            logger.warning("%s", text)
        else:
            logger.error("device %d: %s", trainer.global_rank, text)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
