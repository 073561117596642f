"""Latents that are encoded once and then read in place of pictures: how they are named, kept and verified.

What is kept is the mean and the log-variance as the first stage's encoder gives them, in its own dtype, so that
nothing is lost and the posterior is still sampled anew for each exposure. A picture may be shown in several ways
(:class:`View`); each has its own entry, whose name follows from everything that its numbers follow from.

Storage only: what encodes is not known here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

import numpy as np
import numpy.typing as npt
import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.image_transform import Placement
from ldm.data.items import DataGoneError, UnreadableError, why_unreadable
from ldm.data.loader_signals import outlive_group_signals

logger = logging.getLogger(__name__)

MODES: Final = ("off", "memory", "disk")
"""Where latents are kept: nowhere, for the time of a run, or for good."""

TRANSFORM_VERSION: Final = 1
"""To be raised when the transform gives other pixels for the same file and placement: older entries are then passed
over."""

_TENSOR: Final = "moments"
_SUFFIX: Final = ".safetensors"
_LONGEST_REASON: Final = 200  # characters
_PARTIAL: Final = ".partial"
_ABANDONED_SECONDS: Final = 3600.0
_READ_BYTES: Final = 1 << 20
_SHARED_MEMORY: Final = "/dev/shm"


def resolve_mode(cache_latents: str | bool) -> str:
    """Settle on one of ``MODES``; YAML reads ``off`` without quotes as false.

    Raises:
        ValueError: another word.
    """
    mode = "off" if cache_latents is False else cache_latents
    if mode not in MODES:
        raise ValueError(f"cache_latents {cache_latents!r} is unknown; choose one of {', '.join(MODES)}")
    return str(mode)


@dataclass(frozen=True, slots=True)
class View:
    """One way in which a picture is shown.

    Attributes:
        path: the picture file.
        placement: what is cut out of it, its training size, and whether it is mirrored.
    """

    path: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class Encoding:
    """What encodes, and the form of what it gives.

    Attributes:
        weights: digest of the encoder's weights.
        channels: channels of mean and log-variance together.
        factor: side of a latent cell in pixels.
        dtype: of mean and log-variance.
    """

    weights: str
    channels: int
    factor: int
    dtype: torch.dtype

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Give the shape (channels, height, width) of the moments of a picture of a size (width, height) in pixels."""
        width, height = size
        return self.channels, height // self.factor, width // self.factor


class DamagedEntryError(OSError):
    """An entry that is not what was written."""


class LostLatentsError(UnreadableError):
    """A picture's cached latents that are gone or damaged."""

    remedy: ClassVar[str] = "type {resume}, which makes them anew"


class LostCacheError(DataGoneError):
    """The whole folder of cached latents is gone."""

    remedy: ClassVar[str] = "bring it back, or just type {resume}, which makes them anew"


def content_digests(
    paths: Iterable[str], threads: int | None = None, unreadable: dict[str, str] | None = None
) -> dict[str, str]:
    """Digest the content of files.

    Args:
        paths: the files.
        threads: how many are read at a time; None: one for each processor core.
        unreadable: where given, files that cannot be read are noted in it, a line by path, instead of raised.

    Returns:
        SHA-256 in hexadecimal by path, of the files that can be read.

    Raises:
        ValueError: files that cannot be read, a line for each.
    """
    distinct = list(dict.fromkeys(paths))
    problems: dict[str, str] = {}

    def digest(path: str) -> str:
        hashed = hashlib.sha256()
        try:
            with open(path, "rb") as stream:
                while block := stream.read(_READ_BYTES):
                    hashed.update(block)
        except OSError as error:
            problems[path] = why_unreadable(path, error)
        return hashed.hexdigest()

    with ThreadPoolExecutor(max_workers=threads or min(32, os.cpu_count() or 1)) as pool:
        digests = dict(zip(distinct, pool.map(digest, distinct), strict=True))
    if problems and unreadable is None:
        raise ValueError("\n".join(sorted(problems.values())))
    if unreadable is not None:
        unreadable |= dict(sorted(problems.items()))
    return {path: digest for path, digest in digests.items() if path not in problems}


