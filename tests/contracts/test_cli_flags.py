"""The flags that users' commands hold: each is accepted in every form, and lands where it is read."""

from __future__ import annotations

import inspect

import pytest
from pytorch_lightning import Trainer

from ldm.training.cli import parse_options

FORMS = [
    ("-b", "base", "x.yaml", ["a.yaml", "x.yaml"]),
    ("--base", "base", "x.yaml", ["a.yaml", "x.yaml"]),
    ("-t", "train", None, True),
    ("--train", "train", "true", True),
    ("-n", "name", "Name", "Name"),
    ("--name", "name", "Name", "Name"),
    ("-p", "project", "Name", "Name"),
    ("--project", "project", "Name", "Name"),
    ("-d", "debug", None, True),
    ("--debug", "debug", "True", True),
    ("-s", "seed", "555", 555),
    ("--seed", "seed", "555", 555),
    ("-f", "postfix", "_a", "_a"),
    ("--postfix", "postfix", "_a", "_a"),
    ("-l", "logdir", "runs", "runs"),
    ("--logdir", "logdir", "runs", "runs"),
    ("--scale_lr", "scale_lr", None, True),
    ("--scale_lr", "scale_lr", "False", False),
    ("--no-test", "no_test", None, True),
    ("--datadir_in_name", "datadir_in_name", "False", False),
    ("--actual_resume", "actual_resume", "sd_v1-5_vae.ckpt", "sd_v1-5_vae.ckpt"),
    ("--data_root", "data_root", "training_samples/MyProject", "training_samples/MyProject"),
    ("--gpus", "gpus", "0,", "0,"),
    ("--print_config", "print_config", None, True),
]

OWN_FORMS = [
    ("--on_bad_image", "on_bad_image", "skip"),
    ("--on_nan", "on_nan", "skip"),
    ("--on_oom", "on_oom", "split"),
]


@pytest.mark.parametrize(("flag", "field", "value", "expected"), FORMS)
def test_every_flag_of_the_lineage_is_accepted(flag: str, field: str, value: str | None, expected: object) -> None:
    words = ["--base", "a.yaml", "-t", flag, *([value] if value is not None else [])]
    assert getattr(parse_options(words), field) == expected


@pytest.mark.parametrize(("flag", "field", "value"), OWN_FORMS)
def test_what_to_do_about_failures_is_a_flag(flag: str, field: str, value: str) -> None:
    assert getattr(parse_options(["--base", "a.yaml", "-t", flag, value]), field) == value
    with pytest.raises(ValueError, match=f"{flag}: invalid choice: 'perhaps'"):
        parse_options(["--base", "a.yaml", "-t", flag, "perhaps"])


def test_a_warm_optimiser_needs_a_checkpoint_to_come_from() -> None:
    words = ["--base", "a.yaml", "-t", "--warm_optimizer"]
    assert parse_options([*words, "--actual_resume", "last.ckpt"]).warm_optimizer
    with pytest.raises(ValueError, match="--actual_resume CKPT"):
        parse_options(words)


@pytest.mark.parametrize("flag", ["-r", "--resume"])
def test_resume_is_accepted(flag: str) -> None:
    assert parse_options(["-t", flag, "logs/run"]).resume == "logs/run"


def takes(name: str, word: str) -> bool:
    try:
        options = parse_options(["--base", "a.yaml", "-t", f"--{name}", word])
    except ValueError:
        return False
    return name in options.trainer_args


@pytest.mark.parametrize("name", [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"])
def test_every_trainer_argument_is_a_flag(name: str) -> None:
    assert any(takes(name, word) for word in ("null", "1", "true"))


def test_the_everyday_command_of_2022_is_understood() -> None:
    command = (
        "--base configs/stable-diffusion/v1-finetune_everydream.yaml -t  --actual_resume sd_v1-5_vae.ckpt "
        "-n MyProjectName --gpus 0, --data_root training_samples/MyProject"
    )
    options = parse_options(command.split())
    assert options.base == ["configs/stable-diffusion/v1-finetune_everydream.yaml"]
    assert options.train
    assert options.actual_resume == "sd_v1-5_vae.ckpt"
    assert (options.name, options.gpus, options.data_root) == ("MyProjectName", "0,", "training_samples/MyProject")
    assert options.notices == []
