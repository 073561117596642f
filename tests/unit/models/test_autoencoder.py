"""The first stages: what they compute, which keys they have, and how they fit into a diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ldm.checkpoint import load_weights
from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config
from tests.conftest import ROOT
from tests.unit.models.small import picture_batch, unet_config, with_random_weights

CONFIGS = sorted((ROOT / "configs" / "autoencoder").glob("*.yaml"))
IDENTITY = {"target": "torch.nn.Identity"}


def ddconfig(double_z: bool) -> dict[str, Any]:
    return {
        "double_z": double_z,
        "z_channels": 4,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    }


def lossconfig(kind: str) -> dict[str, Any]:
    params = {"disc_start": 0, "disc_num_layers": 1, "perceptual_weight": 0.0}
    target = {"kl": "contperceptual.LPIPSWithDiscriminator", "vq": "vqperceptual.VQLPIPSWithDiscriminator"}[kind]
    return {"target": f"ldm.modules.losses.{target}", "params": params}


def vq_model(kind: type[VQModel] = VQModel, **params: Any) -> VQModel:
    torch.manual_seed(0)
    model = kind(**({"ddconfig": ddconfig(False), "lossconfig": IDENTITY, "n_embed": 8, "embed_dim": 4} | params))
    # Codes as far apart as the latents are, so that several are used.
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model.eval()


def kl_model(**params: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**({"ddconfig": ddconfig(True), "lossconfig": IDENTITY, "embed_dim": 4} | params)).eval()


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- VQ ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_position_gets_its_nearest_code():
    model = vq_model()
    latents = model.encode_to_prequant(pictures())
    quant, _, (_, _, codes) = model.encode(pictures())
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = torch.cdist(flat, model.quantize.embedding.weight).argmin(dim=1)
    assert len(nearest.unique()) > 1
    assert torch.equal(codes, nearest)
    entries = model.quantize.embedding.weight[nearest].reshape(2, 8, 8, 4).permute(0, 3, 1, 2)
    assert torch.allclose(quant, entries, atol=1e-6)


def test_the_codebooks_own_term_has_the_factor_of_a_quarter():
    model = vq_model()
    latents = model.encode_to_prequant(pictures()).detach().requires_grad_()
    _, loss, (_, _, codes) = model.quantize(latents)
    loss.backward()
    entries = model.quantize.embedding.weight.detach()[codes].reshape(2, 8, 8, 4).permute(0, 3, 1, 2)
    difference = latents.detach() - entries
    assert loss.item() == pytest.approx(1.25 * difference.square().mean().item(), rel=1e-5)
    assert torch.allclose(latents.grad, 2 * difference / difference.numel(), atol=1e-7)
    pull = torch.zeros(8, 4).index_add_(0, codes, -0.25 * 2 * difference.permute(0, 2, 3, 1).reshape(-1, 4))
    assert torch.allclose(model.quantize.embedding.weight.grad, pull / difference.numel(), atol=1e-7)


@torch.no_grad()
def test_codes_can_be_given_in_the_latents_shape():
    codes = vq_model(sane_index_shape=True).encode(pictures())[2][2]
    assert codes.shape == (2, 8, 8)
    assert torch.equal(codes.flatten(), vq_model().encode(pictures())[2][2])


@torch.no_grad()
def test_decoding_codes_is_decoding_their_latents():
    model = vq_model(sane_index_shape=True)
    quant, _, (_, _, codes) = model.encode(pictures())
    assert torch.allclose(model.decode_code(codes), model.decode(quant), atol=1e-5)


def test_codes_without_a_shape_cannot_be_decoded():
    with pytest.raises(ValueError, match="batch, height, width"):
        vq_model().decode_code(torch.zeros(64, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("kind", [VQModel, VQModelInterface])
def test_the_forward_pass_encodes_quantises_and_decodes(kind):
    plain = vq_model()
    quant, codebook_loss, (_, _, codes) = plain.encode(pictures())
    reconstructions, found_loss, found_codes = vq_model(kind)(pictures(), return_pred_indices=True)
    assert torch.equal(reconstructions, plain.decode(quant))
    assert torch.equal(found_loss, codebook_loss)
    assert torch.equal(found_codes, codes)
    assert len(vq_model(kind)(pictures())) == 2


@torch.no_grad()
def test_the_interface_quantises_on_the_way_out_and_not_on_the_way_in():
    plain, interface = vq_model(), vq_model(VQModelInterface)
    latents = interface.encode(pictures())
    assert torch.equal(latents, plain.encode_to_prequant(pictures()))
    assert torch.equal(interface.decode(latents), plain(pictures())[0])
    assert torch.equal(interface.decode(latents, force_not_quantize=True), plain.decode(latents))


def test_the_vq_model_has_the_lineages_keys():
    keys = set(vq_model(lossconfig=lossconfig("vq")).state_dict())
    parts = {key.partition(".")[0] for key in keys}
    assert parts == {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv", "loss"}
    assert "quantize.embedding.weight" in keys
    assert "loss.discriminator.main.0.weight" in keys


@pytest.mark.parametrize(("build", "double_z"), [(kl_model, False), (vq_model, True)])
def test_a_model_with_the_other_kinds_latents_is_refused(build, double_z):
    with pytest.raises(ValueError, match="double_z"):
        build(ddconfig=ddconfig(double_z))


def test_codes_in_use_can_be_renumbered(tmp_path):
    np.save(tmp_path / "used.npy", np.arange(8)[::-1].copy())
    codes = vq_model().encode(pictures())[2][2]
    renumbered = vq_model(remap=str(tmp_path / "used.npy")).encode(pictures())[2][2]
    assert torch.equal(renumbered.flatten(), 7 - codes)


def test_the_first_batches_have_the_largest_size_of_the_range_and_later_ones_any(monkeypatch):
    model = vq_model(batch_resize_range=(16, 48))
    rows = [torch.tensor([[23, 0, item, 0]]) for item in range(40)]
    assert {model._draw_size(row) for row in rows} == {48}
    monkeypatch.setattr(VQModel, "global_step", 5)
    assert {model._draw_size(row) for row in rows} == {16, 32, 48}


# --- moving averages ---------------------------------------------------------------------------------------


def test_the_averages_follow_all_that_is_trained_under_the_lineages_names():
    model = vq_model(lossconfig=lossconfig("vq"), use_ema=True)
    names = {key.removeprefix("model_ema.") for key in model.state_dict() if key.startswith("model_ema.")}
    trained = {name.replace(".", "") for name, parameter in model.named_parameters()}
    assert names == trained | {"decay", "num_updates"}
    assert {"quantizeembeddingweight", "lossdiscriminatormain0weight"} <= names


def test_the_averages_are_there_inside_their_scope_alone():
    model = vq_model(use_ema=True)
    live = model.quantize.embedding.weight.clone()
    average = model.model_ema.quantizeembeddingweight
    assert not torch.equal(average, live)
    with model.ema_scope():
        assert torch.equal(model.quantize.embedding.weight, average)
    assert torch.equal(model.quantize.embedding.weight, live)


def test_averages_that_a_file_lacks_start_from_its_weights():
    model = vq_model(use_ema=True)
    weights = {key: torch.randn_like(value) for key, value in vq_model().state_dict().items()}
    load_weights(model, weights, source="file")
    assert torch.equal(model.model_ema.quantizeembeddingweight, weights["quantize.embedding.weight"])


def test_a_file_with_the_loss_of_its_training_loads_into_a_model_without(tmp_path):
    trained = vq_model(lossconfig=lossconfig("vq"))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "vq.ckpt")
    model = vq_model(VQModelInterface, ckpt_path=str(tmp_path / "vq.ckpt"))
    assert torch.equal(model.decoder.conv_out.weight, trained.decoder.conv_out.weight)


def test_lpips_in_a_file_is_passed_over_by_a_model_without_it():
    model = vq_model(lossconfig=lossconfig("vq"))
    extra = {"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}
    report = load_weights(model, model.state_dict() | extra, source="file")
    assert any("LPIPS" in note for note in report.notes)


def test_a_loss_that_does_not_fit_is_an_error_where_the_model_has_one():
    model = vq_model(lossconfig=lossconfig("vq"))
    extra = {"loss.discriminator.main.99.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"main\.99"):
        load_weights(model, model.state_dict() | extra, source="file")


# --- optimisers --------------------------------------------------------------------------------------------


def names_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize(("kind", "build"), [("kl", kl_model), ("vq", vq_model)])
def test_two_optimisers_share_the_parameters(kind, build):
    model = build(lossconfig=lossconfig(kind))
    model.learning_rate = 1e-3
    (autoencoder, discriminator), _ = model.configure_optimizers()
    judges = names_of(model, discriminator)
    assert all(name.startswith("loss.discriminator.") for name in judges)
    assert names_of(model, autoencoder) == {name for name, _ in model.named_parameters()} - judges
    assert ("loss.logvar" in names_of(model, autoencoder)) == (kind == "kl")
    for optimizer in (autoencoder, discriminator):
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
        assert optimizer.param_groups[0]["lr"] == 1e-3


def test_the_autoencoders_learning_rate_has_a_factor_of_its_own():
    model = vq_model(lossconfig=lossconfig("vq"), lr_g_factor=2.5)
    model.learning_rate = 1e-3
    rates = [optimizer.param_groups[0]["lr"] for optimizer in model.configure_optimizers()[0]]
    assert rates == [2.5e-3, 1e-3]


def test_both_optimisers_follow_the_learning_rate_schedule():
    schedule = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [10], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]},
    }
    model = vq_model(lossconfig=lossconfig("vq"), scheduler_config=schedule)
    model.learning_rate = 1e-3
    optimizers, schedulers = model.configure_optimizers()
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([1e-4, 1e-4])
    assert [scheduler["interval"] for scheduler in schedulers] == ["step", "step"]


@pytest.mark.parametrize("build", [kl_model, vq_model])
def test_a_loss_without_discriminator_cannot_be_trained_with(build):
    with pytest.raises(ValueError, match="LPIPSWithDiscriminator"):
        build().configure_optimizers()


# --- draws and pictures ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_reconstruction_depends_on_its_own_exposure_alone():
    model = kl_model()
    rows = torch.tensor([[23, 0, 1, 0], [23, 0, 2, 0]])
    both, _ = model.reconstruct(pictures(), rows, "posterior")
    second, _ = model.reconstruct(pictures()[1:], rows[1:], "posterior")
    other, _ = model.reconstruct(pictures()[1:], rows[1:], "posterior_discriminator")
    assert torch.allclose(both[1:], second, atol=1e-5)
    assert not torch.allclose(other, second, atol=1e-3)


def test_the_kl_models_rows_are_inputs_reconstructions_and_samples():
    rows = kl_model().log_images(picture_batch(3), N=2)
    shapes = {name: tuple(row.shape) for name, row in rows.items()}
    assert shapes == dict.fromkeys(("inputs", "reconstructions", "samples"), (2, 3, 16, 16))
    assert torch.equal(rows["inputs"], picture_batch(3)["image"][:2].permute(0, 3, 1, 2))


def test_the_vq_models_rows_can_show_the_averaged_weights():
    rows = vq_model(use_ema=True).log_images(picture_batch(), plot_ema=True)
    assert set(rows) == {"inputs", "reconstructions", "reconstructions_ema"}
    assert not torch.equal(rows["reconstructions"], rows["reconstructions_ema"])


def test_maps_of_many_channels_are_shown_in_colours():
    coloured = kl_model(colorize_nlabels=5).to_rgb(torch.rand(2, 5, 8, 8))
    assert coloured.shape == (2, 3, 8, 8)
    assert (coloured.min().item(), coloured.max().item()) == pytest.approx((-1.0, 1.0))


# --- in a diffusion model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusion() -> LatentDiffusion:
    torch.manual_seed(0)
    params = {"embed_dim": 4, "n_embed": 8, "ddconfig": ddconfig(False), "lossconfig": IDENTITY}
    model = LatentDiffusion(
        unet_config=unet_config(),
        first_stage_config={"target": "ldm.models.autoencoder.VQModelInterface", "params": params},
        cond_stage_config="__is_unconditional__",
        image_size=8,
        channels=4,
        scale_factor=0.5,
        use_ema=False,
    )
    torch.nn.init.normal_(model.first_stage_model.quantize.embedding.weight, std=0.5)
    return with_random_weights(model).eval()


def test_a_diffusion_model_takes_scaled_latents_that_are_no_codes(diffusion):
    z = diffusion.get_input(picture_batch(), "image")[0]
    images = picture_batch()["image"].permute(0, 3, 1, 2)
    assert torch.allclose(z, 0.5 * diffusion.first_stage_model.encode_to_prequant(images), atol=1e-6)


def test_a_diffusion_model_decodes_the_nearest_codes_unless_told_not_to(diffusion):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    first_stage = diffusion.first_stage_model
    assert torch.equal(diffusion.decode_first_stage(z), first_stage.decode(z / 0.5))
    as_it_is = first_stage.decode(z / 0.5, force_not_quantize=True)
    assert torch.equal(diffusion.decode_first_stage(z, force_not_quantize=True), as_it_is)
    assert not torch.equal(diffusion.decode_first_stage(z), as_it_is)


def test_a_diffusion_model_decodes_scores_of_codes(diffusion):
    scores = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    first_stage = diffusion.first_stage_model
    entries = first_stage.quantize.embedding.weight[scores.argmax(dim=1)].permute(0, 3, 1, 2)
    expected = first_stage.decode(entries / 0.5, force_not_quantize=True)
    assert torch.allclose(diffusion.decode_first_stage(scores, predict_cids=True), expected, atol=1e-6)


def test_a_sampler_can_take_the_nearest_codes_at_each_step(diffusion):
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = DDIMSampler(diffusion)
    _, steps = sampler.sample(5, 1, (4, 8, 8), eta=0.0, x_T=start, quantize_x0=True, verbose=False, log_every_t=1)
    last = steps["pred_x0"][-1]
    assert torch.allclose(diffusion.first_stage_model.quantize(last)[0], last, atol=1e-6)


def test_a_plain_vq_model_as_first_stage_is_an_error_that_names_the_right_one(diffusion):
    with pytest.raises(ValueError, match="VQModelInterface"):
        diffusion.get_first_stage_encoding(vq_model().encode(pictures()))


# --- shipped configs ---------------------------------------------------------------------------------------


def build_on_meta(path: Path) -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate_from_config(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])


def test_there_are_configs_to_build():
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_builds_without_files_of_weights(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert build_on_meta(path).monitor == "val/rec_loss"


@pytest.mark.parametrize("size", ["8x8x64", "16x16x16", "32x32x4", "64x64x3"])
def test_a_kl_config_gives_latents_of_the_size_in_its_name(size):
    height, width, channels = map(int, size.split("x"))
    model = build_on_meta(ROOT / "configs" / "autoencoder" / f"autoencoder_kl_{size}.yaml")
    latents = model.encode(torch.empty(1, 3, 256, 256, device="meta")).mode()
    assert latents.shape == (1, channels, height, width)
    assert model.decode(latents).shape == (1, 3, 256, 256)


@pytest.mark.parametrize(("factor", "shape"), [(4, (1, 3, 64, 64)), (8, (1, 4, 32, 32))])
def test_a_vq_config_gives_latents_of_the_factor_in_its_name(factor, shape):
    model = build_on_meta(ROOT / "configs" / "autoencoder" / f"autoencoder_vq_f{factor}.yaml")
    assert model.encode_to_prequant(torch.empty(1, 3, 256, 256, device="meta")).shape == shape


def test_the_autoencoder_with_factor_8_has_stable_diffusions_number_of_parameters():
    model = build_on_meta(ROOT / "configs" / "autoencoder" / "autoencoder_kl_32x32x4.yaml")
    count = sum(value.numel() for name, value in model.named_parameters() if not name.startswith("loss."))
    assert count == 83_653_863


@torch.no_grad()
@pytest.mark.parametrize("encode_slice", [1, 2, 3, 8])
def test_pictures_encoded_in_slices_are_those_encoded_at_once(encode_slice):
    # Convolutions of another batch size may add in another order.
    whole = kl_model().encode(pictures(5)).parameters
    sliced = kl_model(encode_slice=encode_slice).encode(pictures(5)).parameters
    assert sliced.stride() == whole.stride()
    assert torch.allclose(sliced, whole, atol=1e-6)


@torch.no_grad()
def test_no_more_pictures_are_encoded_at_once_than_a_slice():
    model, seen = kl_model(encode_slice=2), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    model.encode(pictures(5))
    assert seen == [2, 2, 1]


def test_a_slice_of_no_pictures_is_refused():
    with pytest.raises(ValueError, match="encode_slice is 0; give 1 or more"):
        kl_model(encode_slice=0)
