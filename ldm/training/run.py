"""The table of contents of a run: from a command line to a trained checkpoint."""

from __future__ import annotations

import logging
import os
import pdb
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from ldm.checkpoint import load_weights, read_weights
from ldm.diffusers_format import is_diffusers_folder, read_folder
from ldm.out_of_memory import is_out_of_memory
from ldm.training.batch_splitting import refuse_unsplittable
from ldm.training.callbacks import Beginning, NewestCheckpoints
from ldm.training.checkpoint_io import CheckpointWriteError, remove_leftovers
from ldm.training.cli import Options, parse_options
from ldm.training.company import Company, OtherDeviceError
from ldm.training.config import RunConfig, format_config, load_run_config, said_of_run
from ldm.training.console import command_word, console, harmless
from ldm.training.data_record import describe_data
from ldm.training.disk import write_text
from ldm.training.failures import TrainingError, explain
from ldm.training.latent_caching import refuse_uncacheable
from ldm.training.learning_rate import describe_schedule, optimizers_own_rate, scaled_learning_rate
from ldm.training.loss_guard import NotFiniteError
from ldm.training.memory_plan import plan_memory, planned_devices
from ldm.training.own_optimisation import leave_to_model
from ldm.training.resumption import warn_of_going_back
from ldm.training.run_changes import Changes, find_changes, question
from ldm.training.run_directory import (
    AUTO,
    NEWEST_RUN,
    NoRunError,
    RunDirectory,
    find_run,
    new_run_directory,
    newest_run,
    resume_command,
)
from ldm.training.run_record import OUT_OF_TIME, RunRecord, refuse_running, why_it_ended
from ldm.training.sharding import refuse_unshardable
from ldm.training.stop_signals import Interrupted, StopSignals
from ldm.training.summary import (
    RunSummary,
    StepPlan,
    describe_training_set,
    empty_limits,
    model_parts,
    plan_steps,
    plural,
    shown_per_epoch,
    training_shapes,
)
from ldm.training.trainer import build_trainer
from ldm.training.warm_optimizer import WarmOptimizer, describe_state
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

DONE: Final = 0
FAILED: Final = 1
USER_ERROR: Final = 2

USER_ERRORS: Final = (ValueError, OSError, MisconfigurationException, MemoryError)

NAMED_CAPTIONS: Final = 5
"""How many captions that are cut the warning names."""

NAMED_CHARACTERS: Final = 80
"""How much of each of them."""

CHUNK_WORDS: Final = "model.params.cond_stage_config.params.long_captions=chunk"


@dataclass
class Run:
    """What belongs together while a run lasts.

    Attributes:
        config: the merged configuration as plain containers.
        directory: the run's folder.
        checkpoint: the checkpoint to continue from, or None for a new run.
        signals: the run's stop signals.
    """

    config: dict[str, Any]
    directory: RunDirectory
    checkpoint: Path | None
    signals: StopSignals

    @property
    def said(self) -> Mapping[str, Any]:
        """What the command line said."""
        section: Mapping[str, Any] = self.config["run"]
        return section


