"""Goes on where a batch does not fit into memory: takes it in parts, with the same gradient."""

from __future__ import annotations

import logging
from typing import Any, Final

import pytorch_lightning as pl
from pytorch_lightning.strategies import SingleDeviceStrategy

logger = logging.getLogger(__name__)

SPLIT: Final = "split"

STAGES: Final = ("training", "validation")
"""What a model limits its parts for."""


def can_split(trainer: pl.Trainer, model: pl.LightningModule) -> bool:
    """Tell whether a model can take its batches in parts here.

    Args:
        trainer: the trainer.
        model: the model.

    Returns:
        True for a model with a method for it, on one device.
    """
    return isinstance(trainer.strategy, SingleDeviceStrategy) and callable(getattr(model, "take_in_parts", None))


def refuse_unsplittable(on_oom: str, trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Refuse ``--on_oom split`` where it could not keep its word.

    Args:
        on_oom: ``stop`` or ``split``.
        trainer: the trainer.
        model: the model.

    Raises:
        ValueError: the run has several devices, or the model cannot take a batch in parts; says what to do instead.
    """
    if on_oom != SPLIT or can_split(trainer, model):
        return
    instead = "type --on_oom stop, lower data.params.batch_size and raise --accumulate_grad_batches as much"
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        # The other devices wait for a gradient that a failed part has already given them a share of.
        raise ValueError(
            f"--on_oom split works on a single device, and this run has {trainer.world_size} with the strategy "
            f"{type(trainer.strategy).__name__}; {instead}"
        )
    raise ValueError(f"--on_oom split: {type(model).__name__} cannot take a batch in parts; {instead}")


class BatchSplitting(pl.Callback):
    """Lets the model take a batch that does not fit into memory in parts, and remembers their size.

    A model takes part by its method ``take_in_parts(at_once, tell)``: ``at_once`` holds the most pictures at once by
    stage (``training``, ``validation``), as far as that is known, and the model keeps it up to date; it calls
    ``tell(stage, failed, at_once)`` with the pictures that did not fit, and those from here on.

    Args:
        on_oom: ``stop`` or ``split``: with the former nothing is done.
    """

    def __init__(self, on_oom: str = "stop") -> None:
        self.on_oom = on_oom
        self.at_once: dict[str, int] = {}
        self._trainer: pl.Trainer | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the model what is known, which a checkpoint may have brought back."""
        take_in_parts: Any = getattr(pl_module, "take_in_parts", None)
        if self.on_oom != SPLIT:
            return
        refuse_unsplittable(self.on_oom, trainer, pl_module)
        self._trainer = trainer
        take_in_parts(self.at_once, self._tell)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what a continued run goes on with."""
        if self.at_once and trainer.is_global_zero:
            known = ", ".join(f"{self.at_once[stage]} in {stage}" for stage in STAGES if stage in self.at_once)
            logger.info("pictures taken at a time, as memory ran out before: %s", known)

    def _tell(self, stage: str, failed: int, at_once: int) -> None:
        """Say that memory ran out, and how it goes on."""
        assert self._trainer is not None
        step = self._trainer.global_step
        where = f"step {step + 1}" if stage == "training" else f"validation at step {step}"
        same = "the same effective batch" if stage == "training" else "the same result"
        logger.warning(
            "%s: out of memory with %d pictures at once; taking %d at a time from here on, with %s",
            where,
            failed,
            at_once,
            same,
        )

    def state_dict(self) -> dict[str, Any]:
        """Give what a continued run needs not find out again."""
        return {"at_once": dict(self.at_once)} if self.at_once else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back; with ``stop`` it has no effect."""
        if self.on_oom == SPLIT:
            self.at_once.update(
                {stage: max(1, int(state_dict["at_once"][stage])) for stage in STAGES if stage in state_dict["at_once"]}
            )
