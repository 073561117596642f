"""Captions of several chunks in one batch: none may depend on its batch mates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import batch_together, guided_output
from tests.unit.models.small import build_text_model, picture_batch, text_config

CAPTIONS = ["a cat", " ".join(["a dog"] * 45), " ".join(["a hat"] * 90), ""]
"""Of one, two, three and one chunks."""


def build(**params: Any) -> Any:
    config = text_config()
    config["params"]["long_captions"] = "chunk"
    return build_text_model(cond_stage_config=config, **params)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model that trains long captions whole; tests must leave it as it is."""
    return build()


def noisy(count: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([3, 500, 900, 20])[:count]


def long_batch() -> dict[str, Any]:
    return picture_batch(4) | {"caption": CAPTIONS}


def row_of(batch: dict[str, Any], row: int) -> dict[str, Any]:
    return {key: value[row : row + 1] for key, value in batch.items()}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_repeated_contexts_change_no_output_of_the_unet(dtype, bound):
    model = build().to(dtype)
    x, t = noisy()
    together = model.get_learned_conditioning(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        inputs = x[row : row + 1].to(dtype), t[row : row + 1]
        alone = model.apply_model(*inputs, model.get_learned_conditioning([caption]))
        repeated = model.apply_model(*inputs, together[row : row + 1])
        assert (repeated - alone).abs().max() <= bound * alone.abs().max()


def gradient(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    model.shared_step(batch, batch["exposure"])[0].backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_pictures_gradient_does_not_depend_on_its_batch_mates():
    model = build()
    together = gradient(model, long_batch())
    singly = [gradient(model, row_of(long_batch(), row)) for row in range(4)]
    for mean, *parts in zip(together, *singly, strict=True):
        assert torch.allclose(mean, sum(parts) / 4, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_every_chunk_of_a_caption_has_an_effect(model):
    x, t = noisy()
    changed = [*CAPTIONS[:2], CAPTIONS[2] + " in the snow", ""]
    base, other = (model.apply_model(x, t, model.get_learned_conditioning(each)) for each in (CAPTIONS, changed))
    # The words lie in the third chunk; the effect is small, but far above the rounding of the other rows.
    apart = (base - other).abs().amax(dim=(1, 2, 3))
    assert apart[2] > 10 * apart[[0, 1, 3]].max()


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "negative"), [(1, 3), (0, 2), (1, 2)])
def test_guidance_takes_prompts_of_different_lengths(model, prompt, negative):
    x, t = noisy(1)
    cond, uncond = (model.get_learned_conditioning([CAPTIONS[index]]) for index in (prompt, negative))
    outputs = [model.apply_model(x, t, each) for each in (cond, uncond)]
    guided = guided_output(model.apply_model, x, t, cond, uncond, 3.0)
    assert torch.allclose(guided, outputs[1] + 3.0 * (outputs[0] - outputs[1]), atol=1e-5)


@torch.no_grad()
def test_contexts_in_several_parts_are_repeated_as_one(model):
    x, t = noisy(1)
    short, long, extra = torch.randn(3, 1, 6, 32, generator=torch.Generator().manual_seed(0))
    short = short[:, :3]
    cond, uncond = {"c_crossattn": [long, extra]}, {"c_crossattn": [short, extra]}
    outputs = [model.apply_model(x, t, each) for each in (cond, uncond)]
    guided = guided_output(model.apply_model, x, t, cond, uncond, 3.0)
    assert torch.allclose(guided, outputs[1] + 3.0 * (outputs[0] - outputs[1]), atol=1e-5)


def test_only_tokens_are_repeated():
    tokens, maps = torch.randn(2, 1, 6, 8), torch.randn(2, 1, 4, 8, 8)
    hybrid = [{"c_crossattn": [tokens[i][:, : 3 * (i + 1)]], "c_concat": [maps[i]]} for i in (0, 1)]
    both = batch_together(*hybrid)
    assert both["c_crossattn"][0].shape == (2, 6, 8)
    assert torch.equal(both["c_crossattn"][0][0], tokens[0][0, :3].repeat(2, 1))
    assert torch.equal(both["c_concat"][0], maps[:, 0])
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        batch_together(maps[0], maps[1][:, :2])


def test_sample_pictures_are_made_of_captions_of_any_length(model):
    rows = model.log_images(long_batch(), N=4, ddim_steps=2)
    assert rows["samples_cfg_scale_5.00"].shape == (4, 3, 16, 16)


def test_a_noised_condition_cannot_be_repeated():
    with pytest.raises(ValueError, match=r"num_timesteps_cond above 1 .* leave one of them out"):
        build(num_timesteps_cond=5)
