"""Finds the pictures of a data set: one folder with a single layer of subfolders."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from ldm.data.captions import caption_from_file_name, is_picture_name

SYSTEM_FILES: Final = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
"""What file managers leave behind, in lower case, beside the hidden files (those that begin with a dot)."""

NAMED_PER_PROBLEM: Final = 20
"""How many files of one problem an error names, before it gives the number of the others."""


@dataclass(frozen=True)
class Picture:
    """One captioned picture of a data set.

    Attributes:
        path: where the file lies, beginning with the data root as it was given.
        relative_path: the same below the data root, ``folder/file name`` with a forward slash and in
            Unicode's composed form, so that it is the same text on every machine.
        folder: the name of its subfolder.
        caption: from the file name; may be empty.
    """

    path: str
    relative_path: str
    folder: str
    caption: str


@dataclass
class Scan:
    """What lies below a data root.

    Attributes:
        pictures: sorted by folder and file name, whatever order the file system lists them in.
        folder_counts: pictures in each subfolder, sorted by name; 0 where a folder holds none.
        left_out: paths below the data root of files that are no pictures, sorted.
        hidden: the same for hidden files and folders and for what file managers leave behind.
        problems: what has to be put right before the folder can be trained on, a line each.
    """

    pictures: list[Picture] = field(default_factory=list)
    folder_counts: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def scan_data_root(data_root: str) -> Scan:
    """Read the file names of one layer of subfolders; no file is opened.

    Args:
        data_root: folder that holds subfolders of pictures, and nothing else. Subfolders and files may be
            symbolic links.

    Returns:
        What was found, with its problems: a picture in the root or deeper than one layer, a folder that
        cannot be read, or no picture at all.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
    """
    if not data_root or not os.path.lexists(data_root):
        raise FileNotFoundError(
            f"data_root {data_root!r} does not exist (looked in {os.getcwd()}); "
            "give --data_root the folder that holds your subfolders of pictures"
        )
    if not os.path.isdir(data_root):
        raise NotADirectoryError(
            f"data_root {data_root!r} is a file; give --data_root the folder that holds your subfolders of pictures"
        )
    scan = Scan()
    in_root: list[str] = []
    unprintable: list[str] = []
    too_deep: list[str] = []
    folders: list[str] = []
    for entry in _sorted_entries(data_root, scan):
        if not _is_text(entry.name):
            unprintable.append(entry.path)
        elif _is_hidden(entry.name):
            scan.hidden.append(entry.name)
        elif entry.is_dir():
            folders.append(entry.name)
        elif is_picture_name(entry.name):
            in_root.append(entry.name)
        else:
            scan.left_out.append(entry.name)

    for folder in folders:
        before = len(scan.pictures)
        for entry in _sorted_entries(os.path.join(data_root, folder), scan):
            relative_path = f"{folder}/{entry.name}"
            if not _is_text(entry.name):
                unprintable.append(entry.path)
            elif _is_hidden(entry.name):
                scan.hidden.append(relative_path)
            elif entry.is_dir():
                too_deep += _pictures_below(entry.path, relative_path, scan)
            elif is_picture_name(entry.name):
                scan.pictures.append(
                    Picture(
                        path=entry.path,
                        relative_path=unicodedata.normalize("NFC", relative_path),
                        folder=folder,
                        caption=caption_from_file_name(entry.name),
                    )
                )
            else:
                scan.left_out.append(relative_path)
        scan.folder_counts[folder] = len(scan.pictures) - before

    scan.left_out.sort()
    scan.hidden.sort()
    scan.problems += _name_some(
        unprintable,
        lambda path: f"{os.fsencode(path).decode('utf-8', 'backslashreplace')}: the name is not UTF-8 text; rename it",
    )
    scan.problems += _name_some(
        in_root, lambda name: f"{os.path.join(data_root, name)}: lies in the data root; move it into a subfolder of it"
    )
    scan.problems += _name_some(
        too_deep,
        lambda name: (
            f"{os.path.join(data_root, *name.split('/'))}: lies deeper than one layer of subfolders; "
            f"move it up into {os.path.join(data_root, name.split('/')[0])}"
        ),
    )
    if not scan.pictures and not scan.problems:
        scan.problems.append(
            f"{data_root}: holds no pictures; put .jpg, .jpeg, .png, .webp, .bmp or .jfif files into a subfolder of it"
        )
    return scan


def _is_text(name: str) -> bool:
    """Tell whether a name can be written down; Python marks bytes that are no UTF-8 with lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES or name == "__MACOSX"


def _sorted_entries(folder: str, scan: Scan) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: (unicodedata.normalize("NFC", entry.name), entry.name))
    except OSError as error:
        scan.problems.append(f"{folder}: cannot be read ({error.strerror}); check its permissions")
        return []


def _pictures_below(folder: str, relative_path: str, scan: Scan) -> list[str]:
    """List the pictures in and below a folder that lies too deep; its other files are left out."""
    pictures: list[str] = []
    seen: set[str] = set()  # real paths: symbolic links may form a circle
    for file_path in _files_below(folder, relative_path, seen, scan):
        if is_picture_name(file_path):
            pictures.append(file_path)
        else:
            scan.left_out.append(file_path)
    return pictures


def _files_below(folder: str, relative_path: str, seen: set[str], scan: Scan) -> Iterator[str]:
    real_path = os.path.realpath(folder)
    if real_path in seen:
        return
    seen.add(real_path)
    for entry in _sorted_entries(folder, scan):
        entry_path = f"{relative_path}/{entry.name}"
        if _is_hidden(entry.name):
            scan.hidden.append(entry_path)
        elif entry.is_dir():
            yield from _files_below(entry.path, entry_path, seen, scan)
        else:
            yield entry_path


def _name_some(names: list[str], line: Callable[[str], str]) -> list[str]:
    lines = [line(name) for name in names[:NAMED_PER_PROBLEM]]
    if len(names) > NAMED_PER_PROBLEM:
        lines.append(f"... and {len(names) - NAMED_PER_PROBLEM} more like the last one")
    return lines
