from __future__ import annotations

import pytest

from ldm.training.learning_rate import LearningRate, describe_schedule, scaled_learning_rate


def test_the_base_rate_is_used_as_it_is_without_scaling() -> None:
    rate = scaled_learning_rate(1e-6, scale=False, accumulate=2, devices=2, batch_size=6)
    assert rate.value == 1e-6
    assert rate.arithmetic == "1e-06 (base_learning_rate; not scaled)"


def test_scaling_multiplies_by_all_pictures_of_a_step() -> None:
    rate = scaled_learning_rate(1e-6, scale=True, accumulate=2, devices=3, batch_size=6)
    assert rate.value == pytest.approx(3.6e-5)


def test_the_arithmetic_names_each_factor() -> None:
    rate = scaled_learning_rate(5e-7, scale=True, accumulate=2, devices=1, batch_size=6, key="model_lr")
    assert rate.arithmetic == ("6e-06 = 2 (accumulate_grad_batches) x 1 (devices) x 6 (batch_size) x 5e-07 (model_lr)")


@pytest.mark.parametrize("base", [0.0, -1e-6, float("nan")])
def test_a_rate_that_is_not_above_0_is_an_error_that_names_the_key(base: float) -> None:
    with pytest.raises(ValueError, match=r"model\.base_learning_rate"):
        scaled_learning_rate(base, scale=False, accumulate=1, devices=1, batch_size=1)


def test_a_schedule_shows_first_highest_and_last_of_each_rate() -> None:
    rates = [LearningRate(1e-6, "base"), LearningRate(4e-6, "cond_lr")]
    lines = describe_schedule(lambda step: [0.0, 0.5, 1.0, 0.25][step], "Up", rates, total_steps=4)
    assert lines == [
        "base; Up: first 0, peak 1e-06 (step 2), last 2.5e-07 (step 3)",
        "cond_lr; Up: first 0, peak 4e-06 (step 2), last 1e-06 (step 3)",
    ]


def test_a_run_without_an_end_shows_where_its_schedule_begins() -> None:
    assert describe_schedule(lambda step: 0.5, "Half", [LearningRate(2e-6, "base")], None) == [
        "base; Half: first 1e-06"
    ]