def entry_key(content: str, placement: Placement, transform: str, encoding: Encoding) -> str:
    """Name an entry by everything that its numbers follow from.

    Args:
        content: digest of the picture file's content.
        placement: what of it is shown.
        transform: how it is resized.
        encoding: what encodes it.

    Returns:
        64 hexadecimal digits.
    """
    parts = [
        f"transform {TRANSFORM_VERSION} {transform}",
        f"decoder {PIL.__version__}",
        f"file {content}",
        f"size {placement.size[0]} {placement.size[1]}",
        f"box {' '.join(float(edge).hex() for edge in placement.box)}",
        f"flip {bool(placement.flip)}",
        f"encoder {encoding.weights} {encoding.dtype}",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class EntryStore(Protocol):
    """Keeps moments (channels, height, width) by key."""

    def write(self, key: str, moments: Tensor) -> None:
        """Keep an entry; one of that key is replaced."""
        ...

    def read(self, key: str) -> Tensor:
        """Read an entry.

        Raises:
            FileNotFoundError: there is none.
            DamagedEntryError: it is not what was written.
        """
        ...

    def discard(self, key: str) -> None:
        """Take a damaged entry out."""
        ...

    def free_bytes(self) -> int | None:
        """Measure the room for entries; None where it is not known."""
        ...

    def tidy(self) -> None:
        """Take away what nobody needs; to be called once every process has opened the store."""
        ...


class DiskEntries:
    """Entries as files, which runs and ranks share; one that is there is complete.

    The files lie in 256 subfolders by their first two digits: some ten thousand files in a folder are no burden to
    file systems of today, while a second level would make a folder for nearly every file of a usual data set.

    Args:
        folder: made if it is not there.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"cache_dir {self.folder} cannot be made ({error.strerror}); name a folder that can be written to"
            ) from error

    def path(self, key: str) -> Path:
        """Tell an entry's file."""
        return self.folder / key[:2] / f"{key[2:]}{_SUFFIX}"

    def write(self, key: str, moments: Tensor) -> None:
        """Keep an entry; other processes see it whole or not at all.

        Not forced to the disk: what a power failure damages is noticed by its checksum and made anew.

        Raises:
            OSError: it cannot be written.
        """
        target = self.path(key)
        moments = moments.detach().cpu().contiguous()
        content = save({_TENSOR: moments}, {"key": key, "sha256": _checksum(key, moments)})
        partial = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}")
        try:
            target.parent.mkdir(exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, target)
        except OSError as error:
            with suppress(OSError):  # the failure in flight is the one to show
                partial.unlink(missing_ok=True)
            raise OSError(f"{target}: cached latents cannot be written ({error.strerror})") from error

    def read(self, key: str) -> Tensor:
        """Read an entry and hold it against its checksum; see :class:`EntryStore`."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as opened:
                told = opened.metadata() or {}
                moments: Tensor = opened.get_tensor(_TENSOR)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: is gone") from error
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = "".join(filter(str.isprintable, str(error)))[:_LONGEST_REASON]  # names of the file's choice
            raise DamagedEntryError(f"{path}: is damaged ({reason})") from error
        if told.get("key") != key or told.get("sha256") != _checksum(key, moments):
            raise DamagedEntryError(f"{path}: is damaged (its checksum differs)")
        return moments

    def discard(self, key: str) -> None:
        """Delete an entry's file; nothing happens if it is gone already."""
        self.path(key).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Measure the free space of the folder's file system."""
        return shutil.disk_usage(self.folder).free

    def tidy(self) -> None:
        """Delete what writers that were killed have left behind, but nothing that may still be being written."""
        before = time.time() - _ABANDONED_SECONDS
        # By the names that entries have: the folder may hold other things as well.
        for partial in self.folder.glob(f"[0-9a-f][0-9a-f]/*{_SUFFIX}.*{_PARTIAL}"):
            with suppress(OSError):  # its writer was alive after all, or the folder may only be read
                if partial.stat().st_mtime < before:
                    partial.unlink()


