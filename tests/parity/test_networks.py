"""Text encoder, UNet and autoencoder give the original's numbers."""

from __future__ import annotations

import pytest
import torch

from tests.parity.recording import build_tiny_sd


def test_every_weight_of_the_model_is_filled(tiny_sd, oracle_a):
    assert tiny_sd.filled == oracle_a.scalars["filled_count"]


def test_the_state_dict_has_the_recorded_keys_in_the_recorded_order(tiny_sd, oracle_a):
    recorded = [(key, shape) for key, shape in oracle_a.scalars["state_dict_keys"] if "position_ids" not in key]
    assert [(key, list(value.shape)) for key, value in tiny_sd.state_dict().items()] == recorded


@torch.no_grad()
def test_the_text_encoder_gives_the_recorded_hidden_states(tiny_sd, oracle_a):
    oracle_a.check("text/hidden", tiny_sd.get_learned_conditioning(oracle_a["in/tokens"]))


@pytest.mark.parametrize("case", range(4))
@torch.no_grad()
def test_the_unet_gives_the_recorded_output(tiny_sd, oracle_a, case):
    x, t, context = (oracle_a[f"in/unet{case}/{name}"] for name in ("x", "t", "context"))
    oracle_a.check(f"unet{case}/out", tiny_sd.model.diffusion_model(x, t, context=context))


@torch.no_grad()
def test_the_autoencoder_encodes_as_recorded(tiny_sd, oracle_a):
    posterior = tiny_sd.encode_first_stage(oracle_a["in/vae/img"])
    oracle_a.check("vae/moments", posterior.parameters)
    oracle_a.check("vae/mode", posterior.mode())
    oracle_a.check("vae/ns_moments", tiny_sd.encode_first_stage(oracle_a["in/vae/ns_img"]).parameters)


@torch.no_grad()
def test_the_autoencoder_decodes_as_recorded(tiny_sd, oracle_a):
    oracle_a.check("vae/dec", tiny_sd.first_stage_model.decode(oracle_a["in/vae/z"]))
    oracle_a.check("vae/ns_dec", tiny_sd.first_stage_model.decode(oracle_a["in/vae/ns_z"]))
    oracle_a.check("vae/decode_first_stage", tiny_sd.decode_first_stage(oracle_a["in/vae/z"]))


@torch.no_grad()
def test_the_autoencoder_reconstructs_a_sample_as_recorded(tiny_sd, oracle_a, scripted_noise):
    with scripted_noise([oracle_a["in/vae/post_noise"]]):
        reconstruction, _ = tiny_sd.first_stage_model(oracle_a["in/vae/img"])
    oracle_a.check("vae/forward_rec", reconstruction)


@torch.no_grad()
def test_norm_epsilons_are_the_recorded_ones(oracle_a):
    model = build_tiny_sd()
    parameters = dict(model.named_parameters())
    for key in oracle_a.scalars["eps_probe"]["scaled_keys"]:
        parameters[key].mul_(0.01 if key.startswith("model.") else 0.001)
    x, t, context = (oracle_a[f"in/unet1/{name}"] for name in ("x", "t", "context"))
    oracle_a.check("eps_probe/unet", model.model.diffusion_model(x, t, context=context))
    oracle_a.check("eps_probe/vae_moments", model.encode_first_stage(oracle_a["in/vae/img"]).parameters)
    oracle_a.check("eps_probe/vae_dec", model.first_stage_model.decode(oracle_a["in/vae/z"]))
