"""How a run's checkpoint files reach the disk and come back."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from packaging.version import InvalidVersion, Version
from torch.optim.lr_scheduler import LRScheduler

from ldm.checkpoint import DamagedTensorError, read_checkpoint, verify_checkpoint
from ldm.training.disk import Disk
from ldm.training.run_directory import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

PARTIAL: Final = ".partial"
"""Ending of a file that is being written."""

FULL: Final = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What a system says of a disk, or a user's share of it, without room; Windows knows no quotas."""

FORBIDDEN: Final = {errno.EACCES, errno.EPERM, errno.EROFS}

BESIDE_TENSORS: Final = 1 << 20
"""Bytes that a checkpoint has room for besides its tensors and what it notes of each."""

BESIDE_TENSOR: Final = 512
"""Bytes of names, sizes and padding for each tensor."""

NAMED_FILES: Final = 5
"""How many files that could go are listed."""


_VERSION_KEY: Final = "pytorch-lightning_version"
_STATE_KINDS: Final[Mapping[str, type]] = {
    _VERSION_KEY: str,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""What Lightning keeps under these keys."""

_COUNTERS: Final = ("ready", "started", "processed", "completed")


class CheckpointWriteError(OSError):
    """A checkpoint that did not reach the disk."""


class StreamingCheckpointIO(CheckpointIO):
    """Writes checkpoints tensor by tensor to a neighbouring file, reads that back, and renames it into place.

    Lightning's own writer serialises into memory and copies that once more, which for a 12 GB
    checkpoint takes 24 GB of host memory. The rename is atomic and comes last, so that whatever ends the
    process, or fails, a name in ``checkpoints/`` either holds a whole file or the whole previous one.

    Args:
        verify: whether to read each file back from the disk, and compare its checksums, before it takes
            its name. It takes as long as the disk needs to read it.
        disk: the file system.
    """

    def __init__(self, verify: bool = True, disk: Disk | None = None) -> None:
        self.verify = verify
        self.disk = disk or Disk()
        self.newest_path: Path | None = None
        """The file that was written last in this process."""
        self.newest_loops: Mapping[str, Any] | None = None
        """The fit loop's progress inside that file."""
        self.newest_can_be_continued = False
        """Whether that file holds the optimiser's state beside the weights."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what Lightning gathered: weights, optimiser, loops.
            path: the file's name in the end; its folder is made if it is missing.
            storage_options: not supported, must be None.

        Raises:
            CheckpointWriteError: if the file cannot be written, naming it and, where the disk is full, the
                room that is needed and what could go. What was there before is untouched.
        """
        if storage_options is not None:
            raise ValueError("storage_options are not supported: checkpoints are files on a local disk")
        target = Path(path)
        self._put(target, file_size(checkpoint), lambda stream: torch.save(checkpoint, stream))
        self._note(checkpoint, target)

    def check_room(self, content: Mapping[str, Any], target: Path, expected: int = 0) -> None:
        """See whether a file would fit on the disk now, and say so where a larger one to come is likely not to.

        Args:
            content: what the file is going to hold at least.
            target: its name.
            expected: bytes that it is likely to have.

        Raises:
            CheckpointWriteError: if it would not, with the room that is needed and what could go.
        """
        needed = file_size(content)
        free = self.disk.free(target.parent)
        if free < needed:
            raise CheckpointWriteError(self._describe_full_disk(needed, target))
        if free < expected:
            logger.warning(
                "a checkpoint is going to take about %s, and the disk of %s has %s free: make room before the first"
                " save",
                format_size(expected),
                target.parent,
                format_size(free),
            )

    def can_give_back(self, state: Mapping[str, Any]) -> bool:
        """Tell whether what is stored in a checkpoint can be read again, as any file is read.

        Args:
            state: a part of a checkpoint, such as the state of a callback.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / LAST_CHECKPOINT
            try:
                torch.save({"state_dict": {"none": torch.zeros(1)}, "state": state}, path)
                read_checkpoint(path, verify=False)
            except (ValueError, TypeError, AttributeError, pickle.PicklingError):
                return False
            except (OSError, RuntimeError):
                return True  # there was no room to try it
        return True

    def reserve(self, size: int) -> None:
        """Take what memory a checkpoint of this many bytes is going to need: none, here."""

    def has(self, path: Path) -> bool:
        """Tell whether a checkpoint is there.

        Args:
            path: the file.

        Returns:
            Whether it exists.
        """
        return path.exists()

    def finish(self) -> None:
        """Wait for what is still being written: nothing, here."""

    def _note(self, checkpoint: Mapping[str, Any], target: Path) -> None:
        """Remember what the newest file holds."""
        self.newest_path = target
        self.newest_loops = checkpoint.get("loops", {}).get("fit_loop")
        self.newest_can_be_continued = "optimizer_states" in checkpoint

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, safely: no file can run code.

        Args:
            path: the file.
            map_location: ignored; tensors arrive on the CPU and are copied into place from there.
            weights_only: ignored; reading is always restricted to tensors and plain values.

        Returns:
            The checkpoint's dictionary.

        Raises:
            ValueError: if the file is damaged, no checkpoint, or holds something else where Lightning is going to
                look for the state of a run.
            OSError: if it cannot be opened.
        """
        content = read_checkpoint(os.fspath(path))
        problem = _state_problem(content)
        if problem is not None:
            raise ValueError(f"checkpoint '{os.fspath(path)}' cannot be continued: {problem}; use another checkpoint")
        return content

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint that dropped out of those to keep.

        It stays, with a warning, as long as this process has written no other one, and where the system
        refuses: neither is a reason to end a run.

        Args:
            path: the file; nothing happens if it is gone already.
        """
        path = Path(path)
        if self.newest_path is None or self.newest_path == path or not self.newest_path.exists():
            logger.warning("%s stays: no other checkpoint has been written yet", path)
            return
        try:
            self.disk.remove(path)
        except OSError as error:
            logger.warning("%s could not be deleted (%s); delete it by hand", path, error.strerror or error)

    def duplicate(self, source: Path, target: Path) -> None:
        """Give a written checkpoint a second name.

        A hard link where the file system has them: it takes no room and no time, and unlike a symbolic
        link it survives being moved out of the run folder. A copy elsewhere.

        Args:
            source: an existing checkpoint.
            target: the second name; an existing file of that name is replaced.

        Raises:
            CheckpointWriteError: if neither a link nor a copy can be made.
        """
        if target.exists() and target.samefile(source):
            return  # a rename would leave both names of the one file
        partial = _partial_name(target)
        try:
            self.disk.remove(partial)
            self.disk.link(source, partial)
            self.disk.replace(partial, target)
            self.disk.sync_folder(target.parent)
        except OSError:
            self._remove_quietly(partial)
        except BaseException:
            self._remove_quietly(partial)
            raise
        else:
            return
        self._put(target, source.stat().st_size, lambda stream: self.disk.copy(source, stream))

    def _put(self, target: Path, needed: int, write: Callable[[BinaryIO], None]) -> None:
        """Make a whole file or none: room first, then content, then proof, then name."""
        partial = _partial_name(target)
        try:
            self.disk.make_folder(target.parent)
            self.disk.remove(partial)
            if self.disk.free(target.parent) < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with self.disk.create(partial) as stream:
                write(stream)
                self.disk.sync(stream)
            if self.verify:
                if not verify_checkpoint(partial):
                    raise ValueError("the file is cut short")
                read_checkpoint(partial, verify=False)
            self.disk.replace(partial, target)
            self.disk.sync_folder(target.parent)
        except BaseException as error:
            self._remove_quietly(partial)
            # torch cannot end its archive after a failed write, and raises over what made that fail.
            interruption = _first_cause(error, lambda each: not isinstance(each, Exception))
            if interruption is not None:
                raise interruption from None
            # torch reports a failed write as a RuntimeError of its file writer.
            if isinstance(error, (OSError, RuntimeError, ValueError)):
                raise CheckpointWriteError(self._describe_failure(error, needed, target)) from error
            raise

    def _describe_failure(self, error: BaseException, needed: int, target: Path) -> str:
        """Say in one line what failed and what to do."""
        cause = _first_cause(error, _is_systems)
        number, words = (cause.errno, cause.strerror) if isinstance(cause, OSError) else (None, None)
        if number in FULL:
            return self._describe_full_disk(needed, target)
        reason = words or " ".join(str(error).split())
        if number in FORBIDDEN:
            remedy = "make its folder writable for this user"
        elif isinstance(error, ValueError):
            place = error.place if isinstance(error, DamagedTensorError) else "the file is cut short"
            reason = f"what was read back is not what was written ({place})"
            remedy = "check the disk and the memory of this computer"
        else:
            remedy = "check the disk that it lies on"
        return f"could not write the checkpoint {target}: {reason}; {remedy}; the checkpoints before it are intact"

    def _describe_full_disk(self, needed: int, target: Path) -> str:
        """Say how much room there is, and what could make more."""
        try:
            room = f"its disk has {format_size(self.disk.free(target.parent))} free"
        except OSError:
            room = "its disk has less free"
        older = [(names, size) for names, size in older_checkpoints(target.parent) if target.name not in names]
        listed = ", ".join(f"{' with '.join(names)} ({format_size(size)})" for names, size in older[:NAMED_FILES])
        more = f" and {len(older) - NAMED_FILES} more" if len(older) > NAMED_FILES else ""
        remedy = f"delete older checkpoints of the run ({listed}{more})" if older else "make room"
        return (
            f"the disk is full: the checkpoint {target} needs {format_size(needed)}, {room}; {remedy}, or keep fewer"
            " with lightning.modelcheckpoint.params.save_top_k=1; the checkpoints before it are intact"
        )

    def _remove_quietly(self, path: Path) -> None:
        """Delete a half-written file while another exception is on its way up."""
        try:
            self.disk.remove(path)
        except OSError:
            # The exception in flight is the one to show; the next save replaces the leftover.
            return


def file_size(checkpoint: Mapping[str, Any]) -> int:
    """Work out how large a checkpoint's file is going to be, to the safe side.

    Args:
        checkpoint: a nest of containers with tensors on any device.

    Returns:
        Bytes. Tensors that share memory share it in the file too, and a view brings all that it is a view of.
    """
    storages: dict[int, int] = {}
    _gather_storages(checkpoint, storages)
    return sum(storages.values()) + len(storages) * BESIDE_TENSOR + BESIDE_TENSORS


def older_checkpoints(folder: Path) -> list[tuple[list[str], int]]:
    """List the checkpoints that a run can be continued without.

    Args:
        folder: a run's folder of checkpoints.

    Returns:
        For each file its names, which are several where one is a hard link to the other, and its size in
        bytes; the oldest first. ``last.ckpt`` is not among them, nor, where it is missing, the newest.
    """
    try:
        found = sorted(((path.stat(), path) for path in folder.glob("*.ckpt")), key=lambda pair: pair[0].st_mtime_ns)
    except OSError:
        return []
    files: dict[tuple[int, int], tuple[list[str], int]] = {}
    for stat, path in found:
        files.setdefault((stat.st_dev, stat.st_ino), ([], stat.st_size))[0].append(path.name)
    listed = list(files.values())
    kept = [each for each in listed if LAST_CHECKPOINT in each[0]] or listed[-1:]
    return [(sorted(names), size) for names, size in listed if (names, size) not in kept]


def remove_leftovers(folder: Path) -> None:
    """Delete the half-written checkpoints of a process that was killed.

    Args:
        folder: the folder of checkpoints; one that nobody writes to.
    """
    for path in folder.glob(f"*.ckpt{PARTIAL}"):
        path.unlink(missing_ok=True)


def format_size(count: int) -> str:
    """Write a number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _first_cause(error: BaseException, is_meant: Callable[[BaseException], bool]) -> BaseException | None:
    """Find a certain exception among one and those that led to it."""
    seen: BaseException | None = error
    while seen is not None and not is_meant(seen):
        seen = seen.__cause__ or seen.__context__
    return seen


def _is_systems(error: BaseException) -> bool:
    """Tell whether an exception says what the operating system said."""
    return isinstance(error, OSError) and error.errno is not None


def _gather_storages(content: Any, storages: dict[int, int]) -> None:
    """Note the sizes in bytes of the memory behind the tensors inside a nest of containers."""
    if isinstance(content, torch.Tensor):
        if content.layout is torch.strided:
            storage = content.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        else:
            storages[id(content)] = content.numel() * content.element_size()
    elif isinstance(content, Mapping):
        for value in content.values():
            _gather_storages(value, storages)
    elif isinstance(content, (list, tuple)):
        for value in content:
            _gather_storages(value, storages)


def _state_problem(content: Mapping[str, Any]) -> str | None:
    """Say what of a run's state is not what a run saves; Lightning takes it as attributes without looking."""
    for key, kind in _STATE_KINDS.items():
        if key in content and type(content[key]) is not kind:
            return f"its {key} is a {type(content[key]).__name__}, not a {kind.__name__}"
    try:
        Version(content.get(_VERSION_KEY, "0"))
    except InvalidVersion:
        return f"its {_VERSION_KEY} is no version"
    for key in ("optimizer_states", "lr_schedulers"):
        for state in content.get(key, ()):
            if not isinstance(state, dict):
                return f"its {key} hold a {type(state).__name__}, not a dict"
            methods = [name for name in state if callable(getattr(LRScheduler, str(name), None))]
            if methods:
                return f"its {key} would replace the function {methods[0]}"
    return _counter_problem(content.get("loops", {}), "loops")


def _counter_problem(value: Any, name: str) -> str | None:
    """Look for counters of the training loop that are no numbers."""
    if name.endswith((".current", ".total")):
        if not isinstance(value, dict):
            return f"its {name} is a {type(value).__name__}, not a dict"
        wrong = [key for key, count in value.items() if key not in _COUNTERS or type(count) is not int or count < 0]
        return f"its {name}.{wrong[0]} is no count" if wrong else None
    problems = (_counter_problem(each, f"{name}.{key}") for key, each in value.items()) if type(value) is dict else ()
    return next((problem for problem in problems if problem is not None), None)


def _partial_name(target: Path) -> Path:
    """Name the file that is written before it takes the target's place."""
    return target.with_name(target.name + PARTIAL)
