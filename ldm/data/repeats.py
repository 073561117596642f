"""How often each picture is shown in which epoch, where folders may be shown fractions of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ShownFolder:
    """The pictures of one folder and how often an epoch shows them.

    Attributes:
        pictures: int64 (n,), their numbers in the data set, in the order in which their turns come.
        rate: showings of a picture in an epoch, on average: repeats times the folder's multiplier.
    """

    pictures: npt.NDArray[np.int64]
    rate: Fraction

    def showings_before(self, epoch: int) -> int:
        """Count the folder's exposures in all epochs before one."""
        return -(-len(self.pictures) * epoch * self.rate.numerator // self.rate.denominator)

    def times_before(self, epoch: int) -> npt.NDArray[np.int64]:
        """Count, for each picture, its showings in all epochs before one.

        After ``E`` epochs no picture has had more than one showing more than another, and wherever ``E`` times
        the rate is whole, each has had exactly that many.
        """
        whole, rest = divmod(epoch * self.rate.numerator, self.rate.denominator)
        ahead = -(-len(self.pictures) * rest // self.rate.denominator)
        return whole + (np.arange(len(self.pictures)) < ahead)


class Repeats:
    """Numbers the exposures of all epochs, folder by folder rates and all.

    In an epoch come first the pictures in their order, each that is shown at all; then, again in their order,
    those that are shown a second time; and so on.

    Args:
        folders: the folders; together they hold every picture number from 0 up once.

    Attributes:
        epochs_differ: whether some epochs show other pictures than others, or differ in length.
        period: after how many epochs the pictures that are shown are the same again; 1 where epochs do not differ.

    Raises:
        ValueError: some epochs would show no picture at all.
    """

    def __init__(self, folders: Sequence[ShownFolder]) -> None:
        self.folders = [folder for folder in folders if len(folder.pictures)]
        self.pictures = sum(len(folder.pictures) for folder in self.folders)
        rates = {folder.rate for folder in self.folders}
        self.period = math.lcm(*(rate.denominator for rate in rates))
        self.epochs_differ = self.period > 1
        self._repeats = int(rates.pop()) if len(rates) == 1 and not self.epochs_differ else None
        if not any(len(folder.pictures) * folder.rate >= 1 for folder in self.folders):
            raise ValueError("some epochs would show no picture at all; raise repeats, or the folders' multiply")
        self._last: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def start(self, epoch: int) -> int:
        """Give the number of an epoch's first exposure."""
        return sum(folder.showings_before(epoch) for folder in self.folders)

    def length(self, epoch: int) -> int:
        """Count the exposures of an epoch."""
        return self.start(epoch + 1) - self.start(epoch)

    def locate(self, exposure: int) -> tuple[int, int, int]:
        """Find the epoch of an exposure, which of its picture's showings there it is, and the picture's number."""
        epoch = self._epoch_of(exposure)
        position = exposure - self.start(epoch)
        if self._repeats is not None:
            repeat, picture = divmod(position, self.pictures)
            return epoch, repeat, picture
        repeats, pictures = self._expand(epoch)
        return epoch, int(repeats[position]), int(pictures[position])

    def shown(self, epoch: int) -> npt.NDArray[np.int64]:
        """List the numbers of the pictures that an epoch shows, one for each exposure, int64 (exposures,)."""
        if self._repeats is not None:
            return np.tile(np.arange(self.pictures), self._repeats)
        return self._expand(epoch)[1]

    def _epoch_of(self, exposure: int) -> int:
        if self._repeats is not None:
            return exposure // (self.pictures * self._repeats)
        low, high = 0, 1
        while self.start(high) <= exposure:
            low, high = high, 2 * high
        while high - low > 1:  # start(low) <= exposure < start(high)
            middle = (low + high) // 2
            low, high = (middle, high) if self.start(middle) <= exposure else (low, middle)
        return low

    def _expand(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """List repeat and picture number of each exposure of an epoch; the last list is kept."""
        if self._last is not None and self._last[0] == epoch:
            return self._last[1:]
        times = np.zeros(self.pictures, dtype=np.int64)
        for folder in self.folders:
            times[folder.pictures] = folder.times_before(epoch + 1) - folder.times_before(epoch)
        rounds = [np.flatnonzero(times > repeat) for repeat in range(times.max(initial=0))]
        repeats = np.repeat(np.arange(len(rounds)), [len(numbers) for numbers in rounds])
        self._last = (epoch, repeats, np.concatenate(rounds))
        return self._last[1:]
