"""A training set of WebDataset shards, as img2dataset writes LAION: tar files of pictures with their captions.

Shards are read by index, not as a stream: any sample is read where it lies in its tar. So shards have the same
exposures, plans, buckets, ledger and resume as a folder has, and nodes and workers need no agreement on who
reads what.
"""

from __future__ import annotations

import io
import logging
import math
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from ldm.data.aspects import bucket_sizes, nearest_buckets
from ldm.data.captions import shuffled_tags
from ldm.data.every_dream import ON_BAD_IMAGE, SETS
from ldm.data.exposure_set import Filler
from ldm.data.image_transform import (
    CROPS,
    INTERPOLATIONS,
    RESIZE_MODES,
    Placement,
    place,
    read_training_bytes,
    resample_filter,
    to_unit_range,
)
from ldm.data.items import UnreadableError, blank_picture, placed, replayed, why_unreadable
from ldm.data.shard_files import GIB, ShardFiles, expand_shards, is_url, public_name, shard_names
from ldm.data.tar_index import ShardIndex, read_caption, read_member
from ldm.exposure import exposure_row, item_id, keyed_generator, uniform, uniform_pair

logger = logging.getLogger(__name__)

DEFAULT_CACHE_DIR: Final = "~/.cache/everydream-trainer/shards"
NAMED_SAMPLES: Final = 100
"""How many bad samples one message names."""

_KEPT_INDICES: Final = 128
_INDEXED_AT_A_TIME: Final = 64
_KEPT_PASSES: Final = 3


