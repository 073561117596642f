from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.training.loss_guard import MOST_SKIPPED, LossGuard, NotFiniteError
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import toy_run


class BadToy(ToyDiffusion):
    """Its loss, or its gradient alone, is no finite number at some batches."""

    def __init__(self, bad: dict[int, float], gradient: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.bad = bad
        self.gradient = gradient
        self.batches = 0

    def timesteps_of(self, exposures: Tensor) -> Tensor:
        return exposures[:, 2] % 1000

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        factor = self.bad.get(self.batches, 1.0)
        self.batches += 1
        if factor != 1.0 and self.gradient:
            loss.register_hook(lambda gradient: gradient * factor)
            return loss
        return loss * factor


class OwnSteps(ToyDiffusion):
    """Takes the steps of two optimisers itself; the first one's loss is no finite number at some batches."""

    accumulates_and_clips = True

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge = torch.nn.Linear(3, 1)
        self.bad = bad
        self.batches = 0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        optimizers[1]._on_before_step = optimizers[1]._on_after_step = lambda: None  # counts no step
        losses = [lambda: self.loss(batch), lambda: self.judge(batch["image"].mean(dim=(1, 2))).square().mean()]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            factor = float("nan") if self.batches in self.bad and optimizer is optimizers[0] else 1.0
            self.manual_backward(loss() * factor)
            optimizer.step()
            optimizer.zero_grad()
        self.batches += 1

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.model, self.judge)]


class Watch(Callback):
    """Notes the weights and moments after each batch."""

    def __init__(self) -> None:
        self.states: list[list[Tensor]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        state = [parameter.detach().clone() for parameter in pl_module.parameters()]
        for entry in trainer.optimizers[0].state.values():
            state += [entry["step"].clone(), entry["exp_avg"].clone(), entry["exp_avg_sq"].clone()]
        self.states.append(state)


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


def reports(run: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("not_finite/*.json"))}


@pytest.mark.parametrize(
    ("value", "gradient", "words"),
    [
        (float("nan"), False, "the loss is nan at step 3"),
        (float("inf"), False, "the loss is inf at step 3"),
        (float("nan"), True, "the gradient is not finite at step 3"),
        (float("inf"), True, "the gradient is not finite at step 3"),
    ],
)
def test_the_run_stops_before_the_weights_are_touched(
    value: float, gradient: bool, words: str, pictures: Path, tmp_path: Path
) -> None:
    watch, model = Watch(), BadToy({2: value}, gradient)
    with pytest.raises(NotFiniteError, match=words) as caught:
        toy_run(tmp_path, pictures, model=model, extra=[watch])
    assert "\n" not in str(caught.value)
    assert same(watch.states[-1][:4], [parameter.detach() for parameter in model.model.parameters()])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_pictures_captions_and_timesteps_are_written_down(pictures: Path, tmp_path: Path) -> None:
    model = BadToy({2: float("nan")})
    with pytest.raises(
        NotFiniteError, match=r"not_finite/step-000003\.json; nothing had been saved: type the same command"
    ):
        toy_run(tmp_path, pictures, model=model)
    (report,) = reports(tmp_path).values()
    (batch,) = report["batches"]
    assert (report["step"], report["epoch"], batch["batch"], batch["loss"]) == (3, 0, 2, "nan")
    shown = [list(row) for row in model.shown[-2:]]
    assert [picture["exposure"] for picture in batch["pictures"]] == shown
    assert [picture["timestep"] for picture in batch["pictures"]] == [row[2] % 1000 for row in shown]
    assert all(Path(picture["path"]).is_file() for picture in batch["pictures"])
    assert {picture["caption"] for picture in batch["pictures"]} <= {f"a plain square {number}" for number in range(3)}


