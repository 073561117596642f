"""Has all processes of a run end when one of them fails, where they would wait for it in vain."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any, Final

import pytorch_lightning as pl
import torch

KEY: Final = "ldm/failed"
POLL: Final = 0.5
"""Seconds between two looks at the others."""

WAIT: Final = 3.0
"""Seconds in which a broken exchange may turn out to be another process's failure."""

GRACE: Final = 5.0
"""Seconds that a process has to end by itself; one that waits for the lost one on a GPU cannot."""


class OtherDeviceError(Exception):
    """Another process of the run has failed.

    Attributes:
        status: its exit status.
        has_said: whether it has said why.
    """

    def __init__(self, message: str, status: int, has_said: bool) -> None:
        super().__init__(message)
        self.status = status
        self.has_said = has_said


class Company(pl.Callback):
    """Watches over the other processes of a run on several devices.

    A process that fails leaves its number and exit status in the store through which the processes found each
    other. All look there, and the first one also at those that it has started itself.
    """

    def __init__(self) -> None:
        self.failure: OtherDeviceError | None = None
        self._rank = 0
        self._store: Any = None
        self._children: list[subprocess.Popen[Any]] = []
        self._has_ended = threading.Event()
        self._has_failed = threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch."""
        place: Any = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size == 1 or place is None or not torch.distributed.is_initialized():
            return
        self._rank = trainer.global_rank
        self._store = torch.distributed.TCPStore(
            place.main_address, place.main_port, is_master=False, wait_for_workers=False
        )
        # Lightning's own watch over them kills everything, so that no exit status or record would be right.
        started = getattr(trainer.strategy.launcher, "procs", [])
        self._children += started
        started.clear()
        self._has_ended.clear()
        threading.Thread(target=self._watch, name="company", daemon=True).start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no longer."""
        self._has_ended.set()

    def tell(self, status: int) -> None:
        """Let the others know that this process is about to end.

        Args:
            status: its exit status.
        """
        self._has_ended.set()
        if self._store is None:
            return
        try:
            self._store.compare_set(KEY, "", f"{self._rank} {status}")
        except RuntimeError:
            return  # the process that kept the store is gone, which the others notice too

    def blame(self, error: Exception) -> OtherDeviceError | None:
        """Tell whether an exception is another process's failure, which has broken off an exchange with it.

        Args:
            error: what came out of the training loop.

        Returns:
            That failure, or None.
        """
        if self._store is None or not isinstance(error, RuntimeError):
            return None
        self._has_failed.wait(WAIT)
        if self.failure is not None:
            self._has_ended.set()
        return self.failure

    def _watch(self) -> None:
        """Look at the others until one fails; then see that this process ends."""
        while not self._has_ended.wait(POLL):
            self.failure = self._told() or self._died()
            if self.failure is None:
                continue
            self._has_failed.set()
            if not self._has_ended.wait(GRACE):
                os._exit(self.failure.status)

    def _told(self) -> OtherDeviceError | None:
        try:
            if not self._store.check([KEY]):
                return None
            rank, status = self._store.get(KEY).decode().split()
        except RuntimeError:
            return OtherDeviceError("device 0 has ended", status=1, has_said=True)
        return OtherDeviceError(f"device {rank} failed", int(status), has_said=True)

    def _died(self) -> OtherDeviceError | None:
        for rank, child in enumerate(self._children, start=1):
            code = child.poll()
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                hint = "; is the computer's memory full?" if name == "SIGKILL" else ""
                return OtherDeviceError(f"the process of device {rank} was ended by {name}{hint}", 1, has_said=False)
            if code:
                return OtherDeviceError(f"device {rank} failed", code, has_said=True)
        return None
