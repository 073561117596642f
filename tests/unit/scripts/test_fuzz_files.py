"""The search for files that are read badly: it finds what it plants, and a short one finds nothing in the project."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import fuzz_files
import pytest
from fuzz_files import BUG, CLEAN, CRASH, HANG, READ, Kind, Reader

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="begins its process by fork")


def end_process(path: Path) -> None:
    os._exit(7)


def wait(path: Path) -> None:
    time.sleep(60)


def say_two_lines(path: Path) -> None:
    raise ValueError("one\ntwo")


def say_nothing(path: Path) -> None:
    raise ValueError("")


def say_one_line(path: Path) -> None:
    raise OSError(f"{path}: is damaged")


def trip(path: Path) -> None:
    raise IndexError("list index out of range")


def decode(path: Path) -> None:
    path.read_bytes().decode("ascii")


def take_memory(path: Path) -> None:
    bytearray(64 << 30)


KINDS: Mapping[str, Kind] = {
    read.__name__: Kind("a", [{"": "ä".encode()}], read)
    for read in (end_process, wait, say_two_lines, say_nothing, say_one_line, trip, decode, take_memory)
} | {"well": Kind("a", [{"": b"a"}], lambda path: None)}


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader(KINDS, seconds=1.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("end_process", CRASH),
        ("wait", HANG),
        ("say_two_lines", BUG),
        ("say_nothing", BUG),
        ("say_one_line", CLEAN),
        ("trip", BUG),
        ("decode", BUG),
        ("take_memory", BUG),
        ("well", READ),
    ],
)
def test_every_bad_end_is_told_from_a_clean_one(reader: Reader, kind: str, outcome: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("ä".encode())
    assert reader.read(kind, tmp_path / "a")[0] == outcome


def test_reading_goes_on_after_a_crash_and_the_file_is_kept(reader: Reader, tmp_path: Path) -> None:
    kinds = {name: KINDS[name] for name in ("end_process", "well")}
    tally = fuzz_files.search(kinds, 0.5, 0, tmp_path / "work", tmp_path / "keep", reader)
    assert tally.counts["end_process", CRASH] == tally.counts["well", READ] > 1
    assert (tmp_path / "keep" / "1-end_process-crash" / "a").is_file()
    assert any(line.startswith("crash of end_process") for line in tally.lines())


def test_the_same_seed_damages_files_in_the_same_ways(tmp_path: Path) -> None:
    kinds = fuzz_files.make_kinds(tmp_path)
    for kind in kinds.values():
        first, second, other = (fuzz_files.damaged(kind, random.Random(seed)) for seed in (1, 1, 2))
        assert first == second
        assert first != other


def test_an_unknown_kind_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_files.main(["--kinds", "pgn"]) == 2
    assert "--kinds pgn: there is no such kind; there are ckpt, " in capsys.readouterr().err


def test_a_short_search_finds_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status = fuzz_files.main(["--minutes", "0.07", "--seed", "5", "--keep", str(tmp_path)])
    told = capsys.readouterr().out
    assert status == 0, told
    assert "ckpt" in told
