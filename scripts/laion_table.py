"""Chooses pictures from LAION-style parquet tables: addresses with their captions, sizes and scores.

The columns have gone by several names; :data:`COLUMNS` knows them, in any case.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "url": ("url", "image_url"),
    "caption": ("text", "caption", "top_caption"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "score": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2", "prediction"),
    "watermark": ("pwatermark", "watermark_score"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "nsfw": ("nsfw",),
}
"""What is read, and the column names that it has in the tables of LAION, DataComp and COYO, in lower case."""

SAFE_WORDS: Final = ("UNLIKELY", "SAFE", "SFW")
"""What an NSFW column of words says of pictures that are harmless; its other words are UNSURE and NSFW."""

_ROWS_AT_A_TIME: Final = 65_536
_SETTINGS_KEY: Final = b"ground_truth"
# What a word ends at. RE2 takes letters outside ASCII for word ends, which these are not.
_NO_LETTER: Final = r"[^\pL\pM\pN_]"

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Wanted:
    """Which rows are wanted.

    Attributes:
        all_words: words or phrases that a caption must hold, all of them.
        any_words: words or phrases of which it must hold one.
        no_words: words or phrases of which it may hold none.
        substring: also find words within others ("man" in "woman").
        min_side: the least width and height in pixels.
        max_aspect: how many times as long as the other a side may be; None: no limit.
        min_score: the least aesthetic score; None: any.
        max_watermark: the greatest probability of a watermark; None: any.
        max_unsafe: the greatest probability of being unsafe; pictures that a table calls NSFW or UNSURE, and those
            that it says nothing of, are left out too. None: any picture.
        limit: how many; None: all.
    """

    all_words: tuple[str, ...] = ()
    any_words: tuple[str, ...] = ()
    no_words: tuple[str, ...] = ()
    substring: bool = False
    min_side: int = 512
    max_aspect: float | None = None
    min_score: float | None = None
    max_watermark: float | None = None
    max_unsafe: float | None = 0.1
    limit: int | None = None


@dataclass
class Selection:
    """What was chosen, and why the rest was not.

    Attributes:
        rows: number of rows that were looked at.
        left_out: how many were not wanted, by the first reason.
        kept: number of rows that were.
        examples: captions of the first few.
        notes: what could not be judged.
    """

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Write it as text, a line for each number."""
        width = len(f"{self.rows:,}")
        lines = [f"{self.rows:>{width},} rows were looked at"]
        lines += [f"{count:>{width},} left out: {reason}" for reason, count in self.left_out.items() if count]
        lines.append(f"{self.kept:>{width},} chosen")
        lines += [f"{'':>{width}} such as: {caption}" for caption in self.examples]
        return [*lines, *(f"note: {note}" for note in self.notes)]


def find_tables(words: Sequence[str]) -> list[Path]:
    """List parquet files.

    Args:
        words: files, folders of them, or patterns.

    Returns:
        The files, each once, in the order given; those of one folder or pattern by name.

    Raises:
        ValueError: something names no parquet file; a line for each.
    """
    found: dict[Path, None] = {}
    problems = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            files = sorted(path.glob("*.parquet"))
        else:
            files = [path] if path.is_file() else sorted(map(Path, glob(word)))
        if not files:
            problems.append(f"{word}: there is no parquet file")
        found |= dict.fromkeys(files)
    if problems:
        raise ValueError("\n".join(problems))
    return list(found)


