from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion import gaussian_diffusion
from ldm.models.diffusion.conditioning import as_arguments, batch_together, guided_output
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.diffusionmodules.util import make_ddim_timesteps
from tests.unit.models.small import build_text_model

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def model():
    """A text-to-image model; tests must leave it as it is."""
    return build_text_model()


class Disguised:
    """Answers as a model of another parameterisation that knows the same noise."""

    def __init__(self, model, parameterization):
        self.model, self.parameterization = model, parameterization

    def __getattr__(self, name):
        return getattr(self.model, name)

    def apply_model(self, x, t, cond):
        eps = self.model.apply_model(x, t, cond)
        if self.parameterization == "eps":
            return eps
        x0 = gaussian_diffusion.predict_start_from_noise(self.model, x, t, eps)
        return x0 if self.parameterization == "x0" else gaussian_diffusion.velocity(self.model, x0, eps, t)


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_samples_do_not_depend_on_how_the_network_words_its_answer(sampler_class, parameterization):
    model = build_text_model().double()
    x_T, cond = torch.randn(2, *SHAPE, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)
    options = {"x_T": x_T, "verbose": False}
    expected, _ = sampler_class(Disguised(model, "eps")).sample(5, 2, SHAPE, cond, **options)
    found, _ = sampler_class(Disguised(model, parameterization)).sample(5, 2, SHAPE, cond, **options)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("total", [10, 50, 1000])
def test_any_number_of_steps_gives_exactly_that_many_valid_timesteps(total):
    for steps in range(1, total + 1):
        timesteps = make_ddim_timesteps("uniform", steps, total, verbose=False)
        assert len(timesteps) == steps
        assert (timesteps[1:] > timesteps[:-1]).all()
        assert timesteps[0] >= 0
        assert timesteps[-1] < total


@pytest.mark.parametrize("steps", [0, 1001])
def test_an_impossible_number_of_steps_is_an_error(steps):
    with pytest.raises(ValueError, match="must lie within 1 and 1000"):
        make_ddim_timesteps("uniform", steps, 1000)


def test_every_timestep_can_be_visited(model):
    out, _ = DDIMSampler(build_text_model(timesteps=7)).sample(
        7, 1, SHAPE, torch.randn(1, 3, 32), x_T=torch.randn(1, *SHAPE), verbose=False
    )
    assert torch.isfinite(out).all()


def test_plms_refuses_noise(model):
    with pytest.raises(ValueError, match=r"eta is 1\.0, it must be 0"):
        PLMSSampler(model).sample(5, 1, SHAPE, eta=1.0, verbose=False)


def test_a_mask_needs_the_latents_under_it(model):
    with pytest.raises(ValueError, match="needs x0"):
        DDIMSampler(model).sample(5, 1, SHAPE, mask=torch.ones(1, 1, 8, 8), verbose=False)


def test_callbacks_are_told_of_every_step(model):
    told = []
    cond = torch.randn(1, 3, 32)
    DDIMSampler(model).sample(4, 1, SHAPE, cond, verbose=False, callback=told.append)
    assert told == [0, 1, 2, 3]


def test_guidance_moves_from_the_unconditional_to_the_conditional_answer():
    def network(x, t, cond):
        return cond

    x, t = torch.zeros(2, 1), torch.zeros(2)
    cond, uncond = torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)
    assert guided_output(network, x, t, cond, uncond, 2.0).tolist() == [[5.0], [5.0]]
    assert guided_output(network, x, t, cond, uncond, 1.0).tolist() == [[3.0], [3.0]]


def test_guidance_works_on_dictionaries_of_lists():
    a = {"c_concat": [torch.zeros(1, 2)], "c_crossattn": [torch.zeros(1, 3)]}
    b = {"c_concat": [torch.ones(1, 2)], "c_crossattn": [torch.ones(1, 3)]}
    both = batch_together(a, b)
    assert both["c_concat"][0].tolist() == [[0, 0], [1, 1]]
    assert both["c_crossattn"][0].shape == (2, 3)


def test_conditions_of_different_form_cannot_be_batched():
    with pytest.raises(ValueError, match="same form"):
        batch_together(torch.zeros(1), {"c_concat": [torch.zeros(1)]})


def test_a_condition_is_worded_as_the_networks_arguments():
    tokens = torch.zeros(1)
    assert as_arguments(tokens, "crossattn") == {"c_crossattn": [tokens]}
    assert as_arguments([tokens], "concat") == {"c_concat": [tokens]}
    assert as_arguments({"c_concat": tokens}, "hybrid") == {"c_concat": [tokens]}
    assert as_arguments(None, None) == {}
