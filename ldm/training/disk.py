"""What checkpoints need of a file system, in one place that can be given another one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO, Final

COPIED_AT_ONCE: Final = 1 << 22
"""Bytes."""

NO_FOLDER_SYNC: Final = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
"""What file systems say whose folders cannot be brought to the disk by themselves."""


class Disk:
    """The operating system's files. Each method is one step that can fail with an OSError."""

    def make_folder(self, folder: Path) -> None:
        """Make a folder and those above it; one that exists stays."""
        folder.mkdir(parents=True, exist_ok=True)

    def free(self, folder: Path) -> int:
        """Count the bytes that this user can still write into a folder's file system."""
        return shutil.disk_usage(folder).free

    def create(self, path: Path) -> BinaryIO:
        """Open a file for writing; what it held is gone."""
        return path.open("wb")

    def sync(self, stream: BinaryIO) -> None:
        """Wait until what was written to a file is on the disk, so that it outlives a power failure.

        The system is told to forget its own copy, where it takes such hints: what reads the file next
        then sees what the disk holds.
        """
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def copy(self, source: Path, stream: BinaryIO) -> None:
        """Append a file's content to an open one."""
        with source.open("rb") as content:
            shutil.copyfileobj(content, stream, COPIED_AT_ONCE)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        os.link(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """Rename a file in one step; a file that has the new name already is gone."""
        os.replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        """Wait until a folder's names are on the disk. Windows writes them down by itself."""
        if os.name == "nt":
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Delete a file; one that is gone already is no failure."""
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file: the whole new one, or what was there stays, whatever ends the process meanwhile.

    Args:
        path: the file; its folder exists.
        text: what it is to hold, in UTF-8.

    Raises:
        OSError: it cannot be written; no part of it is left behind.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the one in flight is the one to show
            partial.unlink(missing_ok=True)
        raise
