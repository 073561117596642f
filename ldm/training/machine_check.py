"""Checks that what a config names is there on this machine: GPUs, folders, files."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ldm.diffusers_format import folder_problem, is_diffusers_folder
from ldm.training.config_tree import ConfigTree, nearest
from ldm.training.console import command_word
from ldm.training.legacy_2022 import DATASETS


def check_machine(config: ConfigTree, resuming: bool) -> list[str]:
    """Check that what a config names is there on this machine: GPUs, folders, files.

    Args:
        config: a checked config.
        resuming: whether a run is continued, so that the checkpoint it once started from may be gone.

    Returns:
        One line for each problem.
    """
    problems = [*_check_gpus(config), *_check_data_roots(config)]
    checkpoint = config.get("run.actual_resume")
    if isinstance(checkpoint, str) and not resuming and not os.path.isfile(checkpoint):
        problem = folder_problem(checkpoint) if is_diffusers_folder(checkpoint) else _missing_checkpoint(checkpoint)
        if problem is not None:
            problems.append(f"{config.source('run.actual_resume')}: {problem}")
    return problems


def _check_gpus(config: ConfigTree) -> list[str]:
    """Check that the GPUs that are asked for are there."""
    accelerator = config.get("lightning.trainer.accelerator")
    if accelerator not in ("gpu", "cuda"):
        return []
    path = "lightning.trainer.devices" if config.has("lightning.trainer.devices") else "lightning.trainer.accelerator"
    source = config.source(path)
    if accelerator == "gpu" and not torch.cuda.is_available() and torch.backends.mps.is_available():
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return [
            f"{source}: a GPU is asked for, but PyTorch finds no CUDA GPU on this machine; leave out --gpus and type "
            f"--accelerator cpu to train on the CPU, or install a GPU driver and a CUDA build of PyTorch"
        ]
    devices = config.get("lightning.trainer.devices")
    if isinstance(devices, list):
        absent = [number for number in devices if number not in range(count)]
        if absent:
            return [
                f"{source}: there is no GPU {', '.join(map(str, absent))}; this machine has {count}, numbered from 0: "
                f"type --gpus 0, for the first, or --devices N for a number of them"
            ]
    elif isinstance(devices, int) and devices > count:
        return [f"{source}: devices: {devices} GPUs are asked for, this machine has {count}; type --devices {count}"]
    return []


def _check_data_roots(config: ConfigTree) -> list[str]:
    """Check that the data folders exist, naming each once."""
    problems: dict[str, str] = {}
    for path in (f"data.params.{name}.params.data_root" for name in DATASETS):
        root = config.get(path)
        if not isinstance(root, str) or not root or root in problems or os.path.isdir(root):
            continue
        source = config.source(path)
        if os.path.exists(root):
            problems[root] = f"{source}: data_root {root} is a file; name the folder that holds your subfolders"
        else:
            problems[root] = f"{source}: data_root {root} does not exist{_folder_hint(root)}"
    return list(problems.values())


def _folder_hint(root: str) -> str:
    """Propose the folder that a missing one may have meant."""
    parent = Path(root).parent
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    for folder in folders:
        rest = Path(root).name.removeprefix(folder)
        if rest != Path(root).name and (parent / folder / rest).is_dir():
            return (
                f"; did you mean {(parent / folder / rest).as_posix()}? (this shell takes back slashes away: type "
                f"slashes)"
            )
    match = nearest(Path(root).name, folders)
    if match is not None:
        return f"; did you mean {(parent / match).as_posix()}?"
    return "; name the folder that holds your subfolders of pictures"


def _missing_checkpoint(path: str) -> str:
    """Explain a checkpoint that is not a file."""
    if os.path.isdir(path):
        last = Path(path, "checkpoints", "last.ckpt")
        if last.is_file():
            instead = f"-r {command_word(path)} continues that run"
            return f"actual_resume {path} is a folder; did you mean {last.as_posix()}? ({instead})"
        return (
            f"actual_resume {path} is a folder without model_index.json, so no diffusers folder; name one, or a .ckpt "
            "or .safetensors file"
        )
    parent = Path(path).parent
    beside = [entry.name for entry in parent.glob("*") if entry.suffix in (".ckpt", ".safetensors")]
    match = nearest(Path(path).name, beside)
    if match is not None:
        return f"actual_resume {path} does not exist; did you mean {(parent / match).as_posix()}?"
    return f"actual_resume {path} does not exist; name a .ckpt or .safetensors file (or leave it out: random weights)"