def main(argv: Sequence[str] | None = None) -> int:
    """Do what a command line asks for.

    Args:
        argv: the words after ``main.py``; None takes the process's own.

    Returns:
        The exit status: 0 done (also where nothing was left to do, and at the end of ``max_time``); 1 an unexpected
        failure, with its traceback; 2 something that the user can put right, with a line for each problem; 130, 143,
        129 and 149 ended by Ctrl-C, SIGTERM, SIGHUP and Ctrl-Break.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        options = parse_options(words)
    except ValueError as error:
        return _report(error)
    try:
        with console(getattr(rank_zero_only, "rank", 0), options.debug), StopSignals() as signals:
            try:
                _run(options, signals, words)
            except Interrupted as stop:
                logger.warning("%s", stop)
                return stop.exit_code
            except OtherDeviceError as other:
                if not other.has_said:
                    _write_error(f"error: {other}\n")
                return other.status
            except Exception as error:  # noqa: BLE001 - the one place that decides how a failure is shown
                return _report(error, options.debug)
    except Interrupted as stop:  # once more, while that was being said
        return stop.exit_code
    return DONE


def _run(options: Options, signals: StopSignals, words: Sequence[str]) -> None:
    """Go through a run from its configuration to its end."""
    if options.resume in NEWEST_RUN:
        options = _choose_run(options)
    run_config = load_run_config(options)
    if options.print_config:
        logger.info("%s", format_config(run_config))
        return
    for notice in run_config.notices:
        logger.info("note: %s", notice)
    config: dict[str, Any] = OmegaConf.to_container(run_config.config, resolve=True)  # type: ignore[assignment]
    run = Run(config, *_choose_directory(options, config["run"]), signals)
    if options.memory_plan is not None:
        pl.seed_everything(run.said["seed"], workers=True, verbose=False)
        for line in plan_memory(config, _build_data(run).datasets["train"]).lines(planned_devices(options.memory_plan)):
            logger.info("%s", line)
        return
    run.directory.check_writable()
    pl.seed_everything(run.said["seed"], workers=True, verbose=False)

    trainer = _build_trainer(run)
    data = _build_data(run)
    record = _build_record(run, trainer, data, words, options.accept_changes)
    model, origin = _build_model(run)
    refuse_uncacheable(model, data.datasets)
    refuse_unsplittable(run.said["on_oom"], trainer, model)
    refuse_unshardable(trainer, model)
    plan = _plan(run, trainer, data)
    rates = _set_learning_rates(run, trainer, model, plan)
    if _is_warm(run):
        origin.append(describe_state(trainer, model, Path(run.said["actual_resume"])))
    if trainer.strategy.root_device.type == "cuda":
        origin.append(f"GPU memory: {_foresee_memory(run, trainer, data)}")
    summary = _summarise(run, trainer, data, model, origin, rates, plan)
    trainer = _prepare_folder(run, trainer, run_config, record)
    for line in replace(summary, run_folder=str(run.directory.path)).lines():
        logger.info("%s", line)

    try:
        _fit(run, trainer, model, data)
        record.note_losses(trainer)
        _test(run, trainer, model, data)
    except BaseException as error:
        record.end(trainer, error)
        raise
    record.end(trainer)
    _report_end(run, trainer)


def _choose_run(options: Options) -> Options:
    """Put the newest run's folder in the place of ``last`` or ``auto``; with ``auto`` none may be there yet."""
    logdir = Path(str(said_of_run(options, "logdir") or Options.logdir))
    name, postfix = (said_of_run(options, setting) for setting in ("name", "postfix"))
    called = str(name) if options.resume == AUTO and name is not None else None
    try:
        run = newest_run(logdir, called, postfix or "")
    except (NoRunError, FileNotFoundError):
        if options.resume != AUTO or not options.base:
            raise
        whose = "" if called is None else f" called {called}{postfix or ''}"
        logger.info("a new run begins: %s holds no run%s with a checkpoint to continue from", logdir, whose)
        return replace(options, resume=None)
    logger.info("the newest run: %s", run)
    return replace(options, resume=str(run))


def _choose_directory(options: Options, said: Mapping[str, Any]) -> tuple[RunDirectory, Path | None]:
    """Find the folder of the run to continue, or name a new one."""
    now = datetime.now()
    if options.resume:
        return find_run(options.resume, now)
    directory = new_run_directory(
        logdir=said["logdir"],
        data_root=said.get("data_root"),
        name=said.get("name"),
        postfix=said.get("postfix") or "",
        datadir_in_name=said["datadir_in_name"],
        bases=options.base,
        now=now,
    )
    return directory, None


