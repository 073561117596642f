"""What the YAML files and command lines of 2022 say, in today's words.

One table for YAML keys (``RULES``), one for what Lightning's Trainer took then (``TRAINER_WORDS``, used
for ``lightning.trainer`` keys and for flags alike), one for other flags (``FLAG_WORDS``). What still
means something is translated; what has no effect today is dropped; what asks for something that this
trainer does not do is an error. The first two give a one-line notice each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ldm.training.config_tree import ConfigTree

Action = Callable[[ConfigTree, str], "str | None"]
"""Changes the tree at a path; gives the notice, or None where nothing was to be done.

Raises ValueError where the key asks for something that this trainer does not do."""

DATASETS: Final = ("train", "validation", "test", "predict")
TRAIN_TARGET: Final = "ldm.data.every_dream.EveryDreamBatch"
VALIDATION_TARGET: Final = "ldm.data.ed_validate.EDValidateBatch"
OLD_DATA_TARGETS: Final = (
    "ldm.data.personalized.PersonalizedBase",
    "ldm.data.personalized_batch.PersonalizeBatchBase",
)


@dataclass(frozen=True)
class Rule:
    """One thing that files of 2022 say.

    Attributes:
        key: dotted key path; ``*`` stands for any one key.
        action: what becomes of it.
        owner: applies only where the nearest ``target:`` above the key starts with this.
    """

    key: str
    action: Action
    owner: str = ""


@dataclass(frozen=True)
class Word:
    """What became of a Trainer argument or flag of 2022.

    Attributes:
        becomes: its name today; empty where it has none.
        reason: why it is dropped, or what to type instead.
        refused: whether it asks for something that must not be dropped in silence.
    """

    becomes: str = ""
    reason: str = ""
    refused: bool = False


def translate(config: ConfigTree, rules: tuple[Rule, ...]) -> tuple[list[str], list[str]]:
    """Put a config of 2022 into today's words, in place.

    Args:
        config: one file's config for ``TRAINER_RULES``, the merged one for ``RULES``; a config of today
            passes unchanged.
        rules: the part of the table to apply.

    Returns:
        Notices and problems, one line each.
    """
    notices: list[str] = []
    problems: list[str] = []
    for rule in rules:
        for path in config.matching(rule.key):
            if rule.owner and not _owner(config, path).startswith(rule.owner):
                continue
            source = config.source(path)
            try:
                notice = rule.action(config, path)
            except ValueError as error:
                problems.append(f"{source}: {path}: {error}")
                config.pop(path)  # so that no later check complains about it once more
                continue
            if notice is not None:
                notices.append(f"{source}: {path}: {notice}")
    return notices, problems


def translate_gpus(value: Any) -> tuple[str, list[int] | int] | None:
    """Read what ``gpus`` means: numbers of GPUs, counted from 0.

    Args:
        value: ``0,`` ``0`` ``0,1`` (text or number), ``[0, 1]``, ``-1`` for all; null or empty for none.

    Returns:
        Lightning's ``accelerator`` and ``devices``; None where no GPU is asked for.

    Raises:
        ValueError: it is none of these.
    """
    if value is None or value in ("", "null", "None", "none"):
        return None
    parts = value if isinstance(value, list) else [part for part in str(value).split(",") if part.strip()]
    try:
        numbers = [int(str(part)) for part in parts if not isinstance(part, bool)]
    except ValueError:
        numbers = []
    if numbers == [-1]:
        return "gpu", -1
    if not numbers or len(numbers) != len(parts) or min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise ValueError(
            f"{value!r} is not a list of GPU numbers; write 0, for the first GPU, 0,1 for the first two, -1 for all"
        )
    return "gpu", numbers


def _owner(config: ConfigTree, path: str) -> str:
    """Give the target of the nearest mapping above a key that has one."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        target = config.get(".".join([*parts[:length], "target"]))
        if isinstance(target, str):
            return target
    return ""


