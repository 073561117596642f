"""Several training sets in one, at a stated ratio: new pictures and the ground truth that keeps the rest in place."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ldm.data.exposure_set import ExposureSet, Filler
from ldm.exposure import item_id, keyed_generator
from ldm.util import get_obj_from_str, instantiate_from_config

logger = logging.getLogger(__name__)

RATIO_EXAMPLE: Final = '"man 1 : laion 1"'
_SHARE: Final = re.compile(r"([^\s:,]+)\s+(\d+(?:\.\d+)?|\d+/\d+)")


@runtime_checkable
class ShuffledRow(Protocol):
    """An exposure set whose row is shuffled already, of which any stretch can be planned by itself."""

    def sizes_between(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Give the sizes of the training pictures from one index up to another, int32 (stop - start, 2)."""
        ...


def parse_ratio(ratio: str | Mapping[str, Any]) -> dict[str, Fraction]:
    """Read a mixing ratio.

    Args:
        ratio: names and shares, such as ``"man 1 : laion 1"`` or ``"man 2, laion 1.5, ffhq 1/2"``; or a mapping of
            them, which is also what YAML makes of the first one where it stands without quotes.

    Returns:
        Exposures of each set for one of the first set, by name in the order given; the first is 1.

    Raises:
        ValueError: it is no such text, a share is 0, or a name comes twice.
    """
    if not isinstance(ratio, str):
        ratio = " : ".join(
            f"{name} : {share}" if isinstance(share, str) else f"{name} {share}" for name, share in ratio.items()
        )
    shares: dict[str, Fraction] = {}
    for part in re.split("[:,]", ratio):
        found = _SHARE.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"ratio {ratio!r}: {part.strip()!r} is not a name and a number; write {RATIO_EXAMPLE}")
        name, number = found.group(1), found.group(2)
        share = Fraction(number) if not number.endswith("/0") else Fraction(0)
        if share == 0:
            raise ValueError(f"ratio {ratio!r}: {name} has no share; take it out, or give a number above 0")
        if name in shares:
            raise ValueError(f"ratio {ratio!r}: {name} comes twice; give each set one share")
        shares[name] = share
    first = next(iter(shares.values()))
    return {name: share / first for name, share in shares.items()}


