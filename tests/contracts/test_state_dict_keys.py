"""Checkpoint keys are a contract: the full-size model has exactly those of Stable Diffusion v1."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "oracle"
CONFIGS = ["v1-finetune_everydream.yaml", "v1-finetune_micro.yaml", "v1-inference.yaml"]


def recorded_keys(name: str) -> dict[str, tuple[int, ...]]:
    with (ASSETS / name).open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["status"] == "required"]
    return {
        row["key"]: () if row["shape"] == "scalar" else tuple(int(size) for size in row["shape"].split("x"))
        for row in rows
    }


def build_on_meta(project_root: Path, name: str, **params: object) -> torch.nn.Module:
    config = OmegaConf.load(project_root / "configs" / "stable-diffusion" / name).model
    config = OmegaConf.to_container(config)
    config["params"].update(params)
    with torch.device("meta"):
        return instantiate_from_config(config)


@pytest.fixture(scope="module")
def everydream(project_root):
    return build_on_meta(project_root, "v1-finetune_everydream.yaml")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_full_size_model_has_exactly_the_keys_and_shapes_of_stable_diffusion_v1(project_root, name):
    model = build_on_meta(project_root, name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == recorded_keys("sd_v1_keys.tsv")


def test_with_moving_averages_it_has_the_keys_and_shapes_of_the_full_ema_checkpoint(project_root):
    model = build_on_meta(project_root, "v1-finetune_everydream.yaml", use_ema=True)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == recorded_keys("sd_v1_keys_ema.tsv")


@pytest.mark.parametrize(
    ("part", "count"), [("model", 859_520_964), ("first_stage_model", 83_653_863), ("cond_stage_model", 123_060_480)]
)
def test_each_part_has_the_published_number_of_parameters(everydream, part, count):
    assert sum(parameter.numel() for parameter in getattr(everydream, part).parameters()) == count


def test_schedule_tables_that_are_not_in_checkpoints_stay_out_of_them(everydream):
    assert not {"lvlb_weights", "logvar", "scale_factor", "cond_ids"} & set(everydream.state_dict())
