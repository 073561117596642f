import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.image_transform import CROPS, JITTER, RESIZE_MODES, Placement, enlargement, place

SIDES = st.integers(1, 20_000)
SOURCES = st.tuples(SIDES, SIDES)
SIZES = st.tuples(st.integers(1, 256), st.integers(1, 256)).map(lambda sides: (8 * sides[0], 8 * sides[1]))
DRAWS = st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
FEW = settings(max_examples=60, deadline=None)


def bucket(source: tuple[int, int], size: tuple[int, int], crop: str = "center", draws=(0.5, 0.5)) -> Placement:
    return place(source, size, "bucket", crop, draws, False)


@FEW
@given(SOURCES, SIZES, st.sampled_from(RESIZE_MODES), st.sampled_from(CROPS), DRAWS)
def test_a_box_lies_inside_its_picture(source, size, resize_mode, crop, draws) -> None:
    left, top, right, bottom = place(source, size, resize_mode, crop, draws, False).box
    assert 0 <= left < right <= source[0]
    assert 0 <= top < bottom <= source[1]


@FEW
@given(SOURCES, SIZES, st.sampled_from(CROPS), DRAWS)
def test_a_bucket_box_has_exactly_the_training_shape(source, size, crop, draws) -> None:
    left, top, right, bottom = bucket(source, size, crop, draws).box
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=1e-9)


@FEW
@given(SOURCES, SIZES, st.sampled_from(CROPS), DRAWS)
def test_a_bucket_box_is_cut_along_one_side_at_most(source, size, crop, draws) -> None:
    left, top, right, bottom = bucket(source, size, crop, draws).box
    assert (left, right) == (0, source[0]) or (top, bottom) == (0, source[1])


@FEW
@given(SOURCES, SIZES, DRAWS)
def test_a_centered_box_leaves_as_much_on_either_side_whatever_is_drawn(source, size, draws) -> None:
    left, top, right, bottom = bucket(source, size, "center", draws).box
    assert left == pytest.approx(source[0] - right, abs=1e-9 * source[0])
    assert top == pytest.approx(source[1] - bottom, abs=1e-9 * source[1])


@FEW
@given(SOURCES, SIZES, st.sampled_from(("random", "jitter")), DRAWS)
def test_mirrored_draws_give_mirrored_boxes(source, size, crop, draws) -> None:
    _, _, right, bottom = bucket(source, size, crop, draws).box
    mirrored = bucket(source, size, crop, (1 - draws[0], 1 - draws[1])).box
    tolerance = 1e-9 * max(source)
    assert mirrored[0] == pytest.approx(source[0] - right, abs=tolerance)
    assert mirrored[1] == pytest.approx(source[1] - bottom, abs=tolerance)


@FEW
@given(SOURCES, SIZES, DRAWS)
def test_jitter_stays_close_to_the_middle(source, size, draws) -> None:
    middle, strayed = bucket(source, size).box, bucket(source, size, "jitter", draws).box
    assert abs(strayed[0] - middle[0]) <= JITTER * (middle[2] - middle[0]) * (1 + 1e-9)
    assert abs(strayed[1] - middle[1]) <= JITTER * (middle[3] - middle[1]) * (1 + 1e-9)


@pytest.mark.parametrize("draw", [0.0, 0.25, 1.0])
def test_random_reaches_all_of_what_is_over(draw: float) -> None:
    assert bucket((300, 100), (64, 64), "random", (draw, 0.9)).box == (200 * draw, 0, 200 * draw + 100, 100)
    assert bucket((100, 300), (64, 64), "random", (0.9, draw)).box == (0, 200 * draw, 100, 200 * draw + 100)


@pytest.mark.parametrize("crop", ["random", "jitter"])
def test_the_mean_position_is_the_middle(crop: str) -> None:
    draws = (np.arange(1000) + 0.5) / 1000
    starts = [bucket((431, 100), (64, 64), crop, (float(draw), 0.5)).box[0] for draw in draws]
    assert np.mean(starts) == pytest.approx((431 - 100) / 2, abs=1e-9)
    assert np.ptp(starts) > 7


def test_a_bucket_box_of_whole_pixels_is_exact() -> None:
    assert bucket((100, 60), (64, 64)).box == (20, 0, 80, 60)
    assert bucket((4000, 3000), (640, 384)).box == (0, 300, 4000, 2700)


def test_a_picture_of_the_training_shape_is_shown_whole() -> None:
    assert bucket((1023, 341), (96, 32), "random", (0.9, 0.9)).box == (0, 0, 1023, 341)


def test_a_center_crop_is_the_square_of_whole_pixels_that_it_always_was() -> None:
    assert place((7, 4), (8, 8), "center_crop", "random", (0.9, 0.9), True) == Placement((8, 8), (1, 0, 5, 4), True)


def test_a_squashed_picture_is_shown_whole() -> None:
    assert place((7, 4), (8, 8), "squash", "jitter", (0.9, 0.9), False).box == (0, 0, 7, 4)


@pytest.mark.parametrize(("resize_mode", "size"), [("bucket", (7, 4)), ("squash", (7, 4)), ("center_crop", (4, 4))])
def test_without_a_size_the_part_keeps_its_own(resize_mode: str, size: tuple[int, int]) -> None:
    assert place((7, 4), None, resize_mode, "center", (0.5, 0.5), False).size == size


@pytest.mark.parametrize(
    ("source", "size", "factor"), [((100, 50), (64, 64), 1.28), ((640, 1280), (64, 64), 0.1), ((64, 64), (64, 64), 1)]
)
def test_an_enlargement_is_told_by_its_factor(source, size, factor: float) -> None:
    assert enlargement(bucket(source, size)) == pytest.approx(factor)


def test_a_picture_squashed_along_one_side_and_stretched_along_the_other_counts_as_enlarged() -> None:
    assert enlargement(place((128, 32), (64, 64), "squash", "center", (0.5, 0.5), False)) == 2


@pytest.mark.parametrize(
    ("resize_mode", "crop", "message"),
    [
        ("stretch", "center", "resize_mode 'stretch' is unknown.*bucket"),
        ("bucket", "top", "crop 'top' is unknown.*jitter"),
    ],
)
def test_an_unknown_rule_names_the_choices(resize_mode: str, crop: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place((8, 8), (8, 8), resize_mode, crop, (0.5, 0.5), False)