def _drop(reason: str) -> Action:
    """Make an action that takes the key out."""

    def action(config: ConfigTree, path: str) -> str:
        config.pop(path)
        return f"dropped, {reason}"

    return action


def _refuse(what_to_do: str) -> Action:
    """Make an action that ends the run."""

    def action(config: ConfigTree, path: str) -> str:
        raise ValueError(what_to_do)

    return action


def _rename(new: str, reason: str) -> Action:
    """Make an action that moves a value to another key of the same mapping, unless that is set."""

    def action(config: ConfigTree, path: str) -> str:
        source = config.source(path)
        value = config.pop(path)
        target = f"{path.rpartition('.')[0]}.{new}"
        if config.has(target):
            return f"dropped, {reason}, which is set as well"
        config.set(target, value, source)
        return f"read as {new}: {value} ({reason})"

    return action


def _replace(values: Mapping[str, Any], reason: str) -> Action:
    """Make an action that replaces some values and leaves all others."""

    def action(config: ConfigTree, path: str) -> str | None:
        value = config.get(path)
        if not isinstance(value, str) or value not in values:
            return None
        new = values[value]
        config.set(path, new, config.source(path))
        return f"{value!r} is read as {str(new).lower() if isinstance(new, bool) else new} ({reason})"

    return action


def _gpus(config: ConfigTree, path: str) -> str:
    source = config.source(path)
    value = config.pop(path)
    devices = translate_gpus(value)
    if devices is None:
        return f"{value!r} asks for no GPU"
    trainer = path.rpartition(".")[0]
    for key, new in zip(("accelerator", "devices"), devices, strict=True):
        if not config.has(f"{trainer}.{key}"):
            config.set(f"{trainer}.{key}", new, source)
    return f"{value!r} is read as accelerator: gpu, devices: {devices[1]}"


def _trainer_word(name: str, word: Word) -> Action:
    """Make the action for a Trainer argument of 2022 in ``lightning.trainer``."""
    if word.refused:
        return _null_or_refuse(word)
    if word.becomes:
        return _rename(word.becomes, f"Lightning 2 calls {name} so")
    return _drop(word.reason)


def _null_or_refuse(word: Word) -> Action:
    """Make an action that drops a key without a value, and refuses it with one."""

    def action(config: ConfigTree, path: str) -> str:
        if config.get(path) not in (None, "", "null"):
            raise ValueError(word.reason)
        config.pop(path)
        return "dropped, it is empty"

    return action


def _distributed_accelerator(config: ConfigTree, path: str) -> str | None:
    value = config.get(path)
    if value not in ("ddp", "ddp_spawn", "ddp2", "dp", "ddp_sharded"):
        return None
    source = config.source(path)
    config.set(path, "gpu", source)
    strategy = f"{path.rpartition('.')[0]}.strategy"
    if not config.has(strategy):
        config.set(strategy, "ddp", source)
    return f"{value!r} is read as accelerator: gpu, strategy: ddp"


def _test_tube(config: ConfigTree, path: str) -> str | None:
    value = config.get(path)
    if not isinstance(value, str) or "testtube" not in value.replace("_", "").lower():
        return None
    config.set(path, "pytorch_lightning.loggers.TensorBoardLogger", config.source(path))
    params = f"{path.rpartition('.')[0]}.params"
    for key in ("debug", "create_git_tag", "description"):
        if config.has(f"{params}.{key}"):
            config.pop(f"{params}.{key}")
    return "the TestTube logger is gone from Lightning; TensorBoard's writes the same event files"


def _old_dataset(config: ConfigTree, path: str) -> str | None:
    if config.get(path) not in OLD_DATA_TARGETS:
        return None
    training = path.split(".")[2] == "train"
    new = TRAIN_TARGET if training else VALIDATION_TARGET
    config.set(path, new, config.source(path))
    return f"read as {new}, which does its work today"


def _drawn_seed(config: ConfigTree, path: str) -> str | None:
    if config.get(path) != -1:
        return None
    seed = random.SystemRandom().randrange(2**31)
    config.set(path, seed, config.source(path))
    return f"-1 asks for an order of its own: {seed} was drawn, and is written into the run's config"


