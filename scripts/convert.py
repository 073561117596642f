"""Convert Stable Diffusion v1 between a checkpoint file and a diffusers folder.

python scripts/convert.py IN OUT [--config YAML] [--half] [--ema]

IN is a .ckpt or .safetensors file and OUT a folder to make, or IN is a diffusers folder and OUT a .ckpt or
.safetensors file. What was written is read back: the tensors must be the same bit for bit, and the UNet, the VAE and
the text encoder of both sides are run on fixed inputs where diffusers is installed. The largest differences are
printed. OUT gets its name only after that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import (
    ROOT,
    apply_averages,
    averaged_keys,
    check_target,
    format_of,
    halve,
    identical,
    own_weights,
    report_errors,
    unfinished,
    verify_file,
    write_file,
)
from torch import Tensor, nn

from ldm.checkpoint import read_weights
from ldm.diffusers_format import (
    PARTS,
    TEXT,
    UNET,
    VAE,
    WEIGHT_FILES,
    FolderFormat,
    foreign_kind,
    is_diffusers_folder,
    read_folder,
    schedule_tables,
)
from ldm.training.config import resolve_references
from ldm.training.config_tree import read_yaml
from ldm.util import get_obj_from_str, instantiate_from_config

DEFAULT_CONFIG = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"

TOLERANCE = 1e-4
"""Largest difference between the two sides' outputs, relative to the largest output."""


def read_params(config: Path) -> dict[str, Any]:
    """Read ``model.params`` of a config.

    Args:
        config: a YAML file.

    Raises:
        OSError: the file is missing.
        ValueError: it has no such section.
    """
    if not config.is_file():
        raise OSError(f"the config '{config}' does not exist; name the model's YAML with --config")
    content = read_yaml(str(config))
    resolve_references(content)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("params"), dict):
        raise ValueError(f"the config '{config}' has no section model.params")
    return model["params"]


def refuse_other_schedule(weights: Mapping[str, Tensor], tables: Mapping[str, Tensor], source: Path) -> None:
    """Make sure that a checkpoint was made with the config's noise schedule.

    Args:
        weights: the checkpoint's weights; those without tables pass.
        tables: the config's tables.
        source: the file, for messages.

    Raises:
        ValueError: the schedules differ by more than rounding to half precision does.
    """
    stored, own = weights.get("alphas_cumprod"), tables["alphas_cumprod"]
    if stored is not None and not (
        stored.shape == own.shape and torch.allclose(stored.float(), own, rtol=2e-3, atol=1e-6)
    ):
        raise ValueError(
            f"'{source}' does not fit the config: it was made with another noise schedule; name the model's own config "
            "with --config"
        )


def file_to_folder(source: Path, target: Path, params: Mapping[str, Any], half: bool, ema: bool) -> list[str]:
    """Convert a checkpoint file to a diffusers folder.

    Args:
        source: a ``.ckpt`` or ``.safetensors`` file.
        target: the folder to make.
        params: ``model.params`` of the config.
        half: round weights to float16.
        ema: take the moving averages in place of the weights.

    Returns:
        What the comparison found, a line each.

    Raises:
        ValueError: it is no Stable Diffusion v1 checkpoint, lacks something, or the two sides differ.
        OSError: it cannot be read or written.
    """
    layout = FolderFormat(params)
    weights = read_weights(source)
    kind = foreign_kind(weights)
    if kind is not None:
        raise ValueError(f"'{source}' is {kind}; this reads Stable Diffusion v1")
    weights = own_weights(weights, source)
    has_averages = bool(averaged_keys(weights, source))
    weights = apply_averages(weights, "bake" if ema else "drop", source)
    tables = schedule_tables(params)
    refuse_other_schedule(weights, tables, source)
    if half:
        weights = halve(weights, source)
    parts = layout.to_folder(weights, str(source))
    ours = layout.to_checkpoint(parts, str(source))
    refuse_misfits(ours, params, source)
    scale = float(
        weights.get("scale_factor", torch.tensor(float(params.get("scale_factor", 1.0)), dtype=torch.float64))
    )
    configs = layout.configs(tables["betas"].tolist(), scale)
    with unfinished(target) as partial:
        write_folder(partial, parts, configs)
        stored = read_folder(partial, {**params, "scale_factor": scale})
        different = [key for key, value in ours.items() if key not in stored or not identical(stored[key], value)]
        if different:
            raise OSError(f"what was written does not read back as it should ({different[0]}…); check the disk")
        lines = compare_outputs(ours, partial, params)
    if has_averages and not ema:
        lines.append(f"note: '{source}' holds moving averages too; --ema takes them in place of the weights")
    return lines


