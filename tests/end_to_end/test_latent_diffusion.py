"""The other members of the family train through main.py and sample: class-conditional and unconditional models."""

from __future__ import annotations

import pytest
from PIL import Image

from ldm.training.run import main
from tests.conftest import ROOT

SMALL = [
    "data.params.batch_size=2",
    "data.params.num_workers=0",
    "data.params.train.params.size=32",
    "data.params.validation.params.size=32",
    "lightning.callbacks.image_logger.params.batch_frequency=2",
    "lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=2",
]


@pytest.mark.parametrize(
    ("name", "encoder"), [("tiny_class_conditional", "class embedder 320"), ("tiny_unconditional", "UNet 715,940")]
)
def test_the_shipped_config_trains_and_samples(workplace, tmp_path, capsys, name, encoder):
    config = ROOT / "configs" / "latent-diffusion" / f"{name}.yaml"
    words = ["--base", str(config), "-t", "-n", name, "-l", str(tmp_path), "--data_root", str(workplace / "MyProject")]
    assert main([*words, "--max_steps", "2", *SMALL]) == 0
    assert encoder in capsys.readouterr().out
    (run,) = tmp_path.iterdir()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    (samples,) = (run / "images" / "train").glob("samples_gs-000002*.jpg")
    with Image.open(samples) as picture:
        assert picture.convert("L").getextrema()[0] != picture.convert("L").getextrema()[1]
