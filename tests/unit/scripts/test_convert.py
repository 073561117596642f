"""Converting between checkpoint files and diffusers folders."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import convert
import pytest
import safetensors.torch
import torch
from torch import Tensor

from ldm.checkpoint import load_weights, read_weights
from ldm.diffusers_format import read_folder, unet_names, vae_names
from tests.unit.scripts.small_sd import CONFIG, build, lightning_checkpoint, small_config, write_config

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_FOLDER_IDS = {"a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407]}


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    weights: dict[str, Tensor] = build(small_config()).state_dict()
    return weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, trained: dict[str, Tensor]) -> Path:
    path = tmp_path_factory.mktemp("file") / "last.ckpt"
    torch.save(lightning_checkpoint(trained), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    path = tmp_path_factory.mktemp("folder") / "small"
    assert run(checkpoint, path) == 0
    return path


def run(*words: object) -> int:
    return convert.main([*map(str, words), "--config", str(CONFIG)])


def refuse(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_there_and_back_gives_every_tensor_bit_for_bit(
    folder: Path, trained: dict[str, Tensor], tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"back.{ending}"
    assert run(folder, out) == 0
    assert same(read_weights(out), trained)


def test_the_comparison_is_printed(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    assert run(checkpoint, tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(["UNet", "VAE encoder", "VAE decoder", "text encoder"], lines, strict=False):
        assert line.startswith(f"{name}: largest difference ")
        assert "reach 0)" not in line  # an output of zeros would compare nothing


def test_without_diffusers_the_tensors_alone_are_compared_and_it_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = convert.importlib.util.find_spec
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    assert run(checkpoint, tmp_path / "out") == 0
    assert "diffusers is not installed" in capsys.readouterr().out


def test_a_mapping_that_exchanges_two_layers_is_found_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    real = convert.FolderFormat.to_folder

    def exchange(self: Any, *args: Any) -> dict[str, dict[str, Tensor]]:
        parts = real(self, *args)
        a, b = "mid_block.resnets.0.conv1.weight", "mid_block.resnets.1.conv1.weight"
        parts["unet"][a], parts["unet"][b] = parts["unet"][b], parts["unet"][a]
        return parts

    monkeypatch.setattr(convert.FolderFormat, "to_folder", exchange)
    back = convert.FolderFormat.to_checkpoint

    def exchange_back(self: Any, parts: Any, source: str) -> dict[str, Tensor]:
        weights = back(self, parts, source)
        a, b = UNET + "middle_block.0.in_layers.2.weight", UNET + "middle_block.2.in_layers.2.weight"
        return {**weights, a: weights[b], b: weights[a]}

    monkeypatch.setattr(convert.FolderFormat, "to_checkpoint", exchange_back)
    assert "do not agree: UNet" in refuse(capsys, checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_has_the_files_of_published_ones(folder: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"] == [None, None]


def test_text_encoder_names_are_the_published_ones(folder: Path) -> None:
    names = safetensors.torch.load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_the_folders_tokeniser_gives_clips_ids(folder: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    for caption, ids in CLIP_FOLDER_IDS.items():
        assert tokenizer(caption).input_ids == ids
    padded = tokenizer("", padding="max_length", truncation=True).input_ids
    assert padded == [49406] + [49407] * 76


def test_half_precision_goes_both_ways_and_leaves_tables(
    checkpoint: Path, trained: dict[str, Tensor], tmp_path: Path
) -> None:
    assert run(checkpoint, tmp_path / "half", "--half") == 0
    unet = safetensors.torch.load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in unet.values()} == {torch.float16}
    assert run(tmp_path / "half", tmp_path / "half.ckpt", "--half") == 0
    weights = read_weights(tmp_path / "half.ckpt")
    assert torch.equal(weights["betas"], trained["betas"])
    key = UNET + "out.2.weight"
    assert torch.equal(weights[key], trained[key].half())


def test_moving_averages_are_taken_on_demand(
    trained: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "out.2.weight"
    average = {"model_ema.diffusion_modelout2weight": torch.ones_like(trained[UNET + key])}
    torch.save({"state_dict": {**trained, **average}}, tmp_path / "ema.ckpt")
    assert run(tmp_path / "ema.ckpt", tmp_path / "live") == 0
    assert "--ema" in capsys.readouterr().out
    assert run(tmp_path / "ema.ckpt", tmp_path / "averaged", "--ema") == 0
    params = small_config()["model"]["params"]
    assert torch.equal(read_folder(tmp_path / "live", params)[UNET + key], trained[UNET + key])
    assert torch.equal(read_folder(tmp_path / "averaged", params)[UNET + key], torch.ones_like(trained[UNET + key]))


def test_averages_that_are_not_there_cannot_be_asked_for(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no moving averages" in refuse(capsys, checkpoint, tmp_path / "out", "--ema")
    assert "no moving averages" in refuse(capsys, folder, tmp_path / "out.ckpt", "--ema")
    assert list(tmp_path.iterdir()) == []


def test_attention_names_from_before_2023_are_read(folder: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    old = copy_of(folder, tmp_path)
    file = old / "vae" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    renamed = {}
    for key, value in weights.items():
        for today, then in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".attentions.0.{today}.", f".attentions.0.{then}.")
        renamed[key] = value
    assert "encoder.mid_block.attentions.0.query.weight" in renamed
    safetensors.torch.save_file(renamed, file)
    assert run(old, tmp_path / "back.ckpt") == 0
    assert same(read_weights(tmp_path / "back.ckpt"), trained)


def test_a_text_encoder_without_the_text_model_level_is_read(
    folder: Path, trained: dict[str, Tensor], tmp_path: Path
) -> None:
    flat = copy_of(folder, tmp_path)
    file = flat / "text_encoder" / "model.safetensors"
    weights = {key.removeprefix("text_model."): value for key, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file)
    own = read_folder(flat, small_config()["model"]["params"])
    text = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    assert torch.equal(own[text], trained[text])


def test_position_numbers_of_old_text_encoders_are_passed_over(folder: Path, tmp_path: Path) -> None:
    old = copy_of(folder, tmp_path)
    file = old / "text_encoder" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    safetensors.torch.save_file(weights, file)
    assert not [key for key in read_folder(old, small_config()["model"]["params"]) if "position_ids" in key]


def test_pickled_and_sharded_weights_are_read(folder: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path)
    vae = other / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    unet = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(unet)
    shard = {key: f"diffusion_pytorch_model-0000{1 + (i % 2)}-of-00002.safetensors" for i, key in enumerate(weights)}
    for name in set(shard.values()):
        safetensors.torch.save_file({key: weights[key] for key in weights if shard[key] == name}, unet.parent / name)
    Path(f"{unet}.index.json").write_text(json.dumps({"weight_map": shard}))
    unet.unlink()
    read = read_folder(other, small_config()["model"]["params"])
    assert all(torch.equal(read[key], trained[key]) for key in read)
    assert len([key for key in trained if key.startswith((UNET, VAE))]) == len(
        [key for key in read if key.startswith((UNET, VAE))]
    )


@pytest.mark.parametrize(
    "missing",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/config.json",
    ],
)
def test_a_folder_with_a_missing_part_names_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    broken = copy_of(folder, tmp_path)
    (broken / missing).unlink()
    line = refuse(capsys, broken, tmp_path / "out.ckpt")
    assert missing in line
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize("part", [UNET, VAE, "cond_stage_model."])
def test_a_checkpoint_with_a_missing_part_names_it(
    trained: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    torch.save({key: value for key, value in trained.items() if not key.startswith(part)}, tmp_path / "cut.ckpt")
    assert part in refuse(capsys, tmp_path / "cut.ckpt", tmp_path / "out")


def test_a_checkpoint_with_a_missing_layer_names_it(
    trained: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = UNET + "out.2.weight"
    torch.save({name: value for name, value in trained.items() if name != key}, tmp_path / "cut.ckpt")
    assert key in refuse(capsys, tmp_path / "cut.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "Stable Diffusion 2"),
        ("conditioner.embedders.1.model.ln_final.weight", "SDXL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("down_blocks.0.resnets.0.conv1.weight", "part of a diffusers folder"),
    ],
)
def test_another_kind_of_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, name: str
) -> None:
    torch.save({key: torch.zeros(2)}, tmp_path / "other.ckpt")
    line = refuse(capsys, tmp_path / "other.ckpt", tmp_path / "out")
    assert name in line
    assert "Stable Diffusion v1" in line


@pytest.mark.parametrize(
    ("file", "changes", "name"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "SDXL"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "Stable Diffusion 2"),
        ("unet/config.json", {"cross_attention_dim": 2048}, "SDXL"),
    ],
)
def test_another_kind_of_folder_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, Any], name: str
) -> None:
    other = copy_of(folder, tmp_path)
    edit_json(other / file, **changes)
    line = refuse(capsys, other, tmp_path / "out.ckpt")
    assert name in line
    assert "Stable Diffusion v1" in line


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "beta_end 0.02"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule linear"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "noise schedule"),
        ("unet/config.json", {"attention_head_dim": 8}, "attention_head_dim"),
        ("vae/config.json", {"scaling_factor": 0.13}, "scaling_factor"),
    ],
)
def test_a_folder_that_says_otherwise_than_the_config_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, Any], named: str
) -> None:
    other = copy_of(folder, tmp_path)
    edit_json(other / file, **changes)
    assert named in refuse(capsys, other, tmp_path / "out.ckpt")


def test_another_models_config_is_found_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config()
    config["model"]["params"]["unet_config"]["params"]["num_res_blocks"] = 2
    path = write_config(tmp_path / "other.yaml", config)
    assert convert.main([str(checkpoint), str(tmp_path / "out"), "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "does not fit the config" in error
    assert "--config" in error


def test_a_model_that_diffusers_has_no_form_for_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config()
    config["model"]["params"]["unet_config"]["params"]["use_scale_shift_norm"] = True
    path = write_config(tmp_path / "other.yaml", config)
    assert convert.main([str(checkpoint), str(tmp_path / "out"), "--config", str(path)]) == 2
    assert "use_scale_shift_norm" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_written_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "write_tokenizer", fail)
    assert "could not write" in refuse(capsys, checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_written_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: object) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(convert, "write_file", fail)
    assert "could not write" in refuse(capsys, folder, tmp_path / "out.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_on_demand_and_only_if_it_is_a_models(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    assert "exists" in refuse(capsys, checkpoint, mine)
    assert "exists" in refuse(capsys, checkpoint, mine, "--overwrite")
    assert (mine / "precious.txt").read_text() == "mine"
    old = copy_of(folder, tmp_path)
    (old / "leftover.txt").touch()
    assert run(checkpoint, old, "--overwrite") == 0
    assert not (old / "leftover.txt").exists()


def test_the_two_sides_must_be_a_file_and_a_folder(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "prune_ckpt.py" in refuse(capsys, checkpoint, tmp_path / "a.safetensors")
    assert ".ckpt or .safetensors" in refuse(capsys, folder, tmp_path / "b")
    assert "model_index.json" in refuse(capsys, tmp_path, tmp_path / "c.ckpt")
    assert "does not exist" in refuse(capsys, tmp_path / "gone.ckpt", tmp_path / "d")


def test_a_scale_measured_in_training_goes_along(trained: dict[str, Tensor], tmp_path: Path) -> None:
    config = small_config()
    config["model"]["params"]["scale_by_std"] = True
    path = write_config(tmp_path / "scaled.yaml", config)
    weights = {**trained, "scale_factor": torch.tensor(0.31)}
    torch.save({"state_dict": weights}, tmp_path / "scaled.ckpt")
    assert convert.main([str(tmp_path / "scaled.ckpt"), str(tmp_path / "out"), "--config", str(path)]) == 0
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "back.ckpt"), "--config", str(path)]) == 0
    assert same(read_weights(tmp_path / "back.ckpt"), weights)


def cosine(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    config = small_config()
    config["model"]["params"]["beta_schedule"] = "cosine"
    return write_config(tmp_path / "cosine.yaml", config), config


def test_a_schedule_that_diffusers_has_no_name_for_is_written_out(tmp_path: Path) -> None:
    path, config = cosine(tmp_path)
    model = build(config)
    torch.save(model.state_dict(), tmp_path / "cosine.ckpt")
    assert convert.main([str(tmp_path / "cosine.ckpt"), str(tmp_path / "out"), "--config", str(path)]) == 0
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert torch.equal(torch.tensor(scheduler["trained_betas"]), model.betas)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "back.ckpt"), "--config", str(path)]) == 0
    assert same(read_weights(tmp_path / "back.ckpt"), model.state_dict())


def test_a_checkpoint_of_another_schedule_than_the_configs_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = cosine(tmp_path)
    assert convert.main([str(checkpoint), str(tmp_path / "out"), "--config", str(path)]) == 2
    assert "noise schedule" in capsys.readouterr().err


def test_no_two_layers_share_a_name() -> None:
    for names in (unet_names([1, 2, 4, 4], 2, [4, 2, 1]), unet_names([1, 2], 3, []), vae_names([1, 2, 4, 4], 2)):
        assert len(set(names.values())) == len(names)


def test_a_folder_loads_into_the_model_strictly(folder: Path) -> None:
    config = small_config()
    model = build(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    load_weights(model, read_folder(folder, config["model"]["params"]), source=str(folder))
    assert float(model.model.diffusion_model.out[2].weight.detach().abs().max()) > 0


@pytest.mark.parametrize(
    ("key", "value", "note"), [("clip_skip", 1, "clip_skip=1"), ("long_captions", "chunk", "cuts prompts at 75")]
)
def test_settings_that_a_folder_cannot_hold_are_mentioned(
    trained: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, note: str
) -> None:
    config = small_config()
    config["model"]["params"]["cond_stage_config"]["params"][key] = value
    path = write_config(tmp_path / "skip.yaml", config)
    torch.save(trained, tmp_path / "last.ckpt")
    assert convert.main([str(tmp_path / "last.ckpt"), str(tmp_path / "out"), "--config", str(path)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and note in line]
    assert len(said) == 1


def test_a_v_model_without_a_signal_at_the_last_timestep_goes_there_and_back(tmp_path: Path) -> None:
    config = small_config()
    config["model"]["params"].update(parameterization="v", zero_terminal_snr=True)
    path = write_config(tmp_path / "v.yaml", config)
    weights = build(config).state_dict()
    torch.save(weights, tmp_path / "v.ckpt")
    assert convert.main([str(tmp_path / "v.ckpt"), str(tmp_path / "out"), "--config", str(path)]) == 0
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["trained_betas"][-1] == 1.0
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "back.ckpt"), "--config", str(path)]) == 0
    assert same(read_weights(tmp_path / "back.ckpt"), weights)
