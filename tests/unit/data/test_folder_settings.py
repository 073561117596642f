"""A folder's own settings: exact numbers, and every slip told with its line."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.folder_settings import FolderSettings, parse_number, read_folder_settings
from ldm.data.scan import scan_data_root

MakeRoot = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2", Fraction(2)),
        ("0.5", Fraction(1, 2)),
        (".25", Fraction(1, 4)),
        ("3.", Fraction(3)),
        ("0.1", Fraction(1, 10)),
        ("1/3", Fraction(1, 3)),
        ("2 / 4", Fraction(1, 2)),
        ("0", Fraction(0)),
        ("0.0", Fraction(0)),
        ("007", Fraction(7)),
    ],
)
def test_a_number_is_read_exactly(text: str, number: Fraction) -> None:
    assert parse_number(text) == number


@settings(deadline=None)
@given(st.integers(0, 999_999), st.integers(0, 9))
def test_any_decimal_is_read_exactly(digits: int, places: int) -> None:
    whole, decimals = divmod(digits, 10**places)
    text = f"{whole}.{decimals:0{places}}" if places else str(whole)
    assert parse_number(text) == Fraction(digits, 10**places)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_other_text_is_a_number_from_zero_up_or_refused(text: str) -> None:
    try:
        number = parse_number(text)
    except ValueError:
        return
    assert number >= 0
    assert text.isascii()


@pytest.mark.parametrize(
    "text", ["", "-1", "often", "1e3", "0x10", "1_000", "nan", "inf", "1/0", "1.5/2", "٣", "1 2", "0.5\n0.6", "9" * 40]
)
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"number|divides by zero"):
        parse_number(text)


def test_a_decimal_comma_is_answered_with_the_point() -> None:
    with pytest.raises(ValueError, match="behind a point"):
        parse_number("0,5")


def settings_of(
    make_root: MakeRoot, yaml: str | None = None, multiply: str | None = None
) -> tuple[FolderSettings, list[str]]:
    root = make_root("a/1.png", "b/1.png")
    if yaml is not None:
        (root / "a" / "folder.yaml").write_text(yaml, encoding="utf-8")
    if multiply is not None:
        (root / "a" / "multiply.txt").write_text(multiply, encoding="utf-8")
    scan = scan_data_root(str(root))
    assert scan.folder_settings["b"] == FolderSettings()
    return scan.folder_settings["a"], scan.problems


def test_a_folder_without_settings_has_the_defaults(make_root: MakeRoot) -> None:
    assert settings_of(make_root) == (FolderSettings(Fraction(1), None, None, 1.0), [])


def test_all_settings_of_a_folder_are_read(make_root: MakeRoot) -> None:
    yaml = "# mine\nmultiply: 0.1\nflip_p: 0.5\nconditional_dropout: 1\nloss_weight: 2.5\n"
    assert settings_of(make_root, yaml) == (FolderSettings(Fraction(1, 10), 0.5, 1.0, 2.5), [])


@pytest.mark.parametrize("text", ["0.5", "\ufeff0.5\r\n", " 1/2 \n"])
def test_multiply_txt_holds_one_number(make_root: MakeRoot, text: str) -> None:
    assert settings_of(make_root, multiply=text) == (FolderSettings(Fraction(1, 2)), [])


@pytest.mark.parametrize("yaml", ["", "# nothing\n", "---\n", "\ufeff"])
def test_an_empty_settings_file_says_nothing(make_root: MakeRoot, yaml: str) -> None:
    assert settings_of(make_root, yaml) == (FolderSettings(), [])


def test_multiply_may_stand_in_both_files_if_it_is_the_same(make_root: MakeRoot) -> None:
    assert settings_of(make_root, "multiply: 0.50", "1/2") == (FolderSettings(Fraction(1, 2)), [])


def test_two_different_multiplies_are_a_problem(make_root: MakeRoot) -> None:
    _, (problem,) = settings_of(make_root, "multiply: 2", "3")
    assert "multiply.txt: says 3, but " in problem
    assert problem.endswith("folder.yaml says 2; remove one of them")


@pytest.mark.parametrize("text", ["", "often", "-1", "0,5", "2\n3", "10001", "1e400"])
def test_a_multiply_that_makes_no_sense_is_a_problem_with_the_path(make_root: MakeRoot, text: str) -> None:
    _, (problem,) = settings_of(make_root, multiply=text)
    assert "a/multiply.txt: multiply " in problem.replace("\\", "/")


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        ("flipp: 0.5", "line 1: 'flipp' is no setting of a folder; did you mean 'flip_p'?"),
        ("cond_dropout: 0.5", "did you mean 'conditional_dropout'?"),
        ("x: 1", "a folder can have multiply, flip_p, conditional_dropout, loss_weight"),
        ("flip_p: 0.1\nflip_p: 0.2", "line 2: flip_p stands there twice"),
        ("flip_p: high", "flip_p 'high' is no number"),
        ("flip_p: true", "flip_p 'true' is no number"),
        ("flip_p:", "flip_p is empty"),
        ("flip_p: [0.5]", "flip_p is no number"),
        ("flip_p: 1.5", "give a probability from 0 to 1"),
        ("conditional_dropout: -0.1", "is no number from 0 up"),
        ("loss_weight: 0", "give a number above 0"),
        ("loss_weight: .inf", "is no number"),
        ("multiply: 20000", "to 10000"),
        ("- flip_p", "is no mapping"),
        ("0.5", "is no mapping"),
        ("flip_p: 0.5\n flip: 1", "line 2: is no YAML"),
        ("flip_p: 0.5\n---\nflip_p: 0.6", "is no YAML"),
        ("? [a]\n: 1", "is no setting"),
        ("flip_p: *nothing", "is no YAML"),
        ("\x07", "is no YAML"),
        ("[" * 1500, "is no YAML"),
        ("#" * 70_000, "longer than 65,536 bytes"),
    ],
)
def test_a_slip_in_folder_yaml_is_a_problem_with_the_path(make_root: MakeRoot, yaml: str, reason: str) -> None:
    _, problems = settings_of(make_root, yaml)
    assert len(problems) == 1
    assert "folder.yaml: " in problems[0]
    assert reason in problems[0]


def test_all_slips_of_a_folder_come_at_once(make_root: MakeRoot) -> None:
    _, problems = settings_of(make_root, "flip_p: 2\nlos_weight: 1\nmultiply: x", "y")
    assert [problem.split("line ")[-1][:1] for problem in problems[:3]] == ["1", "2", "3"]
    assert "multiply.txt" in problems[3]


def test_a_tag_in_folder_yaml_builds_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = tmp_path / "folder.yaml"
    path.write_text(f"flip_p: !!python/object/apply:os.mkdir ['{made.as_posix()}']")
    settings, problems = read_folder_settings(str(path), None)
    assert (settings, len(problems), made.exists()) == (FolderSettings(), 1, False)


def test_folder_yml_is_told_to_have_no_effect(make_root: MakeRoot) -> None:
    root = make_root("a/1.png")
    (root / "a" / "folder.yml").write_text("multiply: 0")
    (problem,) = scan_data_root(str(root)).problems
    assert problem == f"{root / 'a' / 'folder.yml'}: has no effect under this name; rename it to folder.yaml"


def test_multiply_0_leaves_the_folder_out_and_says_so(make_root: MakeRoot) -> None:
    root = make_root("a/1.png", "b/1.png", "b/2.png")
    (root / "b" / "multiply.txt").write_text("0")
    scan = scan_data_root(str(root))
    assert [picture.folder for picture in scan.pictures] == ["a"]
    assert (scan.switched_off, scan.folder_counts, scan.problems) == ({"b": 2}, {"a": 1, "b": 0}, [])
    assert scan.folder_settings["b"].multiply == 0


def test_a_root_whose_folders_are_all_switched_off_is_a_problem(make_root: MakeRoot) -> None:
    root = make_root("a/1.png")
    (root / "a" / "folder.yaml").write_text("multiply: 0")
    (problem,) = scan_data_root(str(root)).problems
    assert problem.endswith("no picture is left, since multiply is 0 in all its folders (a); raise it")


def test_settings_beside_no_picture_are_told_to_have_no_effect(make_root: MakeRoot) -> None:
    root = make_root("a/b/1.png")
    (root / "a" / "multiply.txt").write_text("2")
    scan = scan_data_root(str(root), recursive=True)
    assert scan.warnings == [f"{root / 'a' / 'multiply.txt'}: has no effect, since no picture lies beside it"]
    assert scan.folder_settings["a/b"].multiply == 1
