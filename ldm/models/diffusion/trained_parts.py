"""Which parts of a model are trained, at which learning rates, and for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

PART_NAMES: Mapping[str, str] = {"model": "UNet", "cond_stage_model": "text encoder"}


def parameter_groups(
    parts: Mapping[str, Sequence[nn.Parameter]], model_lr: float | None = None, cond_lr: float | None = None
) -> list[dict[str, Any]]:
    """Share a model's trained parameters out among the optimiser's groups.

    The order of all parameters is the same whatever the groups are, so it is that of every checkpoint.

    Args:
        parts: the parameters by part, in the order of the optimiser.
        model_lr: the rate of the part ``model``; the optimiser's own if None.
        cond_lr: the rate of the part ``cond_stage_model``; the optimiser's own if None.

    Returns:
        A mapping a group: ``params``, and ``lr`` where it is not the optimiser's own. Without rates all is one group;
        with ``model_lr`` alone the network is the first and all else the second; with ``cond_lr`` each part is one.
    """
    if model_lr is None and cond_lr is None:
        return [{"params": [parameter for part in parts.values() for parameter in part]}]
    rates = {"model": model_lr, "cond_stage_model": cond_lr}
    if cond_lr is None:
        network, rest = (
            [parameter for name, part in parts.items() if (name == "model") == first for parameter in part]
            for first in (True, False)
        )
        parts = {"model": network, "rest": rest}
    groups: list[dict[str, Any]] = []
    for name, part in parts.items():
        rate = rates.get(name)
        if part:
            groups.append({"params": list(part)} if rate is None else {"params": list(part), "lr": rate})
    return groups


def refuse_contradictions(
    unfreeze_model: bool,
    cond_stage_trainable: bool,
    model_stop_after: int | None,
    cond_stop_after: int | None,
    cond_settings: Mapping[str, Any],
) -> None:
    """Refuse settings that have no effect, or that leave nothing to train before the run ends.

    Args:
        unfreeze_model: whether the network is trained.
        cond_stage_trainable: whether the condition's encoder is trained.
        model_stop_after: optimiser steps after which the network is trained no more.
        cond_stop_after: optimiser steps after which the condition's encoder is trained no more.
        cond_settings: the encoder's other settings by their names, None where not given.

    Raises:
        ValueError: one line for each problem.
    """
    problems = [
        f"model.params.{name} has no effect: the condition's encoder is not trained; remove {name}, or set "
        "cond_stage_trainable to true (and the encoder's freeze to false)"
        for name, value in {"cond_stop_after": cond_stop_after, **cond_settings}.items()
        if value is not None and not cond_stage_trainable
    ]
    if model_stop_after is not None and not unfreeze_model:
        problems.append(
            "model.params.model_stop_after has no effect: the network is not trained; remove model_stop_after, or set "
            "unfreeze_model to true"
        )
    elif model_stop_after is not None and (not cond_stage_trainable or cond_stop_after is not None):
        problems.append(
            f"model.params.model_stop_after: {model_stop_after} would leave nothing to train while the run goes on: "
            "only one of UNet and text encoder may stop, and the other has to be trained; to end a run give "
            "lightning.trainer.max_steps"
        )
    elif cond_stop_after is not None and cond_stage_trainable and not unfreeze_model:
        problems.append(
            f"model.params.cond_stop_after: {cond_stop_after} would leave nothing to train while the run goes on, "
            "because unfreeze_model is false; to end a run give lightning.trainer.max_steps"
        )
    if problems:
        raise ValueError("\n".join(problems))