def folder_to_file(source: Path, target: Path, params: Mapping[str, Any], half: bool) -> list[str]:
    """Convert a diffusers folder to a checkpoint file; see :func:`file_to_folder`."""
    weights = own_weights(read_folder(source, params), source)
    refuse_misfits(weights, params, source)
    whole = {**schedule_tables(params), **weights}
    if half:
        whole = halve(whole, source)
    file_format = format_of(target) or "ckpt"
    with unfinished(target) as partial:
        write_file(partial, whole, {}, file_format)
        verify_file(partial, whole, {}, file_format)
        return compare_outputs(whole, source, params, rounded=half)


def write_folder(
    folder: Path, parts: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a diffusers folder.

    Args:
        folder: a folder that does not exist yet.
        parts: from :meth:`~ldm.diffusers_format.FolderFormat.to_folder`.
        configs: from :meth:`~ldm.diffusers_format.FolderFormat.configs`.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    for part, weights in parts.items():
        (folder / part).mkdir(parents=True)
        write_file(folder / part / f"{WEIGHT_FILES[part]}.safetensors", weights, {}, "safetensors")
    for name, content in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tokenizer(folder / "tokenizer")


def refuse_misfits(weights: Mapping[str, Tensor], params: Mapping[str, Any], source: Path) -> None:
    """Make sure that translated weights are all those of the config's model, in its shapes.

    Args:
        weights: under checkpoint keys.
        params: ``model.params`` of the config.
        source: where they come from, for messages.

    Raises:
        ValueError: weights are missing or have other shapes.
    """
    with torch.device("meta"):
        modules = {prefix: build_part(prefix, params) for prefix in PARTS.values()}
    expected = {
        prefix + key: value.shape for prefix, part in modules.items() for key, value in part.state_dict().items()
    }
    missing = [key for key in expected if key not in weights]
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, the config needs {tuple(shape)}"
        for key, shape in expected.items()
        if key in weights and weights[key].shape != shape
    ]
    if missing or shapes:
        missed = [f"{len(missing)} keys are missing ({', '.join(missing[:3])})"] if missing else []
        wrong = [f"{len(shapes)} shapes differ ({shapes[0]})"] if shapes else []
        raise ValueError(
            f"'{source}' does not fit the config: {'; '.join(missed + wrong)}; "
            "name the model's own config with --config"
        )


def build_part(prefix: str, params: Mapping[str, Any]) -> nn.Module:
    """Build one of our three networks, with random weights.

    Args:
        prefix: of the part's keys in a checkpoint.
        params: ``model.params`` of the config.
    """
    section = {UNET: "unet_config", VAE: "first_stage_config", TEXT: "cond_stage_config"}[prefix]
    config = dict(params[section])
    if prefix == VAE:
        kept = {key: config["params"][key] for key in ("ddconfig", "embed_dim")}
        config["params"] = {**kept, "lossconfig": {"target": "torch.nn.Identity"}}
    built: nn.Module = instantiate_from_config(config, nn.Module)
    return built.transformer if prefix == TEXT else built  # type: ignore[return-value]


