"""Starts a new run with the optimiser state of a checkpoint: the moments of each parameter, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ldm.checkpoint import read_checkpoint
from ldm.optimizers import KIND, counts_in_groups, kind_of, kind_of_state
from ldm.training.sharding import shared_like

ADAM_STATE: Final = ("step", "exp_avg", "exp_avg_sq")

MEANS: Final = ("row_var", "col_var")
"""What Adafactor keeps: means over a parameter's last dimension, and over the one before."""

LEAVE_OUT: Final = "or leave out --warm_optimizer"


class WarmOptimizer(pl.Callback):
    """Gives the optimisers of a new run the state that a checkpoint holds of each parameter.

    Learning rates and whatever else belongs to a group of parameters, the schedules, and the averages of the
    weights stay the new run's.

    Args:
        checkpoint: a checkpoint of an earlier run.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the state, now that the optimisers are there and their parameters lie on their devices.

        Raises:
            ValueError: the checkpoint holds none, or one that does not fit.
        """
        take_state(trainer.optimizers, pl_module, self.checkpoint)


def describe_state(trainer: pl.Trainer, model: pl.LightningModule, checkpoint: Path) -> str:
    """See, before a run begins, whether its optimisers can take the state of a checkpoint.

    Args:
        trainer: the run's trainer.
        model: the model, which knows its learning rates; its optimisers are built for this alone.
        checkpoint: the file.

    Returns:
        A line that says what will be taken.

    Raises:
        ValueError: the checkpoint holds no optimiser state, or one that does not fit; one line.
        OSError: it cannot be opened.
    """
    model.trainer = trainer
    states = list(_paired(_optimizers(model.configure_optimizers()), model, checkpoint))
    steps = [int(pair.state["step"]) for pair in states if "step" in pair.state]
    told = f", after {max(steps):,} optimiser steps" if steps else ""
    return f"optimiser state: {len(states):,} parameters' from {checkpoint}{told} (--warm_optimizer)"


def take_state(optimizers: Sequence[Optimizer], module: nn.Module, checkpoint: Path) -> None:
    """Give each parameter its state of a checkpoint.

    The file is mapped into memory: what goes to a GPU takes no room in the host's beside the cache of the disk.

    Args:
        optimizers: the optimisers, whose parameters lie where they are trained.
        module: the model, for the parameters' names.
        checkpoint: the file.

    Raises:
        ValueError: the checkpoint holds no optimiser state, or one that does not fit; one line.
        OSError: it cannot be opened.
    """
    pairs = list(_paired(optimizers, module, checkpoint))
    for optimizer in optimizers:
        now = optimizer.state_dict()
        numbers = dict(zip(map(id, _parameters(optimizer)), _numbers(now["param_groups"]), strict=True))
        state = {
            numbers[id(pair.parameter)]: {name: _own(value, pair.parameter) for name, value in pair.state.items()}
            for pair in pairs
            if pair.optimizer is optimizer
        }
        optimizer.load_state_dict({**now, "state": state})


class _Pair(NamedTuple):
    """A parameter that is trained now, and what a checkpoint holds of it."""

    optimizer: Optimizer
    parameter: nn.Parameter
    state: Mapping[str, Any]


def _paired(optimizers: Sequence[Optimizer], module: nn.Module, checkpoint: Path) -> Iterator[_Pair]:
    """Go through what a checkpoint holds, and compare it with what is trained; see :func:`take_state`."""
    saved = _read(checkpoint)
    _refuse_optimizers(optimizers, saved, checkpoint)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    sizes = [[len(group["params"]) for group in each["param_groups"]] for each in saved]
    sizes_now = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
    if sizes != sizes_now:
        trained = [names.get(id(parameter), "?") for optimizer in optimizers for parameter in _parameters(optimizer)]
        parts = Counter(name.partition(".")[0] for name in trained)
        raise ValueError(
            f"--warm_optimizer: the optimiser state in {checkpoint} is of {_show(sizes)}, and what is trained now is "
            f"{_show(sizes_now)} ({', '.join(f'{part} {count}' for part, count in parts.items())}): put "
            f"model.params.model_lr, cond_lr, cond_train_last_layers, cond_train_embeddings, cond_stage_trainable and "
            f"unfreeze_model back to what they were, {LEAVE_OUT}"
        )
    for each, optimizer in zip(saved, optimizers, strict=True):
        for number, parameter in zip(_numbers(each["param_groups"]), _parameters(optimizer), strict=True):
            state = each["state"].get(number)
            if state is None:
                continue  # it never had a gradient
            problem = _misfit(state, parameter, optimizer)
            if problem is not None:
                name = names.get(id(parameter), "?")
                raise ValueError(
                    f"--warm_optimizer: the optimiser state in {checkpoint} does not fit what is trained now: "
                    f"parameter {number}, {name}, {problem}; name a checkpoint of the same architecture and the same "
                    f"trained parts, {LEAVE_OUT}"
                )
            yield _Pair(optimizer, parameter, state)


