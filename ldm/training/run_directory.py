"""The folder that a run lives in: its name, its parts, and how to find it again."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PureWindowsPath
from typing import Final

from ldm.training.config_tree import read_yaml
from ldm.training.console import command_word
from ldm.training.recovery import newest_valid_checkpoint, refuse_weights_alone

logger = logging.getLogger(__name__)

STAMP_FORMAT: Final = "%Y-%m-%dT%H-%M-%S"
LAST_CHECKPOINT: Final = "last.ckpt"
CURVES: Final = "tensorboard"
LONGEST_NAME: Final = 240
"""Bytes that a folder's name may have; the file systems' 255, less room for ``-2``."""
AUTO: Final = "auto"
NEWEST_RUN: Final = ("last", AUTO)
"""What ``--resume`` may say instead of a run: with ``auto`` and a configuration it begins one where there is none."""
NOT_IN_FILE_NAMES: Final = '<>:"/\\|?*'


class NoRunError(ValueError):
    """There is no run to continue."""


@dataclass(frozen=True)
class RunDirectory:
    """One run's folder.

    Attributes:
        path: the folder.
        stamp: when this session of the run began, as in file names.
    """

    path: Path
    stamp: str

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoint files."""
        return self.path / "checkpoints"

    @property
    def configs(self) -> Path:
        """Folder of the merged configurations, one for each session of the run."""
        return self.path / "configs"

    @property
    def images(self) -> Path:
        """Folder of the sample pictures, by split."""
        return self.path / "images"

    @property
    def curves(self) -> Path:
        """Folder of TensorBoard's curves."""
        return self.path / CURVES

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint to continue from."""
        return self.checkpoints / LAST_CHECKPOINT

    @property
    def config_file(self) -> Path:
        """This session's merged configuration, itself a valid ``--base``."""
        return self.configs / f"{self.stamp}-project.yaml"

    def check_writable(self) -> None:
        """Try, before anything costly is done, whether the folder can be made and written to.

        Raises:
            OSError: if not, with the reason.
        """
        # A folder that does not exist yet is tried in the nearest one that does, so that nothing is left behind.
        place = self.path
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            if not place.is_dir():
                raise NotADirectoryError(f"{place} is a file")
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise OSError(
                f"cannot write the run folder {self.path}: {error.strerror or error}"
                " (choose another place with --logdir, or free this one)"
            ) from error

    def claim(self) -> RunDirectory:
        """Make the folder, which nobody else may have made.

        Returns:
            This, or one with ``-2`` (``-3``, ...) after its name if another run was quicker.

        Raises:
            OSError: if that fails, with the reason.
        """
        directory = self
        number = 2
        while True:
            try:
                directory.path.mkdir(parents=True)
                return directory
            except FileExistsError:
                directory = RunDirectory(self.path.with_name(f"{self.path.name}-{number}"), self.stamp)
                number += 1
            except OSError as error:
                raise self._cannot_make(error) from error

    def create(self) -> None:
        """Make the folder and its parts; what exists stays.

        Raises:
            OSError: if that fails, with the reason.
        """
        try:
            for folder in (self.checkpoints, self.configs, self.images):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_make(error) from error

    def _cannot_make(self, error: OSError) -> OSError:
        return OSError(
            f"cannot make the run folder {self.path}: {error.strerror or error} (choose another place with --logdir)"
        )


def resume_command(run: Path, words: str = "") -> str:
    """Say what to type to continue a run; or its own command, where it has saved nothing to continue from.

    Args:
        run: the run's folder.
        words: what to type behind it; ``--accept_changes`` among them is left out where the run begins anew.
    """
    if RunDirectory(run, "").last_checkpoint.exists():
        return f"python main.py -t -r {command_word(run)} {words}".rstrip()
    words = words.replace("--accept_changes", "").strip()
    return f"the same command with {words}" if words else "the same command again"


def new_run_directory(
    logdir: str,
    data_root: str | None,
    name: str | None,
    postfix: str,
    datadir_in_name: bool,
    bases: Sequence[str],
    now: datetime,
) -> RunDirectory:
    """Name the folder of a new run: ``<data folder><date and time>_<name><postfix>``.

    Args:
        logdir: folder of all runs.
        data_root: folder of the training pictures; its last part comes first in the name.
        name: what the user calls the run; without one the first configuration file's name is taken.
        postfix: text to end the name with.
        datadir_in_name: whether the data folder's name is part of it.
        bases: the configuration files.
        now: the time.

    Returns:
        A folder that does not exist yet; nothing is written.

    Raises:
        ValueError: if a part holds characters that file names may not have.
    """
    for flag, text in (("-n/--name", name or ""), ("-f/--postfix", postfix)):
        bad = sorted({character for character in text if character in NOT_IN_FILE_NAMES or ord(character) < 32})
        if bad:
            raise ValueError(f"{flag} {text!r}: {' '.join(bad)} cannot be part of a folder name")
    stamp = now.strftime(STAMP_FORMAT)
    called = name or (last_part(bases[0]).rpartition(".")[0] or last_part(bases[0]) if bases else "")
    folder = (
        (last_part(data_root) if datadir_in_name and data_root else "") + stamp + (f"_{called}" if called else "")
    ) + postfix
    length = len(os.fsencode(folder))
    if length > LONGEST_NAME:
        raise ValueError(
            f"the run folder's name {folder[:40]}... has {length} letters, more than the {LONGEST_NAME} that file"
            " systems take; give a shorter one with -n/--name"
        )
    path = Path(logdir) / folder
    number = 2
    while path.exists():
        path = Path(logdir) / f"{folder}-{number}"
        number += 1
    return RunDirectory(path, stamp)


