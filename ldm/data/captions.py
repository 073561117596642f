"""A picture's caption, from its file name."""

from __future__ import annotations

import os
import unicodedata
from typing import Final

PICTURE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".jfif")
"""The file types that count as pictures, in lower case; any case is accepted."""


def is_picture_name(file_name: str) -> bool:
    """Say whether a file name ends like a picture's, in any case."""
    return os.path.splitext(file_name)[1].lower() in PICTURE_SUFFIXES


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
    stem = os.path.splitext(file_name)[0] if is_picture_name(file_name) else file_name
    return unicodedata.normalize("NFC", stem.split("_", 1)[0]).strip()
