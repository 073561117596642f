"""Renames and writes files so that nothing is overwritten unasked and everything can be undone."""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

LOG_PREFIX: Final = ".captions-undo-"
"""How a log's name begins; the dot keeps it out of the data set."""


class FileChanges:
    """Changes below a folder, as a context: all of them, or after an error none.

    Each change is noted in a log in the folder before it happens, so that what a crash leaves can be undone too.
    Every file has its old name or its new one at any time, never a third.

    Args:
        root: the folder.

    Attributes:
        log: the log of the changes, by which :func:`undo` takes them back; written with the first change.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.log = Path(root) / f"{LOG_PREFIX}{datetime.now().strftime('%Y%m%d-%H%M%S-%f')}.jsonl"
        self._file: TextIO | None = None

    def __enter__(self) -> FileChanges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self._file.close()
        if error is None:
            return
        left = undo(self.root, self.log)
        if left and isinstance(error, OSError | ValueError):
            raise OSError(
                "\n".join([str(error), "and not all changes before it could be taken back:", *left])
            ) from error

    def rename(self, source: str, target: str) -> None:
        """Give a file another name in its folder.

        Raises:
            OSError: another file has the name already, or the system refuses.
        """
        if _is_taken(target, source):
            raise FileExistsError(f"'{target}' exists already; '{source}' was not renamed")
        self._note({"rename": [self._relative(source), self._relative(target)]})
        os.rename(source, target)

    def write(self, path: str, text: str) -> None:
        """Write a file, or replace its content in one step.

        Raises:
            OSError: the system refuses.
        """
        content = text.encode("utf-8")
        before = _read(path)
        self._note({"write": self._relative(path), "before": _to_text(before), "after": _digest(content)})
        _replace(path, content)

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.root).replace(os.sep, "/")

    def _note(self, change: dict[str, Any]) -> None:
        if self._file is None:
            self._file = open(self.log, "x", encoding="utf-8")  # noqa: SIM115
        self._file.write(json.dumps(change) + "\n")
        self._file.flush()


def newest_log(root: str) -> Path:
    """Find the log of the latest changes below a folder.

    Raises:
        FileNotFoundError: nothing is left to undo.
    """
    logs = sorted(Path(root).glob(f"{LOG_PREFIX}*.jsonl"))
    if not logs:
        raise FileNotFoundError(f"there is nothing to undo in '{root}'")
    return logs[-1]


def undo(root: str, log: Path) -> list[str]:
    """Take back the changes of a log, the latest first, and remove the log.

    Nothing is overwritten that was changed since. What was taken back already, or never happened, is passed over.

    Args:
        root: the folder that the changes were made below.
        log: the log.

    Returns:
        A line for each change that could not be taken back; the log stays where there is any.

    Raises:
        OSError: the log cannot be read.
        ValueError: it is no log.
    """
    left = []
    for change in reversed(_read_log(log)):
        problem = _undo_rename(root, *change["rename"]) if "rename" in change else _undo_write(root, change)
        if problem:
            left.append(problem)
    if not left:
        log.unlink()
    return left


def count_changes(log: Path) -> int:
    """Count the changes that a log holds."""
    return len(_read_log(log))


def _read_log(log: Path) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = []
    lines = log.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            change = json.loads(line)
        except ValueError:
            if number == len(lines):  # a crash in the middle of the line: the change had not begun
                break
            change = None
        if not _is_change(change):
            raise ValueError(f"{log}: line {number}: is no change that can be undone; remove the file")
        changes.append(change)
    return changes


def _is_change(change: object) -> bool:
    """Tell whether a log's line is a change below its folder; a foreign data set may bring a log of its own."""
    if not isinstance(change, dict):
        return False
    paths = change.get("rename", [change.get("write")])
    if not isinstance(paths, list) or len(paths) != (2 if "rename" in change else 1):
        return False
    if not all(isinstance(path, str) and path for path in paths):
        return False
    if any(os.path.isabs(path) or ".." in path.replace("\\", "/").split("/") for path in paths):
        return False
    return "rename" in change or (isinstance(change.get("before"), str | None) and "after" in change)


def _undo_rename(root: str, old: str, new: str) -> str | None:
    source, target = os.path.join(root, new), os.path.join(root, old)
    if not os.path.lexists(source):
        return None if os.path.lexists(target) else f"{target}: neither it nor '{source}' is there any more"
    if _is_taken(target, source):
        return f"{target}: is there again; '{source}' keeps its name"
    try:
        os.rename(source, target)
    except OSError as error:
        return f"{source}: cannot be renamed back to '{target}' ({error.strerror})"
    return None


def _undo_write(root: str, change: dict[str, Any]) -> str | None:
    path = os.path.join(root, change["write"])
    before = None if change["before"] is None else change["before"].encode("utf-8", "surrogateescape")
    try:
        now = _read(path)
        if now == before:
            return None
        if now is None or _digest(now) != change["after"]:
            return f"{path}: was changed since; left as it is"
        if before is None:
            os.remove(path)
        else:
            _replace(path, before)
    except OSError as error:
        return f"{path}: cannot be restored ({error.strerror})"
    return None


def _is_taken(target: str, source: str) -> bool:
    """Tell whether a name belongs to another file; where case does not count, 'a' and 'A' are one file."""
    if not os.path.lexists(target):
        return False
    same = os.path.lexists(source) and os.path.samestat(os.lstat(source), os.lstat(target))
    return not (same and target.casefold() == source.casefold())


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _replace(path: str, content: bytes) -> None:
    """Write beside the file and put it in its place, following a link to a file to where it leads."""
    path = os.path.realpath(path)
    unfinished = os.path.join(os.path.dirname(path), f"{LOG_PREFIX}{os.getpid()}.part")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
        if os.path.exists(path):
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    finally:
        if os.path.lexists(unfinished):
            os.remove(unfinished)


def _to_text(content: bytes | None) -> str | None:
    return None if content is None else content.decode("utf-8", "surrogateescape")


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
