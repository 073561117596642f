"""When the death of a loader process ends a run: while a batch is awaited, and never in the middle of a step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Final

# What a process has handed over is fetched from it, and fails like this where it is dying; its death follows shortly.
_LOST_WITH_PROCESS: Final = (ConnectionError, EOFError, FileNotFoundError)
_LOOKS: Final = 40
_SECONDS_BETWEEN_LOOKS: Final = 0.05


class LoaderDeathError(ChildProcessError):
    """A loader process has ended though nobody asked it to.

    Attributes:
        process_id: its number.
        exit_code: what it ended with; below 0 the signal that ended it, negated.
    """

    def __init__(self, process_id: int, exit_code: int) -> None:
        super().__init__(f"loader process {process_id} ended unexpectedly (exit code {exit_code})")
        self.process_id = process_id
        self.exit_code = exit_code


class LoaderProcesses:
    """Keeps an eye on the processes of a loader.

    torch has a handler of the signal that tells of their deaths, which raises there and then: between any two lines of
    an optimiser step, so that what is saved afterwards would be half a step. Here it is heard while a batch is awaited,
    and each wait begins with a look.

    Args:
        processes: the processes.
    """

    def __init__(self, processes: Iterable[BaseProcess]) -> None:
        self._processes = list(processes)
        # Elsewhere there is no such signal, or it is not ours to handle; torch then looks every few seconds.
        self._has_signal = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        self._listen(False)

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """Wait for a batch.

        Raises:
            LoaderDeathError: a process has died, now or before.
        """
        self._listen(True)
        try:
            self.raise_if_any_died()
            yield
        except _LOST_WITH_PROCESS:
            for _ in range(_LOOKS):
                self.raise_if_any_died()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            raise
        except RuntimeError:
            self.raise_if_any_died()  # torch has noticed too
            raise
        finally:
            self._listen(False)

    def raise_if_any_died(self) -> None:
        """Look.

        Raises:
            LoaderDeathError: a process has died.
        """
        for process in self._processes:
            if process.exitcode is not None:
                raise LoaderDeathError(process.pid or 0, process.exitcode)

    def _listen(self, now: bool) -> None:
        if self._has_signal:
            signal.signal(signal.SIGCHLD, self._handle if now else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raise_if_any_died()
