"""Judges a data set by its file names, headers and captions: what is wrong, with which file, and what to do."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from ldm.data.aspects import bucket_sizes, nearest_bucket
from ldm.data.captions import is_picture_name
from ldm.data.image_transform import enlargement, place
from ldm.data.picture_header import PictureHeader
from ldm.data.scan import Picture, Scan

if TYPE_CHECKING:
    from ldm.data.every_dream import EveryDreamBatch

SEVERITIES: Final = ("error", "warning", "note")
"""From the gravest: training refuses or loses something; likely not intended; handled, and good to know."""

UPSCALED: Final = math.sqrt(2)
"""Enlargement above which more than half of a training picture's pixels are not its own."""

TINY: Final = 2.0
"""Enlargement above which more than three quarters of them are not."""

TINY_SIDE: Final = 64
"""Pixels of the shorter side that a picture needs where it keeps its own size."""

EXTREME_ASPECT: Final = 3.0
"""Ratio of the sides above which a square picture shows too little or too narrow a scene."""

_ASPECT_MARGIN: Final = 1.02
_SCALE_MARGIN: Final = 1.01  # a pixel or two, which a bucket's shape may ask for

DETAILED_WORDS: Final = 8
"""Words of a caption from which on it hardly fits several pictures."""

MOSTLY: Final = 0.8
"""Share of a folder's pictures with captions of their own above which one without is likely an oversight."""

FEW: Final = 5
"""Pictures below which a folder tells nothing about what is usual in it."""

EXTENSIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jfif"),  # what some cameras write: a JPEG with further views behind it
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
}
"""The suffixes of each format, in lower case."""

OTHER_PICTURES: Final = (
    *(".gif", ".avif", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".ico", ".tga", ".ppm", ".psd"),
    *(".raw", ".dng", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".raf", ".rw2"),
)
"""Suffixes of picture files that are not trained on, so that their loss would go unseen."""

_EMPTY_CAPTION: Final = ": is empty, and so is the caption"

_SAID: Final = {
    "lies in the data root": "in_root",
    "lies deeper than": "too_deep",
    "the name is not UTF-8": "bad_name",
    "two files of this name": "bad_name",
    "holds no pictures": "no_pictures",
    "no picture is left": "no_pictures",
    "is a link": "link_loop",
    "is the same folder as": "link_loop",
    "has no effect, since": "idle_settings",
}
"""What a scan says, in part, and the kind of finding that it is."""

