"""The first stages' losses, against numbers worked out by hand and an independent LPIPS."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator, VQLPIPSWithDiscriminator
from ldm.modules.losses.lpips import LocalLPIPS
from ldm.modules.losses.vqperceptual import measure_perplexity


class Doubled(nn.Module):
    """A discriminator whose logits are twice the picture."""

    def forward(self, x):
        return 2.0 * x


def kl_loss(**params):
    defaults = {"disc_start": 100, "perceptual_weight": 0.0, "disc_num_layers": 1}
    loss = LPIPSWithDiscriminator(**(defaults | params))
    loss.discriminator = Doubled()
    return loss


def vq_loss(**params):
    defaults = {"disc_start": 100, "perceptual_weight": 0.0, "disc_num_layers": 1}
    loss = VQLPIPSWithDiscriminator(**(defaults | params))
    loss.discriminator = Doubled()
    return loss


# Two pictures of one channel and 1x2 pixels; the "decoder" multiplies by its last layer, which is 1.
X = torch.tensor([1.0, 0.0, -1.0, 0.5]).reshape(2, 1, 1, 2)
Z = torch.tensor([0.5, 0.5, -0.5, 0.25]).reshape(2, 1, 1, 2)
POSTERIOR = DiagonalGaussianDistribution(torch.tensor([1.0, 0.0, 2.0, math.log(4.0)]).reshape(2, 2, 1, 1))

# |x - rec| = 0.5, 0.5, 0.5, 0.25: 1.75 in all, and 1.75 / 2 pictures.
NLL = 0.875
# d|x - wz|/dw = -sign(x - wz) z = -0.5, +0.5, -0.5, -0.25: -0.75 in all.
NLL_GRADIENT = 0.75 / 2
# g = -mean(2 w z) = -0.375, and so is its derivative.
G = -0.375
# (1 + 1 - 1 - 0) / 2 for mean 1, variance 1; (4 + 4 - 1 - log 4) / 2 for mean 2, variance 4; over 2 pictures.
KL = (0.5 + (7.0 - math.log(4.0)) / 2) / 2
WEIGHT = NLL_GRADIENT / (0.375 + 1e-4)


def generator_pass(loss, step=100, **more):
    last_layer = torch.ones(1, requires_grad=True)
    return loss(X, last_layer * Z, POSTERIOR, 0, step, last_layer=last_layer, **more)


def test_the_kl_loss_sums_over_pixels_and_averages_over_pictures():
    value, logged = generator_pass(kl_loss(disc_factor=0.0, kl_weight=0.1))
    assert value.item() == pytest.approx(NLL + 0.1 * KL)
    assert logged["train/nll_loss"].item() == pytest.approx(NLL)
    assert logged["train/kl_loss"].item() == pytest.approx(KL)
    assert logged["train/rec_loss"].item() == pytest.approx(1.75 / 4)


def test_the_learned_log_variance_scales_the_error_and_is_added_for_each_pixel():
    value, logged = generator_pass(kl_loss(disc_factor=0.0, kl_weight=0.0, logvar_init=0.3))
    assert value.item() == pytest.approx((1.75 / math.exp(0.3) + 4 * 0.3) / 2)
    assert logged["train/logvar"].item() == pytest.approx(0.3)


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1, 1)])
def test_weights_apply_to_the_total_and_not_to_the_logged_likelihood(shape):
    weights = torch.tensor([0.5, 2.0]).reshape(shape)
    value, logged = generator_pass(kl_loss(disc_factor=0.0, kl_weight=0.0), weights=weights)
    assert value.item() == pytest.approx((0.5 * 1.0 + 2.0 * 0.75) / 2)
    assert logged["train/nll_loss"].item() == pytest.approx(NLL)


def test_the_adversarial_term_is_weighed_by_the_gradients_at_the_last_layer():
    value, logged = generator_pass(kl_loss(kl_weight=0.0, disc_weight=0.5, disc_factor=0.8))
    assert logged["train/d_weight"].item() == pytest.approx(0.5 * WEIGHT)
    assert logged["train/g_loss"].item() == pytest.approx(G)
    assert value.item() == pytest.approx(NLL + 0.5 * WEIGHT * 0.8 * G)
    assert logged["train/total_loss"].item() == pytest.approx(value.item())


def test_no_gradient_runs_through_the_adaptive_weight():
    last_layer = torch.ones(1, requires_grad=True)
    value, _ = kl_loss(kl_weight=0.0)(X, last_layer * Z, POSTERIOR, 0, 100, last_layer=last_layer)
    value.backward()
    assert last_layer.grad.item() == pytest.approx(-NLL_GRADIENT - WEIGHT * 0.375)


@pytest.mark.parametrize(("step", "factor"), [(99, 0.0), (100, 1.0)])
def test_the_discriminator_counts_from_disc_start_on(step, factor):
    value, logged = generator_pass(kl_loss(kl_weight=0.0), step)
    assert logged["train/disc_factor"].item() == factor
    assert value.item() == pytest.approx(NLL + WEIGHT * factor * G)
    assert logged["train/d_weight"].item() == pytest.approx(WEIGHT)


def test_the_adaptive_weight_is_bounded():
    loss = kl_loss()
    small = torch.full((), 1e-9, requires_grad=True)
    assert loss.calculate_adaptive_weight(small * 5.0, small * 1e-12, small).item() == pytest.approx(1e4)


def test_without_gradients_the_adaptive_weight_is_zero():
    with torch.no_grad():
        value, logged = kl_loss(kl_weight=0.0).eval()(X, Z, POSTERIOR, 0, 100, split="val")
    assert logged["val/d_weight"].item() == 0.0
    assert value.item() == pytest.approx(NLL)


@pytest.mark.parametrize("last_layer", [None, torch.ones(1, requires_grad=True)], ids=["missing", "another's"])
def test_in_training_the_last_layer_must_be_the_one_that_made_the_reconstructions(last_layer):
    with pytest.raises(ValueError, match="last_layer"):
        kl_loss()(X, Z.clone().requires_grad_(), POSTERIOR, 0, 100, last_layer=last_layer)


def test_in_evaluation_detached_reconstructions_have_no_adaptive_weight():
    last_layer = torch.ones(1, requires_grad=True)
    _, logged = kl_loss().eval()(X, Z, POSTERIOR, 0, 100, last_layer=last_layer)
    assert logged["train/d_weight"].item() == 0.0


def test_the_hinge_loss_of_the_discriminator():
    value, logged = kl_loss(disc_factor=0.8)(X, Z, POSTERIOR, 1, 100)
    # Logits: real 2, 0, -2, 1 and fake 1, 1, -1, 0.5.
    assert value.item() == pytest.approx(0.8 * 0.5 * ((0 + 1 + 3 + 0) / 4 + (2 + 2 + 0 + 1.5) / 4))
    assert logged["train/logits_real"].item() == pytest.approx(0.25)
    assert logged["train/logits_fake"].item() == pytest.approx(0.375)
    assert logged["train/disc_loss"].item() == pytest.approx(value.item())


def test_the_vanilla_loss_of_the_discriminator():
    value, _ = kl_loss(disc_loss="vanilla")(X, Z, POSTERIOR, 1, 100)
    real = sum(math.log1p(math.exp(-logit)) for logit in (2, 0, -2, 1)) / 4
    fake = sum(math.log1p(math.exp(logit)) for logit in (1, 1, -1, 0.5)) / 4
    assert value.item() == pytest.approx(0.5 * (real + fake))


def test_the_discriminators_loss_is_zero_before_disc_start():
    assert kl_loss()(X, Z, POSTERIOR, 1, 99)[0].item() == 0.0


def test_the_discriminators_pass_gives_the_autoencoder_no_gradient():
    reconstructions = Z.clone().requires_grad_()
    value, _ = kl_loss()(X, reconstructions, POSTERIOR, 1, 100)
    assert not value.requires_grad


def test_scaling_the_loss_in_place_leaves_the_logged_figures_alone():
    for loss, index in ((kl_loss(), 0), (kl_loss(), 1)):
        last_layer = torch.ones(1, requires_grad=True)
        value, logged = loss(X, last_layer * Z, POSTERIOR, index, 100, last_layer=last_layer)
        before = {name: figure.item() for name, figure in logged.items()}
        with torch.no_grad():
            value.mul_(0.5)
        assert {name: figure.item() for name, figure in logged.items()} == before


def test_the_discriminator_looks_once_in_the_generators_pass_and_twice_in_its_own():
    loss = LPIPSWithDiscriminator(disc_start=0, perceptual_weight=0.0, disc_num_layers=2)
    pictures = torch.zeros(2, 3, 32, 32)
    seen = []
    for index in (0, 1):
        with torch.no_grad():
            loss(pictures, pictures, POSTERIOR, index, 0)
        seen.append(int(loss.discriminator.main[3].num_batches_tracked))
    assert seen == [1, 3]


def test_a_conditional_discriminator_sees_the_condition_beside_the_picture():
    loss = LPIPSWithDiscriminator(
        disc_start=0, perceptual_weight=0.0, disc_num_layers=1, disc_in_channels=2, disc_conditional=True
    )
    loss.discriminator = nn.Conv2d(2, 1, 1, bias=False)
    nn.init.constant_(loss.discriminator.weight, 1.0)
    _, logged = loss(X, Z, POSTERIOR, 1, 0, cond=torch.full_like(X, 10.0))
    assert logged["train/logits_real"].item() == pytest.approx(10.125)


@pytest.mark.parametrize(("conditional", "cond"), [(True, None), (False, X)])
def test_a_condition_that_does_not_fit_the_discriminator_is_refused(conditional, cond):
    with pytest.raises(ValueError, match="disc_conditional"):
        kl_loss(disc_conditional=conditional)(X, Z, POSTERIOR, 1, 0, cond=cond)


@pytest.mark.parametrize("kind", [LPIPSWithDiscriminator, VQLPIPSWithDiscriminator])
@pytest.mark.parametrize(
    ("params", "words"), [({"disc_loss": "wasserstein"}, "hinge"), ({"perceptual_weight": -1.0}, "0 or more")]
)
def test_a_wrong_setting_is_named(kind, params, words):
    with pytest.raises(ValueError, match=words):
        kind(**({"disc_start": 0, "perceptual_weight": 0.0} | params))


def test_the_kl_loss_logs_the_lineages_names():
    loss = kl_loss().eval()
    names = {name for index in (0, 1) for name in loss(X, Z, POSTERIOR, index, 0, split="val")[1]}
    figures = "total_loss logvar kl_loss nll_loss rec_loss d_weight disc_factor g_loss"
    figures += " disc_loss logits_real logits_fake"
    assert names == {f"val/{figure}" for figure in figures.split()}


def test_without_perceptual_weight_no_lpips_is_built():
    parts = {name.partition(".")[0] for name in kl_loss().state_dict()}
    assert parts == {"logvar"}
    assert not hasattr(vq_loss(), "perceptual_loss")


# --- VQ ----------------------------------------------------------------------------------------------------


def test_the_vq_loss_averages_over_all_and_adds_the_codebooks_loss():
    last_layer = torch.ones(1, requires_grad=True)
    loss = vq_loss(codebook_weight=0.3, disc_weight=0.75)
    value, logged = loss(torch.tensor([2.0, 4.0]), X, last_layer * Z, 0, 100, last_layer=last_layer)
    weight = 0.75 * (0.75 / 4) / (0.375 + 1e-4)
    assert logged["train/d_weight"].item() == pytest.approx(weight)
    assert value.item() == pytest.approx(1.75 / 4 + weight * G + 0.3 * 3.0)
    assert logged["train/quant_loss"].item() == pytest.approx(3.0)


def test_the_vq_loss_can_square_the_error_and_do_without_codebook_loss():
    with torch.no_grad():
        value, _ = vq_loss(pixel_loss="l2")(None, X, Z, 0, 0)
    assert value.item() == pytest.approx((3 * 0.25 + 0.0625) / 4)


def test_the_vq_loss_judges_as_the_kl_loss_does():
    assert vq_loss()(None, X, Z, 1, 100)[0] == kl_loss()(X, Z, POSTERIOR, 1, 100)[0]


def test_the_vq_loss_logs_the_lineages_names_and_the_codebooks_use():
    codes = torch.tensor([0, 0, 3, 3])
    names = set()
    for index in (0, 1):
        _, logged = vq_loss(n_classes=8).eval()(torch.tensor(0.0), X, Z, index, 0, predicted_indices=codes)
        names |= set(logged)
    figures = "total_loss quant_loss nll_loss rec_loss p_loss d_weight disc_factor g_loss perplexity cluster_usage"
    figures += " disc_loss logits_real logits_fake"
    assert names == {f"train/{figure}" for figure in figures.split()}


def test_the_perplexity_counts_codes_that_are_used_alike():
    perplexity, used = measure_perplexity(torch.tensor([[0, 0], [3, 3]]), 8)
    assert perplexity.item() == pytest.approx(2.0)
    assert used == 2


@pytest.mark.parametrize("params", [{"pixel_loss": "l3"}, {"perceptual_loss": "clips"}])
def test_an_unknown_kind_of_error_is_named(params):
    with pytest.raises(ValueError, match=next(iter(params))):
        VQLPIPSWithDiscriminator(disc_start=0, perceptual_weight=0.0, **params)


# --- LPIPS -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory):
    """A folder with files of LPIPS and VGG16 weights, random and in half precision."""
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        vgg = torchvision.models.vgg16(weights=None).features.state_dict()
    features = {}
    for name, value in vgg.items():
        fan_in = math.prod(value.shape[1:]) if value.ndim > 1 else 100
        values = torch.randn(value.shape, generator=generator) * math.sqrt(2 / fan_in)
        features[f"features.{name}"] = values.half()
    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(features, checkpoints / "vgg16-397923af.pth")
    linear = folder / "taming" / "modules" / "autoencoder" / "lpips"
    linear.mkdir(parents=True)
    weights = {
        f"lin{index}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for index, channels in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(weights, linear / "vgg.pth")
    return folder


@pytest.fixture
def in_weights_folder(weight_files, monkeypatch):
    monkeypatch.chdir(weight_files)
    monkeypatch.setenv("TORCH_HOME", str(weight_files / "torch"))
    return weight_files


def pictures(seed):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def independent_lpips(folder: Path, one, two):
    """The distance from its paper: normalised features' squared differences, weighed and averaged."""
    weights = torch.load(folder / "torch/hub/checkpoints/vgg16-397923af.pth", weights_only=True)
    linear = torch.load(folder / "taming/modules/autoencoder/lpips/vgg.pth", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1)
    x = (torch.cat([one, two]) - shift) / scale
    total, number = 0.0, 0
    for level, count in enumerate((2, 2, 3, 3, 3)):
        if level:
            x, number = nn.functional.max_pool2d(x, 2), number + 1
        for _ in range(count):
            kernel, bias = (weights[f"features.{number}.{kind}"].float() for kind in ("weight", "bias"))
            x, number = nn.functional.conv2d(x, kernel, bias, padding=1).relu(), number + 2
        unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
        squares = (unit[: len(one)] - unit[len(one) :]).square()
        total = total + (squares * linear[f"lin{level}.model.1.weight"]).sum(dim=1).mean(dim=(1, 2))
    return total


