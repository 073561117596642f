from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ldm.training.cli import parse_options, trainer_parameters

BASE = ["--base", "a.yaml", "-t"]


def problems(*words: str) -> list[str]:
    with pytest.raises(ValueError) as caught:
        parse_options(words)
    return str(caught.value).splitlines()


def test_short_and_long_flags_mean_the_same() -> None:
    short = "-b a.yaml -t -n run -p project -d -s 7 -f post -l elsewhere"
    long = "--base a.yaml --train --name run --project project --debug --seed 7 --postfix post --logdir elsewhere"
    assert parse_options(short.split()) == parse_options(long.split())


def test_what_is_not_given_has_the_documented_default() -> None:
    options = parse_options(BASE)
    assert (options.seed, options.logdir, options.scale_lr, options.datadir_in_name) == (23, "logs", False, True)
    assert (options.no_test, options.gpus, options.trainer_args, options.overrides) == (False, None, {}, [])
    assert options.given == {"base", "train"}


def test_base_takes_several_files_and_may_be_repeated() -> None:
    assert parse_options(["-b", "a.yaml", "b.yaml", "-t", "--base", "c.yaml"]).base == ["a.yaml", "b.yaml", "c.yaml"]


def test_an_override_ends_a_list_of_files() -> None:
    options = parse_options(["--base", "a.yaml", "data.params.batch_size=2", "-t"])
    assert (options.base, options.overrides) == (["a.yaml"], ["data.params.batch_size=2"])


def test_a_file_whose_name_looks_like_an_override_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1.yaml").touch()
    assert parse_options(["--base", "lr=1.yaml", "-t"]).base == ["lr=1.yaml"]


def test_a_bare_flag_before_an_override_means_yes() -> None:
    words = "-b a.yaml --scale_lr model.base_learning_rate=1e-6 -t model.params.model_lr=1e-6"
    options = parse_options(words.split())
    assert options.train
    assert options.scale_lr
    assert options.overrides == ["model.base_learning_rate=1e-6", "model.params.model_lr=1e-6"]


@pytest.mark.parametrize("word", ["false", "False", "no", "0", "off"])
def test_a_boolean_flag_takes_a_no(word: str) -> None:
    assert parse_options([*BASE, "--datadir_in_name", word]).datadir_in_name is False


def test_no_test_is_a_flag_of_its_own() -> None:
    assert parse_options([*BASE, "--no-test"]).no_test
    assert not parse_options([*BASE, "--no-test", "false"]).no_test


def test_a_value_may_be_attached_with_an_equals_sign() -> None:
    options = parse_options([*BASE, "--gpus=-1", "--name=a=b", "-s=4"])
    assert (options.gpus, options.name, options.seed) == ("-1", "a=b", 4)


@pytest.mark.parametrize("word", ["0,", "0", "0,1", "-1"])
def test_gpus_keeps_what_was_typed(word: str) -> None:
    assert parse_options([*BASE, "--gpus", word]).gpus == word


def test_the_last_of_two_equal_flags_wins() -> None:
    assert parse_options([*BASE, "-s", "1", "--seed", "2"]).seed == 2


def test_trainer_arguments_are_typed_by_their_annotation() -> None:
    words = "--max_epochs 3 --precision bf16-mixed --limit_val_batches 0.5 --devices 2 --max_steps -1 --benchmark"
    assert parse_options([*BASE, *words.split()]).trainer_args == {
        "max_epochs": 3,
        "precision": "bf16-mixed",
        "limit_val_batches": 0.5,
        "devices": 2,
        "max_steps": -1,
        "benchmark": True,
    }


@pytest.mark.skipif(sys.platform == "win32", reason="back slashes are Windows' own there")
def test_back_slashes_in_paths_are_read_as_slashes() -> None:
    options = parse_options(["-b", r"configs\a.yaml", "-t", "--data_root", r"training_samples\MyProject"])
    assert (options.base, options.data_root) == (["configs/a.yaml"], "training_samples/MyProject")


def test_an_unknown_flag_names_the_nearest() -> None:
    assert problems(*BASE, "--dataroot", "x") == ["unknown flag --dataroot; did you mean --data_root?"]


def test_a_trainer_flag_with_a_typo_names_the_nearest() -> None:
    assert problems(*BASE, "--max_epoch", "3") == ["unknown flag --max_epoch; did you mean --max_epochs?"]


