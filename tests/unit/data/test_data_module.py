import logging
import random
import signal
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from ldm.data import every_dream
from ldm.data.data_module import DataModuleFromConfig, seed_global_generators
from ldm.data.loader_signals import OUTLIVED, outlive_group_signals

TRAIN = "ldm.data.every_dream.EveryDreamBatch"
VALIDATION = "ldm.data.ed_validate.EDValidateBatch"
Root = str


class Squares:
    """A data set of another project: no torch class, no exposure, nothing beyond its length."""

    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"number": index, "square": index**2}


class Signalled(Squares):
    """Gets, in a loader process, every signal that such a process outlives, as if it had not inherited a handler."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        for name in OUTLIVED:
            if hasattr(signal, name):
                signal.raise_signal(getattr(signal, name))
        return super().__getitem__(index)


class Stream(IterableDataset):
    """Has no items by number."""

    def __iter__(self):
        return iter(range(3))


@pytest.fixture
def root(make_root: Callable[..., Path]) -> Root:
    return str(make_root(*(f"f{number % 2}/p{number}.png" for number in range(5))))


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Make this file's classes importable by a target string."""
    module = types.ModuleType("foreign_project")
    for kind in (Squares, Signalled, Stream):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "foreign_project", module)
    return lambda name, **params: {"target": f"foreign_project.{name}", "params": params}


