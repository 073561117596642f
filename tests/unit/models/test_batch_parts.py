"""Batches that do not fit into memory: taken in parts, they give the gradients and the figures of the whole."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from ldm.models.batch_parts import BatchParts
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.keyed_batches import slice_rows
from tests.unit.models.small import build_text_model

# A sum over parts rounds elsewhere than one over the batch.
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 1e-6}


class Hungry(nn.Module):
    """A network of two layers that runs out of memory with more than so many pictures, forwards or backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 3, 3, padding=1)
        self.most = {"forward": 99, "backward": 99, "evaluation": 99}
        self.sizes: list[int] = []
        self.autocast: list[bool] = []
        self.activations: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        self.sizes.append(len(x))
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        hidden = self.first(x) + (t.float() / 1000)[:, None, None, None]
        if hidden.requires_grad:
            self.activations.append(weakref.ref(hidden))
            hidden.register_hook(lambda gradient: self._eat(len(gradient), "backward"))
        self._eat(len(x), "forward" if torch.is_grad_enabled() else "evaluation")
        return self.second(torch.nn.functional.silu(hidden))

    def _eat(self, pictures: int, when: str) -> None:
        if pictures > self.most[when]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def build(use_ema: bool = False, **params: Any) -> DDPM:
    torch.manual_seed(0)
    network = {"target": "tests.unit.models.test_batch_parts.Hungry"}
    model = DDPM(network, image_size=8, use_ema=use_ema, **params)
    model.learning_rate = 1e-2
    return model


def network_of(model: DDPM) -> Hungry:
    network = model.model.diffusion_model
    assert isinstance(network, Hungry)
    return network


def batch_of(*items: int, weights: list[float] | None = None) -> dict[str, Any]:
    pictures = [torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(item)) * 2 - 1 for item in items]
    keys = torch.stack([torch.tensor([23, 0, item, 0]) for item in items])
    batch: dict[str, Any] = {"image": torch.stack(pictures), "exposure": keys, "path": [str(item) for item in items]}
    return batch if weights is None else batch | {"loss_weight": torch.tensor(weights)}