def write_tokenizer(folder: Path) -> None:
    """Write the tokeniser's files from the installed vocabulary.

    Args:
        folder: ``tokenizer/`` of a diffusers folder.

    Raises:
        OSError: the vocabulary is not installed, or a file cannot be written.
    """
    tokenizer = get_obj_from_str("ldm.modules.encoders.tokenizer.build_tokenizer")()
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    files = {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(
            {"bos_token": begin, "eos_token": end, "pad_token": end, "unk_token": end}, indent=2
        ),
        "tokenizer_config.json": json.dumps(
            {
                "add_prefix_space": False,
                "bos_token": begin,
                "do_lower_case": True,
                "eos_token": end,
                "errors": "replace",
                "model_max_length": 77,
                "pad_token": end,
                "tokenizer_class": "CLIPTokenizer",
                "unk_token": end,
            },
            indent=2,
        ),
    }
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def fixed_inputs(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make the inputs of the comparison: the same numbers each time, the smallest size that each network takes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    unet, dd = params["unet_config"]["params"], params["first_stage_config"]["params"]["ddconfig"]
    text = FolderFormat(params).text_config
    cells, factor = 2 * 2 ** (len(unet["channel_mult"]) - 1), 2 ** (len(dd["ch_mult"]) - 1)
    length = text["max_position_embeddings"]
    return {
        "x": normal(2, unet["in_channels"], cells, cells),
        "context": normal(2, length, unet["context_dim"]),
        "image": torch.tanh(normal(1, dd["in_channels"], 4 * factor, 4 * factor)),
        "z": normal(1, dd["z_channels"], 4, 4),
        "tokens": torch.randint(0, text["vocab_size"], (2, length), generator=generator),
    }


@torch.no_grad()
def compare_outputs(
    weights: Mapping[str, Tensor], folder: Path, params: Mapping[str, Any], rounded: bool = False
) -> list[str]:
    """Run the networks of both sides on fixed inputs, one after the other, in float32 on the CPU.

    Args:
        weights: our side, under checkpoint keys.
        folder: the other side, a diffusers folder.
        params: ``model.params`` of the config.
        rounded: our side was rounded to half precision and the folder was not: round it too.

    Returns:
        The largest difference of each part, a line each.

    Raises:
        ValueError: a difference is above the tolerance.
    """
    if importlib.util.find_spec("diffusers") is None:
        return ["tensors are identical; outputs were not compared: diffusers is not installed (pip install diffusers)"]
    get_obj_from_str("transformers.utils.logging.disable_progress_bar")()
    inputs = fixed_inputs(params)
    timesteps = torch.tensor([1, 501])
    lines, failed = [], []

    def compare(name: str, ours: Tensor, theirs: Tensor) -> None:
        difference, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        untrained = "; all zero, as an untrained network's: this shows nothing" if size == 0.0 else ""
        lines.append(f"{name}: largest difference {difference:.2g} (outputs reach {size:.2g}{untrained})")
        if not difference <= TOLERANCE * size:
            failed.append(name)

    ours = _our_part(UNET, weights, params)
    our_output = ours(inputs["x"], timesteps, context=inputs["context"])
    del ours
    theirs = _their_part(folder, "unet", rounded)
    compare("UNet", our_output, theirs(inputs["x"], timesteps, inputs["context"]).sample)
    del theirs

    ours, theirs = _our_part(VAE, weights, params), _their_part(folder, "vae", rounded)
    compare("VAE encoder", ours.encode(inputs["image"]).mode(), theirs.encode(inputs["image"]).latent_dist.mode())  # type: ignore[operator]
    compare("VAE decoder", ours.decode(inputs["z"]), theirs.decode(inputs["z"]).sample)  # type: ignore[operator]

    ours, theirs = _our_part(TEXT, weights, params), _their_part(folder, "text_encoder", rounded)
    compare(
        "text encoder",
        ours.text_model(input_ids=inputs["tokens"]).last_hidden_state,  # type: ignore[operator]
        theirs(input_ids=inputs["tokens"]).last_hidden_state,
    )
    if failed:
        raise ValueError(f"the two sides do not agree: {'; '.join(lines)}")
    return lines


def _our_part(prefix: str, weights: Mapping[str, Tensor], params: Mapping[str, Any]) -> nn.Module:
    # Random weights would be made for nothing; the text model alone has buffers that no checkpoint holds.
    with torch.device("cpu" if prefix == TEXT else "meta"):
        module = build_part(prefix, params).eval()
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    module.load_state_dict({key: own[key].float() for key in module.state_dict()}, assign=True)
    return module


def _their_part(folder: Path, part: str, rounded: bool) -> Any:
    """Let diffusers or transformers read a part of a folder."""
    library, name = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
    }[part]
    arguments = {"subfolder": part, "torch_dtype": torch.float32, "local_files_only": True}
    if library == "diffusers":
        arguments["low_cpu_mem_usage"] = False  # or it asks for a package that we do not need
    module = get_obj_from_str(f"{library}.{name}").from_pretrained(str(folder), **arguments).eval()
    return module.half().float() if rounded else module


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint file, or diffusers folder")
    parser.add_argument("target", metavar="OUT", type=Path, help="diffusers folder to make, or checkpoint file")
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        help="YAML that describes the model (default: Stable Diffusion v1)",
    )
    parser.add_argument("--half", action="store_true", help="round weights to float16")
    parser.add_argument("--ema", action="store_true", help="take a checkpoint's moving averages as its weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    return parser


def unrecorded(encoder: Mapping[str, Any]) -> list[str]:
    """Note which settings of a text encoder a diffusers folder does not record.

    Args:
        encoder: the text encoder's ``params``.

    Returns:
        A line for each.
    """
    lines = []
    if encoder.get("clip_skip"):
        lines.append(
            f"note: a diffusers folder does not record clip_skip; give its pipeline clip_skip={encoder['clip_skip']}"
        )
    if encoder.get("long_captions") == "chunk":
        lines.append(
            "note: this model reads captions in chunks (long_captions), but a diffusers pipeline cuts prompts at 75 "
            "tokens; give it longer ones as prompt_embeds"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and say what the comparison found.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status.
    """
    options = build_parser().parse_args(argv)

    def work() -> int:
        source, target = options.source, options.target
        params = read_params(options.config)
        if source.is_dir():
            check_folder_input(source, target, options.ema)
            check_target(target, source, options.overwrite)
            lines = folder_to_file(source, target, params, options.half)
        else:
            check_file_input(source, target, options.overwrite)
            lines = file_to_folder(source, target, params, options.half, options.ema)
            lines += unrecorded(params["cond_stage_config"].get("params") or {})
        for line in lines:
            print(line)
        print(f"written and read back: {target}")
        return 0

    return report_errors("convert", work)


def check_folder_input(source: Path, target: Path, ema: bool) -> None:
    """Make sure that a folder can be converted to what is asked for.

    Args:
        source: the folder.
        target: what to make.
        ema: whether moving averages are asked for.

    Raises:
        ValueError: the folder is no diffusers folder, the target no checkpoint file, or it has no averages.
    """
    if not is_diffusers_folder(source):
        raise ValueError(f"'{source}' is no diffusers folder: it holds no model_index.json; name one, or a .ckpt file")
    if format_of(target) is None:
        raise ValueError(f"OUT '{target}' must end in .ckpt or .safetensors, since IN is a diffusers folder")
    if ema:
        raise ValueError(f"'{source}' holds no moving averages (EMA): diffusers folders have none; leave out --ema")


def check_file_input(source: Path, target: Path, overwrite: bool) -> None:
    """Make sure that a file can be converted to what is asked for.

    Args:
        source: the file.
        target: what to make.
        overwrite: whether an existing diffusers folder may be replaced.

    Raises:
        ValueError: the target is named like a checkpoint file.
        OSError: the source is missing, or the target exists.
    """
    if format_of(target) is not None:
        raise ValueError(
            f"OUT '{target}' must be a folder, since IN is a file; between .ckpt and .safetensors, use "
            f"scripts/prune_ckpt.py --ckpt {source} --full --out {target}"
        )
    if not source.is_file():
        raise OSError(f"'{source}' does not exist; name a .ckpt or .safetensors file, or a diffusers folder")
    if target.exists() and (
        not overwrite or not target.is_dir() or (os.listdir(target) and not is_diffusers_folder(target))
    ):
        raise OSError(f"OUT '{target}' exists; give another name, or --overwrite to replace a diffusers folder")


if __name__ == "__main__":
    sys.exit(main())
