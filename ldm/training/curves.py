"""The run's curves, over whose file no run ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from ldm.training.disk import Disk

logger = logging.getLogger(__name__)

NEEDED_ROOM: Final = 1 << 20
"""Bytes that must be free for a point to be written: TensorBoard's thread shows a traceback when it fails."""


class Curves(TensorBoardLogger):
    """TensorBoard's logger, which leaves out what finds no room, says so, and goes on.

    Args:
        save_dir: the run's folder.
        version: the curves' folder in it.
        disk: the file system.
    """

    def __init__(self, save_dir: str, version: str, disk: Disk | None = None) -> None:
        super().__init__(save_dir, name="", version=version, default_hp_metric=False)
        self._disk = disk or Disk()
        self._is_full = False
        self._has_failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a point of each curve."""
        self._write(lambda: super(Curves, self).log_metrics(metrics, step))

    def save(self) -> None:
        """Bring what was written to the disk."""
        self._write(lambda: super(Curves, self).save())

    def forget_after(self, step: int) -> None:
        """Have TensorBoard pass over the points after a step, which a continued run writes again.

        Args:
            step: the optimiser step that the run goes on from. Its own points stay: a validation that ended there
                does not come again.
        """
        begun_again = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._write(lambda: self.experiment.file_writer.add_event(begun_again))

    def finalize(self, status: str) -> None:
        """Close the file; nothing that fails here hides why a run ends."""
        self._write(lambda: super(Curves, self).finalize(status))

    def _write(self, write: Callable[[], Any]) -> None:
        """Write, if there is room."""
        if self._has_failed:
            return
        try:
            if self._has_room():
                write()
        except (OSError, ValueError) as error:
            # Lightning words a point that could not be written as a ValueError.
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            self._has_failed = True
            logger.warning("curves cannot be written any more in %s: %s", self.log_dir, cause.strerror or cause)

    def _has_room(self) -> bool:
        """Look for room, and say when there is none, and when there is again."""
        folder = Path(self.root_dir)
        is_full = folder.exists() and self._disk.free(folder) < NEEDED_ROOM
        if is_full != self._is_full:
            text = "the disk is full: no curves are written" if is_full else "curves are written again"
            logger.warning("%s in %s", text, self.log_dir)
        self._is_full = is_full
        return not is_full
