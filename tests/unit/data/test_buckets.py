from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.buckets import EpochPlan, count_batches, plan_epoch

SHAPES = np.array([(512, 512), (576, 448), (448, 576), (1024, 256)])


def shapes(counts: list[int]) -> np.ndarray:
    """Sizes of so many exposures of each shape, mixed."""
    sizes = np.repeat(SHAPES[: len(counts)], counts, axis=0)
    return np.random.default_rng(1).permutation(sizes)


def batches(plan: EpochPlan) -> list[list[int]]:
    return [plan.batch(number).tolist() for number in range(len(plan))]


COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any)


@given(COUNTS, st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 5), st.booleans())
def test_every_exposure_comes_once_in_batches_of_one_size(
    counts: list[int], batch_size: int, seed: int, epoch: int, shuffle: bool
) -> None:
    sizes = shapes(counts)
    plan = batches(plan_epoch(sizes, batch_size, seed, epoch, shuffle))
    assert sorted(position for batch in plan for position in batch) == list(range(len(sizes)))
    assert all(len({tuple(size) for size in sizes[batch]}) == 1 for batch in plan)


@given(COUNTS, st.integers(1, 9))
def test_each_size_has_one_short_batch_at_most(counts: list[int], batch_size: int) -> None:
    sizes = shapes(counts)
    plan = batches(plan_epoch(sizes, batch_size, 1, 0))
    assert len(plan) == sum(-(-count // batch_size) for count in counts)
    short = [tuple(sizes[batch[0]]) for batch in plan if len(batch) < batch_size]
    assert len(short) == len(set(short))


@given(COUNTS, st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), max_size=3), st.integers(1, 9))
def test_what_an_epoch_has_shown_with_other_batch_sizes_does_not_come_again(
    counts: list[int], done: list[tuple[int, int]], batch_size: int
) -> None:
    sizes = shapes(counts)
    plan = batches(plan_epoch(sizes, batch_size, 1, 2, done=done))
    assert sorted(position for batch in plan for position in batch) == list(range(len(sizes)))
    assert all(len({tuple(size) for size in sizes[batch]}) == 1 for batch in plan)


def test_an_epoch_that_began_with_another_batch_size_begins_with_those_batches() -> None:
    sizes = shapes([20, 13])
    before = batches(plan_epoch(sizes, 4, 1, 2))
    then = batches(plan_epoch(sizes, 6, 1, 2, done=[(4, 3)]))
    finally_ = batches(plan_epoch(sizes, 5, 1, 2, done=[(4, 3), (6, 2)]))
    assert then[:3] == before[:3]
    assert finally_[:5] == then[:5]


def test_a_plan_is_a_function_of_its_arguments() -> None:
    sizes = shapes([20, 13, 7])
    once, again = (batches(plan_epoch(sizes, 4, 1, 2)) for _ in range(2))
    assert once == again


def test_seeds_and_epochs_have_plans_of_their_own() -> None:
    sizes = shapes([20, 13, 7])
    plans = [batches(plan_epoch(sizes, 4, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len({str(plan) for plan in plans}) == 4


def test_batches_of_different_sizes_are_mixed() -> None:
    sizes = shapes([80, 80])
    order = [tuple(sizes[batch[0]]) for batch in batches(plan_epoch(sizes, 4, 1, 0))]
    changes = sum(one != other for one, other in pairwise(order))
    assert changes > 10  # of 39; 19.5 are expected by chance


def test_short_batches_fall_anywhere_in_an_epoch() -> None:
    sizes = shapes([41, 41])
    places = {
        number
        for epoch in range(20)
        for number, batch in enumerate(batches(plan_epoch(sizes, 4, 1, epoch)))
        if len(batch) == 1
    }
    assert min(places) < 5
    assert max(places) > 15


def test_one_size_is_cut_from_the_shuffled_order_stretch_by_stretch() -> None:
    order = [position for batch in batches(plan_epoch(10, 1, 23, 0)) for position in batch]
    assert order == [9, 7, 4, 2, 0, 1, 8, 3, 6, 5]
    assert batches(plan_epoch(10, 4, 23, 0)) == [order[:4], order[4:8], order[8:]]
    assert batches(plan_epoch(np.full((10, 2), 64), 4, 23, 0)) == batches(plan_epoch(10, 4, 23, 0))


def test_without_shuffling_exposures_come_as_they_are_size_after_size() -> None:
    sizes = SHAPES[[1, 0, 1, 0, 1]]
    assert batches(plan_epoch(sizes, 2, 1, 0, shuffle=False)) == [[1, 3], [0, 2], [4]]


@pytest.mark.parametrize(("exposures", "batch_size", "steps"), [(5000, 6, 834), (500, 6, 84), (6, 6, 1), (7, 6, 2)])
def test_batches_of_a_plain_data_set_round_up(exposures: int, batch_size: int, steps: int) -> None:
    assert count_batches(range(exposures), batch_size) == steps
    assert len(plan_epoch(exposures, batch_size, 1, 0)) == steps
