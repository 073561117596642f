from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import main
from ldm.training.disk import Disk
from ldm.training.image_logger import NEEDED_ROOM, ImageLogger
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run


def logging(**params: Any) -> dict[str, Any]:
    defaults = {"batch_frequency": 4, "max_images": 2, "increase_log_steps": False}
    return {
        "lightning": {"callbacks": {"image_logger": {"target": "main.ImageLogger", "params": {**defaults, **params}}}}
    }


def written(run: ToyRun, split: str = "train", kind: str = "samples_gs") -> list[str]:
    return sorted(path.name for path in (run.directory.images / split).glob(f"{kind}*"))


def test_it_is_found_where_the_yaml_files_of_2022_look_for_it() -> None:
    assert main.ImageLogger is ImageLogger


def test_pictures_are_written_every_few_optimiser_steps(pictures: Path, tmp_path: Path) -> None:
    assert written(toy_run(tmp_path, pictures, **logging())) == [
        "samples_gs-000004_e-000000_b-000003.jpg",
        "samples_gs-000008_e-000001_b-000001.jpg",
        "samples_gs-000012_e-000001_b-000005.jpg",
    ]


def test_each_time_writes_every_kind_an_overview_and_the_captions(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, **logging())
    ending = "_gs-000004_e-000000_b-000003"
    files = {path.name for path in (run.directory.images / "train").glob(f"*{ending}*")}
    kinds = ("inputs", "reconstruction", "samples", "samples_cfg_scale_5.00", "overview")
    assert files == {f"{kind}{ending}.jpg" for kind in kinds} | {f"captions{ending}.txt"}


def test_captions_are_written_in_the_pictures_order(pictures: Path, tmp_path: Path) -> None:
    class Remembers(ToyDiffusion):
        def log_images(self, batch: dict[str, Any], N: int = 8, scale: float = 5.0) -> dict[str, torch.Tensor]:
            self.captions = batch["caption"][:N]
            return super().log_images(batch, N, scale)

    model = Remembers()
    run = toy_run(tmp_path, pictures, model=model, **logging(batch_frequency=10))
    text = (run.directory.images / "train" / "captions_gs-000010_e-000001_b-000003.txt").read_text(encoding="utf-8")
    assert text == "".join(f"{number}: {caption}\n" for number, caption in enumerate(model.captions))


@pytest.mark.parametrize(("max_images", "columns"), [(2, 2), (3, 3), (16, 4)])
def test_at_most_the_asked_number_of_pictures_is_written(
    max_images: int, columns: int, pictures: Path, tmp_path: Path
) -> None:
    run = toy_run(tmp_path, pictures, batch_size=4, **logging(max_images=max_images, batch_frequency=3))
    with Image.open(next((run.directory.images / "train").glob("inputs*"))) as picture:
        assert picture.size == (columns * 16 + (columns + 1) * 2, 20)


def test_an_accumulated_step_is_written_once(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, accumulate_grad_batches=3, **logging(batch_frequency=1))
    assert [name[11:20] for name in written(run)] == ["000001_e-", "000002_e-", "000003_e-", "000004_e-"]


def test_early_steps_are_written_at_powers_of_two(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, **logging(batch_frequency=9, increase_log_steps=True))
    assert [int(name[11:17]) for name in written(run)] == [1, 2, 4, 8, 9]


@pytest.mark.parametrize(("log_first_step", "steps"), [(True, [1, 10]), (False, [10])])
def test_the_first_step_is_written_if_asked_for(
    log_first_step: bool, steps: list[int], pictures: Path, tmp_path: Path
) -> None:
    run = toy_run(tmp_path, pictures, **logging(batch_frequency=10, log_first_step=log_first_step))
    assert [int(name[11:17]) for name in written(run)] == steps


def test_batches_of_an_epoch_can_be_counted_instead_of_steps(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, **logging(batch_frequency=5, log_on_batch_idx=True))
    assert [name[-10:-4] for name in written(run)] == ["000004", "000004"]


def test_disabled_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, **logging(disabled=True))
    assert list(run.directory.images.iterdir()) == []


def test_all_validation_batches_are_written_if_asked_for(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, max_epochs=1, **logging(batch_frequency=100, log_all_val=True))
    assert written(run, "val") == [f"samples_gs-000006_e-000000_b-00000{batch}.jpg" for batch in range(3)]


