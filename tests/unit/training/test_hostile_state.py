"""Checkpoints whose content is plain data, and yet not the state of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.training.callbacks import RunCheckpoint
from ldm.training.checkpoint_io import StreamingCheckpointIO
from ldm.training.failures import explain
from tests.unit.training.toy_run import ToyRun, prepare_toy_run, toy_run

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Mapping[str, Any]:
    run = toy_run(tmp_path_factory.mktemp("run"), pictures, max_epochs=1)
    found: Mapping[str, Any] = torch.load(run.last, weights_only=True)
    return found


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def progress(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["loops"]["fit_loop"]["epoch_progress"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.update({"pytorch-lightning_version": "latest"}), "pytorch-lightning_version is no version"),
        (lambda held: held.update({"pytorch-lightning_version": 2}), "is a int, not a str"),
        (lambda held: held.update(global_step="5"), "global_step is a str"),
        (lambda held: held.update(loops=[]), "loops is a list"),
        (lambda held: held.update(callbacks=5), "callbacks is a int"),
        (lambda held: held.update(optimizer_states={}), "optimizer_states is a dict"),
        (lambda held: held.update(lr_schedulers=[5]), "lr_schedulers hold a int"),
        (lambda held: held["lr_schedulers"][0].update(step=5), "replace the function step"),
        (lambda held: progress(held)["current"].update(increment_ready=5), r"current\.increment_ready is no count"),
        (lambda held: progress(held)["total"].update(ready=-1), r"total\.ready is no count"),
        (lambda held: progress(held).update(total="all"), r"epoch_progress\.total is a str"),
    ],
)
def test_a_state_of_another_kind_is_named(
    change: Change, message: str, content: Mapping[str, Any], tmp_path: Path
) -> None:
    changed = copied(content)
    change(changed)
    torch.save(changed, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=rf"w\.ckpt' cannot be continued: .*{message}.*use another checkpoint"):
        StreamingCheckpointIO().load_checkpoint(tmp_path / "w.ckpt")


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held["loops"]["fit_loop"]["epoch_progress"].pop("current"),
        lambda held: held["callbacks"].update(dict.fromkeys(held["callbacks"], 5)),
        lambda held: held["optimizer_states"][0].update(param_groups=5),
        lambda held: held["lr_schedulers"][0].update(lr_lambdas=5),
    ],
)
def test_a_state_that_cannot_be_given_back_is_told_in_one_line(
    change: Change, content: Mapping[str, Any], tmp_path: Path, pictures: Path
) -> None:
    changed = copied(content)
    change(changed)
    path = tmp_path / "w.ckpt"
    torch.save(changed, path)
    run, data = prepare_toy_run(tmp_path / "run", pictures)
    with run.signals, pytest.raises(Exception) as caught:
        run.trainer.fit(run.model, datamodule=data, ckpt_path=path)
    explained = explain(caught.value, run.trainer, {"data": {"params": {"batch_size": 2}}}, path, False)
    assert isinstance(explained, ValueError)
    assert str(explained).startswith(f"checkpoint {path} cannot be continued: ")
    assert str(explained).isprintable()


def checkpoint_callback(run: ToyRun) -> RunCheckpoint:
    return next(each for each in run.trainer.callbacks if isinstance(each, RunCheckpoint))  # type: ignore[attr-defined]


def test_a_file_outside_the_run_that_a_checkpoint_names_as_its_own_is_never_deleted(
    tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    precious = tmp_path / "precious.ckpt"
    precious.write_text("mine")
    first = toy_run(tmp_path / "run", pictures, max_epochs=1)
    held = torch.load(first.last, weights_only=True)
    worst = torch.tensor(1e9)
    for state in held["callbacks"].values():
        if "best_k_models" in state:
            names = [str(precious), f"{state['dirpath']}/../../precious.ckpt", f"{state['dirpath']}/notes.txt"]
            state["best_k_models"] = dict.fromkeys(names, worst)
            state.update(kth_best_model_path=str(precious), last_model_path=str(precious), kth_value=worst)
    torch.save(held, first.last)
    second = toy_run(tmp_path / "run", pictures, checkpoint=first.last, max_epochs=4)
    assert precious.read_text() == "mine"
    assert str(precious) not in checkpoint_callback(second).best_k_models
    assert "left alone" in caplog.text
    assert str(precious) in caplog.text


def test_a_runs_own_files_are_still_replaced_after_it_is_resumed(tmp_path: Path, pictures: Path) -> None:
    first = toy_run(tmp_path, pictures, max_epochs=2)
    toy_run(tmp_path, pictures, checkpoint=first.last, max_epochs=6)
    assert len(list(first.directory.checkpoints.glob("epoch=*.ckpt"))) == 3
