"""Which exposure comes when: the order of an epoch, its share for each rank, and its remainder after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.exposure import keyed_generator


def steps_per_epoch(exposures: int, batch_size: int, num_replicas: int = 1) -> int:
    """Count the batches of an epoch on each rank; the last one may be short.

    Args:
        exposures: pictures times repeats.
        batch_size: exposures in a batch of one rank.
        num_replicas: number of ranks.

    Returns:
        Batches, at least 1 where there is an exposure.
    """
    return math.ceil(math.ceil(exposures / num_replicas) / batch_size)


class EpochSampler(Sampler[int]):
    """Yields the indices of one epoch, as a function of its arguments, the epoch and the start alone.

    Rank ``r`` of ``n`` takes every n-th index from the r-th on, so the ranks' i-th batches together hold
    the same exposures as the i-th batch of one rank with the whole batch size. Where the ranks do not
    divide the epoch, the order is continued from its beginning until they do.

    Args:
        length: exposures in an epoch, at least 1.
        seed: the run's seed.
        shuffle: draw the order anew for each epoch; otherwise it is 0, 1, 2, ...
        num_replicas: number of ranks.
        rank: this rank, from 0.
        index_names_epoch: yield ``position + epoch * length``, for data sets that read the epoch from the
            index; otherwise the bare position.

    Attributes:
        epoch: the epoch that the next iteration yields, from 0.
        start: how many of this rank's indices the next iteration passes over.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        index_names_epoch: bool = False,
    ) -> None:
        if length < 1:
            raise ValueError(f"an epoch needs at least 1 exposure, not {length}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not in [0, {num_replicas})")
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.num_replicas = num_replicas
        self.rank = rank
        self.index_names_epoch = index_names_epoch
        self.epoch = 0
        self.start = 0

    @property
    def padding(self) -> int:
        """How many exposures of an epoch are shown twice so that every rank gets as many."""
        return -self.length % self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (the trainer calls this)."""
        self.epoch = epoch

    def indices(self, epoch: int, start: int = 0) -> list[int]:
        """List this rank's indices of an epoch.

        Args:
            epoch: from 0.
            start: leave out this many from the beginning.

        Returns:
            Indices, in the order in which they are shown.
        """
        if self.shuffle:
            order = torch.randperm(self.length, generator=keyed_generator("order", self.seed, epoch))
        else:
            order = torch.arange(self.length)
        mine = torch.arange(self.rank, self.length + self.padding, self.num_replicas)[start:] % self.length
        offset = epoch * self.length if self.index_names_epoch else 0
        return (order[mine] + offset).tolist()

    def __len__(self) -> int:
        """Count this rank's indices of a whole epoch, whatever the start is."""
        return (self.length + self.padding) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices(self.epoch, self.start))


class EpochProgress(Protocol):
    """The trainer's count of this epoch's batches, which decides where a loader starts."""

    @property
    def batches_done(self) -> int:
        """Batches of the current epoch that have been trained on."""
        ...


class EpochLoader(DataLoader[Any]):
    """A data loader that starts an epoch where the trainer stands in it.

    Iterating costs nothing until the first batch is asked for; only then are the epoch and the start
    read and the workers started. (The trainer makes an iterator once to see whether it can and once
    to use it, both before it says which epoch it resumes.)

    Its length is that of the whole epoch, also when it starts part-way: the trainer counts on from the
    batches that it has done.

    Args:
        dataset: a map-style data set.
        sampler: an :class:`EpochSampler`; or what the trainer puts in its place to predict, or to overfit.
        progress: where the trainer stands; None: epochs are always iterated whole.
        options: what else :class:`torch.utils.data.DataLoader` takes.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sampler: Sampler[int] | None,
        progress: EpochProgress | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, sampler=sampler, **options)
        self.progress = progress

    def __iter__(self) -> Any:
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        if isinstance(self.sampler, EpochSampler):
            done = self.progress.batches_done if self.progress is not None else 0
            self.sampler.start = done * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where an epoch goes on follows from the trainer's own count.

        The trainer warns about loaders without this method that they cannot resume.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing back, as :meth:`state_dict` returned nothing."""
