import json
from pathlib import Path

import pytest

from ldm.ledger import keep_entries_before, read_ledger, write_entries

ENTRIES = [
    {"path": f"a/ü {number}.png", "run_epoch": number // 3, "batch": number % 3, "step": number} for number in range(6)
]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "exposure.jsonl"
    write_entries(path, ENTRIES)
    return path


def test_entries_are_read_as_they_were_written(ledger: Path) -> None:
    assert list(read_ledger(ledger)) == ENTRIES


@pytest.mark.parametrize("cut_off", ['{"path": "a/b', '{"path": "a/ü'])
def test_a_last_line_that_a_crash_cut_off_is_passed_over(ledger: Path, cut_off: str) -> None:
    # The second one within a character, which takes two bytes.
    ledger.write_bytes(ledger.read_bytes() + cut_off.encode()[:-1])
    assert list(read_ledger(ledger)) == ENTRIES
    assert keep_entries_before(ledger, 1, 0) == 3
    write_entries(ledger, ENTRIES[3:])
    assert list(read_ledger(ledger)) == ENTRIES


@pytest.mark.parametrize("line", [b"{\n", b'{"path": "a/\xff.png"}\n'])
def test_a_damaged_line_is_an_error_that_names_it(ledger: Path, line: bytes) -> None:
    ledger.write_bytes(ledger.read_bytes() + line + b"{}\n")
    with pytest.raises(ValueError, match=r"exposure\.jsonl, line 7: "):
        list(read_ledger(ledger))


def test_a_path_that_is_no_text_is_kept(ledger: Path) -> None:
    entry = {"path": "/data/caf\udce9/a man_1.png"}
    write_entries(ledger, [entry])
    assert list(read_ledger(ledger))[-1] == entry
    assert [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()][-1] == entry


@pytest.mark.parametrize(("epoch", "batch", "kept"), [(0, 0, 0), (0, 2, 2), (1, 0, 3), (1, 1, 4), (2, 0, 6), (0, 9, 3)])
def test_entries_from_a_place_on_are_taken_out(ledger: Path, epoch: int, batch: int, kept: int) -> None:
    assert keep_entries_before(ledger, epoch, batch) == 6 - kept
    assert list(read_ledger(ledger)) == ENTRIES[:kept]
    assert [path.name for path in ledger.parent.iterdir()] == ["exposure.jsonl"]


def test_no_ledger_has_nothing_to_take_out(tmp_path: Path) -> None:
    assert keep_entries_before(tmp_path / "exposure.jsonl", 0, 0) == 0
    assert not list(tmp_path.iterdir())
