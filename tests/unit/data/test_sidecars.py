"""Where captions come from: every source is known, and a broken one is never passed over."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.scan import Scan, scan_data_root
from ldm.data.sidecars import MAX_BYTES, read_caption_list, read_sidecar, tidy_caption

MakeRoot = Callable[..., Path]

links = pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder ``root/a`` with two empty files for pictures, which a scan does not open."""
    path = tmp_path / "root" / "a"
    path.mkdir(parents=True)
    for name in ("1.jpg", "2.jpg"):
        (path / name).touch()
    return path


def scan(folder: Path) -> Scan:
    return scan_data_root(str(folder.parent))


def captions(folder: Path) -> list[tuple[str, str]]:
    """Scan without problems; caption and source by picture."""
    found = scan(folder)
    assert found.problems == []
    return [(picture.caption, picture.caption_source) for picture in found.pictures]


def line(file_name: object, text: object) -> str:
    return json.dumps({"file_name": file_name, "text": text}) + "\n"


def test_the_sources_are_preferred_in_their_order(folder: Path) -> None:
    (folder / "captions.jsonl").write_text(line("1.jpg", "from list"))
    assert captions(folder) == [("from list", "jsonl"), ("2", "file name")]
    (folder / "1.caption").write_text("from caption")
    assert captions(folder)[0] == ("from caption", "caption")
    (folder / "1.txt").write_text("from txt")
    assert captions(folder)[0] == ("from txt", "txt")


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl", "Metadata.JSONL"])
def test_both_names_of_a_list_count_in_any_case(folder: Path, name: str) -> None:
    (folder / name).write_text(line("./2.jpg", "a cat"))
    assert captions(folder)[1] == ("a cat", "jsonl")


def test_sidecars_lists_and_settings_are_no_left_out_files(folder: Path) -> None:
    (folder / "1.txt").write_text("a")
    (folder / "1.caption").write_text("b")
    (folder / "captions.jsonl").write_text(line("2.jpg", "c"))
    (folder / "multiply.txt").write_text("2")
    (folder / "folder.yaml").write_text("flip_p: 0.5")
    found = scan(folder)
    assert (found.left_out, found.orphans, found.warnings, found.problems) == ([], [], [], [])


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a cat", "a cat"),
        (b"\xef\xbb\xbfa cat\r\n", "a cat"),
        ("cafe\u0301 \U0001f600".encode(), "caf\u00e9 \U0001f600"),
        (b"  a cat \n on a mat\r\n\r\nat night\r", "a cat on a mat at night"),
        (b"two  spaces, kept", "two  spaces, kept"),
        (b"under_score", "under_score"),
    ],
)
def test_the_text_of_a_sidecar_is_one_tidy_line(folder: Path, content: bytes, caption: str) -> None:
    (folder / "1.txt").write_bytes(content)
    assert captions(folder)[0] == (caption, "txt")


@settings(deadline=None)
@given(st.text())
def test_tidying_twice_changes_nothing_more(text: str) -> None:
    assert tidy_caption(tidy_caption(text)) == tidy_caption(text)


def test_an_empty_sidecar_is_an_empty_caption_and_a_warning(folder: Path) -> None:
    (folder / "1.txt").write_text("\n")
    (folder / "captions.jsonl").write_text(line("2.jpg", " "))
    assert captions(folder) == [("", "txt"), ("", "jsonl")]
    listed, own = scan(folder).warnings[::-1]
    assert str(folder / "1.txt") in listed + own
    assert f"{folder / 'captions.jsonl'}: line 1" in listed + own
    assert "is empty" in listed


@pytest.mark.parametrize("name", ["1.TXT", "1.Caption"])
def test_a_sidecars_ending_counts_in_any_case(folder: Path, name: str) -> None:
    (folder / name).write_text("a cat")
    assert captions(folder)[0][0] == "a cat"


def test_pictures_of_one_stem_share_a_sidecar(folder: Path) -> None:
    (folder / "1.png").touch()
    (folder / "1.txt").write_text("a cat")
    assert captions(folder) == [("a cat", "txt"), ("a cat", "txt"), ("2", "file name")]


