"""From options to the one merged config of a run.

YAML files from left to right, then ``key.path=value``, then flags; translated into today's words,
completed, and checked as a whole before anything is built or written.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from ldm.training.cli import Options
from ldm.training.config_check import (
    DEFAULT_TARGETS,
    RunSection,
    accepted_by,
    check_config,
    tidy_sections,
)
from ldm.training.config_tree import ConfigTree, leaves, nearest, nodes, read_yaml
from ldm.training.legacy_2022 import DATASETS, RULES, TRAINER_RULES, translate, translate_gpus
from ldm.training.machine_check import check_machine
from ldm.training.targets import comes_with
from ldm.training.yaml_limits import check_references

DEFAULT_SOURCE: Final = "default"
_COMMENT_COLUMN: Final = 72


@dataclass(frozen=True)
class RunConfig:
    """A run's config.

    Attributes:
        config: the merged, translated, checked config; saved, it is a valid ``--base``.
        sources: for each leaf's key path where it was set: ``file:line``, ``flag --name``, ``override``
            or ``default``.
        notices: one line for each thing of 2022 that was translated or dropped, and the like.
    """

    config: DictConfig
    sources: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def load_run_config(options: Options) -> RunConfig:
    """Merge, translate, complete and check the config of a run.

    Args:
        options: the command line.

    Returns:
        The config with its origins.

    Raises:
        ValueError: one line for each problem, all at once.
    """
    files = [*resume_files(options.resume), *options.base] if options.resume else list(options.base)
    layers, problems = _read_layers(files, options)
    if problems:
        raise ValueError("\n".join(problems))
    notices = list(options.notices)
    config = ConfigTree()
    for layer in layers:
        said, wrong = translate(layer, TRAINER_RULES)
        notices += said
        problems += wrong
        if layer.has("lightning.trainer.accelerator") and config.has("lightning.trainer.devices"):
            config.pop("lightning.trainer.devices")
        config.merge(layer)
    resolve_references(config)
    problems += tidy_sections(config)
    said, wrong = translate(config, RULES)
    notices += said
    problems += wrong
    if options.resume:
        problems += _code_of_run(config, Path(options.resume))
        if problems:
            raise ValueError("\n".join(problems))
    _complete(config, options, layers[0].get("run.seed") if options.resume else None, notices)
    problems += check_config(config, options.train)
    if options.train:
        missing = check_machine(config, resuming=options.resume is not None)
        # To look at a config, or plan with it, is no reason to have its GPU and its pictures at hand.
        (notices if options.print_config or options.memory_plan is not None else problems).extend(missing)
    if problems:
        raise ValueError("\n".join(problems))
    sources = {path: config.source(path) for path, _ in leaves(config.tree)}
    return RunConfig(OmegaConf.create(config.tree), sources, list(dict.fromkeys(notices)))


def said_of_run(options: Options, name: str) -> Any:
    """Read what is said about a run before it is known which run it is.

    Args:
        options: the command line.
        name: a setting of the ``run`` section, such as ``logdir``.

    Returns:
        The flag's value, else the override's or the last configuration file's, else the default.

    Raises:
        ValueError: one line for each file or override that cannot be read.
    """
    if _is_given(options, name):
        return getattr(options, name)
    layers, problems = _read_layers(list(options.base), options)
    if problems:
        raise ValueError("\n".join(problems))
    said = [layer.get(f"run.{name}") for layer in layers if layer.has(f"run.{name}")]
    return said[-1] if said else getattr(options, name)


def resume_files(resume: str) -> list[str]:
    """Find the saved config of a run that is to be continued.

    Args:
        resume: the run's folder, or a checkpoint in it.

    Returns:
        The newest saved config; for runs of 2022, which kept two files, both.

    Raises:
        ValueError: there is no such run, or it has no checkpoint or no saved config.
    """
    path = Path(resume)
    if not path.exists():
        raise ValueError(f"flag --resume: {resume} does not exist{_run_hint(path)}")
    folder = path.parent if path.is_file() else path
    run = folder.parent if folder.name == "checkpoints" else folder
    saved = sorted((run / "configs").glob("*-project.yaml"), key=lambda file: file.name)
    if path.is_dir() and not any((run / "checkpoints").glob("**/*.ckpt")):
        raise ValueError(
            f"flag --resume: {resume} holds no checkpoint (looked for {(run / 'checkpoints').as_posix()}/*.ckpt); "
            f"name another run folder, below logs/"
        )
    if not saved:
        raise ValueError(
            f"flag --resume: {resume} is not part of a run folder (there is no "
            f"{(run / 'configs').as_posix()}/*-project.yaml); to start a new run from its weights, type "
            f"--base YAML --actual_resume CHECKPOINT"
        )
    newest = saved[-1]
    trainer = newest.with_name(newest.name.replace("-project.yaml", "-lightning.yaml"))
    return [newest.as_posix(), *([trainer.as_posix()] if trainer.is_file() else [])]


def _code_of_run(config: ConfigTree, resume: Path) -> list[str]:
    """Find the targets whose code came with the run that is to be continued; a line for each."""
    folder = resume.parent if resume.is_file() else resume
    run = folder.parent if folder.name == "checkpoints" else folder
    return [
        f"{config.source(path)}: {path}: target {value} lies with the run that is continued, and code that comes with "
        f"a run is not run; if it is yours, move it out of {run.as_posix()} and the folders above that"
        for path, value in nodes(config.tree)
        if path.rpartition(".")[2] == "target" and isinstance(value, str) and comes_with(value, run)
    ]


def format_config(run_config: RunConfig) -> str:
    """Write a config as YAML with the origin of each value as a comment.

    Args:
        run_config: the config.

    Returns:
        Text that is valid YAML, one value a line.
    """
    tree: Any = OmegaConf.to_container(run_config.config)
    lines: list[tuple[str, str]] = []
    _format_mapping(tree, "", 0, run_config.sources, lines)
    width = min(_COMMENT_COLUMN, max((len(text) for text, source in lines if source), default=0))
    return "\n".join(f"{text:<{width}}  # {source}" if source else text for text, source in lines)


def _format_mapping(
    mapping: dict[Any, Any], prefix: str, depth: int, sources: dict[str, str], lines: list[tuple[str, str]]
) -> None:
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        name = f"{'  ' * depth}{_yaml_scalar(key)}:"
        if isinstance(value, dict) and value:
            lines.append((name, ""))
            _format_mapping(value, f"{path}.", depth + 1, sources, lines)
        else:
            lines.append((f"{name} {_yaml_scalar(value)}", sources.get(path, DEFAULT_SOURCE)))


def _yaml_scalar(value: Any) -> str:
    """Write a scalar or list on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def _read_layers(files: list[str], options: Options) -> tuple[list[ConfigTree], list[str]]:
    """Read files, overrides and flags, each as a config of its own."""
    layers: list[ConfigTree] = []
    problems: list[str] = []
    for file in files:
        try:
            layers.append(read_yaml(file))
        except ValueError as error:
            problems.append(str(error))
    for word in options.overrides:
        try:
            layers.append(_override(word))
        except ValueError as error:
            problems.append(str(error))
    flags = ConfigTree()
    for name, value in options.trainer_args.items():
        flags.set(f"lightning.trainer.{name}", value, f"flag --{name}")
    try:
        _gpus_flag(options, flags)
    except ValueError as error:
        problems.append(str(error))
    return [*layers, flags], problems


