"""Gather ground truth: pictures that keep a model what it was while it learns new ones.

python scripts/ground_truth.py fetch PARQUET... --out FOLDER --any_words man woman --limit 1500 [--dry-run]
python scripts/ground_truth.py caption FOLDER --text "close up photo of a person" [--dry-run]

fetch    chooses pictures from LAION-style parquet tables by the words of their captions, size, aesthetic score,
         watermark and safety, and fetches them through img2dataset (pip install "everydream-trainer[ground-truth]"):
         into a folder of pictures that are named by their captions (--format folder), to be put into a data root, or
         into tar shards for ldm.data.web_shards.WebShards (--format shards). --dry-run only counts.
         What was interrupted goes on with the same command. A server that asks for it (X-Robots-Tag: noai,
         noimageai, noindex, noimageindex) is obeyed.
caption  gives all pictures of a folder, such as FFHQ's, one caption: "close up photo of a person_00001.png" and so on.
         scripts/captions.py undo takes it back.

Exit status: 0 done, 1 not every address was asked, 2 an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from file_changes import FileChanges  # noqa: E402

from ldm.data.captions import caption_from_file_name, file_name_from_caption, is_picture_name  # noqa: E402
from ldm.data.sidecars import SIDECAR_SUFFIXES  # noqa: E402
from ldm.data.tar_index import build_index, read_caption, read_member  # noqa: E402

INSTALL: Final = 'pip install "everydream-trainer[ground-truth]"'
WORK_FOLDER: Final = ".ground_truth"
"""Below --out: what was chosen and what was fetched. The dot keeps it out of the data set."""

FORMATS: Final = ("folder", "shards")
USER_AGENT: Final = "everydream-trainer"
NAMED_FAILURES: Final = 10
NAMED_CHANGES: Final = 5

_DOWNLOAD: Final = "import json, sys; from img2dataset import download; download(**json.loads(sys.argv[1]))"


@dataclass
class Fetched:
    """What fetching gave.

    Attributes:
        wanted: number of addresses.
        pictures: number of pictures that came.
        failures: how many did not, by reason.
        is_complete: whether every address has been asked.
        with_sidecar: how many have their caption in a .txt file, since no file name can hold it.
    """

    wanted: int
    pictures: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    is_complete: bool = False
    with_sidecar: int = 0


def fetch_pictures(
    selection: Path,
    folder: Path,
    *,
    size: int = 512,
    min_side: int = 512,
    max_aspect: float | None = None,
    threads: int = 16,
    processes: int = 1,
    per_shard: int = 1000,
    timeout: int = 10,
    user_agent: str = USER_AGENT,
    python: str = sys.executable,
) -> None:
    """Fetch what a table names through img2dataset, which goes on where it stopped.

    It runs in a process of its own: it sets signal handlers, and its Python may be another one than this.

    Args:
        selection: a parquet file with the columns ``url`` and ``caption``.
        folder: where it writes tar shards.
        size: shorter side in pixels that larger pictures are reduced to.
        min_side: pictures with a shorter side are not kept.
        max_aspect: nor those with a side that is more times as long as the other.
        threads: how many pictures each process fetches at a time.
        processes: number of processes.
        per_shard: addresses in a shard; what an interruption costs is at most one of these for each process.
        timeout: seconds to wait for a server.
        user_agent: name by which servers can tell the trainer and address it in X-Robots-Tag.
        python: a Python that has img2dataset.

    Raises:
        OSError: img2dataset cannot be started, or failed.
    """
    arguments: dict[str, Any] = {
        "url_list": str(selection.resolve()),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(folder.resolve()),
        "output_format": "webdataset",
        "image_size": size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "min_image_size": min_side,
        "encode_format": "jpg",
        "encode_quality": 95,
        "processes_count": processes,
        "thread_count": threads,
        "number_sample_per_shard": per_shard,
        "timeout": timeout,
        "retries": 0,  # who has said no, or is gone, is not asked again
        "user_agent_token": user_agent,
        "enable_wandb": False,
    }
    if max_aspect is not None:
        arguments["max_aspect_ratio"] = max_aspect
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}  # both would ask servers of their own
    command = [python, "-c", _DOWNLOAD, json.dumps(arguments)]
    try:
        ended = subprocess.run(command, env={**os.environ, **quiet}, check=False)
    except OSError as error:
        raise OSError(f"--python {python}: cannot be started ({error.strerror})") from error
    if ended.returncode != 0:
        raise OSError(f"img2dataset ended with status {ended.returncode}; its own message stands above")


def read_outcome(folder: Path, wanted: int, per_shard: int) -> Fetched:
    """Read what img2dataset says of its shards.

    Args:
        folder: where it wrote.
        wanted: number of addresses.
        per_shard: addresses in a shard.

    Returns:
        The counts.

    Raises:
        OSError: a file of counts cannot be read.
    """
    fetched = Fetched(wanted)
    shards = sorted(folder.glob("*_stats.json"))
    for path in shards:
        counts = json.loads(path.read_text(encoding="utf-8"))
        fetched.pictures += counts["successes"]
        fetched.failures.update({reason: n for reason, n in counts["status_dict"].items() if reason != "success"})
    fetched.is_complete = len(shards) == math.ceil(wanted / per_shard)
    return fetched


def unpack_shards(folder: Path, target: Path) -> tuple[int, int]:
    """Write the pictures of finished shards as files that are named by their captions, and remove the shards.

    A caption that no file name can hold goes into a .txt file.

    Args:
        folder: where img2dataset wrote shards.
        target: where the pictures go.

    Returns:
        How many pictures were written, and how many of them have a .txt file.

    Raises:
        OSError: a shard is damaged, or a file cannot be written. What was written before stays; the shard too, and
            it is unpacked again the next time.
    """
    pictures = with_sidecar = 0
    for stats in sorted(folder.glob("*_stats.json")):
        shard = stats.with_name(stats.name.replace("_stats.json", ".tar"))
        if not shard.exists():
            continue
        index = build_index(str(shard), stamp="")
        if index.bad or index.damage:
            problems = [index.damage, *(f"{name}: {reason}" for name, reason in index.bad.items())]
            raise OSError(
                f"{shard}: {'; '.join(filter(None, problems))}: remove it and {stats}, and type the same again"
            )
        with shard.open("rb") as file:
            for number in range(len(index)):
                key = Path(index.name(number))
                caption = read_caption(file, index.texts[number])
                try:
                    name = file_name_from_caption(caption, key.suffix, tail=f"_{key.stem}")
                except ValueError:
                    name = key.name
                    write_whole(target / f"{key.stem}.txt", caption.encode("utf-8"))
                    with_sidecar += 1
                write_whole(target / name, read_member(file, *index.pictures[number].tolist()))
                pictures += 1
        shard.unlink()
    return pictures, with_sidecar


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    part = path.with_name(".ground_truth.part")  # one that fits wherever the file's own name does
    part.write_bytes(content)
    part.replace(path)


def pictures_below(folder: Path) -> Iterator[Path]:
    """List the pictures in and below a folder by path; hidden folders are passed over."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if is_picture_name(name) and not name.startswith("."))


