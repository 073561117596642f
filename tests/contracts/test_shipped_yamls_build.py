"""Every shipped model builds, on the meta device, and has the size its paper gives."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"
WITH_MODEL = [
    str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "overlays"
]


def build(name: str) -> torch.nn.Module:
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / name).model)
    with torch.device("meta"):
        return instantiate_from_config(config)


def test_there_are_models_to_build():
    assert len(WITH_MODEL) > 10


@pytest.mark.parametrize("name", WITH_MODEL)
def test_the_model_builds(name):
    assert any(parameter.is_meta for parameter in build(name).parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("latent-diffusion/celebahq-ldm-vq-4.yaml", 274),
        ("latent-diffusion/ffhq-ldm-vq-4.yaml", 274),
        ("latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml", 274),
        ("latent-diffusion/lsun_churches-ldm-kl-8.yaml", 294),
        ("latent-diffusion/cin-ldm-vq-f8.yaml", 395),
    ],
)
def test_the_unet_has_the_parameters_that_the_ldm_paper_gives(name, millions):
    count = sum(parameter.numel() for parameter in build(name).model.diffusion_model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=1.1)
