"""What an epoch shows a model, through the real trainer, data module and callbacks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from ldm.data.every_dream import EveryDreamBatch
from ldm.ledger import read_ledger
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run

SHAPES = {"square": (40, 40), "wide": (60, 30), "tall": (30, 64), "strip": (100, 28)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven square pictures, five wide, two tall and a strip, of different colours."""
    root = tmp_path_factory.mktemp("shapes")
    counts = {"square": 7, "wide": 5, "tall": 2, "strip": 1}
    for folder, count in counts.items():
        (root / folder).mkdir()
        for number in range(count):
            picture = Image.linear_gradient("L").resize(SHAPES[folder]).convert("RGB")
            tint = Image.new("RGB", picture.size, (37 * number % 256, 90, 255 - 31 * number))
            Image.blend(picture, tint, 0.5).save(root / folder / f"a {folder} {number}_.png")
    return root


class EpochGradient(ToyDiffusion):
    """Adds an epoch's gradients up instead of stepping."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [parameter.grad.clone() for parameter in self.model.parameters() if parameter.grad is not None]
        so_far = getattr(self, "gradients", [torch.zeros_like(gradient) for gradient in gradients])
        self.gradients: list[Tensor] = [one + other for one, other in zip(so_far, gradients, strict=True)]


def epoch_gradient(folder: Path, pictures: Path, batch_size: int, **options: Any) -> Tensor:
    """The mean of an epoch's gradients over its pictures."""
    torch.manual_seed(0)
    model = EpochGradient()
    run = toy_run(folder, pictures, model=model, batch_size=batch_size, max_epochs=1, **options)
    assert run.trainer.global_step > 0
    pictures_in_step = batch_size * options.get("accumulate_grad_batches", 1)
    return torch.cat([gradient.flatten() for gradient in model.gradients]) * pictures_in_step / 30


@pytest.mark.parametrize(
    "options", [{"batch_size": 4}, {"batch_size": 6}, {"batch_size": 3, "accumulate_grad_batches": 3}]
)
def test_the_gradient_of_an_epoch_is_that_of_batch_size_1(
    options: dict[str, int], shapes: Path, tmp_path: Path
) -> None:
    single = epoch_gradient(tmp_path / "single", shapes, 1)
    batched = epoch_gradient(tmp_path / "batched", shapes, **options)
    torch.testing.assert_close(batched, single, rtol=1e-5, atol=1e-6)


def ledger(run: ToyRun) -> list[dict[str, Any]]:
    return list(read_ledger(run.directory.path / "exposure.jsonl"))


def test_the_ledger_has_each_picture_as_often_as_an_epoch_shows_it(shapes: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, shapes, batch_size=4, repeats=3)
    times = Counter((entry["epoch"], entry["path"]) for entry in ledger(run))
    assert len(times) == 2 * 15
    assert set(times.values()) == {3}


def test_the_ledger_tells_batches_and_steps(shapes: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path, shapes, batch_size=4, accumulate_grad_batches=2)
    entries = ledger(run)
    by_batch: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for entry in entries:
        by_batch.setdefault((entry["epoch"], entry["batch"]), []).append(entry)
    assert all(len({tuple(entry["size"]) for entry in batch}) == 1 for batch in by_batch.values())
    assert [tuple(map(int, row)) for row in run.model.shown] == [
        (entry["seed"], entry["epoch"], entry["item"], entry["repeat"]) for entry in entries
    ]
    assert max(entry["step"] for entry in entries) == run.trainer.global_step


