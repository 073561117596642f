"""List the runs of a log folder: how far each came, how it ended, and the command that continues it.

python scripts/runs.py [LOGDIR] [--json]

Runs are told from their run.json. Of those without one (of earlier versions) the exposure ledger, the names of the
checkpoints and the curves say what they can.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint_files import report_errors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.training.console import command_word, harmless
from ldm.training.progress import format_duration
from ldm.training.run_directory import list_runs
from ldm.training.run_record import KILLED, RUNNING, is_alive, read_record

UNKNOWN = "unknown"
TAIL_BYTES = 1 << 16
WIDEST = 200
TRAINING_LOSSES = ("train/loss_simple_epoch", "train/loss_epoch", "train/loss_simple", "train/loss")
VALIDATION_LOSSES = ("val/loss_simple_ema", "val/loss_simple", "val/loss", "val/rec_loss")


def describe_run(run: Path) -> dict[str, Any]:
    """Gather what is known of a run.

    Args:
        run: its folder.

    Returns:
        ``name``, ``path``; ``state`` (``running``, ``finished``, ``stopped``, ``failed``, ``killed`` or ``unknown``)
        and ``reason``; ``step`` and ``epoch`` (epochs that are complete); ``losses`` by name; ``bytes`` on disk and
        ``checkpoints``, their number; ``wall_seconds``; ``sessions``, how often it was started; ``resume``, the
        command that continues it. What is not known is None.
    """
    problem: str | None = None
    try:
        record = read_record(run)
    except ValueError as error:
        record, problem = None, str(error)
    checkpoints = [path for path in run.glob("checkpoints/*.ckpt") if path.is_file()]
    described: dict[str, Any] = {
        "name": run.resolve().name,
        "path": str(run),
        "state": UNKNOWN,
        "reason": problem or "no run.json",
        "step": None,
        "epoch": None,
        "losses": {},
        "bytes": size_on_disk(run),
        "checkpoints": len(checkpoints),
        "wall_seconds": None,
        "sessions": None,
    }
    if record is not None:
        state, reason = _state(record)
        described |= {key: record.get(key) for key in ("step", "epoch", "wall_seconds")}
        described |= {"state": state, "reason": reason, "sessions": len(record["sessions"])}
        described["losses"] = {name: float(value) for name, value in (record.get("losses") or {}).items()}
    if described["state"] in (RUNNING, KILLED, UNKNOWN):
        described |= _traces(run, checkpoints)  # the record tells of the beginning alone, or is not there
    if not described["losses"]:
        described["losses"] = _last_losses(run)
    can_resume = bool(checkpoints) and any(run.glob("configs/*-project.yaml"))
    described["resume"] = resume_command(run, described) if can_resume else None
    return described


def resume_command(run: Path, described: Mapping[str, Any]) -> str:
    """Give the command that continues a run.

    Args:
        run: its folder.
        described: its ``state`` and ``reason``.

    Returns:
        A command; where the run has come to its end, with an end that is further away.
    """
    command = f"python main.py -t -r {command_word(run)}"
    limit = re.fullmatch(r"max_(epochs|steps) (\d+)", described["reason"] or "")
    if limit is None:
        return command
    return f"{command} --max_{limit[1]} {int(limit[2]) * 2}"


def size_on_disk(folder: Path) -> int:
    """Add up a folder's files in bytes; one with several names counts once."""
    files: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except OSError:
                continue  # gone meanwhile: runs that are at work delete checkpoints
            files[found.st_dev, found.st_ino or len(files)] = found.st_size
    return sum(files.values())


def format_runs(described: Sequence[Mapping[str, Any]], logdir: Path, width: int) -> str:
    """Write runs for a terminal.

    Args:
        described: from :func:`describe_run`.
        logdir: the log folder.
        width: columns of the terminal. Commands are not broken, so that they can be copied.

    Returns:
        A few lines for each run.
    """
    count = len(described)
    total = _size(sum(run["bytes"] for run in described))
    lines = [f"{logdir}: {'1 run' if count == 1 else f'{count} runs'}, {total}"]
    for run in described:
        lines += ["", run["name"], *_wrapped(_facts(run, width - 2), width), f"  {_how_to_resume(run)}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """List runs; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "logdir", nargs="?", type=Path, default=Path("logs"), help="log folder or a run (default: logs)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list, for other programs")
    options = parser.parse_args(argv)

    def work() -> int:
        if not options.logdir.is_dir():
            raise FileNotFoundError(f"the log folder '{options.logdir}' does not exist; name it: runs.py LOGDIR")
        is_run = (options.logdir / "checkpoints").is_dir()
        described = [describe_run(run) for run in ([options.logdir] if is_run else list_runs(options.logdir))]
        if options.json:
            print(json.dumps([_without_nan(run) for run in described], ensure_ascii=False, indent=1))
        else:
            print(harmless(format_runs(described, options.logdir, min(shutil.get_terminal_size().columns, WIDEST))))
        return 0

    return report_errors("runs", work)


