"""The sampling scripts make the pictures they are asked for, and refuse in one line what they cannot make."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import convert
import img2img
import inpaint
import make_tiny_checkpoint
import numpy as np
import pytest
import sample_diffusion
import sampling_common
import sampling_pictures
import torch
import txt2img
from omegaconf import OmegaConf
from PIL import Image

from ldm.util import instantiate_from_config
from tests.conftest import ROOT

CONFIG = str(make_tiny_checkpoint.DEFAULT_CONFIG)
PROMPT = "a cat, sitting: still"
ONE_LEVEL = 1
"""Batches of another size round differently, which may move a colour to its neighbour."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-to-image checkpoint, no weights of which are zero: with those every prompt would do the same."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.ckpt"
    make_tiny_checkpoint.make_tiny_checkpoint(Path(CONFIG), path, seed=0)
    content = torch.load(path, weights_only=True)
    fill_zeros(content["state_dict"])
    torch.save(content, path)
    return path


def fill_zeros(weights: dict[str, torch.Tensor]) -> None:
    """Make the UNet's weights that start at zero random."""
    generator = torch.Generator().manual_seed(1)
    for key, value in weights.items():
        if key.startswith("model.") and not value.any():
            weights[key] = torch.randn(value.shape, generator=generator) * 0.05


@pytest.fixture(scope="session")
def run_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training run leaves."""
    folder = tmp_path_factory.mktemp("logs") / "MyProject2026-10-25T20-37-40_MyProject"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "configs").mkdir()
    shutil.copy(tiny, folder / "checkpoints" / "last.ckpt")
    shutil.copy(CONFIG, folder / "configs" / "2026-10-25T20-37-40-project.yaml")
    return folder


@pytest.fixture(scope="session")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 64 x 48 pixels."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    gradient = np.stack(np.meshgrid(np.arange(64) * 4, np.arange(48) * 5), axis=-1)
    Image.fromarray(np.dstack([gradient, np.full((48, 64), 90)]).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """White between (17, 13) and (40, 30), black elsewhere, of 64 x 48 pixels."""
    path = tmp_path_factory.mktemp("masks") / "mask.png"
    picture = Image.new("L", (64, 48), 0)
    picture.paste(255, (17, 13, 40, 30))
    picture.save(path)
    return path


def words(tiny: Path, outdir: Path, *more: str) -> list[str]:
    given = ["--ckpt", str(tiny), "--config", CONFIG, "--outdir", str(outdir), "--ddim_steps", "2", "--device", "cpu"]
    return [*given, *more]


def draw(tiny: Path, outdir: Path, *more: str, script: Any = txt2img) -> list[np.ndarray]:
    """Run a script and read the pictures it makes."""
    prompt = [] if "--from-file" in more else ["--prompt", PROMPT]
    assert script.main(words(tiny, outdir, *prompt, *more)) == 0
    return [np.asarray(Image.open(path)) for path in sorted((outdir / "samples").glob("*.png"))]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= ONE_LEVEL


def refusal(script: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a script that must fail, and give its one line."""
    try:
        status = script.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1, said
    return said


@pytest.fixture(scope="session")
def chunking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model's config with captions of up to 225 tokens."""
    config: Any = OmegaConf.load(CONFIG)
    config.model.params.cond_stage_config.params.long_captions = "chunk"
    path = tmp_path_factory.mktemp("configs") / "chunking.yaml"
    OmegaConf.save(config, path)
    return str(path)


# --- text to image -------------------------------------------------------------------------------------------------


def test_pictures_and_a_grid_appear_as_compvis_names_them(tiny: Path, tmp_path: Path) -> None:
    draw(tiny, tmp_path, "--n_iter", "2", "--n_samples", "2", "--H", "32", "--W", "40")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert files == ["grid-0000.png", *(f"samples/{number:05}.png" for number in range(4))]
    assert Image.open(tmp_path / "samples/00003.png").size == (40, 32)
    assert Image.open(tmp_path / "grid-0000.png").size == (2 * 42 + 2, 2 * 34 + 2)


def test_the_size_is_the_models_own_where_none_is_given(tiny: Path, tmp_path: Path) -> None:
    (picture,) = draw(tiny, tmp_path, "--n_iter", "1", "--n_samples", "1")
    assert picture.shape == (64, 64, 3)


