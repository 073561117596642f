from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.captions import shuffled_tags
from ldm.exposure import keyed_generator

TAGS = st.lists(st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"])), max_size=8)


@settings(deadline=None)
@given(TAGS, st.integers(0, 9), st.integers(0, 2**40))
def test_shuffling_permutes_the_tags_behind_those_that_are_kept(parts: list[str], keep: int, key: int) -> None:
    tags = [part.strip() for part in parts if part.strip()]
    shuffled = shuffled_tags(", ".join(tags), keep, keyed_generator("tags", key))
    result = shuffled.split(", ") if tags else []
    assert result[:keep] == tags[:keep]
    assert Counter(result) == Counter(tags)


def test_every_order_is_as_likely_as_every_other() -> None:
    counts = Counter(shuffled_tags("head, a, b, c", 1, keyed_generator("tags", key)) for key in range(3000))
    assert len(counts) == 6
    # Chi-squared with 5 degrees of freedom: 20.5 is passed once in a thousand times by chance.
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5


def test_the_order_is_a_function_of_the_generator_key() -> None:
    tags = ", ".join("abcdefgh")
    first, again, other = (shuffled_tags(tags, 0, keyed_generator("tags", 1, 2, 3, key)) for key in (4, 4, 5))
    assert first == again
    assert first != other


@pytest.mark.parametrize("caption", ["", "a photo of a cat", "  two  spaces "])
def test_a_caption_without_commas_stays_as_it_is(caption: str) -> None:
    assert shuffled_tags(caption, 0, keyed_generator("tags", 0)) == caption


def test_empty_tags_and_spaces_at_the_ends_are_left_out() -> None:
    assert shuffled_tags(" a ,, b,", 2, keyed_generator("tags", 0)) == "a, b"


def test_keeping_fewer_than_no_tags_is_an_error() -> None:
    with pytest.raises(ValueError, match="keep_tags -1 is not allowed"):
        shuffled_tags("a, b", -1, keyed_generator("tags", 0))
