import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.repeats import Repeats, ShownFolder

RATES = st.fractions(min_value=0, max_value=4, max_denominator=12)
FOLDERS = st.lists(st.tuples(st.integers(1, 7), RATES), min_size=1, max_size=3).filter(
    lambda folders: any(count * rate >= 1 for count, rate in folders)
)


def build(folders: list[tuple[int, Fraction]]) -> Repeats:
    ends = np.cumsum([count for count, _ in folders])
    return Repeats(
        [ShownFolder(np.arange(end - count, end), rate) for end, (count, rate) in zip(ends, folders, strict=True)]
    )


@given(FOLDERS, st.integers(1, 12))
def test_after_some_epochs_each_picture_has_had_its_share(folders: list[tuple[int, Fraction]], epochs: int) -> None:
    repeats = build(folders)
    times = Counter(number for epoch in range(epochs) for number in repeats.shown(epoch).tolist())
    first = 0
    for count, rate in folders:
        due = epochs * rate
        for number in range(first, first + count):
            assert due - 1 < times[number] < due + 1
        first += count


@given(FOLDERS)
def test_a_whole_number_of_showings_is_met_exactly(folders: list[tuple[int, Fraction]]) -> None:
    epochs = int(np.lcm.reduce([rate.denominator for _, rate in folders]))
    repeats = build(folders)
    times = Counter(number for epoch in range(epochs) for number in repeats.shown(epoch).tolist())
    expected = [int(epochs * rate) for count, rate in folders for _ in range(count)]
    assert [times[number] for number in range(len(expected))] == expected


@given(FOLDERS, st.integers(0, 6))
def test_exposures_are_numbered_on_from_epoch_to_epoch(folders: list[tuple[int, Fraction]], epoch: int) -> None:
    repeats = build(folders)
    start, length = repeats.start(epoch), repeats.length(epoch)
    located = [repeats.locate(exposure) for exposure in range(start, start + length)]
    assert {place[0] for place in located} <= {epoch}
    assert [place[2] for place in located] == repeats.shown(epoch).tolist()
    assert len(set(located)) == length


def test_half_a_multiplier_shows_each_picture_every_second_epoch() -> None:
    repeats = build([(4, Fraction(1, 2))])
    shown = [set(repeats.shown(epoch).tolist()) for epoch in range(4)]
    assert shown[0] | shown[1] == {0, 1, 2, 3}
    assert len(shown[0]) == len(shown[1]) == 2
    assert shown[:2] == shown[2:]


def test_equal_whole_rates_are_numbered_repeat_by_repeat() -> None:
    repeats = build([(2, Fraction(3)), (1, Fraction(3))])
    assert [repeats.locate(exposure) for exposure in (0, 2, 3, 8, 9)] == [
        (0, 0, 0),
        (0, 0, 2),
        (0, 1, 0),
        (0, 2, 2),
        (1, 0, 0),
    ]
    assert not repeats.epochs_differ


def test_only_fractions_make_epochs_differ() -> None:
    assert build([(2, Fraction(1)), (1, Fraction(3))]).epochs_differ is False
    assert build([(2, Fraction(1)), (1, Fraction(3, 2))]).epochs_differ is True


def test_epochs_without_a_picture_are_an_error() -> None:
    with pytest.raises(ValueError, match="no picture"):
        build([(1, Fraction(1, 2))])


def test_numbering_survives_the_way_to_another_process() -> None:
    repeats = build([(3, Fraction(5, 2)), (1, Fraction(1))])
    repeats.locate(9)
    copy = pickle.loads(pickle.dumps(repeats))
    assert [copy.locate(exposure) for exposure in range(20)] == [repeats.locate(exposure) for exposure in range(20)]


@given(FOLDERS, st.integers(0, 6))
def test_epochs_repeat_after_their_period(folders: list[tuple[int, Fraction]], epoch: int) -> None:
    repeats = build(folders)
    assert repeats.shown(epoch).tolist() == repeats.shown(epoch + repeats.period).tolist()
