"""Time how fast pictures can be read for training, by number of loader processes, and what limits it.

    python scripts/benchmark_data.py                                         # 64 synthetic photographs of 12 megapixels
    python scripts/benchmark_data.py --data_root training_samples/MyProject  # real pictures, laid out for training
    python scripts/benchmark_data.py --size 768 --workers 1,8,16

The training column is the training loader itself with its processes: order, buckets, captions, and each picture read,
decoded, cut, resized and collated to bytes. Beside it stands what libjpeg alone does with the same files in as many
processes: decoding them at the reduced scale that training uses, decoding them whole, and as little as any reader of
the whole file can do (its entropy coding, which a decoding at an eighth of the size still has to do). The first row
is what the processor time of one image, taken in this process, allows a core that does nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.data.aspects import bucket_sizes, nearest_bucket  # noqa: E402
from ldm.data.data_module import DataModuleFromConfig  # noqa: E402
from ldm.data.every_dream import EveryDreamBatch  # noqa: E402
from ldm.data.image_transform import RESIZE_MODES, draft_scale, place, read_headers  # noqa: E402

PIPELINE: Final = "training"
ENTROPY: Final = "entropy coding"
WHOLE: Final = "whole decode"
REDUCED: Final = "reduced decode"
LEAST_BATCHES: Final = 4
LEAST_EXPOSURES: Final = 2_000


@dataclass(frozen=True)
class Rate:
    """How fast one kind of work went.

    Attributes:
        work: ``PIPELINE`` or one of the limits.
        workers: loader processes; 0: this process, by its processor time.
        images_per_second: in all of them together.
    """

    work: str
    workers: int
    images_per_second: float


class Decodings(Dataset[int]):
    """JPEG files that libjpeg decodes, and nothing more.

    Args:
        paths: the files.
        scales: how many times smaller each is decoded: 1, 2, 4 or 8.
    """

    def __init__(self, paths: Sequence[str], scales: Sequence[int]) -> None:
        self.paths = paths
        self.scales = scales

    def __getitem__(self, index: int) -> int:
        number = index % len(self.paths)
        with Image.open(self.paths[number]) as image:
            image.draft(None, (image.width // self.scales[number], image.height // self.scales[number]))
            image.load()
            return image.width


class Endless(Sampler[int]):
    """All indices, for as long as somebody asks."""

    def __iter__(self) -> Iterator[int]:
        index = 0
        while True:
            yield index
            index += 1


def build_parser() -> argparse.ArgumentParser:
    """Declare the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, help="read this folder of subfolders of pictures instead")
    parser.add_argument("--images", type=int, default=64, help="synthetic photographs (default: %(default)s)")
    parser.add_argument("--megapixels", type=float, default=12.0, help="of each of these (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--resize_mode", choices=RESIZE_MODES, default="bucket", help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures in a batch (default: %(default)s)")
    parser.add_argument("--workers", help="numbers of loader processes, as 1,2,4 (default: 1, 2, 4, ... and all cores)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of each measurement (default: %(default)s)")
    parser.add_argument("--target", type=float, default=150.0, help="images a second wanted (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    return parser


def processor_cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_counts(text: str | None, cores: int) -> list[int]:
    """Read the numbers of loader processes to measure.

    Args:
        text: numbers with commas between them; None: the powers of 2 below the number of cores, and that.
        cores: processor cores.

    Returns:
        Numbers of at least 1, rising.

    Raises:
        ValueError: it is no such list.
    """
    if text is None:
        return sorted({1, cores, *(2**power for power in range(cores.bit_length()) if 2**power < cores)})
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--workers {text}: give numbers of at least 1 with commas between them, such as 1,2,4")
    return sorted({int(word) for word in words})


def synthetic_scene(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Compute a picture that compresses like a photograph: detail at every scale, and some grain.

    Args:
        width: in pixels.
        height: in pixels.

    Returns:
        uint8 (height, width, 3).
    """
    rng = np.random.default_rng(0)
    scene = np.full((height, width, 3), 128.0, dtype=np.float32)
    for step in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        coloured = step > 4  # fine detail and grain are mostly light and dark
        cells = rng.standard_normal((height // step + 2, width // step + 2, 3 if coloured else 1), dtype=np.float32)
        for channel in range(3):
            layer = Image.fromarray(cells[..., channel if coloured else 0])
            scene[..., channel] += (
                5.0 * step**0.35 * np.asarray(layer.resize((width, height), Image.Resampling.BILINEAR))
            )
    return scene.clip(0, 255).astype(np.uint8)


def make_photographs(folder: Path, count: int, megapixels: float) -> list[str]:
    """Write synthetic photographs of 4:3 at quality 90.

    Args:
        folder: where to.
        count: how many.
        megapixels: size of each.

    Returns:
        Their paths.
    """
    scene = synthetic_scene(round((megapixels * 4e6 / 3) ** 0.5), round((megapixels * 3e6 / 4) ** 0.5))
    paths = [folder / f"{number:04d}.jpg" for number in range(count)]

    def write(number: int) -> None:
        shifted = np.roll(scene, (number * 97 % scene.shape[0], number * 89 % scene.shape[1]), axis=(0, 1))
        Image.fromarray(shifted).save(paths[number], quality=90)

    with ThreadPoolExecutor(min(8, processor_cores())) as pool:
        for _ in pool.map(write, range(count)):
            pass
    return [str(path) for path in paths]


def build_dataset(data_root: Path, options: argparse.Namespace) -> EveryDreamBatch:
    """Build the training set of a folder, with epochs long enough to measure in.

    Args:
        data_root: folder of subfolders of pictures.
        options: the command line.

    Returns:
        The data set, whose pictures come as bytes, as they do in training.

    Raises:
        ValueError: the folder cannot be trained on.
        OSError: there is no such folder.
    """
    dataset = EveryDreamBatch(str(data_root), options.size, repeats=1, resize_mode=options.resize_mode)
    repeats = -(-LEAST_EXPOSURES // len(dataset))
    dataset = EveryDreamBatch(str(data_root), options.size, repeats=repeats, resize_mode=options.resize_mode)
    dataset.as_bytes = True
    return dataset


def reduced_scales(dataset: EveryDreamBatch, resize_mode: str) -> dict[str, int]:
    """Tell at which scale training decodes the JPEGs of a data set.

    Args:
        dataset: from :func:`build_dataset`.
        resize_mode: one of ``RESIZE_MODES``.

    Returns:
        1, 2, 4 or 8 by path.
    """
    scales = {}
    for path, header in read_headers([picture.path for picture in dataset.pictures]).items():
        if not isinstance(header, str) and header.format == "JPEG":
            source = (header.width, header.height)
            size = (dataset.size or 0, dataset.size or 0)
            if resize_mode == "bucket":
                buckets = bucket_sizes(dataset.size or 0)
                size = buckets[nearest_bucket(*source, buckets)]
            placement = place(source, size, resize_mode, "center", (0.5, 0.5), False)
            scales[path] = 1 if resize_mode == "squash" else draft_scale(placement)
    return scales


def time_training(dataset: EveryDreamBatch, workers: int, options: argparse.Namespace) -> Rate:
    """Time the training loader.

    Args:
        dataset: from :func:`build_dataset`.
        workers: loader processes.
        options: the command line.

    Returns:
        The rate.
    """
    module = DataModuleFromConfig(options.batch_size, num_workers=workers)
    module.datasets["train"] = dataset
    loader = module.train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return Rate(PIPELINE, workers, time_batches((len(batch["path"]) for batch in batches), workers, options.seconds))


def time_decoding(work: str, paths: Sequence[str], scales: Sequence[int], workers: int, seconds: float) -> Rate:
    """Time libjpeg alone.

    Args:
        work: what to call it.
        paths: JPEG files.
        scales: how many times smaller each is decoded.
        workers: loader processes.
        seconds: time to measure for.

    Returns:
        The rate.
    """
    loader = DataLoader(Decodings(paths, scales), batch_size=4, sampler=Endless(), num_workers=workers)
    return Rate(work, workers, time_batches((len(batch) for batch in loader), workers, seconds))


def time_core(work: str, items: Dataset[Any], count: int, seconds: float) -> Rate:
    """Measure how many images a second of processor time suffices for.

    Args:
        work: what to call it.
        items: pictures or decodings.
        count: how many of them there are.
        seconds: time to measure for.

    Returns:
        The rate, for no worker.
    """
    started, began = time.perf_counter(), time.process_time()
    images = 0
    while not images or time.perf_counter() - started < seconds:
        items[images % count]
        images += 1
    return Rate(work, 0, images / (time.process_time() - began))


def time_batches(sizes: Iterator[int], workers: int, seconds: float) -> float:
    """Time an endless row of batches.

    Args:
        sizes: pictures in each batch, as it arrives.
        workers: loader processes.
        seconds: time to measure for.

    Returns:
        Images a second.
    """
    # The first batches wait for the processes to start, and the next find others already made.
    for _ in range(3 * workers):
        next(sizes)
    started = time.perf_counter()
    images, batches, passed = 0, 0, 0.0
    while batches < LEAST_BATCHES or passed < seconds:
        images += next(sizes)
        batches += 1
        passed = time.perf_counter() - started
    return images / passed


def format_report(rates: Sequence[Rate], target: float) -> list[str]:
    """Lay the figures out.

    Args:
        rates: all that was measured; ``PIPELINE`` for each number of processes.
        target: images a second wanted.

    Returns:
        The table's lines, and a line that says whether the target is reached.
    """
    by_work = {(rate.work, rate.workers): rate.images_per_second for rate in rates}
    columns = (PIPELINE, REDUCED, WHOLE, ENTROPY)
    lines = [f"{'images/s with':>16}" + "".join(f"{name:>16}" for name in (*columns, "training/worker"))]
    for workers in sorted({rate.workers for rate in rates}):
        cells = [by_work.get((name, workers)) for name in columns]
        cells.append(by_work[PIPELINE, workers] / workers if workers else None)
        label = f"{workers} worker" + ("s" if workers > 1 else "") if workers else "a core, at most"
        row = "".join(f"{'' if cell is None else format(cell, '.1f'):>16}" for cell in cells)
        lines.append(f"{label:>16}{row}".rstrip())
    pipeline = [rate for rate in rates if rate.work == PIPELINE and rate.workers]
    fastest = max(pipeline, key=lambda rate: rate.images_per_second)
    enough = [rate.workers for rate in pipeline if rate.images_per_second >= target]
    if enough:
        lines.append(f"{target:g} images/s are reached with {enough[0]} workers")
    else:
        each = max(rate.images_per_second / rate.workers for rate in pipeline)
        lines.append(
            f"{target:g} images/s are not reached: {fastest.images_per_second:.1f} with {fastest.workers} workers; "
            f"at {each:.1f} a worker they take {-int(-target // each)} cores like these"
        )
    return lines


def processor_name() -> str:
    """Name the processor, as well as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> list[Rate]:
    """Measure everything that the command line asks for.

    Args:
        options: the command line.
        folder: an empty folder for synthetic photographs.
        say: told what is being done.

    Returns:
        The rates.

    Raises:
        ValueError: an option is off, or there is nothing to read.
        OSError: a file cannot be read.
    """
    cores = processor_cores()
    counts = worker_counts(options.workers, cores)
    if options.data_root is None:
        say(f"writing {options.images} photographs of {options.megapixels:g} megapixels ...")
        (folder / "photographs").mkdir()
        make_photographs(folder / "photographs", options.images, options.megapixels)
    dataset = build_dataset(options.data_root or folder, options)
    paths = [picture.path for picture in dataset.pictures]
    pixels = sum(header.width * header.height for header in read_headers(paths).values() if not isinstance(header, str))
    say(
        f"{len(paths)} pictures of {pixels / len(paths) / 1e6:.1f} megapixels and "
        f"{sum(map(os.path.getsize, paths)) / len(paths) / 1e6:.1f} MB on average, to {options.size} pixels "
        f"({options.resize_mode})"
    )
    say(f"{cores} processor cores, {processor_name()}; torch {torch.__version__}, Pillow {Image.__version__}")
    scales = reduced_scales(dataset, options.resize_mode)
    limits = {REDUCED: list(scales.values()), WHOLE: [1] * len(scales), ENTROPY: [8] * len(scales)} if scales else {}
    torch.set_num_threads(1)  # as in a loader process
    rates = [time_core(PIPELINE, dataset, len(paths), options.seconds)]
    for work, work_scales in limits.items():
        rates.append(time_core(work, Decodings(list(scales), work_scales), len(scales), options.seconds))
    for workers in counts:
        say(f"measuring with {workers} ...")
        rates.append(time_training(dataset, workers, options))
        if workers in (counts[0], counts[-1]):  # the limits: in one process, and in as many as there are
            for work, work_scales in limits.items():
                rates.append(time_decoding(work, list(scales), work_scales, workers, options.seconds))
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and show the table.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        0, or 1 where nothing could be measured.
    """
    options = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            rates = run(options, Path(folder), lambda line: print(line, flush=True))
        except (ValueError, OSError) as problem:
            print(problem, file=sys.stderr)
            return 1
    if options.out:
        options.out.write_text(json.dumps([asdict(rate) for rate in rates], indent=1) + "\n", encoding="utf-8")
    print("\n".join(["", *format_report(rates, options.target)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