def _read(checkpoint: Path) -> list[dict[str, Any]]:
    """Read the optimisers' states; their tensors stay on the disk until they are looked at."""
    states = None
    if not checkpoint.is_dir():  # a diffusers folder, which holds weights alone
        # What reads the weights has compared the file with its checksums.
        states = read_checkpoint(checkpoint, verify=False).get("optimizer_states")
    is_whole = isinstance(states, list) and bool(states) and all(map(_is_state, states))
    if not is_whole or not any(each["state"] for each in states or []):
        raise ValueError(
            f"--warm_optimizer: {checkpoint} holds no optimiser state (published and pruned files hold weights alone): "
            f"name a checkpoint that a run saved, such as its last.ckpt, with --actual_resume, {LEAVE_OUT}"
        )
    return list(states or [])


def _is_state(value: Any) -> bool:
    """Tell whether something has the form of an optimiser's state."""
    if not isinstance(value, dict):
        return False
    state, groups = value.get("state"), value.get("param_groups")
    return (
        isinstance(state, dict)
        and isinstance(groups, list)
        and all(isinstance(each, dict) for each in state.values())
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        and all(isinstance(number, int) for number in _numbers(groups))
    )


def _refuse_optimizers(optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, Any]], checkpoint: Path) -> None:
    """Refuse optimisers that do not keep what they learn with each parameter, and states of other optimisers."""
    for optimizer in optimizers:
        if counts_in_groups(optimizer):
            raise ValueError(
                f"--warm_optimizer: {kind_of(optimizer)} learns of all parameters together, and starts anew in a new "
                f"run: continue the old one with -r, {LEAVE_OUT}"
            )
    for optimizer, state in zip(optimizers, saved, strict=False):
        if state.get(KIND) != optimizer.state_dict().get(KIND):
            raise ValueError(
                f"--warm_optimizer: the optimiser state in {checkpoint} is another optimiser's "
                f"({kind_of_state(state)}; now {kind_of(optimizer)}): put model.params.optimizer_config back to what "
                f"it was, {LEAVE_OUT}"
            )


def _misfit(state: Mapping[str, Any], parameter: nn.Parameter, optimizer: Optimizer) -> str | None:
    """Say why a parameter cannot take a state."""
    if isinstance(optimizer, (Adam, AdamW)) and not all(isinstance(state.get(key), Tensor) for key in ADAM_STATE):
        found = ", ".join(map(str, state)) or "nothing"
        return f"has {found} there and needs {', '.join(ADAM_STATE)}: that is another optimiser's state"
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim and value.shape != _shape_of(name, value, parameter):
            return f"has the shape {tuple(parameter.shape)}, and its {name} there {tuple(value.shape)}"
        is_packed = isinstance(value, Mapping) and all(isinstance(part, Tensor) for part in value.values())
        if not is_packed and not isinstance(value, (Tensor, int, float, type(None))):
            return f"has a {name} there that is no number"
    return None


def _shape_of(name: str, value: Tensor, parameter: nn.Parameter) -> tuple[int, ...]:
    """Give the shape that a parameter's moment must have; Adafactor keeps means over rows and over columns."""
    if name not in MEANS or value.ndim != parameter.ndim:
        return tuple(parameter.shape)
    dimension = value.ndim - MEANS.index(name) - 1
    return tuple(1 if number == dimension else size for number, size in enumerate(parameter.shape))


def _own(value: Any, parameter: nn.Parameter) -> Any:
    """Copy what would stay a part of the file; what goes to another device is copied on its way."""
    own = value.clone() if isinstance(value, Tensor) and parameter.device.type == "cpu" else value
    return shared_like(own, parameter)


def _optimizers(configured: Any) -> list[Optimizer]:
    """Find the optimisers in what ``configure_optimizers`` may return."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return [configured["optimizer"]]
    if len(configured) == 2 and isinstance(configured[0], (list, tuple)):
        configured = configured[0]  # schedules are beside them
    return [optimizer for each in configured for optimizer in _optimizers(each)]


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _numbers(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [number for group in groups for number in group["params"]]


def _show(sizes: Sequence[Sequence[int]]) -> str:
    """Write how many parameters each group of each optimiser has."""
    return " and ".join(f"{' + '.join(f'{size:,}' for size in groups)} parameters" for groups in sizes)