class ShardRow:
    """The endless row of the samples of some shards: one pass over all of them after another.

    Each pass takes the shards in an order of its own, some at a time, and shuffles the samples of those. So
    the row needs to know no more of the shards than those that lie before the sample that is asked for.

    Args:
        shards: number of shards.
        count: gives the number of samples of a shard.
        seed: the run's seed.
        together: how many shards' samples are shuffled together.
        shuffle: False: shards and samples in their own order.
    """

    def __init__(
        self, shards: int, count: Callable[[int], int], seed: int, together: int = 1, shuffle: bool = True
    ) -> None:
        self._shards = shards
        self._count = count
        self._seed = seed
        self._together = together
        self._shuffle = shuffle
        self._group_begins: dict[int, list[int]] = {}  # by pass, as far as they were asked for

    @property
    def groups(self) -> int:
        """Number of groups of shards that are shuffled together, in a pass."""
        return -(-self._shards // self._together)

    def total(self) -> int:
        """Count the samples of a pass, which needs every shard's count.

        Raises:
            ValueError: there are none.
        """
        samples = self._begins(0, sys.maxsize)[-1]
        if samples == 0:
            raise ValueError("the shards hold no sample that can be trained on")
        return samples

    def locate(self, position: int) -> tuple[int, int, int]:
        """Find what stands at a position of the row.

        Args:
            position: from 0.

        Returns:
            The pass, the shard and the number of the sample in it.
        """
        epoch, group, offset = self._group_at(position)
        shards = self.shards_of(epoch, group)
        counts = [self._count(shard) for shard in shards]
        number = int(self._order(epoch, group, sum(counts))[offset])
        for shard, count in zip(shards, counts, strict=True):
            if number < count:
                return epoch, shard, number
            number -= count
        raise AssertionError("a group's order goes beyond its samples")

    def stretches(self, start: int, stop: int) -> Iterator[tuple[list[int], npt.NDArray[np.int64]]]:
        """Go through a part of the row by groups of shards.

        Args:
            start: first position.
            stop: position after the last.

        Yields:
            The shards of a group, and int64 (samples,): which of their samples come, counted through the group.
        """
        while start < stop:
            epoch, group, offset = self._group_at(start)
            shards = self.shards_of(epoch, group)
            samples = sum(self._count(shard) for shard in shards)
            taken = min(samples - offset, stop - start)
            yield shards, self._order(epoch, group, samples)[offset : offset + taken]
            start += taken

    def groups_between(self, start: int, stop: int) -> Iterator[list[int]]:
        """List the shards, group by group, that a part of the row touches, without counting more of them.

        Args:
            start: first position.
            stop: position after the last.

        Yields:
            The shards of each group; where they are not counted yet, only the first such group.
        """
        while start < stop:
            counted = self._group_begins.get(0, [0])
            if start >= counted[-1] and len(counted) <= self.groups:
                yield self.shards_of(0, len(counted) - 1)
                return
            epoch, group, offset = self._group_at(start)
            shards = self.shards_of(epoch, group)
            yield shards
            start += sum(self._count(shard) for shard in shards) - offset

    def shards_of(self, epoch: int, group: int) -> list[int]:
        """List the shards of a group of a pass."""
        order = _shard_order(self._seed, epoch, self._shards) if self._shuffle else range(self._shards)
        return list(order[group * self._together : (group + 1) * self._together])

    def _order(self, epoch: int, group: int, samples: int) -> npt.NDArray[np.int64]:
        return _sample_order(self._seed, epoch, group, samples) if self._shuffle else np.arange(samples)

    def _group_at(self, position: int) -> tuple[int, int, int]:
        """Find the pass, the group in it, and the position in the group."""
        epoch = 0
        if position >= self._begins(0, position)[-1]:
            epoch, position = divmod(position, self.total())
        begins = self._begins(epoch, position)
        group = bisect_right(begins, position) - 1
        return epoch, group, position - begins[group]

    def _begins(self, epoch: int, position: int) -> list[int]:
        """List where the groups of a pass begin, at least until past a position; the end of the last one too."""
        if epoch not in self._group_begins:
            for old in [known for known in self._group_begins if known > 0][:-_KEPT_PASSES]:
                del self._group_begins[old]
        begins = self._group_begins.setdefault(epoch, [0])
        while begins[-1] <= position and len(begins) <= self.groups:
            begins.append(begins[-1] + sum(self._count(shard) for shard in self.shards_of(epoch, len(begins) - 1)))
        return begins


@lru_cache(maxsize=8)
def _shard_order(seed: int, epoch: int, shards: int) -> tuple[int, ...]:
    return tuple(torch.randperm(shards, generator=keyed_generator("shards", seed, epoch)).tolist())


@lru_cache(maxsize=64)
def _sample_order(seed: int, epoch: int, group: int, samples: int) -> npt.NDArray[np.int64]:
    order: npt.NDArray[np.int64] = torch.randperm(
        samples, generator=keyed_generator("shard_samples", seed, epoch, group)
    ).numpy()
    return order


class WebShards(Dataset[dict[str, Any]]):
    """Captioned pictures from tar shards, local or at URLs.

    The samples form an endless row (:class:`ShardRow`); an epoch takes the next ``exposures_per_epoch`` of it, so
    a set of any size is trained on in epochs of any length, and each sample comes once before any comes again.
    A shard is fetched and indexed when an epoch first reaches it.

    Args:
        shards: a folder of ``.tar`` files, a pattern (``laion/{00000..00099}.tar``, ``laion/*.tar``), an http or
            https URL (with braces too), or a list of those.
        size: side of the square training pictures in pixels, a multiple of 8, or of the square among the
            buckets; None keeps each picture's own.
        set: ``"train"``; or ``"val"``, ``"validation"``, ``"test"``: samples in their order, without flip or
            caption dropout, the same in every epoch.
        repeats: how often an epoch shows each sample where ``exposures_per_epoch`` does not say how many it shows.
        exposures_per_epoch: samples that an epoch shows, at least 1; None: all of them, ``repeats`` times.
        interpolation: resampling filter: ``linear``, ``bilinear``, ``bicubic`` or ``lanczos``.
        flip_p: probability in [0, 1] that a training picture is mirrored left to right.
        resize_mode: ``bucket``, ``squash`` or ``center_crop``, as for a folder.
        crop: where the crop is placed: ``center``, ``random`` or ``jitter``.
        conditional_dropout: probability in [0, 1] that a training caption is replaced by the empty prompt.
        shuffle_tags: draw the order of a training caption's comma-separated tags anew at each showing.
        keep_tags: how many of the first tags keep their places then.
        loss_weight: what each sample's loss is multiplied by, at least 0.
        on_bad_image: what is done about samples without a caption or with a picture that cannot be read, and
            about tars that are cut off: ``error`` ends the run, ``skip`` leaves them out (the samples before
            the cut stay); both name them.
        shuffle_shards: how many shards' samples are shuffled together, at least 1; 1 suits shards whose samples
            are a random choice, as LAION's are.
        shard_cache_dir: folder for the shards' indices, and for copies of those at URLs; None: in the home folder.
        shard_cache_gib: how much the copies may take together, in GiB. It must hold the shards of an epoch.
        seed: the run's seed.

    Attributes:
        shards: paths and URLs of the shards.
        names: a name for each shard, which its samples' exposures are keyed by.

    Raises:
        ValueError: an argument out of range, or shards that cannot be trained on; a line for each problem.
        OSError: shards that cannot be fetched or read.
    """

    def __init__(
        self,
        shards: str | list[str],
        size: int | None = 512,
        set: str = "train",
        repeats: int = 1,
        exposures_per_epoch: int | None = None,
        interpolation: str = "bicubic",
        flip_p: float = 0.0,
        resize_mode: str = "bucket",
        crop: str = "center",
        conditional_dropout: float = 0.0,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        loss_weight: float = 1.0,
        on_bad_image: str = "error",
        shuffle_shards: int = 1,
        shard_cache_dir: str | None = None,
        shard_cache_gib: float = 50.0,
        seed: int = 23,
    ) -> None:
        self._check(
            size=size,
            set=set,
            repeats=repeats,
            exposures_per_epoch=exposures_per_epoch,
            interpolation=interpolation,
            flip_p=flip_p,
            resize_mode=resize_mode,
            crop=crop,
            conditional_dropout=conditional_dropout,
            keep_tags=keep_tags,
            loss_weight=loss_weight,
            on_bad_image=on_bad_image,
            shuffle_shards=shuffle_shards,
            shard_cache_gib=shard_cache_gib,
        )
        is_training = set == "train"
        self.size = size
        self.set = set
        self.repeats = repeats if is_training else 1
        self.exposures_per_epoch = exposures_per_epoch
        self.resize_mode = resize_mode
        self.crop = crop if is_training else "center"
        self.flip_p = flip_p if is_training else 0.0
        self.conditional_dropout = conditional_dropout if is_training else 0.0
        self.shuffle_tags = shuffle_tags and is_training
        self.keep_tags = keep_tags
        self.loss_weight = loss_weight if is_training else 1.0
        self.on_bad_image = on_bad_image
        self.seed = seed
        self.as_bytes = False
        self.shards = expand_shards(shards)
        self.names = shard_names(self.shards)
        self._resample = resample_filter(interpolation)
        self._files = ShardFiles(self.shards, shard_cache_dir or DEFAULT_CACHE_DIR, shard_cache_gib)
        self._row = ShardRow(len(self.shards), self._count, seed, shuffle_shards, shuffle=is_training)
        self._counts: dict[int, int] = {}
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._length: int | None = None
        self._planned: tuple[int, npt.NDArray[np.int32]] | None = None

    def _check(self, **given: Any) -> None:
        problems: list[str] = []
        size = given["size"]
        if size is not None and (not _is_whole(size) or size < 8 or size % 8):
            problems.append(f"size {size!r} is not allowed; give a multiple of 8 (pixels), such as 512, or null")
        for key in ("repeats", "exposures_per_epoch", "shuffle_shards"):
            value = given[key]
            if not (_is_whole(value) and value >= 1) and not (value is None and key == "exposures_per_epoch"):
                problems.append(f"{key} {value!r} is not allowed; give a whole number of at least 1")
        for key in ("flip_p", "conditional_dropout"):
            if not 0 <= given[key] <= 1:
                problems.append(f"{key} {given[key]!r} is not allowed; give a probability from 0 to 1")
        if not _is_whole(given["keep_tags"]) or given["keep_tags"] < 0:
            problems.append(f"keep_tags {given['keep_tags']!r} is not allowed; give a whole number of at least 0")
        if not given["loss_weight"] >= 0:
            problems.append(f"loss_weight {given['loss_weight']!r} is not allowed; give a number of at least 0")
        if not given["shard_cache_gib"] > 0:
            problems.append(f"shard_cache_gib {given['shard_cache_gib']!r} is not allowed; give a number above 0")
        for key, choices in (
            ("set", SETS),
            ("on_bad_image", ON_BAD_IMAGE),
            ("resize_mode", RESIZE_MODES),
            ("crop", CROPS),
            ("interpolation", tuple(INTERPOLATIONS)),
        ):
            if given[key] not in choices:
                problems.append(f"{key} {given[key]!r} is unknown; choose one of {', '.join(choices)}")
        if problems:
            raise ValueError("\n".join(f"{type(self).__name__}: {problem}" for problem in problems))

    @property
    def epochs_differ(self) -> bool:
        """Whether epochs may have different numbers of batches."""
        return self.exposures_per_epoch is not None and self.set == "train" and self.resize_mode == "bucket"

    @property
    def summary_line(self) -> str:
        """What the start of a run says of this set, on one line."""
        shards = f"{len(self.shards):,} shard{'' if len(self.shards) == 1 else 's'}"
        known = "" if self.exposures_per_epoch is None else f", {sum(self._counts.values()):,} samples indexed so far"
        return f"{shards}, {len(self):,} exposures an epoch{known}"

    @property
    def known_ahead(self) -> bool:
        """Whether later epochs can be planned without fetching what they show."""
        return self.exposures_per_epoch is None

    def epoch_start(self, epoch: int) -> int:
        """Give the index of an epoch's first exposure; 0 for epoch 0."""
        return epoch * self.epoch_length(epoch) if epoch else 0

    def epoch_length(self, epoch: int) -> int:
        """Count the exposures of an epoch; all have as many."""
        if self._length is None:
            self._length = self._count_exposures()
        return self._length

    def _count_exposures(self) -> int:
        if self.exposures_per_epoch is None:
            self._know(range(len(self.shards)))
            return self._row.total() * self.repeats
        if self.set == "train":
            return self.exposures_per_epoch
        self._know_until(self.exposures_per_epoch)
        return min(self.exposures_per_epoch, sum(self._counts.values()))

    def training_sizes(self, epoch: int) -> npt.NDArray[np.int32]:
        """Give the sizes of an epoch's training pictures, fetching and indexing its shards where need be.

        Args:
            epoch: from 0.

        Returns:
            int32 (exposures, 2): width and height in pixels, in the order of the indices.

        Raises:
            ValueError: shards that cannot be trained on; a line for each problem.
            OSError: shards that cannot be fetched or read.
        """
        if self._planned is None or self._planned[0] != epoch:
            start = self.epoch_start(epoch) if self.set == "train" else 0
            self._planned = (epoch, self.sizes_between(start, start + self.epoch_length(epoch)))
        return self._planned[1]

    def sizes_between(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Give the sizes of any stretch of the row; see :meth:`training_sizes`.

        Args:
            start: index of the first exposure.
            stop: index after the last.

        Returns:
            int32 (stop - start, 2).
        """
        self._know_until(stop)
        parts = [np.empty((0, 2), dtype=np.int32)]
        needed: list[int] = []
        for shards, chosen in self._row.stretches(start, stop):
            sizes = np.concatenate([self._index(shard).sizes for shard in shards])[chosen]
            parts.append(self._to_training_sizes(sizes))
            needed += shards
        self._get_ready(needed, stop, 2 * stop - start)
        return np.concatenate(parts)

    def __len__(self) -> int:
        return self.epoch_length(0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one exposure.

        Args:
            index: the exposure, at least 0; may lie in a later epoch.

        Returns:
            ``image`` float32 (H, W, 3) in [-1, 1], or uint8 where ``as_bytes`` is set; ``caption`` str; ``path``
            str, the shard's with the picture's name in it; ``exposure`` int64 (4,), its second number the pass;
            ``loss_weight`` float32; ``training_size`` int64 (2,); ``crop`` float64 (4,); ``flip`` and
            ``dropped`` bool; ``unreadable`` str: empty, or with ``on_bad_image: skip`` why the sample could not be
            read: the item is grey then, and its ``loss_weight`` 0.

        Raises:
            UnreadableError: the sample cannot be read, and such are not skipped.
            OSError: the shard cannot be; names it.
        """
        # Outside training all epochs are alike.
        position = int(index) if self.set == "train" else int(index) % self.epoch_length(0)
        number, shard, sample = self._row.locate(position)
        held = self._index(shard)
        path = f"{public_name(self.shards[shard])}/{held.name(sample)}"
        item = item_id(f"{self.names[shard]}/{held.name(sample)}")
        key = (self.seed, number, item, 0) if self.set == "train" else (0, 0, item, 0)
        exposure = exposure_row(*key)
        dropped = self.conditional_dropout > 0 and uniform("caption_dropout", exposure) < self.conditional_dropout
        width, height = (int(side) for side in held.sizes[sample])
        training_sizes = self._to_training_sizes(held.sizes[sample : sample + 1])
        training_width, training_height = (int(side) for side in training_sizes[0])
        draws = uniform_pair("crop", exposure) if self.crop != "center" else (0.5, 0.5)
        placement = place(
            (width, height),
            (training_width, training_height),
            self.resize_mode,
            self.crop,
            draws,
            self.flip_p > 0 and uniform("flip", exposure) < self.flip_p,
        )
        weight = 0.0 if isinstance(index, Filler) else self.loss_weight
        text, unreadable = "", ""
        try:
            picture, text = self._read_sample(shard, sample)
            pixels = self._pixels(picture, path, placement)
        except OSError as error:
            unreadable = self._why_unreadable(error)
            # The plan of the epoch counts on an item here: it gets one that teaches nothing.
            pixels, weight = blank_picture(placement.size, as_bytes=True), 0.0
        if self.shuffle_tags:
            text = shuffled_tags(text, self.keep_tags, keyed_generator("tags", *key))
        return {
            **self._shown(pixels, path, placement, unreadable),
            "caption": "" if dropped else text,
            "exposure": exposure,
            "loss_weight": torch.tensor(weight, dtype=torch.float32),
            "dropped": dropped,
        }

    def read_pixels(self, path: str, placement: Placement) -> dict[str, Any]:
        """Read the pixels of a sample that is named by its path.

        Args:
            path: as items have it.
            placement: which part of the picture becomes which training picture.

        Returns:
            ``image``, ``path``, ``crop``, ``training_size`` and ``flip``, as items have them.

        Raises:
            OSError: there is no such sample, or it cannot be read.
        """
        for shard, folder in enumerate(map(public_name, self.shards)):
            if path.startswith(f"{folder}/"):
                found = np.flatnonzero(self._index(shard).names == path[len(folder) + 1 :].encode("utf-8"))
                if len(found):
                    picture, _ = self._read_sample(shard, int(found[0]))
                    return self._shown(self._pixels(picture, path, placement), path, placement)
        raise OSError(f"{path}: there is no such sample in the shards")

    def replay(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Show an exposure again, as the ledger of a run has it.

        Args:
            entry: from :func:`ldm.ledger.read_ledger`; of a run with this set's ``resize_mode`` and ``interpolation``.

        Returns:
            The item that the model was trained on: the same numbers, as long as the shard is the same.

        Raises:
            OSError: there is no such sample, or it cannot be read.
        """
        return replayed(entry, self.read_pixels)

    def _shown(
        self, pixels: npt.NDArray[np.uint8], path: str, placement: Placement, unreadable: str = ""
    ) -> dict[str, Any]:
        return {
            "image": pixels if self.as_bytes else to_unit_range(pixels),
            **placed(path, placement, unreadable),
        }

    def _why_unreadable(self, error: OSError) -> str:
        """Say why a sample cannot be read where such are skipped; else raise that."""
        if self.on_bad_image == "skip":
            return str(error)
        raise error

    def _read_sample(self, shard: int, sample: int) -> tuple[bytes, str]:
        """Read a sample's picture and caption out of its tar.

        Raises:
            UnreadableError: the tar has gone, has changed or cannot be read.
        """
        try:
            return self._read_local_or_fetched(shard, sample)
        except (OSError, ValueError) as error:
            raise UnreadableError(why_unreadable(public_name(self.shards[shard]), error)) from error

    def _read_local_or_fetched(self, shard: int, sample: int) -> tuple[bytes, str]:
        try:
            return self._read_from(self._files.local_path(shard), shard, sample)
        except FileNotFoundError:
            # Another process has just removed this copy to make room for another.
            with self._files.in_use(shard) as path:
                return self._read_from(path, shard, sample)

    def _read_from(self, path: str, shard: int, sample: int) -> tuple[bytes, str]:
        held = self._index(shard)
        self._files.check_state(shard, held, path)
        with open(path, "rb") as file:
            caption = read_caption(file, held.texts[sample])
            return read_member(file, *(int(number) for number in held.pictures[sample])), caption

    def _pixels(self, picture: bytes, path: str, placement: Placement) -> npt.NDArray[np.uint8]:
        stream = io.BytesIO(picture)
        stream.name = path  # for the message of an error
        try:
            return read_training_bytes(stream, placement, self.resize_mode, self._resample)
        except OSError as error:
            raise UnreadableError(why_unreadable(path, error)) from error

    def _count(self, shard: int) -> int:
        if shard not in self._counts:
            self._know([shard])
        return self._counts[shard]

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indices:
            self._keep(shard, self._files.index(shard))
        self._indices.move_to_end(shard)
        return self._indices[shard]

    def _keep(self, shard: int, held: ShardIndex) -> None:
        self._indices[shard] = held
        while len(self._indices) > _KEPT_INDICES:
            self._indices.popitem(last=False)

    def _to_training_sizes(self, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        if self.size is None:
            return (
                sizes if self.resize_mode != "center_crop" else np.repeat(sizes.min(axis=1, keepdims=True), 2, axis=1)
            )
        if self.resize_mode != "bucket" or not len(sizes):
            return np.full_like(sizes, self.size)
        buckets = bucket_sizes(self.size)
        return np.array(buckets, dtype=np.int32)[nearest_buckets(sizes, buckets)]

    def _know(self, shards: Sequence[int]) -> None:
        """Index shards that are not known yet, several at a time, and judge what is wrong with them."""
        new = [shard for shard in dict.fromkeys(shards) if shard not in self._counts]
        if not new:
            return
        lines: list[str] = []
        for shard, held in zip(new, self._files.indices(new), strict=True):
            if held.damage:
                lines.append(f"{public_name(self.shards[shard])}: {held.damage}; fetch or make it again")
            lines += [f"{public_name(self.shards[shard])}/{name}: {reason}" for name, reason in held.bad.items()]
            self._keep(shard, held)
            self._counts[shard] = len(held)
            if held.empty_captions and get_worker_info() is None:
                logger.warning(
                    "%s: %d samples have an empty caption", public_name(self.shards[shard]), held.empty_captions
                )
        if not lines:
            return
        if self.on_bad_image == "error":
            for shard in new:
                del self._counts[shard]
            remedy = "repair them, or train without them by setting on_bad_image: skip"
            raise ValueError("\n".join([*_name_some(lines), f"{len(lines)} samples or shards are damaged: {remedy}"]))
        if get_worker_info() is None:  # else the process that planned has said so
            for line in _name_some(lines):
                logger.warning("skipped %s", line)

    def _know_until(self, stop: int) -> None:
        """Index the shards of the first pass until their samples are as many as asked for."""
        order = [shard for group in range(self._row.groups) for shard in self._row.shards_of(0, group)]
        known = samples = 0
        while known < len(order) and samples < stop:
            wanted = math.ceil((stop - samples) * known / samples) if samples else 1
            shards = order[known : known + min(wanted, _INDEXED_AT_A_TIME)]
            self._know(shards)
            known += len(shards)
            samples += sum(self._counts[shard] for shard in shards)

    def _get_ready(self, shards: Sequence[int], stop: int, next_stop: int) -> None:
        """Fetch in the background what an epoch reads, and what the next one reads as far as there is room."""
        remote = [shard for shard in dict.fromkeys(shards) if is_url(self.shards[shard])]
        if not remote or get_worker_info() is not None:
            return
        needed = sum(self._index(shard).tar_bytes for shard in remote) / GIB
        if needed > self._files.cache_gib:
            logger.warning(
                "an epoch reads %.1f GiB of shards, and shard_cache_gib allows %g: copies are fetched over and over; "
                "raise shard_cache_gib, or lower exposures_per_epoch",
                needed,
                self._files.cache_gib,
            )
        room = int((self._files.cache_gib - needed) / (needed / len(remote)))
        following = (shard for group in self._row.groups_between(stop, next_stop) for shard in group)
        self._files.fetch_ahead([*remote, *islice((shard for shard in following if shard not in remote), max(0, room))])


def _name_some(lines: list[str]) -> list[str]:
    more = len(lines) - NAMED_SAMPLES
    return [*lines[:NAMED_SAMPLES], *([f"... and {more} more"] if more > 0 else [])]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