class Mixture(Dataset[dict[str, Any]]):
    """Training sets mixed at a ratio, by number of exposures.

    An epoch is an epoch of the set that the ratio names first, with as many exposures of each other set as the
    ratio asks for; where that is no whole number epochs differ by one, and over epochs it is exact. The other
    sets go on in each epoch where the last one stopped, so all of a large set comes before any of it comes again.

    What is given here beside ``ratio`` and ``sets`` holds for each set that takes it and does not say otherwise
    in its own ``params``; ``repeats`` for the first set alone.

    Args:
        ratio: names and shares, such as ``"man 1 : laion 1"`` or ``{man: 1, laion: 1}``.
        sets: ``{target, params}`` of each set, by its name in the ratio.
        data_root: folder of subfolders of pictures, for the one set that needs it and names none.
        size: pixels, a multiple of 8.
        set: ``"train"``; others are validated one by one.
        repeats: how often an epoch shows each picture of the first set.
        interpolation: resampling filter.
        flip_p: probability that a picture is mirrored.
        center_crop: the older way to say ``resize_mode: center_crop``.
        resize_mode: ``bucket``, ``center_crop`` or ``squash``.
        conditional_dropout: probability that a caption is replaced by the empty prompt.
        on_bad_image: ``error`` or ``skip``.
        crop: ``center``, ``random`` or ``jitter``.
        recursive: also take pictures in folders below the subfolders.
        shuffle_tags: draw the order of a caption's tags anew at each showing.
        keep_tags: how many of the first tags keep their places then.
        cache_latents: ``off``: what is mixed in is too large to be encoded beforehand.
        cache_crops: without effect.
        cache_dir: without effect.
        seed: the run's seed. The other sets get seeds that follow from it and their names, so that pictures of
            the same name in two sets have draws of their own.

    Attributes:
        parts: the sets by name, in the order of the ratio.

    Raises:
        ValueError: a wrong ratio, or sets that cannot be built or mixed; a line for each problem.
        OSError: data that cannot be found.
    """

    def __init__(
        self,
        ratio: str | Mapping[str, Any],
        sets: Mapping[str, Mapping[str, Any]],
        data_root: str | None = None,
        size: int | None = None,
        set: str | None = None,
        repeats: int | None = None,
        interpolation: str | None = None,
        flip_p: float | None = None,
        center_crop: bool | None = None,
        resize_mode: str | None = None,
        conditional_dropout: float | None = None,
        on_bad_image: str | None = None,
        crop: str | None = None,
        recursive: bool | None = None,
        shuffle_tags: bool | None = None,
        keep_tags: int | None = None,
        cache_latents: str | bool = "off",
        cache_crops: int | None = None,
        cache_dir: str | None = None,
        seed: int = 23,
    ) -> None:
        shares = parse_ratio(ratio)
        unknown = [name for name in shares if name not in sets]
        if unknown:
            raise ValueError(
                f"ratio names {', '.join(unknown)}, which sets does not hold; it has {', '.join(sets) or 'none'}"
            )
        left_out = [name for name in sets if name not in shares]
        if left_out:
            logger.info("left out of the mixture, since ratio does not name them: %s", ", ".join(left_out))
        if set not in (None, "train"):
            raise ValueError(f"set {set!r}: a mixture is for training; validate on one set")
        cached = [
            cache_latents,
            *((config.get("params") or {}).get("cache_latents", "off") for config in sets.values()),
        ]
        if any(choice not in ("off", False) for choice in cached):  # YAML reads off without quotes as false
            raise ValueError("cache_latents: a mixture's pictures are encoded when they are shown; set it to off")
        shared = {
            "data_root": data_root,
            "size": size,
            "set": set,
            "repeats": repeats,
            "interpolation": interpolation,
            "flip_p": flip_p,
            "center_crop": center_crop,
            "resize_mode": resize_mode,
            "conditional_dropout": conditional_dropout,
            "on_bad_image": on_bad_image,
            "crop": crop,
            "recursive": recursive,
            "shuffle_tags": shuffle_tags,
            "keep_tags": keep_tags,
        }
        self.seed = seed
        self._shares = shares
        self._first = next(iter(shares))
        self._stretch: tuple[int, int, int] = (0, 0, 0)  # an epoch, its first index, and the index after its last
        configs = self._complete(sets, {key: value for key, value in shared.items() if value is not None})
        self.parts = self._build(configs)

    def _complete(self, sets: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Give each set's config what holds for all of them."""
        configs: dict[str, dict[str, Any]] = {}
        rooted: list[str] = []
        problems: list[str] = []
        for name in self._shares:
            target = sets[name].get("target")
            if not isinstance(target, str):
                problems.append(f"set {name} has no target; add target: package.module.Name")
                continue
            own = dict(sets[name].get("params") or {})
            parameters = inspect.signature(get_obj_from_str(target)).parameters
            general = {"seed": self._seed_of(name), **shared}
            if name != self._first and "repeats" in general:
                general["repeats"] = 1
            configs[name] = {
                "target": target,
                "params": {**{key: value for key, value in general.items() if key in parameters}, **own},
            }
            root = parameters.get("data_root")
            if root is not None and "data_root" not in own:
                rooted.append(name)
                if root.default is inspect.Parameter.empty and "data_root" not in shared:
                    problems.append(
                        f"set {name} has no data_root: add --data_root FOLDER, or give it one in its params"
                    )
        if len(rooted) > 1:
            problems.append(f"sets {' and '.join(rooted)}: only one can take --data_root; give the others their own")
        if problems:
            raise ValueError("\n".join(f"Mixture: {problem}" for problem in problems))
        if "data_root" in shared and not rooted:
            logger.info("the sets of the mixture have folders of their own; none of them uses %s", shared["data_root"])
        return configs

    def _seed_of(self, name: str) -> int:
        return self.seed if name == self._first else item_id(f"{self.seed}/{name}") % 2**32

    def _build(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        problems: list[str] = []
        for name, config in configs.items():
            try:
                parts[name] = instantiate_from_config(config, Dataset)
            except (ValueError, OSError) as error:
                problems += [f"set {name}: {line}" for line in str(error).splitlines()]
                continue
            if not isinstance(parts[name], ExposureSet):
                problems.append(f"set {name}: {config['target']} cannot be mixed: it does not number its exposures")
        if problems:
            raise ValueError("\n".join(problems))
        return parts

    @property
    def summary_line(self) -> str:
        """What the start of a run says of this set, on one line."""
        shown = [
            f"{stop - start:,} exposures of {name} ({type(self.parts[name]).__name__})"
            for name, start, stop in self.stretches(0)
        ]
        return f"an epoch mixes {' and '.join(shown)}"

    @property
    def pictures(self) -> list[Any]:
        """The pictures of those sets that list theirs."""
        return [picture for part in self.parts.values() for picture in getattr(part, "pictures", ())]

    @property
    def epochs_differ(self) -> bool:
        """Whether epochs may have different numbers of batches."""
        return len(self.parts) > 1 or getattr(self.parts[self._first], "epochs_differ", False)

    @property
    def known_ahead(self) -> bool:
        """Whether later epochs can be planned without fetching what they show."""
        others = (part for name, part in self.parts.items() if name != self._first)
        return getattr(self.parts[self._first], "known_ahead", True) and not any(
            isinstance(part, ShuffledRow) for part in others
        )

    @property
    def as_bytes(self) -> bool:
        """Whether pictures are handed on as uint8 in 0..255."""
        return all(getattr(part, "as_bytes", False) for part in self.parts.values())

    @as_bytes.setter
    def as_bytes(self, wanted: bool) -> None:
        for part in self.parts.values():
            part.as_bytes = wanted

    def epoch_start(self, epoch: int) -> int:
        """Give the index of an epoch's first exposure; 0 for epoch 0."""
        return sum(self._shown_before(name, epoch) for name in self.parts)

    def epoch_length(self, epoch: int) -> int:
        """Count the exposures of an epoch."""
        return self.epoch_start(epoch + 1) - self.epoch_start(epoch)

    def _shown_before(self, name: str, epoch: int) -> int:
        """Count the exposures of a set in all epochs before one."""
        return int(self._shares[name] * self.parts[self._first].epoch_start(epoch))

    def stretches(self, epoch: int) -> Iterator[tuple[str, int, int]]:
        """Say which part of each set's row an epoch shows.

        Args:
            epoch: from 0.

        Yields:
            The set's name, the position of its first exposure in its row and the one after the last.
        """
        for name in self.parts:
            yield name, self._shown_before(name, epoch), self._shown_before(name, epoch + 1)

    def training_sizes(self, epoch: int) -> npt.NDArray[np.int32]:
        """Give the sizes of an epoch's training pictures.

        Args:
            epoch: from 0.

        Returns:
            int32 (exposures, 2): width and height in pixels, in the order of the indices.
        """
        sizes = []
        for name, start, stop in self.stretches(epoch):
            part = self.parts[name]
            if name == self._first:
                sizes.append(part.training_sizes(epoch))
            elif isinstance(part, ShuffledRow):
                sizes.append(part.sizes_between(start, stop))
            else:
                sizes += self._sizes_of_folder(name, start, stop)
        return np.concatenate(sizes)

    def _sizes_of_folder(self, name: str, start: int, stop: int) -> Iterator[npt.NDArray[np.int32]]:
        part = self.parts[name]
        while start < stop:
            epoch, first, end = _epoch_at(part, start)
            order = self._order(name, epoch, end - first)
            yield part.training_sizes(epoch)[order[start - first : min(stop, end) - first]]
            start = end

    def _order(self, name: str, epoch: int, length: int) -> npt.NDArray[np.int64]:
        """Draw in which order a pass over a folder shows its pictures; its own is by name."""
        return _keyed_order(f"mixture/{name}", self.seed, epoch, length)

    def locate(self, index: int) -> tuple[str, int]:
        """Find what an index names: the set and the index in it."""
        epoch, first, end = self._stretch
        if not first <= index < end:
            epoch, first, end = self._stretch = _epoch_at(self, index)
        for name, start, stop in self.stretches(epoch):
            if index - first < stop - start:
                return name, self._own_index(name, start + index - first)
            first += stop - start
        raise AssertionError("an epoch's stretches are shorter than the epoch")

    def _own_index(self, name: str, position: int) -> int:
        """Turn a position in a set's row as it is shown into the set's index."""
        part = self.parts[name]
        if name == self._first or isinstance(part, ShuffledRow):
            return position
        epoch, first, end = _epoch_at(part, position)
        return first + int(self._order(name, epoch, end - first)[position - first])

    def __len__(self) -> int:
        return self.epoch_length(0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one exposure: an item of one of the sets; a filler of this set is one of that."""
        name, number = self.locate(int(index))
        item: dict[str, Any] = self.parts[name][Filler(number) if isinstance(index, Filler) else number]
        return {"unreadable": "", **item}  # sets of other projects do not say it, and batches need it of all or none

    def replay(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Show an exposure again, as the ledger of a run has it.

        Args:
            entry: from :func:`ldm.ledger.read_ledger`; its seed tells which set it is of.

        Returns:
            The item that the model was trained on.

        Raises:
            ValueError: no set has that seed.
            OSError: the picture cannot be read.
        """
        for part in self.parts.values():
            if part.seed == entry["seed"]:
                item: dict[str, Any] = part.replay(entry)
                return item
        raise ValueError(f"{entry['path']}: no set of this mixture has the seed {entry['seed']}")


def _epoch_at(dataset: ExposureSet, index: int) -> tuple[int, int, int]:
    """Find the epoch that an index lies in, its first index and the index after its last."""
    low, high = 0, 1
    while dataset.epoch_start(high) <= index:
        low, high = high, 2 * high
    while high - low > 1:  # the epoch is one of low to high - 1
        middle = (low + high) // 2
        low, high = (middle, high) if dataset.epoch_start(middle) <= index else (low, middle)
    return low, dataset.epoch_start(low), dataset.epoch_start(high)


@lru_cache(maxsize=16)
def _keyed_order(purpose: str, seed: int, epoch: int, length: int) -> npt.NDArray[np.int64]:
    order: npt.NDArray[np.int64] = torch.randperm(length, generator=keyed_generator(purpose, seed, epoch)).numpy()
    return order
