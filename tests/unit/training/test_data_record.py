"""What the record of a run says of its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ldm.data.every_dream import EveryDreamBatch
from ldm.data.mixture import Mixture
from ldm.training.data_record import describe_data, described_set
from tests.unit.training.toy import make_pictures

FIRST = "folder0/a plain square 0_.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "mine", per_folder=2, folders=2, size=16)
    return tmp_path / "mine"


def described(root: Path, **options: Any) -> dict[str, Any]:
    return describe_data({"train": EveryDreamBatch(data_root=str(root), size=16)}, **options)


def test_each_picture_is_described_with_its_content_and_caption(root: Path) -> None:
    pictures = described(root)["sets"]["train"]["pictures"]
    assert len(pictures) == 4
    assert pictures[FIRST]["caption"] == "a plain square 0"
    assert pictures[FIRST]["bytes"] == (root / FIRST).stat().st_size
    assert len(pictures[FIRST]["hash"]) == 32


def test_the_digest_is_the_same_where_the_data_was_moved_or_touched(root: Path) -> None:
    before = described(root)["digest"]
    os.utime(root / FIRST, (1, 1))
    assert described(root.rename(root.with_name("moved")))["digest"] == before


def change_picture(root: Path) -> None:
    content = bytearray((root / FIRST).read_bytes())
    content += b"\0"
    (root / FIRST).write_bytes(content)


def change_caption(root: Path) -> None:
    (root / FIRST).with_suffix(".txt").write_text("a tall square")


def change_multiplier(root: Path) -> None:
    (root / "folder0" / "multiply.txt").write_text("3")


@pytest.mark.parametrize("change", [change_picture, change_caption, change_multiplier])
def test_the_digest_differs_where_a_picture_a_caption_or_a_folders_setting_does(root: Path, change: Any) -> None:
    before = described(root)["digest"]
    change(root)
    assert described(root)["digest"] != before


def test_a_validation_set_of_the_same_pictures_is_described_once(root: Path) -> None:
    dataset = EveryDreamBatch(data_root=str(root), size=16)
    data = describe_data({"train": dataset, "validation": dataset})
    assert data["sets"]["validation"] == {"same_as": "train"}
    assert described_set(data, "validation") == data["sets"]["train"]
    assert described_set(data, "test") is None


def test_what_is_too_large_to_read_is_told_by_size_and_time(root: Path) -> None:
    data = described(root, most_hashed_bytes=10)
    assert data["compared_by"] == "size and time"
    before = data["digest"]
    os.utime(root / FIRST, (1, 1))
    assert described(root, most_hashed_bytes=10)["digest"] != before


def test_the_parts_of_a_mixture_are_described_by_name(root: Path) -> None:
    folder = {"target": "ldm.data.every_dream.EveryDreamBatch", "params": {"data_root": str(root)}}
    mixture = Mixture(sets={"faces": folder, "places": folder}, ratio="faces 1 : places 1", size=16)
    assert set(describe_data({"train": mixture})["sets"]) == {"train.faces", "train.places"}


def test_a_set_of_another_project_is_described_by_its_length() -> None:
    assert describe_data({"train": [1, 2, 3]})["sets"] == {"train": {"kind": "list", "items": 3}}