def select(
    tables: Sequence[Path],
    wanted: Wanted,
    target: Path | None,
    settings: Mapping[str, Any] | None = None,
    examples: int = 5,
) -> Selection:
    """Choose rows, and write their addresses and captions to a table of their own.

    Args:
        tables: parquet files.
        wanted: which rows.
        target: the parquet file to write, with the columns ``url`` and ``caption``; it appears whole or not at
            all. None: count only.
        settings: kept in the file, for :func:`read_settings`.
        examples: how many captions to show.

    Returns:
        The counts.

    Raises:
        ValueError: tables that lack a column which is asked for, or are no parquet files; a line for each.
        OSError: a file cannot be read or written.
    """
    selection = Selection()
    columns = _find_columns(tables, wanted, selection)
    seen: set[int] = set()
    kept = {_SETTINGS_KEY: json.dumps(dict(settings or {})).encode("utf-8")}
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())], metadata=kept)
    part = target.with_name(target.name + ".part") if target is not None else None
    writer = pq.ParquetWriter(part, schema) if part is not None else None
    try:
        for table, names in zip(tables, columns, strict=True):
            for urls, captions in _chosen(table, names, wanted, selection, seen):
                selection.examples += captions[: examples - len(selection.examples)]
                if writer is not None:
                    writer.write_table(pa.table({"url": urls, "caption": captions}, schema=schema))
            if selection.kept == wanted.limit:
                break
    finally:
        if writer is not None:
            writer.close()
    if part is not None and target is not None:
        part.replace(target)
    return selection


def read_settings(target: Path) -> dict[str, Any]:
    """Read the settings that a selection was made with; none where it does not say."""
    metadata = pq.read_schema(target).metadata or {}
    settings: dict[str, Any] = json.loads(metadata.get(_SETTINGS_KEY, b"{}"))
    return settings


def count_rows(target: Path) -> int:
    """Count the rows of a parquet file."""
    return int(pq.read_metadata(target).num_rows)


def _find_columns(tables: Sequence[Path], wanted: Wanted, selection: Selection) -> list[dict[str, str]]:
    """Find the columns of each table by what they hold."""
    found = []
    problems = []
    unsized = 0
    for table in tables:
        try:
            names = pq.read_schema(table).names
        except pa.ArrowInvalid:
            problems.append(f"{table}: is no parquet file")
            continue
        by_lower = {name.lower(): name for name in reversed(names)}
        columns = {
            meaning: next(by_lower[known] for known in spellings if known in by_lower)
            for meaning, spellings in COLUMNS.items()
            if any(known in by_lower for known in spellings)
        }
        found.append(columns)
        needed = {"url": "an address", "caption": "a caption"}
        if wanted.min_score is not None:
            needed["score"] = "an aesthetic score"
        if wanted.max_watermark is not None:
            needed["watermark"] = "the probability of a watermark"
        for meaning, what in needed.items():
            if meaning not in columns:
                problems.append(
                    f"{table}: has no column with {what} (looked for {', '.join(COLUMNS[meaning])}; it has: "
                    f"{', '.join(names)})"
                )
        if wanted.max_unsafe is not None and not {"unsafe", "nsfw"} & columns.keys():
            problems.append(
                f"{table}: has no column that says whether a picture is safe (looked for "
                f"{', '.join(COLUMNS['unsafe'] + COLUMNS['nsfw'])}); --allow_unsafe takes all of them"
            )
        unsized += not {"width", "height"} <= columns.keys()
    if problems:
        raise ValueError("\n".join(problems))
    if unsized:
        selection.notes.append(
            f"{unsized} of {len(tables)} tables tell no sizes: those are judged when they are fetched"
        )
    return found


def _chosen(
    table: Path, names: Mapping[str, str], wanted: Wanted, selection: Selection, seen: set[int]
) -> Iterator[tuple[list[str], list[str]]]:
    """Go through a table, and give the wanted addresses and captions by blocks."""
    for batch in pq.ParquetFile(table).iter_batches(_ROWS_AT_A_TIME, columns=list(names.values())):
        block = {meaning: batch.column(name) for meaning, name in names.items()}
        selection.rows += batch.num_rows
        remaining = np.ones(batch.num_rows, dtype=np.bool_)
        for reason, mask in _judge(block, wanted):
            selection.left_out[reason] += int((remaining & ~mask).sum())
            remaining &= mask
        urls: list[str] = []
        captions: list[str] = []
        for row in np.flatnonzero(remaining).tolist():
            if selection.kept == wanted.limit:
                selection.left_out["there are enough"] += 1
                continue
            url = block["url"][row].as_py()
            if hash(url) in seen:
                selection.left_out["the address came before"] += 1
                continue
            seen.add(hash(url))
            urls.append(url)
            captions.append(" ".join(block["caption"][row].as_py().split()))
            selection.kept += 1
        yield urls, captions
        if selection.kept == wanted.limit:
            return


