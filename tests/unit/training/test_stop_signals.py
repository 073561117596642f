from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.training.disk import Disk
from ldm.training.stop_signals import NOTHING, SAVE, SAVING, STOPPING, Interrupted, StopSignals, stop_of
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run

needs_usr1 = pytest.mark.skipif(not SAVING, reason="this system has no SIGUSR1")
needs_hup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "darwin", reason="loader processes are not forked here"
)


class SendAt(Callback):
    """Sends this process one signal, where a run first comes to a step, a validation's batch or an epoch's end."""

    def __init__(self, number: int, hook: str, at: int) -> None:
        self.number = number
        self.hook = hook
        self.at = at

    def on_train_batch_start(self, trainer: pl.Trainer, *others: Any) -> None:
        self._maybe("step", trainer.global_step)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self._maybe("validation batch", batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._maybe("epoch's end", trainer.current_epoch)

    def _maybe(self, hook: str, at: int) -> None:
        if (hook, at) == (self.hook, self.at):
            self.hook = "done"
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> ToyRun:
    """The run without a signal."""
    return toy_run(tmp_path_factory.mktemp("whole"), pictures)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_what_nobody_can_save(number: int) -> None:
    with pytest.raises(Interrupted) as stop, StopSignals():
        signal.raise_signal(number)
    assert stop.value.exit_code == 128 + number


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_a_request_while_training(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals:
        signals.deferred = True
        signal.raise_signal(number)
        assert signals.requested == number
    assert "saving" in capfd.readouterr().err


def test_a_second_signal_ends_at_once() -> None:
    with StopSignals() as signals:
        signals.deferred = True
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


@needs_usr1
@pytest.mark.parametrize("deferred", [False, True])
def test_a_request_to_save_never_ends_anything(deferred: bool) -> None:
    with StopSignals() as signals:
        signals.deferred = deferred
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
        assert signals.save_requested
        assert signals.requested is None
        signals.deferred = True
        signal.raise_signal(signal.SIGTERM)  # the first of its kind


def test_of_several_processes_requests_the_one_to_stop_counts_most() -> None:
    signals = StopSignals()
    assert (signals.asked, stop_of(signals.asked)) == (NOTHING, None)
    signals.save_requested = True
    assert (signals.asked, stop_of(signals.asked)) == (SAVE, None)
    for number in STOPPING:
        signals.requested = number
        assert signals.asked > SAVE
        assert stop_of(max(NOTHING, SAVE, signals.asked)) == number


def test_handlers_are_put_back() -> None:
    handled = (*STOPPING, *SAVING)
    before = [signal.getsignal(number) for number in handled]
    with StopSignals() as signals:
        signals.install()
        assert all(signal.getsignal(number) not in before for number in handled)
    assert [signal.getsignal(number) for number in handled] == before


@needs_hup
def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.requested is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@needs_fork
@pytest.mark.parametrize("number", [*STOPPING, *SAVING])
def test_a_forked_loader_process_outlives_all_but_sigterm(number: int) -> None:
    with StopSignals() as signals:
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(told, b".")
            time.sleep(0.1)
            os._exit(0 if signals.asked == NOTHING else 9)
        os.read(ready, 1)
        os.kill(child, number)
        _, ended = os.waitpid(child, 0)
        assert ended == (signal.SIGTERM if number == signal.SIGTERM else 0)


@needs_usr1
@pytest.mark.parametrize(("hook", "at"), [("step", 2), ("validation batch", 1), ("epoch's end", 0)])
def test_sigusr1_saves_at_the_next_safe_place_and_training_goes_on(
    hook: str, at: int, whole: ToyRun, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ldm")
    saved: list[tuple[int, torch.Tensor]] = []

    class Watch(Disk):
        def replace(self, source: Path, target: Path) -> None:
            super().replace(source, target)
            if target.name == "last.ckpt":
                read = torch.load(target, weights_only=True)
                saved.append((read["global_step"], read["state_dict"]["model.0.weight"]))

    run, data = prepare_toy_run(
        tmp_path,
        pictures,
        extra=[SendAt(signal.SIGUSR1, hook, at)],
        lightning={"modelcheckpoint": {"params": {"every_n_epochs": 9}}},
    )
    run.trainer.strategy.checkpoint_io.disk = Watch()  # type: ignore[attr-defined]
    with run.signals:
        run.trainer.fit(run.model, datamodule=data)
    assert torch.equal(run.weights, whole.weights)
    assert [step for step, _ in saved] == [{"step": 3}.get(hook, 6), 12]
    assert f"saved step {saved[0][0]} as {run.last}" in caplog.text


@needs_usr1
@pytest.mark.parametrize(("hook", "at"), [("step", 7), ("validation batch", 1)])
def test_what_sigusr1_saved_is_continued_exactly(
    hook: str, at: int, whole: ToyRun, pictures: Path, tmp_path: Path
) -> None:
    class Crash(Callback):
        """Ends the run without a save, two steps after the signal's."""

        def on_train_batch_start(self, trainer: pl.Trainer, *others: Any) -> None:
            if trainer.global_step == 9:
                raise Interrupted(signal.SIGTERM)

    rare = {"modelcheckpoint": {"params": {"every_n_epochs": 9}}}
    extra = [SendAt(signal.SIGUSR1, hook, at), Crash()]
    first, data = prepare_toy_run(tmp_path, pictures, extra=extra, lightning=rare)
    with first.signals, pytest.raises(Interrupted):
        first.trainer.fit(first.model, datamodule=data)
    second = toy_run(tmp_path, pictures, checkpoint=first.last, lightning=rare)
    assert second.model.shown == whole.model.shown[-len(second.model.shown) :]
    assert len(second.model.shown) == {"step": 8, "validation batch": 12}[hook]
    assert second.model.validated == whole.model.validated[-{"step": 3, "validation batch": 6}[hook] :]
    assert torch.equal(second.weights, whole.weights)


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("background", [False, True])
def test_a_signal_during_the_last_save_ends_the_run_after_it(
    number: int, background: bool, pictures: Path, tmp_path: Path
) -> None:
    lightning = {"modelcheckpoint": {"params": {"background": background, "every_n_epochs": 9}}}
    run, data = prepare_toy_run(tmp_path, pictures, lightning=lightning)

    class Signals(Disk):
        def create(self, path: Path) -> Any:
            os.kill(os.getpid(), number)
            return super().create(path)

    run.trainer.strategy.checkpoint_io.disk = Signals()  # type: ignore[attr-defined]
    with run.signals, pytest.raises(Interrupted) as stop:
        run.trainer.fit(run.model, datamodule=data)
    assert stop.value.signal_number == number
    assert torch.load(run.last, weights_only=True)["global_step"] == 12


def test_a_signal_while_a_failures_state_is_saved_does_not_cost_it(pictures: Path, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *others: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("the toy broke")

    run, data = prepare_toy_run(tmp_path, pictures, extra=[Fails()])

    class Signals(Disk):
        def create(self, path: Path) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().create(path)

    run.trainer.strategy.checkpoint_io.disk = Signals()  # type: ignore[attr-defined]
    with run.signals, pytest.raises(RuntimeError, match="the toy broke"):
        run.trainer.fit(run.model, datamodule=data)
    assert torch.load(run.last, weights_only=True)["global_step"] == 2
