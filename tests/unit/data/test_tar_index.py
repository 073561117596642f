"""Where the samples lie in a tar shard, and what is wrong with it."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ldm.data import tar_index
from ldm.data.tar_index import ShardIndex, build_index, read_caption, read_index, read_member, write_index
from tests.unit.data.make_shards import picture_bytes, sample, write_shards, write_tar


def index_of(folder: Path, members: dict[str, bytes]) -> ShardIndex:
    return build_index(str(write_tar(folder / "00000.tar", members)), stamp="now")


def captions(path: Path, index: ShardIndex) -> list[str]:
    with path.open("rb") as file:
        return [read_caption(file, text) for text in index.texts]


def test_every_picture_is_found_where_it_lies_with_its_size_and_caption(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [3], sizes=((12, 12), (20, 8)))
    index = build_index(str(folder / "00000.tar"), stamp="now")
    assert [index.name(number) for number in range(len(index))] == [f"{number:09d}.png" for number in range(3)]
    assert index.sizes.tolist() == [[12, 12], [20, 8], [12, 12]]
    assert captions(folder / "00000.tar", index) == ["caption 0", "caption 1", "caption 2"]
    with (folder / "00000.tar").open("rb") as file:
        assert read_member(file, *index.pictures[1].tolist()) == picture_bytes(1, 20, 8)
    assert (index.bad, index.damage) == ({}, "")


def test_the_caption_comes_from_the_json_where_there_is_no_txt(tmp_path: Path) -> None:
    members = {"1.png": picture_bytes(1), "1.json": json.dumps({"caption": "from  json\n"}).encode()}
    index = index_of(tmp_path, members)
    assert captions(tmp_path / "00000.tar", index) == ["from json"]


def test_members_of_a_sample_may_lie_apart_and_in_folders(tmp_path: Path) -> None:
    members = {"a/1.png": picture_bytes(1), "a/2.png": picture_bytes(2), "a/2.txt": b"two", "a/1.txt": b"one"}
    index = index_of(tmp_path, members)
    assert captions(tmp_path / "00000.tar", index) == ["one", "two"]
    assert index.name(0) == "a/1.png"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"7.png": picture_bytes(7)}, "no caption"),
        ({"7.png": picture_bytes(7), "7.json": b"{}"}, "no caption"),
        ({"7.png": picture_bytes(7), "7.json": b"{"}, "cannot be read as JSON"),
        ({"7.png": picture_bytes(7), "7.json": b"[" * 200_000}, "cannot be read as JSON"),
        ({"7.png": picture_bytes(7), "7.txt": b"\xff\xfe\x00"}, "not UTF-8"),
        ({"7.png": picture_bytes(7), "7.json": b'{"caption": "half \\ud800"}'}, "half a character"),
        ({"7.png": picture_bytes(7), "7.txt": b"a\0b"}, "null"),
        ({"7.txt": b"alone"}, "without a picture"),
        ({"7.png": picture_bytes(7), "7.jpg": picture_bytes(8), "7.txt": b"two"}, "2 pictures of one name"),
        ({"7.png": b"no picture at all", "7.txt": b"text"}, "not a picture"),
        ({"7.png": b"", "7.txt": b"text"}, "empty"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_named_with_its_reason(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    index = index_of(tmp_path, {**sample(1), **members})
    assert len(index) == 1
    assert list(index.bad) == ["7"]
    assert reason in index.bad["7"]


def test_an_empty_caption_is_counted(tmp_path: Path) -> None:
    index = index_of(tmp_path, {"1.png": picture_bytes(1), "1.txt": b" \n"})
    assert (len(index), index.empty_captions) == (1, 1)


def test_a_tar_that_is_cut_off_within_a_picture_keeps_what_precedes_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cut.tar", {**sample(1), **sample(2)})
    whole = build_index(str(path), stamp="now")
    path.write_bytes(path.read_bytes()[: int(whole.pictures[1, 0]) + 10])
    index = build_index(str(path), stamp="now")
    assert len(index) == 1
    assert "cut off within 000000002.png" in index.damage


def test_a_tar_that_is_cut_off_between_members_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cut.tar", sample(1))
    end = path.read_bytes().rstrip(b"\0")
    path.write_bytes(end + b"\0" * (-len(end) % 512))
    assert "cut off" in build_index(str(path), stamp="now").damage


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "hurt.tar", {**sample(1), **sample(2)})
    content = bytearray(path.read_bytes())
    place = content.index(b"000000002.png")
    content[place : place + 200] = b"\xaa" * 200
    path.write_bytes(bytes(content))
    index = build_index(str(path), stamp="now")
    assert len(index) == 1
    assert "is damaged after byte" in index.damage


@pytest.mark.parametrize(
    "content", [b"", b"x" * 2000, gzip.compress(b"\0" * 2000, mtime=0)], ids=["empty", "text", "gzip"]
)
def test_a_file_that_is_no_tar_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "not.tar"
    path.write_bytes(content)
    index = build_index(str(path), stamp="now")
    assert len(index) == 0
    assert index.damage


def test_an_index_reads_back_as_it_was_written(tmp_path: Path) -> None:
    index = index_of(tmp_path, {**sample(1), "7.txt": b"alone"})
    path = str(tmp_path / "index.npz")
    write_index(index, path)
    again = read_index(path)
    assert again is not None
    for name in ("names", "pictures", "texts", "sizes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))
    assert (again.tar_bytes, again.stamp, again.bad) == (index.tar_bytes, "now", index.bad)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", b"text"])
def test_a_damaged_index_counts_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index.npz"
    path.write_bytes(content)
    assert read_index(str(path)) is None


def header(name: str, kind: bytes, size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "hostile",
    [
        # A long name for a long name for a long name ...
        pytest.param((header("x", tarfile.GNUTYPE_LONGNAME, 5) + b"name".ljust(512, b"\0")) * 2000, id="nested"),
        pytest.param(header("x", tarfile.GNUTYPE_LONGNAME, 1 << 62), id="more than memory"),
        pytest.param(header("x", tarfile.XHDTYPE, 1 << 70), id="more than an address"),
        pytest.param(header("x.jpg", tarfile.GNUTYPE_SPARSE, 1 << 62), id="more than a file"),
    ],
)
def test_a_hostile_header_is_damage_and_no_crash(tmp_path: Path, hostile: bytes) -> None:
    path = write_tar(tmp_path / "00000.tar", sample(1))
    content = path.read_bytes()
    end = content.rindex(b"\0\0ustar")
    sound = content[: end - end % 512 + 512 * (1 + -(-len(sample(1)["000000001.json"]) // 512))]
    path.write_bytes(sound + hostile + content)
    index = build_index(str(path), stamp="now")
    assert [index.name(number) for number in range(len(index))] == ["000000001.png"]
    assert "is damaged after byte" in index.damage


def test_a_second_caption_file_of_one_sample_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", {"1.png": picture_bytes(1), "1.txt": b"one", "1.TXT": b"another"})
    assert "2 .txt files" in build_index(str(path), stamp="now").bad["1"]


def test_members_too_long_to_be_held_are_bad_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    length = tar_index.MAX_PICTURE_BYTES + 512
    end = b"\0" * 1024
    caption = header("1.txt", tarfile.REGTYPE, 3) + b"one".ljust(512, b"\0")
    with path.open("wb") as file:  # the picture is a hole in the file
        file.write(caption + header("1.png", tarfile.REGTYPE, length))
        file.seek(length, os.SEEK_CUR)
        file.write(header("2.png", tarfile.REGTYPE) + header("2.txt", tarfile.REGTYPE, tar_index.MAX_TEXT_BYTES + 512))
        file.seek(tar_index.MAX_TEXT_BYTES + 512, os.SEEK_CUR)
        file.write(end)
    tracemalloc.start()
    index = build_index(str(path), stamp="now")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.damage == ""
    assert "is longer than" in index.bad["1"]
    assert "is longer than" in index.bad["2"]
    assert peak < tar_index.MAX_TEXT_BYTES