def caption_all(folder: Path, text: str, dry_run: bool = False) -> tuple[int, list[str]]:
    """Give all pictures in and below a folder one caption, by their names.

    Pictures that have the caption already keep their names.

    Args:
        folder: the folder.
        text: the caption.
        dry_run: change nothing.

    Returns:
        How many pictures there are, and a line for each change of a name.

    Raises:
        ValueError: there are none, no file name can hold the caption, or pictures have caption files, which count
            before names.
        OSError: a picture cannot be renamed; nothing is changed then.
    """
    pictures = list(pictures_below(folder))
    if not pictures:
        raise ValueError(f"{folder}: {'holds no pictures' if folder.is_dir() else 'there is no such folder'}")
    captioned = [path for path in pictures if any(path.with_suffix(suffix).exists() for suffix in SIDECAR_SUFFIXES)]
    if captioned:
        raise ValueError(
            f"{len(captioned)} of {len(pictures)} pictures have a caption file, which counts before the name (such as "
            f"{captioned[0]}): remove those files, or edit them with scripts/captions.py"
        )
    digits = max(5, len(str(len(pictures))))
    used = {path.stem.casefold() for path in pictures}
    numbered = (f"_{number:0{digits}d}" for number in itertools.count(1))
    free = (tail for tail in numbered if f"{text}{tail}".casefold() not in used)
    changes = []
    for path in pictures:
        if caption_from_file_name(path.name) == text:
            continue
        try:
            changes.append((path, path.with_name(file_name_from_caption(text, path.suffix.lower(), next(free)))))
        except ValueError as error:
            raise ValueError(f"--text {text!r}: {error}") from error
    if not dry_run:
        with FileChanges(str(folder)) as files:
            for path, name in changes:
                files.rename(str(path), str(name))
    return len(pictures), [f"{path} -> {name.name}" for path, name in changes]