def _override(word: str) -> ConfigTree:
    """Read one ``key.path=value``, the value as YAML reads it."""
    path, _, text = word.partition("=")
    try:
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "problem", None) or str(error).strip().splitlines()[0]
        raise ValueError(f"override {word}: the value is not valid YAML: {reason}") from None
    layer = ConfigTree()
    layer.set(path, read["value"], "override")
    return layer


def _gpus_flag(options: Options, flags: ConfigTree) -> None:
    """Turn ``--gpus`` into Lightning's accelerator and devices."""
    try:
        asked = translate_gpus(options.gpus)
    except ValueError as error:
        raise ValueError(f"flag --gpus: {error}") from None
    if options.gpus is not None and asked is None and not flags.has("lightning.trainer.accelerator"):
        flags.set("lightning.trainer.accelerator", "cpu", "flag --gpus")
    if asked is None:
        return
    for name, value in zip(("accelerator", "devices"), asked, strict=True):
        path = f"lightning.trainer.{name}"
        if flags.has(path):
            raise ValueError(f"flag --gpus: --gpus and --{name} say the same thing twice; give one of them")
        flags.set(path, value, "flag --gpus")


def resolve_references(config: ConfigTree) -> None:
    """Replace ``${key.path}`` by what it refers to.

    Args:
        config: the merged config, changed in place.

    Raises:
        ValueError: it refers to nothing, to something that is no key, or to so much that no config is as long.
    """
    wrong = check_references(config.tree)
    if wrong:
        raise ValueError("\n".join(f"{config.source(key)}: {key}: {what}" for key, what in wrong))
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(config.tree), resolve=True)
        config.tree = resolved
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, InterpolationKeyError):
            value = config.get(key, "${...}")
            reason = f"{value} names no key of the config; write a whole path such as ${{data.params.batch_size}}"
        raise ValueError(f"{config.source(key)}: {key}: {reason}") from None


