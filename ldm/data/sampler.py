"""Which exposure comes when, for one device: its share of an epoch's batches, and the rest of them after a resume."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.buckets import EpochPlan, Segments, count_batches, number_sizes, plan_epoch
from ldm.data.exposure_set import ExposureSet, Filler
from ldm.data.loader_processes import LoaderProcesses


class EpochBatches(Sampler[list[int]]):
    """Yields the batches of one epoch, as a function of its arguments, the epoch and the start alone.

    A batch of all devices together holds pictures of one size (see :func:`ldm.data.buckets.plan_epoch`). Rank
    ``r`` of ``n`` takes every n-th of its exposures from the r-th on, so what a step is trained on does not depend
    on the number of devices that share it. All ranks get equally many batches: where the last batch of a size
    holds fewer exposures than there are ranks, the others get a :class:`~ldm.data.exposure_set.Filler`, which
    does not count; data sets of other projects have none, and show that exposure once more.

    Args:
        dataset: an :class:`~ldm.data.exposure_set.ExposureSet`, whose indices name exposures of all epochs; or a
            map-style data set, whose items all have one size.
        batch_size: exposures in a batch of one rank, at least 1.
        seed: the run's seed.
        shuffle: draw the order anew for each epoch; otherwise exposures come as they are, size after size.
        num_replicas: number of ranks.
        rank: this rank, from 0.
        only_epoch: show this epoch's batches in every epoch, for a model that is to overfit on some; None: each
            epoch its own.

    Attributes:
        epoch: the epoch that the next iteration yields, from 0.
        start: how many of its batches the next iteration passes over.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        only_epoch: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch needs at least 1 exposure, not {batch_size}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not in [0, {num_replicas})")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_replicas = num_replicas
        self.rank = rank
        self.only_epoch = only_epoch
        self.epoch = only_epoch or 0
        self.start = 0
        self._begun: tuple[int, Segments] = (0, ())
        self._plan: tuple[int, EpochPlan] | None = None
        self._counted: tuple[int, int] | None = None
        self._fingerprint: tuple[int, str] | None = None

    @property
    def together(self) -> int:
        """Exposures in a batch of all ranks."""
        return self.batch_size * self.num_replicas

    @property
    def sampler(self) -> EpochBatches:
        """This object: the trainer looks here for whom to tell the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (the trainer calls this)."""
        self.epoch = epoch if self.only_epoch is None else self.only_epoch

    def exposures(self, epoch: int) -> int:
        """Count the exposures of an epoch."""
        return self.dataset.epoch_length(epoch) if isinstance(self.dataset, ExposureSet) else len(self.dataset)

    def begin_with(self, epoch: int, segments: Segments) -> None:
        """Say how an epoch began where the batch size was another then; the rest of it is planned anew.

        Args:
            epoch: the epoch.
            segments: exposures in a batch of all ranks, and how many of those batches, in turn.
        """
        self._begun = (epoch, tuple(segments))
        self._plan = None

    def fingerprint(self, epoch: int) -> str:
        """Sum up what an epoch's batches follow from beside their size: seed, shuffling, and who has whose shape."""
        if self._fingerprint is None or self._fingerprint[0] != epoch:
            digest = hashlib.blake2b(f"{self.seed} {self.shuffle}".encode(), digest_size=8)
            if isinstance(self.dataset, ExposureSet):
                digest.update(number_sizes(self.dataset.training_sizes(epoch)).astype("<i8").tobytes())
            self._fingerprint = (epoch, digest.hexdigest())
        return self._fingerprint[1]

    def segments(self, epoch: int) -> Segments:
        """Give what :meth:`begin_with` said of an epoch."""
        return self._begun[1] if self._begun[0] == epoch else ()

    def plan(self, epoch: int) -> EpochPlan:
        """Plan an epoch's batches of all ranks together; the last plan is kept."""
        if self._plan is None or self._plan[0] != epoch:
            sizes = self.dataset.training_sizes(epoch) if isinstance(self.dataset, ExposureSet) else len(self.dataset)
            plan = plan_epoch(sizes, self.together, self.seed, epoch, self.shuffle, self.segments(epoch))
            self._plan = (epoch, plan)
        return self._plan[1]

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Go through this rank's batches of an epoch.

        Args:
            epoch: from 0.
            start: leave out this many from the beginning.

        Yields:
            Indices into the data set, in the order in which they are shown.
        """
        plan = self.plan(epoch)
        ours = isinstance(self.dataset, ExposureSet)
        first = self.dataset.epoch_start(epoch) if ours else 0
        for number in range(start, len(plan)):
            indices = (plan.batch(number) + first).tolist()
            share = indices[self.rank :: self.num_replicas]
            if share:
                yield share
            else:
                yield [Filler(indices[0]) if ours else indices[0]]

    def __len__(self) -> int:
        """Count the batches of the whole epoch, whatever the start is."""
        if self.segments(self.epoch):
            return len(self.plan(self.epoch))
        if self._counted is None or self._counted[0] != self.epoch:
            self._counted = (self.epoch, count_batches(self.dataset, self.together, self.epoch))
        return self._counted[1]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches(self.epoch, self.start)


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
        batch_sampler: an :class:`EpochBatches`; or what the trainer puts in its place to predict.
        progress: where the trainer stands; None: epochs are always iterated whole.
        options: what else :class:`torch.utils.data.DataLoader` takes.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_sampler: Sampler[list[int]] | None = None,
        progress: EpochProgress | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.progress = progress
        self._processes: LoaderProcesses | None = None

    def __iter__(self) -> Any:
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        if isinstance(self.batch_sampler, EpochBatches):
            self.batch_sampler.start = self.progress.batches_done if self.progress is not None else 0
        before = set(multiprocessing.active_children()) if self.num_workers else set()
        batches = super().__iter__()
        if self.num_workers and (started := set(multiprocessing.active_children()) - before):
            self._processes = LoaderProcesses(started)
        while True:
            with nullcontext() if self._processes is None else self._processes.awaiting():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where an epoch goes on follows from the trainer's own count.

        The trainer warns about loaders without this method that they cannot resume.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing back, as :meth:`state_dict` returned nothing."""