class MemoryEntries:
    """Entries in one block of memory, which loader processes, and the ranks of a machine, share without copies.

    One block, since each shared tensor takes a file descriptor in each process. Loader processes that are forked
    see the run's own memory; those that are spawned are handed the block, which torch then moves to shared memory.

    Args:
        shapes: shape of each entry, by key.
        dtype: of all entries.
        shared_file: a file that the processes of a machine share, all with the same ``shapes``: each maps it into
            memory, and :meth:`tidy` takes its name away, so that nothing is left behind when the last one ends.
            None: for one process alone.

    Raises:
        OSError: the shared file cannot be made at that size.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, shared_file: str | None = None) -> None:
        self.dtype = dtype
        self.shared_file = shared_file
        self._entries: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        offset = 0
        for number, (key, shape) in enumerate(shapes.items()):
            self._entries[key] = (number, offset, tuple(shape))
            offset += int(np.prod(shape)) * dtype.itemsize
        self._filled_at = offset
        total = offset + len(self._entries)
        self._block = torch.zeros(total, dtype=torch.uint8) if shared_file is None else _map_file(shared_file, total)

    def write(self, key: str, moments: Tensor) -> None:
        """Keep an entry.

        Raises:
            ValueError: moments of another dtype or shape than was said.
        """
        number, offset, shape = self._entries[key]
        if tuple(moments.shape) != shape or moments.dtype != self.dtype:
            raise ValueError(f"moments {tuple(moments.shape)} {moments.dtype} where {shape} {self.dtype} were planned")
        self._at(offset, shape).copy_(moments)
        self._block[self._filled_at + number] = 1

    def read(self, key: str) -> Tensor:
        """Read an entry, without copying it; see :class:`EntryStore`."""
        entry = self._entries.get(key)
        if entry is None or not self._block[self._filled_at + entry[0]]:
            raise FileNotFoundError(f"{key}: is not in memory")
        return self._at(*entry[1:])

    def _at(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        count = int(np.prod(shape)) * self.dtype.itemsize
        return self._block[offset : offset + count].view(self.dtype).view(shape)

    def discard(self, key: str) -> None:
        """Forget an entry."""
        self._block[self._filled_at + self._entries[key][0]] = 0

    def free_bytes(self) -> int | None:
        """Measure the memory that processes can still have; None where it is not known, or already theirs."""
        return available_memory() if self.shared_file is None else None

    def tidy(self) -> None:
        """Take the shared file's name away; its content lives as long as a process has it."""
        if self.shared_file is not None:
            with suppress(OSError):  # another rank has done it, or the system keeps files that are in use
                os.unlink(self.shared_file)


