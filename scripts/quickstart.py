"""From a fresh clone to a first trained checkpoint: ``python scripts/quickstart.py``.

Makes the environment, writes the pictures and a tiny checkpoint, and runs the main job on the embedded default
configuration, on the CPU. Standard library only: it starts before anything is installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from environment import ROOT, SetupError, ensure_environment, run_live, shown

CONFIG: Final = "configs/stable-diffusion/v1-finetune_tiny.yaml"
CHECKPOINT: Final = "models/tiny/tiny_random.ckpt"
DATA_ROOT: Final = "training_samples/quickstart"
NAME: Final = "quickstart"

COMMAND: Final = (
    "main.py",
    "--base", CONFIG,
    "-t",
    "--actual_resume", CHECKPOINT,
    "-n", NAME,
    "--data_root", DATA_ROOT,
)  # fmt: skip
"""The main job, as a user would type it behind ``python``."""


def run_folders(logs: Path) -> set[Path]:
    """List the quickstart's run folders.

    Args:
        logs: the folder that holds all runs.

    Returns:
        The folders, none where ``logs`` does not exist.
    """
    return {path for path in logs.glob(f"{Path(DATA_ROOT).name}*_{NAME}") if path.is_dir()}


def describe_run(run: Path, python: Path) -> str:
    """Say what a run left and how to look at it.

    Args:
        run: the run's folder.
        python: the environment's interpreter.

    Returns:
        Several lines of text.

    Raises:
        FileNotFoundError: the checkpoint or the pictures are not there.
    """
    checkpoint = run / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise FileNotFoundError(f"the run ended without {shown(checkpoint)}")
    pictures = sorted((run / "images").rglob("*.png")) + sorted((run / "images").rglob("*.jpg"))
    samples = [path for path in pictures if path.name.startswith("overview")]
    if not samples:
        raise FileNotFoundError(f"the run ended without sample pictures below {shown(run / 'images')}")
    newest = max(samples, key=lambda path: (path.stat().st_mtime, path.name))
    return "\n".join(
        (
            f"run folder:       {shown(run)}",
            f"checkpoint:       {shown(checkpoint)} ({checkpoint.stat().st_size / 1e6:.0f} MB)",
            f"sample pictures:  {shown(newest)}",
            f"                  ({len(pictures)} in its folder; noise: the tiny model's weights are random at first)",
            f"curves:           {shown(python)} -m tensorboard.main --logdir {shown(run)}",
            "                  then open http://localhost:6006 (Ctrl-C ends it)",
        )
    )


def quickstart(unpinned: bool) -> int:
    """Do all steps, each one's output shown as it comes.

    Args:
        unpinned: install the newest versions, not those of constraints.txt.

    Returns:
        0, or the exit status of the step that failed.

    Raises:
        SetupError: the environment cannot be made.
        FileNotFoundError: the run did not leave what it should.
    """
    python = ensure_environment(["quickstart"], unpinned=unpinned)
    start = time.monotonic()
    for preparation in ("scripts/prepare_quickstart.py", "scripts/make_tiny_checkpoint.py"):
        status = run_live([python, preparation])
        if status != 0:
            print(f"quickstart: {preparation} failed with exit status {status}; its message is above", file=sys.stderr)
            return status

    before = run_folders(ROOT / "logs")
    print(f"\nThe main job; python is {shown(python)}:\n\npython {' '.join(COMMAND)}\n")
    status = run_live([python, *COMMAND])
    if status != 0:
        print(f"quickstart: the main job failed with exit status {status}; its message is above", file=sys.stderr)
        return status

    made = run_folders(ROOT / "logs") - before
    if not made:
        raise FileNotFoundError(f"the run left no folder logs/{Path(DATA_ROOT).name}*_{NAME}")
    minutes = (time.monotonic() - start) / 60
    print(f"\nDone in {minutes:.1f} minutes after the install.\n{describe_run(max(made), python)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="Install the project into .venv and train a tiny model on the CPU.")
    parser.add_argument(
        "--unpinned", action="store_true", help="install the newest versions, not those of constraints.txt"
    )
    options = parser.parse_args(argv)
    try:
        return quickstart(options.unpinned)
    except (SetupError, OSError) as problem:
        print(f"quickstart: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: stopped; run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
