from __future__ import annotations

import torch

from ldm import exposure


def rows(count: int, **changes: int) -> torch.Tensor:
    key = {"seed": 23, "epoch": 0, "repeat": 0} | changes
    return torch.stack([exposure.exposure_row(key["seed"], key["epoch"], item, key["repeat"]) for item in range(count)])


def test_a_draw_depends_on_its_own_exposure_alone():
    together = exposure.randn("noise", rows(4), (2, 3))
    alone = exposure.randn("noise", rows(4)[2:3], (2, 3))
    assert torch.equal(together[2], alone[0])


def test_drawing_leaves_torchs_own_generator_alone():
    state = torch.get_rng_state()
    exposure.randn("noise", rows(2), (4,))
    exposure.randint("timestep", rows(2), 1000)
    exposure.uniform("flip", rows(1)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_every_part_of_the_key_and_the_purpose_change_the_draw():
    base = exposure.randn("noise", rows(1), (8,))
    for changed in ({"seed": 24}, {"epoch": 1}, {"repeat": 1}):
        assert not torch.equal(base, exposure.randn("noise", rows(1, **changed), (8,)))
    assert not torch.equal(base, exposure.randn("noise", rows(2)[1:], (8,)))
    assert not torch.equal(base, exposure.randn("posterior", rows(1), (8,)))


def test_known_draws_stay_what_they_are():
    # A change here would make every saved run continue with other noise: it needs a note in CHANGELOG.
    assert exposure.randint("timestep", rows(4), 1000).tolist() == [847, 392, 635, 55]
    assert exposure.item_id("man/a photo of a cat.jpg") == 1129120002914461311


def test_items_are_named_alike_on_windows_and_elsewhere():
    assert exposure.item_id("man\\cat.jpg") == exposure.item_id("man/cat.jpg")


def test_timesteps_are_spread_evenly_over_their_range():
    drawn = exposure.randint("timestep", rows(2000), 10)
    counts = torch.bincount(drawn, minlength=10)
    assert counts.min() > 150
    assert counts.max() < 250


def test_normals_have_zero_mean_and_unit_variance():
    drawn = exposure.randn("noise", rows(64), (32, 32))
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02
