"""Learning-rate schedules: optimiser step -> multiplier of the base learning rate. Pure numbers.

Each class is called with the step number n, counted from 0, by ``torch.optim.lr_scheduler.LambdaLR``.
``verbosity_interval`` logs the multiplier every so many steps (0: never).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

logger = logging.getLogger(__name__)


class _Schedule:
    """Logging that the schedules share."""

    def __init__(self, verbosity_interval: int) -> None:
        self.verbosity_interval = verbosity_interval

    def multiplier(self, n: int) -> float:
        """Give the multiplier at step n."""
        raise NotImplementedError

    def schedule(self, n: int, **kwargs: object) -> float:
        """Give the multiplier at step n, and log it when its turn has come."""
        value = self.multiplier(n)
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            logger.info("step %d: learning-rate multiplier %g", n, value)
        return value

    def __call__(self, n: int, **kwargs: object) -> float:
        return self.schedule(n, **kwargs)


def _ramp(start: float, end: float, fraction: float) -> float:
    """Move linearly from start (fraction 0) to end (fraction 1)."""
    return start + (end - start) * fraction


def _half_cosine(start: float, end: float, fraction: float) -> float:
    """Move from start (fraction 0) to end (fraction 1) along half a cosine."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(fraction * math.pi))


class LambdaWarmUpCosineScheduler(_Schedule):
    """Linear warm-up, then half a cosine down; use it with a base learning rate of 1.

    Args:
        warm_up_steps: steps of the warm-up.
        lr_min: value after the decay.
        lr_max: value after the warm-up.
        lr_start: value at step 0.
        max_decay_steps: step at which the decay ends, the warm-up counted in.
        verbosity_interval: steps between log lines; 0 for none.

    Reference:
        Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5 (one period).
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        super().__init__(verbosity_interval)
        self.warm_up_steps = warm_up_steps
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_start = lr_start
        self.max_decay_steps = max_decay_steps

    def multiplier(self, n: int) -> float:
        """Give the multiplier at step n."""
        if n < self.warm_up_steps:
            return _ramp(self.lr_start, self.lr_max, n / self.warm_up_steps)
        fraction = min(1.0, (n - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps))
        return _half_cosine(self.lr_max, self.lr_min, fraction)


class LambdaWarmUpCosineScheduler2(_Schedule):
    """Cycles of linear warm-up and half-cosine decay, each with its own numbers (the 2 means: repeated).

    Args:
        warm_up_steps: warm-up steps of each cycle.
        f_min: multiplier at the end of each cycle.
        f_max: multiplier after each warm-up.
        f_start: multiplier at the start of each cycle.
        cycle_lengths: steps of each cycle, its warm-up counted in.
        verbosity_interval: steps between log lines; 0 for none.

    Raises:
        ValueError: the lists differ in length; or, when called, the step lies past the last cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        super().__init__(verbosity_interval)
        lengths = {len(values) for values in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}
        if len(lengths) != 1:
            raise ValueError(
                "scheduler_config: warm_up_steps, f_min, f_max, f_start and cycle_lengths need one entry for each "
                f"cycle; they have {sorted(lengths)}"
            )
        self.warm_up_steps = list(warm_up_steps)
        self.f_min = list(f_min)
        self.f_max = list(f_max)
        self.f_start = list(f_start)
        self.cycle_lengths = list(cycle_lengths)

    def find_in_interval(self, n: int) -> tuple[int, int]:
        """Find the cycle of step n and the step within it; a cycle's end belongs to that cycle."""
        begin = 0
        for cycle, length in enumerate(self.cycle_lengths):
            if n <= begin + length:
                return cycle, n - begin
            begin += length
        raise ValueError(
            f"scheduler_config: step {n} lies past the last cycle (cycle_lengths sum to {begin}); lengthen it"
        )

    def multiplier(self, n: int) -> float:
        """Give the multiplier at step n."""
        cycle, step = self.find_in_interval(n)
        warm_up = self.warm_up_steps[cycle]
        if step < warm_up:
            return _ramp(self.f_start[cycle], self.f_max[cycle], step / warm_up)
        return self._decay(cycle, step)

    def _decay(self, cycle: int, step: int) -> float:
        decay_steps = self.cycle_lengths[cycle] - self.warm_up_steps[cycle]
        fraction = min(1.0, (step - self.warm_up_steps[cycle]) / decay_steps) if decay_steps else 1.0
        return _half_cosine(self.f_max[cycle], self.f_min[cycle], fraction)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Cycles of linear warm-up and linear decay.

    The decay's slope counts from the start of the cycle, not from the end of its warm-up, so the multiplier
    falls by a small step where the warm-up ends: Stable Diffusion was trained with it.
    """

    def _decay(self, cycle: int, step: int) -> float:
        left = (self.cycle_lengths[cycle] - step) / self.cycle_lengths[cycle]
        return _ramp(self.f_min[cycle], self.f_max[cycle], left)


class EveryDreamScheduler(_Schedule):
    """Linear warm-up, then linear decay to a floor that is kept.

    Args:
        warm_up_steps: steps of the warm-up.
        f_start: multiplier at step 0.
        f_max: multiplier after the warm-up.
        f_min: multiplier from ``steps_to_min`` on.
        steps_to_min: step at which the decay ends, the warm-up counted in.
        verbosity_interval: steps between log lines; 0 for none.

    Raises:
        ValueError: the decay would end before the warm-up.
    """

    def __init__(
        self,
        warm_up_steps: int,
        f_start: float,
        f_max: float,
        f_min: float,
        steps_to_min: int,
        verbosity_interval: int = 0,
    ) -> None:
        super().__init__(verbosity_interval)
        if steps_to_min <= warm_up_steps:
            raise ValueError(
                f"scheduler_config: steps_to_min {steps_to_min} must be above warm_up_steps {warm_up_steps}"
            )
        self.warm_up_steps = warm_up_steps
        self.f_start = f_start
        self.f_max = f_max
        self.f_min = f_min
        self.steps_to_min = steps_to_min

    def multiplier(self, n: int) -> float:
        """Give the multiplier at step n."""
        if n < self.warm_up_steps:
            return _ramp(self.f_start, self.f_max, n / self.warm_up_steps)
        fraction = min(1.0, (n - self.warm_up_steps) / (self.steps_to_min - self.warm_up_steps))
        return _ramp(self.f_max, self.f_min, fraction)


class ConstantScheduler(_Schedule):
    """Linear warm-up, then the learning rate as it is.

    Args:
        warm_up_steps: steps of the warm-up; 0 for none.
        f_start: multiplier at step 0 of the warm-up.
        verbosity_interval: steps between log lines; 0 for none.

    Raises:
        ValueError: a number of steps below 0, or a multiplier below 0.
    """

    def __init__(self, warm_up_steps: int = 0, f_start: float = 0.0, verbosity_interval: int = 0) -> None:
        super().__init__(verbosity_interval)
        _refuse_negative(warm_up_steps=warm_up_steps, f_start=f_start)
        self.warm_up_steps = warm_up_steps
        self.f_start = f_start

    def multiplier(self, n: int) -> float:
        """Give the multiplier at step n."""
        return _ramp(self.f_start, 1.0, n / self.warm_up_steps) if n < self.warm_up_steps else 1.0


class LinearScheduler(ConstantScheduler):
    """Linear warm-up to the learning rate, then linear decay over the rest of the run.

    Args:
        warm_up_steps: steps of the warm-up; 0 for none.
        f_start: multiplier at step 0 of the warm-up.
        f_min: multiplier at the end of the decay, and from there on.
        max_decay_steps: step at which the decay ends, the warm-up counted in; the run's last if None.
        verbosity_interval: steps between log lines; 0 for none.

    Raises:
        ValueError: a number below 0; the decay would end before the warm-up; or, when called, ``max_decay_steps`` is
            not known.
    """

    def __init__(
        self,
        warm_up_steps: int = 0,
        f_start: float = 0.0,
        f_min: float = 0.0,
        max_decay_steps: int | None = None,
        verbosity_interval: int = 0,
    ) -> None:
        super().__init__(warm_up_steps, f_start, verbosity_interval)
        _refuse_negative(f_min=f_min)
        self.f_min = f_min
        self.max_decay_steps: int | None = None
        if max_decay_steps is not None:
            self.end_at(max_decay_steps)

    def end_at(self, max_decay_steps: int) -> None:
        """Let the decay end at a step.

        Args:
            max_decay_steps: the step, the warm-up counted in.

        Raises:
            ValueError: the warm-up would not be over by then.
        """
        if max_decay_steps <= self.warm_up_steps:
            raise ValueError(
                f"scheduler_config: warm_up_steps {self.warm_up_steps} must be below the {max_decay_steps} optimiser "
                "steps after which the decay ends (max_decay_steps, or else the length of the run)"
            )
        self.max_decay_steps = max_decay_steps

    def multiplier(self, n: int) -> float:
        """Give the multiplier at step n."""
        if n < self.warm_up_steps:
            return super().multiplier(n)
        if self.max_decay_steps is None:
            raise ValueError(
                "scheduler_config: nothing says how long the run is; give params.max_decay_steps (optimiser steps), "
                "or lightning.trainer.max_steps"
            )
        return self._decay(min(1.0, (n - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps)))

    def _decay(self, fraction: float) -> float:
        return _ramp(1.0, self.f_min, fraction)


class CosineScheduler(LinearScheduler):
    """Linear warm-up to the learning rate, then half a cosine down over the rest of the run.

    Its arguments are those of :class:`LinearScheduler`.

    Reference:
        Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5 (one period).
    """

    def _decay(self, fraction: float) -> float:
        return _half_cosine(1.0, self.f_min, fraction)


def _refuse_negative(**numbers: float) -> None:
    """Refuse numbers below 0, by name."""
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"scheduler_config: {name} is {number}; it must be 0 or more")


def span_run(schedule: object, total_steps: int | None) -> None:
    """Let a decay without an end of its own last as long as the run; other schedules stay as they are.

    Args:
        schedule: any schedule.
        total_steps: optimiser steps of the run, from its first; None where nothing limits them.

    Raises:
        ValueError: the run is over before the warm-up.
    """
    if isinstance(schedule, LinearScheduler) and schedule.max_decay_steps is None and total_steps is not None:
        schedule.end_at(total_steps)