def test_one_dash_before_a_long_flag_is_explained() -> None:
    assert problems(*BASE, "-name", "x") == ["unknown flag -name; long flags have two dashes: did you mean --name?"]


def test_a_flag_is_not_abbreviated() -> None:
    assert problems(*BASE, "--actual", "x")[0].startswith("unknown flag --actual")


def test_all_mistakes_are_told_at_once() -> None:
    found = problems("-t", "--sead", "3", "stray", "--max_epochs", "many", "--scale_lr", "maybe")
    assert len(found) == 4
    assert "did you mean --seed?" in found[0]
    assert found[1] == "--max_epochs: expected a whole number or null, got 'many'"
    assert found[2] == "--scale_lr: expected true or false, got 'maybe'"
    assert "no config was given" in found[3]


def test_a_word_that_belongs_to_no_flag_explains_overrides() -> None:
    assert "an override is written key.path=value" in problems(*BASE, "-n", "run", "stray")[0]


def test_a_flag_without_its_value_says_so() -> None:
    assert problems(*BASE, "--actual_resume", "--name", "x") == [
        "--actual_resume: a value is missing; write --actual_resume CKPT"
    ]


def test_name_and_resume_exclude_each_other() -> None:
    assert "exclude each other" in problems("-t", "-n", "x", "-r", "logs/run")[0]


def test_actual_resume_and_resume_exclude_each_other() -> None:
    assert "exclude each other" in problems("-t", "--actual_resume", "x.ckpt", "-r", "logs/run")[0]


def test_no_words_at_all_are_answered_with_the_everyday_command() -> None:
    found = problems()
    assert len(found) == 1
    assert "python main.py --base" in found[0]


def test_resume_needs_no_base() -> None:
    assert parse_options(["-t", "-r", "logs/run"]).resume == "logs/run"


def test_without_train_nothing_was_asked_for() -> None:
    assert problems("--base", "a.yaml") == [
        "nothing was asked for: add -t to train, or --print_config to see the merged config"
    ]


def test_print_config_needs_no_train() -> None:
    assert parse_options(["--base", "a.yaml", "--print_config"]).print_config


def test_an_old_trainer_flag_without_meaning_is_dropped_with_a_notice() -> None:
    options = parse_options([*BASE, "--weights_summary", "full"])
    assert options.trainer_args == {}
    assert options.notices == ["flag --weights_summary: dropped, the start summary says what is trained"]


def test_an_old_trainer_flag_with_a_new_name_is_translated() -> None:
    options = parse_options([*BASE, "--checkpoint_callback", "false", "--num_processes=2"])
    assert options.trainer_args == {"enable_checkpointing": False, "devices": 2}
    assert len(options.notices) == 2


def test_an_old_flag_that_must_not_be_dropped_says_what_to_do() -> None:
    assert problems(*BASE, "--auto_scale_batch_size", "power") == [
        "flag --auto_scale_batch_size: Lightning 2 has no such argument; set data.params.batch_size=N yourself"
    ]


def test_resume_from_checkpoint_is_read_as_resume() -> None:
    assert parse_options(["-t", "--resume_from_checkpoint", "logs/run"]).resume == "logs/run"


def test_a_card_to_plan_for_has_a_size() -> None:
    assert "give the card's memory in GB" in problems(*BASE, "--memory_plan", "-3")[0]


def test_callbacks_cannot_be_given_on_the_command_line() -> None:
    assert "under lightning.callbacks" in problems(*BASE, "--callbacks", "mine")[0]


def test_help_shows_the_everyday_command_and_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "v1-finetune_everydream.yaml -t" in text
    for flag in (
        "--base",
        "--actual_resume",
        "--data_root",
        "--no-test",
        *(f"--{name}" for name in trainer_parameters()),
    ):
        assert flag in text
    assert max(map(len, text.splitlines())) <= 120


def test_changes_are_accepted_with_a_resume_alone() -> None:
    assert parse_options(["-t", "-r", "logs/run", "--accept_changes"]).accept_changes
    with pytest.raises(ValueError, match="--accept_changes belongs to -r"):
        parse_options(["-t", "-b", "a.yaml", "--accept_changes"])


def test_the_newest_run_is_looked_for_in_the_log_folder_that_is_given() -> None:
    assert parse_options(["-t", "-r", "last", "-l", "runs"]).logdir == "runs"
    with pytest.raises(ValueError, match="--logdir"):
        parse_options(["-t", "-r", "logs/run", "-l", "runs"])
