"""Every YAML that is shipped resolves, binds and type-checks, and is written in today's words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from ldm.training.cli import Options, parse_options
from ldm.training.config import RunConfig, format_config, load_run_config
from ldm.training.config_tree import leaves, read_yaml

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(ROOT.glob("configs/**/*.y*ml"))
OVERLAYS = [path for path in SHIPPED if path.parent.name == "overlays"]
COMPLETE = [path for path in SHIPPED if path not in OVERLAYS]
TRAINING = [path for path in COMPLETE if "data" in yaml.safe_load(path.read_text(encoding="utf-8"))]
MAIN = ROOT / "configs/stable-diffusion/v1-finetune_everydream.yaml"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def load(tmp_path: Path, *words: str) -> RunConfig:
    return load_run_config(parse_options([*words, "-t", "--print_config", "--data_root", str(tmp_path)]))


def about_the_config(loaded: RunConfig) -> list[str]:
    """Leave out what a notice says about the machine that the test runs on."""
    return [notice for notice in loaded.notices if "GPU is" not in notice and "no GPU was asked for" not in notice]


def test_there_are_yamls_to_check() -> None:
    assert MAIN in TRAINING
    assert OVERLAYS


@pytest.mark.parametrize("path", COMPLETE, ids=name)
def test_a_complete_yaml_has_no_problem_and_no_word_of_2022(path: Path) -> None:
    assert about_the_config(load_run_config(Options(base=[str(path)]))) == []


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_a_training_yaml_is_ready_to_train(path: Path, tmp_path: Path) -> None:
    assert about_the_config(load(tmp_path, "--base", str(path))) == []


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_an_overlay_fits_on_the_main_yaml(path: Path, tmp_path: Path) -> None:
    assert about_the_config(load(tmp_path, "--base", str(MAIN), str(path))) == []


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_an_overlay_holds_differences_only(path: Path) -> None:
    below = dict(leaves(read_yaml(str(MAIN)).tree))
    same = [key for key, value in leaves(read_yaml(str(path)).tree) if key in below and below[key] == value]
    assert same == []


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_the_merged_config_is_itself_a_valid_base(path: Path, tmp_path: Path) -> None:
    first = load(tmp_path, "--base", str(path), "-n", "mine", "-s", "7")
    saved = tmp_path / "saved-project.yaml"
    OmegaConf.save(first.config, saved)
    again = load_run_config(Options(base=[str(saved)], train=True, print_config=True))
    assert again.config == first.config


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_the_printed_config_names_the_yaml_for_each_of_its_values(path: Path, tmp_path: Path) -> None:
    loaded = load(tmp_path, "--base", str(path))
    assert yaml.safe_load(format_config(loaded)) == OmegaConf.to_container(loaded.config)
    assert all(loaded.sources[key].startswith(f"{path}:") for key, _ in leaves(read_yaml(str(path)).tree))
