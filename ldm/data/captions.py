"""A caption: from a file name and into one, and in tags."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

PICTURE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".jfif")
"""The file types that count as pictures, in lower case; any case is accepted."""


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
