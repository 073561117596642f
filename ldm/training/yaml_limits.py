"""What a YAML file that somebody gives away may not do: grow without end, read the environment, make objects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

MOST_BYTES: Final = 1 << 18
"""The longest YAML file that is read."""

MOST_VALUES: Final = 100_000
"""Values of a config when every alias is written out."""

DEEPEST: Final = 50
"""Mappings and lists inside each other."""

MOST_CHARACTERS: Final = 1_000_000
"""Characters of a config when every reference is written out."""

LONGEST_NUMBER: Final = 100
"""Characters."""

_TAGS: Final = {
    f"tag:yaml.org,2002:{name}"
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}
_REFERENCE: Final = re.compile(r"(?<!\\)\$\{([^${}]*)\}")


def check_nodes(root: yaml.Node, path: str) -> None:
    """Refuse a YAML document that would not stay what it looks like.

    Args:
        root: the document, taken apart and not yet built.
        path: its file, for messages.

    Raises:
        ValueError: it is nested too deep or in itself, its aliases multiply, or it has a tag or number that no
            config needs; one line with file and line number.
    """
    values, _ = _measure(root, path, (), {})
    if values > MOST_VALUES:
        raise ValueError(
            f"{path}: has {values:,} values when its aliases (*name) are written out; a config may have {MOST_VALUES:,}"
        )


def _measure(node: yaml.Node, path: str, above: tuple[int, ...], known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Count a node's values with all its aliases written out, and how deep it is nested."""
    line = f"{path}:{node.start_mark.line + 1}"
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ValueError(f"{line}: not valid YAML: the tag {tag!r}; a config holds plain values only")
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > LONGEST_NUMBER:
            raise ValueError(f"{line}: a number of {len(node.value):,} digits; did something slip?")
        return 1, 0
    if id(node) in above:
        raise ValueError(f"{line}: an anchor contains itself; write the values out")
    if id(node) not in known:
        if len(above) >= DEEPEST:
            raise ValueError(f"{line}: nested more than {DEEPEST} deep")
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(inner,) for inner in node.value]
        measured = [_measure(inner, path, (*above, id(node)), known) for pair in pairs for inner in pair]
        known[id(node)] = (1 + sum(count for count, _ in measured), 1 + max((deep for _, deep in measured), default=0))
    values, depth = known[id(node)]
    if len(above) + depth > DEEPEST:
        raise ValueError(f"{line}: nested more than {DEEPEST} deep")
    return values, depth


def check_references(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Find the references (``${key.path}``) of a config that must not be followed.

    What a given config refers to stays within it: a value of the environment (``${oc.env:…}``) would be written
    into the run's folder and its record, which people pass on.

    Args:
        tree: the config, not yet resolved.

    Returns:
        Key path and what is wrong, for each.
    """
    return _References(tree).problems()


class _References:
    """Measures values with their references written out."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = tree
        self.sizes: dict[tuple[str, ...], int] = {}

    def problems(self) -> list[tuple[str, str]]:
        """Look at every text."""
        found = []
        for path, text in _texts(self.tree, ()):
            key = ".".join(path)
            inner = _REFERENCE.findall(text)
            calls = [each for each in inner if ":" in each]
            if calls:
                name = f"${{{calls[0]}}}"
                found.append(
                    (key, f"{name} is not followed; only other keys are: write the value, or type {key}=VALUE")
                )
            elif "${" in _REFERENCE.sub("", text).replace(r"\${", ""):
                found.append((key, f"{text[:60]!r} has a reference inside a reference; write the key path out"))
        if found:
            return found
        for key in self.tree:
            if self.size((str(key),), self.tree[key]) > MOST_CHARACTERS:
                return [(str(key), f"has more than {MOST_CHARACTERS:,} characters when its references are written out")]
        return []

    def size(self, path: tuple[str, ...], value: Any) -> int:
        """Count a value's characters; those of a reference to itself, which fails later, as none."""
        if path in self.sizes:
            return self.sizes[path]
        self.sizes[path] = 0
        count = 1
        for key, inner in _children(value):
            count += len(key) + self.size((*path, key), inner)
        if isinstance(value, str):
            count += len(value)
            for reference in _REFERENCE.findall(value):
                target = self.follow(_absolute(reference, path), DEEPEST)
                if target is not None:
                    count += self.size(*target)
        self.sizes[path] = count
        return count

    def follow(self, path: tuple[str, ...], patience: int) -> tuple[tuple[str, ...], Any] | None:
        """Find the value at a key path, through references on the way."""
        value: Any = self.tree
        for depth, key in enumerate(path):
            if isinstance(value, str):
                whole = _REFERENCE.fullmatch(value)
                if whole is None or not patience:
                    return None
                start = _absolute(whole[1], path[:depth])
                return self.follow((*start, *path[depth:]), patience - 1)
            children = dict(_children(value))
            if key not in children:
                return None
            value = children[key]
        return path, value


def _absolute(reference: str, path: tuple[str, ...]) -> tuple[str, ...]:
    """Turn what stands between the brackets, at a key path, into a key path from the top."""
    name = reference.strip()
    up = len(name) - len(name.lstrip("."))
    start = path[: len(path) - up] if up else ()
    return (*start, *(part for part in re.split(r"[.\[\]]+", name) if part))


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in value.items()]
    return [(str(index), inner) for index, inner in enumerate(value)] if isinstance(value, list) else []


def _texts(value: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        return [(path, value)] if "${" in value else []
    return [text for key, inner in _children(value) for text in _texts(inner, (*path, key))]
