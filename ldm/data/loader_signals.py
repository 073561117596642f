"""What loader processes make of signals that a whole group of processes gets."""

from __future__ import annotations

import signal
from typing import Final

from torch.utils.data import get_worker_info

OUTLIVED: Final = ("SIGINT", "SIGHUP", "SIGBREAK", "SIGUSR1")
"""Ctrl-C, the terminal's end, Ctrl-Break, and what queues send to have a run saved; no system has all of them."""


def outlive_group_signals(worker_id: int) -> None:
    """Leave signals to the main process, which finishes its step, saves, and ends its loader processes itself.

    A process that was forked inherits the main one's handlers; one that was spawned would end without a word.

    Args:
        worker_id: the loader process's number. Nothing happens outside such a process.
    """
    if get_worker_info() is None:
        return
    for name in OUTLIVED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