class Weighing(pl.Callback):
    """Multiplies each loss in place, as short batches are weighed, and keeps what the trainer is told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        loss.mul_(0.7)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Result:
    """What a run has come to."""

    def __init__(self, model: DDPM, watch: Weighing, told: list[tuple[str, int, int]], trainer: pl.Trainer) -> None:
        self.model = model
        self.told = told
        self.losses = torch.tensor(watch.losses)
        self.logged = watch.logged
        self.final = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.steps = trainer.global_step
        self.weights = torch.cat([value.flatten().float() for value in model.state_dict().values()])


def fit(
    model: DDPM,
    batches: list[dict[str, Any]],
    validation: list[dict[str, Any]] | None = None,
    split: bool = True,
    at_once: dict[str, int] | None = None,
    extra: Sequence[pl.Callback] = (),
    **trainer_arguments: Any,
) -> Result:
    """Train, taking batches in parts if asked to."""
    told: list[tuple[str, int, int]] = []
    watch = Weighing()
    if split:
        model.take_in_parts({} if at_once is None else at_once, lambda *said: told.append(said))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, *extra],
        **trainer_arguments,
    )
    loaders = [torch.utils.data.DataLoader(each, batch_size=None) if each else None for each in (batches, validation)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loaders[0], loaders[1])
    return Result(model, watch, told, trainer)


BATCHES = [batch_of(0, 1, 2, 3, 4), batch_of(5, 6, 7, 8, 9), batch_of(10, 11, 12, 13, 14), batch_of(15, 16)]


@contextmanager
def out_of_memory_from(batch: int, model: DDPM, when: str, most: int) -> Iterator[None]:
    """Let memory run out from a certain training batch on."""
    begun = -1
    network, step = network_of(model), model.training_step

    def training_step(*arguments: Any) -> Tensor:
        nonlocal begun
        begun += 1
        if begun == batch:
            network.most[when] = most
        return step(*arguments)

    model.training_step = training_step  # type: ignore[method-assign]
    yield


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize(("batch", "most"), [(1, 3), (2, 2), (3, 1)])
def test_a_run_whose_memory_runs_out_trains_as_one_that_has_enough(
    batch: int, most: int, when: str, accumulate: int
) -> None:
    whole = fit(build(use_ema=True), BATCHES, split=False, accumulate_grad_batches=accumulate)
    model = build(use_ema=True)
    with out_of_memory_from(batch, model, when, most):
        parts = fit(model, BATCHES, accumulate_grad_batches=accumulate)
    assert parts.told == [("training", 2 if batch == 3 else 5, most)]
    assert parts.steps == whole.steps == (4 if accumulate == 1 else 2)
    torch.testing.assert_close(parts.weights, whole.weights, **CLOSE)
    torch.testing.assert_close(parts.losses, whole.losses, **CLOSE)
    for ours, theirs in zip(parts.logged, whole.logged, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_with_enough_memory_taking_part_changes_no_bit() -> None:
    whole = fit(build(), BATCHES, split=False, accumulate_grad_batches=3)
    watched = fit(build(), BATCHES, accumulate_grad_batches=3)
    assert torch.equal(watched.weights, whole.weights)
    assert torch.equal(watched.losses, whole.losses)
    assert not watched.told


def test_parts_differ_by_one_picture_and_later_batches_begin_with_them() -> None:
    model = build()
    network_of(model).most["forward"] = 3
    result = fit(model, BATCHES)
    sizes = network_of(model).sizes
    # The whole batch fails; then 2 pictures for the loss's value, 3 with a graph, and the 2 again with one.
    assert sizes == [5, 2, 3, 2, 2, 3, 2, 2, 3, 2, 2]
    assert result.told == [("training", 5, 3)]


def test_memory_that_runs_out_twice_is_told_as_one_new_limit() -> None:
    model = build()
    network_of(model).most["forward"] = 1
    assert fit(model, BATCHES[:1]).told == [("training", 5, 1)]


def test_a_limit_that_is_known_is_kept_to_from_the_first_batch_on() -> None:
    model = build()
    result = fit(model, BATCHES[:2], at_once={"training": 2})
    assert max(network_of(model).sizes) == 2
    assert not result.told


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_one_picture_that_does_not_fit_ends_training_and_leaves_no_limit(when: str) -> None:
    model, at_once = build(), {"training": 4}
    network_of(model).most[when] = 0
    with pytest.raises(torch.OutOfMemoryError):
        fit(model, BATCHES, at_once=at_once)
    assert at_once == {"training": 4}


def test_an_error_that_is_no_lack_of_memory_is_not_tried_again() -> None:
    model = build()
    model.model.diffusion_model = nn.Linear(2, 2)  # takes no timesteps
    with pytest.raises(TypeError, match="forward"):
        fit(model, BATCHES)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_what_a_failed_attempt_held_is_free_before_the_next(when: str) -> None:
    model = build()
    network = network_of(model)
    network.most[when] = 3
    alive: list[int] = []
    ordinary = model.shared_step

    def shared_step(*arguments: Any) -> Any:
        alive.append(sum(activation() is not None for activation in network.activations))
        return ordinary(*arguments)

    model.shared_step = shared_step  # type: ignore[method-assign]
    fit(model, BATCHES[:1])
    assert len(alive) == (4 if when == "forward" else 3)
    # Backwards, the part with a graph has been differentiated before the next is computed.
    assert alive == [0] * len(alive)


def test_fillers_count_in_parts_as_they_do_in_the_whole() -> None:
    batches = [batch_of(0, 1, 2, 3, 4, weights=[1.0, 2.0, 0.5, 0.0, 0.0]), batch_of(5, 6, weights=[0.0, 0.0])]
    whole = fit(build(), batches, split=False)
    parts = fit(build(), batches, at_once={"training": 1})
    torch.testing.assert_close(parts.weights, whole.weights, **CLOSE)
    assert parts.logged[0] == pytest.approx(whole.logged[0], rel=1e-5)
    assert parts.losses[1] == whole.losses[1] == 0


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_validation_batch_that_does_not_fit_gives_the_figures_of_the_whole(use_ema: bool) -> None:
    validation = [batch_of(20, 21, 22, 23, 24, weights=[1.0, 1.0, 1.0, 1.0, 0.0]), batch_of(25, 26)]
    whole = fit(build(use_ema), BATCHES, validation, split=False)
    model = build(use_ema)
    network_of(model).most["evaluation"] = 2
    parts = fit(model, BATCHES, validation)
    assert parts.told == [("validation", 5, 2)]
    assert parts.final.keys() >= {"val/loss_simple", "train/loss_epoch"}
    assert parts.final == pytest.approx(whole.final, rel=1e-5)
    torch.testing.assert_close(parts.weights, whole.weights, rtol=0, atol=0)


def test_a_learned_log_variance_is_logged_and_trained_as_in_the_whole() -> None:
    whole = fit(build(learn_logvar=True), BATCHES, split=False)
    parts = fit(build(learn_logvar=True), BATCHES, at_once={"training": 2})
    torch.testing.assert_close(parts.weights, whole.weights, **CLOSE)
    assert parts.final == pytest.approx(whole.final, rel=1e-5)


class SixteenBits(MixedPrecision):
    """Half precision with a scaled loss, on the CPU, which Lightning does not offer there."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


