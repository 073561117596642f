"""How a run's checkpoint files reach the disk and come back."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO

from ldm.checkpoint import read_checkpoint

PARTIAL: Final = ".partial"
"""Ending of a file that is being written."""

FULL: Final = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What a system says of a disk, or a user's share of it, without room; Windows knows no quotas."""


class CheckpointWriteError(OSError):
    """A checkpoint that did not reach the disk."""


class StreamingCheckpointIO(CheckpointIO):
    """Writes checkpoints tensor by tensor to a neighbouring file, then renames it into place.

    Lightning's own writer serialises into memory and copies that once more, which for a 12 GB
    checkpoint takes 24 GB of host memory. The rename is atomic, so that whatever ends the process, a
    name in ``checkpoints/`` either holds a whole file or the whole previous one.
    """

    def __init__(self) -> None:
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
                room that is needed.
        """
        if storage_options is not None:
            raise ValueError("storage_options are not supported: checkpoints are files on a local disk")
        target = Path(path)
        partial = _partial_name(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, target)
        except BaseException as error:
            _remove_quietly(partial)
            # torch reports a full disk as a RuntimeError of its file writer.
            if isinstance(error, (OSError, RuntimeError)):
                raise CheckpointWriteError(_describe_failure(error, _tensor_bytes(checkpoint), target)) from error
            raise
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
            ValueError: if the file is damaged or no checkpoint.
            OSError: if it cannot be opened.
        """
        return read_checkpoint(os.fspath(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint that dropped out of the best few.

        Args:
            path: the file; nothing happens if it is gone already.
        """
        Path(path).unlink(missing_ok=True)

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
        partial = _partial_name(target)
        partial.unlink(missing_ok=True)
        try:
            try:
                os.link(source, partial)
            except OSError:
                shutil.copyfile(source, partial)
            os.replace(partial, target)
        except BaseException as error:
            _remove_quietly(partial)
            if isinstance(error, OSError):
                needed = source.stat().st_size
                raise CheckpointWriteError(_describe_failure(error, needed, target)) from error
            raise


def remove_leftovers(folder: Path) -> None:
    """Delete the half-written checkpoints of a process that was killed.

    Args:
        folder: the folder of checkpoints; one that nobody writes to.
    """
    for path in folder.glob(f"*.ckpt{PARTIAL}"):
        path.unlink(missing_ok=True)


def _describe_failure(error: BaseException, needed: int, target: Path) -> str:
    """Tell a full disk, with the room that is needed and there, from other failures."""
    free = shutil.disk_usage(target.parent).free
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in FULL:
            break
        chain = chain.__cause__ or chain.__context__
    if chain is None and free >= needed:
        return f"could not write the checkpoint {target}: {' '.join(str(error).split())}"
    return (
        f"the disk is full: the checkpoint {target} needs {_size(needed)}, {_size(free)} are free; make"
        " room, or keep fewer checkpoints with lightning.modelcheckpoint.params.save_top_k=1"
    )


def _size(count: int) -> str:
    """Write a number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _tensor_bytes(content: Any) -> int:
    """Add up the tensors inside a nest of containers."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, Mapping):
        return sum(map(_tensor_bytes, content.values()))
    if isinstance(content, (list, tuple)):
        return sum(map(_tensor_bytes, content))
    return 0


def _partial_name(target: Path) -> Path:
    """Name the file that is written before it takes the target's place."""
    return target.with_name(target.name + PARTIAL)


def _remove_quietly(path: Path) -> None:
    """Delete a half-written file while another exception is on its way up."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # The exception in flight is the one to show; the next save replaces the leftover.
        return
