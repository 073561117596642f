"""What one folder of pictures asks for: how often it is shown, and its own augmentation and weight."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import yaml

from ldm.data.sidecars import read_text

SETTINGS_FILE: Final = "folder.yaml"
MULTIPLY_FILE: Final = "multiply.txt"

MAX_MULTIPLY: Final = 10_000
"""More showings an epoch than anyone means; a slip of the keyboard is told instead of trained on."""

MAX_BYTES: Final = 2**16

_NUMBER: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{0,18})?|\.[0-9]{1,18}|[0-9]{1,9} ?/ ?[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """How the pictures of one folder are trained on.

    Attributes:
        multiply: showings of each picture for one of a picture without settings; exact, so that 1/2 is every second
            epoch; 0 leaves the folder out.
        flip_p: probability in [0, 1] that a picture is mirrored; None: the data set's.
        conditional_dropout: probability in [0, 1] that a caption is replaced by the empty prompt; None: the data set's.
        loss_weight: factor of the pictures' loss, above 0.
    """

    multiply: Fraction = Fraction(1)
    flip_p: float | None = None
    conditional_dropout: float | None = None
    loss_weight: float = 1.0


KEYS: Final = tuple(FolderSettings.__dataclass_fields__)


def parse_number(text: str) -> Fraction:
    """Read a number that is not negative, exactly as it is written.

    Args:
        text: a decimal such as ``2``, ``0.5`` or ``.5``, or a fraction such as ``1/3``.

    Returns:
        The number: ``"0.1"`` is a tenth, not the binary number next to it.

    Raises:
        ValueError: it is none.
    """
    if not _NUMBER.fullmatch(text):
        hint = "; write the decimals behind a point" if re.fullmatch(r"[0-9]+,[0-9]+", text) else ""
        raise ValueError(f"{text[:40]!r} is no number from 0 up, such as 2, 0.5 or 1/3{hint}")
    numerator, _, denominator = text.replace(" ", "").partition("/")
    if denominator and not int(denominator):
        raise ValueError(f"{text!r} divides by zero")
    return Fraction(numerator.removesuffix(".")) / Fraction(denominator or "1")


def read_folder_settings(settings_path: str | None, multiply_path: str | None) -> tuple[FolderSettings, list[str]]:
    """Read what a folder's two settings files say.

    Args:
        settings_path: its ``folder.yaml``: a mapping of ``multiply``, ``flip_p``, ``conditional_dropout`` and
            ``loss_weight``, each of which may be left out; None where there is none.
        multiply_path: its ``multiply.txt``, which holds one number; None where there is none.

    Returns:
        The settings, and a line for each problem, beginning with the file's path. What has a problem keeps its
        default.
    """
    values: dict[str, Fraction] = {}
    problems: list[str] = []
    if settings_path is not None:
        values, problems = _read_settings_file(settings_path)
    if multiply_path is not None:
        multiply = _read_multiply_file(multiply_path, problems)
        if multiply is not None and values.setdefault("multiply", multiply) != multiply:
            problems.append(
                f"{multiply_path}: says {multiply}, but {settings_path} says {values['multiply']}; remove one of them"
            )
    return _to_settings(values), problems


def _to_settings(values: Mapping[str, Fraction]) -> FolderSettings:
    numbers = {key: float(value) for key, value in values.items() if key != "multiply"}
    return FolderSettings(
        multiply=values.get("multiply", Fraction(1)),
        flip_p=numbers.get("flip_p"),
        conditional_dropout=numbers.get("conditional_dropout"),
        loss_weight=numbers.get("loss_weight", 1.0),
    )


def _parse_setting(key: str, text: str) -> Fraction:
    """Read one setting's number and make sure that it is in its range."""
    try:
        value = parse_number(text)
    except ValueError as error:
        raise ValueError(f"{key} {error}" if text else f"{key} is empty; write a number such as 0.5") from None
    if key == "multiply" and value > MAX_MULTIPLY:
        raise ValueError(f"multiply {text} is not allowed; give a number from 0 (leaves the folder out) to 10000")
    if key in ("flip_p", "conditional_dropout") and value > 1:
        raise ValueError(f"{key} {text} is not allowed; give a probability from 0 to 1")
    if key == "loss_weight" and not value:
        raise ValueError(f"loss_weight {text} is not allowed; give a number above 0 (multiply: 0 leaves a folder out)")
    return value


def _read_multiply_file(path: str, problems: list[str]) -> Fraction | None:
    try:
        text = _read(path).strip()
    except ValueError as error:
        problems.append(str(error))
        return None
    try:
        return _parse_setting("multiply", text)
    except ValueError as error:
        problems.append(f"{path}: {error}")
        return None


def _read_settings_file(path: str) -> tuple[dict[str, Fraction], list[str]]:
    """Read a ``folder.yaml``.

    The YAML is taken apart, never built: no tag can make an object, no alias can grow, a key that stands there twice
    is seen, and numbers are as exact as they are written.
    """
    values: dict[str, Fraction] = {}
    problems: list[str] = []
    try:
        root = yaml.compose(_read(path), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        return values, [f"{path}: {line}is no YAML ({error.problem}); write lines such as 'flip_p: 0.5'"]
    except (yaml.YAMLError, RecursionError):
        return values, [f"{path}: is no YAML; write lines such as 'flip_p: 0.5'"]
    except ValueError as error:
        return values, [str(error)]
    if root is None or root.tag == "tag:yaml.org,2002:null":  # nothing, or a line of --- alone
        return values, problems
    if not isinstance(root, yaml.MappingNode):
        return values, [f"{path}: is no mapping; write lines such as 'flip_p: 0.5'"]
    seen: set[str] = set()
    for key_node, value_node in root.value:
        where = f"{path}: line {key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        if key not in KEYS:
            match = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {match[0]!r}?" if match else f"a folder can have {', '.join(KEYS)}"
            problems.append(f"{where}: {key!r} is no setting of a folder; {hint}")
        elif key in seen:
            problems.append(f"{where}: {key} stands there twice; remove one of them")
        elif not isinstance(value_node, yaml.ScalarNode):
            problems.append(f"{where}: {key} is no number; write one such as 0.5")
        else:
            try:
                values[key] = _parse_setting(key, value_node.value.strip())
            except ValueError as error:
                problems.append(f"{where}: {error}")
        seen.add(key)
    return values, problems


def _read(path: str) -> str:
    try:
        return read_text(path, MAX_BYTES)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from error
