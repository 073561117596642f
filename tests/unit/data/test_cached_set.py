"""Data sets that read latents in place of pictures: they show the very distribution that they show without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from ldm import exposure
from ldm.data.ed_validate import EDValidateBatch
from ldm.data.every_dream import EveryDreamBatch
from ldm.data.exposure_set import Filler
from ldm.data.latent_cache import LatentCache, View

ENCODING = {"weights": "w", "channels": 8, "factor": 8, "dtype": torch.float32}


def picture_size(number: int) -> tuple[int, int]:
    return (100, 64) if number % 3 else (64, 100)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide and high pictures, of which a crop leaves something out; one folder flips by a rule of its own."""
    folder = tmp_path_factory.mktemp("root")
    for number in range(8):
        path = folder / ("man" if number % 2 else "cat") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        size = picture_size(number)
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "cat" / "folder.yaml").write_text("flip_p: 0.25\n")
    return str(folder)


def build(root: str, cache: str = "memory", **params: Any) -> EveryDreamBatch:
    defaults = {"size": 64, "repeats": 2, "seed": 5, "resize_mode": "bucket", "cache_latents": cache}
    return EveryDreamBatch(root, **(defaults | params))


def cache_of(dataset: EveryDreamBatch) -> LatentCache:
    assert dataset.latent_cache is not None
    return dataset.latent_cache


