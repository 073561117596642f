"""Writes checkpoints while training goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from ldm.training.checkpoint_io import CheckpointWriteError, StreamingCheckpointIO, file_size

logger = logging.getLogger(__name__)

BLOCK: Final = 1 << 30
"""Bytes of host memory that are taken at once; a power of two, to which pinned memory is rounded."""

ALIGNMENT: Final = 64
"""Bytes."""


class BackgroundCheckpointIO(StreamingCheckpointIO):
    """Copies a checkpoint to the host's memory; a thread writes it from there.

    What is asked for after a file, such as its second name or an older one's deletion, waits its turn
    behind it, and nothing is done any more after a failure: the guarantees are those of writing at once.
    A failure is raised by the next save, or by :meth:`finish`. One file is on its way at a time.

    Args:
        arguments: as for :class:`StreamingCheckpointIO`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._memory = HostMemory()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._waiting: list[Future[None]] = []
        self._has_failed = False

    def reserve(self, size: int) -> None:
        """Take the memory for a checkpoint before training begins, so that the first save need not; in bytes."""
        self._memory.reserve(size)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Copy a checkpoint, and have it written; see the base class.

        Raises:
            CheckpointWriteError: if what was asked for before could not be done.
        """
        self.finish()
        copy = self._memory.hold(checkpoint)
        self._note(copy, Path(path))
        self._ask(lambda: super(BackgroundCheckpointIO, self).save_checkpoint(copy, path, storage_options))

    def duplicate(self, source: Path, target: Path) -> None:
        """Give a checkpoint a second name once it is written; see the base class."""
        self._ask(lambda: super(BackgroundCheckpointIO, self).duplicate(source, target))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint once the one that takes its place is written; see the base class."""
        self._ask(lambda: super(BackgroundCheckpointIO, self).remove_checkpoint(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, which may still be on its way; see the base class."""
        self.finish()
        return super().load_checkpoint(path, map_location, weights_only)

    def has(self, path: Path) -> bool:
        """Tell whether a checkpoint is there, or going to be."""
        return path == self.newest_path or super().has(path)

    def finish(self) -> None:
        """Wait for all that was asked for.

        Raises:
            CheckpointWriteError: if it could not be done.
        """
        waiting, self._waiting = self._waiting, []
        try:
            for each in waiting:
                each.result()
        except Exception:
            self.newest_path = None
            raise
        finally:
            self._has_failed = False

    def teardown(self) -> None:
        """Wait for what a run that was broken off had asked for, and log it if that failed."""
        try:
            self.finish()
        except CheckpointWriteError as error:
            logger.error("%s", error)
        super().teardown()

    def _ask(self, act: Callable[[], None]) -> None:
        """Have something done in its turn, unless what came before it fails."""

        def act_in_turn() -> None:
            if self._has_failed:
                return
            try:
                act()
            except BaseException:
                self._has_failed = True
                raise

        self._waiting.append(self._writer.submit(act_in_turn))


class HostMemory:
    """Memory of the computer that holds one copy of a checkpoint, and is used again for the next.

    It is pinned where there is a GPU, which can then copy to it at full speed.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.UntypedStorage] = []
        self._block = 0
        self._block_size = BLOCK
        self._used = 0

    def reserve(self, size: int) -> None:
        """Have memory at hand; pinning it takes some seconds for 10 GB.

        Args:
            size: bytes.
        """
        self._block_size = min(BLOCK, size)
        while sum(block.nbytes() for block in self._blocks) < size:
            self._add_block(self._block_size)

    def hold(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a checkpoint; the copy before is written over.

        Args:
            checkpoint: a nest of containers with tensors on any device.

        Returns:
            The same nest with tensors on the CPU. Those that share memory share it in the copy too.
        """
        self._block = self._used = 0
        self._block_size = min(BLOCK, file_size(checkpoint))
        storages: dict[int, torch.UntypedStorage] = {}
        copy = {key: self._copy(value, storages) for key, value in checkpoint.items()}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copy

    def _copy(self, content: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
        if isinstance(content, torch.Tensor):
            if content.layout is not torch.strided:
                return content.detach().cpu().clone()
            storage = content.untyped_storage()
            if storage._cdata not in storages:
                held = self._take(storage.nbytes())
                held.copy_(storage, non_blocking=storage.device.type == "cuda")
                storages[storage._cdata] = held
            empty = torch.empty(0, dtype=content.dtype)
            return empty.set_(storages[storage._cdata], content.storage_offset(), content.shape, content.stride())
        if isinstance(content, dict):
            pairs = ((key, self._copy(value, storages)) for key, value in content.items())
            if type(content) is dict:
                return dict(pairs)
            copied = content.copy()  # an ordered one, say
            copied.update(pairs)
            return copied
        if type(content) in (list, tuple):
            return type(content)(self._copy(value, storages) for value in content)
        return content

    def _take(self, size: int) -> torch.UntypedStorage:
        """Take a piece of the memory, and more memory where what is there has been used up."""
        while self._block < len(self._blocks) and self._used + size > self._blocks[self._block].nbytes():
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._add_block(max(self._block_size, size))
        start = self._used
        # Empty tensors take room too: torch tells the tensors of a file apart by where they lie.
        self._used += (size // ALIGNMENT + 1) * ALIGNMENT
        return self._blocks[self._block][start : start + size]

    def _add_block(self, size: int) -> None:
        block = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        self._blocks.append(block.untyped_storage())
