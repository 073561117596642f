"""``-r auto``: one command that begins a run and continues it, as a queue that ends and restarts jobs needs it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.training.cli import parse_options
from ldm.training.run import main
from ldm.training.run_record import read_record
from tests.unit.training.test_run import YAML
from tests.unit.training.toy import ToyDiffusion


class ToldToStop(ToyDiffusion):
    """Gets the signals that Slurm sends: to save in step 2, and in the first session to stop in step 4."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


class ToldToStopAtOnce(ToyDiffusion):
    """Is stopped before its first step."""

    def on_fit_start(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


STOPS = "model.target=tests.unit.training.test_continue_or_begin.ToldToStop"
STOPS_AT_ONCE = "model.target=tests.unit.training.test_continue_or_begin.ToldToStopAtOnce"


@pytest.fixture
def command(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that begins or continues a toy run."""
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion"))
    return ["-b", "toy.yaml", "-t", "-r", "auto", "-n", "toy", "--data_root", str(pictures)]


def runs() -> list[Path]:
    """The run folders, the oldest first."""
    return sorted(Path("logs").iterdir())


def steps(run: Path) -> int:
    found = read_record(run)
    assert found is not None
    return int(found["step"])


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no Slurm on Windows")
def test_a_job_of_slurm_saves_as_signals_say_and_one_command_continues_it_to_its_end(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "toy", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert main([*command, STOPS]) == 143
    (run,) = runs()
    text = capsys.readouterr().out
    assert "a new run begins: logs holds no run called toy with a checkpoint" in text
    assert text.index("saved step 2 as") < text.index("saved step 4 as")
    assert main([*command, "--accept_changes"]) == 0  # the model has another name
    assert (runs(), steps(run)) == ([run], 6)
    assert f"the newest run: {run}" in capsys.readouterr().out
    assert main(command) == 0
    assert (runs(), steps(run)) == ([run], 6)
    assert "nothing is left to train" in capsys.readouterr().out
    assert not list(Path().glob("**/hpc_ckpt*"))  # what Lightning saves by itself under Slurm


def test_a_job_that_was_stopped_before_its_first_save_is_begun_anew(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, STOPS_AT_ONCE]) == 143
    assert main(command) == 0
    first, second = runs()
    assert (steps(first), steps(second)) == (0, 6)
    assert f"{first} is passed over: it has no checkpoint" in capsys.readouterr().out


def test_a_run_of_another_name_is_not_continued(command: list[str]) -> None:
    assert main(command) == 0
    for name in ("to", "toy-2", "my_toy"):
        assert main([*command, "-n", name]) == 0
    assert main([*command, "--max_epochs", "2"]) == 0
    assert {run.name.partition("_")[2]: steps(run) for run in runs()} == {"toy": 12, "to": 6, "toy-2": 6, "my_toy": 6}


def test_without_a_name_the_newest_run_is_continued(command: list[str]) -> None:
    unnamed = [word for word in command if word not in ("-n", "toy")]
    assert main(command) == 0
    assert main([*unnamed, "--max_epochs", "2"]) == 0
    assert [steps(run) for run in runs()] == [12]


def test_the_name_and_the_log_folder_may_stand_in_the_yaml(command: list[str]) -> None:
    unnamed = [word for word in command if word not in ("-n", "toy")]
    Path("toy.yaml").write_text(YAML.format(model="ToyDiffusion") + "run: {name: mine, logdir: runs}\n")
    assert main(unnamed) == 0
    assert main([*unnamed, "--max_epochs", "2"]) == 0
    (run,) = Path("runs").iterdir()
    assert steps(run) == 12


def test_what_the_run_began_from_may_be_gone_and_its_drawn_seed_stays(command: list[str], pictures: Path) -> None:
    assert main(["-b", "toy.yaml", "-t", "-n", "other", "-l", "others", "--data_root", str(pictures)]) == 0
    base = next(Path("others").glob("*/checkpoints/last.ckpt"))
    whole = [*command, "--actual_resume", str(base), "-s", "-1", "-f", "x"]
    assert main(whole) == 0
    shutil.rmtree("others")
    assert main([*whole, "--max_epochs", "2"]) == 0
    assert [steps(run) for run in runs()] == [12]


def test_without_a_configuration_there_must_be_a_run(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-t", "-r", "auto", "-n", "toy"]) == 2
    assert main(["-t", "-r", "last", "-b", "toy.yaml"]) == 2
    assert capsys.readouterr().err.count("the log folder logs does not exist") == 2
    Path("logs").mkdir()
    assert main(["-t", "-r", "auto", "-n", "toy"]) == 2
    assert "error: -r/--resume: nothing to continue in the log folder logs: it holds no run of the name toy" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("flags", [["-n", "a"], ["-f", "b"], ["--actual_resume", "c"], ["--datadir_in_name", "false"]])
def test_what_begins_a_run_goes_with_auto_alone(flags: list[str]) -> None:
    assert parse_options(["-t", "-b", "a.yaml", "-r", "auto", *flags]).resume == "auto"
    for resume in ("last", "logs/run"):
        with pytest.raises(ValueError, match="exclude each other"):
            parse_options(["-t", "-b", "a.yaml", "-r", resume, *flags])
