"""Signals: end at the next safe place instead of in the middle of a step, or save there and go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Final


def _of_this_system(*names: str) -> tuple[int, ...]:
    return tuple(int(getattr(signal, name)) for name in names if hasattr(signal, name))


STOPPING: Final = _of_this_system("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Ctrl-C, what ``kill`` and Slurm send, the terminal's end (not on Windows), and Ctrl-Break (on Windows alone)."""

SAVING: Final = _of_this_system("SIGUSR1")
"""Asks for a checkpoint now; Windows has no such signal."""

NOTHING: Final = 0
SAVE: Final = 1
"""What :attr:`StopSignals.asked` gives besides requests to stop, which are greater."""


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
        """What a shell reports for a process that a signal ended.

        130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP and 149 for Ctrl-Break.
        """
        return 128 + self.signal_number


class StopSignals(AbstractContextManager["StopSignals"]):
    """Turns the first signal into a request while training, and into :class:`Interrupted` at other times.

    A second one to stop ends the run where it stands. SIGUSR1 is a request at all times, for a checkpoint; before
    training it waits for the first step. SIGHUP is left alone where the run was begun to outlive its terminal
    (``nohup``).

    Attributes:
        requested: the signal that asked for the end, or None.
        save_requested: whether a checkpoint was asked for.
        deferred: whether someone is going to look at the requests soon (the training loop sets this).
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.save_requested = False
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

    @property
    def asked(self) -> int:
        """The most urgent request as a number, so that the greatest one of several processes counts.

        ``NOTHING``, ``SAVE``, or ``SAVE`` plus the number of the signal to stop; see :func:`stop_of`.
        """
        if self.requested is not None:
            return SAVE + self.requested
        return SAVE if self.save_requested else NOTHING

    def install(self) -> None:
        """Handle the signals from here on; harmless when they are handled already."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*STOPPING, *SAVING):
            before = signal.getsignal(number)
            # None: code outside Python handles it, and could not be put back.
            if before is None or (before is signal.SIG_IGN and number in _of_this_system("SIGHUP")):
                continue
            signal.signal(number, self._handle)
            self._previous.setdefault(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note the request, or pass it up."""
        if os.getpid() != self._process:
            self._handle_in_worker(number)
        elif number in SAVING:
            self.save_requested = True
            _tell("saving after this step" if self.deferred else "saving when a step has been done")
        else:
            repeated = self.requested is not None
            self.requested = number
            if repeated or not self.deferred:
                raise Interrupted(number)
            _tell("stopping: saving after this step (once more: stop at once, without saving)")

    @staticmethod
    def _handle_in_worker(number: int) -> None:
        """Let a forked loader process outlive what reaches the whole process group: all but SIGTERM.

        The step that is being finished may still need its pictures. The main process ends it afterwards.
        """
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def stop_of(asked: int) -> int | None:
    """Read the signal to stop out of :attr:`StopSignals.asked`; None where none is asked for."""
    return asked - SAVE if asked > SAVE else None


def _tell(text: str) -> None:
    """Write a line, not through logging: the signal may have arrived while a log line was being written."""
    with contextlib.suppress(OSError):  # nobody may be there to read it
        os.write(2, f"\n{text}\n".encode())
