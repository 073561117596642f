"""Learning-rate schedules beside an independent implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from ldm.lr_scheduler import ConstantScheduler, CosineScheduler, LinearScheduler, span_run

STEPS = 40


def rates_of(schedule: Any) -> list[float]:
    """The rate of 1 at each step, as the other implementation's scheduler gives it."""
    rates = []
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warm_up", [0, 7])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda warm: ConstantScheduler(warm), transformers.get_constant_schedule_with_warmup),
        (
            lambda warm: LinearScheduler(warm, max_decay_steps=30),
            lambda optimizer, warm: transformers.get_linear_schedule_with_warmup(optimizer, warm, 30),
        ),
        (
            lambda warm: CosineScheduler(warm, max_decay_steps=STEPS),
            lambda optimizer, warm: transformers.get_cosine_schedule_with_warmup(optimizer, warm, STEPS),
        ),
    ],
    ids=["constant", "linear", "cosine"],
)
def test_a_schedule_is_that_of_transformers(
    ours: Callable[[int], Any], theirs: Callable[[Any, int], Any], warm_up: int
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = ours(warm_up)
    assert [schedule.schedule(n) for n in range(STEPS)] == pytest.approx(rates_of(theirs(optimizer, warm_up)), abs=1e-9)


@pytest.mark.parametrize("kind", [LinearScheduler, CosineScheduler])
def test_a_decay_ends_at_its_floor_and_stays_there(kind: type[LinearScheduler]) -> None:
    schedule = kind(warm_up_steps=2, f_start=0.5, f_min=0.1, max_decay_steps=10)
    assert schedule.schedule(0) == 0.5
    assert schedule.schedule(2) == pytest.approx(1.0)
    assert [schedule.schedule(n) for n in (10, 11, 500)] == pytest.approx([0.1, 0.1, 0.1])


def test_a_decay_without_an_end_lasts_as_long_as_the_run() -> None:
    schedule, expected = CosineScheduler(3), CosineScheduler(3, max_decay_steps=20)
    span_run(schedule, 20)
    assert [schedule.schedule(n) for n in range(25)] == [expected.schedule(n) for n in range(25)]


def test_a_decay_with_an_end_of_its_own_keeps_it() -> None:
    schedule = LinearScheduler(max_decay_steps=10)
    span_run(schedule, 1000)
    assert schedule.max_decay_steps == 10


def test_a_decay_of_a_run_without_an_end_is_an_error() -> None:
    schedule = LinearScheduler(2)
    span_run(schedule, None)
    with pytest.raises(ValueError, match=r"give params.max_decay_steps .* or lightning.trainer.max_steps"):
        schedule.schedule(2)


def test_a_warm_up_as_long_as_the_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="warm_up_steps 20 must be below the 20 optimiser steps"):
        span_run(CosineScheduler(20), 20)


@pytest.mark.parametrize("params", [{"warm_up_steps": -1}, {"f_start": -0.1}, {"f_min": -0.1}])
def test_numbers_below_0_are_errors(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(params))} is -"):
        CosineScheduler(**params)
