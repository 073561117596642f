"""Interrupted and unbroken runs of a toy model, by the exposures that each trains on."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ldm.data.data_module import DataModuleFromConfig

Event = tuple[Any, ...]
EPOCHS = 3
PICTURES, REPEATS = 5, 3
BATCHES = 8  # an epoch's 15 exposures, two at a time


class Toy(pl.LightningModule):
    """Writes down what it is shown."""

    def __init__(self, crash_at: Event | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.events: list[Event] = []
        self.crash_at = crash_at

    def write_down(self, kind: str, batch: dict[str, Any], batch_idx: int) -> None:
        logged_step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        place = (kind, self.current_epoch, batch_idx)
        self.events.append((*place, self.global_step, logged_step, batch["exposure"].tolist()))
        if place == self.crash_at:
            raise RuntimeError("crash")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.write_down("train", batch, batch_idx)
        return self.layer(batch["image"].mean(dim=(1, 2, 3))[:, None]).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.write_down("validation", batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(pl.Callback):
    """Saves a checkpoint in one hook of one epoch (and batch)."""

    def __init__(self, path: Path, hook: str, epoch: int = 1, batch: int | None = None) -> None:
        self.path, self.place = path, (hook, epoch, batch)

    def save_at(self, trainer: pl.Trainer, hook: str, batch: int | None = None) -> None:
        if self.place == (hook, trainer.current_epoch, batch):
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.save_at(trainer, "batch end", batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.save_at(trainer, "validation end")

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.save_at(trainer, "epoch start")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.save_at(trainer, "epoch end")

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.save_at(trainer, "exception")


class StopAt(pl.Callback):
    """Asks the trainer to stop after an optimiser step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        yield
    lightning.setLevel(level)


@pytest.fixture
def fit(make_root: Callable[..., Path]) -> Callable[..., list[Event]]:
    """Run the toy, and return what it was shown."""
    root = str(make_root(*(f"f{number % 2}/p{number}.png" for number in range(PICTURES))))

    def run(
        *callbacks: pl.Callback,
        checkpoint: Path | None = None,
        batch_size: int = 2,
        workers: int = 0,
        crash_at: Event | None = None,
        repeats: int = REPEATS,
        size: int = 8,
        seed: int = 23,
        **trainer_arguments: Any,
    ) -> list[Event]:
        params = {"data_root": root, "size": size}
        train = {
            "target": "ldm.data.every_dream.EveryDreamBatch",
            "params": params | {"repeats": repeats, "flip_p": 0.5},
        }
        validation = {"target": "ldm.data.ed_validate.EDValidateBatch", "params": params}
        data = DataModuleFromConfig(batch_size, train=train, validation=validation, num_workers=workers, seed=seed)
        module = Toy(crash_at)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=list(callbacks),
            **{"max_epochs": EPOCHS, **trainer_arguments},
        )
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except RuntimeError as error:
            if str(error) != "crash":
                raise
        return module.events

    return run


def exposures(events: list[Event]) -> list[list[int]]:
    return [row for event in events if event[0] == "train" for row in event[-1]]


Fit = Callable[..., list[Event]]


def test_an_unbroken_run_shows_every_exposure_once_an_epoch(fit: Fit) -> None:
    rows = exposures(fit())
    assert len(rows) == len({tuple(row) for row in rows}) == EPOCHS * PICTURES * REPEATS
    assert [row[1] for row in rows] == [epoch for epoch in range(EPOCHS) for _ in range(PICTURES * REPEATS)]


def test_validation_shows_each_picture_once_after_every_epoch_and_always_alike(fit: Fit) -> None:
    events = fit()
    rounds = [
        [row for event in events if event[:2] == ("validation", epoch) for row in event[-1]] for epoch in range(EPOCHS)
    ]
    assert rounds[0] == rounds[1] == rounds[2]
    assert len({row[2] for row in rounds[0]}) == len(rounds[0]) == PICTURES


