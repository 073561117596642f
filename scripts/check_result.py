"""What a check of a data set has found out, and its form for machines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ldm.data.data_figures import BucketFigures, CaptionFigures, FolderFigures
from ldm.data.inspection import Fate, Finding, exit_status
from ldm.data.picture_header import PictureHeader
from ldm.data.scan import Picture

JSON_FORMAT = 1
"""Raised when a key changes its meaning or goes."""


@dataclass(frozen=True)
class DataSettings:
    """What a configuration says about the training set.

    Attributes:
        bases: the YAML files.
        assumed: whether no YAML was named, so that these are the shipped ones.
        data_root: the folder.
        size: side of the training picture in pixels, or None: each picture's own.
        resize_mode: how pictures are brought to that size.
        crop: where they are cut.
        repeats: showings of a picture in an epoch.
        recursive: whether folders below folders are read.
        batch_size: pictures in a batch of one device.
        devices: number of devices.
        accumulate: batches to an optimiser step.
        epochs: that the run is limited to, or None.
        max_steps: optimiser steps that the run is limited to, or None.
    """

    bases: Sequence[str]
    assumed: bool
    data_root: str
    size: int | None
    resize_mode: str
    crop: str
    repeats: int
    recursive: bool
    batch_size: int
    devices: int
    accumulate: int
    epochs: int | None
    max_steps: int | None


@dataclass(frozen=True)
class Steps:
    """How many steps training takes.

    Attributes:
        training: batches on each device, of the first epochs; one figure where all epochs are alike.
        exposures: pictures shown, likewise.
        total: optimiser steps of the whole run; None where nothing limits it.
        validation: batches of a validation on each device; 0 without one.
        batches: batches of each size in the first epoch, of all devices together.
    """

    training: Sequence[int]
    exposures: Sequence[int]
    total: int | None
    validation: int
    batches: Mapping[tuple[int, int], int]


@dataclass(frozen=True)
class CaptionTokens:
    """What the text encoder gets of captions.

    Attributes:
        room: tokens of a caption that are trained on.
        lengths: number of tokens by caption.
        cut: by caption, the words that are lost.
        split: the words that take several tokens (``"dah|lia"``), most frequent first, each with the number of
            pictures whose caption holds it.
    """

    room: int
    lengths: Mapping[str, int]
    cut: Mapping[str, str]
    split: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class CheckResult:
    """A check of a data set.

    Attributes:
        settings: what it was checked for.
        decoded: whether every pixel was decoded.
        pictures: the pictures below the data root that are trained on or would be.
        headers: by path, a picture's header, or why there is none.
        fates: by path, what training makes of it.
        findings: what is the matter, sorted.
        folders: figures.
        buckets: figures.
        captions: figures.
        tokens: what the text encoder gets.
        formats: number of pictures by format.
        file_bytes: sizes of the pictures' files together.
        steps: or None where training would not start.
        seconds: what the check took.
    """

    settings: DataSettings
    decoded: bool
    pictures: Sequence[Picture]
    headers: Mapping[str, PictureHeader | str]
    fates: Mapping[str, Fate]
    findings: Sequence[Finding]
    folders: Sequence[FolderFigures]
    buckets: Sequence[BucketFigures]
    captions: CaptionFigures
    tokens: CaptionTokens
    formats: Mapping[str, int]
    file_bytes: int
    steps: Steps | None
    seconds: float

    @property
    def status(self) -> int:
        """The exit status: 0 clean, 1 warnings, 2 errors."""
        return exit_status(self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by severity."""
        severities = [one.severity for one in self.findings]
        return {severity: severities.count(severity) for severity in ("error", "warning", "note")}

    def below_root(self, path: str) -> str:
        """Shorten a path to its part below the data root."""
        return path.removeprefix(os.path.join(self.settings.data_root, ""))

    def without_root(self, text: str) -> str:
        """Shorten the paths in a text likewise."""
        return text.replace(os.path.join(self.settings.data_root, ""), "")

    def balance(self) -> tuple[Fraction, Fraction] | None:
        """Compare an epoch's exposures of new pictures and of ground truth; None where there is but one of them."""
        new = sum((row.exposures for row in self.folders if not row.is_ground_truth), Fraction(0))
        old = sum((row.exposures for row in self.folders if row.is_ground_truth), Fraction(0))
        return (new, old) if new and old else None

    def to_json(self) -> dict[str, Any]:
        """Give everything as plain containers."""
        return {
            "format": JSON_FORMAT,
            "status": self.status,
            "data_root": self.settings.data_root,
            "decoded": self.decoded,
            "settings": {
                "base": list(self.settings.bases),
                **{
                    key: getattr(self.settings, key)
                    for key in ("size", "resize_mode", "crop", "repeats", "recursive", "batch_size", "devices")
                },
            },
            "figures": self._figures(),
            "findings": [
                {
                    "path": one.path,
                    "severity": one.severity,
                    "kind": one.kind,
                    "reason": one.reason,
                    "remedy": one.remedy,
                    "others": list(one.others),
                }
                for one in self.findings
            ],
            "pictures": [self._picture(picture) for picture in self.pictures],
        }

    def _figures(self) -> dict[str, Any]:
        balance = self.balance()
        return {
            "pictures": len(self.pictures),
            "bytes": self.file_bytes,
            "formats": dict(self.formats),
            "findings": self.counts,
            "folders": [
                {
                    "folder": row.folder,
                    "pictures": row.pictures,
                    "bytes": row.file_bytes,
                    "multiply": str(row.settings.multiply),
                    "flip_p": row.settings.flip_p,
                    "conditional_dropout": row.settings.conditional_dropout,
                    "loss_weight": row.settings.loss_weight,
                    "exposures": float(row.exposures),
                    "share": row.share,
                    "is_ground_truth": row.is_ground_truth,
                }
                for row in self.folders
            ],
            "balance": None if balance is None else {"new": float(balance[0]), "ground_truth": float(balance[1])},
            "buckets": [
                {
                    "size": list(row.size),
                    "pictures": row.pictures,
                    "batches": None if self.steps is None else self.steps.batches.get(row.size, 0),
                    "upscaled": row.upscaled,
                    "cropped": row.cropped,
                    "most_cropped": row.most_cropped,
                }
                for row in self.buckets
            ],
            "steps": None
            if self.steps is None
            else {
                "training": list(self.steps.training),
                "exposures": list(self.steps.exposures),
                "total": self.steps.total,
                "validation": self.steps.validation,
            },
            "captions": {
                "sources": dict(self.captions.sources),
                "different": self.captions.different,
                "token_limit": self.tokens.room,
                "tokens": {str(length): count for length, count in self.captions.lengths.items()},
                "words": [list(pair) for pair in self.captions.words],
                "split_words": [list(pair) for pair in self.tokens.split],
                "shared": [list(pair) for pair in self.captions.shared],
            },
        }

    def _picture(self, picture: Picture) -> dict[str, Any]:
        record: dict[str, Any] = {
            "path": picture.path,
            "folder": picture.folder,
            "caption": picture.caption,
            "caption_source": picture.caption_source,
            "tokens": self.tokens.lengths[picture.caption],
            "cut": self.tokens.cut.get(picture.caption),
        }
        header = self.headers.get(picture.path)
        if isinstance(header, PictureHeader):
            record |= {
                "width": header.width,
                "height": header.height,
                "format": header.format,
                "bytes": header.file_bytes,
            }
        fate = self.fates.get(picture.path)
        if fate is not None:
            record |= {
                "trained_size": list(fate.size),
                "box": list(fate.box),
                "scale": fate.scale,
                "cropped": fate.cropped,
            }
        return record
