"""Ctrl-C and SIGTERM: end at the next safe place instead of in the middle of a step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Final

HANDLED: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The run was asked to end by a signal.

    Like KeyboardInterrupt it is no ``Exception``, so that no code on the way up takes it for a failure.

    Attributes:
        signal_number: the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal_number


class StopSignals(AbstractContextManager["StopSignals"]):
    """Turns the first signal into a request while training, and into :class:`Interrupted` at other times.

    A second signal ends the run where it stands.

    Attributes:
        requested: the signal that asked for the end, or None.
        deferred: whether someone is going to look at ``requested`` soon (the training loop sets this).
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.deferred = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def install(self) -> None:
        """Handle the signals from here on; harmless when they are handled already."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in HANDLED:
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note the request, or pass it up."""
        if os.getpid() != self._process:
            self._handle_in_worker(number)
            return
        repeated = self.requested is not None
        self.requested = number
        if repeated or not self.deferred:
            raise Interrupted(number)
        # Not through logging: the signal may have arrived while a log line was being written.
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, b"\nstopping: saving after this step (once more: stop at once, without saving)\n")

    @staticmethod
    def _handle_in_worker(number: int) -> None:
        """Let a forked loader process outlive Ctrl-C, which reaches the whole process group.

        The step that is being finished may still need its pictures. The main process ends it afterwards.
        """
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
