"""An independent witness: diffusers' and transformers' networks and schedulers give what ours give.

The bound is 1e-4 of the largest output in float32. Weights pass to the other side through the same names that
conversion writes, so that these tests hold the key maps too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.diffusers_format import FolderFormat
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.util import instantiate_from_config
from tests.parity.fill import fill
from tests.parity.recording import ASSETS

diffusers = pytest.importorskip("diffusers")

RELATIVE = 1e-4
LATENT_SHAPE = (4, 8, 8)
Contexts = tuple[Tensor, Tensor]
CAPTIONS = ["a photo of a cat", "two dogs, oil on canvas", ""]


def tiny() -> dict[str, Any]:
    params: Any = OmegaConf.to_container(OmegaConf.load(ASSETS / "tiny_A.yaml").model)
    return params


def wide() -> dict[str, Any]:
    """Three levels of 64 channels and more, the coarsest without attention, heads by width, two blocks a level."""
    model = tiny()
    params = model["params"]
    unet, dd = params["unet_config"]["params"], params["first_stage_config"]["params"]["ddconfig"]
    del unet["num_heads"]
    unet.update(
        model_channels=64,
        channel_mult=[1, 2, 3],
        num_res_blocks=2,
        attention_resolutions=[2, 1],
        num_head_channels=32,
        transformer_depth=2,
        context_dim=48,
    )
    dd.update(ch=64, ch_mult=[1, 1, 2, 2], num_res_blocks=2)
    text = params["cond_stage_config"]["params"]["text_config"]
    text.update(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3)
    return model


class Sides:
    """A model of ours, and its parts as diffusers and transformers build them."""

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        self.config = config
        self.ours = instantiate_from_config(config)
        fill(self.ours)
        self.ours.eval()
        self.layout = FolderFormat(config["params"])
        self.parts = self.layout.to_folder(self.ours.state_dict(), "ours")
        self.configs = self.layout.configs(self.ours.betas.tolist(), 0.18215)
        self.unet = _loaded(
            diffusers.UNet2DConditionModel.from_config(self.configs["unet/config.json"]), self.parts["unet"]
        )
        self.vae = _loaded(diffusers.AutoencoderKL.from_config(self.configs["vae/config.json"]), self.parts["vae"])
        text = CLIPTextModel(CLIPTextConfig(**self.configs["text_encoder/config.json"]))
        flat = {key.removeprefix("text_model."): value for key, value in self.parts["text_encoder"].items()}
        nested = next(iter(text.state_dict())).startswith("text_model.")
        self.text_encoder = _loaded(text, self.parts["text_encoder"] if nested else flat)


def _loaded(module: Any, weights: Mapping[str, Tensor]) -> Any:
    module.load_state_dict(dict(weights), strict=True)
    return module.eval()


@pytest.fixture(scope="module", params=[tiny, wide], ids=["tiny", "wide"])
def sides(request: pytest.FixtureRequest) -> Sides:
    return Sides(request.param())


@pytest.fixture(scope="module")
def contexts(sides: Sides) -> Contexts:
    with torch.no_grad():
        hidden = sides.ours.get_learned_conditioning(CAPTIONS)
    return hidden[:2], hidden[2:].repeat(2, 1, 1)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    size = float(theirs.abs().max())
    assert size > 0.01  # outputs of zeros would agree whatever the weights
    assert float((ours - theirs).abs().max()) <= RELATIVE * size


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_the_unets_agree(sides: Sides, contexts: Contexts, timestep: int) -> None:
    x, t = normals(2, *LATENT_SHAPE), torch.tensor([timestep, timestep])
    agree(sides.ours.apply_model(x, t, contexts[0]), sides.unet(x, t, contexts[0]).sample)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 24), (9, 7), (6, 11)])
def test_the_unets_agree_on_pictures_of_any_shape(sides: Sides, contexts: Contexts, size: tuple[int, int]) -> None:
    x, t = normals(2, 4, *size), torch.tensor([10, 800])
    agree(sides.ours.apply_model(x, t, contexts[0]), sides.unet(x, t, contexts[0]).sample)


@torch.no_grad()
def test_the_first_stages_encode_alike(sides: Sides) -> None:
    image = torch.tanh(normals(2, 3, 64, 32))
    ours, theirs = sides.ours.encode_first_stage(image), sides.vae.encode(image).latent_dist
    agree(ours.mode(), theirs.mode())
    agree(ours.logvar, theirs.logvar)


@torch.no_grad()
def test_the_first_stages_decode_alike(sides: Sides) -> None:
    z = normals(2, 4, 8, 8)
    agree(sides.ours.decode_first_stage(z * sides.ours.scale_factor), sides.vae.decode(z).sample)


@torch.no_grad()
def test_the_text_encoders_agree_on_the_same_captions(sides: Sides, contexts: Contexts) -> None:
    tokens = sides.ours.cond_stage_model.tokenize(CAPTIONS[:2])
    agree(contexts[0], sides.text_encoder(input_ids=tokens).last_hidden_state)


@torch.no_grad()
def denoise(sides: Sides, scheduler: Any, steps: int, x: Tensor, contexts: Contexts, scale: float) -> Tensor:
    """Sample with diffusers alone."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        batch = torch.full((2,), int(t))
        conditional, unconditional = (sides.unet(x, batch, context).sample for context in contexts)
        x = scheduler.step(unconditional + scale * (conditional - unconditional), t, x).prev_sample
    return x


def scheduler_config(sides: Sides) -> dict[str, Any]:
    config = dict(sides.configs["scheduler/scheduler_config.json"])
    for key in ("_class_name", "skip_prk_steps"):
        config.pop(key)
    return config


