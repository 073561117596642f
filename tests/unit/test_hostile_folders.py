"""Diffusers folders and safetensors files that were made to do harm."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import read_weights
from ldm.diffusers_format import FolderFormat, read_folder, schedule_tables

PARTS = {
    "unet/diffusion_pytorch_model": "conv_in.weight",
    "vae/diffusion_pytorch_model": "quant_conv.weight",
    "text_encoder/model": "text_model.final_layer_norm.weight",
}


@pytest.fixture(scope="module")
def params(project_root: Path) -> Any:
    tiny = project_root / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"
    return OmegaConf.to_container(OmegaConf.load(tiny).model.params)


@pytest.fixture
def folder(tmp_path: Path, params: Mapping[str, Any]) -> Path:
    made = tmp_path / "folder"
    configs = FolderFormat(params).configs(schedule_tables(params)["betas"].tolist(), params["scale_factor"])
    for name, content in configs.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(json.dumps(content))
    for stem, key in PARTS.items():
        safetensors.torch.save_file({key: torch.ones(4)}, made / f"{stem}.safetensors")
    read_folder(made, params)
    return made


def refuse(read: Callable[[], object], words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words) as caught:
        read()
    assert type(caught.value) in (ValueError, OSError)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**13, "describes no noise schedule"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", -1, "describes no noise schedule"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "many", "num_train_timesteps 'many', which is no"),
        ("scheduler/scheduler_config.json", "beta_start", -1, "describes no noise schedule"),
        ("scheduler/scheduler_config.json", "beta_start", float("nan"), "describes no noise schedule"),
        ("scheduler/scheduler_config.json", "beta_end", [], "beta_end .*, which is no number"),
        ("scheduler/scheduler_config.json", "beta_end", 10**400, "describes no noise schedule"),
        ("scheduler/scheduler_config.json", "trained_betas", "abc", "no list of numbers"),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1, [0.2]], "no list of numbers"),
        ("scheduler/scheduler_config.json", "trained_betas", [10**400], "another noise schedule"),
        ("scheduler/scheduler_config.json", "prediction_type", "\x1b[2J\n" * 1000, "says prediction_type"),
        ("vae/config.json", "scaling_factor", {}, "scaling_factor .*, which is no number"),
        ("unet/config.json", "cross_attention_dim", "x" * 10_000, "says cross_attention_dim"),
        ("model_index.json", "_class_name", "XL\x1b[2J", "an SDXL folder"),
    ],
)
def test_a_folder_whose_description_lies_is_refused_in_one_line(
    folder: Path, params: Mapping[str, Any], file: str, key: str, value: Any, words: str
) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, key: value}))
    refuse(lambda: read_folder(folder, params), words)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "5", "{", '{"a": ' + "9" * 5000 + "}", "\x00"])
def test_a_description_that_is_no_object_is_refused(folder: Path, params: Mapping[str, Any], content: str) -> None:
    (folder / "unet" / "config.json").write_text(content)
    refuse(lambda: read_folder(folder, params), r"config\.json' is damaged")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"conv_in.weight": "../secret.safetensors"}, "unet/secret.safetensors' does not exist"),
        ({"conv_in.weight": "/secret.safetensors"}, "unet/secret.safetensors' does not exist"),
        ({"conv_in.weight": ".."}, "is a folder|does not exist"),
        ({"conv_in.weight": 5}, "does not name a file"),
        (["a"], "does not name a file"),
        (None, "does not name a file"),
    ],
)
def test_an_index_leads_to_no_file_outside_its_folder(
    folder: Path, params: Mapping[str, Any], weight_map: object, words: str
) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "secret.safetensors")
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuse(lambda: read_folder(folder, params), words)


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def file_of(header: object, stated: int | None = None, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if stated is None else stated) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        file_of(entry(), stated=2**63),
        file_of(entry(), stated=2**64 - 1),
        file_of(entry(), stated=100_000_000),
        file_of(entry(), stated=0),
        file_of(entry(data_offsets=[0, 2**40])),
        file_of(entry(data_offsets=[8, 0])),
        file_of(entry(data_offsets=[-8, 0])),
        file_of(entry(data_offsets=[4, 12])),
        file_of(entry(shape=[3])),
        file_of(entry(shape=[2**63, 2**63])),
        file_of(entry(shape=[2**32, 2**32])),
        file_of(entry(shape=[-2])),
        file_of(entry(dtype="F64")),
        file_of(entry(dtype="X")),
        file_of(entry(dtype=None)),
        file_of({**entry(), "v": entry()["w"]}),
        file_of(
            b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        ),
        file_of(entry(), data=bytes(9)),
        file_of(entry(), data=bytes(7)),
        file_of(b'{"w":' + b"[" * 100_000),
        file_of(b"\xff\xfe{}"),
        file_of({"\x1b[2J" + "x" * 100_000: {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}),
        file_of({"__metadata__": {"a": {"b": "c"}}, **entry()}),
        file_of([]),
    ],
    ids=range(26),
)
def test_a_safetensors_header_that_lies_is_told_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    refuse(lambda: read_weights(path), r"w\.safetensors' is damaged or no safetensors file")
