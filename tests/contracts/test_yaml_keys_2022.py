"""Users' YAML files of 2022 run as they are: every key, with every value, is tried on a config of its time."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from ldm.training.cli import parse_options
from ldm.training.config import RunConfig, load_run_config

TSV = Path(__file__).resolve().parents[1] / "assets" / "yaml_keys_2022.tsv"

# A config of 2022 without anything that needs translating.
MODEL: dict[str, Any] = {
    "base_learning_rate": 1e-6,
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "first_stage_key": "image",
        "cond_stage_key": "caption",
        "cond_stage_trainable": True,
        "conditioning_key": "crossattn",
        "unfreeze_model": True,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {
                "image_size": 32,
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 320,
                "attention_resolutions": [4, 2, 1],
                "num_res_blocks": 2,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": {
                    "double_z": True,
                    "z_channels": 4,
                    "resolution": 512,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": 128,
                    "ch_mult": [1, 2, 4, 4],
                    "num_res_blocks": 2,
                    "attn_resolutions": [],
                },
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    },
}
DATA: dict[str, Any] = {
    "target": "main.DataModuleFromConfig",
    "params": {
        "batch_size": 6,
        "num_workers": 8,
        "train": {"target": "ldm.data.every_dream.EveryDreamBatch", "params": {"set": "train"}},
        "validation": {"target": "ldm.data.ed_validate.EDValidateBatch", "params": {"set": "val"}},
        "test": {"target": "ldm.data.ed_validate.EDValidateBatch", "params": {}},
    },
}
LIGHTNING: dict[str, Any] = {
    "callbacks": {"image_logger": {"target": "main.ImageLogger", "params": {}}},
    "trainer": {"benchmark": True, "max_epochs": 1},
}
CONFIG_2022 = {"model": MODEL, "data": DATA, "lightning": LIGHTNING}

# What other keys a row needs beside it.
BESIDE: dict[str, str] = {
    "model.params.personalization_config.params": (
        "model.params.personalization_config.target=ldm.modules.embedding_manager.EmbeddingManager"
    ),
    # No file trained the network at a rate of 0: the two that hold it froze the network.
    "model.params.model_lr=0.0": "model.params.unfreeze_model=false",
}

# Rows that are translated or dropped, and what the notice says; all others run without a word.
NOTICES: dict[str, str] = {
    "data.params.test.params.repeats=0.2": "dropped, validation shows each picture once",
    "data.params.test.params.repeats=0.1": "dropped, validation shows each picture once",
    "data.params.validation.params.repeats=10": "dropped, validation shows each picture once",
    "data.params.validation.params.repeats=0.01": "dropped, validation shows each picture once",
    "data.params.validation.params.repeats=3": "dropped, validation shows each picture once",
    "data.params.train.params.debug_level=1": "dropped, the data report is always full",
    "data.params.train.params.per_image_tokens=False": "dropped, captions need no placeholder",
    "data.params.validation.params.per_image_tokens=False": "dropped, captions need no placeholder",
    "data.params.train.params.resolution=512": "read as size: 512",
    "data.params.train.params.seed=-1": "was drawn, and is written into the run's config",
    "data.params.train.target=ldm.data.personalized.PersonalizedBase": "read as ldm.data.every_dream.EveryDreamBatch",
    "data.params.train.target=ldm.data.personalized_batch.PersonalizeBatchBase": (
        "read as ldm.data.every_dream.EveryDreamBatch"
    ),
    "data.params.validation.target=ldm.data.personalized.PersonalizedBase": (
        "read as ldm.data.ed_validate.EDValidateBatch"
    ),
    "data.params.wrap=falsegit": "'falsegit' is read as false",
    "lightning.trainer.gpus=0,": "read as accelerator: gpu, devices: [0]",
    "model.params.cond_stage_key=txt": "'txt' is read as 'caption'",
    "model.params.first_stage_key=jpg": "'jpg' is read as 'image'",
    "model.params.embedding_reg_weight=0.0": "dropped, there is no regularisation term",
    "model.params.reg_weight=1.0": "dropped, there is no regularisation term",
    "model.params.personalization_config.params.initializer_words=['sculpture']": "dropped, textual inversion",
    "model.params.personalization_config.params.num_vectors_per_token=1": "dropped, textual inversion",
    "model.params.personalization_config.params.per_image_tokens=False": "dropped, textual inversion",
    "model.params.personalization_config.params.placeholder_strings=['*']": "dropped, textual inversion",
    "model.params.personalization_config.params.progressive_words=False": "dropped, textual inversion",
    "model.params.personalization_config.target=ldm.modules.embedding_manager.EmbeddingManager": (
        "dropped, textual inversion"
    ),
}
SCHEDULER_PARAMS = {
    "warm_up_steps": 50, "f_start": 0.5, "f_max": 1.0, "f_min": 0.5, "steps_to_min": 10000,
}  # fmt: skip


def rows() -> Iterator[tuple[str, str]]:
    """Yield each key with each value that was seen."""
    with TSV.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            for value in row["values seen (in files)"].split("; "):
                yield row["key"], value.rpartition(" (")[0]


ROWS = list(rows())


def read_value(text: str) -> Any:
    """Read a value as Python printed it; what is no Python literal, and `0,`, is text."""
    if text == "0,":
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def load(tmp_path: Path, *settings: tuple[str, Any]) -> RunConfig:
    config = OmegaConf.create(CONFIG_2022)
    for key, value in settings:
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(OmegaConf.to_container(config)), encoding="utf-8")
    return load_run_config(
        parse_options(["--base", str(file), "-t", "--print_config", "--data_root", str(tmp_path), "-n", "mine"])
    )


def about_the_config(loaded: RunConfig) -> list[str]:
    """Leave out what a notice says about the machine that the test runs on."""
    return [notice for notice in loaded.notices if "GPU is" not in notice and "no GPU was asked for" not in notice]


def settings_for(key: str, value: str) -> list[tuple[str, Any]]:
    settings: list[tuple[str, Any]] = []
    for prefix, other in BESIDE.items():
        if f"{key}={value}".startswith(prefix):
            name, _, text = other.partition("=")
            settings.append((name, yaml.safe_load(text)))
    if key.startswith("model.params.scheduler_config"):
        settings.append(("model.params.scheduler_config.target", "ldm.lr_scheduler.EveryDreamScheduler"))
        settings += [(f"model.params.scheduler_config.params.{name}", held) for name, held in SCHEDULER_PARAMS.items()]
    return [*settings, (key, read_value(value))]


@pytest.mark.parametrize(("key", "value"), ROWS, ids=[f"{key}={value}" for key, value in ROWS])
def test_a_yaml_of_2022_with_this_value_runs(tmp_path: Path, key: str, value: str) -> None:
    loaded = load(tmp_path, *settings_for(key, value))
    notices = about_the_config(loaded)
    expected = NOTICES.get(f"{key}={value}")
    if expected is None:
        assert notices == []
        assert OmegaConf.select(loaded.config, key) == read_value(value)
    else:
        assert len(notices) == 1
        assert expected in notices[0]
        assert "mine.yaml:" in notices[0]


def test_every_expected_notice_belongs_to_a_row() -> None:
    assert set(NOTICES) <= {f"{key}={value}" for key, value in ROWS}


@pytest.mark.parametrize(
    ("key", "value", "new_key", "new_value"),
    [
        ("data.params.wrap", "falsegit", "data.params.wrap", False),
        ("data.params.train.params.resolution", 512, "data.params.train.params.size", 512),
        (
            "data.params.train.target",
            "ldm.data.personalized.PersonalizedBase",
            "data.params.train.target",
            "ldm.data.every_dream.EveryDreamBatch",
        ),
        ("model.params.cond_stage_key", "txt", "model.params.cond_stage_key", "caption"),
        ("model.params.first_stage_key", "jpg", "model.params.first_stage_key", "image"),
        ("lightning.trainer.gpus", "0,", "lightning.trainer.devices", [0]),
        ("lightning.trainer.gpus", "0,", "lightning.trainer.accelerator", "gpu"),
    ],
)
def test_what_is_translated_says_the_same_in_todays_words(
    tmp_path: Path, key: str, value: Any, new_key: str, new_value: Any
) -> None:
    assert OmegaConf.select(load(tmp_path, (key, value)).config, new_key) == new_value


def test_a_random_order_is_drawn_once_and_written_down(tmp_path: Path) -> None:
    first, second = (load(tmp_path, ("data.params.train.params.seed", -1)).config.data.params.train for _ in range(2))
    assert first.params.seed >= 0
    assert first.params.seed != second.params.seed


def test_a_file_with_all_of_these_keys_runs(tmp_path: Path) -> None:
    exclusive = ("lightning.modelcheckpoint.params.every_n_train_steps", "model.params.unfreeze_model")
    settings = [(key, read_value(value)) for key, value in dict(reversed(ROWS)).items() if key not in exclusive]
    settings += [("model.params.model_lr", 1e-6), ("data.params.wrap", "falsegit")]
    loaded = load(tmp_path, *settings)
    dropped = {notice.split(": ")[1] for notice in about_the_config(loaded) if ": dropped, " in notice}
    assert dropped == {
        "model.params.personalization_config",
        "model.params.reg_weight",
        "model.params.embedding_reg_weight",
        "data.params.train.params.debug_level",
        "data.params.train.params.per_image_tokens",
        "data.params.train.params.resolution",
        "data.params.validation.params.per_image_tokens",
        "data.params.validation.params.repeats",
        "data.params.test.params.repeats",
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.params.train.params.repeats", 2.5, "2.5 is not a whole number; write 2"),
        ("data.params.reg", {"target": "ldm.data.personalized.PersonalizedBase"}, "there are no regularisation images"),
        ("lightning.trainer.resume_from_checkpoint", "logs/run/checkpoints/last.ckpt", "type -r"),
        ("lightning.trainer.auto_lr_find", True, "set model.base_learning_rate=RATE yourself"),
    ],
)
def test_what_this_trainer_does_not_do_is_one_error_that_says_what_to_do(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        load(tmp_path, (key, value))
    assert len(str(caught.value).splitlines()) == 1
    assert message in str(caught.value)


def test_textual_inversion_is_refused_where_the_model_itself_is_frozen(tmp_path: Path) -> None:
    frozen = [
        ("model.params.unfreeze_model", False),
        ("model.params.personalization_config.target", "ldm.modules.embedding_manager.EmbeddingManager"),
    ]
    with pytest.raises(ValueError, match="textual inversion is not part of this trainer") as caught:
        load(tmp_path, *frozen)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value", "notice"),
    [
        ("lightning.trainer.resume_from_checkpoint", None, "dropped, it is empty"),
        ("lightning.trainer.progress_bar_refresh_rate", 10, "dropped"),
        ("lightning.trainer.checkpoint_callback", True, "read as enable_checkpointing: True"),
        ("lightning.trainer.accelerator", "ddp", "read as accelerator: gpu, strategy: ddp"),
        ("lightning.modelcheckpoint.params.period", 1, "read as every_n_epochs: 1"),
        ("data.params.train.params.repeats", 20.0, "20.0 is read as 20"),
        ("data.params.train.params.placeholder_token", "dog", "captions need no placeholder"),
    ],
)
def test_what_sibling_files_of_2022_hold_is_translated(tmp_path: Path, key: str, value: Any, notice: str) -> None:
    notices = about_the_config(load(tmp_path, (key, value)))
    assert len(notices) == 1
    assert notice in notices[0]


def test_the_test_tube_logger_becomes_tensorboard(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        ("lightning.logger.target", "pytorch_lightning.loggers.TestTubeLogger"),
        ("lightning.logger.params", {"name": "testtube", "debug": False, "create_git_tag": False}),
    )
    assert loaded.config.lightning.logger.target == "pytorch_lightning.loggers.TensorBoardLogger"
    assert loaded.config.lightning.logger.params == {"name": "testtube"}
    assert len(about_the_config(loaded)) == 1


def test_a_data_set_of_somebody_else_keeps_its_keys(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        ("data.params.train", {"target": "torchvision.datasets.FakeData", "params": {"image_size": [3, 8, 8]}}),
    ).config
    assert config.data.params.train.params == {"image_size": [3, 8, 8]}