def _validation_repeats(config: ConfigTree, path: str) -> str | None:
    parts = path.split(".")
    training_set = config.get(".".join([*parts[:-1], "set"]), "train") == "train"
    if parts[2] == "train" or (config.get(f"data.params.{parts[2]}.target") == TRAIN_TARGET and training_set):
        return None
    if config.get(path) == 1:
        return None
    config.pop(path)
    return "dropped, validation shows each picture once"


def _training_repeats(config: ConfigTree, path: str) -> str | None:
    value = config.get(path)
    if not isinstance(value, float):
        return None
    if not value.is_integer():
        raise ValueError(
            f"{value} is not a whole number; write {max(1, round(value))} (fractional repeats come with the "
            f"per-folder multiply.txt of a later version)"
        )
    config.set(path, int(value), config.source(path))
    return f"{value} is read as {int(value)}"


def _personalization(config: ConfigTree, path: str) -> str:
    if config.get("model.params.unfreeze_model") is not True:
        raise ValueError(
            "textual inversion is not part of this trainer, which trains the model itself; "
            "set model.params.unfreeze_model to true and remove personalization_config"
        )
    config.pop(path)
    return "dropped, textual inversion is not part of this trainer; the model itself is trained"


def _batch_key(old: str, new: str) -> Action:
    """Make an action that reads the lineage's name of a batch entry as the one our data sets use."""

    def action(config: ConfigTree, path: str) -> str | None:
        train = config.get("data.params.train.target")
        if config.get(path) != old or train != TRAIN_TARGET:
            return None
        config.set(path, new, config.source(path))
        return f"{old!r} is read as {new!r}, as {TRAIN_TARGET.rpartition('.')[2]} calls it"

    return action


TRAINER_WORDS: Final[Mapping[str, Word]] = {
    "resume_from_checkpoint": Word(
        reason="type -r RUN_FOLDER_OR_CHECKPOINT to continue that run, or --actual_resume CHECKPOINT to start a "
        "new run from its weights",
        refused=True,
    ),
    "distributed_backend": Word(becomes="strategy"),
    "num_processes": Word(becomes="devices"),
    "checkpoint_callback": Word(becomes="enable_checkpointing"),
    "terminate_on_nan": Word(becomes="detect_anomaly"),
    "reload_dataloaders_every_epoch": Word(reason="it has no effect on a folder of pictures"),
    "replace_sampler_ddp": Word(reason="the trainer's own sampler serves every number of devices"),
    "progress_bar_refresh_rate": Word(reason="to have no bar, type --enable_progress_bar false"),
    "process_position": Word(reason="there is one progress bar"),
    "weights_summary": Word(reason="the start summary says what is trained"),
    "log_gpu_memory": Word(reason="Lightning 2 has no such argument"),
    "flush_logs_every_n_steps": Word(reason="Lightning 2 has no such argument; see --log_every_n_steps"),
    "prepare_data_per_node": Word(reason="Lightning 2 has no such argument"),
    "move_metrics_to_cpu": Word(reason="Lightning 2 has no such argument"),
    "multiple_trainloader_mode": Word(reason="there is one training set"),
    "auto_select_gpus": Word(reason="name the GPUs: --gpus 0,1"),
    "track_grad_norm": Word(reason="Lightning 2 has no such argument"),
    "amp_backend": Word(reason="PyTorch's own mixed precision is the only one; choose it with --precision bf16-mixed"),
    "amp_level": Word(reason="PyTorch's own mixed precision has no levels; choose it with --precision bf16-mixed"),
    "weights_save_path": Word(reason="checkpoints go to the run folder, below --logdir", refused=True),
    "auto_scale_batch_size": Word(
        reason="Lightning 2 has no such argument; set data.params.batch_size=N yourself", refused=True
    ),
    "auto_lr_find": Word(
        reason="Lightning 2 has no such argument; set model.base_learning_rate=RATE yourself", refused=True
    ),
    "stochastic_weight_avg": Word(
        reason="Lightning 2 has it as a callback: lightning.callbacks.swa.target="
        "pytorch_lightning.callbacks.StochasticWeightAveraging",
        refused=True,
    ),
    "truncated_bptt_steps": Word(reason="pictures are no sequences; leave it out", refused=True),
    "tpu_cores": Word(reason="type --accelerator tpu --devices N", refused=True),
    "ipus": Word(reason="Lightning 2 has no IPU support; leave it out", refused=True),
}
"""Arguments of Lightning 1's Trainer that Lightning 2 does not take."""

