from __future__ import annotations

import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.ledger import read_ledger
from ldm.training.run import main
from tests.end_to_end.conftest import TINY, FinishedRun, Train, start

READABLE_STAMP = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"


def tensors(content: Any) -> list[torch.Tensor]:
    """All tensors inside a nest of containers, in order."""
    if isinstance(content, torch.Tensor):
        return [content]
    if isinstance(content, dict):
        return [tensor for value in content.values() for tensor in tensors(value)]
    if isinstance(content, (list, tuple)):
        return [tensor for value in content for tensor in tensors(value)]
    return []


def assert_same_end(first: FinishedRun, second: FinishedRun) -> None:
    """Compare weights, optimiser and counters of two runs bit by bit."""
    one, two = first.last, second.last
    assert (one["global_step"], one["epoch"]) == (two["global_step"], two["epoch"])
    assert list(one["state_dict"]) == list(two["state_dict"])
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        pairs = zip(tensors(one[part]), tensors(two[part]), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs), part


def curve(run: FinishedRun, name: str = "train/loss_step") -> dict[int, float]:
    """A logged value by step."""
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


# --- one run as a user starts it, looked at from all sides -------------------------------------------------


@pytest.fixture(scope="module")
def everyday(workplace: Path, command: list[str]) -> FinishedRun:
    words = [word for word in command if "image_logger" not in word]
    pictures = ["batch_frequency=4", "max_images=2", "log_images_kwargs.ddim_steps=2"]
    words += [f"lightning.callbacks.image_logger.params.{word}" for word in pictures]
    process = start(*words, "-n", "everyday", cwd=workplace)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return FinishedRun(next((workplace / "logs").glob("*everyday")), output)


def test_the_run_folder_is_named_by_data_date_and_name(everyday: FinishedRun) -> None:
    assert re.fullmatch(rf"MyProject{READABLE_STAMP}_everyday", everyday.path.name)


def test_checkpoints_are_there_by_epoch_and_last(everyday: FinishedRun) -> None:
    names = sorted(path.name for path in (everyday.path / "checkpoints").iterdir())
    assert names == ["epoch=00-step=00004.ckpt", "epoch=01-step=00008.ckpt", "last.ckpt"]


def test_the_checkpoint_has_the_keys_and_shapes_of_the_one_it_came_from(everyday: FinishedRun, workplace: Path) -> None:
    origin = torch.load(workplace / "tiny.ckpt", weights_only=True)["state_dict"]
    trained = everyday.last["state_dict"]
    assert {key: value.shape for key, value in trained.items()} == {key: value.shape for key, value in origin.items()}


def test_unet_and_text_encoder_have_changed_and_the_vae_has_not(everyday: FinishedRun, workplace: Path) -> None:
    origin = torch.load(workplace / "tiny.ckpt", weights_only=True)["state_dict"]
    changed = {key for key, value in everyday.last["state_dict"].items() if not torch.equal(value, origin[key])}
    assert {key.partition(".")[0] for key in changed} == {"model", "cond_stage_model"}


def test_sample_pictures_and_captions_are_there_at_the_batches_size(everyday: FinishedRun) -> None:
    folder = everyday.path / "images" / "train"
    kinds = {path.name.partition("_gs-")[0] for path in folder.iterdir()}
    assert {"inputs", "reconstruction", "samples", "samples_cfg_scale_5.00", "overview", "captions"} <= kinds
    with Image.open(next(folder.glob("samples_gs-000004*"))) as picture:
        assert picture.size == (2 * 32 + 3 * 2, 32 + 2 * 2)


def test_the_curves_hold_what_the_lineage_logs(everyday: FinishedRun) -> None:
    events = EventAccumulator(str(everyday.path / "tensorboard"))
    events.Reload()
    names = {"train/loss_step", "train/loss_simple_step", "train/loss_vlb_step", "val/loss_simple", "lr-AdamW"}
    assert names | {"val/loss_simple_ema"} <= set(events.Tags()["scalars"])


def test_the_steps_that_were_stated_are_the_ones_that_happened(everyday: FinishedRun) -> None:
    assert "\ntraining steps per epoch: 4\nvalidation steps per epoch: 2\n" in everyday.output
    assert "  batch 4/4  step 8  " in everyday.output
    assert everyday.last["global_step"] == 8


