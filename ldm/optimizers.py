"""Builds the optimiser that a config names, and keeps its state in checkpoints as plain tensors.

What is particular to a library's optimiser stands here and nowhere else: states in packed tensors, weights that
differ between training and evaluation, a step that is compiled.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ldm.util import get_obj_from_str, kind_problem

logger = logging.getLogger(__name__)

SECTION: Final = "model.params.optimizer_config"

DEFAULT_TARGET: Final = "torch.optim.AdamW"

UNUSABLE: Final[Mapping[str, str]] = {
    "torch.LBFGS": "takes no groups of parameters and computes the loss several times a step",
    "torch.SparseAdam": "takes sparse gradients alone, and these models have none",
    "torch.Muon": "takes matrices alone, and these models have convolutions and biases too",
}
"""Optimisers of torch that cannot train these models, and why."""

KIND: Final = "optimizer"
"""What a stored state calls the class of its optimiser, unless that is AdamW."""

TRAINING_WEIGHTS: Final = "y"
"""What a parameter's stored state calls its training weights, where those of the model are its evaluation weights."""

_FUSED: Final = (AdamW, Adam, SGD)
"""Those whose fused step Lightning and the guard of the loss can steer on a GPU."""

_COMPILERS: Final = ("cc", "gcc", "clang")


class OptimizerStateError(ValueError):
    """A stored state that is not of the optimiser which is to go on from it; the message ends a sentence."""


def optimizer_problem(found: Any) -> str | None:
    """Say why a target cannot be the optimiser.

    Args:
        found: what the ``target:`` string names.

    Returns:
        The end of a sentence that begins with the target; None where it can.
    """
    problem = kind_problem(found, Optimizer)
    why = UNUSABLE.get(_name(found)) if isinstance(found, type) else None
    return problem if problem is not None or why is None else f"{why}; use another"


def build_optimizer(
    config: Mapping[str, Any] | None, groups: Sequence[Mapping[str, Any]], lr: float, may_fuse: bool = True
) -> Optimizer:
    """Build an optimiser whose ``state_dict`` holds plain tensors and can be continued exactly.

    Args:
        config: ``{target, params}`` of the optimiser; None for AdamW. Its ``params.lr`` goes before ``lr``.
        groups: the parameter groups; a group's own ``lr`` goes before both.
        lr: the learning rate of groups that have none.
        may_fuse: whether a fused step may be chosen on a GPU.

    Returns:
        The optimiser, ready for training.

    Raises:
        ValueError: the target is no optimiser, or refuses its parameters; one line.
    """
    target = DEFAULT_TARGET if config is None else str(config.get("target", DEFAULT_TARGET))
    kind = get_obj_from_str(target)
    problem = optimizer_problem(kind)
    if problem is not None:
        raise ValueError(f"{SECTION}.target: target {target} {problem}")
    params = {"lr": lr, **((config or {}).get("params") or {})}
    parameters = [parameter for group in groups for parameter in group["params"]]
    on_gpu = all(parameter.is_cuda for parameter in parameters)
    if params.get("fused") and not may_fuse:
        raise ValueError(
            f"{SECTION}.params.fused: with --precision 16-mixed gradients cannot be clipped before a fused step; "
            "remove it, or set --gradient_clip_val 0"
        )
    if kind in _FUSED and not {"fused", "foreach", "capturable", "differentiable"} & params.keys():
        params["fused"] = True if on_gpu and may_fuse else None
    try:
        optimizer: Optimizer = kind([dict(group) for group in groups], **params)
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{SECTION}: {target} refuses its parameters: {reason}") from error
    _check_rates(optimizer, target)
    if params.get("bf16_stochastic_round") and not any(each.dtype is torch.bfloat16 for each in parameters):
        logger.warning("%s.params.bf16_stochastic_round has no effect: the weights stay in 32 bit", SECTION)
    if _compiles_its_step(optimizer) and on_gpu and not _has_compiler():
        logger.warning(
            "%s compiles its step, and this machine has no Triton or no C compiler: the step is taken uncompiled, "
            "which is slower and takes more memory",
            target,
        )
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.register_state_dict_post_hook(_pack)
    optimizer.register_load_state_dict_pre_hook(_unpack)
    optimizer.register_load_state_dict_post_hook(_go_on)
    return optimizer