def sample(sides: Sides, sampler: Any, steps: int, x: Tensor, contexts: Contexts, scale: float) -> Tensor:
    latents, _ = sampler.sample(
        steps,
        2,
        LATENT_SHAPE,
        contexts[0],
        x_T=x,
        verbose=False,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=contexts[1],
    )
    return latents  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_ddim_latents_agree(sides: Sides, contexts: Contexts, steps: int, scale: float) -> None:
    scheduler = diffusers.DDIMScheduler(**scheduler_config(sides))
    scheduler.set_timesteps(steps)
    sampler = DDIMSampler(sides.ours)
    sampler.make_schedule(steps, verbose=False)
    assert scheduler.timesteps.tolist() == sampler.ddim_timesteps[::-1].tolist()
    x = normals(2, *LATENT_SHAPE, seed=1)
    agree(sample(sides, sampler, steps, x, contexts, scale), denoise(sides, scheduler, steps, x, contexts, scale))


@pytest.mark.parametrize("steps", [6, 16])
@pytest.mark.parametrize("to_zero", [False, True])
def test_dpm_solver_latents_agree(sides: Sides, contexts: Contexts, steps: int, to_zero: bool) -> None:
    config = {key: value for key, value in scheduler_config(sides).items() if key.startswith(("beta", "num", "pred"))}
    scheduler = diffusers.DPMSolverMultistepScheduler(**config, final_sigmas_type="zero" if to_zero else "sigma_min")
    sampler = DPMSolverSampler(sides.ours, denoise_to_zero=to_zero)
    x = normals(2, *LATENT_SHAPE, seed=2)
    agree(sample(sides, sampler, steps, x, contexts, 7.5), denoise(sides, scheduler, steps, x, contexts, 7.5))


def test_conversion_there_and_back_is_bit_exact(sides: Sides) -> None:
    own = sides.ours.state_dict()
    back = sides.layout.to_checkpoint(sides.parts, "ours")
    networks = {key for key in own if key.startswith(("model.", "first_stage_model.", "cond_stage_model."))}
    assert set(back) == networks
    assert all(torch.equal(back[key], own[key]) for key in networks)


# --- what we save, opened by others ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_what_we_save_opens_in_diffusers_pipeline_offline(
    sides: Sides,
    contexts: Contexts,
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    monkeypatch.syspath_prepend(str(project_root / "scripts"))
    import convert
    import prune_ckpt

    for name, content in sides.configs.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_text(json.dumps(content))
    convert.write_tokenizer(tmp_path / "local" / "tokenizer")
    torch.save({"state_dict": sides.ours.state_dict(), "global_step": 5}, tmp_path / "last.ckpt")
    out = tmp_path / f"shared.{ending}"
    assert prune_ckpt.main(["--ckpt", str(tmp_path / "last.ckpt"), "--out", str(out), "--full"]) == 0

    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        str(out), config=str(tmp_path / "local"), local_files_only=True
    )
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(sides, name).state_dict()
        found = getattr(pipeline, name).state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    ids = pipeline.tokenizer(CAPTIONS[:2], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, sides.ours.cond_stage_model.tokenize(CAPTIONS[:2]))


@pytest.fixture(scope="module")
def v1(project_root: Path) -> dict[str, Any]:
    """The real model's config."""
    file = project_root / "configs" / "stable-diffusion" / "v1-inference.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(file).model)
    return config


@pytest.fixture(scope="module")
def full_size(v1: dict[str, Any]) -> dict[str, Tensor]:
    """The real model's tensors, without their contents."""
    with torch.device("meta"):
        weights: dict[str, Tensor] = instantiate_from_config(v1).state_dict()
    return weights


def test_the_full_size_model_has_the_layout_by_which_web_uis_know_stable_diffusion_v1(
    full_size: dict[str, Tensor],
) -> None:
    unet = "model.diffusion_model."
    shapes = {key: tuple(value.shape) for key, value in full_size.items()}
    assert shapes[unet + "input_blocks.0.0.weight"] == (320, 4, 3, 3)  # 9 or 8 inputs: inpainting, InstructPix2Pix
    assert shapes[unet + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)  # 1024: version 2
    assert shapes[unet + "input_blocks.1.1.proj_in.weight"] == (320, 320, 1, 1)  # linear: version 2, SDXL
    assert shapes["cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.weight"] == (768,)
    assert shapes["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert shapes["first_stage_model.decoder.conv_in.weight"] == (512, 4, 3, 3)
    assert shapes["alphas_cumprod"] == (1000,)
    others = ("cond_stage_model.model.", "conditioner.", "cond_stage_model.roberta.", "embedder.", "depth_model.")
    assert not [key for key in full_size if key.startswith((*others, unet + "label_emb."))]


def test_the_full_size_names_are_those_of_diffusers_own_networks(
    full_size: dict[str, Tensor], project_root: Path
) -> None:
    config: Any = OmegaConf.to_container(
        OmegaConf.load(project_root / "configs" / "stable-diffusion" / "v1-inference.yaml").model
    )
    layout = FolderFormat(config["params"])
    parts = layout.to_folder(full_size, "full size")
    configs = layout.configs([0.1], 0.18215)
    with torch.device("meta"):
        built: dict[str, nn.Module] = {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet/config.json"]),
            "vae": diffusers.AutoencoderKL.from_config(configs["vae/config.json"]),
        }
    for part, module in built.items():
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert {key: tuple(value.shape) for key, value in parts[part].items()} == expected
    assert len(parts["unet"]) == 686
    assert len(parts["vae"]) == 248
