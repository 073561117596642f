"""Prune every checkpoint of every run under a log folder into another folder.

python scripts/autoprune_all.py [--logdir logs] [--out DIR] [--delete] [the options of prune_ckpt.py]

Each copy is named <run folder>-<checkpoint>-pruned.ckpt, so that two runs' last.ckpt do not meet. The originals
stay, but with --delete, which removes each one after its copy was read back and found right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint_files import FORMATS, report_errors
from prune_ckpt import add_pruning_options, prune

PRUNED = "-pruned"


def find_checkpoints(logdir: Path) -> list[Path]:
    """List the checkpoints of all runs under a folder, without those that are pruned already.

    Args:
        logdir: the log folder, or one run's folder.

    Returns:
        The files in the order of their names.

    Raises:
        OSError: the folder does not exist, or holds no checkpoint.
    """
    if not logdir.is_dir():
        raise OSError(f"the log folder '{logdir}' does not exist; name it with --logdir")
    found = sorted(
        path
        for file_format in FORMATS
        for path in logdir.rglob(f"*.{file_format}")
        if path.is_file() and not path.stem.endswith(PRUNED)
    )
    if not found:
        raise OSError(f"there is no checkpoint under '{logdir}'")
    return found


def pruned_name(checkpoint: Path, logdir: Path, file_format: str) -> str:
    """Name a checkpoint's pruned copy by its run.

    Args:
        checkpoint: a file below ``logdir``.
        logdir: the log folder.
        file_format: the copy's format.

    Returns:
        The folders below the log folder and the file's own name, joined by dashes, without the folder
        ``checkpoints`` that each run has.
    """
    folders = [part for part in checkpoint.relative_to(logdir).parent.parts if part != "checkpoints"]
    if not folders:
        folders = [logdir.resolve().name]
    return "-".join([*folders, checkpoint.stem]) + f"{PRUNED}.{file_format}"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("logs"), help="log folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the copies (default: this one)")
    parser.add_argument("--delete", action="store_true", help="remove each original after its copy was verified")
    add_pruning_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prune all checkpoints; a failure on one does not keep the others from being pruned.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status; 1 if any checkpoint failed.
    """
    options = build_parser().parse_args(argv)
    file_format = options.format or "ckpt"

    def work() -> int:
        checkpoints = find_checkpoints(options.logdir)
        names = {path: pruned_name(path, options.logdir, file_format) for path in checkpoints}
        failures: list[str] = []
        copied: list[Path] = []
        for path, name in names.items():
            if list(names.values()).count(name) > 1:
                failures.append(f"{path}: another checkpoint's copy would be named {name} too; rename one of them")
                continue
            try:
                target = options.out / name
                print(prune(path, target, not options.full, options.ema, file_format, options.overwrite))
                copied.append(path)
            except (OSError, ValueError) as error:
                failures.append(f"{path}: {error}")
        # Only now: a link among the checkpoints is read through the file that it points to.
        for path in copied if options.delete else []:
            path.unlink()
            print(f"removed {path}")
        for failure in failures:
            print(f"autoprune_all: failed: {failure}", file=sys.stderr)
        if failures:
            print(f"autoprune_all: {len(failures)} of {len(checkpoints)} checkpoints failed", file=sys.stderr)
        return 1 if failures else 0

    return report_errors("autoprune_all", work)


if __name__ == "__main__":
    sys.exit(main())
