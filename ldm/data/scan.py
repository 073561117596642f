"""Finds the captioned pictures of a data set: a folder with a single layer of subfolders, or a deeper tree."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ldm.data.captions import caption_from_file_name, is_picture_name
from ldm.data.folder_settings import MULTIPLY_FILE, SETTINGS_FILE, FolderSettings, read_folder_settings
from ldm.data.sidecars import CAPTION_LISTS, SIDECAR_SUFFIXES, ListedCaption, read_caption_list, read_sidecar

SYSTEM_FILES: Final = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
"""What file managers leave behind, in lower case, beside the hidden files (those that begin with a dot)."""

NAMED_PER_PROBLEM: Final = 20
"""How many files of one problem an error names, before it gives the number of the others."""

MISNAMED_SETTINGS_FILE: Final = "folder.yml"

FOLDER_FILES: Final = frozenset({SETTINGS_FILE, MULTIPLY_FILE, *CAPTION_LISTS})
"""Files, by their names in lower case, that are about the folder they lie in."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One captioned picture of a data set.

    Attributes:
        path: where the file lies, beginning with the data root as it was given.
        relative_path: the same below the data root, ``folder/file name`` with a forward slash and in
            Unicode's composed form, so that it is the same text on every machine.
        folder: its folder's path below the data root, with forward slashes.
        caption: what the picture shows; may be empty.
        caption_source: where the caption stands: ``"txt"``, ``"caption"``, ``"jsonl"`` or ``"file name"``.
    """

    path: str
    relative_path: str
    folder: str
    caption: str
    caption_source: str


@dataclass
class Scan:
    """What lies below a data root.

    Attributes:
        pictures: sorted by folder and file name, whatever order the file system lists them in.
        folder_counts: pictures in each folder, sorted by name; 0 where a folder holds none or is left out.
        left_out: paths below the data root of files that nothing is made of, sorted.
        hidden: the same for hidden files and folders and for what file managers leave behind.
        problems: what has to be put right before the folder can be trained on, a line each.
        folder_settings: the settings of each folder of ``folder_counts``.
        switched_off: number of pictures of each folder that is left out because its ``multiply`` is 0.
        orphans: paths below the data root of captions without a picture, sorted; one in a list comes as
            ``man/captions.jsonl line 3: 1.jpg``.
        warnings: what may not be as it was meant, a line each.
    """

    pictures: list[Picture] = field(default_factory=list)
    folder_counts: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    folder_settings: dict[str, FolderSettings] = field(default_factory=dict)
    switched_off: dict[str, int] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def scan_data_root(data_root: str, recursive: bool = False, named: int | None = NAMED_PER_PROBLEM) -> Scan:
    """Find the pictures of a data root, their captions and the settings of their folders; no picture is opened.

    A picture's caption is what stands in its ``.txt`` file, else in its ``.caption`` file, else in the list
    ``captions.jsonl`` or ``metadata.jsonl`` of its folder, else it is the file name. A source that is there and broken
    is a problem, never passed over for the next.

    Args:
        data_root: folder that holds subfolders of pictures, and nothing else. Subfolders and files may be
            symbolic links. A folder that can be reached in several ways is read once, under its own name if that lies
            below the root.
        recursive: read the subfolders' subfolders too; otherwise pictures there are a problem.
        named: how many lines of one problem or warning are given before the others are only counted; None gives all.

    Returns:
        What was found, with its problems: a picture in the root or deeper than one layer, a folder, caption or setting
        that cannot be read, or no picture at all.

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
    return _Walk(data_root, recursive, named).scan()


@dataclass
class _Folder:
    """The files of one folder, by what they are for."""

    path: str
    name: str
    pictures: list[str] = field(default_factory=list)
    sidecars: tuple[dict[str, str], ...] = field(default_factory=lambda: tuple({} for _ in SIDECAR_SUFFIXES))
    lists: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)


