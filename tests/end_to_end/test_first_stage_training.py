"""First stages trained on photographs through the program, at the size of a CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.training.run import main
from tests.conftest import ROOT
from tests.end_to_end.two_devices import train_together

CONFIGS = {kind: ROOT / "configs" / "autoencoder" / f"tiny_{kind}_f4.yaml" for kind in ("kl", "vq")}

SMALL = [
    "model.params.ddconfig.ch_mult=[1,1]",
    "model.params.lossconfig.params.disc_num_layers=1",
    "data.params.batch_size=2",
    "data.params.num_workers=0",
    "data.params.train.params.size=32",
    "data.params.train.params.flip_p=0.0",
    "data.params.validation.params.size=32",
    "lightning.callbacks.image_logger.params.disabled=true",
    "lightning.trainer.log_every_n_steps=1",
]
"""Levels, pictures and batches at their smallest."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of the quickstart's photographs, small: most of a step would be reading them."""
    path = ROOT / "scripts" / "prepare_quickstart.py"
    spec = importlib.util.spec_from_file_location("prepare_quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("photographs")
    script.write_photographs(folder, script.PHOTOGRAPHS[1:6])
    for path in folder.glob("*/*"):
        with Image.open(path) as picture:
            picture.reduce(8).save(path)
    return folder


def train(kind: str, photographs: Path, logdir: Path, *words: str) -> Path:
    """Train with the smallest settings; gives the run's folder."""
    command = ["--base", str(CONFIGS[kind]), "-t", "--no-test", "--data_root", str(photographs), *SMALL]
    assert main([*command, "-l", str(logdir), *words]) == 0
    return next(logdir.iterdir())


def last(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def curve(run: Path, name: str) -> dict[int, float]:
    """A logged value by step."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.fixture(scope="module", params=list(CONFIGS))
def long_run(request: pytest.FixtureRequest, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 steps, an epoch of 25 at a time, in the middle of which the discriminator sets in."""
    words = ["lightning.trainer.max_epochs=8", "model.base_learning_rate=1.0e-03"]
    return train(request.param, photographs, tmp_path_factory.mktemp("runs") / request.param, *words)


def test_two_hundred_steps_lower_the_reconstruction_loss_of_the_validation(long_run: Path) -> None:
    losses = list(curve(long_run, "val/rec_loss").values())
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_is_one_of_the_autoencoder(long_run: Path) -> None:
    assert last(long_run)["global_step"] == 200


def test_the_discriminator_counts_from_its_start_on(long_run: Path) -> None:
    factors = curve(long_run, "train/disc_factor")
    assert [step for step, factor in factors.items() if factor > 0] == list(range(100, 200))
    assert {factor for step, factor in factors.items() if step >= 100} == {1.0}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_resumed_run_repeats_an_unbroken_one(kind: str, photographs: Path, tmp_path: Path) -> None:
    words = ["model.params.lossconfig.params.disc_start=0", "data.params.train.params.repeats=1"]
    words += ["model.params.use_ema=true"] if kind == "vq" else []
    limit = "lightning.trainer.max_steps"
    whole = train(kind, photographs, tmp_path / "whole", *words, f"{limit}=5")
    broken = train(kind, photographs, tmp_path / "broken", *words, f"{limit}=2")
    assert main(["-t", "-r", str(broken), f"{limit}=5"]) == 0
    one, two = last(whole), last(broken)
    assert one["global_step"] == two["global_step"] == 5
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the processes' library for CPUs is not built there")
def test_two_devices_share_a_run(photographs: Path, tmp_path: Path) -> None:
    words = ["--base", str(CONFIGS["kl"]), "-t", "--no-test", "--data_root", str(photographs), *SMALL]
    words += ["lightning.trainer.accelerator=cpu", "lightning.trainer.devices=2", "lightning.trainer.max_steps=3"]
    statuses, said = train_together(tmp_path, [[*words, "-l", "logs"]])
    assert statuses == [[0], [0]], said
    (run,) = (tmp_path / "logs").iterdir()
    assert last(run)["global_step"] == 3


def test_pictures_are_written_at_the_autoencoders_steps(photographs: Path, tmp_path: Path) -> None:
    logger = "lightning.callbacks.image_logger.params"
    words = [f"{logger}.disabled=false", f"{logger}.batch_frequency=2", "lightning.trainer.max_steps=2"]
    run = train("kl", photographs, tmp_path / "run", *words)
    names = {path.name.partition("_gs-")[0] for path in (run / "images" / "train").glob("*gs-000002*.jpg")}
    assert names == {"inputs", "reconstructions", "samples", "overview"}


def test_accumulated_batches_and_a_clipped_gradient_make_one_step(photographs: Path, tmp_path: Path) -> None:
    trainer = "lightning.trainer"
    words = [f"{trainer}.max_epochs=1", f"{trainer}.accumulate_grad_batches=4", f"{trainer}.gradient_clip_val=0.5"]
    run = train("kl", photographs, tmp_path / "run", *words)
    assert last(run)["global_step"] == 7  # 25 batches, of which the last step has one


def test_a_loss_that_trains_nothing_is_named(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--base", str(CONFIGS["kl"]), "-t", "--data_root", str(photographs), "-l", str(tmp_path), *SMALL]
    loss = "model.params.lossconfig"
    assert main([*words, f"{loss}.target=torch.nn.Identity"]) == 2
    assert "write ldm.modules.losses.LPIPSWithDiscriminator" in capsys.readouterr().err


def test_a_perceptual_weight_without_its_weights_says_which_file_goes_where(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    words = ["--base", str(CONFIGS["kl"]), "-t", "--data_root", str(photographs), "-l", str(tmp_path), *SMALL]
    assert main([*words, "model.params.lossconfig.params.perceptual_weight=1.0"]) == 2
    errors = capsys.readouterr().err
    assert str(tmp_path / "taming/modules/autoencoder/lpips/vgg.pth") in errors
    assert str(tmp_path / "torch/hub/checkpoints/vgg16-397923af.pth") in errors
    assert "Traceback" not in errors
