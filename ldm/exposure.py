"""Random draws as a pure function of what they are for: one exposure of one picture.

An *exposure* is one showing of a picture to the model, named by the four integers
``(seed, epoch, item, repeat)``. Everything random about it (crop, flip, caption dropout,
timestep, noise, posterior sample) comes from a CPU generator that is seeded by those four
numbers and by the purpose of the draw. Nothing else enters, so a draw does not depend on worker
count, device, number of GPUs, micro-batch split, or on what was drawn before it, and a resumed run
repeats an unbroken one without any saved generator state.

A leaf: both ``ldm.data`` and ``ldm.models`` use it, and it imports neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

EXPOSURE_COLUMNS: Final = ("seed", "epoch", "item", "repeat")
"""What the four columns of an exposure tensor hold, in order."""


def item_id(relative_path: str) -> int:
    """Name a picture by its path below the data root, so that adding pictures renames no other.

    Args:
        relative_path: the picture's path below its data root; back slashes count as slashes, so that
            Windows and POSIX machines agree.

    Returns:
        An integer in [0, 2**63), the same on every machine.
    """
    digest = hashlib.blake2b(relative_path.replace("\\", "/").encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def exposure_row(seed: int, epoch: int, item: int, repeat: int) -> Tensor:
    """Pack one exposure's name for a batch.

    Args:
        seed: the run's seed.
        epoch: epoch number, from 0.
        item: the picture, from :func:`item_id`.
        repeat: which of the picture's showings in this epoch, from 0.

    Returns:
        int64 tensor (4,), the columns of ``EXPOSURE_COLUMNS``.
    """
    return torch.tensor([seed, epoch, item, repeat], dtype=torch.int64)


def keyed_generator(purpose: str, *key: int) -> torch.Generator:
    """Build the CPU generator for one purpose and key.

    Args:
        purpose: what the draw is for, such as ``"noise"`` or ``"order"``. Draws for different
            purposes are independent.
        key: integers that name the occasion, each within int64.

    Returns:
        A freshly seeded CPU generator: equal arguments give equal draws, on every machine. Torch's generator
        keeps 32 bits of a seed, so among 100,000 keys about one pair shares its draws: harmless noise.
    """
    digest = hashlib.blake2b(purpose.encode("utf-8"), digest_size=8)
    for number in key:
        digest.update(int(number).to_bytes(8, "little", signed=True))
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest.digest(), "little", signed=True))
    return generator


def randn(purpose: str, exposures: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw standard normals for each exposure.

    Args:
        purpose: what the draw is for.
        exposures: int64 (B, 4), one row an exposure.
        shape: the shape of one item's draw.

    Returns:
        float32 (B, ...) on the CPU, items of the given shape; row i depends on ``exposures[i]`` alone.
    """
    return torch.stack(
        [torch.randn(tuple(shape), generator=keyed_generator(purpose, *row)) for row in exposures.tolist()]
    )


def randint(purpose: str, exposures: Tensor, high: int) -> Tensor:
    """Draw an integer in [0, high) for each exposure.

    Args:
        purpose: what the draw is for.
        exposures: int64 (B, 4), one row an exposure.
        high: exclusive upper bound, at least 1.

    Returns:
        int64 (B,) on the CPU; element i depends on ``exposures[i]`` alone.
    """
    return torch.stack(
        [torch.randint(high, (), generator=keyed_generator(purpose, *row)) for row in exposures.tolist()]
    )


def uniform(purpose: str, exposure: Tensor) -> float:
    """Draw one number in [0, 1) for one exposure (a coin for a flip, a dropout, a crop offset).

    Args:
        purpose: what the draw is for.
        exposure: int64 (4,).

    Returns:
        A float in [0, 1).
    """
    return float(torch.rand((), generator=keyed_generator(purpose, *exposure.tolist()), dtype=torch.float64))


def uniform_pair(purpose: str, exposure: Tensor) -> tuple[float, float]:
    """Draw two numbers in [0, 1) for one exposure (the two coordinates of a crop).

    Args:
        purpose: what the draw is for.
        exposure: int64 (4,).

    Returns:
        Two floats in [0, 1), independent of each other.
    """
    generator = keyed_generator(purpose, *exposure.tolist())
    first, second = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return first, second
