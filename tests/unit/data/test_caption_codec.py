"""Captions as file names: exactly, or not at all."""

from __future__ import annotations

import os
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldm.data.captions import (
    DEVICE_NAMES,
    FORBIDDEN_CHARACTERS,
    PICTURE_SUFFIXES,
    caption_from_file_name,
    file_name_from_caption,
    is_picture_name,
)

NUMBERS = st.sampled_from(["", "_(1)", "_(2)", "_(123)"])


def name_or_none(caption: str, suffix: str = ".png", tail: str = "") -> str | None:
    try:
        return file_name_from_caption(caption, suffix, tail)
    except ValueError:
        return None


@settings(deadline=None)
@given(st.text(), st.sampled_from([*PICTURE_SUFFIXES, ".JPG"]), NUMBERS)
@example("con", ".jpg", "")
@example("\ufeffcat", ".jpg", "")
@example("a cat.png", ".jpg", "")
@example("cafe\u0301", ".jpg", "")
@example("猫" * 84, ".webp", "")
def test_any_caption_comes_back_exactly_or_is_refused(caption: str, suffix: str, tail: str) -> None:
    name = name_or_none(caption, suffix, tail)
    if name is not None:
        assert caption_from_file_name(name) == caption


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=300), NUMBERS)
@example("nul.x", "")
@example("COM1 ", "")
@example("emoji 😀" * 30, "")
def test_every_name_is_one_that_windows_and_linux_take(caption: str, tail: str) -> None:
    name = name_or_none(caption, tail=tail)
    if name is None:
        return
    assert not FORBIDDEN_CHARACTERS.intersection(name)
    assert not any(ord(character) < 32 for character in name)
    assert not name.endswith((".", " "))
    assert not name.startswith(".")
    assert name.partition(".")[0].rstrip().upper() not in DEVICE_NAMES
    assert len(os.fsencode(name)) <= 255
    assert len(name.encode("utf-16-le")) <= 510
    assert is_picture_name(name)


@settings(deadline=None)
@given(st.text(st.characters(categories=["L", "N", "Zs"]), max_size=60))
def test_plain_captions_are_held_by_a_name(words: str) -> None:
    caption = unicodedata.normalize("NFC", words.strip())
    if caption.upper() not in DEVICE_NAMES and caption and len(caption.encode()) < 250:
        assert name_or_none(caption) == f"{caption}.png"


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("snake_case", "underscore"),
        ("what is this?", r"holds \?"),
        ("a/b\\c", r"holds / \\"),
        ("two\nlines", "line break"),
        (".hidden", "begins with a dot"),
        ("con.fusion", "for a device"),
        ("x" * 252, "256 bytes long"),
        ("é" * 126, "256 bytes long"),
        (" a cat", "begins or ends with a space"),
        ("e\u0301", "accents"),
        ("\udcff", "control character"),
    ],
)
def test_what_no_name_can_hold_is_refused_with_the_reason(caption: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        file_name_from_caption(caption, ".png")


@pytest.mark.parametrize(
    ("caption", "tail", "name"),
    [
        ("a cat", "", "a cat.png"),
        ("a cat", "_(2)", "a cat_(2).png"),
        ("a cat.", "", "a cat..png"),
        ("", "", "_(1).png"),
        ("NUL", "", "NUL_(1).png"),
        ("lpt\u00b2", "", "lpt\u00b2_(1).png"),
        ("nul", "_(3)", "nul_(3).png"),
        ("x" * 251, "", "x" * 251 + ".png"),
        ("猫" * 83, "", "猫" * 83 + ".png"),
    ],
)
def test_a_caption_becomes_this_name(caption: str, tail: str, name: str) -> None:
    assert file_name_from_caption(caption, ".png", tail) == name


def test_a_tail_that_no_name_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="holds :"):
        file_name_from_caption("a cat", ".png", "_12:30")
