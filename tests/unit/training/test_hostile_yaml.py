"""YAML files that were made to do harm: each gives one line with its file and, where there is one, its line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ldm.training.config import resolve_references
from ldm.training.config_tree import ConfigTree, read_yaml

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: *a{n - 1}, p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 30)
)
DOUBLING = "a0: haha\n" + "".join(f"a{n}: '${{a{n - 1}}}${{a{n - 1}}}'\n" for n in range(1, 60))
TREES = "a0: {x: 1, y: 2}\n" + "".join(f"a{n}: {{p: '${{a{n - 1}}}', q: '${{a{n - 1}}}'}}\n" for n in range(1, 60))
THROUGH = "c: {b: '" + "ha" * 50_000 + "'}\na: ${c}\nd: " + "${a.b}${a[b]}${.a.b}" * 5 + "\n"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes) -> ConfigTree:
    Path("a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    tree = read_yaml("a.yaml")
    resolve_references(tree)
    return tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.mkdir [made]", r"a\.yaml:1: .*plain values only"),
        ("a: !!python/object/new:os.mkdir [made]", r"a\.yaml:1: .*plain values only"),
        ("a: !!python/name:os.mkdir", r"a\.yaml:1: .*plain values only"),
        ("a: !!python/module:antigravity", r"a\.yaml:1: .*plain values only"),
        ("a: !!python/object/apply:pathlib.Path [x]", r"a\.yaml:1: .*plain values only"),
        ("a: !mine x", r"a\.yaml:1: .*tag '!mine'.*plain values only"),
        ("a: !!binary aGVsbG8=", r"a\.yaml:1: .*tag '!!binary'"),
        (LAUGHS, r"a\.yaml: has [\d,]+ values when its aliases"),
        (MERGES, r"a\.yaml: has [\d,]+ values when its aliases"),
        ("a: &a [*a]", r"a\.yaml:1: an anchor contains itself"),
        ("a: &a {<<: *a}", r"a\.yaml:1: an anchor contains itself"),
        ("a: " + "[" * 60 + "]" * 60, r"a\.yaml:1: nested more than 50 deep"),
        ("a: " + "[" * 3_000, r"a\.yaml: nested more than 50 deep"),
        ("a: &b " + "[" * 40 + "]" * 40 + "\nc: " + "[" * 40 + "*b" + "]" * 40, r"a\.yaml:1: nested more than 50 deep"),
        ("a: " + "9" * 5000, r"a\.yaml:1: a number of 5,000 digits"),
        ("a: 0x" + "f" * 5000, r"a\.yaml:1: a number of"),
        ("a: 1\na: 2", r"a\.yaml:2: .*duplicate key a"),
        ("? [a, b]\n: 1", r"a\.yaml:1: "),
        ("null: 1", r"a\.yaml: .*key type"),
        ("a: b\0c", r"a\.yaml: not valid YAML"),
        ("a: \x1b[2J", r"a\.yaml: not valid YAML"),
        ("a: b".encode("utf-16"), r"a\.yaml: not a YAML text file"),
        (b"a: \xff", r"a\.yaml: not a YAML text file"),
        ("a: 1\n" * 60_000, r"a\.yaml: is longer than 262,144 bytes"),
        ("a: 1\n---\na: 2", r"a\.yaml:2: "),
        ("a: ${oc.env:HOME}", r"a\.yaml:1: a: \$\{oc\.env:HOME\} is not followed"),
        ("a: ${oc.decode:'[1]'}", r"a\.yaml:1: a: .* is not followed"),
        ("a: [x, {b: '${oc.create:{}}'}]", r"a\.yaml:1: a\.1\.b: .*reference inside|is not followed"),
        ("a: ${b.${c}}\nb: {d: 1}\nc: d", r"a\.yaml:1: a: .*reference inside a reference"),
        ("a: ${a}", r"a\.yaml:1: a: .*[Rr]ecursive"),
        (DOUBLING, r"a\.yaml:\d+: a\d+: has more than 1,000,000 characters"),
        (TREES, r"a\.yaml:\d+: a\d+: has more than 1,000,000 characters"),
        (THROUGH, r"a\.yaml:\d+: \w: has more than 1,000,000 characters"),
    ],
    ids=range(33),
)
def test_a_yaml_that_does_harm_is_refused_in_one_line(text: str | bytes, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.monotonic() - began < 5
    assert os.listdir() == ["a.yaml"]


@pytest.mark.parametrize(
    "text", ["\ufeffa: 5", "a: 2022-10-25", "a: &x {b: 1}\nc: *x\nd: {<<: *x}", "a: [1, [2, {b: 3}]]"]
)
def test_a_yaml_with_usual_things_is_read(text: str) -> None:
    assert "a" in load(text).tree


def test_references_to_other_keys_are_followed() -> None:
    tree = load(
        "a: {b: 5, c: '${.b}', d: ['${a.b}', '${..b}']}\ne: ${a}\nf: ${e.c}\ng: x${f}y${a.d[0]}\nh: '\\${a}'"
    ).tree
    assert tree["a"]["c"] == tree["f"] == 5
    assert tree["g"] == "x5y5"
    assert tree["h"] == "${a}"
