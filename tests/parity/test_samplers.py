"""DDIM and PLMS give the original's samples."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler


def run(sampler, oracle, contexts, guidance_scale=1.0, **kwargs):
    x_T = oracle["in/sample/x_T"]
    if guidance_scale != 1.0:
        kwargs |= {"unconditional_guidance_scale": guidance_scale, "unconditional_conditioning": contexts[1]}
    shape = tuple(x_T.shape[1:])
    return sampler.sample(10, 2, shape, contexts[0], x_T=x_T, verbose=False, log_every_t=1, **kwargs)


@pytest.mark.parametrize(
    ("name", "sampler_class", "guidance_scale"),
    [
        ("ddim_cfg1", DDIMSampler, 1.0),
        ("ddim_cfg7.5", DDIMSampler, 7.5),
        ("plms_cfg1", PLMSSampler, 1.0),
        ("plms_cfg7.5", PLMSSampler, 7.5),
    ],
)
def test_deterministic_samples_and_their_intermediates_are_the_recorded_ones(
    tiny_sd, oracle_a, contexts, name, sampler_class, guidance_scale
):
    out, intermediates = run(sampler_class(tiny_sd), oracle_a, contexts, guidance_scale)
    oracle_a.check(f"{name}/out", out)
    for kind in ("x_inter", "pred_x0"):
        oracle_a.check(f"{name}/{kind}", torch.stack([x[:1] for x in intermediates[kind]]))


def test_stochastic_ddim_samples_are_the_recorded_ones(tiny_sd, oracle_a, contexts, scripted_noise):
    with scripted_noise([oracle_a[f"in/ddim_eta/noise{index}"] for index in range(10)]):
        out, _ = run(DDIMSampler(tiny_sd), oracle_a, contexts, eta=1.0)
    oracle_a.check("ddim_eta1/out", out)


def test_the_step_tables_are_the_recorded_ones(tiny_sd, oracle_a):
    sampler = DDIMSampler(tiny_sd)
    sampler.make_schedule(10, verbose=False)
    for key in oracle_a.keys("ddim10/ddim_"):
        oracle_a.check(key, getattr(sampler, key.removeprefix("ddim10/")))
    sampler.make_schedule(10, ddim_eta=1.0, verbose=False)
    oracle_a.check("ddim10/eta1_sigmas", sampler.ddim_sigmas)


def test_inpainting_keeps_the_masked_latents_as_recorded(tiny_sd, oracle_a, contexts, scripted_noise):
    x_T = oracle_a["in/sample/x_T"]
    unused = torch.zeros_like(x_T)
    draws = [draw for index in range(10) for draw in (oracle_a[f"in/inpaint/noise{index}"], unused)]
    with scripted_noise(draws):
        out, _ = run(
            DDIMSampler(tiny_sd), oracle_a, contexts, mask=oracle_a["in/inpaint/mask"], x0=oracle_a["latent/z"]
        )
    oracle_a.check("inpaint/out", out)


def test_image_to_image_encodes_and_decodes_as_recorded(tiny_sd, oracle_a, contexts):
    sampler = DDIMSampler(tiny_sd)
    sampler.make_schedule(10, verbose=False)
    noised = sampler.stochastic_encode(oracle_a["latent/z"], torch.tensor([6, 6]), noise=oracle_a["in/img2img/noise"])
    oracle_a.check("img2img/encoded", noised)
    out = sampler.decode(
        noised, contexts[0], 6, unconditional_guidance_scale=5.0, unconditional_conditioning=contexts[1]
    )
    oracle_a.check("img2img/decoded", out)