def _prepare_folder(run: Run, trainer: pl.Trainer, run_config: RunConfig, record: RunRecord) -> pl.Trainer:
    """Make a new run's folder with its configuration and record, now that nothing more is going to be refused.

    A continued run's are written when its checkpoint has been restored: a configuration that does not fit
    it must not become what the next attempt starts from.

    Returns:
        The trainer, built again if another run that began in the same second has taken the folder's name.
    """

    def write_config() -> None:
        run.directory.create()
        remove_leftovers(run.directory.checkpoints)
        try:
            write_text(run.directory.config_file, OmegaConf.to_yaml(run_config.config))
        except OSError as error:
            raise OSError(
                f"cannot write {run.directory.config_file}: {error.strerror or error} (make room on its disk, or choose"
                " another place with --logdir)"
            ) from error
        record.begin(trainer, run.directory, run.checkpoint)

    if run.checkpoint is not None:
        warn_of_going_back(run.checkpoint, run.directory.last_checkpoint)
        _beginning(trainer).first = write_config
    elif trainer.is_global_zero:
        claimed = run.directory.claim()
        if claimed != run.directory:
            run.directory = claimed
            trainer = _build_trainer(run)
        write_config()
    return trainer


def _beginning(trainer: pl.Trainer) -> Beginning:
    """Find the callback that knows whether training has begun."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, Beginning))  # type: ignore[attr-defined]


def _company(trainer: pl.Trainer) -> Company:
    """Find the callback that watches over the other devices' processes."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, Company))  # type: ignore[attr-defined]


def _raise_failure_of_others(trainer: pl.Trainer, error: Exception) -> None:
    """Raise another process's failure in the place of what it has caused in this one."""
    failure = _company(trainer).blame(error)
    if failure is not None:
        raise failure from error


def _exit_status(error: Exception) -> int:
    """Tell what is the user's to put right from what is not."""
    return USER_ERROR if isinstance(error, USER_ERRORS) else FAILED


def _build_trainer(run: Run) -> pl.Trainer:
    """Build the trainer, which also finds out whether the devices are there."""
    data_params = run.config["data"].get("params") or {}
    params = run.config["model"].get("params") or {}
    trainer = build_trainer(
        run.config.get("lightning") or {},
        run.directory,
        run.signals,
        batch_size=data_params["batch_size"],
        monitor=params.get("monitor"),
        validates=data_params.get("validation") is not None,
        on_nan=run.said["on_nan"],
        base_learning_rate=run.config["model"]["base_learning_rate"],
        on_oom=run.said["on_oom"],
        parts_stop=any(params.get(key) is not None for key in ("cond_stop_after", "model_stop_after")),
    )
    if _is_warm(run):
        trainer.callbacks.insert(0, WarmOptimizer(Path(run.said["actual_resume"])))  # type: ignore[attr-defined]
    return trainer


def _is_warm(run: Run) -> bool:
    """Tell whether a new run starts with a checkpoint's optimiser state; a continued one has its own."""
    if run.checkpoint is not None or not run.said["warm_optimizer"]:
        return False
    if not run.said.get("actual_resume"):
        raise ValueError(
            "run.warm_optimizer starts a new run with a checkpoint's optimiser state: name the checkpoint with "
            "--actual_resume CKPT, or set it to false"
        )
    return True


def _build_data(run: Run) -> Any:
    """Build and check the data sets, before anything that takes long."""
    data = instantiate_from_config(run.config["data"], pl.LightningDataModule)
    data.setup("fit")
    if "train" not in data.datasets:
        raise ValueError("data.params.train is missing: give it target: ldm.data.every_dream.EveryDreamBatch")
    return data


def _build_record(run: Run, trainer: pl.Trainer, data: Any, words: Sequence[str], accept: bool) -> RunRecord:
    """Gather what the run's record states from the beginning; the first process alone writes it.

    A run whose data or settings have changed so that it would become another one is refused unless that is accepted.
    """
    described = describe_data(data.datasets if trainer.is_global_zero else {})
    changes = Changes()
    if run.checkpoint is not None and trainer.is_global_zero:
        refuse_running(run.directory.path)
        changes = find_changes(run.directory.path, run.checkpoint, run.config, described, trainer.world_size)
    if changes.breaking and not accept:
        raise ValueError(question(changes, f"python main.py {' '.join(map(command_word, words))} --accept_changes"))
    for line in changes.breaking:
        logger.warning("changed since the checkpoint was saved, and accepted: %s", line)
    if changes.harmless:
        logger.info("changed since the checkpoint was saved: %s", "; ".join(changes.harmless))
    return RunRecord(run.config, described, words, changes.lines)


