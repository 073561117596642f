"""Kill training over and over, continue it each time, and prove that nothing of it was lost.

python scripts/kill_and_resume.py [--kills N] [--inside N] [--seed N] [--keep DIR]

Trains a tiny model in several settings (loader processes, accumulation, moving averages, background saving, reading
back, by steps or by epochs): once unbroken, and again and again in runs that are killed (SIGKILL, to the process and
its loaders) and continued with -r until they end. A third of the kills falls inside a save: half of those right before
or after one call to the file system, the others at a random time. The rest falls anywhere: start-up, the data's check,
restoring, steps, between accumulated batches, validation, the end of an epoch, any file that the run writes. What each
run leaves is compared with the unbroken one's: weights, moving averages, the optimiser's state, learning rates,
counters, exposures, curves, the checkpoints' names and content.

A run that is killed before its first save has nothing to continue from: its command is given again.

Exit status: 0 all is the same, 1 something differs or could not be continued, 2 it could not be tried.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import pytorch_lightning as pl
import torch
from checkpoint_files import report_errors
from verify_resume import EPOCH_AND_STEP, TINY, TINY_WORDS, Result, compare, compare_runs, make_pictures

from ldm.checkpoint import read_checkpoint, verify_checkpoint
from ldm.training import run as training
from ldm.training.checkpoint_io import PARTIAL
from ldm.training.config_tree import leaves, read_yaml
from ldm.training.disk import Disk
from ldm.training.progress import format_duration
from ldm.training.run_directory import LAST_CHECKPOINT
from ldm.training.run_record import RECORD, read_record
from ldm.training.targets import resolve_target
from ldm.training.trainer import DEFAULT_CALLBACKS

SMALLER_WORDS: Final = (
    "model.params.unet_config.params.context_dim=8",
    "model.params.cond_stage_config.params.text_config.hidden_size=8",
    "model.params.cond_stage_config.params.text_config.intermediate_size=8",
    "model.params.cond_stage_config.params.text_config.num_hidden_layers=1",
    "model.params.cond_stage_config.params.text_config.num_attention_heads=1",
    "model.params.cond_stage_config.params.text_config.projection_dim=8",
    "model.params.unet_config.params.channel_mult=[1]",
    "model.params.unet_config.params.attention_resolutions=[1]",
    "model.params.first_stage_config.params.ddconfig.ch_mult=[1,1,1]",
)
"""Checkpoints of a few megabytes instead of tens: 200 kills are to take minutes."""

STEPS: Final = 6
MOST_KILLS_OF_A_RUN: Final = 12
MOST_PROBLEMS: Final = 10
"""After which no more runs are tried."""

LONGEST_PROCESS: Final = 300.0
"""Seconds after which a process of a run counts as hung."""

POLL_SECONDS: Final = 0.0005
LATEST_IN_SAVE: Final = 0.03
"""Seconds after the beginning of a save until which a kill at a random time inside it is aimed."""

SHOWN_LINES: Final = 15

COMPARED: Final = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
"""Parts of a checkpoint; the others hold paths and counters of the process."""

CALLS: Final = ("make_folder", "free", "create", "write", "sync", "link", "replace", "sync_folder", "remove")
"""What a save asks of the disk."""

IN_SAVE: Final = ("write", "sync", "link", "replace", "sync_folder")

PHASES: Final = (
    "start-up",
    "data and model",
    "restoring",
    "first step",
    "step",
    "between accumulated batches",
    "validation",
    "end of epoch",
    "end of the run",
)
START_UP, DATA, RESTORING, FIRST_STEP, STEP, ACCUMULATION, VALIDATION, EPOCH_END, RUN_END = range(len(PHASES))

ONCE: Final = ("start-up", "data and model", "restoring", "first step", "end of the run")
"""Phases that a process goes through once."""

PHASE, SAVING, BEGUN, SAVES, ENTERED = range(5)
"""Places on the board: the phase; whether a save is under way; saves begun, and done; how often each phase began."""

SLOTS: Final = ENTERED + len(PHASES)

FILES: Final = ("-project.yaml", RECORD, "exposure.jsonl", "events.out.tfevents", "hparams.yaml")
"""What the names of the run's other files hold."""


