"""Time how fast pictures can be read for training, by number of loader processes, and what limits it.

    python scripts/benchmark_data.py                                         # 64 synthetic photographs of 12 megapixels
    python scripts/benchmark_data.py --data_root training_samples/MyProject  # the JPEGs of a folder
    python scripts/benchmark_data.py --size 768 --workers 1,8,16

Each figure is taken through torch's loader processes, as in training: a file is read, decoded, cut, resized and
collated to bytes. Beside it stands what libjpeg alone does with the same files, on the same processors and in the
same number of processes: decoding them whole, decoding them at the reduced scale that training uses, and as little
as any reader of the whole file can do (its entropy coding, which an eighth of the size leaves to do).
"""

from __future__ import annotations

import argparse
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
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.data.image_transform import (  # noqa: E402
    CROPS,
    RESIZE_MODES,
    Placement,
    place,
    read_headers,
    read_training_bytes,
    resample_filter,
)

PIPELINE: Final = "training"
ENTROPY: Final = "entropy coding"
WHOLE: Final = "whole decode"
REDUCED: Final = "reduced decode"
JPEG_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".jfif"})
RESAMPLE: Final = resample_filter("bicubic")
LEAST_BATCHES: Final = 4


@dataclass(frozen=True)
class Rate:
    """How fast one kind of work went.

    Attributes:
        work: ``PIPELINE`` or one of the limits.
        workers: loader processes.
        images_per_second: in all of them together.
    """

    work: str
    workers: int
    images_per_second: float


@dataclass(frozen=True)
class Photograph:
    """A file to read, and what of it is trained on."""

    path: str
    source: tuple[int, int]
    placement: Placement


class Readings(Dataset[Tensor]):
    """Pictures read over and over in one of the ways that are compared.

    Args:
        photographs: what to read.
        work: ``PIPELINE`` or one of the limits.
        resize_mode: one of ``RESIZE_MODES``.
    """

    def __init__(self, photographs: Sequence[Photograph], work: str, resize_mode: str) -> None:
        self.photographs = photographs
        self.work = work
        self.resize_mode = resize_mode

    def __getitem__(self, index: int) -> Tensor:
        photograph = self.photographs[index % len(self.photographs)]
        if self.work == PIPELINE:
            return torch.from_numpy(
                read_training_bytes(photograph.path, photograph.placement, self.resize_mode, RESAMPLE)
            )
        with Image.open(photograph.path) as image:
            scale = {ENTROPY: 8, WHOLE: 1, REDUCED: reduced_scale(photograph)}[self.work]
            image.draft(None, (image.width // scale, image.height // scale))
            image.load()
            return torch.tensor(image.size)


class Endless(Sampler[int]):
    """All indices, for as long as somebody asks."""

    def __iter__(self) -> Iterator[int]:
        index = 0
        while True:
            yield index
            index += 1


def reduced_scale(photograph: Photograph) -> int:
    """Tell at which scale training decodes a photograph: the smallest that leaves twice the pixels it needs."""
    left, top, right, bottom = photograph.placement.box
    width, height = photograph.placement.size
    spare = min((right - left) / width, (bottom - top) / height)
    return next((scale for scale in (8, 4, 2) if spare >= 2 * scale), 1)


def build_parser() -> argparse.ArgumentParser:
    """Declare the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, help="read the JPEG files in and below this folder instead")
    parser.add_argument("--images", type=int, default=64, help="synthetic photographs (default: %(default)s)")
    parser.add_argument("--megapixels", type=float, default=12.0, help="of each of these (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--resize_mode", choices=RESIZE_MODES, default="bucket", help="(default: %(default)s)")
    parser.add_argument("--crop", choices=CROPS, default="center", help="(default: %(default)s)")
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


def find_photographs(paths: Sequence[str], size: int, resize_mode: str, crop: str) -> list[Photograph]:
    """Read the headers of JPEG files, and place each one.

    Args:
        paths: picture files.
        size: side of the training square in pixels.
        resize_mode: one of ``RESIZE_MODES``.
        crop: one of ``CROPS``.

    Returns:
        The JPEGs among them.

    Raises:
        ValueError: there is none that can be read.
    """
    found = [
        Photograph(
            path,
            (header.width, header.height),
            place((header.width, header.height), (size, size), resize_mode, crop, (0.5, 0.5), False),
        )
        for path, header in read_headers(paths).items()
        if not isinstance(header, str) and header.format == "JPEG"
    ]
    if not found:
        raise ValueError("there is no JPEG file to read; give --data_root a folder of them, or leave it out")
    return found


def measure(photographs: Sequence[Photograph], work: str, workers: int, options: argparse.Namespace) -> Rate:
    """Time one kind of work in a number of loader processes.

    Args:
        photographs: what to read.
        work: ``PIPELINE`` or one of the limits.
        workers: loader processes.
        options: the command line.

    Returns:
        The rate.
    """
    loader = DataLoader(
        Readings(photographs, work, options.resize_mode),
        batch_size=options.batch_size,
        sampler=Endless(),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=torch.stack,
    )
    batches = iter(loader)
    # The first batches wait for the processes to start, and then find others already made.
    for _ in range(3 * workers):
        next(batches)
    started = time.perf_counter()
    count, seconds = 0, 0.0
    while count < LEAST_BATCHES or seconds < options.seconds:
        next(batches)
        count += 1
        seconds = time.perf_counter() - started
    return Rate(work, workers, count * options.batch_size / seconds)


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
    pipeline = [rate for rate in rates if rate.work == PIPELINE]
    for rate in pipeline:
        cells = [by_work.get((name, rate.workers)) for name in columns]
        row = "".join(f"{'' if cell is None else format(cell, '.1f'):>16}" for cell in cells)
        label = f"{rate.workers} worker" + ("s" if rate.workers > 1 else "")
        lines.append(f"{label:>16}{row}{rate.images_per_second / rate.workers:>16.1f}")
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
        paths = make_photographs(folder, options.images, options.megapixels)
    else:
        paths = [str(path) for path in sorted(options.data_root.rglob("*")) if path.suffix.lower() in JPEG_SUFFIXES]
    photographs = find_photographs(paths, options.size, options.resize_mode, options.crop)
    pixels = sum(width * height for width, height in (photograph.source for photograph in photographs))
    stored = sum(os.path.getsize(photograph.path) for photograph in photographs)
    say(
        f"{len(photographs)} JPEG files of {pixels / len(photographs) / 1e6:.1f} megapixels and "
        f"{stored / len(photographs) / 1e6:.1f} MB on average, to {options.size}x{options.size} ({options.resize_mode})"
    )
    say(f"{cores} processor cores, {processor_name()}; torch {torch.__version__}, Pillow {Image.__version__}")
    rates: list[Rate] = []
    for workers in counts:
        # The limits are taken at both ends: with one process, and with all of them at once.
        extremes = workers in (counts[0], counts[-1])
        for work in (PIPELINE, REDUCED, WHOLE, ENTROPY) if extremes else (PIPELINE,):
            say(f"measuring {work} with {workers} ...")
            rates.append(measure(photographs, work, workers, options))
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
