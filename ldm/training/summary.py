"""What a run is about to do, in one block of text before it starts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Timer
from torch import nn

PART_NAMES: Final = {"model": "UNet", "first_stage_model": "VAE", "cond_stage_model": "condition encoder"}
ENCODER_NAMES: Final = {"FrozenCLIPEmbedder": "text encoder", "ClassEmbedder": "class embedder"}
"""What a condition's encoder is called by its class."""

LIGHTNINGS_EPOCHS: Final = 1000
"""Where Lightning ends a run for which neither epochs nor steps nor time are limited."""


@dataclass(frozen=True)
class StepPlan:
    """How many steps a run takes.

    Attributes:
        training: batches in an epoch, on each device.
        validation: batches in a validation, on each device; 0 without one.
        accumulate: batches gathered for one optimiser step.
        epochs: epochs that the run is limited to, or None.
        max_steps: optimiser steps that the run is limited to, or None.
        by_epoch: batches of each epoch on each device, where epochs differ and their number is limited.
    """

    training: int
    validation: int
    accumulate: int
    epochs: int | None
    max_steps: int | None
    by_epoch: Sequence[int] = ()

    @property
    def optimiser(self) -> int:
        """Optimiser steps in an epoch; the last may gather fewer batches."""
        return math.ceil(self.training / self.accumulate)

    @property
    def total(self) -> int | None:
        """Optimiser steps of the whole run, or None if nothing limits it."""
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.by_epoch:
            limits.append(sum(math.ceil(batches / self.accumulate) for batches in self.by_epoch))
        elif self.epochs is not None:
            limits.append(self.epochs * self.optimiser)
        return min(limits, default=None)


def limited_batches(batches: int, limit: int | float | None) -> int:
    """Apply Lightning's ``limit_train_batches`` and ``limit_val_batches``.

    Args:
        batches: how many there are.
        limit: a number of batches (int), a share of them (float), or None for all.

    Returns:
        How many will be used.
    """
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def empty_limits(trainer: pl.Trainer, batches: Mapping[str, int]) -> list[str]:
    """Find limits that leave nothing to do of what was asked for.

    Args:
        trainer: the trainer, not started yet.
        batches: batches of the splits ``train``, ``validation`` and ``test``, on each device; 0 without one.

    Returns:
        One line for each.
    """
    overfit = getattr(trainer, "overfit_batches", 0)
    limits: dict[str, tuple[str, int | float | None]] = {
        "train": ("overfit_batches", overfit) if overfit else ("limit_train_batches", trainer.limit_train_batches),
        "test": ("limit_test_batches", trainer.limit_test_batches),
    }
    if not overfit and trainer.limit_val_batches:
        limits["validation"] = ("limit_val_batches", trainer.limit_val_batches)
    problems = []
    for split, (name, limit) in limits.items():
        there = batches.get(split, 0)
        if not there or limited_batches(there, limit) > 0:
            continue
        if limit:
            least = math.ceil(1e4 / there) / 1e4
            remedy = f"{limit} of {there} batches is none; give {least:g} or more, or a number of batches such as 1"
            problems.append(f"lightning.trainer.{name}: {remedy}")
        elif split == "train":
            problems.append(f"lightning.trainer.{name}: {limit} leaves nothing to train on; give at least 1")
    training = limited_batches(batches["train"], limits["train"][1])
    every = trainer.val_check_interval
    within_epoch = trainer.check_val_every_n_epoch is not None and isinstance(every, int)
    if batches.get("validation") and trainer.limit_val_batches and within_epoch and every > training > 0:
        problems.append(
            f"lightning.trainer.val_check_interval: {every} is more than the {training} training batches of an epoch;"
            " give fewer, or a share of them such as 0.5, or check_val_every_n_epoch=null to count across epochs"
        )
    return problems