_CAMERA_NAMES: Final = re.compile(
    r"(img|dsc[fn]?|pxl|mvimg|gopr|image|photo|picture|untitled|screenshot|download)?[\W\d]*|[0-9a-f-]{16,}",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a data set that its owner should know.

    Attributes:
        path: the file or folder it is about; for a file below the data root, beginning with the data root.
        severity: one of ``SEVERITIES``.
        kind: one of ``KINDS``.
        reason: what is the matter, in a few words.
        remedy: what to do.
        others: further files that belong to it, such as the original of a copy.
    """

    path: str
    severity: str
    kind: str
    reason: str
    remedy: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding.

    Attributes:
        title: what it is called above a list of paths.
        remedy: what to do about each.
    """

    title: str
    remedy: str


KINDS: Final[Mapping[str, Kind]] = {
    "no_pictures": Kind("nothing to train on", "put pictures into a subfolder of the data root"),
    "refused": Kind("settings that training refuses", "put it right as said"),
    "unreadable": Kind("pictures that cannot be read", "repair it or move it out of the data root"),
    "empty_file": Kind("empty files (zero bytes)", "copy it here anew or delete it"),
    "decompression_bomb": Kind("pictures too large to decode", "scale it down or move it out of the data root"),
    "unreadable_folder": Kind("folders that cannot be read", "give yourself permission to read it"),
    "in_root": Kind("pictures outside a subfolder", "move it into a subfolder of the data root"),
    "too_deep": Kind("pictures too deep for one layer of subfolders", "move it up, or train with recursive: true"),
    "bad_name": Kind("names that cannot be used", "rename it"),
    "bad_sidecar": Kind("captions and settings that cannot be read", "put it right as said"),
    "scan_warning": Kind("further warnings", "look at it"),
    "link_loop": Kind("links to folders that are read already", "remove the link"),
    "idle_settings": Kind("settings of folders without pictures", "move it beside the pictures that it is about"),
    "orphan": Kind("captions without a picture", "bring its picture back, or delete it"),
    "other_format": Kind("pictures in formats that are not trained on", "convert it to .png or .jpg"),
    "switched_off": Kind("folders switched off by multiply 0", "raise multiply to train on it"),
    "wrong_extension": Kind("extensions that do not fit the content", "rename it"),
    "rotated": Kind("pictures that the camera turned (EXIF)", "nothing: training shows it upright"),
    "transparent": Kind("pictures with transparency", "lay it on a background of your choice; training takes white"),
    "tiny": Kind("tiny pictures", "replace it by a larger one, or leave it out"),
    "upscaled": Kind("pictures that training enlarges", "prefer a larger original"),
    "extreme_aspect": Kind("extreme aspect ratios", "crop it to the part that matters"),
    "sixteen_bit": Kind("pictures of more than 8 bits a channel", "nothing: training scales it to 8 bits"),
    "cmyk": Kind("pictures in CMYK", "convert it to sRGB; training converts it without its colour profile"),
    "animated": Kind("animations", "split it up; training takes the first frame alone"),
    "duplicate": Kind("exact copies", "delete it (multiply.txt shows a folder more often)"),
    "near_duplicate": Kind("pictures that look the same", "keep the better one"),
    "shared_caption": Kind("the same caption on unlike pictures", "describe what differs, if it shall be learnt"),
    "empty_caption": Kind(
        "empty captions", "write one (conditional_dropout trains the empty prompt where you want it)"
    ),
    "cut_caption": Kind(
        "captions longer than the text encoder takes", "shorten it, or train with long_captions: chunk"
    ),
    "missing_caption": Kind("pictures without the caption file that their neighbours have", "write its caption file"),
    "file_names": Kind(
        "captions that are only numbers or camera names", "write captions, or name the files after them"
    ),
}
"""What a finding can be about, in the order of a report."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What training makes of a picture.

    Attributes:
        size: width and height that it is trained at, in pixels.
        box: left, top, right and bottom of the part that is shown, in pixels of the upright picture; where the crop
            is drawn anew each time, its middle.
        scale: training pixels for one of the picture's, along the side that is enlarged most; above 1 the picture
            is enlarged.
        cropped: share of its area that is not shown, in [0, 1).
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    scale: float
    cropped: float


@lru_cache(maxsize=1 << 16)  # many pictures have the same size
def fate_of(source: tuple[int, int], size: int | None, resize_mode: str) -> Fate:
    """Work out what training makes of a picture.

    Args:
        source: width and height of the upright picture in pixels.
        size: the data set's.
        resize_mode: the data set's.

    Returns:
        Its fate.
    """
    training = training_size(source, size, resize_mode)
    placement = place(source, training, resize_mode, "center", (0.5, 0.5), flip=False)
    left, top, right, bottom = placement.box
    return Fate(
        size=placement.size,
        box=placement.box,
        scale=enlargement(placement),
        cropped=max(0.0, 1 - (right - left) * (bottom - top) / (source[0] * source[1])),
    )


def training_size(source: tuple[int, int], size: int | None, resize_mode: str) -> tuple[int, int] | None:
    """Give the width and height that a picture is trained at; None: its own."""
    if size is None:
        return None
    if resize_mode != "bucket":
        return size, size
    buckets = bucket_sizes(size)
    return buckets[nearest_bucket(*source, buckets)]


def finding(path: str, severity: str, kind: str, reason: str, others: Iterable[str] = ()) -> Finding:
    """Make a finding of a known kind, with its kind's remedy."""
    return Finding(path, severity, kind, reason, KINDS[kind].remedy, tuple(others))


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings by severity, kind and path."""
    kinds = list(KINDS)
    return sorted(findings, key=lambda one: (SEVERITIES.index(one.severity), kinds.index(one.kind), one.path))


def exit_status(findings: Iterable[Finding]) -> int:
    """Condense findings to 0 (nothing, or notes alone), 1 (warnings) or 2 (errors)."""
    severities = {one.severity for one in findings}
    return 2 if "error" in severities else 1 if "warning" in severities else 0


def picture_findings(headers: Mapping[str, PictureHeader | str], size: int | None, resize_mode: str) -> list[Finding]:
    """Judge pictures by their headers.

    Args:
        headers: by path, a header or the reason why there is none.
        size: the data set's.
        resize_mode: the data set's.

    Returns:
        What is the matter with them.
    """
    findings: list[Finding] = []
    for path, header in headers.items():
        if isinstance(header, str):
            findings.append(unreadable_finding(path, header))
        else:
            findings += _look_findings(path, header)
            source = (header.width, header.height)
            findings += _size_findings(path, source, fate_of(source, size, resize_mode), size, resize_mode)
    return findings


def unreadable_finding(path: str, reason: str) -> Finding:
    """Judge a picture that cannot be read.

    Args:
        path: the picture.
        reason: why, as the readers of headers and pixels say it.

    Returns:
        An error of the kind ``empty_file``, ``decompression_bomb`` or ``unreadable``.
    """
    try:
        is_empty = os.path.getsize(path) == 0
    except OSError:
        is_empty = False
    if is_empty:
        return finding(path, "error", "empty_file", "the file holds nothing")
    return finding(path, "error", "decompression_bomb" if "decompression bomb" in reason else "unreadable", reason)


def _look_findings(path: str, header: PictureHeader) -> list[Finding]:
    """Judge how a picture's pixels are stored."""
    findings = []
    extension = os.path.splitext(path)[1].lower()
    fitting = EXTENSIONS.get(header.format, ())
    if extension not in fitting:
        hint = f"; name it {fitting[0]}" if fitting else ""
        findings.append(finding(path, "warning", "wrong_extension", f"holds {_a(header.format)}{hint}"))
    if header.orientation != 1:
        findings.append(finding(path, "note", "rotated", f"EXIF orientation {header.orientation}"))
    if header.transparent:
        reason = f"{header.mode} can be transparent (--decode tells whether any pixel is)"
        findings.append(finding(path, "note", "transparent", reason))
    if header.bits > 8:
        findings.append(finding(path, "note", "sixteen_bit", f"{header.bits} bits a channel"))
    if header.mode == "CMYK":
        findings.append(finding(path, "warning", "cmyk", "holds printing colours"))
    if header.frames > 1 and header.format != "MPO":
        findings.append(finding(path, "warning", "animated", f"{header.frames} frames"))
    return findings


def _size_findings(path: str, source: tuple[int, int], fate: Fate, size: int | None, resize_mode: str) -> list[Finding]:
    """Judge a picture's size and shape."""
    findings = []
    shape = f"{source[0]}x{source[1]}"
    ratio = max(source) / min(source)
    if ratio > widest_ratio(size, resize_mode) * _ASPECT_MARGIN:
        loss = f" and loses {fate.cropped:.0%} of its area" if fate.cropped >= 0.01 else ""
        findings.append(finding(path, "warning", "extreme_aspect", f"{shape} is {ratio:.1f} to 1{loss}"))
    enlarged = f"is enlarged {fate.scale:.2f} times to {fate.size[0]}x{fate.size[1]}"
    if size is None:
        if min(source) < TINY_SIDE:
            findings.append(finding(path, "warning", "tiny", shape))
    elif fate.scale > TINY:
        findings.append(finding(path, "warning", "tiny", f"{shape} {enlarged}"))
    elif fate.scale > _SCALE_MARGIN:
        severity = "warning" if fate.scale > UPSCALED else "note"
        findings.append(finding(path, severity, "upscaled", f"{shape} {enlarged}"))
    return findings


@lru_cache
def widest_ratio(size: int | None, resize_mode: str) -> float:
    """Give the ratio of the sides up to which a picture is trained on without much loss or distortion."""
    if size is None or resize_mode != "bucket":
        return EXTREME_ASPECT
    return max(max(width / height, height / width) for width, height in bucket_sizes(size))


def decoding_findings(
    headers: Mapping[str, PictureHeader | str], broken: Mapping[str, str], opaque: Collection[str], found: list[Finding]
) -> list[Finding]:
    """Correct findings by what decoding every pixel has told.

    Args:
        headers: as read before.
        broken: pictures whose header is sound and whose pixels are not, with the reason.
        opaque: pictures that can be transparent and nowhere are.
        found: the findings so far.

    Returns:
        Those findings, with the broken pictures, and with transparency where there is some.
    """
    findings = []
    for one in found:
        header = headers.get(one.path)
        if one.kind == "transparent" and isinstance(header, PictureHeader) and one.path not in broken:
            if one.path not in opaque:
                findings.append(finding(one.path, "warning", "transparent", "parts of it are transparent"))
        else:
            findings.append(one)
    return findings + [unreadable_finding(path, reason) for path, reason in broken.items()]


def copy_findings(kind: str, groups: Iterable[Sequence[str]], better: Mapping[str, tuple[float, ...]]) -> list[Finding]:
    """Name the copies among pictures that are the same.

    Args:
        kind: ``duplicate`` or ``near_duplicate``.
        groups: paths of pictures that are the same, two or more each.
        better: by path, what makes a picture the original: the least comes first.

    Returns:
        A warning for every picture of a group but its original, which stands in ``others``.
    """
    what = "the same file as" if kind == "duplicate" else "looks like"
    findings = []
    for group in groups:
        original, *copies = sorted(group, key=lambda path: (better[path], path))
        findings += [finding(path, "warning", kind, f"{what} {original}", [original]) for path in copies]
    return findings


def caption_findings(
    pictures: Sequence[Picture],
    cut: Mapping[str, str],
    alike: Iterable[Iterable[str]] = (),
    broken_sidecars: Collection[str] = (),
) -> list[Finding]:
    """Judge captions.

    Args:
        pictures: the pictures.
        cut: by caption, the words that the text encoder does not get.
        alike: groups of paths of pictures that look the same, which may share a caption.
        broken_sidecars: paths of caption files that cannot be read, whose pictures are not said to have none.

    Returns:
        What is the matter with them.
    """
    findings = []
    for picture in pictures:
        if not picture.caption:
            if f"{os.path.splitext(picture.path)[0]}.{picture.caption_source}" in broken_sidecars:
                continue
            reason = {
                "file name": "nothing stands before the first underscore of its name",
                "jsonl": "the folder's list gives it an empty text",
            }.get(picture.caption_source, f"its .{picture.caption_source} file is empty")
            findings.append(finding(picture.path, "warning", "empty_caption", reason))
        elif picture.caption in cut:
            findings.append(finding(picture.path, "warning", "cut_caption", f"loses '{cut[picture.caption]}'"))
    return findings + _shared_captions(pictures, alike) + _missing_captions(pictures) + _poor_file_names(pictures)


def _shared_captions(pictures: Sequence[Picture], alike: Iterable[Iterable[str]]) -> list[Finding]:
    """Find captions that several pictures have.

    Numbered names (``a man_(1).jpg``, ``a man_(2).jpg``) are the usual way to give many pictures one caption, and so
    is one short text in many caption files: that is a note. A detailed text, or the same name twice without a number,
    is likely a slip.
    """
    look = {path: number for number, group in enumerate(alike) for path in group}
    by_caption: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.caption:
            by_caption[picture.caption].append(picture)
    findings = []
    for caption, sharing in by_caption.items():
        if len({look.get(picture.path, picture.path) for picture in sharing}) < 2:
            continue
        is_detailed = len(caption.split()) >= DETAILED_WORDS
        for picture in sharing:
            if picture.caption_source == "file name":
                is_slip = "_" not in os.path.basename(picture.path)
            else:
                is_slip = is_detailed
            others = [other.path for other in sharing if other is not picture]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            reason = f"'{shorten(caption)}' is also the caption of {others[0]}{more}"
            findings.append(
                finding(picture.path, "warning" if is_slip else "note", "shared_caption", reason, others[:1])
            )
    return findings


def _missing_captions(pictures: Sequence[Picture]) -> list[Finding]:
    """Find pictures that take their name for a caption where their neighbours have captions of their own."""
    by_folder: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_folder[picture.folder].append(picture)
    findings = []
    for members in by_folder.values():
        named = [picture for picture in members if picture.caption_source == "file name"]
        written = len(members) - len(named)
        if len(members) < FEW or not MOSTLY <= written / len(members) < 1:
            continue
        reason = f"{written} of the {len(members)} pictures in its folder have a caption file, this one has none"
        findings += [finding(picture.path, "warning", "missing_caption", reason) for picture in named]
    return findings


def _poor_file_names(pictures: Sequence[Picture]) -> list[Finding]:
    """Find folders whose captions are what a camera or a download called the files."""
    by_folder: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.caption and picture.caption_source == "file name" and _CAMERA_NAMES.fullmatch(picture.caption):
            by_folder[picture.folder].append(picture)
    return [
        finding(
            os.path.dirname(members[0].path),
            "note",
            "file_names",
            f"{len(members)} {'caption' if len(members) == 1 else 'captions'} such as '{shorten(members[0].caption)}'",
        )
        for members in by_folder.values()
    ]


def scan_findings(scan: Scan, data_root: str) -> list[Finding]:
    """Judge what lies below a data root by names and caption files.

    Args:
        scan: what was found there.
        data_root: where.

    Returns:
        What is the matter.
    """
    findings = [line_finding("error", line) for line in scan.problems]
    # A picture whose caption is empty is found with the others of its kind.
    findings += [line_finding("warning", line) for line in scan.warnings if not line.endswith(_EMPTY_CAPTION)]
    for path in scan.orphans:
        findings.append(finding(_below(data_root, path), "warning", "orphan", "no picture has its name"))
    for folder, count in scan.switched_off.items():
        reason = f"{count} {'picture is' if count == 1 else 'pictures are'} not trained on"
        findings.append(finding(_below(data_root, folder), "note", "switched_off", reason))
    for path in scan.left_out:
        extension = os.path.splitext(path)[1].lower()
        if extension in OTHER_PICTURES:
            reason = f"{extension} is not trained on"
            findings.append(finding(_below(data_root, path), "warning", "other_format", reason))
    return findings


def line_finding(severity: str, line: str) -> Finding:
    """Make a finding of one line of a scan, ``path: what is the matter; what to do``.

    Args:
        severity: how grave it is.
        line: a line of ``Scan.problems`` or ``Scan.warnings``.

    Returns:
        The finding. A path that holds a colon and a space is told from the rest by which file there is.
    """
    colons = [match.start() for match in re.finditer(": ", line)]
    existing = [end for end in colons if os.path.lexists(line[:end])]
    end = (existing or colons or [len(line)])[-1 if existing else 0]
    path, said = line[:end], line[end + 2 :]
    kind = next((kind for words, kind in _SAID.items() if words in said), "scan_warning")
    if severity == "error" and kind == "scan_warning":
        is_folder = os.path.isdir(path) and "cannot be read" in said
        kind = "unreadable_folder" if is_folder else "unreadable" if is_picture_name(path) else "bad_sidecar"
    if severity != "error" or "; " not in said:
        return finding(path, severity, kind, said)
    reason, _, remedy = said.rpartition("; ")
    return Finding(path, severity, kind, reason, remedy)


def quick_look(
    datasets: Iterable[EveryDreamBatch], headers: Mapping[str, PictureHeader] | None = None
) -> list[Finding]:
    """Judge training sets by what they know already, before a run starts; no file is opened.

    What the sets themselves refuse, leave out or tell (empty captions among it) is not told again.

    Args:
        datasets: built, with their pictures' sizes read.
        headers: by path, where they are at hand; with them also formats are judged.

    Returns:
        The warnings, sorted, and every picture that is enlarged; other notes are left to the full check.
    """
    findings: list[Finding] = []
    for dataset in datasets:
        sizes = dataset.source_sizes.tolist()
        for picture, (width, height) in zip(dataset.pictures, sizes, strict=True):
            header = headers.get(picture.path) if headers is not None else None
            if header is not None:
                findings += _look_findings(picture.path, header)
            fate = fate_of((width, height), dataset.size, dataset.resize_mode)
            findings += _size_findings(picture.path, (width, height), fate, dataset.size, dataset.resize_mode)
        findings += caption_findings(dataset.pictures, {})
    told = {one for one in findings if one.severity == "warning" or one.kind == "upscaled"}
    return sort_findings(one for one in told if one.kind != "empty_caption")


def summarise(findings: Sequence[Finding], most: int = 3) -> list[str]:
    """Write findings as a line for each kind.

    Args:
        findings: sorted.
        most: how many paths a line names.

    Returns:
        Lines such as ``tiny pictures (2): man/a.jpg: 64x64 is enlarged 8.0 times to 512x512; ...``.
    """
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for one in findings:
        by_kind[one.kind].append(one)
    lines = []
    for kind, members in by_kind.items():
        named = "; ".join(printable(f"{one.path}: {one.reason}") for one in members[:most])
        more = f"; and {len(members) - most:,} more" if len(members) > most else ""
        lines.append(f"{KINDS[kind].title} ({len(members):,}): {named}{more}")
    return lines


def shorten(text: str, most: int = 60) -> str:
    """Shorten a text to a number of characters."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def printable(text: str) -> str:
    """Write a text so that it can be shown: on one line, without what would steer a terminal.

    Args:
        text: any text, such as a file's name.

    Returns:
        The text with control characters, marks that turn the direction of writing and bytes that are no UTF-8
        written as escapes.
    """
    return "".join(
        character
        if character == " " or (character.isprintable() and unicodedata.category(character) != "Cf")
        else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _below(data_root: str, path: str) -> str:
    return path if path.startswith(data_root) else os.path.join(data_root, *path.split("/"))


def _a(picture_format: str) -> str:
    return f"{'an' if picture_format[:1] in 'AEIMO' else 'a'} {picture_format}"
