"""What a model is trained on comes from one distribution, whether its latents are cached or not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ldm.data.every_dream import EveryDreamBatch
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.unit.models.small import build_text_model

SEEDS, PICTURES, EPOCHS, CROPS = 40, 4, 4, 4
DISTINCT = round(SEEDS * PICTURES * CROPS * (1 - (1 - 1 / CROPS) ** EPOCHS))
"""How many crops the exposures of a cached set show: its independent draws."""


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    built = build_text_model()
    with torch.no_grad():
        # Random weights give all pictures nearly the same latents: make the pictures count as much as the noise.
        built.first_stage_model.quant_conv.weight[:4] *= 6
    return built


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Long pictures with stripes that become finer to the right, so that it shows where a crop lies."""
    folder = tmp_path_factory.mktemp("root") / "stripes"
    folder.mkdir()
    for number in range(PICTURES):
        stripes = 127.5 * (1 + np.sin(30 * np.linspace(0, 1, 96) ** 2))
        pixels = np.broadcast_to(stripes[None, :, None], (16 + number, 96, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(folder.parent)


def latents(model: LatentDiffusion, root: str, cache: str = "off", sample: bool = True, **params: Any) -> Tensor:
    """Latents of some epochs of many seeds: (exposures, C, H, W)."""
    drawn = []
    for seed in range(SEEDS):
        given = {"size": 16, "repeats": 1, "flip_p": 0.5, "crop": "random", "cache_crops": CROPS, "seed": seed}
        dataset = EveryDreamBatch(root, **(given | params), cache_latents=cache)
        if dataset.latent_cache is not None:
            fill(model, dataset)
        batch = default_collate([dataset[index] for index in range(EPOCHS * PICTURES)])
        if not sample:
            batch["moments"] = torch.cat([batch["moments"][:, :4], torch.full_like(batch["moments"][:, 4:], -30)], 1)
        drawn.append(model.get_input(batch, "image", exposures=batch["exposure"])[0])
    return torch.cat(drawn)


def fill(model: LatentDiffusion, dataset: EveryDreamBatch) -> None:
    cache: Any = dataset.latent_cache
    views = list(dataset.views())
    pixels = torch.stack([torch.from_numpy(dataset.read_view(view)) for view in views])
    moments = model.encode_moments(pixels / 127.5 - 1)
    cache.open({"weights": "w", "channels": moments.shape[1], "factor": 2, "dtype": moments.dtype})
    for view, own in zip(views, moments, strict=True):
        cache.write(view, own)
    cache.finish()


def distance(one: Tensor, two: Tensor) -> float:
    """Kolmogorov and Smirnov's distance of two samples of latents, the greatest in a few directions."""
    directions = torch.randn((6, one[0].numel()), generator=torch.Generator().manual_seed(1))
    greatest = 0.0
    for direction in directions:
        projected = [np.sort((sample.flatten(1) @ direction).numpy()) for sample in (one, two)]
        points = np.concatenate(projected)
        below = [np.searchsorted(sample, points, side="right") / len(sample) for sample in projected]
        greatest = max(greatest, float(np.abs(below[0] - below[1]).max()))
    return greatest


LIMIT = 2.0 * math.sqrt(1 / DISTINCT + 1 / (SEEDS * PICTURES * EPOCHS))
"""What six directions of one distribution exceed in fewer than one in 200 cases (Bonferroni's bound)."""


@pytest.fixture(scope="module")
def uncached(model: LatentDiffusion, root: str) -> Tensor:
    return latents(model, root)


def test_latents_are_drawn_from_one_distribution_with_and_without_a_cache(
    model: LatentDiffusion, root: str, uncached: Tensor
) -> None:
    assert distance(uncached, latents(model, root, "memory")) < LIMIT


@pytest.mark.parametrize("fault", [{"crop": "center"}, {"flip_p": 0.0}, {"sample": False}])
def test_the_test_notices_a_cache_that_draws_otherwise(
    model: LatentDiffusion, root: str, uncached: Tensor, fault: dict[str, Any]
) -> None:
    assert distance(uncached, latents(model, root, "memory", **fault)) > LIMIT