def test_a_validation_at_a_step_that_is_due_writes_its_first_batch(pictures: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, pictures, **logging(batch_frequency=6))
    assert [name[11:] for name in written(run, "val")] == [
        "000006_e-000000_b-000000.jpg",
        "000012_e-000001_b-000000.jpg",
    ]


def test_the_models_own_arguments_are_handed_on(pictures: Path, tmp_path: Path) -> None:
    class Remembers(ToyDiffusion):
        scales: list[float] = []

        def log_images(self, batch: dict[str, Any], N: int = 8, scale: float = 5.0) -> dict[str, torch.Tensor]:
            self.scales.append(scale)
            return super().log_images(batch, N, scale)

    toy_run(tmp_path, pictures, model=Remembers(), **logging(log_images_kwargs={"scale": 7.5}))
    assert set(Remembers.scales) == {7.5}


def test_training_goes_on_as_if_no_pictures_had_been_made(pictures: Path, tmp_path: Path) -> None:
    class DrawsFromTheGlobalGenerator(ToyDiffusion):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + 0.1 * torch.rand(()) * self.model[0].weight.sum()

    runs = []
    for name, disabled in (("with", False), ("without", True)):
        torch.manual_seed(0)
        model = DrawsFromTheGlobalGenerator()
        runs.append(toy_run(tmp_path / name, pictures, model=model, **logging(batch_frequency=1, disabled=disabled)))
    assert runs[0].model.losses == runs[1].model.losses
    assert torch.equal(runs[0].weights, runs[1].weights)


def test_each_part_of_the_model_keeps_its_mode(pictures: Path, tmp_path: Path) -> None:
    class FrozenPart(ToyDiffusion):
        modes: list[tuple[bool, bool]] = []

        def train(self, mode: bool = True) -> FrozenPart:
            super().train(mode)
            self.first_stage_model.eval()
            return self

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            self.modes.append((self.model.training, self.first_stage_model.training))
            return super().training_step(batch, batch_idx)

        def log_images(self, batch: dict[str, Any], N: int = 8, scale: float = 5.0) -> dict[str, torch.Tensor]:
            assert not self.model.training
            assert not torch.is_grad_enabled()
            return super().log_images(batch, N, scale)

    toy_run(tmp_path, pictures, model=FrozenPart().train(), validation=False, **logging(batch_frequency=1))
    assert set(FrozenPart.modes) == {(True, False)}


def test_lack_of_memory_for_pictures_does_not_end_training(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class TooLarge(ToyDiffusion):
        def log_images(self, batch: dict[str, Any], N: int = 8, scale: float = 5.0) -> dict[str, torch.Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    run = toy_run(tmp_path, pictures, model=TooLarge(), **logging())
    assert run.trainer.global_step == 12
    assert caplog.text.count("max_images") == 1


def test_pictures_that_cannot_be_written_do_not_end_training(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").write_text("a file where the folder goes")
    run = toy_run(tmp_path, pictures, **logging(batch_frequency=5))
    assert run.trainer.global_step == 12
    assert caplog.text.count(f"could not all be written in {tmp_path / 'images' / 'train'}") == 2


def test_pictures_leave_the_last_room_to_the_checkpoints(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Narrow(Disk):
        def free(self, folder: Path) -> int:
            return NEEDED_ROOM - 1

    run, data = prepare_toy_run(tmp_path, pictures, images=True, max_steps=1)
    next(each for each in run.trainer.callbacks if isinstance(each, ImageLogger)).disk = Narrow()  # type: ignore[attr-defined]
    run.trainer.fit(run.model, datamodule=data)
    assert not written(run)
    assert "sample pictures of step 1 could not all be written" in caplog.text
    assert "No space left" in caplog.text


def test_a_model_without_pictures_is_passed_over(pictures: Path, tmp_path: Path) -> None:
    class Silent(ToyDiffusion):
        log_images = None  # type: ignore[assignment]

    assert toy_run(tmp_path, pictures, model=Silent(), **logging()).trainer.global_step == 12


@pytest.mark.parametrize("key", ["batch_frequency", "max_images"])
def test_a_number_below_1_is_an_error_that_names_the_key(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        ImageLogger(**{"batch_frequency": 1, "max_images": 1, key: 0})