def _read_weights(run: Run) -> tuple[dict[str, Tensor] | None, str]:
    """Read the weights that a new run starts from, and say where they come from."""
    if run.checkpoint is not None:
        return None, f"{run.checkpoint} (continuing the run: weights, optimiser, epoch and step)"
    path = run.said.get("actual_resume")
    if not path:
        return None, "random weights (no --actual_resume was given)"
    if is_diffusers_folder(path):
        return read_folder(path, run.config["model"].get("params") or {}), path
    return read_weights(path), path


def _build_model(run: Run) -> tuple[pl.LightningModule, list[str]]:
    """Build the model with its weights, and say where they come from and what was passed over.

    The weights as read are gone when this returns; training needs their room.
    """
    weights, source = _read_weights(run)
    model: pl.LightningModule = instantiate_from_config(run.config["model"], pl.LightningModule)
    notes = [] if weights is None else load_weights(model, weights, source=source).notes
    return model, [source, *notes]


def _set_learning_rates(run: Run, trainer: pl.Trainer, model: Any, plan: StepPlan) -> list[str]:
    """Give the model its learning rates and the run's length, which a schedule may need; explain the rates."""
    scale = bool(run.said.get("scale_lr"))
    factors = {
        "scale": scale,
        "accumulate": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        "batch_size": run.config["data"]["params"]["batch_size"],
    }
    rate = optimizers_own_rate(run.config["model"].get("params") or {})
    rate = rate or scaled_learning_rate(run.config["model"]["base_learning_rate"], **factors)
    model.learning_rate = rate.value
    model.total_steps = plan.total
    rates = [rate]
    for key in ("model_lr", "cond_lr"):
        own = getattr(model, key, None)
        if own:
            rates.append(scaled_learning_rate(own, **factors, key=key))
            setattr(model, key, rates[-1].value)
    schedule = model.build_schedule() if hasattr(model, "build_schedule") else None
    if schedule is None:
        return [each.arithmetic for each in rates]
    return describe_schedule(schedule.schedule, type(schedule).__name__, rates, plan.total)


def _plan(run: Run, trainer: pl.Trainer, data: Any) -> StepPlan:
    """Work out the steps of the run; limits that leave nothing to do are refused."""
    devices = trainer.world_size

    def batches(split: str) -> int:
        return data.steps_per_epoch(split, devices) if split in data.datasets else 0

    splits = ("train", "validation") if run.said.get("no_test") else ("train", "validation", "test")
    problems = empty_limits(trainer, {split: batches(split) for split in splits})
    if problems:
        raise ValueError("\n".join(problems))
    training_set = data.datasets["train"]
    training_batches: int | Callable[[int], int] = batches("train")
    # Shards at URLs are fetched when an epoch first reaches them: to count all epochs would fetch all now.
    if getattr(training_set, "epochs_differ", False) and getattr(training_set, "known_ahead", True):
        training_batches = partial(data.steps_per_epoch, "train", devices)
    return plan_steps(trainer, training_batches, batches("validation"))