LONG_PROMPT = "a cat " * 60
ENDINGS = ("snow " * 80, "moon " * 80)
ONE_PICTURE = ("--n_iter", "1", "--n_samples", "1", "--scale", "30")


@pytest.mark.parametrize("sampler", [[], ["--dpm_solver"]])
def test_every_chunk_of_a_long_prompt_has_an_effect(
    tiny: Path, tmp_path: Path, chunking: str, sampler: list[str]
) -> None:
    arguments = (*ONE_PICTURE, *sampler, "--config", chunking)
    snow, moon = (draw(tiny, tmp_path / end[:4], *arguments, "--prompt", LONG_PROMPT + end)[0] for end in ENDINGS)
    assert not same(snow, moon)


def test_a_long_prompt_is_cut_without_chunks_and_says_so(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snow, moon = (draw(tiny, tmp_path / end[:4], *ONE_PICTURE, "--prompt", LONG_PROMPT + end)[0] for end in ENDINGS)
    assert same(snow, moon)
    assert "loses" in capsys.readouterr().out


def test_prompts_of_all_lengths_make_what_each_makes_alone(tiny: Path, tmp_path: Path, chunking: str) -> None:
    prompts = [LONG_PROMPT, "a dog", LONG_PROMPT * 2]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    arguments = (
        "--config",
        chunking,
        "--n_iter",
        "1",
        "--scale",
        "3",
        "--fixed_code",
        "--negative_prompt",
        "a hat " * 50,
    )
    together = draw(tiny, tmp_path / "all", *arguments, "--from-file", str(tmp_path / "prompts.txt"))
    for number, prompt in enumerate(prompts):
        (alone,) = draw(tiny, tmp_path / str(number), *arguments, "--n_samples", "1", "--prompt", prompt)
        assert same(together[number], alone)


def test_image_to_image_takes_long_prompts(tiny: Path, tmp_path: Path, chunking: str, photograph: Path) -> None:
    arguments = (*ONE_PICTURE, "--config", chunking, "--init-img", str(photograph), "--prompt", LONG_PROMPT)
    assert len(draw(tiny, tmp_path, *arguments, script=img2img)) == 1


def test_any_multiple_of_eight_is_a_size(tiny: Path, tmp_path: Path) -> None:
    pictures = draw(tiny, tmp_path, "--H", "72", "--W", "40", "--n_iter", "1", "--n_samples", "1")
    assert [picture.shape for picture in pictures] == [(72, 40, 3)]


def test_a_model_that_was_not_made_for_squares_has_its_own_width_and_height() -> None:
    stage = argparse.Namespace(downsampling_factor=4)
    model = argparse.Namespace(image_size=[16, 24], first_stage_model=stage)
    assert sampling_common.picture_size(model, None, None) == (96, 64)


def test_a_picture_tells_what_it_was_made_from(tiny: Path, tmp_path: Path) -> None:
    draw(tiny, tmp_path, "--n_iter", "1", "--n_samples", "2", "--negative_prompt", "blurry, grey", "--scale", "3")
    texts = Image.open(tmp_path / "samples/00001.png").info
    assert texts["parameters"] == (
        f"{PROMPT}\nNegative prompt: blurry, grey\n"
        "Steps: 2, Sampler: DDIM, CFG scale: 3, Seed: 43, Size: 64x64, Model: tiny"
    )
    assert (texts["prompt"], texts["negative_prompt"]) == (PROMPT, "blurry, grey")
    assert (texts["seed"], texts["sampler"], texts["steps"], texts["cfg_scale"]) == ("43", "DDIM", "2", "3")


def test_a_prompt_in_any_script_survives_in_the_metadata(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("eine Katze — 猫\n", encoding="utf-8")
    draw(tiny, tmp_path, "--n_iter", "1", "--from-file", str(prompts))
    assert Image.open(tmp_path / "samples/00000.png").info["prompt"] == "eine Katze — 猫"


def test_counting_goes_on_and_nothing_is_overwritten(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00006.png").write_bytes(b"precious")
    (tmp_path / "grid-0002.png").write_bytes(b"precious")
    assert txt2img.main(words(tiny, tmp_path, "--prompt", "", "--n_iter", "1", "--n_samples", "1")) == 0
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [
        "00006.png",
        "00007.png",
        "grid-0002.png",
        "grid-0003.png",
    ]
    assert (tmp_path / "samples" / "00006.png").read_bytes() == b"precious"


def test_single_pictures_or_the_grid_can_be_left_out(tiny: Path, tmp_path: Path) -> None:
    assert draw(tiny, tmp_path / "a", "--n_iter", "1", "--n_samples", "1", "--skip_save") == []
    draw(tiny, tmp_path / "b", "--n_iter", "1", "--n_samples", "1", "--skip_grid")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == ["a/grid-0000.png", "b/samples/00000.png"]


@pytest.mark.parametrize("sampler", [["--ddim_eta", "1"], ["--plms"], ["--dpm_solver"]])
def test_a_picture_depends_on_its_seed_and_not_on_how_many_are_made_together(
    tiny: Path, tmp_path: Path, sampler: list[str]
) -> None:
    together = draw(tiny, tmp_path / "a", "--n_iter", "1", "--n_samples", "3", *sampler)
    singly = draw(tiny, tmp_path / "b", "--n_iter", "3", "--n_samples", "1", *sampler)
    alone = draw(tiny, tmp_path / "c", "--n_iter", "1", "--n_samples", "1", "--seed", "44", *sampler)
    assert all(same(a, b) for a, b in zip(together, singly, strict=True))
    assert same(alone[0], together[2])
    assert not same(together[0], together[1])


def test_samplers_differ(tiny: Path, tmp_path: Path) -> None:
    made = [
        draw(tiny, tmp_path / str(number), "--n_iter", "1", "--n_samples", "1", *flags)[0]
        for number, flags in enumerate([[], ["--plms"], ["--dpm_solver"], ["--ddim_eta", "1"]])
    ]
    assert not any(same(a, b) for number, a in enumerate(made) for b in made[:number])


def test_prompts_of_a_file_give_a_picture_each(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n  a dog \na hat\n", encoding="utf-8")
    draw(tiny, tmp_path, "--n_iter", "1", "--n_samples", "2", "--from-file", str(prompts))
    texts = [Image.open(path).info for path in sorted((tmp_path / "samples").glob("*.png"))]
    assert [(text["prompt"], text["seed"]) for text in texts] == [("a cat", "42"), ("a dog", "43"), ("a hat", "44")]


def test_fixed_code_starts_every_picture_from_the_same_noise(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na cat\n", encoding="utf-8")
    made = draw(tiny, tmp_path, "--n_iter", "1", "--fixed_code", "--from-file", str(prompts))
    assert same(made[0], made[2])


def test_fixed_code_repeats_the_noise_of_the_first_batch(tiny: Path, tmp_path: Path) -> None:
    made = draw(tiny, tmp_path, "--n_iter", "2", "--n_samples", "2", "--fixed_code")
    assert not same(made[0], made[1])
    assert same(made[0], made[2])
    assert same(made[1], made[3])


def test_a_first_stage_makes_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "kl.ckpt"
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}}, weights)
    config = ROOT / "configs" / "autoencoder" / "tiny_kl_f4.yaml"
    flags = ["--ckpt", str(weights), "--config", str(config), "--outdir", str(tmp_path / "out")]
    assert "AutoencoderKL, which is no diffusion model" in refusal(sample_diffusion, flags, capsys)


def test_the_negative_prompt_has_an_effect(tiny: Path, tmp_path: Path) -> None:
    plain = draw(tiny, tmp_path / "a", "--n_iter", "1", "--n_samples", "1")
    other = draw(tiny, tmp_path / "b", "--n_iter", "1", "--n_samples", "1", "--negative_prompt", "a dog")
    assert not same(plain[0], other[0])


def test_a_run_folder_brings_its_last_checkpoint_and_its_config(
    run_folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = ["--prompt", PROMPT, "--ddim_steps", "2", "--n_iter", "1", "--n_samples", "1", "--device", "cpu"]
    assert txt2img.main(["--ckpt", str(run_folder), "--outdir", str(tmp_path / "a"), *once]) == 0
    assert "last.ckpt by " in capsys.readouterr().out
    picture = Image.open(tmp_path / "a" / "samples" / "00000.png")
    assert same(np.asarray(picture), draw(tiny, tmp_path / "b", "--n_iter", "1", "--n_samples", "1")[0])
    assert picture.info["model"] == run_folder.name


def test_a_diffusers_folder_makes_the_same_pictures(tiny: Path, tmp_path: Path) -> None:
    assert convert.main([str(tiny), str(tmp_path / "folder"), "--config", CONFIG]) == 0
    once = ["--n_iter", "1", "--n_samples", "1"]
    assert same(draw(tmp_path / "folder", tmp_path / "a", *once)[0], draw(tiny, tmp_path / "b", *once)[0])


def with_moving_averages(tiny: Path, out: Path) -> Path:
    """Copy a checkpoint with averages beside its network's weights, and other weights in their place."""
    content = torch.load(tiny, weights_only=True)
    weights = content["state_dict"]
    for key in [key for key in weights if key.startswith("model.")]:
        weights["model_ema." + key.removeprefix("model.").replace(".", "")] = weights[key]
        weights[key] = weights[key] + 0.1
    weights |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    torch.save(content, out)
    return out


def test_averaged_weights_are_used_where_they_are_there(tiny: Path, tmp_path: Path) -> None:
    once = ["--n_iter", "1", "--n_samples", "1"]
    averaged = with_moving_averages(tiny, tmp_path / "ema.ckpt")
    expected = draw(tiny, tmp_path / "a", *once)[0]
    assert same(draw(averaged, tmp_path / "b", *once)[0], expected)
    assert not same(draw(averaged, tmp_path / "c", *once, "--no_ema")[0], expected)


# --- from pictures -------------------------------------------------------------------------------------------------


def test_image_to_image_keeps_the_pictures_size(tiny: Path, tmp_path: Path, photograph: Path) -> None:
    init = ["--init-img", str(photograph), "--n_iter", "1", "--n_samples", "2"]
    made = draw(tiny, tmp_path, *init, script=img2img)
    assert [picture.shape for picture in made] == [(48, 64, 3)] * 2
    assert "Denoising strength: 0.75" in Image.open(tmp_path / "samples/00000.png").info["parameters"]


@pytest.mark.parametrize("sampler", [[], ["--plms"], ["--dpm_solver"]])
def test_image_to_image_depends_on_the_picture_and_the_strength(
    tiny: Path, tmp_path: Path, photograph: Path, sampler: list[str]
) -> None:
    once = ["--n_iter", "1", "--n_samples", "1", "--ddim_steps", "4", *sampler]
    black = tmp_path / "black.png"
    Image.new("RGB", (64, 48)).save(black)
    made = [
        draw(tiny, tmp_path / str(number), "--init-img", str(init), "--strength", strength, *once, script=img2img)[0]
        for number, (init, strength) in enumerate([(photograph, "0.25"), (photograph, "1"), (black, "0.25")])
    ]
    assert not same(made[0], made[1])
    assert not same(made[0], made[2])


def test_image_to_image_cuts_an_odd_size_to_the_next_smaller_multiple(tiny: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.png"
    Image.new("RGBA", (45, 39), (0, 0, 0, 0)).save(odd)
    (made,) = draw(tiny, tmp_path, "--init-img", str(odd), "--n_iter", "1", "--n_samples", "1", script=img2img)
    assert made.shape == (32, 40, 3)


@pytest.mark.parametrize("flags", [[], ["--dpm_solver"], ["--strength", "0.5"]])
def test_inpainting_repaints_the_white_part_and_keeps_every_other_pixel(
    tiny: Path, tmp_path: Path, photograph: Path, mask: Path, flags: list[str]
) -> None:
    init = ["--init-img", str(photograph), "--mask", str(mask), "--n_iter", "1", "--n_samples", "2", *flags]
    original, white = np.asarray(Image.open(photograph)), np.asarray(Image.open(mask)) == 255
    for picture in draw(tiny, tmp_path, *init, script=inpaint):
        assert (picture[~white] == original[~white]).all()
        assert (picture[white] != original[white]).any(axis=-1).mean() > 0.9


def test_inpainted_pictures_do_not_depend_on_how_many_are_made_together(
    tiny: Path, tmp_path: Path, photograph: Path, mask: Path
) -> None:
    init = ["--init-img", str(photograph), "--mask", str(mask)]
    together = draw(tiny, tmp_path / "a", *init, "--n_iter", "1", "--n_samples", "2", script=inpaint)
    singly = draw(tiny, tmp_path / "b", *init, "--n_iter", "2", "--n_samples", "1", script=inpaint)
    assert all(same(a, b) for a, b in zip(together, singly, strict=True))


def test_a_latent_cell_with_any_repainted_pixel_is_repainted() -> None:
    repainted = np.zeros((8, 16), dtype=bool)
    repainted[3, 8] = True
    assert inpaint.latent_mask(repainted, 8).tolist() == [[[[1.0, 0.0]]]]


# --- models without text ---------------------------------------------------------------------------------------------


def save_model(folder: Path, changes: dict[str, Any], unet: dict[str, Any], remove: tuple[str, ...] = ()) -> list[str]:
    """Save a variant of the tiny model, and give the flags that name it."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIG), resolve=True)
    section = config["model"]  # type: ignore[index, call-overload]
    section["params"] |= changes
    section["params"]["unet_config"]["params"] |= unet
    for key in remove:
        section["params"]["unet_config"]["params"].pop(key)
    OmegaConf.save({"model": section}, folder / "model.yaml")
    torch.manual_seed(0)
    model = instantiate_from_config(section)
    weights = dict(model.state_dict())
    fill_zeros(weights)
    torch.save({"state_dict": weights}, folder / "model.ckpt")
    return ["--ckpt", str(folder / "model.ckpt"), "--config", str(folder / "model.yaml"), "--device", "cpu"]


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An unconditional model's flags."""
    changes = {"cond_stage_config": "__is_unconditional__", "conditioning_key": None, "cond_stage_trainable": False}
    folder = tmp_path_factory.mktemp("unconditional")
    return save_model(folder, changes, {"use_spatial_transformer": False}, remove=("context_dim", "transformer_depth"))


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a model of 5 classes."""
    embedder = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 64, "n_classes": 5, "key": "class_label"},
    }
    changes = {"cond_stage_config": embedder, "cond_stage_key": "class_label"}
    return save_model(tmp_path_factory.mktemp("classes"), changes, {})


def test_an_unconditional_model_makes_pictures(unconditional: list[str], tmp_path: Path) -> None:
    flags = [*unconditional, "--outdir", str(tmp_path), "--ddim_steps", "2", "--n_samples", "3", "--batch_size", "2"]
    assert sample_diffusion.main(flags) == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3
    texts = Image.open(tmp_path / "samples" / "00001.png").info
    assert texts["parameters"] == "Steps: 2, Sampler: DDIM, Seed: 43, Size: 64x64, Model: model"


def test_a_class_model_makes_pictures_of_each_class(classes: list[str], tmp_path: Path) -> None:
    flags = [*classes, "--outdir", str(tmp_path), "--ddim_steps", "2", "--n_samples", "1", "--classes", "0", "3"]
    assert sample_diffusion.main([*flags, "--scale", "3", "--uncond_class", "4"]) == 0
    texts = [Image.open(path).info for path in sorted((tmp_path / "samples").glob("*.png"))]
    assert [(text["class"], text["seed"]) for text in texts] == [("0", "42"), ("3", "43")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "has 5 classes: give --classes"),
        (["--classes", "5"], "class 5 is not one of the model's; give numbers within 0 and 4"),
        (["--classes", "1", "--scale", "2"], "--scale needs --uncond_class"),
    ],
)
def test_classes_that_the_model_lacks_are_refused(
    classes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    outdir = tmp_path / "out"
    assert message in refusal(sample_diffusion, [*classes, "--outdir", str(outdir), *flags], capsys)
    assert not outdir.exists()


def test_guidance_of_an_unconditional_model_is_refused(
    unconditional: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*unconditional, "--outdir", str(tmp_path), "--scale", "3"]
    assert "--scale" in refusal(sample_diffusion, flags, capsys)


def test_classes_for_an_unconditional_model_are_refused(
    unconditional: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*unconditional, "--outdir", str(tmp_path), "--classes", "1"]
    assert "is unconditional: leave out --classes" in refusal(sample_diffusion, flags, capsys)


def test_each_script_names_the_other_for_the_other_kind_of_model(
    tiny: Path, unconditional: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "use scripts/txt2img.py" in refusal(sample_diffusion, words(tiny, tmp_path), capsys)
    flags = [*unconditional, "--outdir", str(tmp_path), "--prompt", PROMPT]
    assert "use scripts/sample_diffusion.py" in refusal(txt2img, flags, capsys)


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plms", "--ddim_eta", "0.5"], "--plms adds no noise, so --ddim_eta 0.5 cannot go with it"),
        (["--dpm_solver", "--ddim_eta", "1"], "--dpm_solver adds no noise"),
        (["--plms", "--dpm_solver"], "not allowed with argument"),
        (["--ddim_eta", "-1"], "--ddim_eta -1.0 is not allowed; give 0 to 1"),
        (["--H", "100"], "--H 100 is not allowed; give a multiple of 8"),
        (["--W", "0"], "--W 0 is not allowed; give a multiple of 8"),
        (["--n_samples", "0"], "--n_samples 0 is not allowed; give at least 1"),
        (["--n_iter", "0"], "--n_iter 0 is not allowed"),
        (["--ddim_steps", "0"], "--ddim_steps 0 is not allowed; give 1 to 1000"),
        (["--ddim_steps", "1001"], "--ddim_steps 1001 is not allowed"),
        (["--seed", "-1"], "--seed -1 is not allowed"),
        (["--scale", "nan"], "--scale nan is not allowed"),
        (["--skip_grid", "--skip_save"], "would write nothing"),
        (["--device", "abacus"], "--device abacus: torch cannot use it here"),
        (["--C", "3"], "--C 3 does not fit the model, where it is 4"),
        (["--f", "8"], "--f 8 does not fit the model, where it is 4"),
        (["--from-file", "prompts.txt"], "--prompt and --from-file cannot go together"),
        (["--ckpt", "no_such.ckpt"], "--ckpt no_such.ckpt: no such file or folder"),
        (["--config", "no_such.yaml"], "--config no_such.yaml: no such file"),
        (["--sampler", "euler"], "unrecognized arguments: --sampler euler"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    outdir = tmp_path / "out"
    assert message in refusal(txt2img, [*words(tiny, outdir, "--prompt", PROMPT), *flags], capsys)
    assert not outdir.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n\n", "holds no prompt"), (b"\xff\xfe\xfa", "is not UTF-8 text")],
)
def test_a_file_without_prompts_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content)
    assert message in refusal(txt2img, words(tiny, tmp_path / "out", "--from-file", str(prompts)), capsys)


def test_no_prompt_at_all_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --prompt TEXT, or --from-file FILE" in refusal(txt2img, words(tiny, tmp_path / "out"), capsys)


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "this is a Stable Diffusion 2 model"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "this is an SDXL model"),
    ],
)
def test_a_model_of_another_generation_is_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, meaning: str
) -> None:
    weights = torch.load(tiny, weights_only=True)["state_dict"]
    other = {name: value for name, value in weights.items() if not name.startswith("cond_stage_model.")}
    torch.save({"state_dict": other | {key: torch.zeros(4)}}, tmp_path / "other.ckpt")
    flags = words(tmp_path / "other.ckpt", tmp_path / "out", "--prompt", PROMPT)
    assert meaning in refusal(txt2img, flags, capsys)


def test_a_damaged_checkpoint_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(tiny.read_bytes()[:100_000])
    assert "is damaged" in refusal(txt2img, words(broken, tmp_path / "out", "--prompt", PROMPT), capsys)


def test_incomplete_averages_are_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_moving_averages(tiny, tmp_path / "ema.ckpt")
    content = torch.load(path, weights_only=True)
    content["state_dict"].pop("model_ema.diffusion_modelout2bias")
    torch.save(content, path)
    said = refusal(txt2img, words(path, tmp_path / "out", "--prompt", PROMPT), capsys)
    assert "lacks the moving averages of 1 weights (model.diffusion_model.out.2.bias); give --no_ema" in said


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(txt2img, ["--ckpt", str(tmp_path), "--prompt", PROMPT, "--outdir", str(tmp_path / "out")], capsys)
    assert "this folder has no checkpoints/last.ckpt" in said


def test_an_output_folder_that_is_a_file_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    said = refusal(txt2img, words(tiny, tmp_path / "out" / "deeper", "--prompt", PROMPT), capsys)
    assert "is a file; give a folder" in said


@pytest.mark.parametrize("strength", ["0", "1.5", "-0.1", "nan"])
def test_a_strength_outside_its_range_is_refused(
    tiny: Path, tmp_path: Path, photograph: Path, capsys: pytest.CaptureFixture[str], strength: str
) -> None:
    flags = words(tiny, tmp_path / "out", "--prompt", PROMPT, "--init-img", str(photograph), "--strength", strength)
    assert "give more than 0, and at most 1" in refusal(img2img, flags, capsys)


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), (b"no picture", "no picture that can be")])
def test_a_picture_that_cannot_be_read_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    picture = tmp_path / "picture.png"
    if content is not None:
        picture.write_bytes(content)
    flags = words(tiny, tmp_path / "out", "--prompt", PROMPT, "--init-img", str(picture))
    assert f"--init-img {picture}: {message}" in refusal(img2img, flags, capsys)


@pytest.mark.parametrize(
    ("size", "paint", "message"),
    [
        ((64, 40), 255, "is 64x40, the picture is 64x48; give a mask of the picture's size"),
        ((64, 48), 0, "is black: nothing is to be repainted"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(
    tiny: Path,
    tmp_path: Path,
    photograph: Path,
    capsys: pytest.CaptureFixture[str],
    size: tuple[int, int],
    paint: int,
    message: str,
) -> None:
    Image.new("L", size, paint).save(tmp_path / "mask.png")
    flags = ["--prompt", PROMPT, "--init-img", str(photograph), "--mask", str(tmp_path / "mask.png")]
    assert message in refusal(inpaint, words(tiny, tmp_path / "out", *flags), capsys)


def test_inpainting_refuses_a_size_that_it_could_not_keep(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("odd", "mask"):
        Image.new("L", (45, 40), 255).save(tmp_path / f"{name}.png")
    flags = ["--prompt", PROMPT, "--init-img", str(tmp_path / "odd.png"), "--mask", str(tmp_path / "mask.png")]
    said = refusal(inpaint, words(tiny, tmp_path / "out", *flags), capsys)
    assert "is 45x40: width and height must divide by 8; crop picture and mask, or give --W and --H" in said


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[:2])
            raise OSError(28, "No space left on device")

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args: Full(real(path, *args)))
    with pytest.raises(OSError, match=r"cannot write .*00000\.png: No space left on device"):
        sampling_pictures.write_numbered(tmp_path / "samples", "", 5, b"content")
    assert list((tmp_path / "samples").iterdir()) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 bytes\nat line 3")]
)
def test_too_little_memory_is_said_in_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work(options: argparse.Namespace) -> None:
        raise error

    assert sampling_common.run(work, argparse.Namespace(), "txt2img.py") == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("txt2img.py: error: out of memory: make fewer pictures together, or smaller ones")
    assert len(said.splitlines()) == 1


def test_a_mistake_of_the_program_keeps_its_traceback() -> None:
    def work(options: argparse.Namespace) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        sampling_common.run(work, argparse.Namespace(), "txt2img.py")


@pytest.mark.parametrize("script", [txt2img, img2img, inpaint])
def test_half_precision_makes_nearly_the_same_pictures(
    tiny: Path, tmp_path: Path, photograph: Path, mask: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    more = ["--n_iter", "1", "--n_samples", "1"]
    more += [] if script is txt2img else ["--init-img", str(photograph)]
    more += ["--mask", str(mask)] if script is inpaint else []
    (full,) = draw(tiny, tmp_path / "full", *more, script=script)
    # What a GPU does in float16, a CPU can do in bfloat16.
    monkeypatch.setattr(sampling_common, "half_precision", lambda *_: torch.autocast("cpu", dtype=torch.bfloat16))
    (half,) = draw(tiny, tmp_path / "half", *more, script=script)
    difference = np.abs(full.astype(int) - half.astype(int))
    assert 0 < difference.mean() < 4


def test_noise_is_what_torch_draws_from_the_seed_on_the_cpu() -> None:
    drawn = sampling_common.SeededNoise([7, 8])(torch.empty(2, 4, 3, 3))
    assert torch.equal(drawn[1], torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(8)))