class Keep(pl.Callback):
    """Keeps copies of what the model was trained on."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for number in range(len(batch["path"])):
            self.items.append({key: value[number] for key, value in batch.items()})


def test_an_entry_replayed_is_what_the_model_was_trained_on(shapes: Path, tmp_path: Path) -> None:
    keep = Keep()
    run, data = prepare_toy_run(tmp_path, shapes, batch_size=4, repeats=2, extra=[keep])
    augmented = {"crop": "random", "flip_p": 0.5, "conditional_dropout": 0.3, "shuffle_tags": True}
    data.dataset_configs["train"]["params"].update(augmented)
    run.trainer.fit(run.model, datamodule=data)
    dataset = EveryDreamBatch(str(shapes), size=16)
    entries = ledger(run)
    assert len(entries) == len(keep.items) == 60
    assert len({entry["flip"] for entry in entries}) == len({entry["dropped"] for entry in entries}) == 2
    for entry, item in zip(entries, keep.items, strict=True):
        again = dataset.replay(entry)
        assert again.keys() == item.keys()
        assert torch.equal(torch.as_tensor(again["image"]), item["image"])
        assert torch.equal(again["exposure"], item["exposure"])
        assert (again["caption"], again["dropped"], again["flip"]) == (item["caption"], item["dropped"], item["flip"])


def test_a_resumed_run_leaves_the_ledger_of_an_unbroken_one(shapes: Path, tmp_path: Path) -> None:
    whole = toy_run(tmp_path / "whole", shapes, batch_size=4)
    broken = tmp_path / "broken"
    toy_run(broken, shapes, batch_size=4, max_steps=6)
    lines = (broken / "exposure.jsonl").read_text()
    (broken / "exposure.jsonl").write_text(lines + json.dumps({"run_epoch": 1, "batch": 4}) + '\n{"run_epoch": 1, "ba')
    resumed = toy_run(broken, shapes, batch_size=4, checkpoint=broken / "checkpoints" / "last.ckpt")
    assert ledger(resumed) == ledger(whole)


def test_a_resume_with_another_batch_size_still_shows_each_exposure_once(shapes: Path, tmp_path: Path) -> None:
    toy_run(tmp_path, shapes, batch_size=4, max_steps=6)
    run = toy_run(tmp_path, shapes, batch_size=3, checkpoint=tmp_path / "checkpoints" / "last.ckpt", max_epochs=3)
    keys = Counter((entry["epoch"], entry["item"], entry["repeat"]) for entry in ledger(run))
    assert len(keys) == 3 * 30
    assert set(keys.values()) == {1}


def test_a_fraction_of_a_showing_is_made_up_for_over_epochs(shapes: Path, tmp_path: Path) -> None:
    multiplied = shutil.copytree(shapes, tmp_path / "pictures")
    (multiplied / "square" / "multiply.txt").write_text("0.5")
    (multiplied / "wide" / "multiply.txt").write_text("2")
    (multiplied / "strip" / "multiply.txt").write_text("0")
    run = toy_run(tmp_path / "run", multiplied, batch_size=4, repeats=1, max_epochs=4)
    entries = ledger(run)
    times = Counter((Path(entry["path"]).parent.name, entry["path"]) for entry in entries)
    assert {(folder, count) for (folder, _), count in times.items()} == {("square", 2), ("wide", 8), ("tall", 4)}
    by_epoch = Counter(entry["epoch"] for entry in entries)
    assert [by_epoch[epoch] for epoch in range(4)] == [4 + 10 + 2, 3 + 10 + 2, 4 + 10 + 2, 3 + 10 + 2]


def test_a_run_in_fractions_can_be_resumed_in_an_epoch(shapes: Path, tmp_path: Path) -> None:
    multiplied = shutil.copytree(shapes, tmp_path / "pictures")
    (multiplied / "square" / "multiply.txt").write_text("0.5")
    options: dict[str, Any] = {"batch_size": 2, "repeats": 1, "max_epochs": 3}
    whole = toy_run(tmp_path / "whole", multiplied, **options)
    toy_run(tmp_path / "broken", multiplied, **{**options, "max_steps": 9})
    resumed = toy_run(
        tmp_path / "broken", multiplied, checkpoint=tmp_path / "broken" / "checkpoints" / "last.ckpt", **options
    )
    assert ledger(resumed) == ledger(whole)
    assert torch.equal(resumed.weights, whole.weights)


class SaveAt(pl.Callback):
    """Saves a checkpoint at the end of one batch."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("batch_size", [2, 7])
def test_an_epoch_saved_at_its_last_batch_stays_whole_in_the_ledger(
    shapes: Path, tmp_path: Path, batch_size: int
) -> None:
    saved = tmp_path / "saved.ckpt"
    toy_run(tmp_path, shapes, batch_size=4, max_epochs=1, extra=[SaveAt(saved, 8)])
    run = toy_run(tmp_path, shapes, batch_size=batch_size, checkpoint=saved)
    keys = Counter((entry["epoch"], entry["item"], entry["repeat"]) for entry in ledger(run))
    assert len(keys) == 2 * 30
    assert set(keys.values()) == {1}
    assert len(run.model.shown) == 30


def test_a_resume_on_fewer_devices_takes_entries_of_the_others_out_too(shapes: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.ckpt"
    toy_run(tmp_path, shapes, batch_size=4, max_epochs=1, extra=[SaveAt(saved, 3)])
    lines = [json.dumps({"run_epoch": 0, "batch": batch}) for batch in range(8)]
    other = tmp_path / "exposure.rank1.jsonl"
    other.write_text("\n".join(lines) + "\n")
    toy_run(tmp_path, shapes, batch_size=4, max_epochs=1, checkpoint=saved)
    assert other.read_text().splitlines() == lines[:4]