def test_the_summary_says_what_is_trained_from_what(everyday: FinishedRun, workplace: Path) -> None:
    assert "trained parameters: UNet 3,168,324 + text encoder 3,267,136\n" in everyday.output
    assert "frozen parameters: VAE 2,702,087\n" in everyday.output
    assert f"weights: {workplace / 'tiny.ckpt'}" in everyday.output


def test_a_log_file_gets_whole_lines(everyday: FinishedRun) -> None:
    assert "\r" not in everyday.output
    assert "\x1b" not in everyday.output


def test_the_saved_config_is_a_valid_base(
    everyday: FinishedRun, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    (saved,) = (everyday.path / "configs").iterdir()
    assert re.fullmatch(rf"{READABLE_STAMP}-project\.yaml", saved.name)
    assert main(["--base", str(saved), "--print_config"]) == 0
    assert "batch_size: 2" in capsys.readouterr().out


def test_a_new_run_starts_from_the_weights_of_last_ckpt(everyday: FinishedRun, train: Train) -> None:
    last = everyday.path / "checkpoints" / "last.ckpt"
    run = train("--actual_resume", str(last), "--max_steps", "1", "model.base_learning_rate=1e-12")
    assert run.last["global_step"] == 1
    pairs = zip(tensors(run.last["state_dict"]), tensors(everyday.last["state_dict"]), strict=True)
    assert all(torch.allclose(left, right, atol=1e-9) for left, right in pairs)


def test_what_of_the_checkpoint_was_passed_over_or_changed_is_told(
    train: Train, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = torch.load(workplace / "tiny.ckpt", weights_only=True)["state_dict"]
    weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights["model_ema.decay"] = torch.tensor(0.9999)
    torch.save({"state_dict": weights}, workplace / "half.ckpt")
    train("--actual_resume", str(workplace / "half.ckpt"), "--max_steps", "1")
    text = capsys.readouterr().out
    assert "\nthe file holds float16: converted to the model's precision\n" in text
    assert "(cond_stage_model.transformer.text_model.embeddings.position_ids…): position numbers" in text
    assert "(model_ema.decay…): moving averages" in text


# --- resume ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    logdir = tmp_path_factory.mktemp("unbroken")
    assert main([*command, "-n", "unbroken", "-l", str(logdir), "--max_steps", "99000"]) == 0
    return FinishedRun(next(logdir.iterdir()))


def test_a_run_continued_after_an_epoch_ends_as_the_unbroken_one(train: Train, unbroken: FinishedRun) -> None:
    first = train("--max_epochs", "1")
    second = train("--max_epochs", "2", resume=first.path)
    assert_same_end(second, unbroken)
    assert curve(second) == curve(unbroken)
    assert curve(second, "val/loss_simple") == curve(unbroken, "val/loss_simple")


def test_a_continued_run_stays_in_its_folder_and_keeps_its_configs(train: Train) -> None:
    first = train("--max_steps", "1")
    train("--max_steps", "2", resume=first.path / "checkpoints" / "last.ckpt")
    assert len(list(first.path.parent.iterdir())) == 1
    assert first.last["global_step"] == 2


def test_a_run_at_its_end_says_that_nothing_is_left(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    first = train("--max_epochs", "1")
    train(resume=first.path)
    assert "raise lightning.trainer.max_epochs" in capsys.readouterr().out
    assert first.last["global_step"] == 4


@pytest.mark.skipif(sys.platform == "win32", reason="signals of other processes cannot be sent there")
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_a_run_stopped_by_a_signal_saves_and_continues_as_if_unbroken(
    number: signal.Signals, workers: int, command: list[str], unbroken: FinishedRun, tmp_path: Path
) -> None:
    words = [*command, "-n", "stopped", "-l", str(tmp_path), f"data.params.num_workers={workers}"]
    process = start(*words, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if "batch 1/4" in line:
            break
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    run = FinishedRun(next(tmp_path.glob("*stopped")))
    assert f"python main.py -t -r {run.path}" in output
    assert 0 < run.last["global_step"] < 8
    assert main(["-t", "-r", str(run.path), "data.params.num_workers=0"]) == 0
    assert_same_end(run, unbroken)


# --- settings that must not change what is learnt, and settings that must ----------------------------------


def test_the_number_of_loader_processes_does_not_change_training(train: Train, unbroken: FinishedRun) -> None:
    assert_same_end(train("data.params.num_workers=2"), unbroken)


def test_smaller_batches_with_accumulation_train_alike(train: Train, unbroken: FinishedRun) -> None:
    run = train("data.params.batch_size=1", "--accumulate_grad_batches", "2")
    assert run.last["global_step"] == 8
    # Weights are not compared: AdamW turns rounding errors of tiny gradients into whole steps.
    ends = [curve(run, "val/loss_simple"), curve(unbroken, "val/loss_simple")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_sample_pictures_do_not_change_training(train: Train, unbroken: FinishedRun) -> None:
    logger = "lightning.callbacks.image_logger.params"
    run = train(f"{logger}.disabled=false", f"{logger}.batch_frequency=3", f"{logger}.log_images_kwargs.ddim_steps=2")
    assert_same_end(run, unbroken)


def test_another_seed_changes_training(train: Train, unbroken: FinishedRun) -> None:
    run = train("--seed", "7", "--max_epochs", "1")
    assert curve(run)[0] != curve(unbroken)[0]


def test_training_without_a_checkpoint_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = command.index("--actual_resume")
    words = [*command[:where], *command[where + 2 :]]
    assert main([*words, "-l", str(tmp_path), "--max_steps", "1"]) == 0
    assert "weights: random weights" in capsys.readouterr().out


def test_the_learning_rate_is_scaled_and_its_arithmetic_stated(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("--scale_lr", "--accumulate_grad_batches", "2", "--max_steps", "1", "model.params.model_lr=1e-4")
    text = capsys.readouterr().out
    assert "0.004 = 2 (accumulate_grad_batches) x 1 (devices) x 2 (batch_size) x 0.001 (base_learning_rate)" in text
    assert "0.0004 = 2 (accumulate_grad_batches) x 1 (devices) x 2 (batch_size) x 0.0001 (model_lr)" in text
    groups = run.last["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([4e-4, 4e-3])


def test_only_the_unet_is_trained_when_the_text_encoder_is_frozen(train: Train, workplace: Path) -> None:
    run = train("model.params.cond_stage_trainable=false", "--max_steps", "1")
    origin = torch.load(workplace / "tiny.ckpt", weights_only=True)["state_dict"]
    changed = {key for key, value in run.last["state_dict"].items() if not torch.equal(value, origin[key])}
    assert {key.partition(".")[0] for key in changed} == {"model"}


def test_a_test_set_is_measured_after_training(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in command if word != "--no-test"]
    target = "data.params.test.target=ldm.data.ed_validate.EDValidateBatch"
    assert main([*words, "-l", str(tmp_path), "--max_steps", "1", target, "data.params.test.params.size=32"]) == 0
    assert "test: " in capsys.readouterr().out


def test_without_a_test_set_nothing_is_tested(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in command if word != "--no-test"]
    assert main([*words, "-l", str(tmp_path), "--max_steps", "1"]) == 0
    assert "test: " not in capsys.readouterr().out


def test_the_tiny_config_is_shown_with_the_origin_of_each_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base", str(TINY), "--print_config", "data.params.batch_size=3"]) == 0
    assert re.search(r"batch_size: 3 +# override", capsys.readouterr().out)


# --- several devices ---------------------------------------------------------------------------------------

TWO_DEVICES = """
model: {base_learning_rate: 0.01, target: tests.unit.training.toy.ToyDiffusion}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: {target: ldm.data.every_dream.EveryDreamBatch, params: {size: 16, repeats: 2}}
lightning: {trainer: {max_epochs: 2, accelerator: cpu, devices: 2}}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the processes' library for CPUs is not built there")
def test_two_devices_share_a_run_and_its_folder(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(TWO_DEVICES)
    process = start("-b", "two.yaml", "-t", "-n", "two", "--data_root", str(workplace / "MyProject"), cwd=tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.count("training steps per epoch: 2\n") == 1
    (folder,) = (tmp_path / "logs").iterdir()
    assert FinishedRun(folder).last["global_step"] == 4
    entries = [entry for name in ("exposure.jsonl", "exposure.rank1.jsonl") for entry in read_ledger(folder / name)]
    times = Counter((entry["epoch"], entry["path"]) for entry in entries)
    assert len(times) == 2 * len({entry["path"] for entry in entries})
    assert set(times.values()) == {2}