# The everyday YAML sets max_steps far away, which makes Lightning resume by other rules.
@pytest.mark.parametrize("max_steps", [-1, 99000])
@pytest.mark.parametrize(
    ("place", "trained"),
    [
        (("batch end", 1, 0), BATCHES + 1),
        (("batch end", 1, 4), BATCHES + 5),
        (("batch end", 1, BATCHES - 2), 2 * BATCHES - 1),
        (("batch end", 1, BATCHES - 1), 2 * BATCHES),
        (("validation end", 1, None), 2 * BATCHES),
        (("epoch end", 1, None), 2 * BATCHES),
        (("epoch end", 0, None), BATCHES),
        (("epoch start", 1, None), BATCHES),
    ],
)
def test_a_resumed_run_goes_on_as_the_unbroken_one(
    fit: Fit, tmp_path: Path, place: Event, trained: int, max_steps: int
) -> None:
    path = tmp_path / "saved.ckpt"
    unbroken = fit(SaveAt(path, *place), max_steps=max_steps)
    resumed = fit(checkpoint=path, max_steps=max_steps)
    assert resumed == unbroken[-len(resumed) :]
    assert sum(event[0] == "train" for event in resumed) == EPOCHS * BATCHES - trained
    # Two rounds of validation are to come, but where the second one is over already.
    assert len({event[1] for event in resumed if event[0] == "validation"}) == (
        1 if place[0] == "validation end" or place[:2] == ("epoch end", 1) else 2
    )


@pytest.mark.parametrize("crash_at", [("train", 1, 0), ("train", 1, 3), ("validation", 1, 0), ("validation", 1, 1)])
def test_a_run_that_crashed_within_a_batch_comes_back_to_it(fit: Fit, tmp_path: Path, crash_at: Event) -> None:
    path = tmp_path / "saved.ckpt"
    unbroken = fit()
    crashed = fit(SaveAt(path, "exception"), crash_at=crash_at)
    resumed = fit(checkpoint=path)
    assert crashed[-1][:3] == crash_at
    assert resumed == unbroken[-len(resumed) :]
    # What stopped within its validation starts that again from its beginning.
    assert resumed[0][:3] == (crash_at if crash_at[0] == "train" else ("validation", 1, 0))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_batches_of_an_unfinished_optimiser_step_come_again(fit: Fit, tmp_path: Path, batch: int) -> None:
    path = tmp_path / "saved.ckpt"
    unbroken = fit(SaveAt(path, "batch end", 1, batch), accumulate_grad_batches=3)
    resumed = fit(checkpoint=path, accumulate_grad_batches=3)
    assert resumed == unbroken[-len(resumed) :]
    done = batch + 1 if batch + 1 == BATCHES else (batch + 1) // 3 * 3
    assert sum(event[0] == "train" for event in resumed) == 2 * BATCHES - done


@pytest.mark.parametrize(("callbacks", "stop"), [((), {"max_steps": 11}), ((StopAt(11),), {})])
@pytest.mark.parametrize("max_steps", [-1, 99000])
def test_an_epoch_that_a_stop_cut_short_is_finished_by_the_resumed_run(
    fit: Fit, tmp_path: Path, callbacks: tuple[pl.Callback, ...], stop: dict[str, int], max_steps: int
) -> None:
    path = tmp_path / "saved.ckpt"
    fit(SaveAt(path, "epoch end"), *callbacks, **stop)
    resumed = fit(checkpoint=path, max_steps=max_steps)
    assert resumed == fit()[-len(resumed) :]
    assert sum(event[0] == "train" for event in resumed) == EPOCHS * BATCHES - 11


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_another_batch_size_goes_on_at_the_same_exposure(fit: Fit, tmp_path: Path, batch_size: int) -> None:
    path = tmp_path / "saved.ckpt"
    unbroken = fit(SaveAt(path, "batch end", 1, 4))
    resumed = exposures(fit(checkpoint=path, batch_size=batch_size))
    assert resumed == exposures(unbroken)[-len(resumed) :]
    left = 2 * PICTURES * REPEATS - 10
    assert left <= len(resumed) < left + batch_size