class FirstGradient(pl.Callback):
    """Keeps the gradient that the first optimiser step is taken with."""

    def __init__(self) -> None:
        self.gradient = torch.zeros(0)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if not self.gradient.numel():
            given = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            self.gradient = torch.cat([gradient.flatten() for gradient in given])


@pytest.mark.parametrize("precision", ["bf16-mixed", "scaled 16-mixed"])
def test_mixed_precision_gives_the_gradient_of_the_whole_batch(precision: str) -> None:
    gradients = []
    for most in (99, 3):
        model, first = build(), FirstGradient()
        with out_of_memory_from(2, model, "backward", most):
            arguments: dict[str, Any] = {"precision": precision}
            if precision.startswith("scaled"):
                arguments = {"plugins": [SixteenBits()]}
            fit(model, BATCHES[:3], extra=[first], accumulate_grad_batches=3, **arguments)
        gradients.append(first.gradient)
        assert all(network_of(model).autocast)
    whole, parts = gradients
    # Both are rounded to 8 or 11 bits, in other sums.
    assert (parts - whole).norm() < 0.01 * whole.norm()


def test_captions_conditions_and_the_first_stage_are_taken_in_parts_too() -> None:
    captions = ["a cat", "a dog", "a hat", "a car", "a bus"]
    batches = [batch_of(*range(5)) | {"caption": captions}]
    batches[0]["image"] = torch.rand(5, 16, 16, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    results = []
    for at_once in ({}, {"training": 2}):
        model = build_text_model(scale_by_std=True)
        model.learning_rate = 1e-3
        results.append(fit(model, batches, split=bool(at_once), at_once=at_once))
    whole, parts = results
    assert float(parts.model.scale_factor) == pytest.approx(float(whole.model.scale_factor), rel=1e-5)
    assert parts.logged[0] == pytest.approx(whole.logged[0], rel=1e-4)
    gradient = torch.nn.utils.parameters_to_vector
    torch.testing.assert_close(
        gradient(parts.model.cond_stage_model.parameters()),
        gradient(whole.model.cond_stage_model.parameters()),
        rtol=1e-3,
        atol=1e-4,  # a tenth of a step of Adam, whose first divides tiny gradients by themselves
    )


def test_slicing_cuts_what_has_an_entry_a_picture_and_nothing_else() -> None:
    batch = {"image": torch.arange(6).view(3, 2), "path": ["a", "b", "c"], "scale": torch.tensor(2.0), "size": (8, 8)}
    part = slice_rows({**batch, "more": {"crop": torch.arange(3)}}, 3, 1, 3)
    assert part["image"].tolist() == [[2, 3], [4, 5]]
    assert part["path"] == ["b", "c"]
    assert (float(part["scale"]), part["size"], part["more"]["crop"].tolist()) == (2.0, (8, 8), [1, 2])


def test_a_model_whose_batches_fit_is_not_asked_to_compute_anything_twice() -> None:
    model = build()
    fit(model, BATCHES)
    assert network_of(model).sizes == [5, 5, 5, 2]
    assert isinstance(model.parts, BatchParts)
