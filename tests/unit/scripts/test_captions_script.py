"""Moving and editing captions: every caption comes out exactly, and every change can be taken back."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import captions
import file_changes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.captions import caption_from_file_name
from ldm.data.scan import scan_data_root

Tree = dict[str, bytes]


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write files by their paths below the root; a picture's content is its own name, so that it can be followed."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
    return root


def tree(root: Path) -> Tree:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def found(root: Path) -> dict[str, tuple[str, str]]:
    """Give caption and source by file name."""
    scan = scan_data_root(str(root))
    assert scan.problems == []
    return {Path(picture.path).name: (picture.caption, picture.caption_source) for picture in scan.pictures}


def run(root: Path, command: str, *rest: str) -> int:
    return captions.main([command, *rest, "--data_root", str(root)])


def entry(file_name: str, text: str, **more: object) -> str:
    return json.dumps({"file_name": file_name, "text": text, **more}) + "\n"


def test_show_lists_pictures_with_source_and_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, {"a/a cat_(1).jpg": "", "a/2.png": "", "a/2.txt": "a dog\n"})
    assert run(tmp_path, "show") == 0
    shown = capsys.readouterr()
    assert shown.out == "a/2.png\ttxt\ta dog\na/a cat_(1).jpg\tfile name\ta cat\n"
    assert "2 pictures: 1 from txt, 1 from file name" in shown.err


def test_show_can_be_limited_to_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, {"a/a cat_(1).jpg": "", "a/2.png": "", "a/2.txt": "a dog\n"})
    run(tmp_path, "show", "--source", "name")
    assert capsys.readouterr().out == "a/a cat_(1).jpg\tfile name\ta cat\n"


@pytest.mark.parametrize(("file_format", "source"), [("txt", "txt"), ("caption", "caption"), ("jsonl", "jsonl")])
def test_names_are_written_into_sidecars(tmp_path: Path, file_format: str, source: str) -> None:
    plant(tmp_path, {"a/a cat_(1).jpg": "", "b/ein Café, blau_x_y.png": ""})
    assert run(tmp_path, "write", "--format", file_format) == 0
    assert found(tmp_path) == {"a cat_(1).jpg": ("a cat", source), "ein Café, blau_x_y.png": ("ein Café, blau", source)}


def test_writing_a_list_adds_to_the_one_that_is_there(tmp_path: Path) -> None:
    first = '{"text": "one",  "file_name": "1.jpg", "score": 0.50}\r\n'
    plant(tmp_path, {"a/1.jpg": "", "a/2.jpg": "", "a/metadata.jsonl": first + entry("2.jpg", "two").rstrip()})
    plant(tmp_path, {"a/3.jpg": ""})
    assert run(tmp_path, "write", "--format", "jsonl") == 0
    written = (tmp_path / "a" / "metadata.jsonl").read_bytes().decode("utf-8")
    assert written == first + entry("2.jpg", "two") + entry("3.jpg", "3")
    assert found(tmp_path)["3.jpg"] == ("3", "jsonl")


def test_sidecars_become_names_and_move_along(tmp_path: Path) -> None:
    plant(tmp_path, {"a/1.jpg": "p1", "a/1.txt": "a cat\non a mat", "a/2.png": "p2", "a/2.CAPTION": "a dog"})
    assert run(tmp_path, "rename") == 0
    assert set(tree(tmp_path)) - {log.name for log in tmp_path.glob(".*")} == {
        "a/a cat on a mat.jpg",
        "a/a cat on a mat.txt",
        "a/a dog.png",
        "a/a dog.CAPTION",
    }
    assert (tmp_path / "a" / "a cat on a mat.jpg").read_text() == "p1"


def test_a_list_follows_the_renamed_pictures_and_keeps_its_other_fields(tmp_path: Path) -> None:
    plant(tmp_path, {"a/1.jpg": "", "a/metadata.jsonl": entry("gone.jpg", "x") + entry("1.jpg", "a cat", hash="ff")})
    assert run(tmp_path, "rename") == 0
    assert (tmp_path / "a" / "metadata.jsonl").read_text() == entry("gone.jpg", "x") + entry(
        "a cat.jpg", "a cat", hash="ff"
    )
    assert found(tmp_path) == {"a cat.jpg": ("a cat", "jsonl")}


def test_equal_captions_are_numbered_also_where_case_alone_differs(tmp_path: Path) -> None:
    texts = {"1": "a cat", "2": "A Cat", "3": "a cat", "4": "a dog"}
    plant(tmp_path, {f"a/{n}.jpg": n for n in texts} | {f"a/{n}.txt": text for n, text in texts.items()})
    plant(tmp_path, {"a/a dog.jpg": "there before"})
    assert run(tmp_path, "rename") == 0
    assert {name: (tmp_path / "a" / name).read_text() for name in found(tmp_path)} == {
        "a cat.jpg": "1",
        "A Cat_(2).jpg": "2",
        "a cat_(3).jpg": "3",
        "a dog_(2).jpg": "4",
        "a dog.jpg": "there before",
    }


def test_pictures_that_share_a_sidecar_keep_sharing_it(tmp_path: Path) -> None:
    plant(tmp_path, {"a/1.jpg": "", "a/1.png": "", "a/1.txt": "a cat"})
    assert run(tmp_path, "rename") == 0
    assert set(found(tmp_path)) == {"a cat.jpg", "a cat.png"}
    assert (tmp_path / "a" / "a cat.txt").read_text() == "a cat"


def test_a_renamed_picture_does_not_fall_under_an_orphaned_caption(tmp_path: Path) -> None:
    plant(tmp_path, {"a/1.jpg": "", "a/1.caption": "a cat", "a/a cat.txt": "another", "a/2.jpg": "", "a/2.txt": "b c"})
    plant(tmp_path, {"a/captions.jsonl": entry("b c.jpg", "another")})
    assert run(tmp_path, "rename") == 0
    assert found(tmp_path) == {"a cat_(2).jpg": ("a cat", "caption"), "b c_(2).jpg": ("b c", "txt")}


def test_a_caption_named_multiply_does_not_turn_into_a_setting(tmp_path: Path) -> None:
    plant(tmp_path, {"a/1.jpg": "", "a/1.txt": "multiply"})
    assert run(tmp_path, "rename") == 0
    assert found(tmp_path) == {"multiply_(2).jpg": ("multiply", "txt")}


@pytest.mark.parametrize("caption", ["is this a cat?", "snake_case", "x" * 300, "猫" * 90, ".hidden", "con.x"])
def test_a_caption_that_no_name_can_hold_stays_in_its_sidecar(
    tmp_path: Path, caption: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, {"a/1.jpg": "", "a/1.txt": caption, "a/2.jpg": "", "a/2.txt": "a dog"})
    assert run(tmp_path, "rename") == 1
    assert found(tmp_path) == {"1.jpg": (caption, "txt"), "a dog.jpg": ("a dog", "txt")}
    assert "left: a/1.jpg: no file name can hold its caption" in capsys.readouterr().err


def test_replacing_works_on_every_source(tmp_path: Path) -> None:
    plant(tmp_path, {"a/a man on foot_17.jpg": "", "a/2.jpg": "", "a/2.txt": "a man, old\n"})
    plant(
        tmp_path,
        {"a/3.jpg": "", "a/3.caption": "not a man", "a/4.jpg": "", "a/captions.jsonl": entry("4.jpg", "a man")},
    )
    assert run(tmp_path, "replace", "a man", "john doe") == 0
    assert found(tmp_path) == {
        "john doe on foot_17.jpg": ("john doe on foot", "file name"),
        "2.jpg": ("john doe, old", "txt"),
        "3.jpg": ("not john doe", "caption"),
        "4.jpg": ("john doe", "jsonl"),
    }


def test_replacing_keeps_what_the_user_wrote_behind_the_underscore(tmp_path: Path) -> None:
    plant(tmp_path, {f"a/a man{tail}.jpg": "" for tail in ("", "_(2)", "_IMG_0001", "_")})
    run(tmp_path, "replace", "a man", "john")
    assert set(found(tmp_path)) == {"john.jpg", "john_(2).jpg", "john_IMG_0001.jpg", "john_.jpg"}


def test_whole_words_are_replaced_unless_parts_are_asked_for(tmp_path: Path) -> None:
    plant(tmp_path, {"a/a mango and a man.jpg": ""})
    run(tmp_path, "replace", "a man", "john")
    assert set(found(tmp_path)) == {"a mango and john.jpg"}
    run(tmp_path, "replace", "ang", "eng", "--anywhere")
    assert set(found(tmp_path)) == {"a mengo and john.jpg"}


def test_case_counts_unless_told_otherwise(tmp_path: Path) -> None:
    plant(tmp_path, {"a/A man.jpg": ""})
    assert run(tmp_path, "replace", "a man", "john") == 1
    assert run(tmp_path, "replace", "a man", "john", "--ignore_case") == 0
    assert set(found(tmp_path)) == {"john.jpg"}


def test_the_words_are_taken_as_they_stand(tmp_path: Path) -> None:
    plant(tmp_path, {"a/1.jpg": "", "a/1.txt": "a.c abc (x)"})
    run(tmp_path, "replace", "a.c", r"\1\g<0>")
    run(tmp_path, "replace", "(x)", "[y]")
    assert found(tmp_path) == {"1.jpg": (r"\1\g<0> abc [y]", "txt")}


def test_only_the_case_of_a_name_can_be_changed(tmp_path: Path) -> None:
    plant(tmp_path, {"a/a man_(1).jpg": "p", "a/a man_(2).jpg": "q"})
    assert run(tmp_path, "replace", "man", "Man") == 0
    assert {name: (tmp_path / "a" / name).read_text() for name in found(tmp_path)} == {
        "a Man_(1).jpg": "p",
        "a Man_(2).jpg": "q",
    }


def test_a_replaced_name_that_cannot_be_a_name_goes_into_a_sidecar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, {"a/a man_1.jpg": "", "a/a man_1.png": ""})
    assert run(tmp_path, "replace", "a man", "john_doe") == 0
    assert found(tmp_path) == {"a man_1.jpg": ("john_doe", "txt"), "a man_1.png": ("john_doe", "txt")}
    assert "goes into a .txt file" in capsys.readouterr().out


def test_a_sidecar_that_would_caption_another_picture_too_is_refused(tmp_path: Path) -> None:
    plant(tmp_path, {"a/a man.jpg": "", "a/a man.png": "", "a/captions.jsonl": entry("a man.png", "other")})
    before = tree(tmp_path)
    assert run(tmp_path, "replace", "a man", "what?") == 1
    assert run(tmp_path, "write") == 1
    assert tree(tmp_path) == before


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(
        tmp_path, {"a/1.jpg": "", "a/1.txt": "new", "a/1.caption": "old", "a/captions.jsonl": entry("1.jpg", "older")}
    )
    before = tree(tmp_path)
    assert run(tmp_path, "write", "--format", "caption") == 1
    assert run(tmp_path, "write", "--format", "jsonl") == 1
    assert tree(tmp_path) == before
    assert capsys.readouterr().err.count("add --overwrite to replace it") == 2
    assert run(tmp_path, "write", "--format", "caption", "--overwrite") == 0
    assert run(tmp_path, "write", "--format", "jsonl", "--overwrite") == 0
    assert (tmp_path / "a" / "1.caption").read_text() == "new\n"
    assert (tmp_path / "a" / "captions.jsonl").read_text() == entry("1.jpg", "new")


@pytest.mark.parametrize("command", [["write"], ["rename"], ["replace", "cat", "dog"]])
def test_a_dry_run_says_what_would_happen_and_does_nothing(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, {"a/a cat_1.jpg": "", "a/2.jpg": "", "a/captions.jsonl": entry("2.jpg", "cat")})
    before = tree(tmp_path)
    assert run(tmp_path, *command, "--dry-run") == 0
    assert tree(tmp_path) == before
    assert str(tmp_path / "a") in capsys.readouterr().out


def test_changes_are_taken_back_one_command_after_the_other(tmp_path: Path) -> None:
    plant(tmp_path, {"a/a cat_1.jpg": "x", "a/2.jpg": "y", "a/2.txt": "\ufeffa\r\ncat\r\n"})
    first = tree(tmp_path)
    run(tmp_path, "replace", "cat", "dog")
    second = tree(tmp_path)
    run(tmp_path, "rename")
    assert tree(tmp_path) != second
    assert run(tmp_path, "undo") == 0
    assert tree(tmp_path) == second
    assert run(tmp_path, "undo") == 0
    assert tree(tmp_path) == first
    assert run(tmp_path, "undo") == 2


def test_undoing_leaves_alone_what_was_changed_since(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, {"a/1.jpg": "", "a/1.txt": "a cat", "a/2.jpg": "", "a/2.txt": "cats, a cat"})
    run(tmp_path, "replace", "a cat", "a dog")
    (tmp_path / "a" / "1.txt").write_text("mine")
    assert run(tmp_path, "undo") == 1
    assert found(tmp_path) == {"1.jpg": ("mine", "txt"), "2.jpg": ("cats, a cat", "txt")}
    assert "was changed since" in capsys.readouterr().err


def test_an_error_in_the_middle_takes_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, {f"a/a cat_{n}.jpg": str(n) for n in range(4)} | {"a/x.jpg": "", "a/x.txt": "a cat"})
    before = tree(tmp_path)
    rename = os.rename

    def fail_at_third(source: str, target: str) -> None:
        if "dog_2" in target:
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(file_changes.os, "rename", fail_at_third)
    assert run(tmp_path, "replace", "a cat", "a dog") == 2
    assert tree(tmp_path) == before


def test_a_caption_that_came_out_wrong_takes_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, {"a/a cat.jpg": "x", "a/1.jpg": "", "a/1.txt": "a cat"})
    before = tree(tmp_path)
    monkeypatch.setattr(captions, "file_name_from_caption", lambda caption, suffix, tail="": f"wrong{tail}{suffix}")
    assert run(tmp_path, "replace", "a cat", "a dog") == 2
    assert tree(tmp_path) == before
    assert "everything was taken back" in capsys.readouterr().err


def test_what_a_power_cut_leaves_can_be_taken_back(tmp_path: Path) -> None:
    plant(tmp_path, {"a/a cat_1.jpg": "1", "a/a cat_2.jpg": "2"})
    before = tree(tmp_path)
    run(tmp_path, "replace", "a cat", "a dog")
    (log,) = tmp_path.glob(".captions-undo-*")
    (tmp_path / "a" / "a dog_2.jpg").rename(tmp_path / "a" / "a cat_2.jpg")  # noted, but not yet done
    log.write_text(log.read_text() + '{"rename": ["a/a c')
    assert run(tmp_path, "undo") == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "line",
    [
        '{"rename": ["../stolen.txt", "a/1.txt"]}',
        '{"write": "/etc/x", "before": "", "after": ""}',
        '{"rename": ["a"]}',
        "5",
        "no json",
    ],
)
def test_a_log_that_reaches_out_of_its_folder_is_refused(tmp_path: Path, line: str) -> None:
    root = plant(tmp_path / "root", {"a/1.jpg": "", "a/1.txt": "x", ".captions-undo-0.jsonl": f"{line}\n"})
    before = tree(tmp_path)
    assert run(root, "undo") == 2
    assert tree(tmp_path) == before


def test_problems_of_the_data_root_come_all_at_once_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, {"a/1.jpg": "", "a/captions.jsonl": "{}\n[]\n", "stray.jpg": "", "a/a cat.jpg": ""})
    before = tree(tmp_path)
    assert run(tmp_path, "replace", "a cat", "a dog") == 2
    assert tree(tmp_path) == before
    errors = capsys.readouterr().err
    assert all(part in errors for part in ("stray.jpg", "line 1: lacks", "line 2: is no JSON object"))


def test_pictures_of_a_folder_that_is_switched_off_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, {"a/a cat.jpg": "", "b/a cat.jpg": "", "b/multiply.txt": "0"})
    assert run(tmp_path, "replace", "a cat", "a dog") == 1
    assert "b: 1 picture passed over, since multiply is 0" in capsys.readouterr().err


def test_deeper_folders_are_reached_when_asked(tmp_path: Path) -> None:
    plant(tmp_path, {"a/b/c/a cat.jpg": ""})
    assert run(tmp_path, "replace", "a cat", "a dog") == 2
    assert run(tmp_path, "replace", "a cat", "a dog", "--recursive") == 0
    assert (tmp_path / "a" / "b" / "c" / "a dog.jpg").exists()


@pytest.mark.parametrize("argv", [[], ["show"], ["replace", "", "x", "--data_root", "."], ["write", "--format", "xml"]])
def test_a_command_line_that_makes_no_sense_ends_with_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        captions.main(argv)
    assert stopped.value.code == 2


NAMES = st.text(st.sampled_from("aAb _.é(2)"), min_size=1, max_size=6).filter(
    lambda name: not name.startswith(".") and name.lower() != "multiply"
)
TEXTS = st.one_of(st.text(st.sampled_from("aAb _?.é(2)\n"), max_size=6), st.text(max_size=8))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(NAMES, st.one_of(st.none(), TEXTS), min_size=1, max_size=6),
    st.lists(
        st.sampled_from([("write",), ("rename",), ("replace", "a", "A b"), ("replace", "b", "?", "--anywhere")]),
        max_size=4,
    ),
)
def test_whatever_is_done_every_caption_is_kept_exactly_and_all_can_be_undone(
    pictures: dict[str, str | None], commands: list[tuple[str, ...]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, (name, text) in enumerate(pictures.items()):
            plant(root, {f"a/{name}.jpg": str(number)})
            if text is not None:
                (root / "a" / f"{name}.txt").write_bytes(text.encode("utf-8", "replace"))
        if scan_data_root(folder).problems:
            return
        before = tree(root)
        expected = dict(_by_content(root))
        for command in commands:
            assert run(root, *command) != 2
            if command[0] == "replace":
                substitute = captions.build_substitution(command[1], command[2], "--anywhere" in command, False)
                expected = {
                    n: new.strip() if (new := substitute(text)) != text else text for n, text in expected.items()
                }
            assert dict(_by_content(root)) == expected
        while list(root.glob(".captions-undo-*")):
            assert run(root, "undo") == 0
        assert tree(root) == before


def _by_content(root: Path) -> list[tuple[str, str]]:
    return [(Path(picture.path).read_text(), picture.caption) for picture in scan_data_root(str(root)).pictures]


def test_a_caption_with_spaces_in_its_middle_is_not_tidied_by_the_way(tmp_path: Path) -> None:
    plant(tmp_path, {"a/a  cat, dog_1.jpg": ""})
    run(tmp_path, "replace", "dog", "fox")
    (name,) = found(tmp_path)
    assert caption_from_file_name(name) == "a  cat, fox"
