"""``<run>/run.json``: what a run was, on what, with what, and how each of its sessions ended.

It is written when training begins and when it ends, each time as a whole. Whatever ends the process in between
leaves the form of the beginning, which says ``running``; :func:`is_alive` tells whether that is still so.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import signal
import socket
import subprocess
import time
import zipfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer

from ldm.training.bad_pictures import BadPictures
from ldm.training.disk import write_text
from ldm.training.failures import TrainingError, first_cause
from ldm.training.run_directory import RunDirectory
from ldm.training.stop_signals import Interrupted

logger = logging.getLogger(__name__)

RECORD: Final = "run.json"
FORMAT: Final = 1
PROJECT: Final = "everydream-trainer"
PACKAGES: Final = ("torch", "torchvision", "pytorch-lightning", "transformers", "numpy", "Pillow")

RUNNING: Final = "running"
FINISHED: Final = "finished"
STOPPED: Final = "stopped"
FAILED: Final = "failed"
OUT_OF_TIME: Final = "max_time"
"""The reason of a run that ended when its time, that of all its sessions together, was over."""

KILLED: Final = "killed"
"""What a session is called that says ``running`` and whose process has gone."""

_SOURCES: Final = Path(__file__).resolve().parents[2]
_GIT_SECONDS: Final = 10
_STOPPED_BY: Final = {"SIGINT": "Ctrl-C", "SIGHUP": "SIGHUP, the end of its terminal", "SIGBREAK": "Ctrl-Break"}


class RunRecord:
    """Keeps a run's record up to date.

    Nothing that goes wrong here ends a run: it is told, and the run goes on without.

    Args:
        config: the merged configuration as plain containers.
        data: from :func:`ldm.training.data_record.describe_data`.
        command: the words of the command line.
        changes: what has changed since the checkpoint that is continued, in words.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        command: Sequence[str] = (),
        changes: Sequence[str] = (),
    ) -> None:
        self._config = config
        self._data = data
        self._command = list(command)
        self._changes = list(changes)
        self._directory: RunDirectory | None = None
        self._record: dict[str, Any] = {}
        self._losses: dict[str, float] = {}
        self._began = 0.0

    def begin(self, trainer: pl.Trainer, directory: RunDirectory, checkpoint: Path | None) -> None:
        """Write the form of the beginning.

        Args:
            trainer: the trainer, with its counters restored where a run is continued; of the first process.
            directory: the run's folder, which exists.
            checkpoint: the checkpoint that is continued, or None.
        """
        self._directory = directory
        self._began = time.monotonic()
        try:
            self._record = read_record(directory.path) or {}
        except ValueError as error:
            logger.warning("%s; it is kept as %s.damaged", error, RECORD)
            _set_aside(directory.path / RECORD)
        for earlier in self._record.get("sessions", []):
            if earlier["state"] == RUNNING:
                earlier["state"] = KILLED
        session = {
            "began": now(),
            "ended": None,
            "state": RUNNING,
            "reason": None,
            "wall_seconds": None,
            "command": self._command,
            "process": {"id": os.getpid(), "host": socket.gethostname(), "mark": process_mark(os.getpid())},
            "continued_from": None if checkpoint is None else _inside(checkpoint, directory.path),
            "changes": self._changes,
            "first_step": trainer.global_step,
            "last_step": None,
            "seed": self._config["run"]["seed"],
            "versions": versions(),
            "git": git_state(_SOURCES),
            "device": _describe_device(trainer),
            "data": self._data["digest"],
            "config": self._config,
        }
        described = {**self._record.get("data_sets", {}), self._data["digest"]: self._data}
        sessions = [*self._record.get("sessions", []), session]
        wanted = {entry["data"] for entry in sessions}
        self._record = {
            "format": FORMAT,
            "state": RUNNING,
            "reason": None,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "losses": {},
            "wall_seconds": _seconds_of(sessions),
            "checkpoints": list_checkpoints(directory.checkpoints),
            "sessions": sessions,
            "data_sets": {digest: data for digest, data in described.items() if digest in wanted},
        }
        self._write()

    def note_losses(self, trainer: pl.Trainer) -> None:
        """Keep what was measured last; a test that follows would take its place.

        Args:
            trainer: the trainer.
        """
        self._losses |= {name: float(value) for name, value in trainer.callback_metrics.items() if "loss" in name}

    def end(self, trainer: pl.Trainer, error: BaseException | None = None) -> None:
        """Write the form of the end; nothing where nothing had begun.

        Args:
            trainer: the trainer.
            error: what ended the run, or None.
        """
        if self._directory is None:
            return
        self.note_losses(trainer)
        state, reason = why_it_ended(trainer, error)
        session = self._record["sessions"][-1]
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        session |= {
            "ended": now(),
            "state": state,
            "reason": reason,
            "wall_seconds": round(time.monotonic() - self._began, 3),
            "last_step": trainer.global_step,
            "unreadable": next((dict(each.met) for each in callbacks if isinstance(each, BadPictures)), {}),
        }
        self._record |= {
            "state": state,
            "reason": reason,
            "step": trainer.global_step,
            "epoch": _complete_epochs(trainer),
            "losses": self._losses,
            "wall_seconds": _seconds_of(self._record["sessions"]),
            "checkpoints": list_checkpoints(self._directory.checkpoints),
        }
        self._write()

    def _write(self) -> None:
        """Write the record in one go."""
        if self._directory is None:
            return
        try:
            write_record(self._directory.path, self._record)
        except OSError as error:
            logger.warning("%s could not be written: %s", self._directory.path / RECORD, error.strerror or error)


