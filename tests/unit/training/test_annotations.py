from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from ldm.training.annotations import accepts_boolean, describe, fits, parse_boolean, parse_text


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (True, bool),
        (3, int),
        (3, float),
        (3.5, float),
        ("a", str),
        ("a/b", Path),
        (None, int | None),
        (None, Optional[int]),  # noqa: UP045 - Lightning's signatures are written so
        (3, Union[str, int]),  # noqa: UP007
        ("bf16", Literal["bf16", 32]),
        ([1, 2], Sequence[int]),
        ([1, 2], tuple[int, int]),
        ([1, 2, 3], tuple[int, ...]),
        ([], list[str]),
        ({"a": 1}, Mapping[str, int]),
        ({"target": "x"}, Path | dict[str, Any]),
        ("red", Colour),
        (object, Any),
        (3, "an annotation that nobody could resolve"),
    ],
)
def test_a_right_value_fits(value: object, annotation: object) -> None:
    assert fits(value, annotation)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("flase", bool),
        (1, bool),
        (True, int),
        (True, float),
        (2.0, int),
        ("3", int),
        (None, int),
        (3, str),
        (3, Path),
        ("bf17", Literal["bf16", 32]),
        (True, Literal[1]),
        ("ab", Sequence[str]),
        ([1, "b"], Sequence[int]),
        ([1, 2, 3], tuple[int, int]),
        ([1], Mapping[str, int]),
        ({"a": "b"}, Mapping[str, int]),
        ("blue", Colour),
    ],
)
def test_a_wrong_value_does_not_fit(value: object, annotation: object) -> None:
    assert not fits(value, annotation)


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("true", bool, True),
        ("NO", bool, False),
        ("3", int | None, 3),
        ("null", int | None, None),
        ("1.0", int | float | None, 1.0),
        ("2", int | str | list[int], 2),
        ("0,1", int | str | list[int], [0, 1]),
        ("0,", int | str | list[int], [0]),
        ("auto", int | str | list[int], "auto"),
        ("32", Literal[16, 32] | None, 32),
        ("bf16-mixed", Literal["bf16-mixed"] | None, "bf16-mixed"),
        ("1", int | bool, 1),
        ("1", bool, True),
        ("true", int | bool, True),
        ("{hours: 2}", str | dict[str, int], {"hours": 2}),
    ],
)
def test_text_is_read_as_the_narrowest_type(text: str, annotation: object, value: object) -> None:
    read = parse_text(text, annotation)
    assert read == value
    assert type(read) is type(value)


def test_text_that_fits_nothing_says_what_is_expected() -> None:
    with pytest.raises(ValueError, match="expected a whole number or null, got 'three'"):
        parse_text("three", int | None)


def test_a_word_that_is_neither_yes_nor_no_is_refused() -> None:
    with pytest.raises(ValueError, match="expected true or false, got 'maybe'"):
        parse_boolean("maybe")


def test_only_an_annotation_with_bool_accepts_a_bare_flag() -> None:
    assert accepts_boolean(int | bool)
    assert not accepts_boolean(int | None)
    assert not accepts_boolean(Any)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "a whole number or null"),
        (int | float, "a number"),
        (Literal["a", "b"] | None, "one of a, b or null"),
        (Sequence[int], "a list of whole numbers"),
        (tuple[int, int], "a list of 2 whole numbers"),
        (Mapping[str, Any] | str, "a mapping (key: value) or text"),
    ],
)
def test_an_annotation_is_described_in_plain_words(annotation: object, words: str) -> None:
    assert describe(annotation) == words
