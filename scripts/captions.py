"""List, move and edit the captions of a data root.

python scripts/captions.py show    --data_root FOLDER [--source txt|caption|jsonl|name]
python scripts/captions.py write   --data_root FOLDER [--format txt|caption|jsonl] [--overwrite] [--dry-run]
python scripts/captions.py rename  --data_root FOLDER [--dry-run]
python scripts/captions.py replace "a man" "john doe" --data_root FOLDER [--anywhere] [--ignore_case] [--dry-run]
python scripts/captions.py undo    --data_root FOLDER [--dry-run]

A picture's caption is what stands in its .txt file, else in its .caption file, else in the captions.jsonl or
metadata.jsonl of its folder, else its file name up to the first underscore.

show     lists each picture with its caption and where that stands.
write    writes the captions into files beside the pictures.
rename   makes the captions the pictures' names; their caption files and lists follow.
replace  replaces words in the captions, wherever each stands.
undo     takes the latest of these changes back.

A caption is never altered to fit a file name: where no name can hold it, the picture keeps its name, and a replaced
caption goes into a .txt file. After a change all captions are read again, and if one is not what it should be, all is
taken back.

Exit status: 0 done, 1 something was left as it was, 2 an error, and nothing was changed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from file_changes import FileChanges, count_changes, newest_log, undo  # noqa: E402

from ldm.data.captions import file_name_from_caption, picture_stem  # noqa: E402
from ldm.data.folder_settings import MULTIPLY_FILE  # noqa: E402
from ldm.data.scan import NAMED_PER_PROBLEM, Picture, Scan, scan_data_root  # noqa: E402
from ldm.data.sidecars import (  # noqa: E402
    CAPTION_LISTS,
    SIDECAR_SUFFIXES,
    ListedCaption,
    read_caption_list,
    read_text,
    tidy_caption,
)
from ldm.training.console import harmless, is_terminal  # noqa: E402

FORMATS: Final = ("txt", "caption", "jsonl")


@dataclass(frozen=True)
class Unit:
    """Pictures that have their caption in common: those of one name with different endings, else one alone.

    Attributes:
        pictures: the pictures.
        stem: their file name without the ending, in Unicode's composed form.
    """

    pictures: tuple[Picture, ...]
    stem: str

    @property
    def caption(self) -> str:
        """The pictures' caption."""
        return self.pictures[0].caption

    @property
    def source(self) -> str:
        """Where it stands."""
        return self.pictures[0].caption_source

    def __str__(self) -> str:
        """Name the pictures."""
        return " and ".join(picture.relative_path for picture in self.pictures)


