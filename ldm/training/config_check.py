"""Checks a merged config against the code it names, before anything is built.

The signatures of the targets are the schema; beside them stand the few ranges that no annotation can
say. Every problem becomes one line with file, key and what to do, and all are found in one go.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import StrategyRegistry
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ldm.optimizers import optimizer_problem
from ldm.training.annotations import describe, describe_value, fits
from ldm.training.callbacks import time_span
from ldm.training.config_ranges import RANGES, above_zero
from ldm.training.config_tree import ConfigTree, leaves, nearest
from ldm.training.legacy_2022 import DATASETS, TRAINER_WORDS
from ldm.training.targets import Accepted, Parameter, accepted_parameters, resolve_target
from ldm.training.trainer import DEFAULT_CALLBACKS
from ldm.util import Schedule, kind_problem

DEFAULT_TARGETS: Final[Mapping[str, str]] = {
    **{f"lightning.callbacks.{name}": callback["target"] for name, callback in DEFAULT_CALLBACKS.items()},
    "lightning.modelcheckpoint": "ldm.training.callbacks.RunCheckpoint",
    "lightning.logger": "pytorch_lightning.loggers.TensorBoardLogger",
}
"""What these sections mean where they name no target."""

TOP_KEYS: Final = ("model", "data", "lightning", "run")
LIGHTNING_KEYS: Final = ("trainer", "callbacks", "logger", "modelcheckpoint", "find_unused_parameters")
_MAPPINGS: Final = (
    *TOP_KEYS,
    "model.params",
    "data.params",
    "data.params.*.params",
    *(f"lightning.{key}" for key in LIGHTNING_KEYS[:-1]),
    "lightning.callbacks.*",
    "lightning.callbacks.*.params",
    "lightning.logger.params",
    "lightning.modelcheckpoint.params",
)
"""Sections that are mappings; an empty one counts as absent."""

HOMES: Final[Mapping[str, str]] = {"long_captions": "model.params.cond_stage_config.params"}
"""Where keys belong that are easily looked for elsewhere; asked only where the target does not take the key."""

_OBJECT_KEYS: Final[Mapping[str, str]] = {
    "callbacks": "callbacks belong under lightning.callbacks, each as NAME: {target, params}",
    "logger": "a logger belongs under lightning.logger as {target, params}; here only true or false stand",
    "plugins": "plugins are objects, which YAML cannot hold; use strategy and precision",
}
_OTHER_WORDS: Final[Mapping[str, str]] = {
    "fp16": "16-mixed",
    "float16": "16-mixed",
    "bfloat16": "bf16-mixed",
    "fp32": "32-true",
    "float32": "32-true",
    "full": "32-true",
}
"""What other trainers call Lightning's precisions."""

_ROUNDING_PRECISIONS: Final = ("bf16-true", "16-true", "64-true", "64", "transformer-engine")
"""Precisions that store the weights themselves in other numbers than the 32-bit ones that training needs."""

_MODULE_KEYS: Final = ("unet_config", "first_stage_config", "cond_stage_config", "lossconfig")
_DATA_SET_PATH: Final = re.compile(r"data\.params\.\w+(\.params\.sets\.[^.]+)*")
_CODER: Final = "ldm.modules.diffusionmodules.model"


@dataclass
class RunSection:
    """The ``run`` section of a merged config: what the command line said beside the YAML.

    Attributes:
        seed: seed of every random draw, in [0, 2**32).
        name: the run's name.
        postfix: added to the run folder's name.
        project: name of the project.
        logdir: folder that holds the run folders.
        datadir_in_name: whether the run folder's name begins with the data folder's.
        data_root: folder of subfolders of pictures.
        actual_resume: checkpoint whose weights the run started from.
        warm_optimizer: whether it started with that checkpoint's optimiser state too.
        on_nan: ``stop`` or ``skip``: what is done about a loss or gradient that is no finite number.
        on_oom: ``stop`` or ``split``: what is done about a batch that does not fit into memory.
        scale_lr: whether the learning rate is multiplied by the pictures in an optimiser step.
        debug: whether an error opens a debugger.
        no_test: whether to leave out the test after training.
    """

    seed: int = 23
    name: str | None = None
    postfix: str = ""
    project: str | None = None
    logdir: str = "logs"
    datadir_in_name: bool = True
    data_root: str | None = None
    actual_resume: str | None = None
    warm_optimizer: bool = False
    on_nan: Literal["stop", "skip"] = "stop"
    on_oom: Literal["stop", "split"] = "stop"
    scale_lr: bool = False
    debug: bool = False
    no_test: bool = False


