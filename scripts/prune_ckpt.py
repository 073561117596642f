"""Make a checkpoint small: without optimiser and loop state, in half precision unless told otherwise.

python scripts/prune_ckpt.py --ckpt FILE [--out FILE] [--full|--half] [--ema keep|bake|drop] [--format ckpt|safetensors]

The input is left as it is. The output is read back and compared before it gets its name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_files import (
    AVERAGES,
    FORMATS,
    KEPT_COUNTERS,
    apply_averages,
    check_target,
    format_of,
    halve,
    own_weights,
    report_errors,
    write_verified,
)

from ldm.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Pruned:
    """What pruning did.

    Attributes:
        target: the file that was written.
        bytes_before: size of the input.
        bytes_after: size of the output.
        notes: what the user may want to know.
    """

    target: Path
    bytes_before: int
    bytes_after: int
    notes: list[str]

    def __str__(self) -> str:
        """Say the sizes in one line."""
        before, after = f"{self.bytes_before:,} bytes", f"{self.bytes_after:,} bytes"
        return f"{self.target}: {before} before, {after} after ({self.bytes_after / self.bytes_before:.0%})"


def prune(
    source: Path,
    target: Path,
    half: bool = True,
    ema: str | None = None,
    file_format: str = "ckpt",
    overwrite: bool = False,
) -> Pruned:
    """Write a pruned copy of a checkpoint.

    Args:
        source: a ``.ckpt`` or ``.safetensors`` file.
        target: the file to write.
        half: round weights to float16; otherwise each keeps its precision.
        ema: ``keep``, ``bake``, ``drop``, or None: keep if there are any.
        file_format: ``ckpt`` or ``safetensors``.
        overwrite: replace an existing target.

    Returns:
        The sizes, and notes.

    Raises:
        ValueError: the input is no checkpoint, or lacks the averages that are asked for.
        OSError: the input is missing, the target exists, or it cannot be written.
    """
    check_target(target, source, overwrite)
    checkpoint = read_checkpoint(source)
    weights = apply_averages(own_weights(checkpoint["state_dict"], source), ema, source)
    if half:
        weights = halve(weights, source)
    write_verified(target, weights, _counters(checkpoint, source), file_format)

    notes = []
    averages = sum(value.nbytes for key, value in weights.items() if key.startswith(AVERAGES))
    if averages and ema is None:
        notes.append(
            f"{averages:,} bytes of it are moving averages: --ema bake puts them in the place of the weights, "
            "--ema drop leaves them out"
        )
    return Pruned(target, source.stat().st_size, target.stat().st_size, notes)


def _counters(checkpoint: dict[str, Any], source: Path) -> dict[str, int]:
    """Take the step and epoch, which a safetensors file holds as metadata."""
    if format_of(source) == "safetensors":
        import safetensors

        with safetensors.safe_open(source, "pt") as opened:
            checkpoint = {name: int(value) for name, value in (opened.metadata() or {}).items() if value.isdigit()}
    return {name: checkpoint[name] for name in KEPT_COUNTERS if isinstance(checkpoint.get(name), int)}


def add_pruning_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to prune."""
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--half", action="store_true", help="round weights to float16 (the default)")
    precision.add_argument("--full", action="store_true", help="leave each weight's precision as it is")
    parser.add_argument(
        "--ema",
        choices=("keep", "bake", "drop"),
        help="moving averages: keep them beside the weights, put them in the weights' place, or leave them out "
        "(default: keep if there are any)",
    )
    parser.add_argument("--format", choices=FORMATS, help="kind of file to write (default: by --out's name, else ckpt)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output (never the input)")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint to prune, .ckpt or .safetensors")
    parser.add_argument("--out", type=Path, help="file to write (default: <name>-pruned.ckpt beside the input)")
    add_pruning_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prune a checkpoint and say the sizes.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status.
    """
    options = build_parser().parse_args(argv)

    def work() -> int:
        source: Path = options.ckpt
        named = None if options.out is None else format_of(options.out)
        if options.out is not None and named is None and options.format is None:
            raise ValueError(f"--out {options.out} must end in .ckpt or .safetensors, or --format say which it is")
        file_format = options.format or named or "ckpt"
        if named not in (None, file_format):
            raise ValueError(
                f"--out {options.out} and --format {file_format} contradict each other; leave out --format"
            )
        target = options.out or source.with_name(f"{source.stem}-pruned.{file_format}")
        pruned = prune(source, target, not options.full, options.ema, file_format, options.overwrite)
        print(pruned)
        for note in pruned.notes:
            print(f"note: {note}")
        return 0

    return report_errors("prune_ckpt", work)


if __name__ == "__main__":
    sys.exit(main())