def test_lpips_from_local_files_is_the_papers_distance(in_weights_folder):
    with torch.no_grad():
        found = LocalLPIPS()(pictures(1), pictures(2)).flatten()
    assert torch.allclose(found, independent_lpips(in_weights_folder, pictures(1), pictures(2)), rtol=1e-4)


def test_the_perceptual_distance_is_added_to_each_pixels_error(in_weights_folder):
    one, two = pictures(1), pictures(2)
    with torch.no_grad():
        _, logged = VQLPIPSWithDiscriminator(disc_start=0, perceptual_weight=0.8)(None, one, two, 0, 0)
    distance = independent_lpips(in_weights_folder, one, two).mean().item()
    assert logged["train/p_loss"].item() == pytest.approx(distance, rel=1e-4)
    assert logged["train/rec_loss"].item() == pytest.approx((one - two).abs().mean().item() + 0.8 * distance, rel=1e-4)


def test_lpips_drops_nothing_out_in_training(in_weights_folder):
    loss = LPIPSWithDiscriminator(disc_start=0).train()
    assert not any(part.training for part in loss.perceptual_loss.modules())
    assert loss.discriminator.training


def test_lpips_is_frozen_and_has_the_lineages_keys(in_weights_folder):
    loss = LPIPSWithDiscriminator(disc_start=0)
    assert not any(parameter.requires_grad for parameter in loss.perceptual_loss.parameters())
    keys = {key for key in loss.state_dict() if key.startswith("perceptual_loss.")}
    assert {"perceptual_loss.scaling_layer.shift", "perceptual_loss.lin4.model.1.weight"} <= keys
    assert "perceptual_loss.net.slice5.28.bias" in keys
    assert len(keys) == 2 + 5 + 26


def test_missing_weights_are_named_with_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(OSError, match=r"lpips/vgg\.pth .*hub/checkpoints/vgg16-397923af\.pth") as caught:
        LPIPSWithDiscriminator(disc_start=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"other": torch.zeros(1)}, [1, 2]])
def test_a_file_of_something_else_is_refused(content, in_weights_folder, tmp_path, monkeypatch):
    folder = tmp_path / "taming/modules/autoencoder/lpips"
    folder.mkdir(parents=True)
    torch.save(content, folder / "vgg.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"vgg\.pth"):
        LPIPSWithDiscriminator(disc_start=0)


def test_no_file_is_needed_where_no_values_are_held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with torch.device("meta"):
        loss = LPIPSWithDiscriminator(disc_start=0)
    assert loss.perceptual_loss.net.slice1[0].weight.is_meta
