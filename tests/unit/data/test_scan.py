import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.data import scan as scan_module
from ldm.data.scan import scan_data_root

MakeRoot = Callable[..., Path]

links = pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")


def test_pictures_come_sorted_by_folder_and_name(make_root: MakeRoot) -> None:
    root = make_root("b/z.png", "b/A.png", "a b/x.png", "a/y.png")
    assert [picture.relative_path for picture in scan_data_root(str(root)).pictures] == [
        "a/y.png",
        "a b/x.png",
        "b/A.png",
        "b/z.png",
    ]


def test_the_order_does_not_depend_on_the_file_system(make_root: MakeRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(make_root(*(f"f{i % 3}/p{i}.png" for i in range(12))))
    before = scan_data_root(root)
    real_scandir = os.scandir

    class Reversed:
        def __init__(self, folder: str) -> None:
            with real_scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> "Reversed":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self):
            return iter(self.entries)

    monkeypatch.setattr(scan_module.os, "scandir", Reversed)
    assert scan_data_root(root) == before


def test_a_picture_knows_its_path_folder_and_caption(make_root: MakeRoot) -> None:
    root = make_root("man/a man_(1).jpg")
    (picture,) = scan_data_root(str(root)).pictures
    assert (picture.path, picture.folder, picture.caption) == (str(root / "man" / "a man_(1).jpg"), "man", "a man")


def test_folders_are_counted_also_the_empty_ones(make_root: MakeRoot) -> None:
    root = make_root("a/1.png", "a/2.png", "b/1.png")
    (root / "c").mkdir()
    assert scan_data_root(str(root)).folder_counts == {"a": 2, "b": 1, "c": 0}


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are always Unicode there")
def test_names_that_are_not_utf_8_are_problems_that_can_be_printed(make_root: MakeRoot) -> None:
    root = make_root("a/1.png", "b/2.png")
    os.rename(root / "a" / "1.png", os.path.join(os.fsencode(root), b"a", b"caf\xe9.png"))
    os.rename(root / "b", os.path.join(os.fsencode(root), b"\xff"))
    folder, picture = scan_data_root(str(root)).problems
    assert folder == f"{root}/\\xff: the name is not UTF-8 text; rename it"
    assert picture == f"{root}/a/caf\\xe9.png: the name is not UTF-8 text; rename it"


def test_other_files_are_left_out_and_named(make_root: MakeRoot) -> None:
    root = make_root("a/1.png")
    (root / "notes.txt").touch()
    (root / "a" / "1.md").touch()
    scan = scan_data_root(str(root))
    assert (scan.left_out, scan.problems) == (["a/1.md", "notes.txt"], [])


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "._1.png", ".hidden.png"])
def test_hidden_and_system_files_are_kept_apart(make_root: MakeRoot, name: str) -> None:
    root = make_root("a/1.png")
    (root / "a" / name).touch()
    (root / name).touch()
    scan = scan_data_root(str(root))
    assert (sorted(scan.hidden), scan.left_out, len(scan.pictures)) == (sorted([name, f"a/{name}"]), [], 1)


def test_pictures_in_hidden_folders_do_not_count(make_root: MakeRoot) -> None:
    scan = scan_data_root(str(make_root("a/1.png", ".thumbnails/1.png", "a/.ipynb_checkpoints/1.png")))
    assert (len(scan.pictures), scan.problems) == (1, [])


def test_a_picture_in_the_root_is_a_problem_that_says_what_to_move(make_root: MakeRoot) -> None:
    root = make_root("a/1.png", "stray.jpg")
    (problem,) = scan_data_root(str(root)).problems
    assert str(root / "stray.jpg") in problem
    assert "move it into a subfolder" in problem


def test_a_picture_below_the_layer_is_a_problem_that_says_where_it_goes(make_root: MakeRoot) -> None:
    root = make_root("a/1.png", "a/b/c/deep.png")
    (problem,) = scan_data_root(str(root)).problems
    assert str(root / "a" / "b" / "c" / "deep.png") in problem
    assert problem.split(", or set recursive: True")[0].endswith(f"move it up into {root / 'a'}")


def test_other_files_below_the_layer_are_left_out(make_root: MakeRoot) -> None:
    root = make_root("a/1.png")
    (root / "a" / "b").mkdir()
    (root / "a" / "b" / "notes.txt").touch()
    scan = scan_data_root(str(root))
    assert (scan.left_out, scan.problems) == (["a/b/notes.txt"], [])


def test_all_problems_come_at_once(make_root: MakeRoot) -> None:
    problems = scan_data_root(str(make_root("one.png", "two.png", "a/b/three.png"))).problems
    assert [any(name in line for line in problems) for name in ("one.png", "two.png", "three.png")] == [True] * 3


def test_very_many_files_of_one_problem_are_counted_instead_of_named(make_root: MakeRoot) -> None:
    problems = scan_data_root(str(make_root(*(f"{i:02}.png" for i in range(25))))).problems
    assert len(problems) == 21
    assert problems[-1].startswith("... and 5 more")


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_root_without_pictures_is_a_problem(make_root: MakeRoot, with_folder: bool) -> None:
    root = make_root()
    if with_folder:
        (root / "a").mkdir()
    (problem,) = scan_data_root(str(root)).problems
    assert "holds no pictures" in problem


def test_a_missing_root_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_root .*nowhere.* does not exist.*--data_root"):
        scan_data_root(str(tmp_path / "nowhere"))


def test_a_root_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        scan_data_root(str(tmp_path / "file"))


