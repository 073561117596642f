"""The learning rate that the optimiser gets, and the arithmetic that leads there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

LONGEST_RUN: Final = 100_000
"""Steps at which a schedule is looked at: of a longer run, as many, evenly spread."""


@dataclass(frozen=True)
class LearningRate:
    """A learning rate with its explanation.

    Attributes:
        value: what the optimiser gets, per optimiser step.
        arithmetic: one line of text for the start summary.
    """

    value: float
    arithmetic: str


def scaled_learning_rate(
    base: float,
    scale: bool,
    accumulate: int,
    devices: int,
    batch_size: int,
    key: str = "base_learning_rate",
) -> LearningRate:
    """Multiply a base learning rate by the number of pictures in an optimiser step, if asked to.

    Args:
        base: the rate in the configuration.
        scale: whether ``--scale_lr`` was given.
        accumulate: batches gathered for one optimiser step.
        devices: devices that each take a batch at a time.
        batch_size: pictures in one device's batch.
        key: the configuration key that ``base`` comes from.

    Returns:
        ``accumulate * devices * batch_size * base``, or ``base`` as it is.

    Raises:
        ValueError: if ``base`` is not above 0.
    """
    if not base > 0:
        raise ValueError(f"model.{key}: {base} must be above 0, for example 1.0e-06")
    if not scale:
        return LearningRate(base, f"{base:.3g} ({key}; not scaled)")
    value = accumulate * devices * batch_size * base
    return LearningRate(
        value,
        f"{value:.3g} = {accumulate} (accumulate_grad_batches) x {devices} (devices) x {batch_size} (batch_size)"
        f" x {base:.3g} ({key})",
    )


def optimizers_own_rate(params: Mapping[str, Any]) -> LearningRate | None:
    """Read the learning rate that stands among the optimiser's own parameters.

    Args:
        params: the model's parameters.

    Returns:
        The rate, which is not scaled; None where ``base_learning_rate`` counts.
    """
    section = params.get("optimizer_config") or {}
    rate = (section.get("params") or {}).get("lr")
    return None if rate is None else LearningRate(float(rate), f"{rate:.3g} (optimizer_config.params.lr)")


def describe_schedule(
    factor: Callable[[int], float], name: str, rates: Sequence[LearningRate], total_steps: int | None
) -> list[str]:
    """Say what a schedule makes of the learning rates.

    Args:
        factor: optimiser step, from 0, to the multiplier of all rates.
        name: the schedule's name.
        rates: the rates that it multiplies.
        total_steps: optimiser steps of the run; None where nothing limits them.

    Returns:
        A line for each rate: its arithmetic; the first, the highest, and the last where the run has one.
    """
    if total_steps is None:
        return [f"{rate.arithmetic}; {name}: first {rate.value * factor(0):.3g}" for rate in rates]
    last = max(0, total_steps - 1)
    steps = sorted({*range(0, last, max(1, last // LONGEST_RUN)), last})
    factors = [factor(step) for step in steps]
    highest = max(factors)
    peak = steps[factors.index(highest)]
    return [
        f"{rate.arithmetic}; {name}: first {rate.value * factors[0]:.3g}, peak {rate.value * highest:.3g} "
        f"(step {peak:,}), last {rate.value * factors[-1]:.3g} (step {last:,})"
        for rate in rates
    ]