def _complete(config: ConfigTree, options: Options, drawn_seed: Any, notices: list[str]) -> None:
    """Write into the config what flags and defaults say: the run section, data roots, seeds, devices.

    ``drawn_seed`` is that of the run which is continued, maybe by the very command that had it drawn.
    """
    saved_seed = config.get("run.seed")
    saved_root = config.get("run.data_root")
    for setting in fields(RunSection):
        path = f"run.{setting.name}"
        if _is_given(options, setting.name):
            config.set(path, getattr(options, setting.name), f"flag --{_flag_name(setting.name)}")
        elif not config.has(path):
            config.set(path, setting.default, DEFAULT_SOURCE)
    if config.get("run.seed") == -1 and drawn_seed not in (None, -1):
        config.set("run.seed", drawn_seed, DEFAULT_SOURCE)
    elif config.get("run.seed") == -1:
        seed = random.SystemRandom().randrange(2**31)
        notices.append(f"{config.source('run.seed')}: run.seed: -1 draws a seed: {seed}")
        config.set("run.seed", seed, config.source("run.seed"))
    _give_data_root(config, saved_root, _is_given(options, "data_root"), notices)
    _give_seed(config, saved_seed, _is_given(options, "seed"))
    _give_on_bad_image(config, options.on_bad_image)
    _choose_device(config, notices)
    if config.has("lightning.logger") and not config.has("lightning.logger.target"):
        config.set("lightning.logger.target", DEFAULT_TARGETS["lightning.logger"], DEFAULT_SOURCE)


def _is_given(options: Options, name: str) -> bool:
    """Tell whether the command line named a setting; options that a program made need not list theirs."""
    return name in options.given or getattr(options, name) != getattr(Options, name)


def _flag_name(name: str) -> str:
    return "no-test" if name == "no_test" else name


def _takes(config: ConfigTree, path: str, parameter: str) -> bool:
    """Tell whether the target of a section takes a parameter; False where it cannot be imported."""
    target = config.get(f"{path}.target")
    if not isinstance(target, str) or not isinstance(config.get(f"{path}.params", {}), dict):
        return False
    try:
        return parameter in accepted_by(target).parameters
    except ValueError:
        return False


def _give_data_root(config: ConfigTree, saved: Any, flagged: bool, notices: list[str]) -> None:
    """Hand ``--data_root`` to the data sets.

    The flag wins over the YAML, but for a validation set with a folder of its own: those are pictures
    that somebody held back.
    """
    root = config.get("run.data_root")
    training_root = config.get("data.params.train.params.data_root")
    for name in DATASETS:
        section = f"data.params.{name}"
        path = f"{section}.params.data_root"
        if root is None or not _takes(config, section, "data_root"):
            continue
        present = config.get(path)
        if present is None or (flagged and (name == "train" or present in (saved, training_root))):
            config.set(path, root, config.source("run.data_root"))
        elif flagged and present != root:
            notices.append(
                f"{config.source(path)}: {path}: stays {present}, a folder of its own; {path}={root} would replace it"
            )


def _give_seed(config: ConfigTree, saved: Any, flagged: bool) -> None:
    """Hand the run's seed to the data and its data sets, where they have none or an earlier run's."""
    for section in ("data", *(f"data.params.{name}" for name in DATASETS)):
        if not _takes(config, section, "seed"):
            continue
        path = f"{section}.params.seed"
        present = config.get(path)
        if present is None or (flagged and present == saved):
            config.set(path, config.get("run.seed"), config.source("run.seed"))


def _give_on_bad_image(config: ConfigTree, said: str | None) -> None:
    """Hand ``--on_bad_image`` to the data sets that take it."""
    for name in DATASETS if said is not None else ():
        if _takes(config, f"data.params.{name}", "on_bad_image"):
            config.set(f"data.params.{name}.params.on_bad_image", said, "flag --on_bad_image")


def _choose_device(config: ConfigTree, notices: list[str]) -> None:
    """Train on the CPU unless a GPU is asked for."""
    accelerator = config.get("lightning.trainer.accelerator")
    devices = config.get("lightning.trainer.devices")
    if accelerator is None and devices is None:
        config.set("lightning.trainer.accelerator", "cpu", DEFAULT_SOURCE)
        config.set("lightning.trainer.devices", 1, DEFAULT_SOURCE)
        if torch.cuda.is_available():
            notices.append(
                "lightning.trainer: no GPU was asked for, so this trains on the CPU; type --gpus 0, for the first GPU"
            )
    elif accelerator == "cpu" and devices is None:
        config.set("lightning.trainer.devices", 1, DEFAULT_SOURCE)


def _run_hint(path: Path) -> str:
    """Propose the run folder that a missing one may have meant."""
    parent = path.parent if path.parent.is_dir() else Path("logs")
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    match = nearest(path.name, names)
    if match is not None:
        return f"; did you mean {(parent / match).as_posix()}?"
    return "; name the folder of a run, below logs/ unless -l said otherwise, or a checkpoint in it"