def _summarise(
    run: Run,
    trainer: pl.Trainer,
    data: Any,
    model: pl.LightningModule,
    origin: Sequence[str],
    rates: Sequence[str],
    plan: StepPlan,
) -> RunSummary:
    """Gather what the start summary states; ``origin``: where the weights come from, then notes."""
    source, *notes = origin
    training_set = data.datasets["train"]
    images, repeats, left_out = describe_training_set(training_set)
    devices = trainer.world_size
    _warn_of_cut_captions(model, data)
    described: Any = getattr(model, "describe_training", None)
    if described is not None:
        notes += described()
    return RunSummary(
        run_folder=str(run.directory.path),
        weights=source,
        images=images,
        training_set=getattr(training_set, "summary_line", f"{type(training_set).__name__}, {len(training_set)} items"),
        repeats=repeats,
        left_out=left_out,
        batch_size=run.config["data"]["params"]["batch_size"],
        devices=f"{devices} x {trainer.strategy.root_device.type}",
        precision=str(trainer.precision),
        learning_rates=rates,
        plan=plan,
        parts=model_parts(model),
        seed=run.said["seed"],
        notes=notes,
        is_continued=run.checkpoint is not None,
        exposures=shown_per_epoch(training_set),
        shapes=training_shapes(training_set),
    )


def _foresee_memory(run: Run, trainer: pl.Trainer, data: Any) -> str:
    """Predict the run's need of GPU memory, in one line."""
    if isinstance(trainer.strategy, FSDPStrategy):
        return "not predicted (sharded over the devices)"
    try:
        return f"{plan_memory(run.config, data.datasets['train'], trainer.world_size).line()} (predicted)"
    except Exception as error:  # noqa: BLE001 - what cannot be foreseen is no reason not to try
        return f"not predicted ({shorten(f'{type(error).__name__}: {error}', NAMED_CHARACTERS, placeholder='…')})"


def _warn_of_cut_captions(model: Any, data: Any) -> None:
    """Name captions that are longer than the text encoder takes, in one line."""
    encoder: Any = getattr(model, "cond_stage_model", None)
    if not hasattr(encoder, "cut_captions"):
        return
    datasets = data.datasets.values()
    captions = {picture.path: picture.caption for each in datasets for picture in getattr(each, "pictures", ())}
    cut = encoder.cut_captions(sorted(set(captions.values())))
    if not cut:
        return
    named = "; ".join(
        f"'{shorten(caption, NAMED_CHARACTERS, placeholder='…')}' loses '{end}'"
        for caption, end in list(cut.items())[:NAMED_CAPTIONS]
    )
    more = f" and {len(cut) - NAMED_CAPTIONS} more" if len(cut) > NAMED_CAPTIONS else ""
    hint = f" ({CHUNK_WORDS} trains longer ones)" if encoder.long_captions == "cut" else ""
    logger.warning(
        "%s (of %s) longer than the text encoder's %d tokens %s cut: %s%s%s",
        "1 caption" if len(cut) == 1 else f"{len(cut):,} captions",
        plural(sum(caption in cut for caption in captions.values()), "picture"),
        encoder.most_caption_tokens,
        "is" if len(cut) == 1 else "are",
        named,
        more,
        hint,
    )


def _fit(run: Run, trainer: pl.Trainer, model: pl.LightningModule, data: Any) -> None:
    """Train."""
    begin = _beginning(trainer)
    leave_to_model(trainer, model)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
    except Interrupted:
        _say_how_to_continue(run)
        raise
    except Exception as error:
        if run.signals.requested is not None and not isinstance(error, (CheckpointWriteError, NotFiniteError)):
            # Ctrl-C ends the loader processes too, and their absence is an error to whoever awaits a batch.
            logger.warning("while stopping: %s: %s", type(error).__name__, str(error).partition("\n")[0])
            raise Interrupted(run.signals.requested) from error
        if begin.has_begun and not isinstance(error, NotFiniteError):  # whose line holds a command of its own
            _say_how_to_continue(run)
        _raise_failure_of_others(trainer, error)
        explained = explain(error, trainer, run.config, run.checkpoint, begin.has_begun)
        _company(trainer).tell(_exit_status(explained))
        if explained is error:
            raise
        raise explained from error
    if run.checkpoint is not None and not begin.has_begun:
        if trainer.is_global_zero:
            remove_leftovers(run.directory.checkpoints)
        checkpoint_io: Any = trainer.strategy.checkpoint_io
        if trainer.is_global_zero and not run.directory.last_checkpoint.exists():
            # Killed between its last checkpoint and that one's second name.
            checkpoint_io.duplicate(run.checkpoint, run.directory.last_checkpoint)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, NewestCheckpoints):
                callback.take_up(trainer, run.checkpoint, is_end=True)
        checkpoint_io.finish()
        logger.warning(
            "nothing is left to train: %s is at the end of its run (step %d); raise %s to go on",
            run.checkpoint,
            trainer.global_step,
            "--max_time" if _is_out_of_time(trainer) else "lightning.trainer.max_epochs (or max_steps)",
        )