def test_the_last_checkpoint_stays_as_it_was(pictures: Path, tmp_path: Path) -> None:
    saving = {"modelcheckpoint": {"params": {"every_n_train_steps": 2, "save_top_k": 0}}}
    unbroken = toy_run(tmp_path / "two", pictures, lightning=saving, model=BadToy({}), max_steps=2)
    with pytest.raises(
        NotFiniteError,
        match=r"last\.ckpt stays as it was: .* model\.base_learning_rate=.* --accept_changes, or with --on_nan skip",
    ):
        toy_run(tmp_path / "bad", pictures, lightning=saving, model=BadToy({3: float("nan")}))
    good, kept = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (tmp_path / "two", tmp_path / "bad")
    )
    assert kept["global_step"] == 2 == unbroken.trainer.global_step
    for key, value in good["state_dict"].items():
        assert torch.equal(kept["state_dict"][key], value)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_left_out_changes_neither_weights_nor_moments(
    gradient: bool, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch()
    run = toy_run(
        tmp_path, pictures, model=BadToy({2: float("nan"), 5: float("inf")}, gradient), extra=[watch], on_nan="skip"
    )
    assert run.trainer.global_step == len(watch.states) == 12
    changed = [not same(before, after) for before, after in zip(watch.states, watch.states[1:], strict=False)]
    assert [number for number, is_changed in enumerate(changed, start=2) if not is_changed] == [3, 6]
    assert list(reports(tmp_path)) == ["step-000003.json", "step-000006.json"]
    assert "the step is left out" in caplog.text
    assert "2 steps were left out, as their loss or gradient was no finite number: 3, 6" in caplog.text


def test_a_step_of_several_batches_is_left_out_whole(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch()
    toy_run(
        tmp_path,
        pictures,
        model=BadToy({3: float("nan")}),
        extra=[watch],
        on_nan="skip",
        accumulate_grad_batches=3,
        max_epochs=1,
    )
    assert all(same(watch.states[2], state) for state in watch.states[3:])
    ((name, report),) = reports(tmp_path).items()
    assert name == "step-000002.json"
    assert [(batch["batch"], batch["loss"] == "nan") for batch in report["batches"]] == [
        (3, True),
        (4, False),
        (5, False),
    ]
    assert "the loss is nan at step 2 (epoch 1, batch 4): the step is left out" in caplog.text


def test_a_report_that_cannot_be_made_hides_nothing(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Foreign(Callback):
        """Lets batches look like those of a data set with several captions a picture."""

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 2:
                batch["caption"] = [tuple(batch["caption"])] * 5

    with pytest.raises(NotFiniteError, match=r"the loss is nan at step 3 \(epoch 1, batch 3\); nothing"):
        toy_run(tmp_path, pictures, model=BadToy({2: float("nan")}), extra=[Foreign()])
    assert "step-000003.json could not be written" in caplog.text


def test_the_report_gives_the_losses_as_the_model_gave_them(pictures: Path, tmp_path: Path) -> None:
    model = BadToy({5: float("nan")})
    toy_run(tmp_path, pictures, model=model, on_nan="skip", accumulate_grad_batches=3, max_epochs=1)
    (report,) = reports(tmp_path).values()
    told = [float(batch["loss"]) for batch in report["batches"]]
    assert told[:2] == pytest.approx(model.losses[3:5])


def test_a_step_of_two_optimisers_is_left_out_and_told_once(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = OwnSteps({2})
    run = toy_run(tmp_path, pictures, model=model, on_nan="skip")
    assert caplog.text.count("the step is left out") == 1
    assert "1 step was left out, as its loss or gradient was no finite number: 3" in caplog.text
    (report,) = reports(tmp_path).values()
    assert [batch["loss"] for batch in report["batches"]] == ["nan"]
    for optimizer in run.trainer.optimizers:
        assert {int(entry["step"]) for entry in optimizer.state.values()} == {run.trainer.global_step - 1}


def test_two_optimisers_whose_model_has_blown_up_are_not_skipped_for_ever(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=f"at step {MOST_SKIPPED + 2} .*{MOST_SKIPPED}th time in a row"):
        toy_run(tmp_path, pictures, model=OwnSteps(set(range(2, 99))), on_nan="skip", max_epochs=9)


def test_a_model_that_has_blown_up_is_not_skipped_for_ever(pictures: Path, tmp_path: Path) -> None:
    bad = dict.fromkeys([0, *range(2, 99)], float("nan"))
    with pytest.raises(NotFiniteError, match=f"at step {MOST_SKIPPED + 2} .*{MOST_SKIPPED}th time in a row"):
        toy_run(tmp_path, pictures, model=BadToy(bad), on_nan="skip", max_epochs=9)


def test_a_verdict_that_is_still_on_its_way_is_read_before_anything_is_saved(tmp_path: Path, pictures: Path) -> None:
    class Later(LossGuard):
        """Judges like on a GPU: the verdict is read later."""

        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
        ) -> None:
            on_time, self._settle = self._settle, lambda *_: None  # type: ignore[assignment, method-assign]
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            self._settle = on_time  # type: ignore[method-assign]

    class Replace(Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            kept = [each for each in trainer.callbacks if not isinstance(each, LossGuard)]  # type: ignore[attr-defined]
            trainer.callbacks = [Later(), *kept]  # type: ignore[attr-defined]

    saving = {"modelcheckpoint": {"params": {"every_n_train_steps": 1, "save_top_k": -1}}}
    with pytest.raises(NotFiniteError, match="at step 3"):
        toy_run(tmp_path, pictures, lightning=saving, model=BadToy({2: float("nan")}, gradient=True), extra=[Replace()])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch=00-step=00001.ckpt", "epoch=00-step=00002.ckpt", "last.ckpt"]


def test_gradients_beyond_sixteen_bits_are_left_to_the_loss_scale(pictures: Path, tmp_path: Path) -> None:
    class Scaler:
        factor = 65536.0

        def get_scale(self) -> float:
            return self.factor

        def scale(self, value: Tensor) -> Tensor:
            return value * self.factor

    class Pretend(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.precision_plugin.scaler = Scaler()  # type: ignore[attr-defined]

    toy_run(tmp_path / "a", pictures, model=BadToy({2: float("inf")}, gradient=True), extra=[Pretend()], max_steps=3)
    Scaler.factor = 0.5
    with pytest.raises(NotFiniteError, match="the gradient is not finite at step 3"):
        toy_run(tmp_path / "b", pictures, model=BadToy({2: float("inf")}, gradient=True), extra=[Pretend()])


def test_a_continued_run_still_knows_what_was_left_out(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = toy_run(tmp_path, pictures, model=BadToy({2: float("nan")}), on_nan="skip", max_epochs=1)
    toy_run(tmp_path, pictures, first.last, model=BadToy({0: float("nan")}), on_nan="skip", max_epochs=2)
    assert "2 steps were left out, as their loss or gradient was no finite number: 3, 7" in caplog.text