def step_context(optimizers: Iterable[Optimizer]) -> AbstractContextManager[Any]:
    """Give the context to take an optimiser step in, its forward and backward pass included.

    An optimiser that compiles its step does so on GPUs with a compiler alone: compiling for a CPU takes minutes.

    Args:
        optimizers: the optimisers, whose parameters lie where they are trained.

    Returns:
        A context; in it nothing is compiled, where an optimiser's step must not be.
    """
    compiling = [optimizer for optimizer in optimizers if _compiles_its_step(optimizer)]
    if not compiling or (all(map(_is_on_gpu, compiling)) and _has_compiler()):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluation_weights(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Give the parameters their evaluation weights for the time of a ``with`` block, then exactly what they were.

    Nothing happens with optimisers that know no such difference. Schedule-free ones train at weights y and are
    evaluated at x, an average of their path.

    Args:
        optimizers: the optimisers.

    Reference:
        Defazio et al. 2024, arXiv 2405.15682, eq. 3-5.
    """
    switching = [optimizer for optimizer in optimizers if is_at_training_weights(optimizer)]
    kept = [
        (parameter, parameter.detach().clone())
        for optimizer in switching
        for parameter in parameters_of(optimizer)
        if optimizer.state.get(parameter)
    ]
    evaluate(switching)
    try:
        yield
    finally:
        for optimizer in switching:
            optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def evaluate(optimizers: Iterable[Optimizer]) -> None:
    """Give the parameters their evaluation weights, where there is a difference."""
    for optimizer in optimizers:
        if is_at_training_weights(optimizer):
            optimizer.eval()  # type: ignore[attr-defined]


def evaluation_copies(module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Copy the evaluation weights of what is trained at others.

    Args:
        module: the model.
        optimizers: its optimisers.

    Returns:
        Tensors on the CPU by their names in the module; empty where the parameters are what is evaluated.
    """
    switching = [optimizer for optimizer in optimizers if is_at_training_weights(optimizer)]
    trained = {id(parameter) for optimizer in switching for parameter in parameters_of(optimizer)}
    with evaluation_weights(switching):
        return {
            name: torch.empty_like(parameter, device="cpu", requires_grad=False).copy_(parameter.detach())
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if id(parameter) in trained
        }


def is_at_training_weights(optimizer: Optimizer) -> bool:
    """Tell whether the parameters hold weights to train, and other ones are to be evaluated."""
    return hasattr(optimizer, "eval") and any(group.get("train_mode") for group in optimizer.param_groups)


def counts_in_groups(optimizer: Optimizer) -> bool:
    """Tell whether an optimiser learns of all parameters together, such as their common step size and its count."""
    return any("k" in group for group in optimizer.param_groups)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """List an optimiser's parameters in the order of its state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def kind_of_state(state: Mapping[str, Any]) -> str:
    """Give the package and the class that a stored state is of."""
    return str(state.get(KIND, _name(AdamW)))


def kind_of(optimizer: Optimizer) -> str:
    """Give the package and the class of an optimiser."""
    return _name(type(optimizer))


def set_rate(group: dict[str, Any], key: str, rate: float | Tensor) -> None:
    """Set a learning rate of a parameter group; one that is a tensor stays the same tensor.

    Args:
        group: the group.
        key: ``lr`` or ``initial_lr``.
        rate: the rate.
    """
    if isinstance(group.get(key), Tensor):
        group[key].fill_(rate)
    else:
        group[key] = float(rate)


def _name(kind: type) -> str:
    """Name a class by its package and itself: modules move within a package from version to version."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _check_rates(optimizer: Optimizer, target: str) -> None:
    """See that Prodigy gets the rate that it is made for."""
    if type(optimizer).__name__ != "Prodigy":
        return
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    if len(rates) > 1:
        raise ValueError(
            f"{SECTION}: {target} finds one step size for all parameters, and the groups have the learning rates "
            f"{', '.join(f'{rate:g}' for rate in rates)}: remove model.params.model_lr and cond_lr, or give each the "
            "same"
        )
    if rates != [1.0]:
        logger.warning(
            "%s finds its step size by itself and multiplies it by the learning rate, which is 1 by convention and "
            "%g here: set %s.params.lr=1.0",
            target,
            rates[0],
            SECTION,
        )


def _is_on_gpu(optimizer: Optimizer) -> bool:
    return all(parameter.is_cuda for parameter in parameters_of(optimizer))


def _compiles_its_step(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torchao.")


def _has_compiler() -> bool:
    """Tell whether Triton can be used; on Windows it brings its C compiler along."""
    if importlib.util.find_spec("triton") is None:
        return False
    named = os.environ.get("CC")
    return sys.platform == "win32" or any(map(shutil.which, [named] if named else _COMPILERS))


# --- the state in checkpoints ------------------------------------------------------------------------------


def _pack(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Write a state in plain tensors, with the training weights where the model's file holds others."""
    packed = dict(state_dict["state"])
    for group, number, parameter in _numbered(optimizer, state_dict):
        state = packed.get(number)
        if state:
            packed[number] = {name: _plain(value) for name, value in state.items()}
            if is_at_training_weights(optimizer) and group.get("train_mode"):
                packed[number][TRAINING_WEIGHTS] = parameter.detach()
    kind = {} if type(optimizer) is AdamW else {KIND: kind_of(optimizer)}
    return {**state_dict, "state": packed, **kind}


def _unpack(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Read what :func:`_pack` has written; the classes are those of this optimiser's own fresh state.

    Raises:
        OptimizerStateError: it is another optimiser's, or has other shapes.
    """
    then, now = kind_of_state(state_dict), kind_of(optimizer)
    if then != now:
        raise OptimizerStateError(
            f"holds the state of another optimiser ({then}; now {now}): put {SECTION} back to what it was"
        )
    unpacked = dict(state_dict["state"])
    for _, number, parameter in _numbered(optimizer, state_dict):
        state = dict(unpacked.get(number) or {})
        weights = state.pop(TRAINING_WEIGHTS, None) if hasattr(optimizer, "eval") else None
        for name, value in state.items():
            if isinstance(value, Mapping):
                state[name] = _filled(optimizer, parameter, number, name, value)
        if weights is not None:
            _refuse_other_shapes({TRAINING_WEIGHTS: parameter}, {TRAINING_WEIGHTS: weights}, number)
            with torch.no_grad():
                parameter.copy_(weights)
        if number in unpacked:
            unpacked[number] = state
    return {**state_dict, "state": unpacked}


def _go_on(optimizer: Optimizer) -> None:
    """Have the parameters at their training weights, also from a state that was saved at the others."""
    if hasattr(optimizer, "train"):
        optimizer.train()


def _numbered(
    optimizer: Optimizer, state_dict: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], int, nn.Parameter]]:
    """Go through the parameters with their groups and numbers; torch itself compares the counts."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for number, parameter in zip(saved["params"], group["params"], strict=False):
            yield group, number, parameter


def _plain(value: Any) -> Any:
    """Take a tensor of a library's own class apart, by the protocol that torch has for them; not a shared one."""
    if not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter, DTensor):
        return value
    return {name: _as_bytes(part) for name, part in _parts(value).items()}


def _parts(value: Any) -> dict[str, Tensor]:
    names, _ = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}


def _as_bytes(value: Tensor) -> Tensor:
    """Give numbers of eight bits as bytes: little can be done with them otherwise, not even comparing."""
    value = value.detach()
    return value.view(torch.uint8) if value.is_floating_point() and value.element_size() == 1 else value


def _filled(optimizer: Any, parameter: nn.Parameter, number: int, name: str, stored: Mapping[str, Any]) -> Any:
    """Give a fresh buffer of the optimiser's own the stored numbers.

    Args:
        optimizer: an optimiser of torchao, which alone keeps states in tensors of its own classes.
        parameter: the parameter that the buffer belongs to.
        number: the parameter's number, for the message.
        name: the buffer's name; Adam's first moment alone has a sign.
        stored: its parts by name.

    Raises:
        OptimizerStateError: the parts are others, or of other shapes.
    """
    fresh = optimizer._new_buffer(parameter, name == "exp_avg") if _compiles_its_step(optimizer) else None
    own = (
        {} if fresh is None or type(fresh) is Tensor else {key: _as_bytes(part) for key, part in _parts(fresh).items()}
    )
    _refuse_other_shapes(own, stored, number)
    for key, part in own.items():
        part.copy_(stored[key])
    return fresh


def _refuse_other_shapes(own: Mapping[str, Tensor], stored: Mapping[str, Any], number: int) -> None:
    def described(parts: Mapping[str, Any]) -> str:
        shown = [f"{key} {tuple(part.shape) if isinstance(part, Tensor) else part}" for key, part in parts.items()]
        return ", ".join(sorted(shown)) or "a plain tensor"

    if described(own) != described(stored) or any(own[key].dtype != stored[key].dtype for key in own):
        raise OptimizerStateError(
            f"holds an optimiser state of other sizes (parameter {number}: {described(stored)}; now {described(own)}): "
            f"put {SECTION}.params back to what they were"
        )
