from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ldm.training.cli import Options, parse_options
from ldm.training.config import RunConfig, format_config, load_run_config
from ldm.training.config_tree import ConfigTree, nearest, read_yaml, usable_path

DUMMY = "tests.unit.training.dummy_targets"
CONFIG = f"""\
model:
  base_learning_rate: 1.0e-06
  target: {DUMMY}.Model
  params:
    timesteps: 1000
    unet_config:
      target: {DUMMY}.Part
      params:
        width: 8
data:
  target: {DUMMY}.Data
  params:
    batch_size: 6
    train:
      target: {DUMMY}.Pictures
      params:
        size: 512
    validation:
      target: {DUMMY}.Pictures
lightning:
  trainer:
    max_epochs: 2
"""

Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a.yaml with further words; the folder `pictures` is the data root unless the words name one."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(CONFIG, encoding="utf-8")
    Path("pictures").mkdir()

    def loaded(*words: str) -> RunConfig:
        given = [] if "--data_root" in words or "--bare" in words else ["--data_root", "pictures"]
        base = [] if "-r" in words else ["--base", "a.yaml"]
        return load_run_config(parse_options([*base, "-t", *given, *[word for word in words if word != "--bare"]]))

    return loaded


def problems(load: Load, *words: str) -> list[str]:
    with pytest.raises(ValueError) as caught:
        load(*words)
    return str(caught.value).splitlines()


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_later_files_win_over_earlier_and_overrides_over_files(load: Load) -> None:
    write("b.yaml", "data:\n  params:\n    batch_size: 2\n    num_workers: 3\n")
    config = load("-b", "b.yaml", "data.params.num_workers=1").config
    assert (config.data.params.batch_size, config.data.params.num_workers) == (2, 1)


def test_flags_win_over_overrides(load: Load) -> None:
    assert load("lightning.trainer.max_epochs=3", "--max_epochs", "4").config.lightning.trainer.max_epochs == 4


def test_a_list_in_a_later_file_replaces_the_earlier_one(load: Load) -> None:
    config = load("model.params.unet_config.params.depths=[1,2,3]", "model.params.unet_config.params.depths=[4]").config
    assert config.model.params.unet_config.params.depths == [4]


def test_every_value_knows_where_it_came_from(load: Load) -> None:
    write("b.yaml", "# comment\ndata:\n  params:\n    batch_size: 2\n")
    loaded = load("-b", "b.yaml", "data.params.num_workers=1", "--max_steps", "9", "-n", "mine")
    assert loaded.sources["model.base_learning_rate"] == "a.yaml:2"
    assert loaded.sources["data.params.batch_size"] == "b.yaml:4"
    assert loaded.sources["data.params.num_workers"] == "override"
    assert loaded.sources["lightning.trainer.max_steps"] == "flag --max_steps"
    assert loaded.sources["run.name"] == "flag --name"
    assert loaded.sources["run.seed"] == "default"


def test_sources_name_exactly_the_leaves(load: Load) -> None:
    loaded = load()
    paths = {path for path in loaded.sources if OmegaConf.select(loaded.config, path, default="absent") == "absent"}
    assert not paths
    assert "model.params" not in loaded.sources


def test_the_printed_config_is_yaml_with_the_same_values_and_their_origins(load: Load) -> None:
    loaded = load("--no-test")
    text = format_config(loaded)
    assert yaml.safe_load(text) == OmegaConf.to_container(loaded.config)
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["batch_size"].endswith("# a.yaml:13")
    assert lines["no_test"].endswith("# flag --no-test")


def test_the_saved_config_is_a_valid_base_with_the_same_values(load: Load) -> None:
    first = load("-n", "mine", "-s", "7", "--scale_lr")
    OmegaConf.save(first.config, "saved.yaml")
    again = load_run_config(Options(base=["saved.yaml"], train=True))
    assert again.config == first.config
    assert again.notices == []


def test_a_flag_reseeds_what_a_saved_config_had_seeded(load: Load) -> None:
    OmegaConf.save(load("data.params.validation.params.seed=5").config, "saved.yaml")
    config = load_run_config(parse_options(["--base", "saved.yaml", "-t", "-s", "8"])).config
    assert (config.run.seed, config.data.params.seed, config.data.params.train.params.seed) == (8, 8, 8)
    assert config.data.params.validation.params.seed == 5


def test_the_run_section_keeps_what_the_command_line_said(load: Load) -> None:
    run = load("-n", "mine", "-f", "_x", "-l", "elsewhere", "--datadir_in_name", "false").config.run
    assert (run.name, run.postfix, run.logdir, run.datadir_in_name) == ("mine", "_x", "elsewhere", False)
    assert (run.data_root, run.scale_lr, run.actual_resume) == ("pictures", False, None)