def test_a_changed_set_is_told(fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "saved.ckpt"
    fit(SaveAt(path, "batch end", 1, 4))
    resumed = exposures(fit(checkpoint=path, repeats=4))
    assert "an epoch has 20 exposures and had 15" in caplog.text
    assert [sum(row[1] == epoch for row in resumed) for epoch in (1, 2)] == [10, 20]


def test_a_changed_order_is_told(fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "saved.ckpt"
    fit(SaveAt(path, "batch end", 1, 4))
    fit(checkpoint=path, size=16, batch_size=3)
    assert "new order" not in caplog.text
    resumed = exposures(fit(checkpoint=path, seed=24))
    assert "the seed or the pictures' shapes are others than when the checkpoint was saved" in caplog.text
    assert [sum(row[1] == epoch for row in resumed) for epoch in (1, 2)] == [5, 15]


def test_loader_processes_change_nothing_resumed_or_not(fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    unbroken = fit()
    assert fit(SaveAt(path, "batch end", 1, 4), workers=2) == unbroken
    resumed = fit(checkpoint=path, workers=2)
    assert resumed == unbroken[-len(resumed) :]
    assert sum(event[0] == "train" for event in resumed) == EPOCHS * BATCHES - BATCHES - 5


def test_small_batches_with_accumulation_show_each_step_what_a_large_batch_shows_it(fit: Fit) -> None:
    def by_step(events: list[Event]) -> dict[int, list[list[int]]]:
        steps: dict[int, list[list[int]]] = {}
        for kind, _, _, step, _, rows in events:
            if kind == "train":
                steps.setdefault(step, []).extend(rows)
        return steps

    large = by_step(fit(batch_size=6))
    assert by_step(fit(batch_size=2, accumulate_grad_batches=3)) == large
    assert len(large) == EPOCHS * 3


def test_a_limit_on_batches_is_an_epoch_of_its_own_length(fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    unbroken = fit(SaveAt(path, "epoch end"), limit_train_batches=3, max_steps=99000)
    resumed = fit(checkpoint=path, limit_train_batches=3, max_steps=99000)
    assert resumed == unbroken[-len(resumed) :]
    assert sum(event[0] == "train" for event in resumed) == 3


@pytest.mark.parametrize(
    "chain",
    [
        [(2, 1, 3), (3, 1, 4), (1, 1, 6), (4, 1, None)],
        [(2, 1, 3), (2, 1, 5), (3, 1, None)],
        [(2, 1, 4), (3, 3, 5), (2, 3, None)],
        [(3, 2, 2), (1, 3, 5), (5, 2, None)],
    ],
)
def test_an_epoch_resumed_several_times_shows_each_exposure_once(
    fit: Fit, tmp_path: Path, chain: list[tuple[int, int, int | None]]
) -> None:
    """Each link: batch size, batches to an optimiser step, and the batch of the epoch after which it ends."""
    checkpoint: Path | None = None
    taken_in: list[list[int]] = []
    for number, (batch_size, accumulate, stop) in enumerate(chain):
        path = tmp_path / f"{number}.ckpt"
        callbacks = [] if stop is None else [SaveAt(path, "batch end", 0, stop)]
        events = fit(
            *callbacks, checkpoint=checkpoint, batch_size=batch_size, accumulate_grad_batches=accumulate, max_epochs=1
        )
        trained = [event for event in events if event[0] == "train"]
        # What the checkpoint does not hold comes again: batches after it, and of an unfinished optimiser step.
        first = trained[0][2]
        kept = len(trained) if stop is None else max(first, (stop + 1) // accumulate * accumulate) - first
        taken_in += exposures(trained[:kept])
        checkpoint = path
    rows = [tuple(row) for row in taken_in]
    assert len(rows) == len(set(rows)) == PICTURES * REPEATS


@pytest.mark.parametrize("rule", [{"check_val_every_n_epoch": 2}, {"check_val_every_n_epoch": None}])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_validates_by_the_trainers_rule(
    fit: Fit, tmp_path: Path, rule: dict[str, int | None], epoch: int
) -> None:
    path = tmp_path / "saved.ckpt"
    interval = {"val_check_interval": 12} if rule["check_val_every_n_epoch"] is None else {}
    for batch in (3, BATCHES - 1):
        unbroken = fit(SaveAt(path, "batch end", epoch, batch), **rule, **interval)
        resumed = fit(checkpoint=path, **rule, **interval)
        assert resumed == unbroken[-len(resumed) :]
        assert sum(event[0] == "train" for event in resumed) == EPOCHS * BATCHES - epoch * BATCHES - batch - 1