def preload() -> None:
    """Import once, and not in each process of a run, what the tiny run's configuration names."""
    targets = [value for path, value in leaves(read_yaml(str(TINY)).tree) if path.endswith(".target")]
    for target in [*targets, *(callback["target"] for callback in DEFAULT_CALLBACKS.values())]:
        resolve_target(target)


@dataclass(frozen=True)
class Setting:
    """What a run is killed under.

    Attributes:
        workers: loader processes.
        accumulate: batches of an optimiser step.
        ema: whether the model keeps moving averages.
        background: whether checkpoints are written by a thread.
        verify: whether they are read back.
        by_steps: whether they are saved every 2 steps, else at each end of an epoch.
        keep_last_n: how many of the newest are kept beside the best.
    """

    workers: int
    accumulate: int
    ema: bool
    background: bool
    verify: bool
    by_steps: bool
    keep_last_n: int

    def words(self) -> list[str]:
        """Say it on the command line."""
        saving = "lightning.modelcheckpoint.params"
        return [
            f"data.params.num_workers={self.workers}",
            f"lightning.trainer.accumulate_grad_batches={self.accumulate}",
            f"model.params.use_ema={self.ema}",
            f"{saving}.background={self.background}",
            f"{saving}.verify={self.verify}",
            f"{saving}.every_n_train_steps={2 if self.by_steps else 'null'}",
            f"{saving}.every_n_epochs={'null' if self.by_steps else 1}",
            f"{saving}.keep_last_n={self.keep_last_n}",
            f"{saving}.save_top_k=2",
        ]

    def __str__(self) -> str:
        parts = [
            f"{self.workers} workers",
            f"accumulation {self.accumulate}",
            "saved by steps" if self.by_steps else "",
        ]
        parts += ["EMA" if self.ema else "", "in the background" if self.background else ""]
        parts += ["" if self.verify else "not read back", f"newest {self.keep_last_n}" if self.keep_last_n else ""]
        return ", ".join(part for part in parts if part)


def settings() -> list[Setting]:
    """Combine the settings so that any two of them meet in every way."""
    return [
        Setting(
            workers=2 * a,
            accumulate=1 + (a ^ c),
            ema=bool(b ^ c ^ 1),
            background=bool(b),
            verify=not a ^ b,
            by_steps=not c,
            keep_last_n=2 * (a ^ b ^ c),
        )
        for a, b, c in itertools.product((0, 1), repeat=3)
    ]


@dataclass(frozen=True)
class Strike:
    """When a process is killed.

    Attributes:
        how: ``call`` (at a call to the disk), ``save`` (at a time inside a save), ``file`` (as soon as a file of the
            run that is no checkpoint has been opened for writing), ``phase`` (at a time inside one), or ``time``.
        what: the call, a part of the file's name, or the phase.
        count: which one, from 1.
        after: whether the call is done first.
        delay: seconds to wait.
    """

    how: str
    what: str = ""
    count: int = 1
    after: bool = False
    delay: float = 0.0


