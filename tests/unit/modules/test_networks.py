from __future__ import annotations

import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, UNetModel, Upsample
from ldm.util import instantiate_from_config
from tests.unit.models.small import first_stage_config, unet_config


def build_unet(**params):
    torch.manual_seed(0)
    model = instantiate_from_config(unet_config(**params))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


OPTIONS = {
    "plain attention": {},
    "new attention order": {"use_new_attention_order": True},
    "head width": {"num_heads": -1, "num_head_channels": 16},
    "scale and shift": {"use_scale_shift_norm": True},
    "resampling blocks": {"resblock_updown": True, "channel_mult": [1, 2]},
    "pooling": {"conv_resample": False, "channel_mult": [1, 2]},
    "two transformers": {"use_spatial_transformer": True, "context_dim": 8, "transformer_depth": 2},
    "codebook ids": {"n_embed": 16},
}


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("name", OPTIONS)
def test_recomputing_activations_changes_no_gradient(name, size):
    x, t = torch.randn(2, 4, *size), torch.tensor([3, 500])
    context = torch.randn(2, 5, 8) if "context_dim" in OPTIONS[name] else None
    gradients = []
    for use_checkpoint in (False, True, 0.5):
        model = build_unet(use_checkpoint=use_checkpoint, **OPTIONS[name])
        model(x, t, context=context).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed, partly in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None) == (partly is None)
        assert plain is None or torch.allclose(plain, recomputed, atol=1e-7)
        assert plain is None or torch.equal(plain, partly)


def recomputed_blocks(**params):
    """Down-sampling factors of the input blocks that recompute."""
    model = build_unet(channel_mult=[1, 1, 1], num_res_blocks=1, **params)
    blocks = {1: model.input_blocks[1], 2: model.input_blocks[3], 4: model.input_blocks[5]}
    return [factor for factor, block in blocks.items() if block[0].use_checkpoint]


@pytest.mark.parametrize(
    ("share", "factors"), [(0.0, []), (0.25, [1]), (0.5, [1, 2]), (1, [1, 2, 4]), (True, [1, 2, 4])]
)
def test_a_share_of_blocks_that_recompute_begins_at_the_highest_resolution(share, factors):
    assert recomputed_blocks(use_checkpoint=share, attention_resolutions=[]) == factors


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_blocks_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="a share of blocks from 0 to 1"):
        build_unet(use_checkpoint=share)


@pytest.mark.parametrize("transformer", [False, True])
def test_recomputed_activations_drop_out_the_same_elements(transformer):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    params = {"use_spatial_transformer": True, "context_dim": 8} if transformer else {}
    context = torch.randn(2, 5, 8) if transformer else None
    gradients = []
    for use_checkpoint in (False, True):
        model = build_unet(use_checkpoint=use_checkpoint, dropout=0.5, **params).train()
        torch.manual_seed(7)
        model(x, t, context=context).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.allclose(plain, recomputed, atol=1e-7) for plain, recomputed in zip(*gradients, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (5, 8), (7, 10)])
@pytest.mark.parametrize("resampling", [{}, {"conv_resample": False}, {"resblock_updown": True}])
def test_the_unet_takes_latents_of_any_height_and_width(size, resampling):
    model = build_unet(channel_mult=[1, 1, 1], **resampling)
    assert model(torch.randn(1, 4, *size), torch.tensor([1])).shape == (1, 4, *size)


@torch.no_grad()
def test_a_class_conditional_unet_takes_latents_of_any_height_and_width():
    model = build_unet(channel_mult=[1, 1], num_classes=5)
    assert model(torch.randn(1, 4, 9, 7), torch.tensor([1]), y=torch.tensor([4])).shape == (1, 4, 9, 7)


@torch.no_grad()
@pytest.mark.parametrize("use_conv", [False, True])
def test_growing_to_twice_the_size_is_doubling(use_conv):
    layer, x = Upsample(4, use_conv), torch.randn(1, 4, 3, 5)
    assert torch.equal(layer(x, (6, 10)), layer(x))


@torch.no_grad()
def test_growing_to_an_odd_size_takes_the_nearest_neighbour():
    grown = Upsample(1, False)(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), (3, 4))
    assert grown[0, 0].tolist() == [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]


