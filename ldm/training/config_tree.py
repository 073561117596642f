"""A config as plain nested dictionaries that remember where each value came from.

OmegaConf reads and resolves the YAML; the origins, which it does not keep, are kept here, so that an
error can name file and line and ``--print_config`` can say who set what.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.training.yaml_limits import DEEPEST, MOST_BYTES, check_nodes

_ABSENT: Final = object()


@dataclass
class ConfigTree:
    """Nested plain values and, for each dotted key path in them, where it was set.

    Attributes:
        tree: the values: dicts, lists and scalars.
        sources: dotted key path, of leaves and of mappings, to a short text such as ``a.yaml:12``.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, default: Any = None) -> Any:
        """Look up a dotted key path.

        Args:
            path: such as ``data.params.batch_size``.
            default: what to give where the path, or a mapping on its way, is not there.

        Returns:
            The value.
        """
        node: Any = self.tree
        for key in path.split("."):
            if not isinstance(node, dict) or key not in node:
                return default
            node = node[key]
        return node

    def has(self, path: str) -> bool:
        """Tell whether a dotted key path is there, whatever its value.

        Args:
            path: the key path.

        Returns:
            Whether it is there.
        """
        return self.get(path, _ABSENT) is not _ABSENT

    def set(self, path: str, value: Any, source: str) -> None:
        """Set a value, making the mappings on its way.

        Args:
            path: the key path.
            value: scalar, list or dict.
            source: where it came from.
        """
        *parents, last = path.split(".")
        node = self.tree
        for depth, key in enumerate(parents):
            if not isinstance(node.get(key), dict):
                node[key] = {}
                self.sources.setdefault(".".join(parents[: depth + 1]), source)
            node = node[key]
        node[last] = value
        self._forget(path)
        self.sources[path] = source
        if isinstance(value, dict):
            self.sources.update({f"{path}.{inner}": source for inner, _ in nodes(value)})

    def pop(self, path: str) -> Any:
        """Take a value out.

        Args:
            path: a key path that is there.

        Returns:
            What stood there.
        """
        *parents, last = path.split(".")
        node: Any = self.get(".".join(parents)) if parents else self.tree
        self._forget(path)
        return node.pop(last)

    def source(self, path: str) -> str:
        """Say where a key path was set; for one that is missing, where its nearest parent was.

        Args:
            path: the key path.

        Returns:
            The source, or ``"config"`` where nothing on the way is known.
        """
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            found = self.sources.get(".".join(parts[:length]))
            if found is not None:
                return found
        return "config"

    def matching(self, pattern: str) -> list[str]:
        """Find the key paths that a pattern names.

        Args:
            pattern: a dotted key path in which ``*`` stands for any one key.

        Returns:
            The paths that are there, in the order of the config; keys that are numbers or hold dots,
            which a dotted path cannot name, are passed over.
        """
        found: list[tuple[list[str], Any]] = [([], self.tree)]
        for wanted in pattern.split("."):
            found = [
                ([*path, str(key)], child)
                for path, node in found
                if isinstance(node, dict)
                for key, child in node.items()
                if wanted in ("*", key) and isinstance(key, str) and "." not in key
            ]
        return [".".join(path) for path, _ in found]

    def merge(self, other: ConfigTree) -> None:
        """Lay another config on top of this one: mappings merge, everything else replaces.

        Args:
            other: the config that wins.
        """
        self._merge_mapping(self.tree, other.tree, "")
        self.sources.update(other.sources)

    def _merge_mapping(self, below: dict[str, Any], above: dict[str, Any], prefix: str) -> None:
        for key, value in above.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict) and isinstance(below.get(key), dict):
                self._merge_mapping(below[key], value, f"{path}.")
                continue
            self._forget(path)
            below[key] = _copied(value)

    def _forget(self, path: str) -> None:
        """Drop the sources of a path and of all below it."""
        for known in [known for known in self.sources if known == path or known.startswith(f"{path}.")]:
            del self.sources[known]


