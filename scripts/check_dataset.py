"""Look at a data set before any GPU hour: what training will make of each picture, and what is wrong with it.

python scripts/check_dataset.py --data_root FOLDER [--base YAML ...] [--decode] [--json [FILE]] [--html FILE]

Needs no GPU and no model. The flags of main.py and key.path=value are taken too, so the command that is going to
train can be given as it is; without --base the shipped v1-finetune_everydream.yaml counts.
Exit status: 0 nothing is wrong, 1 warnings, 2 errors.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from omegaconf import OmegaConf
from tqdm import tqdm

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

from check_captions import caption_room, count_tokens  # noqa: E402
from check_report import write_report  # noqa: E402
from check_result import CheckResult, DataSettings, Steps  # noqa: E402
from check_terminal import devices_text, text_lines  # noqa: E402

from ldm.data.buckets import count_batches  # noqa: E402
from ldm.data.data_figures import bucket_figures, caption_figures, count_formats, folder_figures  # noqa: E402
from ldm.data.every_dream import EveryDreamBatch  # noqa: E402
from ldm.data.fingerprints import content_hash, groups_of_equals, groups_of_lookalikes, same_size  # noqa: E402
from ldm.data.image_transform import resolve_resize_mode  # noqa: E402
from ldm.data.inspection import (  # noqa: E402
    Finding,
    caption_findings,
    copy_findings,
    decoding_findings,
    fate_of,
    finding,
    line_finding,
    picture_findings,
    scan_findings,
    sort_findings,
)
from ldm.data.picture_header import PictureHeader, map_in_threads, read_headers  # noqa: E402
from ldm.data.pixels import Pixels, look_at_pixels  # noqa: E402
from ldm.data.scan import Scan, scan_data_root  # noqa: E402
from ldm.training.cli import parse_options  # noqa: E402
from ldm.training.config import load_run_config  # noqa: E402
from ldm.training.summary import limited_batches  # noqa: E402
from ldm.util import get_obj_from_str, instantiate_from_config  # noqa: E402

DEFAULT_BASE: Final = ROOT / "configs" / "stable-diffusion" / "v1-finetune_everydream.yaml"
USER_ERROR: Final = 2
INTERRUPTED: Final = 130

OVERRIDE: Final = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+=", re.ASCII)

MOST_EPOCHS: Final = 12
"""How many epochs' steps are listed, where epochs differ."""

Bar = Callable[[str, int], Any]


def read_settings(words: Sequence[str]) -> tuple[dict[str, Any], DataSettings]:
    """Read what training would be told.

    Args:
        words: flags and overrides of ``main.py``.

    Returns:
        The merged configuration, and what it says about the training set.

    Raises:
        ValueError: the configuration is wrong or trains on no folder; a line for each problem.
    """
    assumed = not any(word in ("--base", "-b", "--resume", "-r") or word.startswith("--base=") for word in words)
    shown_base = os.path.relpath(DEFAULT_BASE) if DEFAULT_BASE.is_relative_to(Path.cwd()) else str(DEFAULT_BASE)
    # To look at a configuration is no reason to have the GPU that it trains on.
    options = parse_options([*(["--base", shown_base] if assumed else []), *words, "--print_config"])
    run_config = load_run_config(replace(options, train=False))
    config: dict[str, Any] = OmegaConf.to_container(run_config.config, resolve=True)  # type: ignore[assignment]
    data = (config.get("data") or {}).get("params") or {}
    train = data.get("train") or {}
    if "target" not in train:
        raise ValueError("data.params.train is missing: give it target: ldm.data.every_dream.EveryDreamBatch")
    params = folder_params(train)
    if params is None:
        raise ValueError(
            f"data.params.train.target {train['target']!r} is no folder of captioned pictures; check its folder with "
            "a YAML whose target is ldm.data.every_dream.EveryDreamBatch"
        )
    if not params.get("data_root"):
        raise ValueError("no folder was given; add --data_root FOLDER, the one that holds your subfolders of pictures")
    trainer = (config.get("lightning") or {}).get("trainer") or {}
    settings = DataSettings(
        bases=options.base or [str(options.resume)],
        assumed=assumed,
        data_root=params["data_root"],
        size=params["size"],
        resize_mode=resolve_resize_mode(params["resize_mode"], params["center_crop"]),
        crop=params.get("crop", "center"),
        repeats=params["repeats"],
        recursive=params.get("recursive", False),
        batch_size=data["batch_size"],
        devices=count_devices(trainer),
        accumulate=trainer.get("accumulate_grad_batches", 1),
        epochs=_limit(trainer.get("max_epochs")),
        max_steps=_limit(trainer.get("max_steps")),
    )
    return config, settings