def choice_of(options: argparse.Namespace, tables: Sequence[Path]) -> dict[str, Any]:
    """Write down everything that decides which address lies in which shard, and what becomes of it."""
    words = ("all_words", "any_words", "no_words", "substring")
    numbers = ("min_side", "max_aspect", "min_score", "max_watermark", "max_unsafe", "allow_unsafe", "limit")
    return {"parquet": [[table.name, table.stat().st_size] for table in tables]} | {
        name: getattr(options, name) for name in (*words, *numbers, "format", "size", "per_shard")
    }


def fetch(options: argparse.Namespace) -> int:
    """Choose and fetch pictures; gives the exit status."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"reading parquet needs the package pyarrow; type: {INSTALL}")
    from laion_table import Wanted, count_rows, find_tables, read_settings, select

    wanted = Wanted(
        all_words=tuple(options.all_words),
        any_words=tuple(options.any_words),
        no_words=tuple(options.no_words),
        substring=options.substring,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        min_score=options.min_score,
        max_watermark=options.max_watermark,
        max_unsafe=None if options.allow_unsafe else options.max_unsafe,
        limit=options.limit,
    )
    tables = find_tables(options.parquet)
    if options.dry_run:
        print("\n".join(select(tables, wanted, None).lines()))
        return 0
    if options.python == sys.executable and importlib.util.find_spec("img2dataset") is None:
        raise ValueError(
            f"fetching needs the package img2dataset; type: {INSTALL}, or name a Python that has it with --python"
        )
    out = Path(options.out)
    work = out / WORK_FOLDER
    selection = work / "selection.parquet"
    choice = choice_of(options, tables)
    if selection.exists():
        before = read_settings(selection)
        other = [f"--{name} {before.get(name)}" for name in choice if before.get(name) != choice[name]]
        if other:
            raise ValueError(f"--out {out}: was begun with {', '.join(other)}; give another folder, or remove {work}")
        print(f"going on with the {count_rows(selection):,} addresses that were chosen before ({selection})")
    else:
        work.mkdir(parents=True, exist_ok=True)
        chosen = select(tables, wanted, selection, choice)
        print("\n".join(chosen.lines()))
    count = count_rows(selection)
    if count == 0:
        selection.unlink()
        raise ValueError("no row is wanted: see above what left them out")
    as_shards = options.format == "shards"
    folder = out if as_shards else work / "shards"
    fetch_pictures(
        selection,
        folder,
        size=options.size,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        threads=options.threads,
        processes=options.processes,
        per_shard=options.per_shard,
        timeout=options.timeout,
        user_agent=options.user_agent,
        python=options.python,
    )
    fetched = read_outcome(folder, count, options.per_shard)
    if not as_shards:
        _, fetched.with_sidecar = unpack_shards(folder, out)
    return report(fetched, out)


def report(fetched: Fetched, out: Path) -> int:
    """Say what came of fetching; gives the exit status."""
    print(f"{fetched.pictures:,} of {fetched.wanted:,} pictures were fetched into {out}")
    for reason, count in fetched.failures.most_common(NAMED_FAILURES):
        print(f"{count:,} were not: {reason}")
    if fetched.with_sidecar:
        print(f"{fetched.with_sidecar:,} have their caption in a .txt file, since no file name can hold it")
    if not fetched.is_complete:
        print("not every address was asked: type the same command again to go on")
        return 1
    return 0


def probability(text: str) -> float:
    """Read a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability from 0 to 1")
    return number