@links
def test_linked_folders_and_files_are_followed(make_root: MakeRoot) -> None:
    elsewhere = make_root("x/1.png", "x/2.png", root="elsewhere")
    root = make_root("a/1.png")
    (root / "linked").symlink_to(elsewhere / "x", target_is_directory=True)
    (root / "a" / "file link.png").symlink_to(elsewhere / "x" / "1.png")
    assert scan_data_root(str(root)).folder_counts == {"a": 2, "linked": 2}


@links
def test_a_circle_of_links_ends(make_root: MakeRoot) -> None:
    root = make_root("a/1.png")
    (root / "a" / "loop").symlink_to(root / "a", target_is_directory=True)
    assert len(scan_data_root(str(root)).pictures) == 1


def test_relative_paths_are_composed_whatever_the_file_system_stores(make_root: MakeRoot) -> None:
    root = make_root(unicodedata.normalize("NFD", "é/é.png"))
    (picture,) = scan_data_root(str(root)).pictures
    assert picture.relative_path == unicodedata.normalize("NFC", "é/é.png")
    assert os.path.exists(picture.path)


def test_deeper_folders_are_folders_of_their_own_when_asked(make_root: MakeRoot) -> None:
    root = make_root("man/1.png", "man/close ups/old/2.png", "man/close ups/3.png", "man a/4.png")
    scan = scan_data_root(str(root), recursive=True)
    assert scan.problems == []
    assert [(picture.folder, picture.relative_path) for picture in scan.pictures] == [
        ("man", "man/1.png"),
        ("man/close ups", "man/close ups/3.png"),
        ("man/close ups/old", "man/close ups/old/2.png"),
        ("man a", "man a/4.png"),
    ]
    assert list(scan.folder_counts.items()) == [
        ("man", 1),
        ("man/close ups", 1),
        ("man/close ups/old", 1),
        ("man a", 1),
    ]


def test_a_folder_that_only_holds_folders_is_no_folder_of_a_deep_tree(make_root: MakeRoot) -> None:
    root = make_root("a/b/c/1.png")
    (root / "empty").mkdir()
    assert scan_data_root(str(root), recursive=True).folder_counts == {"a/b/c": 1, "empty": 0}


def test_a_picture_in_the_root_of_a_deep_tree_is_a_problem_too(make_root: MakeRoot) -> None:
    (problem,) = scan_data_root(str(make_root("a/1.png", "2.png")), recursive=True).problems
    assert "lies in the data root" in problem


@links
@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("target", ["", "a", "a/b"])
def test_a_link_in_a_circle_is_told_and_not_followed(make_root: MakeRoot, recursive: bool, target: str) -> None:
    root = make_root("a/1.png")
    (root / "a" / "b").mkdir()
    (root / "a" / "b" / "loop").symlink_to(root / target, target_is_directory=True)
    scan = scan_data_root(str(root), recursive=recursive)
    assert (len(scan.pictures), scan.problems) == (1, [])
    assert scan.warnings == [
        f"{root / 'a' / 'b' / 'loop'}: is a link in a circle, back to {root / target}; it is not followed"
    ]


@links
@pytest.mark.parametrize("recursive", [False, True])
def test_a_folder_that_links_lead_to_is_read_once_under_its_own_name(make_root: MakeRoot, recursive: bool) -> None:
    root = make_root("z/1.png")
    (root / "a link").symlink_to(root / "z", target_is_directory=True)
    scan = scan_data_root(str(root), recursive=recursive)
    assert scan.folder_counts == {"z": 1}
    assert scan.warnings == [f"{root / 'a link'}: is the same folder as {root / 'z'}; it is read once, under that name"]


@links
def test_a_folder_elsewhere_is_read_under_its_first_link(make_root: MakeRoot) -> None:
    elsewhere = make_root("x/1.png", "x/y/2.png", root="elsewhere")
    root = make_root("a/1.png")
    for name in ("c", "b"):
        (root / name).symlink_to(elsewhere / "x", target_is_directory=True)
    scan = scan_data_root(str(root), recursive=True)
    assert scan.folder_counts == {"a": 1, "b": 1, "b/y": 1}
    assert len(scan.warnings) == 1


@links
def test_a_link_to_itself_is_told(make_root: MakeRoot) -> None:
    root = make_root("a/1.png")
    (root / "a" / "loop").symlink_to("loop")
    scan = scan_data_root(str(root))
    assert (len(scan.pictures), scan.left_out) == (1, ["a/loop"])
    assert scan.warnings == [f"{root / 'a' / 'loop'}: is a link to itself; it leads nowhere"]


@links
def test_a_picture_that_links_to_itself_is_a_problem(make_root: MakeRoot) -> None:
    root = make_root("a/1.png")
    (root / "a" / "2.png").symlink_to("2.png")
    scan = scan_data_root(str(root))
    (problem,) = scan.problems
    assert problem.startswith(f"{root / 'a' / '2.png'}: cannot be read (")


@links
def test_a_picture_that_is_a_link_to_nothing_is_left_to_its_reader(make_root: MakeRoot) -> None:
    root = make_root("a/1.png")
    (root / "a" / "2.png").symlink_to("nowhere")
    scan = scan_data_root(str(root))
    assert (len(scan.pictures), scan.problems) == (2, [])


def test_pictures_that_a_list_leaves_out_are_told(make_root: MakeRoot) -> None:
    root = make_root("a/1.png", "a/2.png", "a/3.png", "b/1.png")
    (root / "a" / "captions.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}\n')
    (root / "a" / "2.txt").write_text("a dog")
    (line,) = scan_data_root(str(root)).warnings
    assert line == (
        f"{root / 'a'}: the list of captions there leaves out 1 of 3 pictures, whose file names are their captions"
    )
