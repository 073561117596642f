"""Batches that hold cached latents in place of pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.unit.models.small import build_text_model, picture_batch, text_config, unet_config


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build_text_model()


def cached(model: LatentDiffusion, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with the moments of its pictures in their place."""
    rest = {name: value for name, value in batch.items() if name != "image"}
    return {**rest, "moments": default_collate(list(model.encode_moments(batch["image"])))}


def test_moments_are_mean_and_log_variance_of_the_latents(model: LatentDiffusion) -> None:
    batch = picture_batch()
    posterior = model.encode_first_stage(batch["image"].permute(0, 3, 1, 2).contiguous())
    mean, logvar = model.encode_moments(batch["image"]).chunk(2, dim=1)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(logvar.clamp(-30, 20), posterior.logvar)


def test_an_exposure_draws_the_same_latents_from_moments_as_from_its_picture(model: LatentDiffusion) -> None:
    batch = picture_batch()
    expected = model.get_input(batch, "image", exposures=batch["exposure"])[0]
    actual = model.get_input(cached(model, batch), "image", exposures=batch["exposure"])[0]
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride(), "else the network adds up in another order"


def test_each_exposure_draws_anew_from_the_same_moments(model: LatentDiffusion) -> None:
    batch = cached(model, picture_batch())
    first, second = (
        model.get_input(batch, "image", exposures=batch["exposure"] + torch.tensor([0, epoch, 0, 0]))[0]
        for epoch in (0, 1)
    )
    assert not torch.equal(first, second)


def test_the_loss_of_moments_equals_that_of_their_pictures(model: LatentDiffusion) -> None:
    batch = picture_batch()
    expected = model.shared_step(batch, batch["exposure"])[0]
    actual = model.shared_step(cached(model, batch), batch["exposure"])[0]
    assert torch.equal(actual, expected)


def test_picture_rows_of_moments_show_their_decoded_mean_as_inputs(model: LatentDiffusion) -> None:
    batch = cached(model, picture_batch())
    rows = model.log_images(batch, N=2, sample=False)
    mean = batch["moments"].chunk(2, dim=1)[0]
    assert torch.allclose(rows["inputs"], model.decode_first_stage(model.scale_factor * mean), atol=1e-5)
    assert rows["conditioning"].shape == rows["inputs"].shape


def test_samples_are_drawn_at_the_size_of_cached_latents(model: LatentDiffusion) -> None:
    batch = cached(model, picture_batch(size=(16, 24)))
    rows = model.log_images(batch, N=1, ddim_steps=1, unconditional_guidance_scale=1.0)
    assert rows["samples"].shape == (1, 3, 16, 24)


def test_a_model_whose_condition_is_made_from_the_pictures_says_so() -> None:
    model = build_text_model(unet={"in_channels": 8}, cond_stage_config="__is_first_stage__", **AUTO_CONDITIONED)
    batch = picture_batch()
    with pytest.raises(ValueError, match="cond_stage_key: image"):
        model.encode_moments(batch["image"])
    with pytest.raises(ValueError, match="cond_stage_key: image"):
        model.get_input({"moments": torch.zeros(2, 8, 8, 8)}, "image")


AUTO_CONDITIONED = {"cond_stage_key": "image", "cond_stage_trainable": False, "conditioning_key": "concat"}


def test_a_first_stage_without_a_posterior_is_named() -> None:
    model = LatentDiffusion(
        unet_config=unet_config(use_spatial_transformer=True, context_dim=32, legacy=False),
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        cond_stage_config=text_config(),
        cond_stage_key="caption",
        conditioning_key="crossattn",
        use_ema=False,
    )
    with pytest.raises(ValueError, match="IdentityFirstStage"):
        model.encode_moments(torch.zeros(1, 8, 8, 3))