def plan_steps(trainer: pl.Trainer, training_batches: int | Callable[[int], int], validation_batches: int) -> StepPlan:
    """Work out the steps of a run from its trainer's limits.

    Args:
        trainer: the trainer, not started yet.
        training_batches: batches of the training set, on each device; a function of the epoch where epochs differ.
        validation_batches: batches of the validation set, on each device.

    Returns:
        The plan.
    """
    overfit = getattr(trainer, "overfit_batches", 0) or None
    epochs = trainer.max_epochs
    is_unlimited = trainer.max_steps == -1 and not any(isinstance(c, Timer) for c in _callbacks(trainer))
    if epochs is None and is_unlimited:
        epochs = LIGHTNINGS_EPOCHS
    limit = overfit if overfit is not None else trainer.limit_train_batches
    by_epoch: list[int] = []
    if callable(training_batches):
        if epochs is not None and epochs > 0:
            by_epoch = [limited_batches(training_batches(epoch), limit) for epoch in range(epochs)]
        training_batches = training_batches(0)
    return StepPlan(
        training=limited_batches(training_batches, limit),
        validation=limited_batches(validation_batches, overfit if overfit is not None else trainer.limit_val_batches),
        accumulate=trainer.accumulate_grad_batches,
        epochs=epochs if epochs != -1 else None,
        max_steps=trainer.max_steps if trainer.max_steps != -1 else None,
        by_epoch=by_epoch,
    )


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """List a trainer's callbacks."""
    return getattr(trainer, "callbacks", [])


@dataclass(frozen=True)
class Part:
    """A part of the model, with its parameters counted.

    Attributes:
        name: in the field's words.
        trained: parameters that will change.
        frozen: parameters that will not.
    """

    name: str
    trained: int
    frozen: int


def model_parts(model: nn.Module) -> list[Part]:
    """Count the parameters of a model's direct children, and of the model itself.

    Args:
        model: the model, ready to be trained.

    Returns:
        The parts that have parameters, each parameter in one part.
    """
    seen: set[int] = set()
    parts = []
    for name, child in [*model.named_children(), ("other parameters", model)]:
        trained = frozen = 0
        for parameter in child.parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad:
                trained += parameter.numel()
            else:
                frozen += parameter.numel()
        if trained or frozen:
            called = ENCODER_NAMES.get(type(child).__name__, PART_NAMES.get(name, name))
            parts.append(Part(called, trained, frozen))
    return parts


@dataclass(frozen=True)
class RunSummary:
    """What the start summary states.

    Attributes:
        run_folder: where everything goes.
        weights: where the weights came from.
        images: pictures by subfolder; empty for data sets that do not say.
        exposures: how often an epoch shows them, by subfolder; empty where all are shown ``repeats`` times.
        shapes: pictures by the size they are trained at (width, height); empty for data sets that do not say.
        training_set: what the training set is called where it does not list pictures.
        repeats: how often an epoch shows each picture; None for data sets without repeats.
        left_out: files that are not used.
        batch_size: pictures in a batch of one device.
        devices: how many devices, of which kind.
        precision: Lightning's name of the number formats.
        learning_rates: the arithmetic of each.
        plan: steps.
        parts: the model's parts.
        seed: the run's seed.
        notes: further lines.
        is_continued: whether the run goes on from a checkpoint; what is left then shows when that is read.
    """

    run_folder: str
    weights: str
    images: Mapping[str, int]
    training_set: str
    repeats: int | None
    left_out: Sequence[str]
    batch_size: int
    devices: str
    precision: str
    learning_rates: Sequence[str]
    plan: StepPlan
    parts: Sequence[Part]
    seed: int
    notes: Sequence[str] = field(default_factory=tuple)
    is_continued: bool = False
    exposures: Mapping[str, float] = field(default_factory=dict)
    shapes: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Write the summary.

        Returns:
            Its lines, without line ends.
        """
        return [*self._data_lines(), *self._step_lines(), *self._model_lines(), f"run folder: {self.run_folder}"]

    def _data_lines(self) -> list[str]:
        """The pictures."""
        lines = []
        if self.images:
            total = sum(self.images.values())
            lines.append(f"images: {total} in {plural(len(self.images), 'folder')}")
            width = max(map(len, self.images))
            for folder, count in self.images.items():
                shown = f"  shown {self.exposures[folder]:,g} times an epoch" if folder in self.exposures else ""
                lines.append(f"    {folder:<{width}}  {count}{shown}")
        else:
            lines.append(f"training set: {self.training_set}")
        if self.left_out:
            lines.append(f"left out: {plural(len(self.left_out), 'file')} (named above)")
        if self.repeats is not None:
            lines.append(f"repeats: {self.repeats}")
        if self.shapes:
            most_first = sorted(self.shapes.items(), key=lambda shape: (-shape[1], shape[0]))
            lines.append("shapes: " + ", ".join(f"{width}x{height} {count}" for (width, height), count in most_first))
        return lines

    def _step_lines(self) -> list[str]:
        """Batches, steps and learning rate."""
        plan = self.plan
        lines = [f"batch size: {self.batch_size}"]
        if plan.accumulate > 1:
            lines.append(f"accumulation: {plan.accumulate} batches for one optimiser step")
        lines += [f"devices: {self.devices}", f"precision: {self.precision}"]
        lines += [f"learning rate: {text}" for text in self.learning_rates]
        lines += [
            f"training steps per epoch: {plan.training}{_range_of(plan.by_epoch)}",
            f"validation steps per epoch: {plan.validation}",
        ]
        if plan.accumulate > 1:
            lines.append(f"optimiser steps per epoch: {plan.optimiser}")
        limits = []
        if plan.epochs is not None:
            limits.append(plural(plan.epochs, "epoch"))
        if plan.max_steps is not None:
            limits.append(f"at most {plural(plan.max_steps, 'optimiser step')}")
        # The steps behind a continued run may have been of another size.
        total = f" = {plural(plan.total, 'optimiser step')}" if plan.total is not None and not self.is_continued else ""
        lines.append(f"length of the run: {', '.join(limits) or 'until it is stopped'}{total}")
        lines.append(f"seed: {self.seed}")
        return lines

    def _model_lines(self) -> list[str]:
        """The model's parts and weights."""
        trained = [f"{part.name} {part.trained:,}" for part in self.parts if part.trained]
        frozen = [f"{part.name} {part.frozen:,}" for part in self.parts if part.frozen]
        return [
            f"trained parameters: {' + '.join(trained) or 'none'}",
            f"frozen parameters: {' + '.join(frozen) or 'none'}",
            f"weights: {self.weights}",
            *self.notes,
        ]