def test_a_first_stage_refuses_pictures_that_it_would_cut():
    model = instantiate_from_config(first_stage_config())
    with pytest.raises(ValueError, match=r"pictures of 14x9 pixels cannot be encoded: .* must be multiples of 2"):
        model.encode(torch.randn(1, 3, 9, 14))


@torch.no_grad()
@pytest.mark.parametrize("levels", [3, 4])
def test_a_first_stage_gives_pictures_of_multiples_of_its_factor_back_at_their_size(levels):
    config = first_stage_config()["params"]
    ddconfig = config["ddconfig"] | {"ch_mult": [1] * levels}
    model = AutoencoderKL(ddconfig, config["lossconfig"], config["embed_dim"])
    z = model.encode(torch.randn(1, 3, 72, 40)).mode()
    factor = 2 ** (levels - 1)
    assert z.shape == (1, 4, 72 // factor, 40 // factor)
    assert model.decode(z).shape == (1, 3, 72, 40)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"use_fp16": True}, "precision to 16-mixed"),
        ({"context_dim": 8}, "needed together"),
        ({"use_spatial_transformer": True}, "needed together"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
    ],
)
def test_contradictory_unet_settings_are_errors(params, message):
    with pytest.raises(ValueError, match=message):
        build_unet(**params)


def test_labels_are_refused_by_a_unet_without_classes():
    with pytest.raises(ValueError, match="num_classes"):
        build_unet()(torch.randn(1, 4, 8, 8), torch.tensor([1]), y=torch.tensor([1]))


def test_the_two_attention_orders_differ_only_in_the_order_of_channels():
    torch.manual_seed(0)
    legacy, new = AttentionBlock(32, num_heads=2), AttentionBlock(32, num_heads=2, use_new_attention_order=True)
    with torch.no_grad():
        legacy.proj_out.weight.normal_()
    new.load_state_dict(legacy.state_dict())
    reorder = lambda tensor: tensor.reshape(2, 3, 16, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)  # noqa: E731
    with torch.no_grad():
        new.qkv.weight.copy_(reorder(legacy.qkv.weight))
        new.qkv.bias.copy_(reorder(legacy.qkv.bias))
    x = torch.randn(2, 32, 4, 4)
    assert torch.allclose(legacy(x), new(x), atol=1e-6)


def test_hidden_context_positions_have_no_effect():
    torch.manual_seed(0)
    attention = CrossAttention(16, 8, heads=2, dim_head=8)
    x, context = torch.randn(1, 4, 16), torch.randn(1, 5, 8)
    mask = torch.tensor([[True, True, False, True, True]])
    changed = context.clone()
    changed[:, 2] += 10.0
    assert torch.allclose(attention(x, context, mask), attention(x, changed, mask))
    assert not torch.allclose(attention(x, context), attention(x, changed))


@pytest.mark.parametrize("attn_type", ["vanilla", "linear", "none"])
def test_the_first_stage_halves_mirror_each_other(attn_type):
    common = {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "in_channels": 3,
        "resolution": 16,
        "z_channels": 4,
        "attn_type": attn_type,
    }
    x = torch.randn(2, 3, 16, 24)
    features = Encoder(**common, double_z=False)(x)
    assert features.shape == (2, 4, 4, 6)
    assert Decoder(**common)(features).shape == x.shape


def test_an_unknown_attention_type_names_the_known_ones():
    with pytest.raises(ValueError, match="vanilla, linear or none"):
        Encoder(
            ch=32, out_ch=3, num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=8, z_channels=4,
            attn_type="memory",
        )  # fmt: skip


def test_a_misspelt_autoencoder_setting_names_the_nearest():
    params = first_stage_config()["params"]
    params["ddconfig"]["z_chanels"] = params["ddconfig"].pop("z_channels")
    with pytest.raises(ValueError, match="'z_chanels'; did you mean 'z_channels'"):
        AutoencoderKL(**params)


def test_the_unet_output_starts_at_zero():
    model = UNetModel(**unet_config()["params"])
    assert not model(torch.randn(1, 4, 8, 8), torch.tensor([1])).any()