def find_run(resume: str, now: datetime) -> tuple[RunDirectory, Path]:
    """Find the run folder and the checkpoint that ``--resume`` means.

    Args:
        resume: a run folder, its ``checkpoints`` folder, or a checkpoint inside it.
        now: the time, for this session's file names.

    Returns:
        The run's folder, and the checkpoint: the given one, else ``last.ckpt``, else the newest that is
        whole.

    Raises:
        OSError: if the path does not exist.
        ValueError: if it holds no checkpoint, or none that can be continued, or is a file outside a run folder.
    """
    given = Path(resume)
    if not given.exists():
        raise FileNotFoundError(f"--resume {resume}: no such file or folder")
    if given.is_file():
        run = given.resolve().parent.parent
        if given.resolve().parent.name != "checkpoints" or not (run / "configs").is_dir():
            raise ValueError(
                f"--resume {resume}: not inside a run folder (<run>/checkpoints/, beside <run>/configs/);"
                " to start a new run from these weights, use --actual_resume"
            )
        refuse_weights_alone(given)
        checkpoint = given
    else:
        is_inner = given.resolve().name == "checkpoints" and (given.resolve().parent / "configs").is_dir()
        run = given.resolve().parent if is_inner else given
        try:
            checkpoint = newest_valid_checkpoint(run / "checkpoints" / LAST_CHECKPOINT)
        except FileNotFoundError as error:
            raise ValueError(
                f"--resume {resume}: {error}; name a run folder under logs/, or start anew with --actual_resume and a"
                " checkpoint file"
            ) from error
    return RunDirectory(run, now.strftime(STAMP_FORMAT)), checkpoint


def list_runs(logdir: Path) -> list[Path]:
    """List the run folders in a log folder.

    Args:
        logdir: the log folder.

    Returns:
        Every folder in it that holds a run's configurations or checkpoints, the one that was last at work first.

    Raises:
        OSError: there is no such folder.
    """
    if not logdir.is_dir():
        raise FileNotFoundError(f"the log folder {logdir} does not exist; name it with -l/--logdir")
    runs = [path for path in logdir.iterdir() if (path / "configs").is_dir() or (path / "checkpoints").is_dir()]
    return sorted(runs, key=lambda run: (_last_at_work(run), run.name), reverse=True)


def newest_run(logdir: Path, name: str | None = None, postfix: str = "") -> Path:
    """Find the run that was last at work, among those that can be continued.

    Args:
        logdir: the log folder.
        name: what the run was called with ``-n``; None: whatever it was called.
        postfix: what it was called with ``-f``; looked at beside a name alone.

    Returns:
        Its folder. Newer ones without a checkpoint are named in the log.

    Raises:
        OSError: there is no such folder.
        ValueError: no run in it has a checkpoint.
    """
    runs = [run for run in list_runs(logdir) if name is None or _is_called(run, name, postfix)]
    for run in runs:
        if any((run / "checkpoints").glob("*.ckpt")) and any((run / "configs").glob("*-project.yaml")):
            return run
        logger.warning("%s is passed over: it has no checkpoint to continue from", run)
    whose = "" if name is None else f" of the name {name}{postfix}"
    found = f"none of {len(runs)} runs{whose} has a checkpoint" if runs else f"it holds no run{whose}"
    raise NoRunError(
        f"-r/--resume: nothing to continue in the log folder {logdir}: {found}; name a run folder, or"
        " the log folder with -l/--logdir; with -r auto, --base YAML begins a run where there is none"
    )


def _is_called(run: Path, name: str, postfix: str) -> bool:
    """Tell whether a run was given a name, by its folder and by its saved configuration."""
    if f"_{name}{postfix}" not in run.name:
        return False  # most of them, unread
    saved = sorted((run / "configs").glob("*-project.yaml"), key=lambda file: file.name)
    if not saved:
        return False
    try:
        config = read_yaml(saved[-1].as_posix())
    except ValueError as error:
        logger.warning("%s is passed over: %s", run, error)
        return False
    return (str(config.get("run.name")), str(config.get("run.postfix") or "")) == (name, postfix)


def _last_at_work(run: Path) -> float:
    """When a run last wrote a checkpoint, its record, its ledger or a configuration, in seconds."""
    files = [*run.glob("checkpoints/*.ckpt"), *run.glob("configs/*.yaml"), *run.glob("*.json"), *run.glob("*.jsonl")]
    return max((file.stat().st_mtime for file in [run, *files] if file.exists()), default=0.0)


def last_part(path: str) -> str:
    r"""Take the last part of a path that was written with slashes or back slashes, on any system.

    Args:
        path: a path, such as ``training_samples\MyProject``.

    Returns:
        The file's or folder's own name; for ``.`` and the like the name of the folder that it stands for.
    """
    name = PureWindowsPath(path).name
    if name in ("", ".", ".."):
        name = Path(path).resolve().name
    return re.sub(f"[{re.escape(NOT_IN_FILE_NAMES)}]", "_", name)