@lru_cache(maxsize=256)
def accepted_by(target: str) -> Accepted:
    """Read which ``params:`` keys a target takes.

    Args:
        target: dotted path of a class or function.

    Returns:
        What it takes.

    Raises:
        ValueError: it cannot be imported.
    """
    return accepted_parameters(resolve_target(target))


def tidy_sections(config: ConfigTree) -> list[str]:
    """Take empty sections out, and name those that are no mappings.

    Args:
        config: the merged config, changed in place; wrong sections are taken out as well.

    Returns:
        One line for each wrong section.
    """
    problems = []
    for pattern in _MAPPINGS:
        for path in config.matching(pattern):
            value = config.get(path)
            if isinstance(value, dict) or (path.startswith("data.params.") and not path.endswith(".params")):
                continue
            source = config.source(path)
            config.pop(path)
            if value is not None or pattern == "lightning.callbacks.*":
                problems.append(f"{source}: {path}: expected keys below it, got {describe_value(value)}")
    return problems


def check_config(config: ConfigTree, train: bool) -> list[str]:
    """Check a merged, translated config.

    Args:
        config: the config; not changed.
        train: whether it must hold all that training needs.

    Returns:
        One line for each problem; empty where there is none.
    """
    return _Check(config, train).all()


class _Check:
    """One pass over a config, gathering problems."""

    def __init__(self, config: ConfigTree, train: bool) -> None:
        self.config = config
        self.train = train
        self.problems: list[str] = []

    def all(self) -> list[str]:
        """Run every check."""
        config = self.config
        for path, value in leaves(config.tree):
            if value == "???":
                self.add(path, f"must be given; set it in a YAML file or with {path}=VALUE")
        self.known_keys("", TOP_KEYS)
        self.model()
        self.data()
        self.lightning()
        self.bind(config.get("run", {}), "run", accepted_parameters(RunSection), "the run section")
        self.ranges()
        return list(dict.fromkeys(self.problems))

    def add(self, path: str, text: str) -> None:
        """Note a problem with a key."""
        self.problems.append(f"{self.config.source(path)}: {path}: {text}")

    def known_keys(self, path: str, known: Collection[str]) -> None:
        """Name the keys of a section that do not exist."""
        section = self.config.get(path, {}) if path else self.config.tree
        for key in section:
            if key not in known:
                self.unknown_key(f"{path}.{key}" if path else str(key), path or "the top of a config", known)

    def unknown_key(self, path: str, owner: str, known: Collection[str]) -> None:
        """Note a key that does not exist, with the nearest that does."""
        key = path.rpartition(".")[2]
        match = nearest(key, list(known))
        if match is not None:
            hint = f"did you mean {match}?"
        elif known and len(known) <= 12:
            hint = f"it has: {', '.join(known)}"
        else:
            hint = "check the name, or remove it"
        self.add(path, f"{owner} has no key {key}; {hint}")

    def model(self) -> None:
        """Check the model section."""
        if not self.config.has("model"):
            if self.train:
                self.problems.append("config: model: is missing; the YAML must say which model to train")
            return
        self.known_keys("model", ("target", "params", "base_learning_rate"))
        rate = self.config.get("model.base_learning_rate")
        if rate is None and self.train:
            self.add("model.base_learning_rate", "is missing; add base_learning_rate: 1.0e-06 (or another) below model")
        elif rate is not None and not fits(rate, float):
            self.wrong_type("model.base_learning_rate", rate, float)
        model = self.section("model", self.config.get("model"), LightningModule)
        if model is not None and self.train:
            self.something_to_train(accepted_parameters(model))

    def something_to_train(self, accepted: Accepted) -> None:
        """Check that a part of the model trains, and at a rate above 0."""
        trained = {}
        for part in ("unfreeze_model", "cond_stage_trainable"):
            parameter = accepted.parameters.get(part)
            if parameter is None:
                return
            trained[part] = self.config.get(f"model.params.{part}", parameter.default)
        if trained == {"unfreeze_model": False, "cond_stage_trainable": False}:
            self.add(
                "model.params.unfreeze_model",
                "nothing to train: unfreeze_model and cond_stage_trainable are both false; set one to true",
            )
        rate = self.config.get("model.params.model_lr")
        if trained["unfreeze_model"] is True and fits(rate, float) and not above_zero(rate):
            self.add(
                "model.params.model_lr",
                f"{rate} is out of range; it must be above 0, such as 1.0e-06 (without it, base_learning_rate is used)",
            )

    def data(self) -> None:
        """Check the data section."""
        if not self.config.has("data"):
            if self.train:
                self.problems.append("config: data: is missing; the YAML must say what to train on")
            return
        self.known_keys("data", ("target", "params"))
        self.section("data", self.config.get("data"), LightningDataModule)
        if self.train and not self.config.has("data.params.train"):
            self.add("data.params.train", "is missing; the YAML must name the training set (target and params)")
        without_root = []
        for name in DATASETS:
            path = f"data.params.{name}"
            target = self.config.get(f"{path}.target")
            if not isinstance(target, str):
                continue
            parameter = self.accepted(target).parameters.get("data_root")
            if parameter is not None and parameter.required and not self.config.get(f"{path}.params.data_root"):
                without_root.append(name)
        if without_root and self.train:
            self.problems.append(
                f"data_root is missing: add --data_root FOLDER, the folder that holds your subfolders of pictures "
                f"(for data.params: {', '.join(without_root)})"
            )

    def accepted(self, target: str) -> Accepted:
        """Read what a target takes; nothing where it cannot be imported, which is reported elsewhere."""
        try:
            return accepted_by(target)
        except ValueError:
            return Accepted(open=True)

    def lightning(self) -> None:
        """Check the lightning section."""
        if not self.config.has("lightning"):
            return
        self.known_keys("lightning", LIGHTNING_KEYS)
        flag = self.config.get("lightning.find_unused_parameters")
        if flag is not None and not isinstance(flag, bool):
            self.wrong_type("lightning.find_unused_parameters", flag, bool)
        self.trainer()
        for name, callback in self.config.get("lightning.callbacks", {}).items():
            self.section(f"lightning.callbacks.{name}", callback, Callback)
        for path, kind in (("lightning.modelcheckpoint", Checkpoint), ("lightning.logger", Logger)):
            if self.config.has(path):
                self.section(path, self.config.get(path), kind)
        cadence = [
            f"lightning.modelcheckpoint.params.{key}"
            for key in ("every_n_train_steps", "every_n_epochs", "train_time_interval")
            if self.config.get(f"lightning.modelcheckpoint.params.{key}")
        ]
        if len(cadence) > 1:
            names = " and ".join(path.rpartition(".")[2] for path in cadence)
            drops = " or ".join(f"{path}=null ({self.config.source(path)})" for path in cadence[1:])
            self.add(cadence[0], f"{names} exclude each other; drop one of them: {drops}")

        interval = self.config.get("lightning.modelcheckpoint.params.train_time_interval")
        if isinstance(interval, str):
            try:
                time_span(interval)
            except ValueError as error:
                self.add("lightning.modelcheckpoint.params.train_time_interval", str(error))

    def trainer(self) -> None:
        """Check the arguments of Lightning's Trainer."""
        section = self.config.get("lightning.trainer", {})
        path = "lightning.trainer"
        known = accepted_parameters(Trainer)
        checked = {}
        for key, value in section.items():
            if key in _OBJECT_KEYS and key in known.parameters and not fits(value, bool | None):
                self.add(f"{path}.{key}", _OBJECT_KEYS[key])
            elif key not in TRAINER_WORDS:
                checked[key] = value
        self.bind(checked, path, known, "Lightning's Trainer")
        for key, registered in (
            ("accelerator", {*AcceleratorRegistry.available_accelerators(), "auto", "gpu"}),
            ("strategy", {*StrategyRegistry.available_strategies(), "auto"}),
            ("gradient_clip_algorithm", {"norm", "value"}),
            ("profiler", {"simple", "advanced", "pytorch", "xla"}),
        ):
            value = section.get(key)
            if isinstance(value, str) and value not in registered:
                match = nearest(value, sorted(registered))
                listed = f"one of {', '.join(sorted(registered))}" if len(registered) <= 12 else "see Lightning's list"
                self.add(f"{path}.{key}", f"{value!r} is unknown; {f'did you mean {match}?' if match else listed}")
        precision = str(section.get("precision"))
        if precision.startswith(_ROUNDING_PRECISIONS):
            self.add(
                f"{path}.precision",
                f"{precision} does not train these models: their weights stay in 32 bit; choose 32-true, or bf16-mixed "
                "or 16-mixed, which compute in 16 bit",
            )
        if not _devices_fit(section.get("devices")):
            self.add(
                f"{path}.devices",
                f"{section['devices']!r} is neither a number of devices, a list of their numbers, -1 for all, nor auto",
            )
        longest = section.get("max_time")
        if isinstance(longest, str) and not re.fullmatch(r"\d+:\d{1,2}:\d{1,2}:\d{1,2}", longest):
            self.add(f"{path}.max_time", f"{longest!r} is no time span; write days:hours:minutes:seconds: 00:08:00:00")

    def section(self, path: str, node: Any, kind: type | None) -> Any:
        """Check one ``{target, params}`` mapping.

        Args:
            path: its key path.
            node: the mapping.
            kind: the class that the target must be derived from; None for any.

        Returns:
            The resolved target, or None where it is wrong.
        """
        if not isinstance(node, dict):
            self.add(path, f"expected a mapping with target and params, got {describe_value(node)}")
            return None
        for key in node:
            if key not in ("target", "params") and path != "model" and path != "data":
                self.unknown_key(f"{path}.{key}", f"a {{target, params}} mapping such as {path}", ("target", "params"))
        target = node.get("target", DEFAULT_TARGETS.get(path))
        if target is None:
            self.add(path, "has no target; add target: package.module.Name")
            return None
        if not isinstance(target, str):
            self.add(f"{path}.target", f"expected a dotted path as text, got {describe_value(target)}")
            return None
        try:
            found = resolve_target(target)
        except ValueError as error:
            self.add(f"{path}.target", str(error))
            self.inner_sections(path, node)
            return None
        problem = None if kind is None else kind_problem(found, kind)
        problem = optimizer_problem(found) if kind is Optimizer else problem
        if problem is not None:
            self.add(f"{path}.target", f"target {target} {problem}")
            self.inner_sections(path, node)
            return None
        params = node.get("params")
        if params is not None and not isinstance(params, dict):
            self.add(f"{path}.params", f"expected keys below it, got {describe_value(params)}")
            return found
        accepted = accepted_parameters(found)
        if kind is Optimizer:  # the first parameter is what it trains
            others = list(accepted.parameters.items())[1:]
            accepted = Accepted(dict(others), open=accepted.open)
        self.bind(
            params or {},
            f"{path}.params",
            accepted,
            target.rpartition(".")[2],
            all_given=not path.startswith("lightning."),
        )
        return found

    def inner_sections(self, path: str, node: dict[str, Any]) -> None:
        """Check the sections inside one whose own target is wrong, whose other parameters nobody can judge."""
        params = node.get("params")
        for key, value in params.items() if isinstance(params, dict) else ():
            self.nested(f"{path}.params.{key}", str(key), value)

    def bind(
        self, params: Mapping[str, Any], path: str, accepted: Accepted, owner: str, *, all_given: bool = True
    ) -> None:
        """Check that parameters have known names and fitting values, and that none is missing.

        Args:
            params: the values.
            path: their section's key path.
            accepted: what the target takes.
            owner: the target's name, for messages.
            all_given: whether required parameters must be there (not where the run adds some).
        """
        for key, value in params.items():
            here = f"{path}.{key}"
            parameter = accepted.parameters.get(key)
            if parameter is not None:
                self.value(here, key, value, parameter)
            elif not accepted.open:
                if key in HOMES:
                    self.add(here, f"does not belong here; write {HOMES[key]}.{key}={value}")
                else:
                    self.unknown_key(here, owner, list(accepted.parameters))
                continue
            self.nested(here, key, value)
        for key, parameter in accepted.parameters.items():
            if all_given and parameter.required and key not in params and key != "data_root":
                self.add(f"{path}.{key}", f"is missing; {owner} needs it ({describe(parameter.annotation)})")

    def value(self, path: str, key: str, value: Any, parameter: Parameter) -> None:
        """Check one value against its parameter."""
        if value != "???" and not fits(value, parameter.annotation):
            self.wrong_type(path, value, parameter.annotation)

    def wrong_type(self, path: str, value: Any, annotation: Any) -> None:
        """Note a value of the wrong type."""
        text = f"expected {describe(annotation)}, got {describe_value(value)}"
        meant = _meant(value, annotation)
        self.add(path, f"{text}; {meant}" if meant else text)

    def nested(self, path: str, key: str, value: Any) -> None:
        """Check the ``{target, params}`` mappings inside a value, at any depth."""
        if isinstance(value, list):
            for index, inner in enumerate(value):
                if isinstance(inner, dict):
                    self.nested(f"{path}.{index}", key, inner)
            return
        if not isinstance(value, dict):
            return
        if "target" in value:
            self.section(path, value, _kind_of(path, key))
        elif "params" in value:
            close = nearest("target", [known for known in value if known != "params"])
            self.add(path, f"has params but no target; {f'is {close} meant to be target?' if close else 'add target'}")
        elif key == "ddconfig":
            self.coder(path, value)
        elif key == "log_images_kwargs":
            self.log_images(path, value)
        else:
            for inner_key, inner in value.items():
                self.nested(f"{path}.{inner_key}", str(inner_key), inner)

    def coder(self, path: str, params: dict[str, Any]) -> None:
        """Check the numbers that an autoencoder hands on to its encoder and decoder."""
        encoder, decoder = (self.accepted(f"{_CODER}.{name}") for name in ("Encoder", "Decoder"))
        both = Accepted({**decoder.parameters, **encoder.parameters}, open=not encoder.parameters)
        # The classes swallow keywords that the other one takes, so what neither names is a mistake.
        self.bind(params, path, both, "the first stage (Encoder, Decoder)")

    def log_images(self, path: str, params: dict[str, Any]) -> None:
        """Check what the image logger hands on to the model."""
        target = self.config.get("model.target")
        try:
            function = getattr(resolve_target(target), "log_images", None) if isinstance(target, str) else None
        except ValueError:
            return
        if function is None:
            return
        accepted = accepted_parameters(function)
        known = {name: found for name, found in accepted.parameters.items() if name not in ("self", "model", "batch")}
        self.bind(params, path, Accepted(known, open=accepted.open), "log_images", all_given=False)

    def ranges(self) -> None:
        """Check numbers against their ranges; values of other types are reported elsewhere."""
        for allowed in RANGES:
            for path in self.config.matching(allowed.key):
                value = self.config.get(path)
                if fits(value, float) and not allowed.allows(value):
                    self.add(path, f"{value} is out of range; it must be {allowed.words}")