def ours(root: Root, target: str = TRAIN, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": {"data_root": root, "size": 8, **params}}


def build(root: Root, batch_size: int = 2, **arguments: Any) -> DataModuleFromConfig:
    arguments = {"train": ours(root, repeats=3), "validation": ours(root, VALIDATION), "num_workers": 0, **arguments}
    module = DataModuleFromConfig(batch_size, **arguments)
    module.setup()
    return module


def test_the_data_sets_are_built_by_split(root: Root) -> None:
    module = build(root, test=ours(root, VALIDATION), predict=ours(root, VALIDATION))
    assert {split: len(dataset) for split, dataset in module.datasets.items()} == {
        "train": 15,
        "validation": 5,
        "test": 5,
        "predict": 5,
    }


def test_a_second_setup_does_nothing(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(root)
    datasets = dict(module.datasets)
    monkeypatch.setattr(every_dream, "find_broken_pictures", lambda paths: pytest.fail("checked again"))
    module.setup("fit")
    assert module.datasets == datasets


def test_every_loader_keeps_its_last_short_batch(root: Root) -> None:
    module = build(root, test=ours(root, VALIDATION), predict=ours(root, VALIDATION))
    loaders = [module.train_dataloader(), module.val_dataloader(), module.test_dataloader()]
    loaders.append(module.predict_dataloader())
    assert [[len(batch["path"]) for batch in loader] for loader in loaders] == [[2] * 7 + [1]] + [[2, 2, 1]] * 3


def test_splits_without_a_config_have_no_loader(root: Root) -> None:
    module = build(root, validation=None)
    assert [module.val_dataloader(), module.test_dataloader(), module.predict_dataloader()] == [[], [], []]
    assert build(root, train=None).train_dataloader() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_persistent_loader_processes_serve_every_epoch_alike(root: Root, workers: int) -> None:
    reference = build(root, train=ours(root, repeats=3, flip_p=0.5, conditional_dropout=0.5)).train_dataloader()
    module = build(root, train=ours(root, repeats=3, flip_p=0.5, conditional_dropout=0.5), num_workers=workers)
    loader = module.train_dataloader()
    assert loader.persistent_workers == (workers > 0)
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        reference.batch_sampler.set_epoch(epoch)
        for batch, expected in zip(loader, reference, strict=True):
            assert torch.equal(batch["exposure"], expected["exposure"])
            assert torch.equal(batch["image"], expected["image"])
            assert batch["caption"] == expected["caption"]
            assert set(batch["exposure"][:, 1].tolist()) == {epoch}


def test_validation_comes_in_order_and_training_shuffled(root: Root) -> None:
    module = build(root, batch_size=5)
    paths = [path for batch in module.val_dataloader() for path in batch["path"]]
    assert paths == sorted(paths)
    first = [path for batch in module.train_dataloader() for path in batch["path"]]
    assert first != [path for picture in module.datasets["train"].pictures for path in [picture.path] * 3]
    assert first[:5] != paths


def test_validation_and_test_can_be_shuffled(root: Root) -> None:
    module = build(root, test=ours(root, VALIDATION), shuffle_val_dataloader=True, shuffle_test_loader=True)
    for loader in (module.val_dataloader(), module.test_dataloader()):
        paths = [path for batch in loader for path in batch["path"]]
        assert paths != sorted(paths)
        assert len(set(paths)) == 5


def test_steps_are_counted_for_the_readmes_example() -> None:
    module = DataModuleFromConfig(batch_size=6)
    module.datasets = {"train": range(500 * 10), "validation": range(500)}
    assert (module.steps_per_epoch("train"), module.steps_per_epoch("validation")) == (834, 84)
    assert module.steps_per_epoch("train", num_replicas=2) == 417
    assert module.steps_per_epoch("test") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "data.params.batch_size 0 is not allowed; give at least 1"),
        ({"batch_size": 1, "num_workers": -1}, "data.params.num_workers -1 is not allowed; give 0"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataModuleFromConfig(**arguments)


def test_a_batch_larger_than_the_set_is_an_error_with_the_numbers(root: Root) -> None:
    with pytest.raises(ValueError, match=r"batch_size 16 .* 15 exposures .* data\.params\.batch_size=15"):
        build(root, batch_size=16)


def test_a_batch_as_large_as_the_set_is_fine_also_where_validation_is_smaller(root: Root) -> None:
    module = build(root, batch_size=15)
    assert (len(module.train_dataloader()), len(module.val_dataloader())) == (1, 1)


def test_broken_pictures_of_both_sets_are_one_error_with_both_keys(root: Root) -> None:
    (Path(root) / "f0" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError) as caught:
        build(root)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "bad.png: not a picture" in lines[0]
    assert "data.params.train.params.on_bad_image=skip" in lines[1]
    assert "data.params.validation.params.on_bad_image=skip" in lines[1]


def test_broken_pictures_can_be_left_out_of_both_sets(root: Root) -> None:
    (Path(root) / "f0" / "bad.png").write_bytes(b"no picture")
    module = build(
        root,
        train=ours(root, repeats=3, on_bad_image="skip"),
        validation=ours(root, VALIDATION, on_bad_image="skip"),
    )
    assert [len(dataset) for dataset in module.datasets.values()] == [15, 5]
    assert len(list(module.train_dataloader())) == 8


def test_a_validation_set_as_training_set_is_an_error(root: Root) -> None:
    with pytest.raises(ValueError, match=r"train\.target .* is a validation set.*EveryDreamBatch"):
        build(root, train=ours(root, "ldm.data.personalized.PersonalizedBase"))


def test_left_out_files_and_empty_captions_are_told(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    (Path(root) / "f0" / "notes.md").touch()
    (Path(root) / "f0" / "p0.png").rename(Path(root) / "f0" / "_1.png")
    with caplog.at_level(logging.WARNING):
        build(root)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2  # though both sets read the folder
    assert told[0] == "1 file left out, no picture: f0/notes.md"
    assert told[1].startswith("1 picture has an empty caption")


def test_left_out_files_of_another_folder_are_told_too(
    root: Root, make_root: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = make_root("g/1.png", root="other")
    (other / "g" / "list.md").touch()
    with caplog.at_level(logging.WARNING):
        build(root, validation=ours(str(other), VALIDATION))
    assert [record.getMessage() for record in caplog.records] == ["1 file left out, no picture: g/list.md"]


def test_a_data_set_of_another_project_is_shown_whole_in_every_epoch(
    foreign: Callable[..., dict[str, Any]],
) -> None:
    module = DataModuleFromConfig(3, train=foreign("Squares", count=10), num_workers=0)
    module.setup()
    loader = module.train_dataloader()
    orders = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        batches = list(loader)
        assert all(batch.keys() == {"number", "square"} for batch in batches)
        orders.append([number for batch in batches for number in batch["number"].tolist()])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("wrap", [False, True])
def test_wrapping_makes_a_torch_data_set_of_what_is_none(
    foreign: Callable[..., dict[str, Any]], root: Root, wrap: bool
) -> None:
    module = DataModuleFromConfig(2, train=foreign("Squares"), validation=ours(root, VALIDATION), wrap=wrap)
    module.setup()
    assert isinstance(module.datasets["train"], torch.utils.data.Dataset) == wrap
    assert module.datasets["train"][3] == {"number": 3, "square": 9}
    assert type(module.datasets["validation"]).__name__ == "EDValidateBatch"


def test_a_data_set_without_items_by_number_is_an_error(foreign: Callable[..., dict[str, Any]]) -> None:
    module = DataModuleFromConfig(2, train=foreign("Stream"))
    with pytest.raises(ValueError, match=r"data\.params\.train\.target 'foreign_project\.Stream'.*__getitem__"):
        module.setup()


def test_an_empty_data_set_is_an_error(foreign: Callable[..., dict[str, Any]]) -> None:
    module = DataModuleFromConfig(2, validation=foreign("Squares", count=0))
    with pytest.raises(ValueError, match=r"data\.params\.validation.*holds no items"):
        module.setup()


@pytest.mark.parametrize("asked", [False, True])
def test_loader_processes_seed_the_global_generators_where_asked(root: Root, asked: bool) -> None:
    loader = build(root, use_worker_init_fn=asked).train_dataloader()
    assert loader.worker_init_fn is (seed_global_generators if asked else outlive_group_signals)


@pytest.mark.parametrize("asked", [False, True])
def test_loader_processes_outlive_signals_to_their_group(foreign: Callable[..., dict[str, Any]], asked: bool) -> None:
    data = DataModuleFromConfig(2, train=foreign("Signalled"), wrap=True, num_workers=1, use_worker_init_fn=asked)
    data.setup()
    assert [len(batch["number"]) for batch in data.train_dataloader()] == [2] * 5


def test_the_signals_of_the_main_process_stay_as_they_are() -> None:
    before = signal.getsignal(signal.SIGINT)
    outlive_group_signals(0)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_global_generators_follow_torchs_seed_of_the_process() -> None:
    def draw(seed: int) -> tuple[int, float]:
        torch.manual_seed(seed)
        seed_global_generators(worker_id=0)
        return int(np.random.randint(2**31)), random.random()

    numpy_state, python_state, torch_state = np.random.get_state(), random.getstate(), torch.random.get_rng_state()
    try:
        assert draw(1) == draw(1)
        assert draw(1) != draw(2)
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.random.set_rng_state(torch_state)


class OnRanks:
    """Stands in for the trainer of one of several ranks."""

    class strategy:
        root_device = torch.device("cpu")

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.global_rank = world_size, rank


def test_ranks_share_an_epoch_and_see_each_exposure_once(root: Root) -> None:
    shares = []
    for rank in range(2):
        module = build(root)
        module.trainer = OnRanks(2, rank)  # type: ignore[assignment]
        loader = module.train_dataloader()
        loader.progress = None
        rows = [
            (tuple(row), weight)
            for batch in loader
            for row, weight in zip(batch["exposure"].tolist(), batch["loss_weight"].tolist(), strict=True)
        ]
        shares.append([row for row, weight in rows if weight])
    assert sorted(map(len, shares)) == [7, 8]
    assert len(set(shares[0]) | set(shares[1])) == 15


def test_items_of_other_projects_that_are_shown_twice_are_told(
    foreign: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    module = DataModuleFromConfig(3, train=foreign("Squares", count=7), num_workers=0)
    module.setup()
    module.trainer = OnRanks(2, 0)  # type: ignore[assignment]
    with caplog.at_level(logging.INFO):
        module.train_dataloader()
    assert "train: 7 items do not divide among 2 devices; some are shown twice an epoch" in caplog.text


def test_a_batch_of_all_ranks_larger_than_the_set_is_an_error(root: Root) -> None:
    module = build(root, batch_size=8)
    module.trainer = OnRanks(2, 0)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"batch_size 8 on 2 devices .* data\.params\.batch_size=7"):
        module.train_dataloader()


class Predicting(pl.LightningModule):
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        return batch["path"]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.shown = [*getattr(self, "shown", []), batch["exposure"].tolist()]

    def configure_optimizers(self) -> None:
        return None


@pytest.fixture
def trainer_arguments(tmp_path: Path) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }


def test_the_trainer_can_predict_with_the_loader(root: Root, trainer_arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = pl.Trainer(**trainer_arguments).predict(
            Predicting(), datamodule=build(root, predict=ours(root, VALIDATION))
        )
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_the_trainer_can_overfit_on_a_few_batches(root: Root, trainer_arguments: dict[str, Any]) -> None:
    module = Predicting()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = build(root)
        pl.Trainer(**trainer_arguments, overfit_batches=2, max_epochs=2).fit(module, datamodule=data)
    assert module.shown[:2] == module.shown[2:]
    in_order = [data.datasets["train"][index]["exposure"].tolist() for index in range(4)]
    assert module.shown[:2] == [in_order[:2], in_order[2:]]


def test_what_looks_wrong_is_told_at_the_start(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("CMYK", (80, 80)).save(Path(root) / "f0" / "a print.jpg")
    with caplog.at_level(logging.WARNING):
        build(root)
    assert "a print.jpg" in caplog.text
    assert "CMYK" in caplog.text
