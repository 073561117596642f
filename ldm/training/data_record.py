"""What a run was trained on, file by file, so that a change since is seen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

MOST_HASHED_BYTES: Final = 16 * 2**30
"""Of larger data sets only the files' sizes and times are noted: reading all would keep a run waiting for minutes."""

BY_CONTENT: Final = "content"
BY_SIZE_AND_TIME: Final = "size and time"

_READ_BYTES: Final = 1 << 20
_THREADS: Final = 8


def describe_data(datasets: Mapping[str, Any], most_hashed_bytes: int = MOST_HASHED_BYTES) -> dict[str, Any]:
    """Write down what data sets hold.

    Args:
        datasets: the data sets by split. A folder of pictures is described picture by picture with its captions
            and its folders' settings; shards by their files; a mixture by its parts, each under a name of its own
            (``train.faces``); sets of other projects by their length.
        most_hashed_bytes: how much may be read to hash the pictures.

    Returns:
        ``digest``, the same for the same data wherever it lies; ``compared_by``, ``"content"`` or ``"size and
        time"``; ``sets``, a description for each set by name. A picture's is ``bytes``, ``time`` (of its last
        change, in nanoseconds), ``hash`` (of its content, or None) and ``caption``. A set that shows the same
        pictures as an earlier one is described by ``same_as`` alone.
    """
    named = [part for split, dataset in datasets.items() for part in _parts(split, dataset)]
    paths = dict.fromkeys(path for _, dataset in named for path in _files(dataset))
    files = _describe_files(list(paths), most_hashed_bytes)
    sets: dict[str, Any] = {}
    for name, dataset in named:
        described = _describe(dataset, files)
        same = next((other for other, known in sets.items() if "pictures" in known and known == described), None)
        sets[name] = described if same is None else {"same_as": same}
    hashed = not any(file["hash"] is None for file in files.values())
    return {
        "digest": _digest(sets),
        "compared_by": BY_CONTENT if hashed else BY_SIZE_AND_TIME,
        "sets": sets,
    }


def described_set(data: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Find a set's description, also where it says ``same_as``.

    Args:
        data: from :func:`describe_data`.
        name: the set's name.

    Returns:
        The description, or None if there is no set of that name.
    """
    found: Mapping[str, Any] | None = data["sets"].get(name)
    if found is not None and "same_as" in found:
        found = data["sets"].get(found["same_as"])
    return found


def _parts(name: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    """Take a mixture apart."""
    parts = getattr(dataset, "parts", None)
    if isinstance(parts, Mapping):
        for part_name, part in parts.items():
            yield from _parts(f"{name}.{part_name}", part)
    else:
        yield name, dataset


def _is_folder(dataset: Any) -> bool:
    return hasattr(dataset, "pictures") and hasattr(dataset, "folder_settings")


def _shard_files(dataset: Any) -> dict[str, str]:
    """Give the shards of a set by name, which says nothing of a URL's key; empty for a set without shards."""
    names, shards = getattr(dataset, "names", None), getattr(dataset, "shards", None)
    return dict(zip(names, map(str, shards), strict=True)) if names and shards else {}


def _files(dataset: Any) -> Iterable[str]:
    """Name the files whose content is to be hashed."""
    return [picture.path for picture in dataset.pictures] if _is_folder(dataset) else []


def _describe(dataset: Any, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Describe one set."""
    if _is_folder(dataset):
        settings = {folder: _settings(value) for folder, value in dataset.folder_settings.items()}
        return {
            "root": os.path.abspath(dataset.data_root),
            "pictures": {
                picture.relative_path: {**files[picture.path], "caption": picture.caption}
                for picture in dataset.pictures
            },
            "settings": {folder: value for folder, value in settings.items() if value},
        }
    shards = _shard_files(dataset)
    if shards:
        return {"shards": {name: _size_and_time(path) for name, path in shards.items()}}
    return {"kind": type(dataset).__name__, "items": len(dataset)}


def _settings(settings: Any) -> dict[str, Any]:
    """Write down what a folder says of itself; what it does not say is left out."""
    if not is_dataclass(settings) or isinstance(settings, type):
        return {}
    unsaid = type(settings)()
    said = {name: value for name, value in asdict(settings).items() if value != getattr(unsaid, name)}
    return {name: str(value) if isinstance(value, Fraction) else value for name, value in said.items()}


def _size_and_time(path: str) -> dict[str, Any]:
    """Look at a file; one that is no local file, or has gone, is described by nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return {"bytes": None, "time": None, "hash": None}
    return {"bytes": found.st_size, "time": found.st_mtime_ns, "hash": None}


def _describe_files(paths: list[str], most_hashed_bytes: int) -> dict[str, dict[str, Any]]:
    """Look at files, and read them unless they are too much to read."""
    with ThreadPoolExecutor(_THREADS) as threads:
        described = dict(zip(paths, threads.map(_size_and_time, paths), strict=True))
        if sum(file["bytes"] or 0 for file in described.values()) <= most_hashed_bytes:
            for path, content in zip(paths, threads.map(_hash, paths), strict=True):
                described[path]["hash"] = content
    return described


def _hash(path: str) -> str | None:
    """Hash a file's content; None if it cannot be read, which whoever needs the picture will report."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with Path(path).open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()


def _digest(sets: Mapping[str, Any]) -> str:
    """Hash the descriptions without what does not matter: where files lie and, of hashed ones, when they changed."""

    def core(file: Mapping[str, Any]) -> list[Any]:
        return [file["hash"] or [file["bytes"], file["time"]], file.get("caption")]

    content = {
        name: {
            key: {file: core(entry) for file, entry in value.items()} if key in ("pictures", "shards") else value
            for key, value in described.items()
            if key != "root"
        }
        for name, described in sets.items()
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