def _devices_fit(devices: Any) -> bool:
    if isinstance(devices, str):
        return devices in ("auto", "-1") or re.fullmatch(r"\d+(,\d+)*,?", devices) is not None
    if isinstance(devices, list):
        return bool(devices) and all(isinstance(number, int) and number >= 0 for number in devices)
    return not isinstance(devices, int) or devices == -1 or devices >= 1


def _kind_of(path: str, key: str) -> type | None:
    """Tell what a nested section's target must be; None where only whoever reads the section knows."""
    if _DATA_SET_PATH.fullmatch(path):
        return Dataset
    kinds: Mapping[str, type] = {"scheduler_config": Schedule, "optimizer_config": Optimizer}
    return kinds.get(key, torch.nn.Module if key in _MODULE_KEYS else None)


def _meant(value: Any, annotation: Any) -> str | None:
    """Guess what a value of the wrong type was meant to be."""
    wanted = describe(annotation)
    if isinstance(value, str):
        if value in _OTHER_WORDS and _OTHER_WORDS[value] in wanted:
            return f"did you mean {_OTHER_WORDS[value]}?"
        if "true or false" in wanted:
            match = nearest(value.lower(), ["true", "false"], cutoff=0.4)
            return f"did you mean {match}?" if match else None
        if "one of" in wanted:
            match = nearest(value, re.split(r", | or ", wanted.removeprefix("one of ")))
            return f"did you mean {match}?" if match else None
        if "number" in wanted and re.fullmatch(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", value):
            return "remove the quotes"
    if isinstance(value, float) and value.is_integer() and "a whole number" in wanted:
        return f"write {int(value)}"
    return None