def fill(dataset: EveryDreamBatch) -> dict[View, torch.Tensor]:
    """Fill a data set's cache with moments that tell the view."""
    cache = cache_of(dataset)
    cache.open(ENCODING)
    written = {}
    for number, view in enumerate(cache.missing(0, 1)):
        width, height = view.placement.size
        written[view] = torch.full((8, height // 8, width // 8), float(number))
        cache.write(view, written[view])
    cache.finish()
    return written


def placements(dataset: EveryDreamBatch, epochs: int) -> list[View]:
    count = sum(dataset.epoch_length(epoch) for epoch in range(epochs))
    showings = (dataset.showing(index) for index in range(count))
    return [View(showing.picture.path, showing.placement) for showing in showings]


# --- which views there are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random", "jitter"])
@pytest.mark.parametrize("flip_p", [0.0, 0.5, 1.0])
def test_every_exposure_shows_a_view_that_is_cached(root: str, crop: str, flip_p: float) -> None:
    dataset = build(root, crop=crop, flip_p=flip_p)
    assert set(placements(dataset, epochs=5)) <= set(dataset.views())


def test_many_exposures_show_every_view_that_is_cached(root: str) -> None:
    dataset = build(root, crop="random", flip_p=0.5, cache_crops=3)
    assert set(placements(dataset, epochs=40)) == set(dataset.views())


def test_views_are_crops_times_flips(root: str) -> None:
    assert len(set(build(root).views())) == 8 + 4, "the folder cat flips by its own rule"
    assert len(set(build(root, flip_p=0.5).views())) == 16
    assert len(set(build(root, flip_p=0.5, crop="random", cache_crops=3).views())) == 48
    assert len(set(build(root, flip_p=0.5, crop="random", cache_crops=3, set="val").views())) == 8


def test_a_validation_set_can_be_cached_too(root: str) -> None:
    dataset = EDValidateBatch(root, size=64, cache_latents="memory")
    fill(dataset)
    assert "moments" in dataset[0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cache_latents": "ram"}, "cache_latents 'ram' is unknown; choose one of off, memory, disk"),
        ({"cache_latents": True}, "cache_latents True is unknown; choose one of off, memory, disk"),
        ({"cache_crops": 0}, "cache_crops 0 is not allowed; give a whole number of at least 1"),
        ({"cache_crops": 1.5}, "cache_crops 1.5 is not allowed"),
    ],
)
def test_a_wrong_argument_is_told(root: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EveryDreamBatch(root, **params)


def test_off_without_quotes_is_off_though_yaml_reads_it_as_false(root: str) -> None:
    assert EveryDreamBatch(root, cache_latents=False).latent_cache is None


# --- what items hold ---------------------------------------------------------------------------------------


def test_items_hold_pictures_until_the_cache_is_ready_and_moments_from_then_on(root: str) -> None:
    dataset = build(root, crop="random", flip_p=0.5)
    before = dataset[3]
    written = fill(dataset)
    after = dataset[3]
    assert set(before) - set(after) == {"image"}
    assert set(after) - set(before) == {"moments"}
    showing = dataset.showing(3)
    assert torch.equal(after["moments"], written[View(showing.picture.path, showing.placement)])


def test_all_else_in_an_item_stays_as_it_is_without_a_cache(root: str) -> None:
    plain, cached = build(root, cache="off", flip_p=0.5), build(root, flip_p=0.5)
    fill(cached)
    for index in range(len(plain)):
        expected, actual = plain[index], cached[index]
        for name in set(expected) - {"image"}:
            assert default_collate([expected[name]]) == pytest.approx(default_collate([actual[name]])), name


def test_a_filler_of_latents_counts_nothing(root: str) -> None:
    dataset = build(root)
    fill(dataset)
    item = dataset[Filler(0)]
    assert item["loss_weight"] == 0
    assert "moments" in item


def test_latents_collate_to_a_batch(root: str) -> None:
    dataset = build(root)
    fill(dataset)
    wide = [index for index in range(len(dataset)) if dataset.showing(index).placement.size == (80, 48)]
    batch = default_collate([dataset[index] for index in wide[:3]])
    assert batch["moments"].shape == (3, 8, 6, 10)


# --- the same distribution ---------------------------------------------------------------------------------


def crop_positions(dataset: EveryDreamBatch, epochs: int) -> np.ndarray:
    """Where crops lie, from 0 to 1 along the side that is cut."""
    found = []
    for view in placements(dataset, epochs):
        left, top, right, bottom = view.placement.box
        width, height = picture_size(int(Path(view.path).stem))
        excess = (width - (right - left), height - (bottom - top))
        found.append(left / excess[0] if excess[0] > excess[1] else top / excess[1])
    return np.array(found)


def distance(one: np.ndarray, two: np.ndarray) -> float:
    """Kolmogorov and Smirnov's distance: the greatest difference between two distribution functions."""
    points = np.sort(np.concatenate([one, two]))
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (one, two)]
    return float(np.abs(below[0] - below[1]).max())


DISTINCT_CROPS = round(60 * 8 * 4 * (1 - (3 / 4) ** 4))
"""What 60 seeds, 8 pictures and 4 epochs see of 4 crops: the number of independent draws among those shown."""


def limit(one: int, two: int) -> float:
    """The distance that samples of one distribution exceed in a hundredth of all cases."""
    return 1.63 * math.sqrt(1 / one + 1 / two)


@pytest.mark.parametrize("crop", ["random", "jitter"])
def test_crops_lie_like_those_of_a_set_without_a_cache(root: str, crop: str) -> None:
    # Of one seed the crops are some tens of draws, so many seeds are taken together.
    seeds = range(60)
    cached = [crop_positions(build(root, crop=crop, repeats=1, seed=seed, cache_crops=4), 4) for seed in seeds]
    plain = [crop_positions(build(root, "off", crop=crop, repeats=1, seed=seed), 4) for seed in seeds]
    one, two = np.concatenate(cached), np.concatenate(plain)
    assert distance(one, two) < limit(DISTINCT_CROPS, len(two))
    assert one.mean() == pytest.approx(0.5, abs=0.03)


def test_the_test_of_crops_can_tell_a_bias() -> None:
    draws = np.random.default_rng(0).random((2, DISTINCT_CROPS))
    assert distance(draws[0], draws[1]) < limit(DISTINCT_CROPS, DISTINCT_CROPS) < distance(draws[0], draws[1] ** 1.3)


def test_an_exposure_flips_just_when_it_does_without_a_cache(root: str) -> None:
    params: dict[str, Any] = {"crop": "random", "flip_p": 0.5, "repeats": 5}
    flips = [[view.placement.flip for view in placements(build(root, each, **params), 4)] for each in ("off", "disk")]
    assert flips[0] == flips[1]
    assert 0.2 < np.mean(flips[0]) < 0.6


def test_an_exposure_shows_the_same_crop_as_without_a_cache_where_crops_are_fixed(root: str) -> None:
    for mode in ("bucket", "center_crop", "squash"):
        plain, cached = (build(root, each, resize_mode=mode, flip_p=0.5) for each in ("off", "memory"))
        assert placements(plain, 2) == placements(cached, 2)


def test_each_crop_of_a_picture_is_chosen_about_equally_often(root: str) -> None:
    dataset = build(root, crop="random", repeats=100, cache_crops=4)
    shown = placements(dataset, 1)
    counts = np.array(
        [
            sum(view.path == path and view.placement.box == box for view in shown)
            for path, box in {(view.path, view.placement.box) for view in shown}
        ]
    )
    assert len(counts) == 8 * 4
    assert counts.min() > 9
    assert counts.max() < 47


def test_which_crops_a_picture_has_does_not_change_with_the_pictures_beside_it(root: str, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "2.png").write_bytes(Path(root, "cat", "2.png").read_bytes())
    alone = {view.placement.box for view in build(str(tmp_path), crop="random").views()}
    among = {view.placement.box for view in build(root, crop="random").views() if view.path.endswith("2.png")}
    assert alone == among


def test_the_posterior_is_sampled_anew_for_each_exposure_and_by_a_standard_normal(root: str) -> None:
    dataset = build(root, repeats=50)
    keys = torch.stack([dataset.showing(index).exposure for index in range(len(dataset))])
    noise = exposure.randn("posterior", keys, (4, 6, 10))
    assert len(noise.flatten(1).unique(dim=0)) == len(dataset)
    assert noise.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(noise.numel()))
    assert noise.var().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / noise.numel()))
