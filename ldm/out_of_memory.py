"""What a lack of memory looks like, and how to get memory back. A leaf: models and runs use it alike."""

from __future__ import annotations

import gc
from typing import Final

import torch

OUT_OF_MEMORY_WORDS: Final = ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED")
"""What such errors say that have no type of their own: of the CPU's allocator, of drivers, of cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a failure is a lack of memory, on whichever device.

    Args:
        error: an exception, also one that a loader process has sent.

    Returns:
        True for a lack of the device's or the computer's memory.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def free_memory() -> None:
    """Give back what nothing holds any more: reference cycles, and what the device's allocator keeps for later."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