def _range_of(by_epoch: Sequence[int]) -> str:
    """Say how far epochs differ; nothing where they do not."""
    least, most = min(by_epoch, default=0), max(by_epoch, default=0)
    return "" if least == most else f" in the first, {least} to {most} in others"


def shown_per_epoch(dataset: Any) -> Mapping[str, float]:
    """Count how often an epoch shows each subfolder's pictures, on average.

    Args:
        dataset: ``EveryDreamBatch``, or any other data set.

    Returns:
        Exposures by subfolder, of all subfolders; empty where none has a multiplier.
    """
    settings = getattr(dataset, "folder_settings", None) or {}
    if all(settings[folder].multiply == 1 for folder in settings):
        return {}
    return {
        folder: float(count * dataset.repeats * (settings[folder].multiply if folder in settings else 1))
        for folder, count in dataset.folder_counts.items()
    }


def training_shapes(dataset: Any) -> Mapping[tuple[int, int], int]:
    """Count pictures by the size they are trained at.

    Args:
        dataset: ``EveryDreamBatch``, or any other data set.

    Returns:
        Pictures by width and height; empty where the data set does not say.
    """
    sizes = getattr(dataset, "picture_sizes", None)
    return {} if sizes is None else Counter((int(width), int(height)) for width, height in sizes)


def describe_training_set(dataset: Any) -> tuple[Mapping[str, int], int | None, Sequence[str]]:
    """Read what a training set says of itself.

    Args:
        dataset: ``EveryDreamBatch``, or any other data set.

    Returns:
        Pictures by folder, repeats, and files left out; empty or None where the data set does not say.
    """
    folders = getattr(dataset, "folder_counts", None) or {}
    repeats = getattr(dataset, "repeats", None)
    left_out = [*(getattr(dataset, "left_out", None) or ()), *(getattr(dataset, "skipped", None) or ())]
    return folders, repeats, left_out


def plural(count: int, noun: str) -> str:
    """Write a number with its noun.

    Args:
        count: the number.
        noun: the noun in the singular, one that takes an s.

    Returns:
        Both, such as ``1 epoch`` or ``2,000 epochs``.
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