def at_least_one(text: str) -> int:
    """Read a whole number from 1 up."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description="Gather ground truth: pictures that keep a model what it was while it learns new ones."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_fetch(commands.add_parser("fetch", help="choose pictures from LAION-style tables and fetch them"))
    caption = commands.add_parser("caption", help="give all pictures of a folder one caption")
    caption.add_argument("folder", help="pictures, in any depth of folders")
    caption.add_argument("--text", required=True, help='the caption, such as "close up photo of a person"')
    caption.add_argument("--dry-run", "--dry_run", action="store_true", help="change nothing, only say what would be")
    return parser


def add_fetch(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fetch``."""
    add = parser.add_argument
    add("parquet", nargs="+", help="parquet files, folders of them, or patterns")
    add("--out", required=True, help="folder for the pictures: a subfolder of a data root, or one for shards")
    add(
        "--format",
        choices=FORMATS,
        default="folder",
        help="pictures named by captions, or tar shards (default: folder)",
    )
    add("--dry-run", "--dry_run", action="store_true", help="only count what would be fetched")
    choice = parser.add_argument_group("which pictures").add_argument
    choice("--all_words", nargs="+", default=[], metavar="WORD", help="words or phrases that captions must all hold")
    choice("--any_words", nargs="+", default=[], metavar="WORD", help="... of which they must hold one")
    choice("--no_words", nargs="+", default=[], metavar="WORD", help="... of which they may hold none")
    choice("--substring", action="store_true", help="also find words within others (man in woman)")
    choice("--min_side", type=at_least_one, default=512, help="least width and height in pixels (default: 512)")
    choice("--max_aspect", type=float, help="how many times as long as the other a side may be")
    choice("--min_score", type=float, help="least aesthetic score, such as 5")
    choice("--max_watermark", type=probability, help="greatest probability of a watermark, such as 0.5")
    choice("--max_unsafe", type=probability, default=0.1, help="greatest probability of being unsafe (default: 0.1)")
    choice("--allow_unsafe", action="store_true", help="take pictures whatever is said of their safety")
    choice("--limit", type=at_least_one, help="how many addresses to choose; many of LAION's are gone, so ask for more")
    how = parser.add_argument_group("how they are fetched").add_argument
    how(
        "--size", type=at_least_one, default=512, help="larger pictures are reduced to this shorter side (default: 512)"
    )
    how("--threads", type=at_least_one, default=16, help="pictures fetched at a time by each process (default: 16)")
    how("--processes", type=at_least_one, default=1, help="number of processes (default: 1)")
    how("--per_shard", type=at_least_one, default=1000, help="addresses in a shard (default: 1000)")
    how("--timeout", type=at_least_one, default=10, help="seconds to wait for a server (default: 10)")
    how("--user_agent", default=USER_AGENT, help=f"name that servers see (default: {USER_AGENT})")
    how("--python", default=sys.executable, help="a Python that has img2dataset (default: this one)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what a command line asks for.

    Args:
        arguments: the words after the script's name; None takes the process's own.

    Returns:
        The exit status.
    """
    options = build_parser().parse_args(arguments)
    try:
        if options.command == "fetch":
            return fetch(options)
        pictures, changes = caption_all(Path(options.folder), options.text, options.dry_run)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    for line in changes[:NAMED_CHANGES]:
        print(line)
    if len(changes) > NAMED_CHANGES:
        print(f"... and {len(changes) - NAMED_CHANGES:,} more")
    print(f"{len(changes):,} of {pictures:,} pictures {'would get' if options.dry_run else 'got'} a new name")
    if changes and not options.dry_run:
        print(f'take back with: python scripts/captions.py undo --data_root "{options.folder}"')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
