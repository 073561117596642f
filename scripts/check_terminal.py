"""A check of a data set as text for a terminal, a pipe or a log."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from check_result import CheckResult

from ldm.data.inspection import KINDS, Finding, printable

PATHS_SHOWN = {"error": 20, "warning": 10, "note": 3}
"""How many paths of one kind are shown, unless all are asked for."""

REMEDIES_SHOWN = 3

ROWS_SHOWN = 30
"""How many folders or buckets a table shows."""

UNREAD = ("unreadable", "empty_file", "decompression_bomb")
WORDS_SHOWN = 15
BAR = 20
COLOURS = {"error": "31", "warning": "33", "note": "36"}


def text_lines(result: CheckResult, width: int = 80, colour: bool = False, show_all: bool = False) -> Iterator[str]:
    """Write a check as text.

    Args:
        result: the check.
        width: columns that prose is wrapped to; paths and tables are never cut.
        colour: mark severities with a terminal's colours.
        show_all: name every path, not the first few of each kind.

    Yields:
        Lines without their ends.
    """
    yield from _summary(result, width)
    yield ""
    yield from _folders(result)
    yield ""
    if result.buckets:
        yield from _buckets(result)
        yield ""
    yield from _steps(result, width)
    yield ""
    yield from _captions(result, width)
    yield ""
    yield from _findings(result, width, colour, show_all)


def _summary(result: CheckResult, width: int) -> Iterator[str]:
    settings = result.settings
    formats = ", ".join(f"{count:,} {name}" for name, count in result.formats.items())
    root = printable(settings.data_root)
    size = megabytes(result.file_bytes)
    yield f"{root}: {plural(len(result.pictures), 'picture')}, {size} ({formats or 'none could be read'})"
    yaml = " ".join(printable(base) for base in settings.bases)
    said = "the values of the shipped" if settings.assumed else "the values of"
    size = "each picture's own size" if settings.size is None else f"size {settings.size}"
    crop = f", crop {settings.crop}" if settings.resize_mode == "bucket" else ""
    yield from textwrap.wrap(
        f"checked for {size}, resize_mode {settings.resize_mode}{crop}, repeats {settings.repeats}, batch size "
        f"{settings.batch_size}{devices_text(settings.devices)}: {said} {yaml}"
        + ("; name your own with --base" if settings.assumed else ""),
        width,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _folders(result: CheckResult) -> Iterator[str]:
    rows = result.folders
    has_settings = any(row.settings.multiply != 1 for row in rows)
    head = ["folder", "pictures", "size", *(["multiply"] if has_settings else []), "shown an epoch", "share"]
    lines = [
        [
            printable(row.folder) + ("  (ground truth)" if row.is_ground_truth else ""),
            f"{row.pictures:,}",
            megabytes(row.file_bytes),
            *([f"{float(row.settings.multiply):g}"] if has_settings else []),
            f"{float(row.exposures):,.6g}" if row.exposures < 10**6 else f"{float(row.exposures):,.0f}",
            f"{row.share:.0%}",
        ]
        for row in rows[:ROWS_SHOWN]
    ]
    yield from table(head, lines)
    if len(rows) > ROWS_SHOWN:
        yield f"... and {len(rows) - ROWS_SHOWN} more folders (--html and --json name all)"
    balance = result.balance()
    if balance is not None:
        yield f"balance: 1 new picture to {float(balance[1] / balance[0]):.2g} of ground truth"


def _buckets(result: CheckResult) -> Iterator[str]:
    head = ["trained at", "pictures", "batches", "cropped away", "at most", "enlarged"]
    batches = result.steps.batches if result.steps is not None else {}
    lines = [
        [
            f"{row.size[0]}x{row.size[1]}",
            f"{row.pictures:,}",
            f"{batches[row.size]:,}" if row.size in batches else "-",
            f"{row.cropped:.1%}",
            f"{row.most_cropped:.1%}",
            f"{row.upscaled:,}",
        ]
        for row in result.buckets[:ROWS_SHOWN]
    ]
    yield from table(head, lines)
    if len(result.buckets) > ROWS_SHOWN:
        yield f"... and {len(result.buckets) - ROWS_SHOWN} more sizes (--html and --json name all)"


def _steps(result: CheckResult, width: int) -> Iterator[str]:
    yield from textwrap.wrap(steps_text(result), width)


def steps_text(result: CheckResult) -> str:
    """Say how many steps training takes."""
    steps = result.steps
    if steps is None:
        return "steps an epoch: none, training would not start (the errors below say why)"
    one = len(steps.training) == 1
    text = "steps an epoch: " + (f"{steps.training[0]:,}" if one else ", ".join(f"{n:,}" for n in steps.training))
    if not one:
        text += " (epoch by epoch)"
    fewest, most = min(steps.exposures), max(steps.exposures)
    shown = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    text += f"; {shown} pictures shown at batch size {result.settings.batch_size}"
    text += devices_text(result.settings.devices)
    unread = sum(one.kind in UNREAD for one in result.findings)
    if unread:
        text += f", without the {unread:,} that cannot be read"
    if result.settings.accumulate > 1:
        text += f", {result.settings.accumulate} batches to an optimiser step"
    if steps.validation:
        text += f"; {plural(steps.validation, 'validation step')}"
    if steps.total is not None:
        limit = "" if result.settings.epochs is None else f" in {plural(result.settings.epochs, 'epoch')}"
        text += f"; {steps.total:,} optimiser steps{limit}"
    return text


def _captions(result: CheckResult, width: int) -> Iterator[str]:
    figures = result.captions
    if not result.pictures:
        yield "captions: none"
        return
    names = {"txt": ".txt files", "caption": ".caption files", "jsonl": "lists (.jsonl)", "file name": "file names"}
    sources = ", ".join(f"{count:,} from {names.get(source, source)}" for source, count in figures.sources.items())
    yield from textwrap.wrap(f"captions: {figures.different:,} different ({sources})", width)
    room = result.tokens.room
    yield (
        f"tokens: median {figures.percentile(0.5)}, 95% within {figures.percentile(0.95)}, longest "
        f"{max(figures.lengths)} (the text encoder takes {room})"
    )
    most = max(count for _, count in length_bins(result))
    for name, count in length_bins(result):
        yield f"  {name:>9}  {count:>7,}  {'#' * round(BAR * count / most) if count else ''}".rstrip()
    for title, words in (("most frequent words", figures.words), ("words of several tokens", result.tokens.split)):
        listed = ", ".join(f"{printable(word)} {count:,}" for word, count in words[:WORDS_SHOWN])
        if listed:
            yield from textwrap.wrap(f"{title}: {listed}", width, subsequent_indent="  ", break_on_hyphens=False)


def length_bins(result: CheckResult) -> list[tuple[str, int]]:
    """Count captions by their tokens, in a dozen bins at most.

    Args:
        result: the check.

    Returns:
        Each bin's name and its number of pictures; the last bin is what is cut.
    """
    lengths, room = result.captions.lengths, result.tokens.room
    fitting = [length for length in lengths if length <= room]
    step = next(step for step in (2, 5, 10, 25, 50, 100) if max(fitting, default=0) // step < 11)
    bins = []
    for first in range(min(fitting, default=0) // step * step, max(fitting, default=0) + 1, step):
        last = min(first + step - 1, room)
        bins.append((f"{first}-{last}", sum(lengths.get(length, 0) for length in range(first, last + 1))))
    cut = sum(count for length, count in lengths.items() if length > room)
    return bins + ([(f"over {room}", cut)] if cut else [])


def _findings(result: CheckResult, width: int, colour: bool, show_all: bool) -> Iterator[str]:
    for (severity, kind), members in groupby(result.findings, key=lambda one: (one.severity, one.kind)):
        yield from _one_kind(result, (severity, kind), list(members), width, colour, show_all)
    counts = result.counts
    said = ", ".join(plural(counts[severity], severity) for severity in counts)
    verdict = ("clean", "look at the warnings before you train", "training would refuse or lose something")[
        result.status
    ]
    yield f"{said}: {verdict} ({result.seconds:.1f} s)"
    if not result.decoded:
        yield from textwrap.wrap(
            "Pixels were not decoded: --decode finds damaged pictures, near duplicates and real transparency.", width
        )


def _one_kind(
    result: CheckResult,
    severity_and_kind: tuple[str, str],
    members: Sequence[Finding],
    width: int,
    colour: bool,
    show_all: bool,
) -> Iterator[str]:
    severity, kind = severity_and_kind
    mark = f"\x1b[{COLOURS[severity]}m{severity}\x1b[0m" if colour else severity
    yield f"{mark}: {KINDS[kind].title} ({len(members):,})"
    # "1 more" would take the line that the path takes.
    most = len(members) if show_all or len(members) == PATHS_SHOWN[severity] + 1 else PATHS_SHOWN[severity]
    remedies = sorted({one.remedy for one in members})
    # Few remedies stand below all paths; where there are many, each belongs to its own path.
    each_its_own = len(remedies) > REMEDIES_SHOWN
    for one in members[:most]:
        path, reason = printable(result.below_root(one.path)), printable(result.without_root(one.reason))
        yield f"  {path}: {reason}" if reason else f"  {path}"
        if each_its_own:
            yield from _arrow(printable(result.without_root(one.remedy)), width, indent=4)
    if most < len(members):
        yield f"  ... and {len(members) - most:,} more (--all shows them)"
    for remedy in [] if each_its_own else remedies:
        yield from _arrow(printable(result.without_root(remedy)), width, indent=2)
    yield ""


def _arrow(remedy: str, width: int, indent: int) -> list[str]:
    """Lay out what to do behind an arrow."""
    first, rest = " " * indent, " " * (indent + 3)
    return textwrap.wrap(
        f"-> {remedy}",
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lay out a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def plural(count: int, noun: str) -> str:
    """Write a number of things."""
    return f"{count:,} {noun if count == 1 else f'{noun}s'}"


def devices_text(devices: int) -> str:
    """Say how many devices there are, where it is more than one."""
    return f" on {devices} devices" if devices > 1 else ""


def megabytes(count: int) -> str:
    """Write a number of bytes."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
