"""Time training steps, and what they use of the card, beside the same work built from another library's parts.

    python scripts/benchmark.py                                        # the shipped configuration, batch 6, 512x512
    python scripts/benchmark.py --peer diffusers --compile             # beside diffusers, both compiled
    python scripts/benchmark.py --data_root training_samples/MyProject # also on real pictures, loaded as in training

Weights are random. Every measurement is a process of its own, so that each side's peak memory is its own, and sides
take turns, so that a card that grows warm slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG: Final = ROOT / "configs" / "stable-diffusion" / "v1-finetune_everydream.yaml"

CARD: Final = "card"
OURS: Final = "ours"
SYNTHETIC: Final = "synthetic"
FOLDER: Final = "folder"

GIB: Final = 2**30
COLUMNS: Final = ("", "pictures", "images/s", "ms/step", "peak GiB", "reserved GiB", "TFLOP/s", "% of matmul")


def build_parser() -> argparse.ArgumentParser:
    """Declare the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("--data_root", type=Path, help="also time on this folder of subfolders of captioned pictures")
    parser.add_argument(
        "--peer", choices=("diffusers",), help="also time the same work built from this library's parts"
    )
    parser.add_argument("--batch_size", type=int, default=6, help="pictures in a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels, a multiple of 8 (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("bf16-mixed", "16-mixed", "32-true"),
        default="bf16-mixed",
        help="as Lightning names it (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=50, help="steps timed (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before those (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="times each side is measured (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the UNet and the VAE's encoder, on both sides")
    parser.add_argument(
        "--gradient_checkpointing",
        choices=("yaml", "on", "off"),
        default="yaml",
        help="recompute activations; yaml: as the configuration says, and off for the peer (default: %(default)s)",
    )
    parser.add_argument(
        "--cudnn_benchmark",
        choices=("yaml", "on", "off"),
        default="yaml",
        help="let cuDNN try its algorithms, on both sides; it tries large workspaces too (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--measure", metavar="SIDE:PICTURES", help=argparse.SUPPRESS)
    parser.add_argument(
        "override", nargs="*", metavar="key.path=value", help="changes to the configuration, our side only"
    )
    return parser


def check_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what cannot be measured.

    Args:
        options: the parsed command line.
        parser: what reports the mistake, and ends the program with status 2.
    """
    for name, least in (("batch_size", 1), ("steps", 1), ("warmup", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} is not allowed; give at least {least}")
    if options.size < 8 or options.size % 8:
        parser.error(f"--size {options.size} is not allowed; give a multiple of 8")
    if not options.config.is_file():
        parser.error(f"--config {options.config}: no such file")
    if options.data_root is not None and not options.data_root.is_dir():
        parser.error(f"--data_root {options.data_root}: no such folder")


def plan(options: argparse.Namespace) -> list[str]:
    """List the measurements in the order they are made: sides take turns.

    Args:
        options: the parsed command line.

    Returns:
        Names ``side:pictures``, the card's own first.
    """
    sides = [OURS] + ([options.peer] if options.peer else [])
    pictures = [SYNTHETIC] + ([FOLDER] if options.data_root else [])
    turns = [f"{side}:{kind}" for kind in pictures for _ in range(options.rounds) for side in sides]
    return [f"{CARD}:", *turns]


def measure_apart(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Make one measurement in a process of its own.

    Args:
        name: ``side:pictures``.
        arguments: the command line of this program.

    Returns:
        Its figures; ``{"failed": reason}`` where it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--measure", name, "--out", str(out)]
        ended = subprocess.run(command, check=False)
        if out.is_file():
            figures: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return figures
        return {"failed": f"exit status {ended.returncode}, see above"}


def summarise(name: str, rounds: Sequence[dict[str, Any]], card: dict[str, Any]) -> dict[str, Any]:
    """Condense a side's rounds, and relate them to the card.

    Args:
        name: ``side:pictures``.
        rounds: the figures of each round.
        card: the card's own figures.

    Returns:
        The figures of a row: the median speed, the largest memory.
    """
    side, _, pictures = name.partition(":")
    row: dict[str, Any] = {"side": side, "pictures": pictures, "rounds": list(rounds)}
    failures = [figures["failed"] for figures in rounds if "failed" in figures]
    if failures:
        return {**row, "failed": failures[0]}
    seconds = statistics.median(figures["seconds_per_step"] for figures in rounds)
    row["parameters"] = rounds[0]["parameters"]
    row["images_per_second"] = rounds[0]["batch_size"] / seconds
    row["ms_per_step"] = 1000 * seconds
    row["peak_gib"] = max(figures["peak_bytes"] for figures in rounds) / GIB
    reserved = [figures["reserved_bytes"] for figures in rounds if figures["reserved_bytes"] is not None]
    row["reserved_gib"] = max(reserved) / GIB if reserved else None
    if "failed" not in card:
        row["tflops"] = row["images_per_second"] * card["tflop_per_image"]["sum"]
        row["share_of_matmul"] = row["tflops"] / card["matmul_tflops"]
    return row


def cell(value: float | None, digits: int) -> str:
    """Write a figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out as a table.

    Args:
        rows: what :func:`summarise` gives.

    Returns:
        Lines of text, columns aligned.
    """
    lines = [list(COLUMNS)]
    notes = []
    for row in rows:
        if "failed" in row:
            notes.append(f"{row['side']} on {row['pictures']} pictures failed: {row['failed']}")
            continue
        share = row.get("share_of_matmul")
        lines.append(
            [
                row["side"],
                row["pictures"],
                cell(row["images_per_second"], 2),
                cell(row["ms_per_step"], 1),
                cell(row["peak_gib"], 2),
                cell(row["reserved_gib"], 2),
                cell(row.get("tflops"), 2),
                cell(None if share is None else 100 * share, 1),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    aligned = [
        "  ".join(text.ljust(width) if column < 2 else text.rjust(width) for column, (text, width) in enumerate(zipped))
        for zipped in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([*aligned, *notes])


def compare(rows: Sequence[dict[str, Any]], peer: str | None) -> list[str]:
    """Say how our side stands to the peer's.

    Args:
        rows: what :func:`summarise` gives.
        peer: the peer's name.

    Returns:
        One line for each kind of pictures that both sides were measured on; it says so where the two trained
        models of different size.
    """
    measured = {(row["side"], row["pictures"]): row for row in rows if "failed" not in row}
    lines = []
    for pictures in (SYNTHETIC, FOLDER):
        ours, theirs = measured.get((OURS, pictures)), measured.get((peer, pictures))
        if ours and theirs:
            if ours["parameters"] != theirs["parameters"]:
                lines.append(f"not comparable: ours has {ours['parameters']}, {peer} {theirs['parameters']} parameters")
                continue
            speed = ours["images_per_second"] / theirs["images_per_second"]
            memory = ours["peak_gib"] / theirs["peak_gib"]
            lines.append(f"ours to {peer}, {pictures} pictures: {speed:.2f} x the speed, {memory:.2f} x the memory")
    return lines


def describe(options: argparse.Namespace, card: dict[str, Any]) -> list[str]:
    """Say what was measured on what.

    Args:
        options: the parsed command line.
        card: the card's own figures.

    Returns:
        Lines of text.
    """
    lines = [
        f"{options.config.name}, batch {options.batch_size}, {options.size}x{options.size}, {options.precision}, "
        f"{'compiled' if options.compile else 'eager'}, gradient checkpointing {options.gradient_checkpointing}, "
        f"cuDNN benchmark {options.cudnn_benchmark}, {options.steps} steps after {options.warmup}, "
        f"median of {options.rounds} rounds"
    ]
    if "failed" in card:
        return [*lines, f"the card's own figures failed: {card['failed']}"]
    work = card["tflop_per_image"]
    return [
        *lines,
        f"{card['device']}, torch {card['torch']}; matrix products here: {card['matmul_tflops']:.1f} TFLOP/s "
        f"({card['matmul_type']})",
        f"work an image: {work['sum']:.3f} TFLOP (UNet {work['unet']:.3f}, text encoder {work['text_encoder']:.3f}, "
        f"VAE {work['vae']:.3f}), recomputed activations not counted",
    ]


def measure_here(options: argparse.Namespace) -> dict[str, Any]:
    """Make the one measurement that this process was started for.

    Args:
        options: the parsed command line.

    Returns:
        Its figures; ``{"failed": reason}`` for what the user can put right.
    """
    sys.path.insert(0, str(ROOT))  # for a checkout that is not installed
    # torch takes seconds to import, and the process that only waits needs none of it.
    import benchmark_sides

    from ldm.training.console import console

    side, _, pictures = options.measure.partition(":")
    try:
        with console(0, False):
            if side == CARD:
                return benchmark_sides.measure_card(options)
            return benchmark_sides.measure_steps(options, side, from_folder=pictures == FOLDER)
    except (ValueError, OSError, MemoryError) as problem:
        return {"failed": str(problem)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all sides in turn and show the table.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        0, or 1 where a measurement failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    check_options(options, parser)
    if options.measure:
        options.out.write_text(json.dumps(measure_here(options)), encoding="utf-8")
        return 0

    figures: dict[str, list[dict[str, Any]]] = {}
    for name in plan(options):
        print(f"measuring {name.rstrip(':')} ...", flush=True)
        figures.setdefault(name, []).append(measure_apart(name, arguments))
    card = figures.pop(f"{CARD}:")[0]
    rows = [summarise(name, rounds, card) for name, rounds in figures.items()]
    if options.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        report = {"settings": settings, "card": card, "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print()
    print("\n".join(describe(options, card)))
    print(format_table(rows))
    print("\n".join(compare(rows, options.peer)))
    return int(any("failed" in row for row in [card, *rows]))


if __name__ == "__main__":
    sys.exit(main())
