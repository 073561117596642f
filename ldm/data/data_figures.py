"""The figures of a data set: what each folder, shape and caption contributes to an epoch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from ldm.data.folder_settings import FolderSettings
from ldm.data.inspection import Fate
from ldm.data.picture_header import PictureHeader
from ldm.data.scan import Picture

GROUND_TRUTH: Final = re.compile(
    r"laion|flickr|ffhq|ground[ _-]?truth|regulari[sz]ation|(?<![a-z])(reg|coco)(?![a-z])", re.IGNORECASE
)
"""What is in the names of folders that hold pictures for the model not to forget what it knows."""

_WORD: Final = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")

PASSED_OVER: Final = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "with",
        "and",
        "or",
        "to",
        "for",
        "from",
        "by",
        "is",
        "are",
        "his",
        "her",
    ]
)
"""Words that say little about pictures, which are left out of the most frequent ones."""


@dataclass(frozen=True, slots=True)
class FolderFigures:
    """What a folder holds.

    Attributes:
        folder: its path below the data root.
        pictures: number of its pictures.
        file_bytes: their files' sizes together.
        settings: its own settings.
        exposures: how often an epoch shows one of its pictures; an average where epochs differ.
        share: of an epoch's exposures, in [0, 1].
        is_ground_truth: whether its name says that it holds pictures for the model not to forget what it knows.
    """

    folder: str
    pictures: int
    file_bytes: int
    settings: FolderSettings
    exposures: Fraction
    share: float
    is_ground_truth: bool


@dataclass(frozen=True, slots=True)
class BucketFigures:
    """What is trained at one size.

    Attributes:
        size: width and height in pixels.
        pictures: number of pictures.
        upscaled: how many of them are enlarged.
        cropped: share of a picture's area that is not shown, on average.
        most_cropped: the greatest such share.
    """

    size: tuple[int, int]
    pictures: int
    upscaled: int
    cropped: float
    most_cropped: float


@dataclass(frozen=True, slots=True)
class CaptionFigures:
    """What the captions are like.

    Attributes:
        sources: pictures by where their caption stands.
        different: number of different captions.
        lengths: number of pictures by the tokens of their caption.
        words: the most frequent words, each with the number of pictures whose caption holds it.
        shared: the captions of most pictures, each with their number, if more than one.
    """

    sources: Mapping[str, int]
    different: int
    lengths: Mapping[int, int]
    words: Sequence[tuple[str, int]]
    shared: Sequence[tuple[str, int]]

    def percentile(self, share: float) -> int:
        """Give the number of tokens that this share of the pictures' captions stays within; 0 without pictures."""
        total = sum(self.lengths.values())
        passed = 0
        for length in sorted(self.lengths):
            passed += self.lengths[length]
            if passed >= share * total:
                return length
        return 0


def folder_figures(
    folder_counts: Mapping[str, int],
    pictures: Sequence[Picture],
    file_bytes: Mapping[str, int],
    settings: Mapping[str, FolderSettings],
    repeats: int,
) -> list[FolderFigures]:
    """Count what each folder holds.

    Args:
        folder_counts: the folders, also those without a picture.
        pictures: the pictures that are trained on.
        file_bytes: size of each picture's file by path.
        settings: each folder's.
        repeats: the data set's.

    Returns:
        A row for each folder.
    """
    counts = Counter(picture.folder for picture in pictures)
    sizes: Counter[str] = Counter()
    for picture in pictures:
        sizes[picture.folder] += file_bytes.get(picture.path, 0)
    own = {folder: settings.get(folder, FolderSettings()) for folder in folder_counts}
    exposures = {folder: counts[folder] * repeats * own[folder].multiply for folder in folder_counts}
    total = sum(exposures.values())
    return [
        FolderFigures(
            folder=folder,
            pictures=counts[folder],
            file_bytes=sizes[folder],
            settings=own[folder],
            exposures=Fraction(exposures[folder]),
            share=float(exposures[folder] / total) if total else 0.0,
            is_ground_truth=GROUND_TRUTH.search(folder) is not None,
        )
        for folder in folder_counts
    ]


def bucket_figures(fates: Mapping[str, Fate]) -> list[BucketFigures]:
    """Count what is trained at each size.

    Args:
        fates: what training makes of each picture, by path.

    Returns:
        A row for each size, from the tallest shape to the widest.
    """
    by_size: dict[tuple[int, int], list[Fate]] = {}
    for fate in fates.values():
        by_size.setdefault(fate.size, []).append(fate)
    return [
        BucketFigures(
            size=size,
            pictures=len(members),
            upscaled=sum(fate.scale > 1 for fate in members),
            cropped=sum(fate.cropped for fate in members) / len(members),
            most_cropped=max(fate.cropped for fate in members),
        )
        for size, members in sorted(by_size.items(), key=lambda item: (item[0][0] / item[0][1], item[0]))
    ]


def caption_figures(pictures: Sequence[Picture], lengths: Mapping[str, int], most: int = 20) -> CaptionFigures:
    """Count what the captions are like.

    Args:
        pictures: the pictures that are trained on.
        lengths: number of tokens by caption.
        most: how many words and shared captions are listed.

    Returns:
        The figures.
    """
    captions = Counter(picture.caption for picture in pictures)
    words: Counter[str] = Counter()
    by_length: Counter[int] = Counter()
    for caption, count in captions.items():
        by_length[lengths[caption]] += count
        for word in set(_WORD.findall(caption.lower())) - PASSED_OVER:
            words[word] += count
    return CaptionFigures(
        sources=dict(Counter(picture.caption_source for picture in pictures).most_common()),
        different=len(captions),
        lengths=dict(sorted(by_length.items())),
        words=sorted(words.items(), key=lambda item: (-item[1], item[0]))[:most],
        shared=[(caption, count) for caption, count in captions.most_common(most) if count > 1],
    )


def count_formats(headers: Mapping[str, PictureHeader | str]) -> dict[str, int]:
    """Count the pictures of each format, by its name; those that cannot be read are not counted."""
    return dict(Counter(header.format for header in headers.values() if not isinstance(header, str)).most_common())
