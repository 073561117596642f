"""Where the run's messages go: plain lines on standard output, above a progress bar if there is one."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

STEERING: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What makes a terminal do something else than show a letter."""

QUIET_LOGGERS: Final = (
    "pytorch_lightning",
    "lightning_fabric",
    "lightning.pytorch",
    "lightning.fabric",
    "torch.utils._pytree",  # what it finds in torchao, which transformers imports wherever it is installed
)
"""Whose remarks below an error are kept from the user."""

# Each is said by Lightning of something that this trainer decides or handles itself.
SETTLED_WARNINGS: Final = (
    r".*does not have many workers which may be a bottleneck.*",
    r".*Consider setting `persistent_workers=True`.*",
    r".*Found \d+ module\(s\) in eval mode at the start of training.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*smaller than the logging interval Trainer\(log_every_n_steps.*",
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*Trying to infer the `batch_size` from an ambiguous collection.*",
    r".*GPU available but not used.*",
    r".*Total length of `list` across ranks is zero.*",
    r".*`max_epochs` was not set.*",
    r".*could not find the monitored key in the returned metrics.*",  # no validation yet: last.ckpt is saved
    r".*You called `self\.log\(.*but have no logger configured.*",
    r".*You are trying to `self\.log\(\)` but `Trainer\(barebones=True\)` is configured.*",
    r".*You requested to overfit but enabled .* dataloader shuffling.*",
    r".*The dirpath has changed from .*",  # a run that was moved goes on where it is
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*Detected pickle protocol \d+ in the checkpoint.*",  # what cannot be read is an error of its own
    r".*You have overridden `transfer_batch_to_device` in `LightningModule`.*",
)


def command_word(path: str | Path) -> str:
    """Write a path so that it can be pasted into a command.

    Args:
        path: the path.

    Returns:
        It, in quotes where the shell needs them.
    """
    text = str(path)
    if os.name == "nt":
        return f'"{text}"' if set(text) & set(" &()^;,") else text
    return shlex.quote(text)


def harmless(text: str) -> str:
    """Write a text so that names and captions in it do nothing to a terminal.

    Args:
        text: one or several lines.

    Returns:
        The text with control characters other than a line's end, and marks that turn the direction of writing,
        written as escapes.
    """
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def is_terminal() -> bool:
    """Tell whether standard output is a terminal; there may be none at all (None, or closed)."""
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except ValueError:
        return False


class ConsoleHandler(logging.Handler):
    """Writes records to whatever standard output is at the time, without tearing a progress bar apart.

    A run does not end because the console's code page lacks a letter of a file name, or because whoever
    read its output has gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_LevelFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if sys.stdout is None:
            return  # as under pythonw
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = harmless(self.format(record)).encode(encoding, "replace").decode(encoding)
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                sys.stdout.write(f"{text}\n")
                sys.stdout.flush()
        except (OSError, ValueError):  # a pipe without a reader, a closed file
            return  # nobody is there to be told


class _LevelFormatter(logging.Formatter):
    """The message alone; its level in front of it from warnings up."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextmanager
def console(rank: int, debug: bool) -> Iterator[None]:
    """Show the project's log records while a run lasts.

    Args:
        rank: this process's number among those of the run; only number 0 reports progress.
        debug: show also what Lightning says and the settled warnings.

    Yields:
        Nothing.
    """
    handler = ConsoleHandler()
    ours = logging.getLogger("ldm")
    levels: dict[str, Any] = {name: logging.getLogger(name).level for name in ("ldm", *QUIET_LOGGERS)}
    ours.addHandler(handler)
    ours.setLevel(logging.ERROR if rank else logging.DEBUG if debug else logging.INFO)
    with warnings.catch_warnings():
        if not debug:
            for name in QUIET_LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            for message in SETTLED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            ours.removeHandler(handler)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
