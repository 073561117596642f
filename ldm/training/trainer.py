"""Builds Lightning's trainer, its callbacks and its loggers from the merged configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy

from ldm.training.accumulation import EqualWeights
from ldm.training.background_saving import BackgroundCheckpointIO
from ldm.training.bad_pictures import BadPictures
from ldm.training.batch_splitting import BatchSplitting
from ldm.training.callbacks import (
    Beginning,
    LastCheckpoint,
    RunCheckpoint,
    epoch_checkpoints,
    model_checkpoint_params,
)
from ldm.training.checkpoint_io import StreamingCheckpointIO
from ldm.training.company import Company
from ldm.training.curves import Curves
from ldm.training.latent_caching import LatentCaching
from ldm.training.loss_guard import LossGuard
from ldm.training.progress import RunProgress
from ldm.training.resumption import Resumption
from ldm.training.run_directory import CURVES, RunDirectory
from ldm.training.sharding import FSDP, ShardedStrategy, refuse_precision
from ldm.training.stop_signals import StopSignals
from ldm.util import get_obj_from_str, instantiate_from_config

DEFAULT_CALLBACKS: Final[Mapping[str, Any]] = {
    "image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 750, "max_images": 4}},
    "learning_rate_logger": {
        "target": "pytorch_lightning.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "cuda_callback": {"target": "main.CUDACallback"},
    "exposure_ledger": {"target": "ldm.training.exposure_ledger.ExposureLedger"},
}
"""What a run has unless ``lightning.callbacks`` says otherwise of the same name."""

DEFAULT_TRAINER: Final[Mapping[str, Any]] = {
    # Training fails within seconds or not at all on the checks made before it; Lightning's rehearsal of the
    # validation costs minutes.
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    # Each time waits for the device to finish the step.
    "log_every_n_steps": 10,
}


def build_trainer(
    lightning: Mapping[str, Any],
    run_directory: RunDirectory,
    signals: StopSignals,
    batch_size: int,
    monitor: str | None,
    validates: bool,
    on_nan: str = "stop",
    base_learning_rate: float | None = None,
    on_oom: str = "stop",
    parts_stop: bool = False,
) -> pl.Trainer:
    """Build the trainer of a run.

    Args:
        lightning: the configuration's section of that name, as plain containers.
        run_directory: the run's folder.
        signals: the run's stop signals.
        batch_size: pictures in a batch of one device.
        monitor: the model's ``monitor``.
        validates: whether the run has a validation set.
        on_nan: ``stop`` or ``skip``: what is done about a loss that is no finite number.
        base_learning_rate: the configured one.
        on_oom: ``stop`` or ``split``: what is done about a batch that does not fit into memory.
        parts_stop: whether a part of the model is trained for some steps only: devices then expect no gradient of it.

    Returns:
        A trainer that has done nothing yet.

    Raises:
        ValueError: if an argument is wrong, or a device or a package for it is not there.
    """
    arguments: dict[str, Any] = dict(lightning.get("trainer") or {})
    if not arguments.get("barebones"):  # which takes no such argument
        arguments = {**DEFAULT_TRAINER, **arguments}
    saving = (lightning.get("modelcheckpoint") or {}).get("params") or {}
    kind = BackgroundCheckpointIO if saving.get("background", False) else StreamingCheckpointIO
    checkpoint_io = kind(verify=saving.get("verify", True))
    arguments.update(
        default_root_dir=str(run_directory.path),
        use_distributed_sampler=False,  # the data module shares the pictures out itself
        plugins=[*_as_list(arguments.get("plugins")), checkpoint_io],
        logger=_build_logger(lightning.get("logger"), run_directory) if _wants_logger(arguments) else False,
    )
    arguments["callbacks"] = [
        Company(),
        LossGuard(on_nan, base_learning_rate),
        BatchSplitting(on_oom),
        *_build_callbacks(lightning, run_directory, signals, checkpoint_io, arguments, batch_size, monitor, validates),
    ]
    find_unused = bool(lightning.get("find_unused_parameters", False)) or parts_stop
    try:
        return pl.Trainer(**{**arguments, **_strategy(arguments, find_unused)})
    except (ImportError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"lightning.trainer cannot have what it asks for: {reason}") from error


def _strategy(arguments: Mapping[str, Any], find_unused_parameters: bool) -> dict[str, Any]:
    """Choose FSDP where that is asked for, and DDP with its setting where several devices are and nothing is said."""
    if arguments.get("strategy") == FSDP:
        refuse_precision(arguments.get("precision"))
        return {"strategy": ShardedStrategy(_world_size(arguments))}
    if arguments.get("strategy", "auto") not in ("auto", "ddp"):
        return {}
    if arguments.get("strategy") != "ddp" and _world_size(arguments) == 1:
        return {}
    return {"strategy": DDPStrategy(find_unused_parameters=find_unused_parameters)}


def _wants_logger(arguments: Mapping[str, Any]) -> bool:
    """Tell whether curves are to be written."""
    return bool(arguments.get("logger", True)) and not arguments.get("barebones")


def _world_size(arguments: Mapping[str, Any]) -> int:
    """Give how many devices are asked for, over all nodes."""
    probe = pl.Trainer(
        accelerator=arguments.get("accelerator", "auto"),
        devices=arguments.get("devices", "auto"),
        num_nodes=arguments.get("num_nodes", 1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    return int(probe.world_size)


def _build_logger(config: Mapping[str, Any] | None, run_directory: RunDirectory) -> Logger:
    """Build the logger that ``lightning.logger`` names, or TensorBoard."""
    if config is None:
        return Curves(str(run_directory.path), version=CURVES)
    params = {"save_dir": str(run_directory.path), **(config.get("params") or {})}
    built: Logger = instantiate_from_config({"target": config["target"], "params": params}, Logger)
    return built


def _build_callbacks(
    lightning: Mapping[str, Any],
    run_directory: RunDirectory,
    signals: StopSignals,
    checkpoint_io: StreamingCheckpointIO,
    arguments: Mapping[str, Any],
    batch_size: int,
    monitor: str | None,
    validates: bool,
) -> list[Callback]:
    """Build all callbacks, the user's included."""
    callbacks: list[Callback] = [Resumption(), Beginning(), BadPictures(), LatentCaching(), EqualWeights(batch_size)]
    if arguments.get("enable_progress_bar", True) and not arguments.get("barebones"):
        callbacks.append(RunProgress())
    configs = merged_callbacks(lightning.get("callbacks") or {})
    built = [instantiate_from_config(config, Callback) for config in configs.values()]
    if arguments["logger"] is False:
        built = [callback for callback in built if not isinstance(callback, LearningRateMonitor)]
    callbacks += built
    if arguments.get("enable_checkpointing", True) and not arguments.get("barebones"):
        section = lightning.get("modelcheckpoint") or {}
        given = dict(section.get("params") or {})
        # 0 and 0.0 alike: no batch is validated on.
        measures = validates and arguments.get("limit_val_batches") != 0
        params = model_checkpoint_params(given, monitor, measures, run_directory.checkpoints)
        kind = get_obj_from_str(section["target"]) if "target" in section else RunCheckpoint
        regular: list[Any] = (
            epoch_checkpoints(params, checkpoint_io) if kind in (ModelCheckpoint, RunCheckpoint) else [kind(**params)]
        )
        callbacks += regular
        by_steps = given.get("every_n_train_steps") or 0
        by_time = given.get("train_time_interval") is not None
        by_epochs = given.get("every_n_epochs")
        callbacks.append(
            LastCheckpoint(
                run_directory.last_checkpoint,
                checkpoint_io,
                signals,
                every_n_epochs=(0 if by_steps or by_time else 1) if by_epochs is None else by_epochs,
                every_n_train_steps=by_steps,
                follows=[each for each in regular if isinstance(each, RunCheckpoint)] if by_time else [],
            )
        )
    return callbacks


def merged_callbacks(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the configuration's callbacks over the default ones.

    Args:
        given: ``lightning.callbacks``: ``{target, params}`` by name. Under a default's name, ``params`` are
            merged one by one, and ``target`` may be left out.

    Returns:
        All callbacks' configurations by name.
    """
    merged: dict[str, Any] = {name: dict(config) for name, config in DEFAULT_CALLBACKS.items()}
    for name, config in given.items():
        default = merged.get(name, {})
        params = config.get("params") or {}
        if config.get("target", default.get("target")) == default.get("target"):
            params = {**(default.get("params") or {}), **params}
        merged[name] = {**default, **config, "params": params}
    return merged


def _as_list(value: Any) -> list[Any]:
    """Wrap a single value in a list, and nothing in an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