def nodes(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk all keys of nested mappings, parents before children; lists count as leaves.

    Args:
        tree: nested dicts.
        prefix: put before each path.

    Yields:
        Dotted key path and value.
    """
    for key, value in tree.items():
        path = f"{prefix}{key}"
        yield path, value
        if isinstance(value, dict):
            yield from nodes(value, f"{path}.")


def leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Walk the values of nested mappings; lists and empty mappings count as values.

    Args:
        tree: nested dicts.

    Yields:
        Dotted key path and value.
    """
    for path, value in nodes(tree):
        if not isinstance(value, dict) or not value:
            yield path, value


def nearest(word: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """Find the known word that a mistyped one most likely means.

    Args:
        word: what was typed.
        known: the words that exist.
        cutoff: similarity in [0, 1] below which nothing is proposed.

    Returns:
        The nearest word, or None.
    """
    found = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return found[0] if found else None


def usable_path(path: str) -> str:
    r"""Read a path typed with back slashes on a machine whose paths have none.

    Args:
        path: as typed, such as ``training_samples\MyProject``.

    Returns:
        The path with slashes where only that exists or back slashes mean nothing here, else as it was.
    """
    if os.sep == "/" and "\\" in path and not os.path.exists(path):
        return path.replace("\\", "/")
    return path


def read_yaml(path: str) -> ConfigTree:
    """Read one YAML file with the line of each key.

    Args:
        path: the file.

    Returns:
        Its values, interpolations unresolved, and sources of the form ``file:line``.

    Raises:
        ValueError: the file is missing, unreadable, no YAML, or no mapping; one line with file and
            line number.
    """
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise ValueError(f"{path}: the file is empty; a config needs keys such as model: and data:")
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}:1: expected keys such as model: and data: at the top, found something else")
        check_nodes(root, path)
        values: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ValueError(f"{where}: not valid YAML: {_yaml_reason(error)}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {_first_line(error)}") from None
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ValueError(f"{path}: {f'{key}: ' if key else ''}{_first_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested more than {DEEPEST} deep") from None
    sources: dict[str, str] = {}
    _collect_lines(root, "", path, sources, ())
    return ConfigTree(values, sources)


def _read_text(path: str) -> str:
    """Read a YAML file as text, or say in one line why not."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"{path}: is longer than {MOST_BYTES:,} bytes; is it a config?")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        hint = _file_hint(path)
        raise ValueError(f"{path}: no such config file{hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a YAML text file (byte {error.start} is not UTF-8)") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; --base takes YAML files") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def _file_hint(path: str) -> str:
    """Propose a YAML file beside the missing one, or one of the same name below configs/."""
    folder = Path(path).parent
    beside = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
    match = nearest(Path(path).name, beside)
    if match is not None:
        return f"; did you mean {(folder / match).as_posix()}?"
    shipped = {entry.name: entry.as_posix() for entry in Path("configs").rglob("*.y*ml")}
    match = nearest(Path(path).name, list(shipped))
    return f"; did you mean {shipped[match]}?" if match else ""


def _yaml_reason(error: yaml.MarkedYAMLError) -> str:
    """Say what a YAML parser found wrong, with the usual cause where there is one."""
    reason = " ".join(part for part in (error.problem, error.context) if part)
    if "\\t" in reason:
        reason += "; YAML indents with spaces, not with tabs"
    elif "python/" in reason:
        reason += "; a config holds plain values only"
    return reason


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _collect_lines(
    node: yaml.MappingNode, prefix: str, file: str, sources: dict[str, str], above: tuple[int, ...]
) -> None:
    """Note file and line of every key below a YAML mapping; merged-in mappings (``<<``) first, so that own keys win."""
    if id(node) in above:
        return
    above = (*above, id(node))
    for key, value in node.value:
        if key.value == "<<":
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for mapping in merged:
                if isinstance(mapping, yaml.MappingNode):
                    _collect_lines(mapping, prefix, file, sources, above)
    for key, value in node.value:
        if key.value == "<<" or not isinstance(key, yaml.ScalarNode):
            continue
        path = f"{prefix}{key.value}"
        sources[path] = f"{file}:{key.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode):
            _collect_lines(value, f"{path}.", file, sources, above)


def _copied(value: Any) -> Any:
    """Copy nested plain values."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
