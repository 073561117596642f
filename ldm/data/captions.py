"""A caption: from a file name and into one, and in tags."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

PICTURE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".jfif")
"""The file types that count as pictures, in lower case; any case is accepted."""

MAX_NAME: Final = 255
"""The longest file name that every file system takes: in UTF-8 bytes (Linux) and in UTF-16 units (Windows, macOS)."""

FORBIDDEN_CHARACTERS: Final = frozenset('<>:"/\\|?*')
"""What Windows allows in no file name, beside control characters."""

DEVICE_NAMES: Final = frozenset(
    ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"]
    + [f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789\u00b9\u00b2\u00b3"]
)
"""What Windows takes for a device, whatever ending follows."""


def picture_stem(file_name: str) -> str | None:
    """Take a picture's suffix, of any case, off its file name.

    Args:
        file_name: the file's name, without its folder.

    Returns:
        What precedes the suffix; None where the name is no picture's.
    """
    stem, _, suffix = file_name.rpartition(".")
    # Dots alone in front make a hidden file without a suffix.
    return stem if f".{suffix.lower()}" in PICTURE_SUFFIXES and stem.strip(".") else None


def is_picture_name(file_name: str) -> bool:
    """Say whether a file name ends like a picture's, in any case."""
    return picture_stem(file_name) is not None


def caption_from_file_name(file_name: str) -> str:
    """Read the caption out of a picture's file name.

    The caption is the name without its picture suffix, up to the first underscore, without the spaces at
    its ends: ``"a cat on a mat_(2).png"`` gives ``"a cat on a mat"``. What follows the underscore only
    keeps file names apart.

    Args:
        file_name: the file's name, without its folder.

    Returns:
        The caption in Unicode's composed form (macOS stores names decomposed, which would tokenise
        differently); empty where nothing precedes the first underscore.
    """
    stem = picture_stem(file_name)
    return unicodedata.normalize("NFC", (file_name if stem is None else stem).partition("_")[0]).strip()


def file_name_from_caption(caption: str, suffix: str, tail: str = "") -> str:
    """Write a caption as a picture's file name that every common file system can hold.

    Args:
        caption: the caption.
        suffix: the picture's, such as ``".jpg"``.
        tail: what keeps pictures of one caption apart, such as ``"_(2)"``; begins with an underscore or is empty.
            Where it is empty and the bare caption is no name (an empty one, or a device such as ``con``), it becomes
            ``"_(1)"``.

    Returns:
        A name from which :func:`caption_from_file_name` reads exactly this caption.

    Raises:
        ValueError: no file name can hold it; says why, in one line.
    """
    if "_" in caption:
        raise ValueError("it holds an underscore, which would end it")
    if not tail and (not caption or _is_device(caption)):
        tail = "_(1)"
    name = f"{caption}{tail}{suffix}"
    bad = sorted(FORBIDDEN_CHARACTERS.intersection(name))
    if bad:
        raise ValueError(f"it holds {' '.join(bad)}, which Windows allows in no file name")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise ValueError("it holds a line break or another control character")
    if caption.startswith("."):
        raise ValueError("it begins with a dot, which would hide the file")
    if _is_device(name):
        raise ValueError(f"Windows takes {name.partition('.')[0]} for a device")
    longest = max(len(name.encode("utf-8")), len(name.encode("utf-16-le")) // 2)
    if longest > MAX_NAME:
        raise ValueError(f"the name would be {longest} bytes long, and {MAX_NAME} is the most")
    if caption_from_file_name(name) != caption:
        raise ValueError("it begins or ends with a space, or its accents are not composed")
    return name


def _is_device(name: str) -> bool:
    return name.partition(".")[0].rstrip(" ").upper() in DEVICE_NAMES


def shuffled_tags(caption: str, keep_tags: int, generator: torch.Generator) -> str:
    """Put the tags of a caption into a random order, all orders alike.

    Args:
        caption: tags between commas; a caption without a comma comes back as it is.
        keep_tags: how many of the first tags stay where they are, at least 0.
        generator: where the order is drawn from.

    Returns:
        The same tags, without the spaces at their ends, joined by ``", "``; empty ones are left out.

    Raises:
        ValueError: ``keep_tags`` is below 0.
    """
    if keep_tags < 0:
        raise ValueError(f"keep_tags {keep_tags} is not allowed; give a number of tags from 0 up")
    if "," not in caption:
        return caption
    import torch  # here, so that what only reads captions starts at once

    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    kept, moved = tags[:keep_tags], tags[keep_tags:]
    order = torch.randperm(len(moved), generator=generator).tolist()
    return ", ".join(kept + [moved[position] for position in order])