def test_data_root_goes_to_every_data_set_that_takes_one(load: Load) -> None:
    write("c.yaml", f"data:\n  params:\n    validation:\n      target: {DUMMY}.SelfContained\n")
    config = load("-b", "c.yaml").config
    assert config.data.params.train.params.data_root == "pictures"
    assert "params" not in config.data.params.validation


def test_the_flag_wins_over_the_yamls_data_root(load: Load) -> None:
    write("c.yaml", "data: {params: {train: {params: {data_root: elsewhere}}}}\n")
    assert load("-b", "c.yaml").config.data.params.train.params.data_root == "pictures"


def test_a_validation_folder_of_its_own_is_kept_and_told(load: Load) -> None:
    Path("held_back").mkdir()
    loaded = load("data.params.validation.params.data_root=held_back")
    assert loaded.config.data.params.validation.params.data_root == "held_back"
    assert "stays held_back" in loaded.notices[0]


def test_a_data_root_in_the_yaml_needs_no_flag(load: Load) -> None:
    roots = [f"data.params.{name}.params.data_root=pictures" for name in ("train", "validation")]
    assert load("--bare", *roots).config.data.params.train.params.data_root == "pictures"


def test_a_missing_data_root_is_told_once(load: Load) -> None:
    found = problems(load, "--bare")
    assert len(found) == 1
    assert found[0].startswith("data_root is missing: add --data_root FOLDER")


def test_an_empty_data_root_is_a_missing_one(load: Load) -> None:
    found = problems(load, "--data_root", "")
    assert len(found) == 1
    assert found[0].startswith("data_root is missing")


def test_the_seed_goes_to_the_data_and_its_sets(load: Load) -> None:
    data = load("-s", "9").config.data.params
    assert (data.seed, data.train.params.seed, data.validation.params.seed) == (9, 9, 9)


def test_a_seed_of_minus_one_is_drawn_and_written_down(load: Load) -> None:
    loaded = load("-s", "-1")
    assert loaded.config.run.seed >= 0
    assert loaded.config.data.params.seed == loaded.config.run.seed
    assert str(loaded.config.run.seed) in loaded.notices[0]


def test_without_gpus_the_run_is_on_the_cpu(load: Load) -> None:
    trainer = load().config.lightning.trainer
    assert (trainer.accelerator, trainer.devices) == ("cpu", 1)