def test_only_the_last_ending_of_a_picture_is_replaced(folder: Path) -> None:
    for name, caption in {"v1.5": "one", "v1.6": "two", "v1": "three", "v1.5.jpg": "four"}.items():
        (folder / f"{name}.webp").touch()
        (folder / f"{name}.txt").write_text(caption)
    found = {Path(picture.path).name: picture.caption for picture in scan(folder).pictures}
    assert found["v1.5.webp"] == "one"
    assert found["v1.6.webp"] == "two"
    assert found["v1.webp"] == "three"
    assert found["v1.5.jpg.webp"] == "four"


@pytest.mark.parametrize(("picture_form", "sidecar_form"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_however_their_accents_are_stored(folder: Path, picture_form: str, sidecar_form: str) -> None:
    (folder / unicodedata.normalize(picture_form, "é.png")).touch()
    (folder / unicodedata.normalize(sidecar_form, "é.txt")).write_text("by file")
    (folder / unicodedata.normalize(picture_form, "ü.png")).touch()
    (folder / "captions.jsonl").write_text(line(unicodedata.normalize(sidecar_form, "ü.png"), "by list"))
    assert captions(folder)[2:] == [("by file", "txt"), ("by list", "jsonl")]
    assert scan(folder).orphans == []


@pytest.mark.skipif(os.name == "nt", reason="the file system folds case")
def test_two_sidecars_for_one_picture_are_a_problem(folder: Path) -> None:
    (folder / "1.txt").write_text("a")
    (folder / "1.TXT").write_text("b")
    (problem,) = scan(folder).problems
    assert problem == f"{folder / '1.txt'}: is for the same pictures as 1.TXT; remove one of them"


def test_names_that_differ_only_in_how_accents_are_stored_are_a_problem(folder: Path) -> None:
    for form in ("NFC", "NFD"):
        (folder / unicodedata.normalize(form, "é.png")).touch()
    if len(os.listdir(folder)) == 3:
        pytest.skip("the file system takes the two names for one")
    (problem,) = scan(folder).problems
    assert "two files of this name" in problem


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"caf\xe9", "is no UTF-8 text (byte 0xe9 at 3)"),
        ("a cat".encode("utf-16"), "is UTF-16 text"),
        ("a cat".encode("utf-16-be"), "null bytes"),
        (b"\x89PNG\r\n\x1a\n", "is no UTF-8 text (byte 0x89 at 0)"),
        (b"a" * (MAX_BYTES + 1), "longer than 1,048,576 bytes"),
    ],
)
def test_a_broken_sidecar_is_a_problem_with_its_path(folder: Path, content: bytes, reason: str) -> None:
    (folder / "1.txt").write_bytes(content)
    (folder / "1.caption").write_text("never fallen back to")
    found = scan(folder)
    (problem,) = found.problems
    assert problem.startswith(f"{folder / '1.txt'}: ")
    assert reason in problem
    assert (found.pictures[0].caption, found.pictures[0].caption_source) == ("", "txt")


@links
def test_a_link_to_nothing_and_a_pipe_are_broken_sidecars(folder: Path) -> None:
    (folder / "1.txt").symlink_to("nowhere")
    os.mkfifo(folder / "2.txt")
    assert [problem.split(": ")[:2] for problem in scan(folder).problems] == [
        [str(folder / "1.txt"), "cannot be read (No such file or directory); repair or remove it"],
        [str(folder / "2.txt"), "cannot be read (it is no file); remove it or put a text file there"],
    ]


@links
def test_a_pipe_in_place_of_a_picture_is_a_problem(folder: Path) -> None:
    os.mkfifo(folder / "3.jpg")
    (problem,) = scan(folder).problems
    assert problem == f"{folder / '3.jpg'}: cannot be read (it is a pipe, a socket or a device); remove it"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
        ('"text"', "is no JSON object"),
        ('{"text": "a"}', "lacks 'file_name'"),
        ('{"file_name": "2.jpg"}', "lacks 'text'"),
        (line("2.jpg", None), "'text' is null, no text"),
        (line("2.jpg", ["a"]), "'text' is [\"a\"], no text"),
        (line(7, "a"), "'file_name' is 7, no text"),
        (line("", "a"), "'file_name' is empty"),
        (line("../b/1.jpg", "a"), "leads out of its folder"),
        (line("/1.jpg", "a"), "leads out of its folder"),
        (line("b/1.jpg", "a"), "leads out of its folder"),
        (line("b\\1.jpg", "a"), "leads out of its folder"),
        (line("..", "a"), "leads out of its folder"),
        ('{"file_name": "2.jpg", "text": "\\ud800"}', "half a character"),
        ('{"file_name": "2.jpg", "text": "a\\u0000"}', "a null"),
        ('{"file_name": "2.jpg", "text": "a", "score": ' + "9" * 5000 + "}", "no JSON that can be read"),
        ("[" * 100_000, "no JSON that can be read"),
    ],
)
def test_a_broken_line_of_a_list_is_a_problem_with_path_and_line(folder: Path, content: str, reason: str) -> None:
    path = folder / "captions.jsonl"
    path.write_text(line("1.jpg", "sound") + "\n" + content.rstrip("\n") + "\n" + line("1.jpg", "sound"))
    found = scan(folder)
    (problem,) = found.problems
    assert problem.startswith(f"{path}: line 3: ")
    assert reason in problem
    assert found.pictures[0].caption == "sound"