class _Walk:
    """One walk through a data root, and what it gathers."""

    def __init__(self, data_root: str, recursive: bool, named: int | None) -> None:
        self.data_root = data_root
        self.recursive = recursive
        self.named = named
        self.result = Scan()
        self.unreadable: list[str] = []
        self.unprintable: list[str] = []
        self.in_root: list[str] = []
        self.lists_in_root: list[str] = []
        self.too_deep: list[str] = []
        self.broken: list[str] = []
        self.link_warnings: list[str] = []
        self.empty_sidecars: list[str] = []
        self.half_listed: list[str] = []
        self.idle_settings: list[str] = []
        self.pictures: dict[str, list[Picture]] = {}
        self.real_folders: dict[str, str] = {}
        """Real path of each folder that was read -> the path it was read under."""

    def scan(self) -> Scan:
        """Walk through all folders, the links to folders last, so that a folder below the root keeps its own name."""
        folders = [(self.data_root, "", os.path.realpath(self.data_root))]
        links: deque[tuple[str, str]] = deque()
        while folders or links:
            if folders:
                path, relative_path, real_path = folders.pop()
            else:
                path, relative_path = links.popleft()
                real_path = os.path.realpath(path)
            if not self.enter(path, real_path):
                continue
            own: list[tuple[str, str, str]] = []
            for entry, name in self.read_folder(path, relative_path):
                real_name = os.path.join(real_path, entry.name)
                if _is_link(entry, real_name):
                    links.append((entry.path, name))
                else:
                    own.append((entry.path, name, real_name))
            folders += reversed(own)
        return self.conclude()

    def enter(self, path: str, real_path: str) -> bool:
        """Note a folder as read; False where it has been already, under another name."""
        known = self.real_folders.get(real_path)
        if known is None:
            self.real_folders[real_path] = path
            return True
        above = os.path.join(os.path.realpath(os.path.dirname(path)), "")
        if above.startswith(os.path.join(real_path, "")):
            self.link_warnings.append(f"{path}: is a link in a circle, back to {known}; it is not followed")
        else:
            self.link_warnings.append(f"{path}: is the same folder as {known}; it is read once, under that name")
        return False

    def read_folder(self, path: str, relative_path: str) -> list[tuple[os.DirEntry[str], str]]:
        """Sort the files of a folder by what they are for, and give its subfolders with their paths below the root."""
        in_root = not relative_path
        too_deep = "/" in relative_path and not self.recursive
        folder = _Folder(path, relative_path)
        subfolders: list[tuple[os.DirEntry[str], str]] = []
        prefix = "" if in_root else f"{relative_path}/"
        for entry in self.sorted_entries(path):
            name = entry.name
            if not name.isascii() and not _is_text(name):
                self.unprintable.append(entry.path)
            elif _is_hidden(name):
                self.result.hidden.append(prefix + name)
            elif self.is_folder(entry):
                subfolders.append((entry, prefix + name))
            elif is_picture_name(name):
                if not self.is_readable(entry):
                    continue
                if in_root:
                    self.in_root.append(name)
                elif too_deep:
                    self.too_deep.append(prefix + name)
                else:
                    folder.pictures.append(name)
            elif in_root and name.lower() in FOLDER_FILES:
                self.lists_in_root.append(entry.path)
            elif in_root or too_deep or not self.assign(name, folder):
                self.result.left_out.append(prefix + name)
        # In a deep tree, folders that only hold folders are no part of the data set.
        if not in_root and not too_deep and (folder.pictures or not (self.recursive and subfolders)):
            self.read_pictures(folder)
        else:
            self.pass_over(folder)
        return subfolders

    def is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError as error:
            if error.errno == errno.ELOOP:
                self.link_warnings.append(f"{entry.path}: is a link to itself; it leads nowhere")
            else:
                self.unreadable.append(f"{entry.path}: cannot be read ({error.strerror}); check its permissions")
            return False

    def is_readable(self, entry: os.DirEntry[str]) -> bool:
        """Tell whether opening a file can neither block nor fail for what it is; else it is a problem."""
        try:
            # A link to nothing is left to whatever reads the pictures, like a file that is cut short.
            if entry.is_file() or not os.path.exists(entry.path):
                return True
            reason = "it is a pipe, a socket or a device"
        except OSError as error:
            reason = str(error.strerror)
        self.unreadable.append(f"{entry.path}: cannot be read ({reason}); remove it")
        return False

    def assign(self, name: str, folder: _Folder) -> bool:
        """Note what a file that is no picture is for; False where it is for nothing."""
        lower = name.lower()
        path = os.path.join(folder.path, name)
        if lower in (SETTINGS_FILE, MULTIPLY_FILE):
            if folder.settings.setdefault(lower, path) != path:
                self.broken.append(f"{path}: the folder has another {lower}; remove one of them")
            return True
        if lower == MISNAMED_SETTINGS_FILE:
            self.broken.append(f"{path}: has no effect under this name; rename it to {SETTINGS_FILE}")
            return True
        if lower in CAPTION_LISTS:
            folder.lists.append(path)
            return True
        for suffix, sidecars in zip(SIDECAR_SUFFIXES, folder.sidecars, strict=True):
            if lower.endswith(suffix):
                stem = _composed(name[: -len(suffix)])
                other = sidecars.setdefault(stem, name)
                if other != name:
                    self.broken.append(f"{path}: is for the same pictures as {other}; remove one of them")
                return True
        return False

    def pass_over(self, folder: _Folder) -> None:
        """Tell what lies in a folder of folders to no purpose."""
        self.idle_settings += folder.settings.values()
        self.note_orphans(folder, frozenset())
        for path in folder.lists:
            self.read_list(folder, path, frozenset())

    def read_pictures(self, folder: _Folder) -> None:
        """Read the settings and captions of a folder of pictures."""
        settings, problems = read_folder_settings(
            folder.settings.get(SETTINGS_FILE), folder.settings.get(MULTIPLY_FILE)
        )
        self.broken += problems
        self.result.folder_settings[folder.name] = settings
        self.pictures[folder.name] = []
        if not folder.pictures:
            self.pass_over(folder)
        elif not settings.multiply:
            self.result.switched_off[folder.name] = len(folder.pictures)
        else:
            self.pictures[folder.name] = self.caption(folder)

    def caption(self, folder: _Folder) -> list[Picture]:
        """Find the caption of each picture of a folder."""
        names = [_composed(name) for name in folder.pictures]
        if len(set(names)) < len(names):
            self.note_twins(folder, names)
        stems = [name.rpartition(".")[0] for name in names]
        self.note_orphans(folder, frozenset(stems))
        listed = self.read_lists(folder, frozenset(names))
        unlisted = 0
        with_sidecars = any(folder.sidecars)
        read: dict[str, tuple[str, str]] = {}  # pictures of one stem share a sidecar
        pictures = []
        path_prefix, name_prefix = os.path.join(folder.path, ""), _composed(f"{folder.name}/")
        for file_name, name, stem in zip(folder.pictures, names, stems, strict=True):
            found = (read.get(stem) or self.read_own(folder, stem)) if with_sidecars else None
            if found is not None:
                read[stem] = found
            elif name in listed:
                found = (listed[name].text, "jsonl")
            else:
                found = (caption_from_file_name(name), "file name")
                unlisted += 1
            pictures.append(Picture(path_prefix + file_name, name_prefix + name, folder.name, *found))
        if listed and unlisted:
            self.half_listed.append(
                f"{folder.path}: the list of captions there leaves out {unlisted} of {len(pictures)} pictures, whose "
                "file names are their captions"
            )
        return pictures

    def note_twins(self, folder: _Folder, names: Sequence[str]) -> None:
        """Tell of file names that differ only in how their accents are stored, as two machines may leave them."""
        first: dict[str, str] = {}
        for file_name, name in zip(folder.pictures, names, strict=True):
            if first.setdefault(name, file_name) != file_name:
                path = os.path.join(folder.path, file_name)
                self.broken.append(f"{path}: there are two files of this name (accents stored in two ways); rename one")

    def read_own(self, folder: _Folder, stem: str) -> tuple[str, str] | None:
        """Read the caption and its source from a picture's own sidecar; None where it has none."""
        for suffix, sidecars in zip(SIDECAR_SUFFIXES, folder.sidecars, strict=True):
            name = sidecars.get(stem)
            if name is None:
                continue
            path = os.path.join(folder.path, name)
            caption = ""
            try:
                caption = read_sidecar(path)
            except ValueError as error:
                self.broken.append(str(error))
            else:
                if not caption:
                    self.empty_sidecars.append(path)
            return caption, suffix[1:]
        return None

    def read_lists(self, folder: _Folder, names: frozenset[str]) -> Mapping[str, ListedCaption]:
        """Read the captions in a folder's lists, by file name."""
        entries: dict[str, ListedCaption] = {}
        for path in folder.lists:
            for entry in self.read_list(folder, path, names):
                other = entries.setdefault(entry.file_name, entry)
                if other.text != entry.text:
                    self.broken.append(
                        f"{entry.path}: line {entry.line}: {entry.file_name!r} has another text in line {other.line}"
                        f"{'' if other.path == entry.path else f' of {other.path}'}; remove one of them"
                    )
                elif other is entry and not entry.text:
                    self.empty_sidecars.append(f"{entry.path}: line {entry.line}")
        return entries

    def read_list(self, folder: _Folder, path: str, names: frozenset[str]) -> list[ListedCaption]:
        """Read the entries of a list that are about pictures of the folder; the others are orphans."""
        entries, problems = read_caption_list(path)
        self.broken += problems
        relative_path = f"{folder.name}/{os.path.basename(path)}"
        self.result.orphans += [
            f"{relative_path} line {entry.line}: {entry.file_name}" for entry in entries if entry.file_name not in names
        ]
        return [entry for entry in entries if entry.file_name in names]

    def note_orphans(self, folder: _Folder, stems: frozenset[str]) -> None:
        for sidecars in folder.sidecars:
            self.result.orphans += [f"{folder.name}/{name}" for stem, name in sidecars.items() if stem not in stems]

    def sorted_entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: (_composed(entry.name), entry.name))
        except OSError as error:
            self.unreadable.append(f"{folder}: cannot be read ({error.strerror}); check its permissions")
            return []

    def conclude(self) -> Scan:
        """Put what was gathered in order."""
        scan = self.result
        for folder in sorted(self.pictures, key=lambda name: (_composed(name).split("/"), name)):
            scan.pictures += self.pictures[folder]
            scan.folder_counts[folder] = len(self.pictures[folder])
        scan.folder_settings = {folder: scan.folder_settings[folder] for folder in scan.folder_counts}
        scan.switched_off = {f: scan.switched_off[f] for f in scan.folder_counts if f in scan.switched_off}
        scan.left_out.sort()
        scan.hidden.sort()
        scan.orphans.sort()
        scan.problems = [
            *self.name_some(self.unreadable),
            *self.name_some(self.unprintable, _word_unprintable),
            *self.name_some(
                self.in_root,
                lambda name: (
                    f"{os.path.join(self.data_root, name)}: lies in the data root; move it into a subfolder of it"
                    + ("" if scan.folder_counts else ", or name the folder above this one as the data root")
                ),
            ),
            *self.name_some(
                self.lists_in_root,
                lambda path: (
                    f"{path}: lies in the data root, where it has no effect; move it into the subfolder that "
                    "it is about"
                ),
            ),
            *self.name_some(
                self.too_deep,
                lambda name: (
                    f"{os.path.join(self.data_root, *name.split('/'))}: lies deeper than one layer of "
                    f"subfolders; move it up into {os.path.join(self.data_root, name.split('/')[0])}, or set "
                    "recursive: True in data.params.train.params and data.params.validation.params"
                ),
            ),
            *self.name_some(self.broken),
        ]
        scan.warnings = [
            *self.name_some(self.link_warnings),
            *self.name_some(self.idle_settings, lambda path: f"{path}: has no effect, since no picture lies beside it"),
            *self.name_some(self.half_listed),
            *self.name_some(self.empty_sidecars, lambda path: f"{path}: is empty, and so is the caption"),
        ]
        if not scan.pictures and not scan.problems:
            scan.problems.append(self.word_nothing_found())
        return scan

    def word_nothing_found(self) -> str:
        if self.result.switched_off:
            folders = ", ".join(self.result.switched_off)
            return f"{self.data_root}: no picture is left, since multiply is 0 in all its folders ({folders}); raise it"
        return (
            f"{self.data_root}: holds no pictures; put .jpg, .jpeg, .png, .webp, .bmp or .jfif files into a subfolder "
            "of it"
        )

    def name_some(self, names: Sequence[str], line: Callable[[str], str] = str) -> Iterable[str]:
        """Word a line for each of the first names, and one that counts the others."""
        limit = len(names) if self.named is None else self.named
        lines = [line(name) for name in names[:limit]]
        if len(names) > limit:
            lines.append(f"... and {len(names) - limit} more like the last one")
        return lines


def _word_unprintable(path: str) -> str:
    return f"{os.fsencode(path).decode('utf-8', 'backslashreplace')}: the name is not UTF-8 text; rename it"


def _is_link(entry: os.DirEntry[str], real_name: str) -> bool:
    """Tell whether a folder is a link; Windows has junctions too, which only their real paths give away."""
    return entry.is_symlink() or (os.name == "nt" and os.path.realpath(entry.path) != real_name)


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _is_text(name: str) -> bool:
    """Tell whether a name can be written down; Python marks bytes that are no UTF-8 with lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES or name == "__MACOSX"
