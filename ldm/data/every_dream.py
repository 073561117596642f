"""The training set: a folder of subfolders of pictures whose file names are their captions."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch.utils.data import Dataset

from ldm.data.image_transform import (
    find_broken_pictures,
    read_picture,
    resample_filter,
    resolve_resize_mode,
    to_training_array,
)
from ldm.data.scan import Picture, scan_data_root
from ldm.exposure import exposure_row, item_id, uniform

logger = logging.getLogger(__name__)

SETS: Final = ("train", "val", "validation", "test")
ON_BAD_IMAGE: Final = ("error", "skip")


class EveryDreamBatch(Dataset[dict[str, Any]]):
    """Captioned pictures from one layer of subfolders.

    An index names an exposure: ``epoch, position = divmod(index, len(self))`` and
    ``repeat, picture = divmod(position, number of pictures)``, so indices beyond the length are the
    showings of later epochs, and whatever is random about an item follows from its index and the seed.
    The files are named once, here; workers get the list and do not read the folder again.

    Args:
        data_root: folder that holds subfolders of pictures.
        size: side of the square training pictures in pixels, a multiple of 8; None keeps each picture's own.
        set: ``"train"``; or ``"val"``, ``"validation"``, ``"test"``: each picture once, without flip or
            caption dropout, the same in every epoch.
        repeats: how often a training epoch shows each picture, at least 1.
        interpolation: resampling filter: ``linear``, ``bilinear``, ``bicubic`` or ``lanczos``.
        flip_p: probability in [0, 1] that a training picture is mirrored left to right.
        center_crop: True is the older way to say ``resize_mode: center_crop``.
        resize_mode: ``squash`` (the default; stretches to the square) or ``center_crop`` (cuts out the middle
            square first).
        conditional_dropout: probability in [0, 1] that a training caption is replaced by the empty prompt.
        on_bad_image: what the check before training does about pictures that cannot be read: ``error``
            ends the run, ``skip`` leaves them out; both name all of them.
        seed: the run's seed.

    Attributes:
        pictures: the pictures (``ldm.data.scan.Picture``), sorted by folder and file name.
        folder_counts: number of pictures by subfolder.
        left_out: other files, by their path below ``data_root``.
        hidden: hidden files and what file managers leave behind, likewise.
        skipped: reason by path of the broken pictures that were left out.

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
        try:
            self._resample = resample_filter(interpolation)
        except ValueError as error:
            problems.append(str(error))
        try:
            self.resize_mode = resolve_resize_mode(resize_mode, center_crop)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(f"{type(self).__name__}: {problem}" for problem in problems))

        self.data_root = data_root
        self.size = size
        self.set = set
        self.repeats = repeats if set == "train" else 1
        self.flip_p = flip_p if set == "train" else 0.0
        self.conditional_dropout = conditional_dropout if set == "train" else 0.0
        self.on_bad_image = on_bad_image
        self.seed = seed

        scan = scan_data_root(data_root)
        if scan.problems:
            # The folder has to be put right anyway: name what else would stop the next attempt.
            broken = find_broken_pictures([picture.path for picture in scan.pictures])
            lines = broken_picture_lines(broken, len(scan.pictures)) if on_bad_image == "error" else []
            raise ValueError("\n".join(scan.problems + lines))
        self.pictures = scan.pictures
        self.folder_counts = scan.folder_counts
        self.left_out = scan.left_out
        self.hidden = scan.hidden
        self.skipped: dict[str, str] = {}

    @property
    def empty_captions(self) -> list[str]:
        """Pictures without a caption (nothing precedes the first underscore), by path."""
        return [picture.path for picture in self.pictures if not picture.caption]

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

    def __len__(self) -> int:
        return len(self.pictures) * self.repeats

    def locate(self, index: int) -> tuple[int, int, Picture]:
        """Find what an index names: the epoch, which of the picture's showings in it, and the picture."""
        epoch, position = divmod(index, len(self))
        repeat, number = divmod(position, len(self.pictures))
        return epoch, repeat, self.pictures[number]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one exposure.

        Args:
            index: the exposure, at least 0; may lie beyond the length (later epochs).

        Returns:
            ``image`` float32 (H, W, 3) in [-1, 1]; ``caption`` str; ``exposure`` int64 (4,); ``path`` str.
        """
        epoch, repeat, picture = self.locate(index)
        item = item_id(picture.relative_path)
        # Outside training the key is the picture alone, so that epochs and runs compare.
        key = (self.seed, epoch, item, repeat) if self.set == "train" else (0, 0, item, 0)
        exposure = exposure_row(*key)
        flip = self.flip_p > 0 and uniform("flip", exposure) < self.flip_p
        drop = self.conditional_dropout > 0 and uniform("caption_dropout", exposure) < self.conditional_dropout
        return {
            "image": to_training_array(read_picture(picture.path), self.size, self.resize_mode, self._resample, flip),
            "caption": "" if drop else picture.caption,
            "exposure": exposure,
            "path": picture.path,
        }


def check_pictures(datasets: Iterable[tuple[str, EveryDreamBatch]]) -> None:
    """Decode every picture of some data sets once, before a run trains on them.

    Args:
        datasets: each data set with the key path of its ``on_bad_image``, for the message.

    Raises:
        ValueError: pictures cannot be read and not every set that holds them skips such; names all of them.
    """
    named = list(datasets)
    paths = dict.fromkeys(picture.path for _, dataset in named for picture in dataset.pictures)
    started = time.monotonic()
    broken = find_broken_pictures(list(paths))
    seconds = time.monotonic() - started
    logger.info("checked %d %s in %.1f s", len(paths), "picture" if len(paths) == 1 else "pictures", seconds)
    if not broken:
        return
    fatal: dict[str, str] = {}
    keys: list[str] = []
    for key, dataset in named:
        if dataset.on_bad_image == "error":
            keys.append(key)
            fatal |= {picture.path: broken[picture.path] for picture in dataset.pictures if picture.path in broken}
    if fatal:
        raise ValueError("\n".join(broken_picture_lines(fatal, len(paths), keys)))
    for path, reason in broken.items():
        logger.warning("skipped %s: %s", path, reason)
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
    return [f"{path}: {reason}" for path, reason in broken.items()] + [
        f"{len(broken)} of {checked} pictures cannot be read: {remedy}"
    ]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
