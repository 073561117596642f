"""Import targets are a contract: what users' YAML files name resolves, and main re-exports the same objects."""

from __future__ import annotations

import pytest

from ldm.util import get_obj_from_str

TARGETS = [
    "ldm.models.diffusion.ddpm.DDPM",
    "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.models.diffusion.ddpm.DiffusionWrapper",
    "ldm.models.diffusion.ddim.DDIMSampler",
    "ldm.models.diffusion.plms.PLMSSampler",
    "ldm.models.diffusion.dpm_solver.DPMSolverSampler",
    "ldm.models.autoencoder.AutoencoderKL",
    "ldm.models.autoencoder.VQModel",
    "ldm.models.autoencoder.VQModelInterface",
    "ldm.models.autoencoder.IdentityFirstStage",
    "ldm.modules.losses.LPIPSWithDiscriminator",
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "ldm.modules.diffusionmodules.model.Encoder",
    "ldm.modules.diffusionmodules.model.Decoder",
    "ldm.modules.attention.SpatialTransformer",
    "ldm.modules.attention.CrossAttention",
    "ldm.modules.distributions.distributions.DiagonalGaussianDistribution",
    "ldm.modules.ema.LitEma",
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "ldm.modules.encoders.modules.ClassEmbedder",
    "ldm.modules.encoders.modules.SpatialRescaler",
    "ldm.lr_scheduler.LambdaLinearScheduler",
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2",
    "ldm.lr_scheduler.EveryDreamScheduler",
    "ldm.lr_scheduler.ConstantScheduler",
    "ldm.lr_scheduler.LinearScheduler",
    "ldm.lr_scheduler.CosineScheduler",
    "ldm.data.every_dream.EveryDreamBatch",
    "ldm.data.ed_validate.EDValidateBatch",
    "ldm.data.personalized.PersonalizedBase",
    "ldm.data.personalized_batch.PersonalizeBatchBase",
    "ldm.util.instantiate_from_config",
]


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_resolves(target):
    assert get_obj_from_str(target).__name__


@pytest.mark.parametrize(
    ("name", "home"),
    [("ImageLogger", "ldm.training.image_logger"), ("DataModuleFromConfig", "ldm.data.data_module")],
)
def test_main_re_exports_the_object_itself(name, home):
    assert get_obj_from_str(f"main.{name}") is get_obj_from_str(f"{home}.{name}")


def test_2022_validation_data_sets_are_todays():
    validation = get_obj_from_str("ldm.data.ed_validate.EDValidateBatch")
    assert get_obj_from_str("ldm.data.personalized.PersonalizedBase") is validation
