"""The batches of an epoch: every exposure once, pictures of one size together, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ldm.data.exposure_set import ExposureSet
from ldm.exposure import keyed_generator

Segments = Sequence[tuple[int, int]]
"""What an epoch has trained on so far with other batch sizes: ``(batch size, batches)`` in turn."""


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch, of all devices together.

    Attributes:
        positions: int64 (exposures,), positions in the epoch, batch after batch.
        starts: int64 (batches,), where each batch begins in ``positions``.
        ends: int64 (batches,), where it ends.
    """

    positions: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, number: int) -> npt.NDArray[np.int64]:
        """Give the positions in the epoch of one batch's exposures."""
        return self.positions[self.starts[number] : self.ends[number]]


def plan_epoch(
    sizes: npt.NDArray[np.integer] | int,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    done: Segments = (),
) -> EpochPlan:
    """Plan the batches of an epoch.

    The exposures are shuffled; those of one size follow each other in batches, the last of which may be
    short; and batches of different sizes are shuffled among each other. No exposure is left out and none
    comes twice. A single size gives consecutive stretches of the shuffled order.

    Args:
        sizes: (exposures, 2), the size of each exposure's training picture; or the number of exposures, where
            all have one size.
        batch_size: exposures in a batch of all devices together, at least 1.
        seed: the run's seed.
        epoch: from 0; each has its own order.
        shuffle: draw orders; otherwise exposures come as they are, size after size.
        done: batches that this epoch began with when the batch size was another. They come first, and what
            they leave is planned with ``batch_size``.

    Returns:
        The plan: a function of the arguments alone.
    """
    groups = np.zeros(sizes, dtype=np.int64) if isinstance(sizes, int) else number_sizes(sizes)
    if shuffle:
        remaining = torch.randperm(len(groups), generator=keyed_generator("order", seed, epoch)).numpy()
    else:
        remaining = np.arange(len(groups))
    parts: list[npt.NDArray[np.int64]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    for number, (size, limit) in enumerate([*done, (batch_size, None)]):
        plan = _plan_remaining(remaining, groups, size, (seed, epoch, number) if shuffle else None)
        taken = len(plan) if limit is None else min(limit, len(plan))
        parts += [plan.batch(batch) for batch in range(taken)] if limit is not None else [_in_order(plan)]
        lengths.append((plan.ends - plan.starts)[:taken])
        if limit is not None:
            seen = np.concatenate([np.empty(0, np.int64), *parts])
            remaining = remaining[~np.isin(remaining, seen)]
    ends = np.cumsum(np.concatenate(lengths))
    return EpochPlan(np.concatenate(parts), ends - np.concatenate(lengths), ends)


def number_sizes(sizes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Number the different sizes among some.

    Args:
        sizes: (exposures, 2), width and height.

    Returns:
        int64 (exposures,): each one's number, from 0 for the narrowest; all that a plan takes from sizes.
    """
    packed = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1].astype(np.int64)
    return np.unique(packed, return_inverse=True)[1].reshape(-1)


def _plan_remaining(
    order: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    batch_size: int,
    key: tuple[int, ...] | None,
) -> EpochPlan:
    """Cut an order into batches of one group each, and shuffle those by a key; None leaves them group by group."""
    by_group = np.argsort(groups[order], kind="stable")
    positions = order[by_group]
    counts = np.unique(groups[positions], return_counts=True)[1]
    ends_of_groups = np.cumsum(counts)
    starts = [np.arange(end - count, end, batch_size) for end, count in zip(ends_of_groups, counts, strict=True)]
    ends = [np.minimum(first + batch_size, end) for first, end in zip(starts, ends_of_groups, strict=True)]
    if not starts:
        return EpochPlan(positions, np.empty(0, np.int64), np.empty(0, np.int64))
    all_starts, all_ends = np.concatenate(starts), np.concatenate(ends)
    if key is not None and len(counts) > 1:
        shuffled = torch.randperm(len(all_starts), generator=keyed_generator("batch_order", *key)).numpy()
        all_starts, all_ends = all_starts[shuffled], all_ends[shuffled]
    return EpochPlan(positions, all_starts, all_ends)


def _in_order(plan: EpochPlan) -> npt.NDArray[np.int64]:
    """Lay a plan's positions out in the order of its batches."""
    lengths = plan.ends - plan.starts
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return plan.positions[np.repeat(plan.starts, lengths) + within]


def count_batches(dataset: Any, batch_size: int, epoch: int = 0) -> int:
    """Count the batches of an epoch, of all devices together, without drawing its order.

    Args:
        dataset: an :class:`~ldm.data.exposure_set.ExposureSet`, or any data set with a length.
        batch_size: exposures in a batch of all devices together.
        epoch: from 0.

    Returns:
        Batches; the short ones count.
    """
    if not isinstance(dataset, ExposureSet):
        return -(-len(dataset) // batch_size)
    counts = np.unique(number_sizes(dataset.training_sizes(epoch)), return_counts=True)[1]
    return int((-(-counts // batch_size)).sum())
