"""What a failure of the training loop means to the user."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException

from ldm.optimizers import OptimizerStateError
from ldm.out_of_memory import is_out_of_memory
from ldm.training.console import command_word
from ldm.training.loader_failures import explain_loader_failure
from ldm.training.loss_guard import NotFiniteError
from ldm.training.memory_advice import advise_on_memory
from ldm.training.run_directory import resume_command


class TrainingError(Exception):
    """Carries up, as its cause, what went wrong inside the training loop.

    Before training begins a ValueError is the user's to put right, and its message is enough; inside the
    loop it need not be, and the traceback is wanted.
    """


def explain(
    error: Exception, trainer: pl.Trainer, config: Mapping[str, Any], checkpoint: Path | None, has_begun: bool
) -> Exception:
    """Turn an exception of the training loop into one whose message says what to do.

    Args:
        error: what ``trainer.fit`` raised.
        trainer: the trainer.
        config: the merged configuration.
        checkpoint: the checkpoint that the run was to continue from, or None.
        has_begun: whether the first step was reached.

    Returns:
        The exception to raise in its place: a ValueError, OSError or MemoryError of one line where the user
        can put it right, else a :class:`TrainingError`; ``error`` itself where it says all there is to say.
    """
    loader_failure = explain_loader_failure(error, config)
    if loader_failure is not None:
        line, words = loader_failure
        return ChildProcessError(f"{line}; then type {resume_command(Path(trainer.default_root_dir), words)}")
    if is_out_of_memory(error):
        return MemoryError(advise_on_memory(error, trainer, config, has_begun))
    if not has_begun:
        problem = _restore_problem(error, trainer, checkpoint) if checkpoint is not None else None
        return error if problem is None else ValueError(problem)
    if isinstance(error, OSError):
        return _with_remedy(error, Path(trainer.default_root_dir))
    if isinstance(error, (MisconfigurationException, NotFiniteError)):
        return error
    return TrainingError(f"training failed at step {trainer.global_step}: {first_cause(error)}")


def first_cause(error: BaseException) -> str:
    """Say in one line what an exception says, also one that a loader process has sent with its traceback.

    Args:
        error: the exception.

    Returns:
        Its type and message.
    """
    text = str(error).strip()
    if re.match(r"Caught \w+ in DataLoader worker process", text):
        return text.splitlines()[-1].strip()
    return f"{type(error).__name__}: {text}"


def _with_remedy(error: OSError, run: Path) -> OSError:
    """Word a file that failed in one line, with what its class says to do about it."""
    remedy = getattr(error, "remedy", None)
    if remedy is None and "\n" not in str(error):
        return error
    line = str(error) if "\n" not in str(error) else first_cause(error).partition(": ")[2]
    if remedy is None:
        return OSError(line)
    # A command with flags behind it, and one without.
    shown = re.sub(r"\{resume\}( --[\w -]+)?", lambda found: resume_command(run, (found[1] or "").strip()), remedy)
    return OSError(f"{line}; {shown}")


def _restore_problem(error: Exception, trainer: pl.Trainer, checkpoint: Path) -> str | None:
    """Word what keeps a checkpoint from being continued; None for what is no matter of the checkpoint."""
    text = str(error)
    instead = f"or start a new run from its weights with --actual_resume {command_word(checkpoint)}"
    if "checkpoint contains only the model" in text:
        return (
            f"checkpoint {checkpoint} holds the weights alone, without the optimiser (save_weights_only: true), and"
            f" cannot be continued: name another one of the run, {instead}"
        )
    if isinstance(error, OptimizerStateError):
        return f"checkpoint {checkpoint} {text}, {instead}"
    if "parameter group" in text:
        return (
            f"checkpoint {checkpoint} does not fit the optimiser: which parts are trained has changed; put"
            f" model.params.model_lr, cond_lr, cond_train_last_layers, cond_train_embeddings, cond_stage_trainable and"
            f" unfreeze_model back, {instead}"
        )
    if "loading state_dict" in text:
        lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
        reason = textwrap.shorten(lines[0].rstrip(".") if lines else text, 160, placeholder=" ...")
        if "model_ema." in reason:
            remedy = f"put model.params.use_ema back to what it was, {instead}"
        else:
            remedy = "the run can only be continued with the architecture that it began with"
        return f"checkpoint {checkpoint} does not fit the model: {reason}; {remedy}"
    if isinstance(error, MisconfigurationException) and "max_epochs" in text:
        limit = f"lightning.trainer.max_epochs={trainer.max_epochs}"
        return f"checkpoint {checkpoint} lies beyond {limit}; raise that to go on"
    # Lightning holds the checkpoint for as long as it is giving everyone their state back.
    if trainer._checkpoint_connector._loaded_checkpoint:
        reason = textwrap.shorten(first_cause(error), 160, placeholder=" ...")
        return (
            f"checkpoint {checkpoint} cannot be continued: it holds another state than this run's ({reason}), {instead}"
        )
    return None
