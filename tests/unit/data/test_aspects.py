import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.aspects import bucket_sizes, bucket_step, nearest_bucket, nearest_buckets

SIZES = st.integers(1, 200).map(lambda cells: 8 * cells)
SIDES = st.integers(1, 20_000)


@given(SIZES)
def test_buckets_keep_to_the_grid_the_sides_and_the_area(size: int) -> None:
    for width, height in bucket_sizes(size):
        assert width % 8 == height % 8 == 0
        assert size / 2 <= min(width, height)
        assert max(width, height) <= 2 * size
        assert width * height <= size * size


@given(SIZES)
def test_buckets_hold_the_square_and_each_shape_lying_and_standing(size: int) -> None:
    buckets = set(bucket_sizes(size))
    assert (size, size) in buckets
    assert {(height, width) for width, height in buckets} == buckets


@pytest.mark.parametrize(("size", "step"), [(64, 8), (128, 16), (256, 32), (448, 56), (512, 64), (768, 64), (1024, 64)])
def test_the_step_is_64_from_512_pixels_up_and_finer_below(size: int, step: int) -> None:
    assert bucket_step(size) == step
    assert all(side % step == 0 for bucket in bucket_sizes(size) for side in bucket)


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_a_small_model_has_as_many_shapes_as_a_large_one(size: int) -> None:
    assert len(bucket_sizes(size)) == 17


def test_the_buckets_of_512_are_these() -> None:
    wide = [bucket for bucket in bucket_sizes(512) if bucket[0] >= bucket[1]]
    assert wide == [
        (512, 512),
        (576, 448),
        (640, 384),
        (704, 320),
        (768, 320),
        (832, 256),
        (896, 256),
        (960, 256),
        (1024, 256),
    ]


@pytest.mark.parametrize("size", [0, 7, 12, -64])
def test_a_size_that_is_no_multiple_of_8_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        bucket_sizes(size)


@given(SIDES, SIDES, SIZES)
def test_no_other_bucket_is_nearer_by_log_ratio(width: int, height: int, size: int) -> None:
    buckets = bucket_sizes(size)

    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(bucket[0] / bucket[1]))

    chosen = buckets[nearest_bucket(width, height, buckets)]
    assert distance(chosen) <= min(map(distance, buckets)) + 1e-9


@given(SIDES, SIDES, SIZES)
def test_a_picture_on_its_side_gets_the_same_bucket_on_its_side(width: int, height: int, size: int) -> None:
    buckets = bucket_sizes(size)
    lying = buckets[nearest_bucket(width, height, buckets)]
    standing = buckets[nearest_bucket(height, width, buckets)]
    ratio, other = math.log(lying[0] / lying[1]), math.log(standing[1] / standing[0])
    middle = abs(abs(ratio - math.log(width / height)) - abs(other - math.log(width / height)))
    assert middle < 1e-9  # the mirrored one, or another that is just as near


def test_many_pictures_are_sorted_as_one_by_one() -> None:
    buckets = bucket_sizes(512)
    sizes = np.random.default_rng(0).integers(1, 5000, (200, 2))
    assert nearest_buckets(sizes, buckets).tolist() == [nearest_bucket(*size, buckets) for size in sizes.tolist()]