class LatentCache:
    """The cached latents of one data set.

    A run fills it before training (:meth:`open`, :meth:`tidy`, :meth:`missing`, :meth:`pictures`, :meth:`write`,
    :meth:`finish`); from then on the data set reads from it.

    Args:
        mode: ``memory`` or ``disk``.
        folder: where ``disk`` keeps the entries.
        views: gives every view that the data set's exposures may show; those of one picture in a row.
        read_view: reads a view as uint8 (H, W, 3).
        transform: how pictures are resized, in words; part of an entry's name.
        skip: pictures that have become unreadable get no entry; else they are an error.
    """

    def __init__(
        self,
        mode: str,
        folder: str,
        views: Callable[[], Iterable[View]],
        read_view: Callable[[View], npt.NDArray[np.uint8]],
        transform: str,
        skip: bool = False,
    ) -> None:
        self.mode = mode
        self.skip = skip
        self.folder = folder
        self.transform = transform
        self.is_ready = False
        self._list_views = views
        self._read_view = read_view
        self._views: dict[str, View] = {}
        self._digests: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        self._encoding: Encoding | None = None
        self._store: EntryStore | None = None

    def smallest_size(self) -> tuple[int, int]:
        """Tell the smallest training size (width, height) in pixels."""
        return min((view.placement.size for view in self._list_views()), key=lambda size: size[0] * size[1])

    def open(self, encoding: Mapping[str, Any], token: str | None = None) -> None:
        """Find out which entries there are to be; reads every picture file once, for its digest.

        Args:
            encoding: the arguments of :class:`Encoding`.
            token: names the memory that the processes of a machine are to share; None where there is one process.

        Raises:
            ValueError: pictures that cannot be read, a line for each.
            OSError: the folder cannot be made, or the memory not be had.
        """
        self._encoding = Encoding(**encoding)
        views = list(self._list_views())
        self._unreadable = {}
        noted = self._unreadable if self.skip else None
        self._digests = content_digests((view.path for view in views), unreadable=noted)
        if not self._digests:
            raise ValueError("\n".join(self._unreadable.values()))
        self._views = {self._key(view): view for view in views if view.path in self._digests}
        if self.mode == "disk":
            self._store = DiskEntries(self.folder)
            return
        shapes = {key: self._encoding.shape(view.placement.size) for key, view in self._views.items()}
        self._store = MemoryEntries(shapes, self._encoding.dtype, None if token is None else shared_file_path(token))

    def tidy(self) -> None:
        """Take away what nobody needs; to be called once every process has opened the cache."""
        self._entries.tidy()

    def _key(self, view: View) -> str:
        assert self._encoding is not None
        return entry_key(self._digests[view.path], view.placement, self.transform, self._encoding)

    @property
    def _entries(self) -> EntryStore:
        assert self._store is not None
        return self._store

    def __len__(self) -> int:
        """Count the entries there are to be, while they are being filled in."""
        return len(self._views)

    def count_pictures(self) -> int:
        """Count the picture files that the entries come from."""
        return len(self._digests)

    def bytes_needed(self, views: Iterable[View] | None = None) -> int:
        """Add up the bytes of the latents of some views; of all views if None."""
        assert self._encoding is not None
        encoding = self._encoding
        chosen = self._views.values() if views is None else views
        return sum(int(np.prod(encoding.shape(view.placement.size))) * encoding.dtype.itemsize for view in chosen)

    def free_bytes(self) -> int | None:
        """Measure the room for entries; None where it is not known."""
        return self._entries.free_bytes()

    def remedy(self) -> str:
        """Say what to do where there is too little room."""
        instead = "set cache_latents: disk" if self.mode == "memory" else "make room, name another folder as cache_dir"
        return f"{instead}, or lower cache_crops"

    def missing(self, rank: int, world: int, progress: Callable[[int], None] | None = None) -> list[View]:
        """List the views of a rank's share that have no sound entry; deletes and names damaged ones.

        The shares follow from the data set alone, so that ranks need not agree on what is missing.

        Args:
            rank: number of this process among those that share the work.
            world: how many there are.
            progress: told how many entries have just been looked at.

        Returns:
            Views, the mirrored one of two right after the other.
        """
        pairs: dict[tuple[Any, ...], list[str]] = {}
        for key, view in self._views.items():
            pairs.setdefault((view.path, replace(view.placement, flip=False)), []).append(key)
        by_size = sorted(pairs.values(), key=lambda keys: self._views[keys[0]].placement.size)
        mine = list(chain.from_iterable(by_size[rank::world]))
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            found = []
            for key, is_sound in zip(mine, pool.map(self._is_sound, mine), strict=True):
                if not is_sound:
                    found.append(self._views[key])
                if progress is not None:
                    progress(1)
        return found

    def _is_sound(self, key: str) -> bool:
        try:
            self._entries.read(key)
        except FileNotFoundError:
            return False
        except DamagedEntryError as error:
            logger.warning("%s; it is made anew", error)
            self._entries.discard(key)
            return False
        return True

    def pictures(self, views: Sequence[View], batch_size: int, num_workers: int) -> Iterator[tuple[list[View], Tensor]]:
        """Read views in batches of one size; one that is there twice, mirrored, is decoded once.

        Args:
            views: from :meth:`missing`.
            batch_size: pictures in a batch, at most.
            num_workers: processes that read; 0 for this one.

        Yields:
            Views, and their pictures uint8 (B, H, W, 3).

        Raises:
            ValueError: pictures that cannot be read and are not to be skipped, a line for each; after all others have
                been yielded.
        """
        pairs: dict[tuple[Any, ...], list[View]] = {}
        for view in views:
            pairs.setdefault((view.path, replace(view.placement, flip=False)), []).append(view)
        reading = _Reading(list(pairs.values()), self._read_view)
        loader = DataLoader(
            reading,
            batch_sampler=reading.batches(batch_size),
            num_workers=num_workers,
            worker_init_fn=outlive_group_signals,
            collate_fn=list,
        )
        problems: dict[str, str] = {}
        for batch in loader:
            problems |= {reading.pairs[index][0].path: problem for index, _, problem in batch if problem is not None}
            read = [(reading.pairs[index], pixels) for index, pixels, _ in batch if pixels is not None]
            if read:
                shown = list(chain.from_iterable(pair for pair, _ in read))
                pixels = torch.cat([pixels for _, pixels in read])
                for start in range(0, len(shown), batch_size):
                    yield shown[start : start + batch_size], pixels[start : start + batch_size]
        if problems and not self.skip:
            raise ValueError("\n".join(problems.values()))
        self._unreadable |= problems

    def write(self, view: View, moments: Tensor) -> None:
        """Keep the moments (channels, height, width) of a view; they may lie on any device."""
        self._entries.write(self._key(view), moments)

    def finish(self) -> None:
        """Say that all entries are there: the data set reads them from now on."""
        self._views = {}
        self.is_ready = True

    def read(self, view: View) -> Tensor:
        """Read the moments of a view.

        Args:
            view: one of the data set's.

        Returns:
            (channels, height, width): mean and log-variance, in the dtype of their encoder; not to be changed.

        Raises:
            UnreadableError: there are none, for the picture could not be read when they were to be made.
            LostLatentsError: they are gone or damaged.
            LostCacheError: the whole folder of them is gone.
        """
        if view.path in self._unreadable:
            raise UnreadableError(self._unreadable[view.path])
        try:
            return self._entries.read(self._key(view))
        except OSError as error:
            if self.mode == "disk" and not os.path.isdir(self.folder):
                raise LostCacheError(f"cache_dir {self.folder}: the folder has gone since the run began") from error
            raise LostLatentsError(f"{view.path}: its cached latents cannot be read: {error}") from error

    def blank(self, view: View) -> Tensor:
        """Give moments to stand where those of a view could not be read: zeros (channels, height, width)."""
        assert self._encoding is not None
        return torch.zeros(self._encoding.shape(view.placement.size), dtype=self._encoding.dtype)


