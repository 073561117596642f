"""Type annotations as a contract for text: does a YAML value fit one, and what does a flag's text mean under one.

The signatures of the classes that a config names are the only schema there is. These functions read
them: :func:`fits` checks a value that YAML gave, :func:`parse_text` reads a word from the command
line, and :func:`describe` says in plain words what is expected.
"""

from __future__ import annotations

import collections.abc
import contextlib
import enum
import inspect
import os
import types
import typing
from typing import Any, Final, Literal, Union

import yaml

TRUE_WORDS: Final = ("true", "yes", "on", "y", "t", "1")
FALSE_WORDS: Final = ("false", "no", "off", "n", "f", "0")
NULL_WORDS: Final = ("null", "none", "~")


def parse_boolean(text: str) -> bool:
    """Read a yes or no from the command line.

    Args:
        text: one of ``TRUE_WORDS`` or ``FALSE_WORDS``, in any case.

    Returns:
        The boolean.

    Raises:
        ValueError: the text is neither.
    """
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError(f"expected true or false, got {text!r}")


def fits(value: object, annotation: object) -> bool:
    """Tell whether a value as YAML gives it is right for an annotated parameter.

    A whole number is right where a float is wanted; a boolean is no number; text is right where a
    path is wanted; a mapping is right where an object is wanted, since it may be the config of one.
    What the annotation leaves open is right.

    Args:
        value: null, boolean, int, float, str, list or dict.
        annotation: the parameter's annotation, resolved (no strings); unresolved ones accept all.

    Returns:
        Whether the value fits.
    """
    annotation = _unwrapped(annotation)
    if annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, (str, typing.TypeVar)):
        return True
    if annotation is None or annotation is type(None):
        return value is None
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in arguments)
    if origin is Literal:
        return any(value == member and type(value) is type(member) for member in arguments)
    kind: Any = origin if origin is not None else annotation
    if not isinstance(kind, type) or kind in (collections.abc.Callable, type):
        return True
    if issubclass(kind, enum.Enum):
        return value in [member.name for member in kind] + [member.value for member in kind]
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is str or issubclass(kind, os.PathLike):
        return isinstance(value, str)
    if issubclass(kind, collections.abc.Mapping):
        if not isinstance(value, dict):
            return False
        return len(arguments) != 2 or all(fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items())
    if issubclass(kind, collections.abc.Iterable) and kind.__module__ in ("builtins", "collections.abc"):
        return isinstance(value, list) and _elements_fit(value, kind, arguments)
    return isinstance(value, (kind, dict))


def parse_text(text: str, annotation: object) -> Any:
    """Read one word from the command line as the type that an annotation asks for.

    Of a union's members the narrowest that the text fits is taken, text itself last: ``2`` is a
    number and ``0,1`` a list for ``int | str | list[int]``.

    Args:
        text: what the user typed.
        annotation: the parameter's annotation, resolved.

    Returns:
        The value.

    Raises:
        ValueError: the text fits no member; says what is expected.
    """
    for candidate in _readings(text, annotation):
        if fits(candidate, annotation):
            return candidate
    raise ValueError(f"expected {describe(annotation)}, got {text!r}")


def accepts_boolean(annotation: object) -> bool:
    """Tell whether a parameter takes a boolean, so that a bare flag can mean yes.

    Args:
        annotation: the parameter's annotation, resolved.

    Returns:
        Whether ``True`` is among its values by name (an open annotation is not).
    """
    return bool in [_unwrapped(member) for member in _members(annotation)]


