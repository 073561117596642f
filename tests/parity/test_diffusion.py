"""The noise schedule, the diffusion process and its ancestral sampler give the original's numbers."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def z(tiny_sd, oracle_a):
    """Latents of the recorded pictures."""
    with torch.no_grad():
        posterior = tiny_sd.encode_first_stage(oracle_a["in/vae/img"])
        return tiny_sd.get_first_stage_encoding(posterior, oracle_a["in/vae/post_noise"])


@pytest.fixture(scope="module")
def x_t(tiny_sd, oracle_a, z):
    """Those latents, noised."""
    return tiny_sd.q_sample(z, oracle_a["in/q/t"], oracle_a["in/q/noise"])


def test_the_coefficient_tables_are_the_recorded_ones(tiny_sd, oracle_a):
    tables = oracle_a.keys("sched/")
    assert len(tables) == 13
    for key in tables:
        oracle_a.check(key, getattr(tiny_sd, key.removeprefix("sched/")))


def test_latents_are_drawn_and_scaled_as_recorded(oracle_a, z):
    oracle_a.check("latent/z", z)


def test_a_posterior_draw_without_given_noise_goes_through_torch(tiny_sd, oracle_a, scripted_noise):
    with scripted_noise([oracle_a["in/vae/post_noise"]]):
        oracle_a.check("latent/z", tiny_sd.get_first_stage_encoding(tiny_sd.encode_first_stage(oracle_a["in/vae/img"])))


def test_the_forward_process_is_the_recorded_one(tiny_sd, oracle_a, z, x_t):
    t = oracle_a["in/q/t"]
    oracle_a.check("q/x_t", x_t)
    for name, value in zip(("mean", "var", "logvar"), tiny_sd.q_mean_variance(z, t), strict=True):
        oracle_a.check(f"q/{name}", value)
    oracle_a.check("q/x0_from_noise", tiny_sd.predict_start_from_noise(x_t, t, oracle_a["in/q/noise"]))
    for name, value in zip(("mean", "var", "logvar"), tiny_sd.q_posterior(z, x_t, t), strict=True):
        oracle_a.check(f"q/post_{name}", value)
    oracle_a.check("q/prior_bpd", tiny_sd._prior_bpd(z))


@torch.no_grad()
def test_the_reverse_process_is_the_recorded_one(tiny_sd, oracle_a, contexts, x_t):
    t = oracle_a["in/q/t"]
    mean, _, logvar, x0 = tiny_sd.p_mean_variance(x_t, contexts[0], t, clip_denoised=False, return_x0=True)
    oracle_a.check("p/mean", mean)
    oracle_a.check("p/logvar", logvar)
    oracle_a.check("p/x0", x0)
    oracle_a.check("p/mean_clipped", tiny_sd.p_mean_variance(x_t, contexts[0], t, clip_denoised=True)[0])


def test_one_ancestral_draw_is_the_recorded_one(tiny_sd, oracle_a, contexts, x_t, scripted_noise):
    with scripted_noise([oracle_a["in/p/noise"]]):
        oracle_a.check("p/sample", tiny_sd.p_sample(x_t, contexts[0], oracle_a["in/p/t"]))


def test_the_ancestral_loop_ends_where_the_recorded_one_did(tiny_sd, oracle_a, contexts, scripted_noise):
    x_T = oracle_a["in/sample/x_T"]
    with scripted_noise([oracle_a[f"in/loop/noise{index}"] for index in range(12)]):
        out = tiny_sd.p_sample_loop(contexts[0], x_T.shape, x_T=x_T, timesteps=12, verbose=False)
    oracle_a.check("loop12/out", out)