def _state(record: Mapping[str, Any]) -> tuple[str, str | None]:
    """Say how a run ended; one that says it is running may have been killed."""
    session = record["sessions"][-1]
    if session["state"] != RUNNING:
        return str(session["state"]), session.get("reason")
    alive = is_alive(session)
    if alive is None:
        return RUNNING, f"when last heard of, on {session['process']['host']}"
    return (RUNNING, f"process {session['process']['id']}") if alive else (KILLED, "it ended without a word")


def _traces(run: Path, checkpoints: Iterable[Path]) -> dict[str, Any]:
    """Read how far a run came from what it leaves on its way."""
    entry = _last_entry(run / "exposure.jsonl")
    if entry is not None:
        return {"step": entry.get("step"), "epoch": entry.get("run_epoch")}
    found = [re.search(r"epoch=(\d+)(?:-step=(\d+))?", path.name) for path in checkpoints]
    named = [(int(match[1]) + 1, int(match[2]) if match[2] else None) for match in found if match]
    if not named:
        return {}
    epoch, step = max(named, key=lambda pair: pair[0])
    return {"epoch": epoch, "step": step}


def _last_entry(ledger: Path) -> dict[str, Any] | None:
    """Read the last whole line of a ledger, without the rest."""
    try:
        with ledger.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        entry = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def _last_losses(run: Path) -> dict[str, float]:
    """Read the last losses from a run's curves."""
    files = sorted(run.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {}
    events = EventAccumulator(str(files[-1]), size_guidance={"scalars": 1})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if "loss" in name]
    return {name: events.Scalars(name)[-1].value for name in names}


def _facts(run: Mapping[str, Any], room: int) -> list[str]:
    """Say in a few words each what is known of a run."""
    reason = f" ({run['reason']})" if run["reason"] else ""
    state = f"{run['state']}{reason}"
    facts = [state if len(state) <= room else f"{state[: room - 1]}…"]
    if run["step"] is not None:
        facts.append(f"step {run['step']:,}")
    if run["epoch"]:
        facts.append("1 complete epoch" if run["epoch"] == 1 else f"{run['epoch']} complete epochs")
    for name, preferred in (("train", TRAINING_LOSSES), ("val", VALIDATION_LOSSES)):
        shown = _choose(run["losses"], name, preferred)
        if shown is not None:
            facts.append(f"{shown} {run['losses'][shown]:.4f}")
    if run["wall_seconds"]:
        facts.append(f"took {format_duration(run['wall_seconds'])}")
    if (run["sessions"] or 1) > 1:
        facts.append(f"started {run['sessions']} times")
    number = run["checkpoints"] or "no"
    return [*facts, f"{number} checkpoint{'' if number == 1 else 's'}", _size(run["bytes"])]


def _choose(losses: Mapping[str, float], phase: str, preferred: Sequence[str]) -> str | None:
    """Choose the loss that says most."""
    names = [name for name in losses if name.startswith(phase)]
    return next((name for name in preferred if name in names), names[0] if names else None)


def _how_to_resume(run: Mapping[str, Any]) -> str:
    """Give the command, or say why there is none."""
    if run["resume"] is None:
        return "nothing to continue from: no checkpoint, or no saved configuration"
    return str(run["resume"])


def _wrapped(facts: Sequence[str], width: int) -> list[str]:
    """Set facts side by side, as many as a line takes."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + 3 + len(fact) <= width:
            lines[-1] += f"   {fact}"
        else:
            lines.append(f"  {fact}")
    return lines


def _size(count: int) -> str:
    """Write a number of bytes."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count} bytes"


def _without_nan(run: Mapping[str, Any]) -> dict[str, Any]:
    """Write losses that are not finite as JSON can: as text."""
    losses = {name: value if math.isfinite(value) else str(value) for name, value in run["losses"].items()}
    return {**run, "losses": losses}


if __name__ == "__main__":
    sys.exit(main())