def test_a_line_in_another_encoding_is_named_and_the_others_are_read(folder: Path) -> None:
    path = folder / "captions.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"file_name": "1.jpg", "text": "caf\xc3\xa9"}\r\n{"file_name": "2.jpg", "text": "\xe9"}'
    )
    entries, problems = read_caption_list(str(path))
    assert [(entry.file_name, entry.text, entry.line) for entry in entries] == [("1.jpg", "café", 1)]
    assert problems == [f"{path}: line 2: is no UTF-8 text (byte 0xe9 at 32); save it as UTF-8"]


def test_a_list_in_utf_16_is_one_problem(folder: Path) -> None:
    (folder / "captions.jsonl").write_bytes((line("1.jpg", "a") * 3).encode("utf-16"))
    (problem,) = scan(folder).problems
    assert problem == f"{folder / 'captions.jsonl'}: is UTF-16 text; save it as UTF-8"


def test_an_endless_line_is_not_read_into_memory(folder: Path) -> None:
    with open(folder / "captions.jsonl", "wb") as file:
        file.truncate(3_000_000_000)  # a hole: takes no room
    (problem,) = scan(folder).problems
    assert problem.endswith("line 1: is longer than 1,048,576 bytes; write one picture's object a line")


def test_a_picture_listed_twice_with_different_texts_is_a_problem(folder: Path) -> None:
    (folder / "captions.jsonl").write_text(line("1.jpg", "a") + line("1.jpg", "a ") + line("1.jpg", "b"))
    (folder / "metadata.jsonl").write_text(line("1.jpg", "c"))
    first, second = scan(folder).problems
    assert first == f"{folder / 'captions.jsonl'}: line 3: '1.jpg' has another text in line 1; remove one of them"
    assert second.startswith(f"{folder / 'metadata.jsonl'}: line 1: '1.jpg' has another text in line 1 of {folder}")


def test_captions_without_a_picture_are_orphans(folder: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / "3.caption").write_text("x")
    (folder / "captions.jsonl").write_text(line("1.jpg", "a") + line("gone.jpg", "b") + line("1", "c"))
    found = scan(folder)
    assert found.problems == []
    assert found.orphans == [
        "a/3.caption",
        "a/captions.jsonl line 2: gone.jpg",
        "a/captions.jsonl line 3: 1",
        "a/notes.txt",
    ]


def test_every_broken_sidecar_is_named_at_once(folder: Path) -> None:
    (folder / "1.txt").write_bytes(b"\xff")
    (folder / "2.caption").write_bytes(b"\xfe")
    (folder / "captions.jsonl").write_text("{}\n")
    (folder / "multiply.txt").write_text("often")
    problems = "\n".join(scan(folder).problems)
    assert all(name in problems for name in ("1.txt", "2.caption", "captions.jsonl: line 1", "multiply.txt"))


def test_all_lines_of_a_problem_can_be_asked_for(folder: Path) -> None:
    (folder / "captions.jsonl").write_text("{}\n" * 30)
    assert len(scan(folder).problems) == 21
    assert len(scan_data_root(str(folder.parent), named=None).problems) == 30


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl", "folder.yaml", "multiply.txt"])
def test_what_is_about_a_folder_has_no_place_in_the_root(folder: Path, name: str) -> None:
    (folder.parent / name).touch()
    (problem,) = scan(folder).problems
    assert problem.startswith(f"{folder.parent / name}: lies in the data root, where it has no effect")


def test_a_sidecar_that_vanishes_while_it_is_read_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.txt: cannot be read \(No such file"):
        read_sidecar(str(tmp_path / "gone.txt"))