def _judge(block: Mapping[str, Any], wanted: Wanted) -> Iterator[tuple[str, Mask]]:
    """Give each reason to leave rows out, with which rows stay."""
    yield "no http address", _mask(pc.match_substring_regex(_text(block["url"]), r"^https?://\S+$"))
    captions = _text(block["caption"])
    yield "no caption", _mask(pc.match_substring_regex(captions, r"\S"))
    for word in wanted.all_words:
        yield f"the caption lacks {word!r}", _holds(captions, word, wanted.substring)
    if wanted.any_words:
        holds = [_holds(captions, word, wanted.substring) for word in wanted.any_words]
        yield f"the caption holds none of {', '.join(map(repr, wanted.any_words))}", np.logical_or.reduce(holds)
    for word in wanted.no_words:
        yield f"the caption holds {word!r}", ~_holds(captions, word, wanted.substring)
    if "width" in block and "height" in block:
        width, height = _numbers(block["width"]), _numbers(block["height"])
        yield f"a side is under {wanted.min_side} pixels", np.minimum(width, height) >= wanted.min_side
        if wanted.max_aspect is not None:
            longer, shorter = np.maximum(width, height), np.minimum(width, height)
            yield f"one side is over {wanted.max_aspect:g} times the other", longer <= wanted.max_aspect * shorter
    for meaning, least, most in (("score", wanted.min_score, None), ("watermark", None, wanted.max_watermark)):
        if least is not None:
            yield f"{meaning} under {least:g}", _numbers(block[meaning]) >= least
        if most is not None:
            yield f"{meaning} over {most:g}", _numbers(block[meaning]) <= most
    if wanted.max_unsafe is not None:
        yield from _judge_safety(block, wanted.max_unsafe)


def _judge_safety(block: Mapping[str, Any], most: float) -> Iterator[tuple[str, Mask]]:
    """A picture must be called safe by every column that speaks of it; what says nothing does not call it safe."""
    for meaning in ("unsafe", "nsfw"):
        if meaning not in block:
            continue
        column = block[meaning]
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            said = pc.utf8_upper(_text(column))
            yield "its safety is not known", _mask(pc.match_substring_regex(said, r"\S"))
            yield "not called safe", _mask(pc.is_in(said, value_set=pa.array(SAFE_WORDS)))
        else:
            probability = _numbers(column)
            yield "its safety is not known", ~np.isnan(probability)
            yield f"probability of being unsafe over {most:g}", probability <= most


def _text(column: Any) -> Any:
    return pc.fill_null(pc.cast(column, pa.string()), "")


def _numbers(column: Any) -> npt.NDArray[np.float64]:
    """Read numbers, NaN where there is none (which no comparison holds for)."""
    numbers: npt.NDArray[np.float64] = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    return numbers


def _mask(booleans: Any) -> Mask:
    mask: Mask = pc.fill_null(booleans, False).to_numpy(zero_copy_only=False).astype(np.bool_)
    return mask


def _holds(captions: Any, word: str, substring: bool) -> Mask:
    """Tell which captions hold a word or phrase, whatever its case and the white space in it."""
    pattern = r"\s+".join(_escape(part) for part in word.split())
    if not substring:
        pattern = f"(?:^|{_NO_LETTER})(?:{pattern})(?:$|{_NO_LETTER})"
    return _mask(pc.match_substring_regex(captions, pattern, ignore_case=True))


def _escape(text: str) -> str:
    """Quote text for RE2, which knows no escapes of letters outside ASCII."""
    return "".join(
        f"\\{character}" if character.isascii() and not character.isalnum() else character for character in text
    )