class Board:
    """Numbers that a process and its parent both see."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, 8 * SLOTS)).cast("q")

    def __getitem__(self, place: int) -> int:
        return int(self._numbers[place])

    def __setitem__(self, place: int, value: int) -> None:
        self._numbers[place] = value

    def enter(self, phase: int) -> None:
        """Note that a phase begins."""
        self[PHASE] = phase
        self[ENTERED + phase] += 1

    def begin_save(self) -> None:
        """Note that a save begins."""
        self[BEGUN] += 1
        self[SAVING] = 1

    def end_save(self) -> None:
        """Note that a save is done."""
        self[SAVING] = 0
        self[SAVES] += 1


class KillingDisk(Disk):
    """Notes when a save is under way, and kills the process at one call if told to.

    Args:
        board: where it is noted.
        strike: when to kill.
    """

    def __init__(self, board: Board, strike: Strike | None) -> None:
        self.board = board
        self.strike = strike if strike is not None and strike.how == "call" else None
        self.asked: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[bool]:
        """Count a call, and die before or after it if it is the one; gives whether it is."""
        self.asked[name] += 1
        is_meant = self.strike is not None and (name, self.asked[name]) == (self.strike.what, self.strike.count)
        if is_meant and self.strike is not None and not self.strike.after:
            kill_group()
        yield is_meant
        if is_meant:
            kill_group()

    def make_folder(self, folder: Path) -> None:
        """Make a folder, or be killed; the others likewise, see the base class."""
        with self.call("make_folder"):
            super().make_folder(folder)

    def free(self, folder: Path) -> int:
        """Count free bytes."""
        with self.call("free"):
            return super().free(folder)

    def create(self, path: Path) -> BinaryIO:
        """Open a file, with which a save begins."""
        with self.call("create"):
            self.board.begin_save()
            return KillingFile(self, path)

    def sync(self, stream: BinaryIO) -> None:
        """Bring a file to the disk."""
        with self.call("sync"):
            super().sync(stream)

    def link(self, source: Path, target: Path) -> None:
        """Give a second name, with which another save begins."""
        with self.call("link"):
            self.board.begin_save()
            super().link(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """Rename."""
        with self.call("replace"):
            super().replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        """Bring a folder's names to the disk, with which a save ends."""
        with self.call("sync_folder"):
            super().sync_folder(folder)
        self.board.end_save()

    def remove(self, path: Path) -> None:
        """Delete."""
        with self.call("remove"):
            super().remove(path)