class _Reading(Dataset[Any]):
    """Reads the pictures to encode: a view, or a view and its mirror image, an item."""

    def __init__(self, pairs: list[list[View]], read_view: Callable[[View], npt.NDArray[np.uint8]]) -> None:
        self.pairs = pairs
        self.read_view = read_view

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str | None]:
        views = self.pairs[index]
        try:
            plain = self.read_view(View(views[0].path, replace(views[0].placement, flip=False)))
        except OSError as error:
            return index, None, why_unreadable(views[0].path, error)
        shown = [plain[:, ::-1] if view.placement.flip else plain for view in views]
        return index, torch.from_numpy(np.stack(shown)), None

    def batches(self, batch_size: int) -> list[list[int]]:
        """Put items of one size together, each batch just full."""
        batches: list[list[int]] = []
        size, count = None, 0
        for index, views in enumerate(self.pairs):
            if views[0].placement.size != size or count >= batch_size:
                batches.append([])
                size, count = views[0].placement.size, 0
            batches[-1].append(index)
            count += len(views)
        return batches


def shared_file_path(token: str) -> str:
    """Name a file for :class:`MemoryEntries` to share, in memory where the system has such a folder.

    Args:
        token: tells runs apart.
    """
    folder = _SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else tempfile.gettempdir()
    return os.path.join(folder, f"latents-{token}")


def available_memory() -> int | None:
    """Measure the memory in bytes that processes can still have; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            table = dict(line.split(":", 1) for line in stream)
        return int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _map_file(path: str, size: int) -> Tensor:
    """Map a file into memory, uint8 (size,), zeros where nobody has written; several processes see the same."""
    try:
        with open(path, "ab") as stream:
            if hasattr(os, "posix_fallocate"):
                # Else the lack of room would end the process at its first write beyond it.
                os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        with suppress(OSError):  # the failure in flight is the one to show
            os.unlink(path)
        raise OSError(
            f"{path}: {size:,} bytes of shared memory for latents cannot be had ({error.strerror}); set cache_latents: "
            "disk"
        ) from error
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def _checksum(key: str, moments: Tensor) -> str:
    hashed = hashlib.sha256(f"{key} {moments.dtype} {tuple(moments.shape)}\n".encode())
    hashed.update(moments.contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()
