"""Reads captions that lie beside the pictures: in a file for each picture, or in a list for a folder."""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from dataclasses import dataclass
from typing import Final

SIDECAR_SUFFIXES: Final = (".txt", ".caption")
"""What files with one picture's caption end in, in any case; the first that exists counts."""

CAPTION_LISTS: Final = ("captions.jsonl", "metadata.jsonl")
"""Names, in any case, of the files that list a folder's captions, one JSON object a line."""

MAX_BYTES: Final = 2**20
"""The longest sidecar, and the longest line of a list: a mistaken file must not fill the memory."""

_READ_FLAGS: Final = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
"""Windows alone knows text mode, and the others alone know pipes, whose opening waits for a writer without this."""

UTF_16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class ListedCaption:
    """One line of a folder's caption list.

    Attributes:
        file_name: the picture it is about, in Unicode's composed form.
        text: the caption.
        path: the list.
        line: its line in the list, from 1.
    """

    file_name: str
    text: str
    path: str
    line: int


def tidy_caption(text: str) -> str:
    r"""Make one line of a caption as it was written down.

    Args:
        text: the caption, of any number of lines.

    Returns:
        The lines without the white space at their ends, joined by a space (which is what the tokenizer makes of a
        line's end too), without the empty ones, in Unicode's composed form: ``"a cat\r\non a mat\n"`` gives
        ``"a cat on a mat"``.
    """
    lines = (line.strip() for line in text.replace("\r", "\n").split("\n"))
    return unicodedata.normalize("NFC", " ".join(line for line in lines if line))


def read_text(path: str, limit: int = MAX_BYTES) -> str:
    """Read a small file of UTF-8 text, with or without a byte order mark.

    Args:
        path: the file.
        limit: its largest size in bytes.

    Returns:
        Its content.

    Raises:
        ValueError: it is too long, no text, or in another encoding; one line that begins with the path.
        OSError: it cannot be read.
    """
    # The plain calls take half the time of open(), which counts where a million pictures have a caption each.
    file = os.open(path, _READ_FLAGS)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: cannot be read (it is no file); remove it or put a text file there")
        if status.st_size > limit:
            raise ValueError(f"{path}: is longer than {limit:,} bytes; shorten it or give it another ending")
        content = os.read(file, status.st_size)
    finally:
        os.close(file)
    if len(content) < status.st_size:
        raise ValueError(f"{path}: was cut short while it was read; try again")
    return _decode(content, path)


def _decode(content: bytes, where: str) -> str:
    if content.startswith(UTF_16_MARKS):
        raise ValueError(f"{where}: is UTF-16 text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: is no UTF-8 text (byte 0x{content[error.start]:02x} at {error.start}); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(f"{where}: holds null bytes, so it is no UTF-8 text; save it as UTF-8")
    return text


def read_sidecar(path: str) -> str:
    """Read the caption in a picture's own file.

    Args:
        path: a ``.txt`` or ``.caption`` file.

    Returns:
        Its text as :func:`tidy_caption` makes it; may be empty.

    Raises:
        ValueError: it cannot be read or is no UTF-8 text; one line that begins with the path.
    """
    try:
        return tidy_caption(read_text(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from error


def read_caption_list(path: str) -> tuple[list[ListedCaption], list[str]]:
    """Read a folder's list of captions: a JSON object with ``file_name`` and ``text`` a line.

    Further fields and empty lines are passed over.

    Args:
        path: the ``.jsonl`` file.

    Returns:
        The entries of all sound lines, and a line for each that is broken, with the path and the line's number.
    """
    entries: list[ListedCaption] = []
    problems: list[str] = []
    if not os.path.isfile(path):
        return entries, [f"{path}: cannot be read (it is no file); remove it or put a list of captions there"]
    try:
        with open(path, "rb") as file:
            line = 0
            while content := file.readline(MAX_BYTES + 1):
                line += 1
                where = f"{path}: line {line}"
                if line == 1 and content.startswith(UTF_16_MARKS):
                    problems.append(f"{path}: is UTF-16 text; save it as UTF-8")
                    break
                if len(content) > MAX_BYTES:
                    problems.append(f"{where}: is longer than {MAX_BYTES:,} bytes; write one picture's object a line")
                    break
                if not content.strip():
                    continue
                try:
                    entries.append(_parse_entry(content, path, line))
                except ValueError as error:
                    problems.append(str(error))
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); repair or remove it")
    return entries, problems


def _parse_entry(content: bytes, path: str, line: int) -> ListedCaption:
    where = f"{path}: line {line}"
    text = _decode(content, where)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is no JSON ({error.msg} at character {error.pos + 1}); correct it") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{where}: is no JSON that can be read; correct it") from None
    example = '{"file_name": "1.jpg", "text": "a photo of a cat"}'
    if not isinstance(record, dict):
        raise ValueError(f"{where}: is no JSON object; write one such as {example}")
    for key in ("file_name", "text"):
        if key not in record:
            raise ValueError(f"{where}: lacks {key!r}; write an object such as {example}")
        if not isinstance(record[key], str):
            raise ValueError(f"{where}: {key!r} is {json.dumps(record[key])[:40]}, no text; put it between quotes")
        if not is_sound(record[key]):
            raise ValueError(f"{where}: {key!r} holds half a character (a lone surrogate) or a null; correct it")
    file_name = unicodedata.normalize("NFC", record["file_name"].removeprefix("./"))
    if not file_name:
        raise ValueError(f"{where}: 'file_name' is empty; name the picture")
    if "/" in file_name or "\\" in file_name or file_name in (".", ".."):
        raise ValueError(
            f"{where}: 'file_name' {record['file_name']!r} leads out of its folder; a list is about the pictures "
            "beside it, so put each folder's captions into its own list"
        )
    return ListedCaption(file_name, tidy_caption(record["text"]), path, line)


def is_sound(text: str) -> bool:
    """Tell whether a text is one that a text encoder takes: without nulls and halves of characters."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text))
