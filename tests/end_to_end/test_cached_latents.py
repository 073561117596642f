"""Training on cached latents: the same run as on the pictures, without their being encoded in every step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm.training.run import main
from tests.end_to_end.conftest import Train
from tests.end_to_end.test_training import assert_same_end, curve

FLIPS = "data.params.train.params.flip_p=0.5"


def cached(folder: Path, mode: str = "disk") -> list[str]:
    """Words that switch the cache on, for training and validation."""
    return [
        f"data.params.{split}.params.{key}={value}"
        for split in ("train", "validation")
        for key, value in (("cache_latents", mode), ("cache_dir", folder))
    ]


def test_a_run_on_cached_latents_ends_where_one_on_pictures_does(train: Train, tmp_path: Path) -> None:
    words = (FLIPS, "lightning.trainer.max_epochs=1")
    pictures = train(*words, name="pictures")
    for mode in ("disk", "memory"):
        latents = train(*words, *cached(tmp_path / "cache", mode), name=mode)
        assert_same_end(pictures, latents)
        assert curve(pictures, "val/loss_simple") == curve(latents, "val/loss_simple")


def test_in_half_precision_losses_are_those_of_pictures_but_for_its_noise(train: Train, tmp_path: Path) -> None:
    words = (FLIPS, "lightning.trainer.precision=bf16-mixed", "lightning.trainer.max_epochs=1")
    pictures = curve(train(*words, name="pictures"))
    latents = curve(train(*words, *cached(tmp_path / "cache"), name="latents"))
    assert latents == pytest.approx(pictures, rel=2**-8)


def test_a_continued_run_on_cached_latents_equals_an_unbroken_one(train: Train, tmp_path: Path) -> None:
    words = (*cached(tmp_path / "cache"), "data.params.train.params.crop=random", FLIPS)
    unbroken = train(*words, name="unbroken")
    broken = train(*words, "lightning.trainer.max_steps=3", name="broken")
    shutil.rmtree(tmp_path / "cache")
    continued = train("lightning.trainer.max_steps=-1", resume=broken.path)
    assert_same_end(unbroken, continued)


def test_a_second_run_reuses_what_is_sound_and_makes_anew_what_is_damaged(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    words = (*cached(folder), "lightning.trainer.max_epochs=1")
    first = train(*words, name="first")
    told = capsys.readouterr().out
    assert f"cached latents (train): 4 latents of 4 pictures, 8.2 kB, in {folder}; 4 to make, 8.2 kB" in told
    assert f"cached latents (validation): 4 latents of 4 pictures, 8.2 kB, in {folder}; all there" in told
    entries = sorted(folder.glob("*/*"))
    written = {path: path.stat().st_mtime_ns for path in entries}
    entries[0].write_bytes(entries[0].read_bytes()[:-1] + b"?")

    second = train(*words, name="second")
    told = capsys.readouterr().out
    assert f"{entries[0]}: is damaged" in told
    assert "4 latents of 4 pictures, 8.2 kB, in" in told
    assert "1 to make" in told
    # A single picture may be encoded by another kernel than a batch, which rounds otherwise.
    assert curve(second) == pytest.approx(curve(first), rel=1e-5)
    assert [path for path in entries if path.stat().st_mtime_ns != written[path]] == entries[:1]


def test_sample_pictures_are_written_from_cached_latents(train: Train, tmp_path: Path) -> None:
    logger = "lightning.callbacks.image_logger.params."
    words = [f"{logger}{word}" for word in ("disabled=false", "batch_frequency=2", "log_images_kwargs.ddim_steps=2")]
    run = train(*cached(tmp_path / "cache"), "lightning.trainer.max_steps=2", *words)
    assert len(list((run.path / "images" / "train").glob("inputs_*.jpg"))) == 1


def test_a_model_that_is_trained_on_pictures_refuses_before_a_run_has_a_folder(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first_stage = "model.params.first_stage_config"
    words = [f"{first_stage}.target=ldm.models.autoencoder.IdentityFirstStage", f"{first_stage}.params=null"]
    words += ["-n", "refused", "-l", str(tmp_path / "logs")]
    without_weights = [word for word in command if word != "--actual_resume" and not word.endswith("tiny.ckpt")]
    status = main([*without_weights, *cached(tmp_path / "cache"), *words])
    assert status == 2
    assert "data.params.train.params.cache_latents: latents cannot be cached" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