class KillingFile(io.FileIO):
    """A file on such a disk; of the write that is the one half reaches it."""

    def __init__(self, disk: KillingDisk, path: Path) -> None:
        super().__init__(path, "wb")
        self.disk = disk

    def write(self, content: Any) -> int:
        """Write all or half of it."""
        with self.disk.call("write") as is_meant:
            return super().write(memoryview(content)[: len(content) // 2] if is_meant else content)


class Watcher(pl.Callback):
    """Notes what the training loop is at.

    Args:
        board: where it is noted.
    """

    def __init__(self, board: Board) -> None:
        self.board = board

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restoring may begin."""
        self.board.enter(RESTORING)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step begins."""
        self.board.enter(FIRST_STEP)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins, or goes on with another batch."""
        if batch_idx % trainer.accumulate_grad_batches:
            self.board.enter(ACCUMULATION)
        elif self.board[PHASE] != FIRST_STEP:
            self.board.enter(STEP)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The first step is over."""
        if self.board[PHASE] == FIRST_STEP:
            self.board.enter(STEP)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation begins."""
        self.board.enter(VALIDATION)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch ends."""
        self.board.enter(EPOCH_END)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run ends."""
        self.board.enter(RUN_END)


def kill_group() -> None:
    """Kill this process and its loaders, now."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def train_watched(words: Sequence[str], board: Board, strike: Strike | None, folder: Path, output: Path) -> None:
    """Be the process of a run: do what ``python main.py WORDS`` does, and never return.

    Args:
        words: the command line.
        board: tells the parent how far this has come.
        strike: when to be killed, or None.
        folder: the log folder.
        output: the file that what is written to the terminal goes to.
    """
    status = training.FAILED
    try:
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        handle = os.open(output, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        build_trainer = training.build_trainer

        def build_watched(*args: Any, **options: Any) -> pl.Trainer:
            trainer = build_trainer(*args, **options)
            trainer.strategy.checkpoint_io.disk = KillingDisk(board, strike)  # type: ignore[attr-defined]
            trainer.callbacks.insert(0, Watcher(board))  # type: ignore[attr-defined]
            board.enter(DATA)
            return trainer

        training.build_trainer = build_watched
        if strike is not None and strike.how == "file":
            sys.addaudithook(FileWatch(strike, folder))
        status = training.main(words)
    except BaseException:  # noqa: BLE001 - nothing may come back to the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class FileWatch:
    """Kills the process when it opens a certain file for writing, which is then there, and empty if it was to be.

    Args:
        strike: says which.
        below: the log folder.
    """

    def __init__(self, strike: Strike, below: Path) -> None:
        self.strike = strike
        self.below = f"{below}{os.sep}"
        self.seen = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at what is going to be done; Python calls this for each event of its audit."""
        if event != "open" or not isinstance(arguments[0], str) or not arguments[0].startswith(self.below):
            return
        path, flags = arguments[0], arguments[2]
        if self.strike.what not in os.path.basename(path) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
        self.seen += 1
        if self.seen == self.strike.count:
            os.open(path, flags, 0o666)
            kill_group()


@dataclass(frozen=True)
class Found:
    """What a killed process has left.

    Attributes:
        partial: whether there is a half-written file under a temporary name.
        damaged: checkpoints that are not whole.
        continued_from: ``last.ckpt``, ``another`` where that is missing or damaged, or None where there is none.
        problem: of the run's record, or None.
    """

    partial: bool = False
    damaged: tuple[str, ...] = ()
    continued_from: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Kill:
    """What is known of one.

    Attributes:
        phase: where the process was.
        in_save: whether a save was under way.
        saves: how many the process had done.
        found: what the run's folder held afterwards.
    """

    phase: str
    in_save: bool
    saves: int
    found: Found


class KilledRun:
    """One run in as many processes as it takes.

    Args:
        folder: where its log folder and its output go.
        command: begins it.
    """

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.logdir = folder / "logs"
        self.logdir.mkdir(parents=True)
        self.output = folder / "output.log"
        self.command = [*command, "-l", str(self.logdir)]
        self.run: Path | None = None
        self.kills: list[Kill] = []
        self.had_ended = False

    @property
    def folder(self) -> Path:
        """The run's folder; there is one once it has come to its end."""
        if self.run is None:
            raise FileNotFoundError(f"the run made no folder in {self.logdir}")
        return self.run

    def train(self, strike: Strike | None = None) -> bool:
        """Begin the run, or continue it where there is something to continue from.

        Args:
            strike: when to kill it, or None.

        Returns:
            Whether it came to its end.

        Raises:
            OSError: it failed, or hangs.
        """
        resumes = self.run is not None and self.kills and self.kills[-1].found.continued_from is not None
        words = ["-t", "-r", str(self.run)] if resumes else self.command
        before = set(self.logdir.iterdir())
        board = Board()
        status = _run_process(words, board, strike, self.logdir, self.output)
        new = sorted(set(self.logdir.iterdir()) - before)
        self.run = new[0] if new else self.run if resumes else None
        if status == 0:
            self.had_ended = not board[ENTERED + FIRST_STEP]
            return True
        if status != -signal.SIGKILL:
            raise OSError(f"a run ended with exit status {status}; it wrote last:\n{self._end_of_output()}")
        found = Found() if self.run is None else look_at(self.run)
        self.kills.append(Kill(PHASES[board[PHASE]], bool(board[SAVING]), board[SAVES], found))
        return False

    def _end_of_output(self) -> str:
        text = self.output.read_text(encoding="utf-8", errors="replace") if self.output.is_file() else ""
        return "\n".join(text.splitlines()[-SHOWN_LINES:])


def _run_process(words: Sequence[str], board: Board, strike: Strike | None, logdir: Path, output: Path) -> int:
    """Run a process of a run to its end or its kill.

    Returns:
        Its exit status; the signal's negative number where one ended it.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        train_watched(words, board, strike, logdir, output)
    with contextlib.suppress(OSError):  # done by itself already, or ended
        os.setpgid(child, child)
    began = time.monotonic()
    due: float | None = None
    try:
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if due is None and strike is not None and _is_reached(strike, board):
                due = now + strike.delay
            if (due is not None and now >= due) or now > began + LONGEST_PROCESS:
                os.killpg(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                if now > began + LONGEST_PROCESS:
                    raise OSError(f"a process of the run hangs in phase {PHASES[board[PHASE]]!r}")
                return os.waitstatus_to_exitcode(status)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        os.killpg(child, signal.SIGKILL)
        raise


def _is_reached(strike: Strike, board: Board) -> bool:
    """Tell whether the time has come from which a strike's delay counts."""
    if strike.how == "phase":
        return board[ENTERED + PHASES.index(strike.what)] >= strike.count
    if strike.how == "save":
        return board[BEGUN] >= strike.count
    return strike.how == "time"


def look_at(run: Path) -> Found:
    """See what a killed process has left.

    Args:
        run: the run's folder.
    """
    checkpoints = run / "checkpoints"
    damaged = tuple(path.name for path in sorted(checkpoints.glob("*.ckpt")) if not _is_whole(path))
    whole = [path.name for path in checkpoints.glob("*.ckpt") if path.name not in damaged]
    problem = None
    try:
        read_record(run)
    except ValueError as error:
        problem = str(error)
    return Found(
        partial=any(checkpoints.glob(f"*{PARTIAL}")),
        damaged=damaged,
        continued_from=LAST_CHECKPOINT if LAST_CHECKPOINT in whole else "another" if whole else None,
        problem=problem,
    )


def _is_whole(path: Path) -> bool:
    try:
        return verify_checkpoint(path)
    except (ValueError, OSError):
        return False


class Aim:
    """Draws when to kill.

    Args:
        seed: where the draws come from.
        share: of the kills that are to fall inside a save.
    """

    def __init__(self, seed: int, share: float) -> None:
        self.random = random.Random(seed)
        self.share = share
        self.calls = itertools.cycle([(call, after) for after in (False, True) for call in CALLS])
        self.in_save = itertools.cycle([(call, after) for after in (False, True) for call in IN_SAVE])
        self.files = itertools.cycle(FILES)
        self.phases = itertools.cycle(PHASES)

    def next(self, kills: Sequence[Kill], seconds: float) -> Strike:
        """Draw the next strike.

        Args:
            kills: those so far.
            seconds: how long an unbroken run takes.
        """
        draw = self.random
        if kills and kills[-1].found.continued_from is None and draw.random() < 0.75:
            # The run has nothing to continue from yet, and most kills are to be of runs that have.
            return Strike("save", count=2, delay=draw.uniform(0, LATEST_IN_SAVE))
        if sum(kill.in_save for kill in kills) < self.share * (len(kills) + 1):
            if draw.random() < 0.5:
                return Strike("save", count=self._which(), delay=draw.uniform(0, LATEST_IN_SAVE))
            return self._at_call(*next(self.in_save))
        how = draw.choice(["phase", "phase", "phase", "time", "file", "call"])
        if how == "phase":
            phase = next(self.phases)
            return Strike("phase", phase, 1 if phase in ONCE else self._which(), delay=draw.uniform(0, 0.1))
        if how == "file":
            return Strike("file", next(self.files))
        if how == "call":
            return self._at_call(*next(self.calls))
        return Strike("time", delay=draw.uniform(0, seconds))

    def _at_call(self, call: str, after: bool) -> Strike:
        return Strike("call", call, self.random.randint(1, 300) if call == "write" else self._which(), after)

    def _which(self) -> int:
        """Draw which of several to take; the later ones do not come in every process."""
        return self.random.choice((1, 1, 2))


def main(argv: Sequence[str] | None = None) -> int:
    """Try it; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="how often to kill (default: 200)")
    parser.add_argument("--inside", type=float, default=1 / 3, metavar="SHARE", help="of them inside a save (1/3)")
    parser.add_argument("--seed", type=int, metavar="N", help="when to kill (default: drawn)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs here (default: they are deleted)")
    options = parser.parse_args(argv)
    if options.kills < 1 or not 0 <= options.inside <= 1:
        parser.error("give --kills 1 or more, and --inside from 0 to 1")
    if not hasattr(os, "fork"):
        parser.error("this needs a system that can fork processes: Linux or macOS")

    def work() -> int:
        if options.keep is not None:
            options.keep.mkdir(parents=True)
            return prove(options.keep, options)
        with tempfile.TemporaryDirectory(prefix="kill_and_resume") as folder:
            return prove(Path(folder), options)

    return report_errors("kill_and_resume", work)


def prove(folder: Path, options: argparse.Namespace) -> int:
    """Kill runs until there are enough kills, and compare each with its unbroken one.

    Args:
        folder: an empty folder.
        options: what the command line says.

    Returns:
        0 if all is the same, else 1.

    Raises:
        OSError: an unbroken run failed.
    """
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"{options.kills} kills, --seed {seed} aims them again", flush=True)
    torch.set_num_threads(1)
    preload()
    make_pictures(folder / "pictures")
    aim = Aim(seed, options.inside)
    began = time.monotonic()
    unbroken: dict[Setting, tuple[Path, float]] = {}
    kills: list[Kill] = []
    problems: list[str] = []
    differences: dict[str, float] = {}
    surplus = 0
    for number, setting in enumerate(itertools.cycle(settings()), start=1):
        if len(kills) >= options.kills or len(problems) >= MOST_PROBLEMS:
            break
        command = _command(folder, setting)
        if setting not in unbroken:
            unbroken[setting] = _train_unbroken(folder / f"unbroken {len(unbroken) + 1}", command)
        whole, seconds = unbroken[setting]
        run = KilledRun(folder / f"killed {number}", command)
        wrong = []
        try:
            ended = False
            while not ended:
                enough = len(run.kills) >= MOST_KILLS_OF_A_RUN or len(kills) + len(run.kills) >= options.kills
                ended = run.train(None if enough else aim.next([*kills, *run.kills], seconds))
            results = compare_killed(whole, run)
            surplus += len(left_over(whole, run.folder))
            for result in results:
                differences[result.what] = max(differences.get(result.what, 0.0), result.difference)
            wrong = [f"{result.what}: {result.problem}" for result in results if not result.is_same]
        except (OSError, ValueError) as error:
            wrong = [str(error)]
        wrong += [f"damaged: {name}" for kill in run.kills for name in kill.found.damaged]
        wrong += [kill.found.problem for kill in run.kills if kill.found.problem is not None]
        kills += run.kills
        problems += [f"run {number} ({setting}): {each}" for each in wrong]
        inside = sum(kill.in_save for kill in run.kills)
        verdict = "DIFFERENT" if wrong else "the same"
        print(f"run {number} ({setting}): {len(run.kills)} kills, {inside} inside a save: {verdict}", flush=True)
    for line in describe(kills, time.monotonic() - began):
        print(line)
    print(f"checkpoints that a kill kept from being deleted: {surplus}")
    if problems:
        print("\n" + "\n".join(problems))
        print("\nNot every run equals its unbroken one.")
        return 1
    print(f"\nEvery run that was killed equals its unbroken one ({', '.join(differences)}):")
    print(f"the largest difference is {max(differences.values(), default=0.0):g}.")
    return 0


def compare_killed(unbroken: Path, killed: KilledRun) -> list[Result]:
    """Compare what a killed run has left with what its unbroken one has.

    Args:
        unbroken: the folder of that.
        killed: the other one, at its end.
    """
    found = [name for name in _names(killed.folder) if name not in left_over(unbroken, killed.folder)]
    names = compare("checkpoint names", _names(unbroken), found)
    results = [result for result in compare_runs(unbroken, killed.folder) if result.what != names.what]
    results += [names, compare_checkpoints(unbroken, killed.folder)]
    if not killed.had_ended:
        return results
    # Killed after its last step, it had nothing left to do: its file still calls the epoch that max_steps cut off
    # unfinished, which the last save of an unbroken run no longer does.
    kept = [result for result in results if result.what != EPOCH_AND_STEP]
    steps = [read_checkpoint(run / "checkpoints" / LAST_CHECKPOINT)["global_step"] for run in (unbroken, killed.folder)]
    return [*kept, compare("step", *steps)]


def compare_checkpoints(unbroken: Path, killed: Path) -> Result:
    """Compare what the checkpoints beside ``last.ckpt`` hold.

    Args:
        unbroken: the run folder of the one.
        killed: that of the other; what it holds beyond the one's is passed over, see :func:`left_over`.
    """
    contents: list[dict[str, Any]] = []
    for run in (unbroken, killed):
        files = [unbroken / "checkpoints" / name for name in _names(unbroken) if name != LAST_CHECKPOINT]
        read = {path.name: read_checkpoint(run / "checkpoints" / path.name) for path in files}
        contents.append({name: {key: content[key] for key in COMPARED} for name, content in read.items()})
    return compare("earlier checkpoints", *contents)


def left_over(unbroken: Path, killed: Path) -> list[str]:
    """Name the checkpoints that a run was killed before it could delete.

    A run that goes on from the checkpoint after it does not know of it, and deletes nothing that it does not know.

    Args:
        unbroken: the run folder of the unbroken run.
        killed: that of the killed one.
    """
    return [name for name in _names(killed) if name.endswith(".ckpt") and name not in _names(unbroken)]


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def describe(kills: Sequence[Kill], seconds: float) -> list[str]:
    """Count kills.

    Args:
        kills: all of them.
        seconds: how long it took.

    Returns:
        Lines.
    """
    phases = collections.Counter(kill.phase for kill in kills if not kill.in_save)
    sources = collections.Counter(kill.found.continued_from for kill in kills)
    return [
        "",
        f"{len(kills)} kills in {format_duration(seconds)}",
        f"  inside a save: {sum(kill.in_save for kill in kills)}",
        *(f"  {phase}: {phases[phase]}" for phase in PHASES if phases[phase]),
        f"nothing new had been saved since the process began: {sum(kill.saves == 0 for kill in kills)}",
        f"before the run's first save, so begun anew: {sources[None]}",
        f"continued from {LAST_CHECKPOINT}: {sources[LAST_CHECKPOINT]}, from another one: {sources['another']}",
        f"half-written files left under a temporary name: {sum(kill.found.partial for kill in kills)},"
        f" damaged checkpoints: {sum(len(kill.found.damaged) for kill in kills)}",
    ]


def _train_unbroken(folder: Path, command: Sequence[str]) -> tuple[Path, float]:
    """Train a run to its end; gives its folder and how long it took."""
    began = time.monotonic()
    run = KilledRun(folder, command)
    run.train()
    return run.folder, time.monotonic() - began


def _command(folder: Path, setting: Setting) -> list[str]:
    """Build the words for main.py that begin a run."""
    limits = ["--max_steps", str(STEPS), "--no-test", "-n", "kill"]
    ledger = ["lightning.callbacks.exposure_ledger.params.enabled=true", "lightning.trainer.log_every_n_steps=1"]
    given = [*TINY_WORDS, *SMALLER_WORDS, *ledger, *setting.words(), *limits]
    return ["--base", str(TINY), "-t", "--data_root", str(folder / "pictures"), *given]


if __name__ == "__main__":
    sys.exit(main())
