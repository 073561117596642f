"""The learning rate that the optimiser gets, and the arithmetic that leads there."""

from __future__ import annotations

from dataclasses import dataclass


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