FLAG_WORDS: Final[Mapping[str, Word]] = {
    "resume_from_checkpoint": Word(becomes="resume"),
    "placeholder_string": Word(reason="captions need no placeholder"),
    "placeholder_tokens": Word(reason="captions need no placeholder"),
    "init_word": Word(reason="captions need no placeholder"),
    "embedding_manager_ckpt": Word(
        reason="textual inversion is not part of this trainer, which trains the model itself; leave it out",
        refused=True,
    ),
    "class_word": Word(
        reason="there are no class words; write what each picture shows into its file name, and leave it out",
        refused=True,
    ),
    "token": Word(
        reason="there are no tokens; write what each picture shows into its file name, and leave it out", refused=True
    ),
    "reg_data_root": Word(
        reason="there are no regularisation images; put ground-truth pictures into a subfolder of --data_root",
        refused=True,
    ),
}
"""Other flags of 2022, of this trainer and its siblings, that users' commands hold."""

TRAINER_RULES: Final[tuple[Rule, ...]] = (
    Rule("lightning.trainer.gpus", _gpus),
    Rule("lightning.trainer.accelerator", _distributed_accelerator),
    *(Rule(f"lightning.trainer.{name}", _trainer_word(name, word)) for name, word in TRAINER_WORDS.items()),
)
"""Applied to each file by itself, so that a later file's ``accelerator`` wins over an earlier one's ``gpus``."""

RULES: Final[tuple[Rule, ...]] = (
    # data
    *(Rule(f"data.params.{name}.target", _old_dataset) for name in DATASETS),
    Rule("data.params.wrap", _replace({"falsegit": False}, "a typing error of 2022 that switched wrapping on")),
    Rule(
        "data.params.reg",
        _refuse("there are no regularisation images; put ground-truth pictures into a subfolder of the data root"),
    ),
    Rule("data.params.*.params.resolution", _rename("size", "today's name of resolution"), "ldm.data."),
    Rule("data.params.*.params.seed", _drawn_seed, "ldm.data."),
    Rule("data.params.*.params.repeats", _validation_repeats, "ldm.data."),
    Rule("data.params.train.params.repeats", _training_repeats, "ldm.data."),
    Rule("data.params.*.params.debug_level", _drop("the data report is always full"), "ldm.data."),
    Rule("data.params.*.params.reg", _drop("there are no regularisation images"), "ldm.data."),
    *(
        Rule(f"data.params.*.params.{key}", _drop("captions need no placeholder"), "ldm.data.")
        for key in (
            "per_image_tokens",
            "placeholder_token",
            "placeholder_string",
            "token_only",
            "coarse_class_text",
            "mixing_prob",
        )
    ),
    # model
    Rule("model.params.personalization_config", _personalization, "ldm."),
    Rule("model.params.reg_weight", _drop("there is no regularisation term"), "ldm."),
    Rule("model.params.embedding_reg_weight", _drop("there is no regularisation term"), "ldm."),
    Rule("model.params.first_stage_key", _batch_key("jpg", "image"), "ldm."),
    Rule("model.params.cond_stage_key", _batch_key("txt", "caption"), "ldm."),
    # lightning
    Rule("lightning.logger.target", _test_tube),
    Rule("lightning.modelcheckpoint.params.period", _rename("every_n_epochs", "today's name of period")),
)
