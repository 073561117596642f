import math

import pytest
import torch
from torch.utils.data import TensorDataset

from ldm.data.sampler import EpochLoader, EpochSampler, steps_per_epoch


def test_an_epoch_has_every_position_once() -> None:
    assert sorted(EpochSampler(20, seed=1).indices(3)) == list(range(20))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = [EpochSampler(20, seed=seed).indices(epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert [EpochSampler(20, seed=seed).indices(epoch) for seed in (1, 2) for epoch in (0, 1)] == orders
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_one_that_earlier_versions_drew() -> None:
    # Runs that were saved in mid-epoch rely on it.
    assert EpochSampler(10, seed=23).indices(0) == [9, 7, 4, 2, 0, 1, 8, 3, 6, 5]
    assert EpochSampler(10, seed=23).indices(1) == [0, 7, 4, 3, 2, 5, 6, 1, 8, 9]


def test_the_order_does_not_touch_or_need_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = EpochSampler(20, seed=1).indices(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert EpochSampler(20, seed=1).indices(0) == first


def test_indices_name_the_epoch_where_the_data_set_reads_it() -> None:
    plain = EpochSampler(20, seed=1).indices(3)
    assert EpochSampler(20, seed=1, index_names_epoch=True).indices(3) == [index + 60 for index in plain]


def test_without_shuffling_the_order_is_the_data_sets() -> None:
    assert EpochSampler(5, seed=1, shuffle=False).indices(2) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_global_batch_is_the_same_whatever_the_number_of_ranks(ranks: int) -> None:
    whole = EpochSampler(24, seed=1).indices(2)
    shares = [EpochSampler(24, seed=1, num_replicas=ranks, rank=rank).indices(2) for rank in range(ranks)]
    of_one_rank = 12 // ranks
    for batch in range(2):
        together = [index for share in shares for index in share[batch * of_one_rank : (batch + 1) * of_one_rank]]
        assert sorted(together) == sorted(whole[batch * 12 : (batch + 1) * 12])


@pytest.mark.parametrize(("length", "ranks"), [(10, 3), (7, 4), (2, 5)])
def test_ranks_get_equally_many_and_together_every_position(length: int, ranks: int) -> None:
    samplers = [EpochSampler(length, seed=1, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    shares = [sampler.indices(0) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])} == {math.ceil(length / ranks)}
    assert set().union(*shares) == set(range(length))
    assert sum(map(len, shares)) == length + samplers[0].padding


def test_one_rank_never_pads() -> None:
    assert EpochSampler(7, seed=1).padding == 0


def test_a_start_leaves_the_rest_of_the_order() -> None:
    sampler = EpochSampler(10, seed=1, num_replicas=3, rank=2)
    assert sampler.indices(4, start=3) == sampler.indices(4)[3:]


def test_the_length_is_that_of_the_whole_epoch_whatever_the_start() -> None:
    sampler = EpochSampler(10, seed=1)
    sampler.start = 8
    assert (len(sampler), len(list(sampler))) == (10, 2)


@pytest.mark.parametrize("arguments", [{"length": 0}, {"length": 5, "num_replicas": 2, "rank": 2}])
def test_impossible_arguments_are_errors(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        EpochSampler(seed=1, **arguments)


@pytest.mark.parametrize(
    ("exposures", "batch_size", "ranks", "steps"),
    [(5000, 6, 1, 834), (500, 6, 1, 84), (6, 6, 1, 1), (7, 6, 1, 2), (5000, 6, 2, 417), (13, 2, 4, 2)],
)
def test_steps_round_up(exposures: int, batch_size: int, ranks: int, steps: int) -> None:
    assert steps_per_epoch(exposures, batch_size, ranks) == steps


def test_steps_are_the_loaders_length() -> None:
    for exposures, batch_size, ranks in ((13, 2, 4), (10, 3, 1), (12, 3, 2)):
        sampler = EpochSampler(exposures, seed=1, num_replicas=ranks)
        loader = EpochLoader(TensorDataset(torch.arange(exposures)), sampler=sampler, batch_size=batch_size)
        assert len(loader) == steps_per_epoch(exposures, batch_size, ranks)


class Progress:
    batches_done = 0


def test_a_loader_reads_epoch_and_position_when_the_first_batch_is_asked_for() -> None:
    progress = Progress()
    sampler = EpochSampler(10, seed=1)
    loader = EpochLoader(TensorDataset(torch.arange(10)), sampler=sampler, progress=progress, batch_size=3)
    iterator = iter(loader)
    sampler.set_epoch(5)
    progress.batches_done = 2
    shown = [index for (batch,) in iterator for index in batch.tolist()]
    assert shown == sampler.indices(5)[6:]
    assert len(loader) == 4


def test_the_last_short_batch_is_kept() -> None:
    loader = EpochLoader(TensorDataset(torch.arange(10)), sampler=EpochSampler(10, seed=1), batch_size=4)
    assert [len(batch) for (batch,) in loader] == [4, 4, 2]