@dataclass
class Folder:
    """One folder's units and the other files in it that matter.

    Attributes:
        path: where it lies.
        units: its pictures.
        sidecars: path of each caption file, by composed stem and ending in lower case.
        lists: path of each caption list.
        listed: the lists' entries, by composed file name.
        taken: stems, with case folded, of whatever lies in the folder.
        sharing: number of units by stem with case folded.
    """

    path: str
    units: list[Unit]
    sidecars: dict[tuple[str, str], str] = field(default_factory=dict)
    lists: list[str] = field(default_factory=list)
    listed: dict[str, list[ListedCaption]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    sharing: Counter[str] = field(default_factory=Counter)


@dataclass
class Plan:
    """What a command is about to do.

    Attributes:
        renames: (old path, new path) of files.
        writes: new content by path.
        edits: for each caption list, what changes in its lines: line -> field -> value.
        additions: for each caption list, the entries that it gets.
        captions: the captions that differ afterwards, by the pictures' paths of then.
        moved: path of then of each renamed picture, by its path of now.
        refused: what is left as it is, and why, a line each.
        notes: what is done in another way than asked for, a line each.
        unchanged: number of pictures that there is nothing to do for.
    """

    renames: list[tuple[str, str]] = field(default_factory=list)
    writes: dict[str, str] = field(default_factory=dict)
    edits: dict[str, dict[int, dict[str, str]]] = field(default_factory=dict)
    additions: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchanged: int = 0

    def refuse(self, unit: Unit, reason: str) -> None:
        """Leave pictures as they are."""
        self.refused.append(f"{unit}: {reason}")

    def edit(self, entry: ListedCaption, key: str, value: str) -> None:
        """Change one field of one line of a caption list."""
        self.edits.setdefault(entry.path, {}).setdefault(entry.line, {})[key] = value

    def describe(self) -> Iterable[str]:
        """Say what would happen, a line each."""
        for source, target in self.renames:
            yield f"rename {source} -> {os.path.basename(target)}"
        for path, text in self.writes.items():
            yield f"write  {path}: {text.rstrip()}"
        for path, lines in self.edits.items():
            for line, fields in sorted(lines.items()):
                yield f"edit   {path} line {line}: {_to_json(fields)}"
        for path, entries in self.additions.items():
            for entry in entries:
                yield f"add    {path}: {_to_json(entry)}"


def read_folders(scan: Scan) -> list[Folder]:
    """Group a scan's pictures by folder and shared caption, and read what else lies in their folders.

    Args:
        scan: a scan without problems.

    Returns:
        The folders that hold pictures.
    """
    by_folder: dict[str, list[Picture]] = {}
    for picture in scan.pictures:
        by_folder.setdefault(os.path.dirname(picture.path), []).append(picture)
    return [_read_folder(path, pictures) for path, pictures in by_folder.items()]


def _read_folder(path: str, pictures: Iterable[Picture]) -> Folder:
    together: dict[tuple[str, str], list[Picture]] = {}
    for picture in pictures:
        stem = picture_stem(_file_name(picture)) or ""
        together.setdefault((stem, picture.caption), []).append(picture)
    folder = Folder(path, [Unit(tuple(members), stem) for (stem, _), members in together.items()])
    folder.sharing.update(_folded(unit.stem) for unit in folder.units)
    for name in sorted(os.listdir(path)):
        composed = _composed(name)
        stem, suffix = os.path.splitext(composed)
        folder.taken.add(_folded(stem))
        if composed.lower() in CAPTION_LISTS:
            folder.lists.append(os.path.join(path, name))
        elif suffix.lower() in SIDECAR_SUFFIXES and composed.lower() != MULTIPLY_FILE:
            folder.sidecars[stem, suffix.lower()] = os.path.join(path, name)
    for caption_list in folder.lists:
        for entry in read_caption_list(caption_list)[0]:
            folder.listed.setdefault(entry.file_name, []).append(entry)
            folder.taken.add(_folded(os.path.splitext(entry.file_name)[0]))
    # A caption file of this name would be the folder's settings.
    folder.taken.add(os.path.splitext(MULTIPLY_FILE)[0])
    return folder


def plan_writing(folders: Iterable[Folder], file_format: str, overwrite: bool) -> Plan:
    """Plan to write the captions of all pictures into files beside them.

    Args:
        folders: the pictures.
        file_format: ``txt`` or ``caption``, a file for each picture; or ``jsonl``, a list for each folder.
        overwrite: replace captions of this format that differ (they do not count now, since a preferred source does).

    Returns:
        The plan.
    """
    plan = Plan()
    for folder in folders:
        if file_format == "jsonl":
            _plan_list(plan, folder, overwrite)
        else:
            _plan_sidecars(plan, folder, f".{file_format}", overwrite)
    return plan


def _plan_sidecars(plan: Plan, folder: Folder, suffix: str, overwrite: bool) -> None:
    for unit in folder.units:
        existing = folder.sidecars.get((unit.stem, suffix))
        if unit.source == suffix[1:]:
            plan.unchanged += len(unit.pictures)
        elif existing is not None and not overwrite:
            if tidy_caption(read_text(existing)) == unit.caption:
                plan.unchanged += len(unit.pictures)
            else:
                plan.refuse(unit, f"{existing} holds another caption; add --overwrite to replace it")
        else:
            _plan_sidecar(plan, folder, unit, suffix, unit.caption)


def _plan_sidecar(plan: Plan, folder: Folder, unit: Unit, suffix: str, caption: str) -> bool:
    """Plan to write one caption file; False where it cannot hold the caption."""
    path = folder.sidecars.get((unit.stem, suffix))
    if path is None:
        path = f"{os.path.splitext(unit.pictures[0].path)[0]}{suffix}"
    name = os.path.basename(path)
    text = f"{caption}\n"
    if (unit.stem, suffix) not in folder.sidecars and folder.sharing[_folded(unit.stem)] > 1:
        plan.refuse(unit, f"would share its {suffix} file with a picture of another caption; rename one of them")
    elif name.lower() == MULTIPLY_FILE:
        plan.refuse(unit, f"{name} beside it would be the folder's settings; rename the picture")
    elif len(os.fsencode(name)) > 255:
        plan.refuse(unit, f"the name of its {suffix} file would be too long; shorten the picture's name")
    elif tidy_caption(text.encode("utf-8").decode("utf-8-sig")) != caption:
        plan.refuse(unit, "a line break or an invisible character in its caption would be lost in a file")
    else:
        plan.writes[path] = text
        plan.captions |= {picture.path: caption for picture in unit.pictures}
        return True
    return False


def _plan_list(plan: Plan, folder: Folder, overwrite: bool) -> None:
    target = next(iter(folder.lists), os.path.join(folder.path, CAPTION_LISTS[0]))
    for unit in folder.units:
        if tidy_caption(unit.caption) != unit.caption:
            plan.refuse(unit, "a line break in its caption would be lost in a list")
            continue
        for picture in unit.pictures:
            name = _file_name(picture)
            entries = folder.listed.get(name, [])
            differing = [entry for entry in entries if entry.text != picture.caption]
            if not entries:
                plan.additions.setdefault(target, []).append({"file_name": name, "text": picture.caption})
            elif not differing:
                plan.unchanged += 1
            elif overwrite:
                for entry in differing:
                    plan.edit(entry, "text", picture.caption)
            else:
                plan.refused.append(
                    f"{picture.relative_path}: {differing[0].path} line {differing[0].line} holds another caption; "
                    "add --overwrite to replace it"
                )


def plan_renaming(folders: Iterable[Folder]) -> Plan:
    """Plan to make the captions the pictures' names.

    Args:
        folders: the pictures.

    Returns:
        The plan; pictures whose name holds the caption already keep it.
    """
    plan = Plan()
    for folder in folders:
        numbers: dict[str, int] = {}
        for unit in folder.units:
            if unit.source == "file name" or _own_caption(unit) == unit.caption:
                plan.unchanged += len(unit.pictures)
                continue
            try:
                stem = _free_stem(folder, unit, unit.caption, numbers)
            except ValueError as error:
                plan.refuse(unit, f"no file name can hold its caption: {error}; it stays in the {unit.source} source")
            else:
                _plan_move(plan, folder, unit, stem)
    return plan


def _own_caption(unit: Unit) -> str:
    return unit.stem.partition("_")[0].strip()


def _free_stem(folder: Folder, unit: Unit, caption: str, numbers: dict[str, int]) -> str:
    """Find a name for pictures that no other file has, not even in another case, and take it.

    What the user's own names have behind the caption stays there where it can.

    Raises:
        ValueError: no name can hold the caption.
    """
    longest = max((os.path.splitext(picture.path)[1] for picture in unit.pictures), key=len)
    bare = file_name_from_caption(caption, longest).removesuffix(longest)
    candidates = [bare]
    if unit.source == "file name" and "_" in unit.stem:
        with contextlib.suppress(ValueError):
            kept = file_name_from_caption(caption, longest, unit.stem[unit.stem.index("_") :]).removesuffix(longest)
            candidates = [kept, bare]
    alone = folder.sharing[_folded(unit.stem)] == 1
    for stem in candidates:
        if _folded(stem) not in folder.taken or (alone and _folded(stem) == _folded(unit.stem)):
            folder.taken.add(_folded(stem))
            return stem
    for number in itertools.count(numbers.get(_folded(caption), 2)):
        stem = file_name_from_caption(caption, longest, f"_({number})").removesuffix(longest)
        if _folded(stem) not in folder.taken:
            break
    numbers[_folded(caption)] = number + 1
    folder.taken.add(_folded(stem))
    return stem


def _plan_move(plan: Plan, folder: Folder, unit: Unit, stem: str) -> None:
    """Plan to rename pictures with their caption files, and to follow them in the lists."""
    sidecars = [
        folder.sidecars[unit.stem, suffix] for suffix in SIDECAR_SUFFIXES if (unit.stem, suffix) in folder.sidecars
    ]
    for path in [*(picture.path for picture in unit.pictures), *sidecars]:
        plan.renames.append((path, os.path.join(folder.path, stem + os.path.splitext(path)[1])))
    for picture in unit.pictures:
        new_name = stem + os.path.splitext(picture.path)[1]
        new_path = os.path.join(folder.path, new_name)
        plan.moved[picture.path] = new_path
        for entry in folder.listed.get(_file_name(picture), []):
            plan.edit(entry, "file_name", new_name)


def plan_replacing(folders: Iterable[Folder], substitute: Callable[[str], str]) -> Plan:
    """Plan to change captions where they stand.

    Args:
        folders: the pictures.
        substitute: gives the new caption for an old one.

    Returns:
        The plan. A caption that was a file name and no longer can be goes into a ``.txt`` file.
    """
    plan = Plan()
    for folder in folders:
        numbers: dict[str, int] = {}
        for unit in folder.units:
            substituted = substitute(unit.caption)
            caption = _composed(substituted.strip())
            if substituted == unit.caption:
                plan.unchanged += len(unit.pictures)
            elif unit.source == "jsonl":
                for picture in unit.pictures:
                    plan.captions[picture.path] = caption
                    for entry in folder.listed[_file_name(picture)]:
                        plan.edit(entry, "text", caption)
            elif unit.source != "file name":
                _plan_sidecar(plan, folder, unit, f".{unit.source}", caption)
            else:
                _plan_new_name(plan, folder, unit, caption, numbers)
    return plan


def _plan_new_name(plan: Plan, folder: Folder, unit: Unit, caption: str, numbers: dict[str, int]) -> None:
    try:
        stem = _free_stem(folder, unit, caption, numbers)
    except ValueError as error:
        if _plan_sidecar(plan, folder, unit, SIDECAR_SUFFIXES[0], caption):
            plan.notes.append(f"{unit}: no file name can hold {caption!r}: {error}; it goes into a .txt file")
        return
    _plan_move(plan, folder, unit, stem)
    plan.captions |= {plan.moved[picture.path]: caption for picture in unit.pictures}


def build_substitution(find: str, replacement: str, anywhere: bool, ignore_case: bool) -> Callable[[str], str]:
    """Make the function that replaces words in a caption.

    Args:
        find: the words to look for, as they stand.
        replacement: what takes their place, as it stands.
        anywhere: inside of words too; otherwise ``a man`` is not found in ``a mango``.
        ignore_case: take capital and small letters for the same.

    Returns:
        caption -> new caption.
    """
    find = _composed(find)
    pattern = re.escape(find)
    if not anywhere:
        pattern = (
            (r"(?<!\w)" if re.match(r"\w", find) else "") + pattern + (r"(?!\w)" if re.search(r"\w$", find) else "")
        )
    compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    return lambda caption: compiled.sub(lambda _: replacement, caption)


def carry_out(plan: Plan, scan: Scan, root: str, recursive: bool) -> None:
    """Do what a plan says, and make sure that every caption is then what it should be.

    Args:
        plan: the plan.
        scan: the data root as the plan saw it.
        root: the data root.
        recursive: whether deeper folders were read.

    Raises:
        OSError: a file cannot be changed, or a caption came out wrong; everything is as it was before.
    """
    expected = {plan.moved.get(picture.path, picture.path): picture.caption for picture in scan.pictures}
    expected = {_composed(path): caption for path, caption in (expected | plan.captions).items()}
    with FileChanges(root) as changes:
        for path in plan.edits.keys() | plan.additions.keys():
            changes.write(path, _edited_list(path, plan.edits.get(path, {}), plan.additions.get(path, [])))
        for source, target in plan.renames:
            changes.rename(source, target)
        for path, text in plan.writes.items():
            changes.write(path, text)
        after = scan_data_root(root, recursive)
        found = {_composed(picture.path): picture.caption for picture in after.pictures}
        wrong = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
        if wrong or after.problems:
            reason = after.problems[0] if after.problems else f"{min(wrong)} would not have the caption it should"
            raise OSError(f"everything was taken back, since {reason}")


def _edited_list(path: str, edits: Mapping[int, Mapping[str, str]], additions: Sequence[Mapping[str, str]]) -> str:
    content = Path(path).read_bytes().decode("utf-8-sig") if os.path.lexists(path) else ""
    lines = content.split("\n")
    for number, fields in edits.items():
        lines[number - 1] = _to_json({**json.loads(lines[number - 1]), **fields})
    if not lines[-1].strip():
        lines.pop()
    return "\n".join([*lines, *(_to_json(entry) for entry in additions), ""])


def _to_json(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    # Half characters in a field that is not ours can only be written as escapes.
    return text if _is_text(text) else json.dumps(record)


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _file_name(picture: Picture) -> str:
    """Give a picture's file name in Unicode's composed form."""
    return picture.relative_path.rpartition("/")[2]


def _folded(name: str) -> str:
    """Fold what some file systems do not tell apart."""
    return _composed(_composed(name).casefold())


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data_root", required=True, help="folder that holds your subfolders of pictures")
    shared.add_argument("--recursive", action="store_true", help="read the subfolders' subfolders too")
    changing = argparse.ArgumentParser(add_help=False, parents=[shared])
    changing.add_argument("--dry-run", action="store_true", help="say what would happen, and change nothing")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", parents=[shared], help="list the pictures with their captions")
    show.add_argument("--source", choices=(*FORMATS, "name"), help="only captions that stand there")
    write = commands.add_parser("write", parents=[changing], help="write captions into files beside the pictures")
    write.add_argument("--format", choices=FORMATS, default="txt", help="kind of file (default: %(default)s)")
    write.add_argument("--overwrite", action="store_true", help="replace files that hold another caption")
    commands.add_parser("rename", parents=[changing], help="make the captions the pictures' names")
    replace = commands.add_parser("replace", parents=[changing], help="replace words in the captions")
    replace.add_argument("find", help="words to look for")
    replace.add_argument("replacement", help="what takes their place")
    replace.add_argument("--anywhere", action="store_true", help="inside of words too")
    replace.add_argument("--ignore_case", action="store_true", help="take capital and small letters for the same")
    commands.add_parser("undo", parents=[changing], help="take the latest change back")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a console need not know every character of a caption
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.command == "replace" and not options.find:
        parser.error("give replace the words to look for")
    try:
        if options.command == "undo":
            return _undo(options)
        scan = scan_data_root(options.data_root, options.recursive)
        if scan.problems:
            raise ValueError("\n".join(scan.problems))
        _warn(scan)
        return _show(scan, options.source) if options.command == "show" else _change(scan, options)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError) as error:
        for line in str(error).split("\n"):
            print(f"captions: {line}", file=sys.stderr)
        return 2


def _warn(scan: Scan) -> None:
    for warning in scan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for orphan in scan.orphans[:NAMED_PER_PROBLEM]:
        print(f"warning: {orphan}: there is no picture to this caption", file=sys.stderr)
    if len(scan.orphans) > NAMED_PER_PROBLEM:
        print(f"warning: ... and {len(scan.orphans) - NAMED_PER_PROBLEM} more like the last one", file=sys.stderr)
    for folder, pictures in scan.switched_off.items():
        print(f"warning: {folder}: {_count(pictures)} passed over, since multiply is 0", file=sys.stderr)


def _show(scan: Scan, source: str | None) -> int:
    wanted = "file name" if source == "name" else source
    for picture in scan.pictures:
        if wanted in (None, picture.caption_source):
            line = f"{picture.relative_path}\t{picture.caption_source}\t{picture.caption}"
            print(harmless(line) if is_terminal() else line)  # a program that reads it gets it as it is
    sources = Counter(picture.caption_source for picture in scan.pictures)
    told = ", ".join(f"{number} from {name}" for name, number in sources.most_common())
    print(f"{_count(len(scan.pictures))}: {told}", file=sys.stderr)
    return 0


def _change(scan: Scan, options: argparse.Namespace) -> int:
    folders = read_folders(scan)
    if options.command == "write":
        plan = plan_writing(folders, options.format, options.overwrite)
    elif options.command == "rename":
        plan = plan_renaming(folders)
    else:
        plan = plan_replacing(
            folders, build_substitution(options.find, options.replacement, options.anywhere, options.ignore_case)
        )
    for note in plan.notes:
        print(f"note: {note}")
    for refused in plan.refused:
        print(f"left: {refused}", file=sys.stderr)
    changes = list(plan.describe())
    if options.dry_run:
        for line in changes:
            print(line)
    elif changes:
        carry_out(plan, scan, options.data_root, options.recursive)
    done = _count(len(changes), "change")
    left = f"{len(plan.refused)} left as they were, {_count(plan.unchanged)} with nothing to do"
    print(f"{f'would make {done} (--dry-run)' if options.dry_run else f'{done} made'}, {left}")
    if changes and not options.dry_run:
        print(f'take back with: python scripts/captions.py undo --data_root "{options.data_root}"')
    return 1 if plan.refused or scan.switched_off or (options.command == "replace" and not changes) else 0


def _undo(options: argparse.Namespace) -> int:
    log = newest_log(options.data_root)
    changes = count_changes(log)
    if options.dry_run:
        print(f"would take back: {_count(changes, 'file')}, by {log} (--dry-run)")
        return 0
    left = undo(options.data_root, log)
    for line in left:
        print(f"left: {line}", file=sys.stderr)
    if left:
        print(
            f"taken back: {changes - len(left)} of {_count(changes, 'file')}; remove {log} to forget about the others"
        )
    else:
        print(f"taken back: {_count(changes, 'file')}")
    return 1 if left else 0


def _count(number: int, noun: str = "picture") -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