def test_an_idle_gpu_is_told(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "type --gpus 0, for the first GPU" in load().notices[0]


@pytest.mark.parametrize(
    ("word", "devices"), [("0,", [0]), ("0", [0]), ("0,1", [0, 1]), ("1", [1]), ("-1", -1), ("0,1,", [0, 1])]
)
def test_gpus_become_accelerator_and_devices(
    load: Load, monkeypatch: pytest.MonkeyPatch, word: str, devices: object
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    trainer = load("--gpus", word).config.lightning.trainer
    assert (trainer.accelerator, trainer.devices) == ("gpu", devices)


def test_gpus_without_a_gpu_say_what_to_type(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    found = problems(load, "--gpus", "0,")
    assert len(found) == 1
    assert "finds no CUDA GPU" in found[0]
    assert "--accelerator cpu" in found[0]


def test_a_gpu_number_beyond_the_last_says_how_many_there_are(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "there is no GPU 1; this machine has 1" in problems(load, "--gpus", "0,1")[0]


@pytest.mark.parametrize("word", ["x", "0;1", "0,0", "-2", "1.5"])
def test_gpus_that_are_no_numbers_are_refused(load: Load, word: str) -> None:
    assert "is not a list of GPU numbers" in problems(load, "--gpus", word)[0]


def test_an_empty_gpus_takes_the_yamls_gpus_away(load: Load) -> None:
    write("gpu.yaml", "lightning: {trainer: {gpus: '0,'}}\n")
    trainer = load("-b", "gpu.yaml", "--gpus", "").config.lightning.trainer
    assert (trainer.accelerator, trainer.devices) == ("cpu", 1)


def test_gpus_and_accelerator_exclude_each_other(load: Load) -> None:
    assert "say the same thing twice" in problems(load, "--gpus", "0,", "--accelerator", "cpu")[0]


def test_the_accelerator_of_a_later_file_takes_the_earlier_ones_devices_away(load: Load) -> None:
    write("gpu.yaml", "lightning: {trainer: {gpus: '0,'}}\n")
    trainer = load("-b", "gpu.yaml", "--accelerator", "cpu").config.lightning.trainer
    assert (trainer.accelerator, trainer.devices) == ("cpu", 1)


def test_looking_at_a_config_needs_neither_its_gpu_nor_its_pictures(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = load("--print_config", "--gpus", "0,", "--data_root", "nowhere")
    assert len(loaded.notices) == 2


def test_a_data_root_that_is_not_there_names_the_nearest(load: Load) -> None:
    assert problems(load, "--data_root", "picture") == [
        "flag --data_root: data_root picture does not exist; did you mean pictures?"
    ]


def test_a_data_root_whose_back_slash_the_shell_took_is_recognised(load: Load) -> None:
    Path("training_samples/MyProject").mkdir(parents=True)
    assert "did you mean training_samples/MyProject?" in problems(load, "--data_root", "training_samplesMyProject")[0]


def test_a_data_root_that_is_a_file_says_so(load: Load) -> None:
    assert "is a file" in problems(load, "--data_root", "a.yaml")[0]


def test_a_checkpoint_that_is_not_there_names_the_nearest(load: Load) -> None:
    Path("sd_v1-5_vae.ckpt").touch()
    assert problems(load, "--actual_resume", "sd-v1-5-vae.ckpt") == [
        "flag --actual_resume: actual_resume sd-v1-5-vae.ckpt does not exist; did you mean sd_v1-5_vae.ckpt?"
    ]


def test_a_run_folder_as_checkpoint_names_its_last_one(load: Load) -> None:
    write("logs/run/checkpoints/last.ckpt", "")
    assert "did you mean logs/run/checkpoints/last.ckpt?" in problems(load, "--actual_resume", "logs/run")[0]


def test_a_command_that_is_proposed_quotes_a_folder_with_spaces(load: Load) -> None:
    write("my run/checkpoints/last.ckpt", "")
    quoted = '"my run"' if sys.platform == "win32" else "'my run'"
    assert f"(-r {quoted} continues that run)" in problems(load, "--actual_resume", "my run")[0]


def saved_run(load: Load, folder: str = "logs/run") -> None:
    loaded = load("-n", "mine", "-s", "7", "--actual_resume", write("gone.ckpt", ""))
    write(f"{folder}/checkpoints/last.ckpt", "")
    write(f"{folder}/configs/2022-10-25T20-37-40-project.yaml", OmegaConf.to_yaml(loaded.config))
    Path("gone.ckpt").unlink()


@pytest.mark.parametrize("named", ["logs/run", "logs/run/", "logs/run/checkpoints", "logs/run/checkpoints/last.ckpt"])
def test_resume_alone_takes_the_runs_own_config(load: Load, named: str) -> None:
    saved_run(load)
    run = load("--bare", "-r", named).config.run
    assert (run.name, run.seed, run.data_root) == ("mine", 7, "pictures")


@pytest.mark.parametrize("code", ["logs/run/given_code.py", "logs/given_code.py", "logs/run/__init__.py"])
def test_code_that_comes_with_a_run_is_not_imported(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    saved_run(load)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path(code).write_text(f"import os; os.mkdir({str(tmp_path / 'made')!r})\n", encoding="utf-8")
    target = f"{code.removesuffix('.py').replace('/', '.')}.Model"
    found = problems(load, "--bare", "-r", "logs/run", f"model.target={target}")
    assert found[0].startswith(f"override: model.target: target {target} lies with the run that is continued")
    assert not (tmp_path / "made").exists()


def test_resume_takes_the_newest_saved_config_and_words_on_top(load: Load) -> None:
    saved_run(load)
    newer = Path("logs/run/configs/2022-10-26T00-00-00-project.yaml")
    newer.write_text(
        Path("logs/run/configs/2022-10-25T20-37-40-project.yaml").read_text().replace("seed: 7", "seed: 8")
    )
    config = load("--bare", "-r", "logs/run", "--max_epochs", "9").config
    assert (config.run.seed, config.lightning.trainer.max_epochs) == (8, 9)


def test_a_run_of_2022_is_read_from_both_its_files(load: Load) -> None:
    saved_run(load)
    write("logs/run/configs/2022-10-25T20-37-40-lightning.yaml", "lightning: {trainer: {max_epochs: 5}}\n")
    assert load("--bare", "-r", "logs/run").config.lightning.trainer.max_epochs == 5


def test_resuming_what_is_not_there_names_the_nearest(load: Load) -> None:
    saved_run(load)
    assert "did you mean logs/run?" in problems(load, "--bare", "-r", "logs/runn")[0]


def test_resuming_a_folder_without_checkpoints_says_so(load: Load) -> None:
    saved_run(load)
    Path("logs/run/checkpoints/last.ckpt").unlink()
    assert "holds no checkpoint" in problems(load, "--bare", "-r", "logs/run")[0]


def test_resuming_a_checkpoint_outside_a_run_says_how_to_start_from_it(load: Load) -> None:
    write("models/x.ckpt", "")
    assert "--actual_resume" in problems(load, "--bare", "-r", "models/x.ckpt")[0]


def test_a_missing_file_names_the_nearest(load: Load) -> None:
    assert problems(load, "-b", "aa.yaml") == ["aa.yaml: no such config file; did you mean a.yaml?"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\n", "bad.yaml:3: not valid YAML"),
        ("a:\n\tb: 1\n", "YAML indents with spaces, not with tabs"),
        ("a: 1\na: 2\n", "bad.yaml:2: not valid YAML: found duplicate key"),
        ("a: !!python/object/apply:os.system ['true']\n", "a config holds plain values only"),
        ("- a\n- b\n", "bad.yaml:1: expected keys such as model: and data:"),
        ("", "bad.yaml: the file is empty"),
    ],
)
def test_what_is_no_config_is_one_line_with_its_place(load: Load, text: str, message: str) -> None:
    write("bad.yaml", text)
    found = problems(load, "-b", "bad.yaml")
    assert len(found) == 1
    assert message in found[0]


def test_a_file_that_is_no_text_says_so(load: Load) -> None:
    Path("bad.yaml").write_bytes(b"\x80\x02}q\x00")
    assert "bad.yaml: not a YAML text file" in problems(load, "-b", "bad.yaml")[0]


def test_a_folder_as_config_says_so(load: Load) -> None:
    assert "pictures: is a folder" in problems(load, "-b", "pictures")[0]


def test_all_unreadable_files_are_told_at_once(load: Load) -> None:
    write("bad.yaml", "a: [")
    assert len(problems(load, "-b", "bad.yaml", "nowhere.yaml", "model.x={")) == 3


def test_a_reference_to_nothing_is_told_with_its_place(load: Load) -> None:
    write("b.yaml", "data:\n  params:\n    batch_size: ${nowhere}\n")
    assert problems(load, "-b", "b.yaml") == [
        "b.yaml:3: data.params.batch_size: ${nowhere} names no key of the config; write a whole path such as"
        " ${data.params.batch_size}"
    ]


def test_an_override_whose_value_is_no_yaml_says_why(load: Load) -> None:
    found = problems(load, "data.params.batch_size={")
    assert len(found) == 1
    assert found[0].startswith("override data.params.batch_size={: the value is not valid YAML: ")


def test_a_reference_is_resolved(load: Load) -> None:
    assert load("data.params.num_workers=${data.params.batch_size}").config.data.params.num_workers == 6


def test_a_value_that_must_be_given_is_asked_for(load: Load) -> None:
    assert "data.params.batch_size: must be given" in problems(load, "data.params.batch_size=???")[0]


def test_an_unused_byte_order_mark_does_not_matter(load: Load) -> None:
    Path("b.yaml").write_bytes(b"\xef\xbb\xbfdata: {params: {batch_size: 2}}\n")
    assert load("-b", "b.yaml").config.data.params.batch_size == 2


def test_a_number_with_an_exponent_is_a_number(load: Load) -> None:
    assert load("model.base_learning_rate=1e-6").config.model.base_learning_rate == 1e-6


def test_keys_that_are_numbers_or_hold_dots_are_told_like_others(load: Load) -> None:
    write("b.yaml", "data: {params: {1: {params: 5}, a.b: {params: 5}}}\nlightning: {callbacks: {2: 3, c.d: 4}}\n")
    assert len(problems(load, "-b", "b.yaml")) == 4


def test_notices_of_the_command_line_are_handed_on(load: Load) -> None:
    options = Options(base=["a.yaml"], train=True, data_root="pictures")
    assert load_run_config(replace(options, notices=["hello"])).notices == ["hello"]


def test_a_merged_in_anchor_knows_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("one: &x\n  a: 1\ntwo:\n  <<: *x\n  b: 2\n", encoding="utf-8")
    read = read_yaml(str(file))
    assert read.tree["two"] == {"a": 1, "b": 2}
    assert read.source("two.a").endswith("a.yaml:2")


def test_an_anchor_that_contains_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: &x {b: *x}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.yaml"):
        read_yaml(str(file))


def test_a_value_that_replaces_a_mapping_forgets_the_lines_below() -> None:
    below = ConfigTree({"a": {"b": 1}}, {"a": "x:1", "a.b": "x:2"})
    below.merge(ConfigTree({"a": 3}, {"a": "y:1"}))
    assert below.sources == {"a": "y:1"}


def test_nothing_is_near_a_word_unlike_all_others() -> None:
    assert nearest("zebra", ["batch_size", "wrap"]) is None


def test_a_name_with_a_back_slash_that_exists_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a\\b").touch()
    assert usable_path("a\\b") == "a\\b"