def describe(annotation: object) -> str:
    """Say in plain words what values an annotation allows.

    Args:
        annotation: the parameter's annotation, resolved.

    Returns:
        Such as ``"a whole number or null"``.
    """
    words: list[str] = []
    foreign: list[str] = []
    choices: list[str] = []
    for member in _members(annotation):
        if typing.get_origin(member) is Literal:
            choices.extend(str(choice) for choice in typing.get_args(member))
            continue
        word = _describe_one(member)
        (words if word is not None else foreign).append(word or f"a {getattr(member, '__name__', str(member))} object")
    if choices:
        words.insert(0, "one of " + ", ".join(dict.fromkeys(choices)))
    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")
    if "null" in words:
        words.remove("null")
        words.append("null")
    words = words or foreign
    return " or ".join(dict.fromkeys(words)) or "a value"


def describe_value(value: object) -> str:
    """Show a value with its kind, as an error line names what was found.

    Args:
        value: what YAML gave.

    Returns:
        Such as ``"'flase' (text)"``.
    """
    if value is None:
        return "nothing (null)"
    kinds = {bool: "true/false", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}
    shown = repr(value) if not isinstance(value, bool) else str(value).lower()
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return f"{shown} ({kinds.get(type(value), type(value).__name__)})"


def _unwrapped(annotation: object) -> Any:
    """Strip ``Annotated[...]`` and ``NewType`` from an annotation."""
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        else:
            return annotation


def _members(annotation: object) -> list[Any]:
    """List the alternatives of an annotation: those of a union, or the annotation alone."""
    annotation = _unwrapped(annotation)
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in _members(member)]
    return [annotation]


def _elements_fit(values: list[Any], kind: type, arguments: tuple[Any, ...]) -> bool:
    """Check a list's elements against the arguments of ``list[...]``, ``tuple[...]`` and their like."""
    if not arguments:
        return True
    if kind is tuple and arguments[-1] is not Ellipsis:
        return len(values) == len(arguments) and all(map(fits, values, arguments))
    return all(fits(value, arguments[0]) for value in values)


def _readings(text: str, annotation: object) -> list[Any]:
    """List what a word may mean, narrowest first."""
    members = _members(annotation)
    readings: list[Any] = [
        choice for member in members if typing.get_origin(member) is Literal for choice in typing.get_args(member)
    ]
    readings = [choice for choice in readings if str(choice) == text]
    if text.strip().lower() in NULL_WORDS:
        readings.append(None)
    for number in (int, float):
        try:
            readings.append(number(text))
        except ValueError:
            continue
    with contextlib.suppress(ValueError):
        readings.append(parse_boolean(text))
    if any(issubclass(_kind(member), (list, tuple)) for member in members):
        with contextlib.suppress(ValueError):
            readings.append([int(part) for part in text.strip("[] ").split(",") if part.strip()])
    if text.lstrip().startswith(("{", "[")):
        with contextlib.suppress(yaml.YAMLError):
            readings.append(yaml.safe_load(text))
    return [*readings, text]


def _kind(annotation: object) -> type:
    """Give the class behind an annotation, ``object`` where there is none."""
    kind = typing.get_origin(annotation) or annotation
    return kind if isinstance(kind, type) else object


def _describe_one(annotation: object) -> str | None:
    """Describe one alternative, or give None for a class that neither YAML nor a flag can write."""
    annotation = _unwrapped(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if annotation in (Any, object, inspect.Parameter.empty):
        return "any value"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    kind = _kind(annotation)
    if kind in plain:
        return plain[kind]
    if issubclass(kind, enum.Enum):
        return "one of " + ", ".join(member.name for member in kind)
    if issubclass(kind, os.PathLike):
        return "a path"
    if issubclass(kind, collections.abc.Mapping):
        return "a mapping (key: value)"
    if issubclass(kind, collections.abc.Iterable) and kind.__module__ in ("builtins", "collections.abc"):
        return _describe_list(kind, typing.get_args(annotation))
    return None


def _describe_list(kind: type, arguments: tuple[Any, ...]) -> str:
    """Describe a list annotation with its elements."""
    plural = {int: "whole numbers", float: "numbers", str: "texts", bool: "true/false values"}
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} {plural.get(arguments[0], 'values')}"
    return f"a list of {plural.get(arguments[0], 'values')}" if arguments else "a list"