def read_record(run: Path) -> dict[str, Any] | None:
    """Read a run's record.

    Args:
        run: the run's folder.

    Returns:
        The record, or None if the run has none (runs of earlier versions).

    Raises:
        ValueError: it cannot be read, or is no record.
    """
    path = run / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or not _is_record(record):
        raise ValueError(f"{path} is not the record of a run")
    return record


def write_record(run: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record: the whole new one, or the old one stays.

    Args:
        run: the run's folder.
        record: the record.

    Raises:
        OSError: it cannot be written.
    """
    write_text(run / RECORD, json.dumps(plain(record), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Turn a nest of containers into what JSON can hold.

    Args:
        value: containers, numbers, texts; anything else becomes text, and so do numbers that are not finite.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def is_alive(session: Mapping[str, Any]) -> bool | None:
    """Tell whether the process of a session that says ``running`` is there.

    Args:
        session: an entry of a record's ``sessions``.

    Returns:
        Whether it is; None where that cannot be known: it ran on another machine, or on Windows.
    """
    process = session["process"]
    if process["host"] != socket.gethostname() or os.name == "nt":
        return None
    try:
        os.kill(process["id"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there, and somebody else's
    # The number alone may be another process's by now.
    return bool(process.get("mark") == process_mark(process["id"]))


def refuse_running(run: Path) -> None:
    """Keep two processes from training one run.

    Args:
        run: the folder of a run that is to be continued.

    Raises:
        ValueError: another process of this machine is at it.
    """
    try:
        record = read_record(run)
    except ValueError:
        return  # told where it is to be compared
    if record is None:
        return
    session = record["sessions"][-1]
    if session["state"] != RUNNING or session["process"]["id"] == os.getpid() or not is_alive(session):
        return
    number = session["process"]["id"]
    raise ValueError(f"--resume {run}: process {number} is still training this run; wait for its end, or end it first")


def process_mark(number: int) -> str | None:
    """Give what tells a process from a later one of the same number.

    Args:
        number: the process's.

    Returns:
        The system's start and the process's within it; None on systems without ``/proc``.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {fields[19]}"


def why_it_ended(trainer: pl.Trainer, error: BaseException | None) -> tuple[str, str]:
    """Say how a run ended.

    Args:
        trainer: the trainer.
        error: what ended the run, or None.

    Returns:
        ``finished``, ``stopped`` or ``failed``, and the reason in one line.
    """
    if isinstance(error, Interrupted):
        name = signal.Signals(error.signal_number).name
        return STOPPED, _STOPPED_BY.get(name, name)
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, "Ctrl-C"
    if error is not None:
        said = str(error) if isinstance(error, TrainingError) else first_cause(error)
        return FAILED, said.partition("\n")[0]
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return FINISHED, f"max_steps {trainer.max_steps}"
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    is_out_of_time = any(seconds is not None and seconds <= 0 for seconds in left)
    # Lightning counts an epoch that was broken off as done.
    is_whole = not is_out_of_time or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    if is_whole and trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs:
        return FINISHED, f"max_epochs {trainer.max_epochs}"
    if is_out_of_time:
        return FINISHED, OUT_OF_TIME
    return FINISHED, "stopped early by a callback"


def _complete_epochs(trainer: pl.Trainer) -> int:
    """Count the epochs whose batches were all trained on; Lightning counts one that a limit broke off as done."""
    fit_loop: Any = trainer.fit_loop
    batches = fit_loop.epoch_loop.batch_progress
    is_broken_off = batches.current.processed > 0 and not batches.is_last_batch
    is_counted = fit_loop.epoch_progress.current.completed == fit_loop.epoch_progress.current.ready
    return trainer.current_epoch - (is_broken_off and is_counted)


def list_checkpoints(folder: Path) -> list[dict[str, Any]]:
    """List a run's checkpoint files.

    Args:
        folder: the folder of checkpoints, which may be missing.

    Returns:
        For each its ``name``, ``bytes`` and ``checksum``, sorted by name.
    """
    found = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            found.append({"name": path.name, "bytes": path.stat().st_size, "checksum": zip_checksum(path)})
        except OSError as error:
            logger.warning("%s: %s", path, error)
    return found


def zip_checksum(path: Path) -> str | None:
    """Sum up a checkpoint from the checksums that the file holds of each of its tensors, without reading those.

    Args:
        path: a file that ``torch.save`` wrote.

    Returns:
        A digest of the names, sizes and CRC-32 sums of what is in the file; None if it is no such file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                inner = entry.filename.partition("/")[2]  # before that stands the file's first name
                digest.update(f"{inner}\0{entry.file_size}\0{entry.CRC:08x}\n".encode())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return None
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Name the versions of Python, of the packages that numbers depend on, and of this project."""
    named: dict[str, str | None] = {"python": platform.python_version(), PROJECT: _project_version()}
    for package in PACKAGES:
        named[package] = _installed_version(package)
    return named


def git_state(folder: Path) -> dict[str, Any] | None:
    """Read which commit a checkout is at.

    Args:
        folder: the checkout's top folder.

    Returns:
        ``commit``, and ``dirty``: whether tracked files differ from it; None outside a checkout, or without git.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    # A copy inside somebody's own repository is not at that one's commit.
    if top is None or Path(top).resolve() != folder.resolve():
        return None
    commit, changed = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "-uno")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def now() -> str:
    """Write the time with its zone, as ISO 8601."""
    return datetime.now().astimezone().isoformat()


def _git(folder: Path, *words: str) -> str | None:
    """Ask git something; None where it has no answer."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_GIT_SECONDS,
            check=False,
            # Not to refresh the index: somebody may be committing.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _project_version() -> str | None:
    """Read this project's version where it stands, which need not be installed."""
    try:
        text = (_SOURCES / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return _installed_version(PROJECT)
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else None


def _describe_device(trainer: pl.Trainer) -> dict[str, Any]:
    """Say what a run computes on."""
    device = trainer.strategy.root_device
    is_cuda = device.type == "cuda"
    return {
        "kind": device.type,
        "name": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "devices": trainer.world_size,
        "nodes": trainer.num_nodes,
        "precision": str(trainer.precision),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "cuda": torch.version.cuda if is_cuda else None,
    }


def _inside(path: Path, folder: Path) -> str:
    """Name a file by its place in a folder, where it lies in it."""
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return str(path)


def _seconds_of(sessions: Sequence[Mapping[str, Any]]) -> float:
    """Add up the time of the sessions that ended; of one that was killed none is known."""
    return round(sum(session["wall_seconds"] or 0.0 for session in sessions), 3)


def _is_record(record: Mapping[str, Any]) -> bool:
    """Tell whether a record has the parts that are read again."""
    sessions, data_sets = record.get("sessions"), record.get("data_sets")
    if not isinstance(sessions, list) or not sessions or not isinstance(data_sets, dict):
        return False
    needed = ("began", "state", "wall_seconds", "process", "data", "config", "device")
    return all(isinstance(session, dict) and all(key in session for key in needed) for session in sessions)


def _set_aside(path: Path) -> None:
    """Keep a damaged record under another name."""
    try:
        path.replace(path.with_name(f"{path.name}.damaged"))
    except OSError as error:
        logger.warning("%s could not be renamed: %s", path, error)
