"""A disk that fails at a chosen moment."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from ldm.training.disk import Disk

DELETES = ("remove",)


class FaultyDisk(Disk):
    """Fails at the n-th thing that is asked of it: a call, or a write to an open file.

    Args:
        at: which one, from 0.
        fault: what is raised then; a number stands for the system's error of that number.
        stays: whether all that comes afterwards fails too, but for deleting, which full disks do.
        partial: whether a write that fails leaves half of what it was given.
        links: whether there are hard links.
    """

    def __init__(
        self, at: int, fault: int | BaseException, stays: bool = False, partial: bool = False, links: bool = True
    ) -> None:
        self.at = at
        self.fault = fault
        self.stays = stays
        self.partial = partial
        self.links = links
        self.asked = 0
        self.has_failed = False

    def ask(self, what: str) -> None:
        number = self.asked
        self.asked += 1
        if number == self.at or (self.stays and number > self.at and what not in DELETES):
            self.has_failed = True
            raise OSError(self.fault, os.strerror(self.fault)) if isinstance(self.fault, int) else self.fault

    def make_folder(self, folder: Path) -> None:
        self.ask("make_folder")
        super().make_folder(folder)

    def free(self, folder: Path) -> int:
        self.ask("free")
        return super().free(folder)

    def create(self, path: Path) -> BinaryIO:
        self.ask("create")
        return FaultyFile(self, path)  # type: ignore[return-value]

    def sync(self, stream: BinaryIO) -> None:
        self.ask("sync")
        super().sync(stream)

    def link(self, source: Path, target: Path) -> None:
        self.ask("link")
        if not self.links:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        super().link(source, target)

    def replace(self, source: Path, target: Path) -> None:
        self.ask("replace")
        super().replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        self.ask("sync_folder")
        super().sync_folder(folder)

    def remove(self, path: Path) -> None:
        self.ask("remove")
        super().remove(path)


class FaultyFile(io.FileIO):
    """A file on such a disk."""

    def __init__(self, disk: FaultyDisk, path: Path) -> None:
        super().__init__(path, "wb")
        self.disk = disk

    def write(self, content: Any) -> int:
        try:
            self.disk.ask("write")
        except BaseException:
            if self.disk.partial:
                super().write(memoryview(content)[: len(content) // 2])
            raise
        return super().write(content)
