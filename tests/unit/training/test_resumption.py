"""What a resumed run says and does: its learning rates, its folder, its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.training.run import main
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import ToyDiffusion

LAST = Path("checkpoints") / "last.ckpt"


class NoSchedule(ToyDiffusion):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)


class OwnRate(ToyDiffusion):
    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.model_lr or 0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class TwoGroups(ToyDiffusion):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[3].parameters()}]
        return torch.optim.AdamW(groups, lr=self.learning_rate)


class Averages(ToyDiffusion):
    def __init__(self) -> None:
        super().__init__()
        self.model_ema = torch.nn.Linear(1, 1)


def here(name: str) -> str:
    return f"model.target=tests.unit.training.test_resumption.{name}"


@pytest.fixture
def folder(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one epoch, six steps, at a rate of 0.01 that falls as 1 / (1 + step)."""
    return first_run(tmp_path, pictures, monkeypatch)


def first_run(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    assert main(["-b", "toy.yaml", "-t", "-n", "toy", "--data_root", str(pictures), *words]) == 0
    return next(Path("logs").iterdir())


def resume(folder: Path, *words: str) -> int:
    return main(["-t", "-r", str(folder), "--accept_changes", "--max_epochs", "2", *words])


def last(folder: Path) -> dict:
    return torch.load(folder / LAST, weights_only=True)


# --- learning rates ----------------------------------------------------------------------------------------


def test_a_changed_learning_rate_is_the_one_that_a_resumed_run_takes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(folder, "model.base_learning_rate=1e-4") == 0
    (group,) = last(folder)["optimizer_states"][0]["param_groups"]
    scheduler = last(folder)["lr_schedulers"][0]
    assert group["initial_lr"] == 1e-4
    assert group["lr"] == pytest.approx(1e-4 / 13)
    assert scheduler["base_lrs"] == [1e-4]
    assert "\nlearning rate 0.01 -> 0.0001\n" in capsys.readouterr().out


def test_the_first_step_after_a_resume_is_at_the_changed_rate_on_the_schedule(folder: Path) -> None:
    before = last(folder)["state_dict"]["model.0.weight"]
    assert resume(folder, "model.base_learning_rate=1e-12", "--max_steps", "7") == 0
    assert torch.allclose(last(folder)["state_dict"]["model.0.weight"], before, atol=1e-9)


def test_a_part_that_was_trained_at_a_rate_of_zero_can_be_given_one(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = first_run(tmp_path, pictures, monkeypatch, here("OwnRate"), "model.params.model_lr=0")
    assert resume(folder, "model.params.model_lr=1e-4") == 0
    (group,) = last(folder)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(1e-4 / 13)


def test_a_changed_learning_rate_counts_without_a_schedule_too(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = first_run(tmp_path, pictures, monkeypatch, here("NoSchedule"))
    assert resume(folder, "model.base_learning_rate=1e-4") == 0
    (group,) = last(folder)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 1e-4


def test_a_rate_that_is_scaled_by_more_accumulation_is_taken(folder: Path) -> None:
    assert resume(folder, "--scale_lr", "--accumulate_grad_batches", "2") == 0
    (group,) = last(folder)["optimizer_states"][0]["param_groups"]
    assert group["initial_lr"] == pytest.approx(0.04)


def test_an_unchanged_learning_rate_is_not_mentioned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(folder) == 0
    assert "learning rate 0" not in capsys.readouterr().out


# --- what a refused resume leaves alone --------------------------------------------------------------------


def test_a_refused_resume_leaves_no_config_behind(folder: Path) -> None:
    configs = sorted((folder / "configs").iterdir())
    configs[0].rename(configs[0].with_name("2022-10-25T20-37-40-project.yaml"))
    assert resume(folder, here("TwoGroups")) == 2
    assert [path.name for path in (folder / "configs").iterdir()] == ["2022-10-25T20-37-40-project.yaml"]
    assert resume(folder) == 0
    assert len(list((folder / "configs").iterdir())) == 2


def test_an_optimiser_that_no_longer_fits_is_told_with_the_keys_that_shape_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(folder, here("TwoGroups")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("last.ckpt", "model_lr", "cond_stage_trainable", "unfreeze_model", "--actual_resume"):
        assert word in line


def test_moving_averages_that_were_not_kept_are_told_with_their_key(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(folder, here("Averages")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.params.use_ema" in line
    assert "--actual_resume" in line
    assert len(line) < 500


def test_a_checkpoint_of_weights_alone_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = last(folder)
    del content["optimizer_states"], content["lr_schedulers"]
    (folder / LAST).unlink()
    torch.save(content, folder / LAST)
    capsys.readouterr()
    assert resume(folder / LAST) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights alone" in line
    assert "--actual_resume" in line


def test_last_ckpt_can_be_continued_where_the_others_hold_weights_alone(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = "lightning.modelcheckpoint.params.save_weights_only=true"
    folder = first_run(tmp_path, pictures, monkeypatch, alone)
    other = next(path for path in (folder / "checkpoints").iterdir() if path.name != "last.ckpt")
    assert "optimizer_states" not in torch.load(other, weights_only=True)
    assert resume(folder) == 0
    assert last(folder)["global_step"] == 12


# --- what it says ------------------------------------------------------------------------------------------


def test_a_resumed_run_says_what_is_to_come(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(folder, "data.params.batch_size=4", "--max_epochs", "3") == 0
    text = capsys.readouterr().out
    assert "\nfrom step 6: 6 optimiser steps to come\n" in text
    assert " = 9 optimiser steps" not in text
    assert last(folder)["global_step"] == 12


def test_the_steps_to_come_count_the_rest_of_an_epoch(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = first_run(tmp_path, pictures, monkeypatch, "--max_steps", "2", "--accumulate_grad_batches", "2")
    assert resume(folder, "--max_steps", "-1") == 0
    text = capsys.readouterr().out
    assert "\ngoing on in epoch 1 after batch 4/6\n" in text
    assert "\nfrom step 2: 4 optimiser steps to come\n" in text
    assert last(folder)["global_step"] == 6


def test_the_steps_to_come_are_right_where_an_epoch_goes_on_with_another_batch_size(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = first_run(tmp_path, pictures, monkeypatch, "--max_steps", "2")
    assert resume(folder, "--max_steps", "-1", "data.params.batch_size=1") == 0
    assert "\nfrom step 2: 20 optimiser steps to come\n" in capsys.readouterr().out
    assert last(folder)["global_step"] == 22


def test_one_step_to_come_is_no_plural(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(folder, "--max_steps", "7") == 0
    assert "\nfrom step 6: 1 optimiser step to come\n" in capsys.readouterr().out


def test_going_back_behind_last_ckpt_is_told_with_both_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(folder) == 0
    capsys.readouterr()
    older = next((folder / "checkpoints").glob("epoch=00*"))
    assert main(["-t", "-r", str(older), "--max_steps", "7"]) == 0
    text = capsys.readouterr().out
    assert f"warning: going back to step 6 ({older.name}): last.ckpt, at step 12, will be replaced\n" in text


def test_leftovers_of_a_killed_run_are_removed(folder: Path) -> None:
    leftover = folder / "checkpoints" / "epoch=07-step=00048.ckpt.partial"
    leftover.write_bytes(b"half a file")
    assert resume(folder) == 0
    assert not leftover.exists()


@pytest.mark.parametrize("words", [("-l", "elsewhere"), ("-f", "_more"), ("--datadir_in_name", "false")])
def test_flags_that_name_a_new_folder_are_refused_with_a_resume(
    words: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert resume(folder, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words[0] in line
    assert "-r/--resume" in line