def _say_how_to_continue(run: Run) -> None:
    """Give the command, if there is something to continue from."""
    if run.directory.last_checkpoint.exists():
        logger.info("to continue: %s", resume_command(run.directory.path))


def _test(run: Run, trainer: pl.Trainer, model: pl.LightningModule, data: Any) -> None:
    """Measure the test set, if there is one and it is wanted."""
    if run.said.get("no_test") or "test" not in data.datasets:
        return
    logger.info("measuring the test set (--no-test leaves it out): %s", plural(len(data.datasets["test"]), "picture"))
    try:
        measured = trainer.test(model, datamodule=data, verbose=False)
    except Exception as error:
        _raise_failure_of_others(trainer, error)
        explained = explain(error, trainer, run.config, run.checkpoint, has_begun=True)
        _company(trainer).tell(_exit_status(explained))
        if explained is error or isinstance(explained, TrainingError):
            raise
        raise explained from error
    for metrics in measured:
        logger.info("test: %s", "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def _is_out_of_time(trainer: pl.Trainer) -> bool:
    return why_it_ended(trainer, None)[1] == OUT_OF_TIME


def _report_end(run: Run, trainer: pl.Trainer) -> None:
    """Say where everything is that the run has made."""
    logger.info("finished after %s", plural(trainer.global_step, "optimiser step"))
    if _is_out_of_time(trainer) and run.directory.last_checkpoint.exists():
        command = resume_command(run.directory.path, "--max_time DD:HH:MM:SS")
        logger.info("max_time is over; to go on, raise it: %s", command)
    if run.directory.last_checkpoint.exists():
        logger.info("checkpoint: %s", run.directory.last_checkpoint)
    if any(run.directory.images.glob("*/*")):
        logger.info("sample pictures: %s", run.directory.images)
    if trainer.loggers and run.directory.curves.exists():
        logger.info("curves: tensorboard --logdir %s", command_word(run.directory.path.parent))


def _report(error: Exception, debug: bool = False) -> int:
    """Show a failure on standard error: a line a problem if the user can put it right, else its traceback."""
    said = str(error)
    if is_out_of_memory(error) and not (isinstance(error, MemoryError) and said):
        # While something was read or built, before training.
        first = said.partition("\n")[0][:NAMED_CHARACTERS] or type(error).__name__
        said = f"out of memory before training: close other programs, or use a computer with more memory ({first})"
        error = MemoryError(said).with_traceback(error.__traceback__)
    is_user_error = isinstance(error, USER_ERRORS)
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)) and error.strerror:
        said = f"{os.fsdecode(error.filename)}: {error.strerror}"
    real = error.__cause__ if isinstance(error, TrainingError) and error.__cause__ is not None else error
    rank = getattr(rank_zero_only, "rank", 0)
    place = f"device {rank}: " if rank else ""
    if debug or not is_user_error:
        _write_error("".join(traceback.format_exception(real)))
    if is_user_error:
        _write_error("".join(f"error: {place}{line}\n" for line in said.splitlines() if line.strip()))
    else:
        _write_error(f"error: {place}{error if error is not real else f'{type(real).__name__}: {real}'}\n")
    if debug and sys.stdin is not None and sys.stdin.isatty():
        pdb.post_mortem(real.__traceback__)
    return USER_ERROR if is_user_error else FAILED


def _write_error(text: str) -> None:
    """Write to standard error, which may be missing (as under pythonw) or closed."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(harmless(text))
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # the exit status still tells
