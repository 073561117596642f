from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.training.toy_run import toy_run


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        ({"batch_size": 6}, {"batch_size": 2, "accumulate_grad_batches": 3}),
        ({"batch_size": 8}, {"batch_size": 2, "accumulate_grad_batches": 4}),  # the last step gathers 2 of 4 batches
        ({"batch_size": 10}, {"batch_size": 5, "accumulate_grad_batches": 2}),  # the last batch holds 2 of 5 pictures
        ({"batch_size": 9}, {"batch_size": 3, "accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    ],
)
def test_small_batches_with_accumulation_train_as_one_large_batch(
    whole: dict[str, int], parts: dict[str, float], pictures: Path, tmp_path: Path
) -> None:
    clip = {key: value for key, value in parts.items() if key == "gradient_clip_val"}
    large = toy_run(tmp_path / "large", pictures, **whole, **clip)  # type: ignore[arg-type]
    small = toy_run(tmp_path / "small", pictures, **parts)  # type: ignore[arg-type]
    assert small.model.shown == large.model.shown
    assert small.trainer.global_step == large.trainer.global_step
    torch.testing.assert_close(small.weights, large.weights, rtol=1e-4, atol=1e-6)


def test_an_unclipped_run_differs_from_a_clipped_one(pictures: Path, tmp_path: Path) -> None:
    free = toy_run(tmp_path / "free", pictures)
    clipped = toy_run(tmp_path / "clipped", pictures, gradient_clip_val=1e-6)
    assert not torch.allclose(free.weights, clipped.weights, rtol=1e-4, atol=1e-6)
