"""When the death of a loader process ends a run: while a batch is awaited, and never in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class DeathWatch:
    """The handler of the signal that a child process sends when it ends.

    torch's own raises there and then: between any two lines of an optimiser step, so that what is saved afterwards
    would be half a step. This one lets it raise only while somebody waits for a batch.

    Args:
        raise_if_any_died: torch's handler.
    """

    def __init__(self, raise_if_any_died: Callable[[int, FrameType | None], Any]) -> None:
        self._raise_if_any_died = raise_if_any_died
        self._waiting = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        if self._waiting:
            self._raise_if_any_died(number, frame)

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """Let the death of a loader process raise for as long as the context lasts.

        Raises:
            RuntimeError: one has died, now or before.
        """
        self._waiting += 1
        try:
            self._raise_if_any_died(signal.SIGCHLD, None)
            yield
        finally:
            self._waiting -= 1


def death_watch() -> DeathWatch | None:
    """Give the process's watch, putting it in the place of torch's handler where there is none yet.

    Returns:
        The watch; None where torch has no handler: on Windows, outside the main thread, before loader processes began.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return None
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, DeathWatch):
        return handler
    if not callable(handler):
        return None
    watch = DeathWatch(handler)
    signal.signal(signal.SIGCHLD, watch)
    return watch