def folder_params(dataset: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the folder of pictures in a training set.

    Args:
        dataset: its ``{target, params}``; a folder, or a mixture whose ``sets`` hold one.

    Returns:
        The folder's parameters with their defaults; None where there is no folder.
    """
    target = get_obj_from_str(dataset["target"])
    given = dataset.get("params") or {}
    if isinstance(target, type) and issubclass(target, EveryDreamBatch):
        known = inspect.signature(target).parameters
        defaults = {name: known[name].default for name in known if known[name].default is not inspect.Parameter.empty}
        return defaults | {name: value for name, value in given.items() if name in known}
    for part in (given.get("sets") or {}).values():
        # What a mixture says holds for each of its sets that does not say otherwise.
        found = folder_params({**part, "params": {**given, **(part.get("params") or {})}})
        if found is not None:
            return found
    return None


def _limit(value: Any) -> int | None:
    return None if value in (None, -1) else int(value)


def count_devices(trainer: Mapping[str, Any]) -> int:
    """Count the devices of a trainer's arguments, of all nodes; 1 for what only the training machine can tell."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, str):
        devices = [word for word in devices.split(",") if word.strip()] if "," in devices else devices
        devices = int(devices) if isinstance(devices, str) and devices.isdigit() else devices
    count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1
    return count * int(trainer.get("num_nodes") or 1)


def check(
    config: Mapping[str, Any], settings: DataSettings, decode: bool = False, threads: int | None = None, bar: Bar = tqdm
) -> CheckResult:
    """Look at a data set.

    Args:
        config: the merged configuration.
        settings: what it says about the training set.
        decode: decode every picture.
        threads: how many files are read at a time; None: by the processor's cores.
        bar: makes a progress bar from what it counts and how many there are.

    Returns:
        What was found.

    Raises:
        OSError: the data root does not exist or is a file.
    """
    began = time.monotonic()
    scan = scan_data_root(settings.data_root, recursive=settings.recursive, named=None)
    paths = [picture.path for picture in scan.pictures]
    with bar("reading headers", len(paths)) as shown:
        headers = read_headers(paths, threads, shown.update)
    findings = scan_findings(scan, settings.data_root)
    findings += picture_findings(headers, settings.size, settings.resize_mode)
    equals = find_copies(paths, headers, threads, bar)
    pixels = Pixels()
    lookalikes: list[list[str]] = []
    if decode:
        with bar("decoding", sum(not isinstance(header, str) for header in headers.values())) as shown:
            pixels = look_at_pixels(headers, threads, shown.update)
        findings = decoding_findings(headers, pixels.broken, pixels.opaque, findings)
        lookalikes = find_lookalikes(pixels, equals)
    findings += copy_findings("duplicate", equals, age(equals, headers))
    findings += copy_findings("near_duplicate", lookalikes, age(lookalikes, headers))

    tokens = count_tokens(Counter(picture.caption for picture in scan.pictures), caption_room(config))
    broken_sidecars = {one.path for one in findings if one.kind == "bad_sidecar"}
    findings += caption_findings(scan.pictures, tokens.cut, [*equals, *lookalikes], broken_sidecars)
    unreadable = {path: header for path, header in headers.items() if isinstance(header, str)} | pixels.broken
    steps, refusals = count_steps(config, settings, scan, headers, unreadable)
    findings += refusals
    fates = {
        path: fate_of((header.width, header.height), settings.size, settings.resize_mode)
        for path, header in headers.items()
        if isinstance(header, PictureHeader)
    }
    sizes = {path: header.file_bytes for path, header in headers.items() if isinstance(header, PictureHeader)}
    sound = [picture for picture in scan.pictures if picture.path not in unreadable]
    return CheckResult(
        settings=settings,
        decoded=decode,
        pictures=scan.pictures,
        headers=headers,
        fates=fates,
        findings=sort_findings(findings),
        folders=folder_figures(scan.folder_counts, sound, sizes, scan.folder_settings, settings.repeats),
        buckets=bucket_figures({path: fate for path, fate in fates.items() if path not in unreadable}),
        captions=caption_figures(scan.pictures, tokens.lengths),
        tokens=tokens,
        formats=count_formats(headers),
        file_bytes=sum(sizes.values()),
        steps=steps,
        seconds=time.monotonic() - began,
    )


def find_copies(
    paths: Sequence[str], headers: Mapping[str, PictureHeader | str], threads: int | None, bar: Bar
) -> list[list[str]]:
    """Find files of the same content; only files of the same length are read."""
    sizes = {path: header.file_bytes for path in paths if isinstance(header := headers[path], PictureHeader)}
    candidates = same_size(sizes)
    digests: dict[str, bytes] = {}
    with bar("comparing files", len(candidates)) as shown:
        for path, digest in map_in_threads(_digest, candidates, threads or min(32, 2 * (os.cpu_count() or 1))):
            if digest is not None:
                digests[path] = digest
            shown.update(1)
    return groups_of_equals(digests)


def _digest(path: str) -> bytes | None:
    """Read a file's digest; None for one that has gone or cannot be read to its end, which others will tell."""
    try:
        return content_hash(path)
    except OSError:
        return None


def find_lookalikes(pixels: Pixels, equals: Sequence[Sequence[str]]) -> list[list[str]]:
    """Find pictures that look the same, one of each group of equal files standing for all."""
    copies = {path for group in equals for path in group[1:]}
    paths = [path for path in pixels.thumbnails if path not in copies]
    if not paths:
        return []
    groups = groups_of_lookalikes(np.stack([pixels.thumbnails[path] for path in paths]))
    return [[paths[number] for number in group] for group in groups]


def age(groups: Sequence[Sequence[str]], headers: Mapping[str, PictureHeader | str]) -> dict[str, tuple[float, ...]]:
    """Tell originals from copies: the larger picture first, then the older file."""
    ages: dict[str, tuple[float, ...]] = {}
    for path in (path for group in groups for path in group):
        header = headers[path]
        pixels = header.width * header.height if isinstance(header, PictureHeader) else 0
        try:
            written = os.stat(path).st_mtime
        except OSError:
            written = math.inf
        ages[path] = (-pixels, written)
    return ages


def count_steps(
    config: Mapping[str, Any],
    settings: DataSettings,
    scan: Scan,
    headers: Mapping[str, PictureHeader | str],
    unreadable: Mapping[str, str],
) -> tuple[Steps | None, list[Finding]]:
    """Build the data sets as training does, and count their batches.

    Args:
        config: the merged configuration.
        settings: what it says about the training set.
        scan: what lies below the data root.
        headers: of its pictures, by path.
        unreadable: the reason by path of the pictures that cannot be read, which are left out.

    Returns:
        The steps; or None, with what training would refuse beside the problems of the scan.
    """
    if scan.problems:
        return None, []
    data = config["data"]["params"]
    trainer = (config.get("lightning") or {}).get("trainer") or {}
    sets: dict[str, Any] = {}
    for split in ("train", "validation"):
        if not data.get(split):
            continue
        try:
            sets[split] = instantiate_from_config(data[split])
            for dataset in (sets[split], *getattr(sets[split], "parts", {}).values()):
                if isinstance(dataset, EveryDreamBatch):
                    dataset.leave_out(unreadable)
                    if headers.keys() >= {picture.path for picture in dataset.pictures}:
                        dataset.know_headers(headers)
        except (ValueError, OSError) as error:
            return None, [refusal(line, settings.data_root) for line in str(error).splitlines()]
    train = sets["train"]
    together = settings.batch_size * settings.devices
    if together > len(train):
        reason = (
            f"batch size {settings.batch_size}{devices_text(settings.devices)} is more than the {len(train)} pictures "
            "that an epoch shows"
        )
        remedy = "lower data.params.batch_size, or raise data.params.train.params.repeats"
        return None, [Finding(settings.data_root, "error", "refused", reason, remedy)]

    def batches(dataset: Any, epoch: int, limit: int | float | None) -> int:
        return limited_batches(count_batches(dataset, together, epoch), limit)

    # Epochs repeat when each folder has been shown a whole number of times; those of a mixture may never do.
    period = math.lcm(*((row.multiply * settings.repeats).denominator for row in scan.folder_settings.values()))
    if not isinstance(train, EveryDreamBatch):
        period = MOST_EPOCHS + 1
    different = range(min(period, settings.epochs or period, MOST_EPOCHS))
    overfit = trainer.get("overfit_batches") or 0
    name = "overfit_batches" if overfit else "limit_train_batches"
    training = [batches(train, 0 if overfit else epoch, trainer.get(name)) for epoch in different]
    if not any(training):
        reason = (
            f"lightning.trainer.{name} {trainer[name]} leaves none of {batches(train, 0, None)} batches to train on"
        )
        return None, [Finding(settings.data_root, "error", "refused", reason, f"raise {name}")]
    exposures = [train.epoch_length(epoch) for epoch in different]
    alike = len(set(training)) == 1 and len(set(exposures)) == 1
    limits = [settings.max_steps]
    if settings.epochs is not None and (period <= MOST_EPOCHS or settings.epochs <= MOST_EPOCHS):
        limits.append(
            sum(-(-training[epoch % len(training)] // settings.accumulate) for epoch in range(settings.epochs))
        )
    sizes, counts = np.unique(train.training_sizes(0), axis=0, return_counts=True)
    return Steps(
        training=training[:1] if alike else training,
        exposures=exposures[:1] if alike else exposures,
        total=min((limit for limit in limits if limit is not None), default=None),
        validation=batches(sets["validation"], 0, trainer.get("limit_val_batches")) if "validation" in sets else 0,
        batches={
            (int(width), int(height)): -(-int(count) // together)
            for (width, height), count in zip(sizes, counts, strict=True)
        },
    ), []


def refusal(line: str, data_root: str) -> Finding:
    """Make a finding of a line that a data set says when it cannot be built, about its file where it names one."""
    located = line_finding("error", line)
    return located if os.path.lexists(located.path) else finding(data_root, "error", "refused", line)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--decode", action="store_true", help="decode every picture: finds damage and near duplicates")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write everything as JSON; without FILE to standard output"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with thumbnails, which needs no other file")
    parser.add_argument("--all", action="store_true", help="name every path, not the first few of each kind")
    parser.add_argument("--threads", type=int, metavar="N", help="files read at a time (default: by the cores)")
    return parser


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """Show a bar on a terminal, and nothing in a pipe."""
    hidden = sys.stderr is None or not sys.stderr.isatty() or not total
    with tqdm(total=total, desc=what, unit="file", leave=False, disable=hidden, file=sys.stderr, delay=0.3) as shown:
        yield shown


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set and say what was found.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status: 0 nothing is wrong, 1 warnings, 2 errors.
    """
    options, words = build_parser().parse_known_args(argv)
    if options.json is not None and OVERRIDE.match(options.json):
        words, options.json = [options.json, *words], "-"  # --json without FILE, and a setting behind it
    try:
        if options.threads is not None and options.threads < 1:
            raise ValueError(f"--threads {options.threads} is not allowed; give at least 1")
        for file in (options.html, options.json):
            # Before anything that takes long, not after it.
            if file not in (None, "-") and not os.path.isdir(os.path.dirname(file) or "."):
                raise ValueError(f"{file} cannot be written: there is no folder {os.path.dirname(file)}; make it first")
        config, settings = read_settings(words)
        result = check(config, settings, options.decode, options.threads, progress_bar)
        if options.html is not None:
            write_report(result, options.html, progress_bar)
        if options.json not in (None, "-"):
            with open(options.json, "w", encoding="ascii") as file:
                _write_json(result, file)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"check_dataset: {line}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("check_dataset: stopped", file=sys.stderr)
        return INTERRUPTED
    _show(result, options)
    return result.status


def _write_json(result: CheckResult, file: TextIO) -> None:
    json.dump(result.to_json(), file, indent=1)
    file.write("\n")


def _show(result: CheckResult, options: argparse.Namespace) -> None:
    """Write to standard output; who reads it may have enough before its end."""
    try:
        if options.json == "-":
            _write_json(result, sys.stdout)
        else:
            is_terminal = sys.stdout.isatty()
            width = min(shutil.get_terminal_size().columns, 120) if is_terminal else 100
            encoding = sys.stdout.encoding or "utf-8"
            for line in text_lines(result, width, is_terminal and "NO_COLOR" not in os.environ, options.all):
                print(line.encode(encoding, "replace").decode(encoding))
            for name, file in (("page", options.html), ("JSON", options.json)):
                if file is not None:
                    print(f"{name}: {file}")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is still buffered has nowhere to go


if __name__ == "__main__":
    sys.exit(main())
