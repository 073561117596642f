import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from ldm.data.exposure_set import Filler
from ldm.data.sampler import EpochBatches, EpochLoader

SHAPES = [(64, 64)] * 9 + [(72, 56)] * 5 + [(56, 72)] * 2 + [(128, 32)]


class Exposures:
    """Two showings of each of 17 pictures in four shapes."""

    seed = 1

    def epoch_start(self, epoch: int) -> int:
        return epoch * len(self)

    def epoch_length(self, epoch: int) -> int:
        return len(self)

    def training_sizes(self, epoch: int) -> np.ndarray:
        return np.array(SHAPES * 2, dtype=np.int32)

    def __len__(self) -> int:
        return 2 * len(SHAPES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": int(index), "loss_weight": 0.0 if isinstance(index, Filler) else 1.0}


def ranks_batches(ranks: int, batch_size: int, epoch: int = 0, dataset: Any = None) -> list[list[list[int]]]:
    """The batches of each rank."""
    dataset = Exposures() if dataset is None else dataset
    samplers = [EpochBatches(dataset, batch_size, seed=1, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    return [list(sampler.batches(epoch)) for sampler in samplers]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_global_batch_is_the_same_whatever_the_number_of_ranks(ranks: int) -> None:
    whole = ranks_batches(1, 12)[0]
    shares = ranks_batches(ranks, 12 // ranks)
    together = [
        [index for share in step for index in share if not isinstance(index, Filler)]
        for step in zip(*shares, strict=True)
    ]
    assert [sorted(step) for step in together] == [sorted(step) for step in whole]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 3), (3, 2), (5, 1), (8, 4)])
def test_ranks_do_equally_many_steps_and_together_see_each_exposure_once(ranks: int, batch_size: int) -> None:
    shares = ranks_batches(ranks, batch_size)
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
    seen = Counter(index for share in shares for batch in share for index in batch if not isinstance(index, Filler))
    assert seen == Counter(range(34))


def test_ranks_without_a_picture_of_a_short_batch_get_a_filler_of_its_size() -> None:
    shares = ranks_batches(8, 4)
    fillers = [index for share in shares for batch in share for index in batch if isinstance(index, Filler)]
    assert fillers
    sizes = Exposures().training_sizes(0)
    for step in zip(*shares, strict=True):
        assert len({tuple(sizes[index]) for batch in step for index in batch}) == 1


def test_a_filler_is_the_same_item_without_weight_also_from_another_process() -> None:
    filler = pickle.loads(pickle.dumps(Filler(7)))
    assert Exposures()[filler] == {"index": 7, "loss_weight": 0.0}


def test_data_sets_of_other_projects_show_an_exposure_once_more_instead() -> None:
    shares = ranks_batches(3, 2, dataset=TensorDataset(torch.arange(7)))
    seen = [index for share in shares for batch in share for index in batch]
    assert not any(isinstance(index, Filler) for index in seen)
    assert set(seen) == set(range(7))
    assert len({len(share) for share in shares}) == 1


def test_indices_name_the_exposures_of_their_epoch() -> None:
    seen = {index for batch in ranks_batches(1, 4, epoch=3)[0] for index in batch}
    assert seen == set(range(3 * 34, 4 * 34))


def test_a_start_leaves_the_rest_of_the_order() -> None:
    sampler = EpochBatches(Exposures(), 4, seed=1, num_replicas=3, rank=2)
    assert list(sampler.batches(4, start=2)) == list(sampler.batches(4))[2:]


def test_the_length_is_that_of_the_whole_epoch_whatever_the_start() -> None:
    sampler = EpochBatches(Exposures(), 4, seed=1)
    sampler.start = 8
    assert (len(sampler), len(list(sampler))) == (5 + 3 + 1 + 1, 2)


def test_an_epoch_that_began_with_another_batch_size_does_not_repeat_what_it_showed() -> None:
    first = EpochBatches(Exposures(), 4, seed=1)
    sampler = EpochBatches(Exposures(), 3, seed=1, num_replicas=2, rank=0)
    other = EpochBatches(Exposures(), 3, seed=1, num_replicas=2, rank=1)
    seen = [index for batch in list(first.batches(2))[:5] for index in batch]
    for rank in (sampler, other):
        rank.set_epoch(2)
        rank.begin_with(2, [(4, 5)])
        seen += [index for batch in rank.batches(2, start=5) for index in batch if not isinstance(index, Filler)]
    assert sorted(seen) == list(range(68, 102))
    assert len(sampler) == len(list(sampler.batches(2)))


def test_a_fingerprint_tells_orders_apart() -> None:
    class Larger(Exposures):
        def training_sizes(self, epoch: int) -> np.ndarray:
            return 2 * super().training_sizes(epoch)

    class Otherwise(Exposures):
        def training_sizes(self, epoch: int) -> np.ndarray:
            return super().training_sizes(epoch)[::-1]

    prints = [
        EpochBatches(dataset, batch_size, seed=seed).fingerprint(epoch)
        for dataset, batch_size, seed, epoch in (
            (Exposures(), 4, 1, 0),
            (Larger(), 3, 1, 1),
            (Otherwise(), 4, 1, 0),
            (Exposures(), 4, 2, 0),
            (TensorDataset(torch.arange(34)), 4, 1, 0),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 5, "num_replicas": 2, "rank": 2}])
def test_impossible_arguments_are_errors(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        EpochBatches(Exposures(), seed=1, **arguments)


def test_steps_are_the_loaders_length() -> None:
    for batch_size, ranks in ((2, 4), (3, 1), (3, 2)):
        sampler = EpochBatches(Exposures(), batch_size, seed=1, num_replicas=ranks)
        loader = EpochLoader(Exposures(), batch_sampler=sampler)  # type: ignore[arg-type]
        assert len(loader) == len(list(loader)) == len(sampler.plan(0))


class Progress:
    batches_done = 0


def test_a_loader_reads_epoch_and_position_when_the_first_batch_is_asked_for() -> None:
    progress = Progress()
    sampler = EpochBatches(TensorDataset(torch.arange(10)), 3, seed=1)
    loader = EpochLoader(sampler.dataset, batch_sampler=sampler, progress=progress)
    iterator = iter(loader)
    sampler.set_epoch(5)
    progress.batches_done = 2
    shown = [batch.tolist() for (batch,) in iterator]
    assert shown == list(sampler.batches(5))[2:]
    assert len(loader) == 4


def test_the_last_short_batch_is_kept() -> None:
    sampler = EpochBatches(TensorDataset(torch.arange(10)), 4, seed=1)
    assert [len(batch) for (batch,) in EpochLoader(sampler.dataset, batch_sampler=sampler)] == [4, 4, 2]


def test_the_trainer_finds_whom_to_tell_the_epoch() -> None:
    sampler = EpochBatches(Exposures(), 4, seed=1)
    assert EpochLoader(Exposures(), batch_sampler=sampler).batch_sampler.sampler is sampler  # type: ignore[arg-type]
