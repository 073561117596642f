"""The ranges of numbers that no annotation can say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Range:
    """Numbers that a key may have.

    Attributes:
        key: dotted key path; ``*`` stands for any one key.
        allows: whether a number is one of them.
        words: the same in words.
    """

    key: str
    allows: Callable[[Any], bool]
    words: str


def _at_least(bound: float) -> Callable[[Any], bool]:
    return lambda value: value >= bound


def above_zero(value: Any) -> bool:
    """Tell whether a number is a finite one above 0."""
    return value > 0 and math.isfinite(value)


def _probability(value: Any) -> bool:
    return 0 <= value <= 1


def _count_or_fraction(value: Any) -> bool:
    return 0 <= value <= 1 if isinstance(value, float) else value >= 0


MOST_WORKERS: Final = 1024
"""Loader processes that no machine has a use for: a slip of the finger starts more than it can bear."""

_ANY_COUNT: Final = "at least 1, or -1 for no limit"
RANGES: Final = (
    Range("model.base_learning_rate", above_zero, "above 0, such as 1.0e-06"),
    Range("model.params.optimizer_config.params.lr", above_zero, "above 0"),
    Range("model.params.optimizer_config.params.weight_decay", _at_least(0), "0 (none) or more"),
    Range("model.params.cond_lr", above_zero, "above 0, such as 1.0e-06 (without it, base_learning_rate is used)"),
    Range("model.params.cond_stop_after", _at_least(1), "at least 1 (optimiser steps)"),
    Range("model.params.model_stop_after", _at_least(1), "at least 1 (optimiser steps)"),
    Range("model.params.cond_train_last_layers", _at_least(1), "at least 1"),
    Range("model.params.ema_every", _at_least(1), "at least 1 (optimiser steps)"),
    Range("model.params.scheduler_config.params.max_decay_steps", _at_least(1), "at least 1, or null for the run's"),
    Range("model.params.timesteps", _at_least(1), "at least 1 (Stable Diffusion has 1000)"),
    Range("model.params.num_timesteps_cond", _at_least(1), "at least 1"),
    Range("model.params.channels", _at_least(1), "at least 1"),
    Range("model.params.image_size", _at_least(1), "at least 1"),
    Range("model.params.log_every_t", _at_least(1), "at least 1"),
    Range("model.params.scale_factor", above_zero, "above 0 (Stable Diffusion has 0.18215)"),
    Range("model.params.linear_start", above_zero, "above 0"),
    Range("model.params.linear_end", above_zero, "above 0"),
    Range("data.params.batch_size", _at_least(1), "at least 1"),
    Range(
        "data.params.num_workers", lambda value: 0 <= value <= MOST_WORKERS, f"from 0 (no processes) to {MOST_WORKERS}"
    ),
    Range("data.params.*.params.size", lambda value: value >= 8 and value % 8 == 0, "a multiple of 8, at least 8"),
    Range("data.params.*.params.repeats", _at_least(1), "at least 1"),
    Range("data.params.*.params.flip_p", _probability, "a probability from 0 to 1"),
    Range("data.params.*.params.conditional_dropout", _probability, "a probability from 0 to 1"),
    Range("lightning.trainer.max_epochs", lambda value: value == -1 or value >= 1, _ANY_COUNT),
    Range("lightning.trainer.max_steps", lambda value: value == -1 or value >= 1, _ANY_COUNT),
    Range("lightning.trainer.min_epochs", _at_least(0), "0 or more"),
    Range("lightning.trainer.min_steps", _at_least(0), "0 or more"),
    Range("lightning.trainer.accumulate_grad_batches", _at_least(1), "at least 1"),
    Range("lightning.trainer.check_val_every_n_epoch", _at_least(1), "at least 1, or null"),
    Range("lightning.trainer.gradient_clip_val", _at_least(0), "0 (off) or more"),
    Range("lightning.trainer.log_every_n_steps", _at_least(0), "0 (never) or more"),
    Range("lightning.trainer.num_sanity_val_steps", _at_least(-1), "0 or more, or -1 for all"),
    Range("lightning.trainer.num_nodes", _at_least(1), "at least 1"),
    Range("lightning.trainer.reload_dataloaders_every_n_epochs", _at_least(0), "0 or more"),
    Range("lightning.trainer.fast_dev_run", _at_least(0), "0 or more"),
    *(
        Range(f"lightning.trainer.{name}", _count_or_fraction, "a number of batches, or a fraction from 0.0 to 1.0")
        for name in (
            "limit_train_batches",
            "limit_val_batches",
            "limit_test_batches",
            "limit_predict_batches",
            "overfit_batches",
            "val_check_interval",
        )
    ),
    Range("lightning.callbacks.*.params.batch_frequency", _at_least(1), "at least 1 (steps between pictures)"),
    Range("lightning.callbacks.*.params.max_images", _at_least(1), "at least 1"),
    Range("lightning.modelcheckpoint.params.save_top_k", _at_least(-1), "0 or more, or -1 for all"),
    Range("lightning.modelcheckpoint.params.keep_last_n", _at_least(0), "0 (only the best) or more"),
    Range("lightning.modelcheckpoint.params.every_n_epochs", _at_least(0), "0 (off) or more"),
    Range("lightning.modelcheckpoint.params.every_n_train_steps", _at_least(0), "0 (off) or more"),
    Range("run.seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
)
