"""The training set: a folder of subfolders of pictures whose file names are their captions."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.aspects import bucket_sizes, nearest_buckets
from ldm.data.captions import shuffled_tags
from ldm.data.exposure_set import Filler
from ldm.data.image_transform import (
    CROPS,
    Placement,
    find_broken_pictures,
    place,
    read_training_bytes,
    resample_filter,
    resolve_resize_mode,
    to_unit_range,
)
from ldm.data.items import DataGoneError, UnreadableError, blank_picture, on_one_line, placed, replayed, why_unreadable
from ldm.data.latent_cache import LatentCache, View, resolve_mode
from ldm.data.picture_header import PictureHeader, read_headers
from ldm.data.repeats import Repeats, ShownFolder
from ldm.data.scan import FolderSettings, Picture, scan_data_root
from ldm.exposure import exposure_row, item_id, keyed_generator, uniform, uniform_pair

logger = logging.getLogger(__name__)

SETS: Final = ("train", "val", "validation", "test")
ON_BAD_IMAGE: Final = ("error", "skip")
MOST_DECODED: Final = 20_000
"""How many pictures the check before training decodes; of more it reads the headers alone."""
CENTRE: Final = (0.5, 0.5)
"""What the two draws of a crop are where it lies in the middle."""


@dataclass(frozen=True, slots=True)
class Showing:
    """One exposure of a picture, before its pixels are read.

    Attributes:
        picture: the picture.
        exposure: int64 (4,): what its random draws are keyed by.
        epoch: the epoch, from 0.
        repeat: which of the picture's showings in the epoch, from 0.
        caption: what the model is told; empty where it is dropped.
        dropped: the caption is replaced by the empty prompt.
        placement: training size, crop box and flip.
        loss_weight: what the picture counts in the loss.
    """

    picture: Picture
    exposure: Tensor
    epoch: int
    repeat: int
    caption: str
    dropped: bool
    placement: Placement
    loss_weight: float


class EveryDreamBatch(Dataset[dict[str, Any]]):
    """Captioned pictures from one layer of subfolders, each epoch showing each of them ``repeats`` times.

    An :class:`~ldm.data.exposure_set.ExposureSet`: an index names an exposure, indices beyond the length are
    the showings of later epochs, and whatever is random about an item follows from its index and the seed. Where
    no folder has a multiplier, ``epoch, position = divmod(index, len(self))`` and ``repeat, picture =
    divmod(position, number of pictures)``. The files are named once, here; workers get the list and do not read
    the folder again.

    Args:
        data_root: folder that holds subfolders of pictures.
        size: pixels, a multiple of 8: a training picture has at most the area of a square of this side; None keeps
            each picture's own size.
        set: ``"train"``; or ``"val"``, ``"validation"``, ``"test"``: each picture once, without flip, random crop,
            tag shuffling or caption dropout, the same in every epoch.
        repeats: how often a training epoch shows each picture, at least 1; a folder's multiplier comes on top.
        interpolation: resampling filter: ``linear``, ``bilinear``, ``bicubic`` or ``lanczos``.
        flip_p: probability in [0, 1] that a training picture is mirrored left to right.
        center_crop: True is the older way to say ``resize_mode: center_crop``.
        resize_mode: ``bucket`` (the default: the shape of :func:`ldm.data.aspects.bucket_sizes` that is nearest to
            the picture's, which is cut as little as possible), ``center_crop`` (cuts the middle square out) or
            ``squash`` (stretches to the square, as the first trainer did).
        conditional_dropout: probability in [0, 1] that a training caption is replaced by the empty prompt.
        on_bad_image: what is done about pictures that cannot be read: ``error`` ends the run, ``skip`` leaves out
            those that the check before training finds, both naming all of them; what breaks later ends the run
            too, or gives items that count nothing.
        seed: the run's seed.
        crop: where a bucket's crop lies in a training picture: ``center``, ``random`` (anywhere) or ``jitter``
            (near the centre).
        recursive: also take pictures in folders below the subfolders.
        shuffle_tags: draw the order of a training caption's comma-separated tags anew at each showing.
        keep_tags: how many of the first tags keep their places then.
        cache_latents: ``disk`` or ``memory`` encodes every picture once before training, and then reads its latents
            instead; ``off`` encodes it at each showing.
        cache_crops: how many crops of a picture ``random`` and ``jitter`` have to choose from where latents are cached.
        cache_dir: folder for ``disk``, which runs share; it can be deleted at any time but during a run.

    Attributes:
        pictures: the pictures (``ldm.data.scan.Picture``), sorted by folder and file name.
        folder_counts: number of pictures by subfolder.
        folder_settings: what a folder's own files say, by folder, where they say something.
        switched_off: number of pictures by subfolder that a multiplier of 0 leaves out.
        left_out: other files, by their path below ``data_root``.
        orphans: captions without a picture, likewise.
        scan_warnings: what may not be as it was meant in the folders, a line each.
        hidden: hidden files and what file managers leave behind, likewise.
        skipped: reason by path of the broken pictures that were left out.
        latent_cache: the cached latents, or None where ``cache_latents`` is ``off``.
        as_bytes: hand pictures on as uint8 in 0..255, for a loader that scales them itself.

    Raises:
        ValueError: an argument out of range, or a folder that cannot be trained on; a line for each problem.
        OSError: ``data_root`` does not exist or is a file.
    """

    def __init__(
        self,
        data_root: str,
        size: int | None = 512,
        set: str = "train",
        repeats: int = 10,
        interpolation: str = "bicubic",
        flip_p: float = 0.0,
        center_crop: bool = False,
        resize_mode: str | None = None,
        conditional_dropout: float = 0.0,
        on_bad_image: str = "error",
        seed: int = 23,
        crop: str = "center",
        recursive: bool = False,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        cache_latents: str | bool = "off",
        cache_crops: int = 4,
        cache_dir: str = "latent_cache",
    ) -> None:
        problems: list[str] = []
        if size is not None and (not _is_whole(size) or size < 8 or size % 8):
            problems.append(f"size {size!r} is not allowed; give a multiple of 8 (pixels), such as 512, or null")
        if set not in SETS:
            problems.append(f"set {set!r} is unknown; choose one of {', '.join(SETS)}")
        if not _is_whole(repeats) or repeats < 1:
            problems.append(f"repeats {repeats!r} is not allowed; give a whole number of at least 1")
        for key, probability in (("flip_p", flip_p), ("conditional_dropout", conditional_dropout)):
            if not 0 <= probability <= 1:
                problems.append(f"{key} {probability!r} is not allowed; give a probability from 0 to 1")
        if on_bad_image not in ON_BAD_IMAGE:
            problems.append(f"on_bad_image {on_bad_image!r} is unknown; choose one of {', '.join(ON_BAD_IMAGE)}")
        if crop not in CROPS:
            problems.append(f"crop {crop!r} is unknown; choose one of {', '.join(CROPS)}")
        if not _is_whole(keep_tags) or keep_tags < 0:
            problems.append(f"keep_tags {keep_tags!r} is not allowed; give a whole number of at least 0")
        if not _is_whole(cache_crops) or cache_crops < 1:
            problems.append(f"cache_crops {cache_crops!r} is not allowed; give a whole number of at least 1")
        try:
            cache_mode = resolve_mode(cache_latents)
        except ValueError as error:
            problems.append(str(error))
        try:
            self._resample = resample_filter(interpolation)
        except ValueError as error:
            problems.append(str(error))
        try:
            self.resize_mode = resolve_resize_mode(resize_mode, center_crop)
        except ValueError as error:
            problems.append(str(error))
        if crop in CROPS[1:] and getattr(self, "resize_mode", "bucket") != "bucket":
            problems.append(
                f"crop {crop!r} has no effect with resize_mode {self.resize_mode!r}; write resize_mode: bucket"
            )
        if problems:
            raise ValueError("\n".join(f"{type(self).__name__}: {problem}" for problem in problems))

        is_training = set == "train"
        self.data_root = data_root
        self.size = size
        self.set = set
        self.repeats = repeats if is_training else 1
        self.flip_p = flip_p if is_training else 0.0
        self.conditional_dropout = conditional_dropout if is_training else 0.0
        self.crop = crop if is_training else "center"
        self.shuffle_tags = shuffle_tags and is_training
        self.keep_tags = keep_tags
        self.on_bad_image = on_bad_image
        self.seed = seed
        self.as_bytes = False
        self.cache_crops = cache_crops
        self.latent_cache: LatentCache | None = None
        if cache_mode != "off":
            transform = f"{self.resize_mode} {self._resample.name}"
            self.latent_cache = LatentCache(
                cache_mode, cache_dir, self.views, self.read_view, transform, skip=on_bad_image == "skip"
            )

        scan = scan_data_root(data_root, recursive)
        if scan.problems:
            # The folder has to be put right anyway: name what else would stop the next attempt.
            broken = find_broken_pictures([picture.path for picture in scan.pictures])
            keys = [f"data.params.{split}.params.on_bad_image" for split in ("train", "validation")]
            lines = broken_picture_lines(broken, len(scan.pictures), keys) if on_bad_image == "error" else []
            raise ValueError("\n".join(scan.problems + lines))
        self.pictures = scan.pictures
        self.folder_counts = scan.folder_counts
        self.folder_settings = scan.folder_settings
        self.switched_off = scan.switched_off
        self.left_out = scan.left_out
        self.orphans = scan.orphans
        self.scan_warnings = scan.warnings
        self.hidden = scan.hidden
        self.skipped: dict[str, str] = {}

    @property
    def empty_captions(self) -> list[str]:
        """Pictures whose names give no caption (nothing precedes the first underscore), by path."""
        return [
            picture.path for picture in self.pictures if not picture.caption and picture.caption_source == "file name"
        ]

    @property
    def epochs_differ(self) -> bool:
        """Whether a folder's fractional multiplier makes epochs differ in what they show."""
        return self._showings.epochs_differ

    @property
    def epochs_repeat_after(self) -> int:
        """After how many epochs the same pictures are shown again; 1 where all epochs show the same."""
        return self._showings.period

    def leave_out(self, broken: Mapping[str, str]) -> None:
        """Take pictures out of the set, before its first use.

        Args:
            broken: reason by path; paths that are not in this set are passed over.

        Raises:
            ValueError: no picture would be left.
        """
        kept = [picture for picture in self.pictures if picture.path not in broken]
        if not kept:
            raise ValueError(
                f"{self.data_root}: no picture in it can be read (of {len(self.pictures)}); put sound ones there"
            )
        for picture in self.pictures:
            if picture.path in broken:
                self.skipped[picture.path] = broken[picture.path]
                self.folder_counts[picture.folder] -= 1
        self.pictures = kept
        for derived in ("_showings", "source_sizes", "picture_sizes"):
            self.__dict__.pop(derived, None)

    # --- exposures ------------------------------------------------------------------------------------------

    @cached_property
    def _showings(self) -> Repeats:
        """Which exposure is which picture's; a folder's pictures take turns in an order of their own."""
        by_folder: dict[str, list[int]] = {}
        for number, picture in enumerate(self.pictures):
            by_folder.setdefault(picture.folder, []).append(number)
        folders = []
        for folder, numbers in by_folder.items():
            multiply = self._settings(folder).multiply if self.set == "train" else Fraction(1)
            turns = sorted(numbers, key=lambda number: item_id(self.pictures[number].relative_path))
            folders.append(ShownFolder(np.array(turns), self.repeats * multiply))
        try:
            return Repeats(folders)
        except ValueError as error:
            raise ValueError(f"{self.data_root}: {error}") from error

    def _settings(self, folder: str) -> FolderSettings:
        return self.folder_settings[folder]

    def _flip_p(self, folder: str) -> float:
        own = self._settings(folder).flip_p
        return self.flip_p if own is None or self.set != "train" else own

    def __len__(self) -> int:
        return self._showings.length(0)

    def epoch_start(self, epoch: int) -> int:
        """Give the index of an epoch's first exposure."""
        return self._showings.start(epoch)

    def epoch_length(self, epoch: int) -> int:
        """Count the exposures of an epoch."""
        return self._showings.length(epoch)

    def training_sizes(self, epoch: int) -> npt.NDArray[np.int32]:
        """Give width and height of each of an epoch's training pictures, int32 (exposures, 2)."""
        return self.picture_sizes[self._showings.shown(epoch)]

    @cached_property
    def source_sizes(self) -> npt.NDArray[np.int32]:
        """Width and height of each upright picture in pixels, int32 (pictures, 2), from the files' headers.

        Raises:
            ValueError: some cannot be read; names all of them.
        """
        headers = read_headers([picture.path for picture in self.pictures])
        broken = {path: header for path, header in headers.items() if isinstance(header, str)}
        if broken:
            raise ValueError("\n".join(broken_picture_lines(broken, len(self.pictures))))
        return self._sizes_in(headers)

    def know_headers(self, headers: Mapping[str, PictureHeader | str]) -> None:
        """Take the pictures' sizes from headers that are read already, of all of them, by path."""
        self.source_sizes = self._sizes_in(headers)

    def _sizes_in(self, headers: Mapping[str, PictureHeader | str]) -> npt.NDArray[np.int32]:
        found = [headers[picture.path] for picture in self.pictures]
        return np.array([(header.width, header.height) for header in found], dtype=np.int32)  # type: ignore[union-attr]

    @cached_property
    def picture_sizes(self) -> npt.NDArray[np.int32]:
        """Width and height of each picture's training picture, int32 (pictures, 2)."""
        sources = self.source_sizes  # also where they do not matter here: read before there are loader processes
        if self.size is None:
            return sources
        if self.resize_mode != "bucket":
            return np.full_like(sources, self.size)
        buckets = bucket_sizes(self.size)
        return np.array(buckets, dtype=np.int32)[nearest_buckets(sources, buckets)]

    def locate(self, index: int) -> tuple[int, int, Picture]:
        """Find what an index names: the epoch, which of the picture's showings in it, and the picture."""
        epoch, repeat, number = self._showings.locate(index)
        return epoch, repeat, self.pictures[number]

    def showing(self, index: int) -> Showing:
        """Work out everything about an exposure but its pixels.

        Args:
            index: the exposure, at least 0; may lie beyond the length (later epochs).
        """
        epoch, repeat, number = self._showings.locate(index)
        picture = self.pictures[number]
        settings = self._settings(picture.folder)
        item = item_id(picture.relative_path)
        # Outside training the key is the picture alone, so that epochs and runs compare.
        is_training = self.set == "train"
        key = exposure_row(self.seed, epoch, item, repeat) if is_training else exposure_row(0, 0, item, 0)
        flip_p, dropout = self._flip_p(picture.folder), self.conditional_dropout
        if is_training:
            dropout = dropout if settings.conditional_dropout is None else settings.conditional_dropout
        dropped = dropout > 0 and uniform("caption_dropout", key) < dropout
        caption = picture.caption
        if self.shuffle_tags:
            caption = shuffled_tags(caption, self.keep_tags, keyed_generator("tags", *key.tolist()))
        flip = flip_p > 0 and uniform("flip", key) < flip_p
        placement = self._place(number, self._crop_draws(key), flip)
        weight = settings.loss_weight if is_training else 1.0
        return Showing(picture, key, epoch, repeat, "" if dropped else caption, dropped, placement, weight)

    def _place(self, number: int, draws: tuple[float, float], flip: bool) -> Placement:
        width, height = self.picture_sizes[number].tolist()
        source = tuple(self.source_sizes[number].tolist())
        size = None if self.size is None else (width, height)
        return place(source, size, self.resize_mode, self.crop, draws, flip)

    def _crop_draws(self, key: Tensor) -> tuple[float, float]:
        """Draw where an exposure's crop lies; with cached latents, which of the picture's crops it takes."""
        if self.crop == "center":
            return CENTRE
        if self.latent_cache is None:
            return uniform_pair("crop", key)
        return self._cached_crop(int(key[2]), int(uniform("cached_crop", key) * self.cache_crops))

    def _cached_crop(self, item: int, variant: int) -> tuple[float, float]:
        """Draw where one of the crops lies that a picture's cached exposures choose from."""
        return uniform_pair("crop_to_cache", exposure_row(self.seed, 0, item, variant))

    def views(self) -> Iterator[View]:
        """Give every way in which exposures may show the pictures; endlessly many where ``crop`` draws them anew."""
        for number, picture in enumerate(self.pictures):
            item = item_id(picture.relative_path)
            variants = range(self.cache_crops if self.crop != "center" else 1)
            flip_p = self._flip_p(picture.folder)
            for variant in variants:
                draws = self._cached_crop(item, variant) if self.crop != "center" else CENTRE
                for flip in (flip for flip, chance in ((False, 1 - flip_p), (True, flip_p)) if chance > 0):
                    yield View(picture.path, self._place(number, draws, flip))

    def read_view(self, view: View) -> npt.NDArray[np.uint8]:
        """Read a picture as a view shows it: uint8 (H, W, 3)."""
        return read_training_bytes(view.path, view.placement, self.resize_mode, self._resample)

    def read(self, showing: Showing) -> dict[str, Any]:
        """Read an exposure: an item of this data set."""
        return {
            **self.read_pixels(showing.picture.path, showing.placement),
            "caption": showing.caption,
            "dropped": showing.dropped,
            "exposure": showing.exposure,
            "loss_weight": torch.tensor(showing.loss_weight, dtype=torch.float32),
        }

    def read_pixels(self, path: str, placement: Placement) -> dict[str, Any]:
        """Read a picture as it is to be shown: the part of an item that does not depend on caption and key."""
        view = View(path, placement)
        return {
            **self._read_latents_or_pixels(view),
            **placed(path, placement),
        }

    def replay(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Show an exposure again, as the ledger of a run has it.

        Args:
            entry: from :func:`ldm.ledger.read_ledger`; of a run with this set's ``resize_mode`` and ``interpolation``.

        Returns:
            The item that the model was trained on: the same numbers, as long as the file is the same.

        Raises:
            OSError: the picture cannot be read.
        """
        return replayed(entry, self.read_pixels)

    def _read_latents_or_pixels(self, view: View) -> dict[str, Any]:
        if self.latent_cache is not None and self.latent_cache.is_ready:
            return {"moments": self.latent_cache.read(view)}
        pixels = self.read_view(view)
        return {"image": pixels if self.as_bytes else to_unit_range(pixels)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one exposure.

        Args:
            index: the exposure, at least 0; may lie beyond the length (later epochs). A
                :class:`~ldm.data.exposure_set.Filler` gives the same item with ``loss_weight`` 0.

        Returns:
            ``image`` float32 (H, W, 3) in [-1, 1] (uint8 in 0..255 with ``as_bytes``), or once latents are cached,
            in its place ``moments``: their mean and log-variance (2 C, H / f, W / f); ``caption`` str; ``exposure``
            int64 (4,); ``path`` str; ``loss_weight`` float32; ``training_size`` int64 (2,): width and height
            of ``image``; ``crop`` float64 (4,): left, top, right and bottom of what is shown, in pixels of the
            upright picture; ``flip`` and ``dropped`` (caption dropout) bool; ``unreadable`` str: empty, or with
            ``on_bad_image: skip`` why the picture could not be read: the item is grey then, and its ``loss_weight`` 0.

        Raises:
            UnreadableError: the picture cannot be read, and such are not skipped.
            DataGoneError: ``data_root`` is not there any more.
        """
        showing = self.showing(index)
        try:
            item = self.read(showing)
        except OSError as error:
            item = self._without_picture(showing, error)
        return {**item, "loss_weight": torch.zeros(())} if isinstance(index, Filler) else item

    def _without_picture(self, showing: Showing, error: OSError) -> dict[str, Any]:
        """Build the item of a picture that cannot be read, which counts nothing; or raise."""
        path, placement = showing.picture.path, showing.placement
        if isinstance(error, DataGoneError):
            raise error
        if isinstance(error, UnreadableError):  # its latents
            if self.on_bad_image == "error":
                raise error
            reason = str(error)
        else:
            if not os.path.isdir(self.data_root):
                raise DataGoneError(f"{self.data_root}: the folder has gone since the run began") from error
            reason = why_unreadable(path, error)
            if self.on_bad_image == "error":
                raise UnreadableError(reason) from error
        blank: dict[str, Any]
        if self.latent_cache is not None and self.latent_cache.is_ready:
            blank = {"moments": self.latent_cache.blank(View(path, placement))}
        else:
            blank = {"image": blank_picture(placement.size, self.as_bytes)}
        return {
            **blank,
            **placed(path, placement, reason),
            "caption": showing.caption,
            "dropped": showing.dropped,
            "exposure": showing.exposure,
            "loss_weight": torch.zeros(()),
        }


def check_pictures(
    datasets: Iterable[tuple[str, EveryDreamBatch]], decode: bool | None = None
) -> dict[str, PictureHeader]:
    """Look at every picture of some data sets once, before a run trains on them.

    Args:
        datasets: each data set with the key path of its ``on_bad_image``, for the message.
        decode: decode every pixel, or only read the headers; None: decode where there are no more than
            ``MOST_DECODED`` pictures.

    Returns:
        The headers of the pictures that are sound, by path.

    Raises:
        ValueError: pictures cannot be read and not every set that holds them skips such; names all of them.
    """
    named = list(datasets)
    paths = list(dict.fromkeys(picture.path for _, dataset in named for picture in dataset.pictures))
    started = time.monotonic()
    decode = len(paths) <= MOST_DECODED if decode is None else decode
    headers = read_headers(paths)
    broken = {path: header for path, header in headers.items() if isinstance(header, str)}
    if decode:
        damaged = find_broken_pictures([path for path in paths if path not in broken])
        broken = {path: damaged.get(path) or broken[path] for path in paths if path in damaged or path in broken}
    logger.info(
        "checked %s%d %s in %.1f s%s",
        "" if decode else "the headers of ",
        len(paths),
        "picture" if len(paths) == 1 else "pictures",
        time.monotonic() - started,
        "" if decode else "; scripts/check_dataset.py --decode checks every pixel",
    )
    _leave_out_or_refuse(named, broken, len(paths))
    for _, dataset in named:
        dataset.know_headers(headers)
    return {path: header for path, header in headers.items() if not isinstance(header, str) and path not in broken}


def _leave_out_or_refuse(named: Sequence[tuple[str, EveryDreamBatch]], broken: Mapping[str, str], checked: int) -> None:
    """Take broken pictures out of the sets that skip them; raise if one that does not skip them has some."""
    if not broken:
        return
    fatal: dict[str, str] = {}
    keys: list[str] = []
    for key, dataset in named:
        if dataset.on_bad_image == "error":
            keys.append(key)
            fatal |= {picture.path: broken[picture.path] for picture in dataset.pictures if picture.path in broken}
    if fatal:
        raise ValueError("\n".join(broken_picture_lines(fatal, checked, keys)))
    for path, reason in broken.items():
        logger.warning("skipped %s: %s", on_one_line(path), reason)
    for _, dataset in named:
        dataset.leave_out(broken)


def broken_picture_lines(broken: Mapping[str, str], checked: int, keys: Iterable[str] = ("on_bad_image",)) -> list[str]:
    """Word the error for pictures that cannot be read.

    Args:
        broken: reason by path.
        checked: number of pictures that these are out of.
        keys: the key paths that would skip them.

    Returns:
        A line for each picture and one with the remedy; nothing where none is broken.
    """
    if not broken:
        return []
    remedy = "repair them or move them out of the data root"
    if len(broken) < checked:
        remedy += f", or train without them by adding {' '.join(f'{key}=skip' for key in keys)} to the command"
    return [f"{on_one_line(path)}: {reason}" for path, reason in broken.items()] + [
        f"{len(broken)} of {checked} pictures cannot be read: {remedy}"
    ]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
