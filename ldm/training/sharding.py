"""Training with a share of the weights on each device (FSDP), and checkpoints that do not show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

FSDP: Final = "fsdp"
"""What ``--strategy`` calls it."""

TORCHS_OPTIMIZERS: Final = "torch.optim."

PRECISIONS: Final = ("32-true", "32", 32, "bf16-mixed", "bf16", None)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for models that shard themselves, with checkpoints as every other strategy has them.

    A checkpoint holds whole tensors under the model's own keys, and the optimiser's state by the numbers of its
    parameters, gathered one after the other in the first process's memory. So it can be continued on any number of
    devices, with this strategy or another, and goes through the run's own writer and reader.

    Args:
        devices: how many devices the run has, over all nodes.
    """

    def __init__(self, devices: int) -> None:
        super().__init__(data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Have Lightning hand the optimisers' states over like everybody else's."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the weights; the first process alone gets them."""
        assert self.lightning_module is not None
        gathered: dict[str, Any] = self._gather(self.lightning_module.state_dict())
        return gathered if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """Gather an optimiser's state; the first process alone gets it."""
        plain: Any = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        gathered: dict[str, Any] = self._gather(plain.state_dict())
        return gathered if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint in the first process, with what a model has put into it gathered too."""
        checkpoint["state_dict"] = self._gather(checkpoint["state_dict"])
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint in every process, with the run's own reader; its tensors stay on the disk until used."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each device its share of the weights."""
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        saved = checkpoint["state_dict"]
        shared = {key: shared_like(value, own[key]) if key in own else value for key, value in saved.items()}
        module.load_state_dict(shared, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each device its share of the optimisers' states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            # Of another number of parameters: the optimiser itself says so.
            owners = dict(zip(numbers, parameters, strict=len(numbers) == len(parameters)))
            state = {
                number: {name: shared_like(value, owners[number]) for name, value in values.items()}
                if number in owners
                else values
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _gather(self, content: Any) -> Any:
        """Put shared tensors inside a nest of containers together, in the first process's memory."""
        if isinstance(content, DTensor):
            gathered: Tensor = content.full_tensor()
            return gathered.detach().cpu() if self.is_global_zero else None
        if isinstance(content, Mapping):
            return {key: self._gather(value) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return type(content)(self._gather(value) for value in content)
        return content


def shared_like(value: Any, like: Tensor) -> Any:
    """Keep of a whole tensor what this device holds of another one.

    Args:
        value: a tensor that every process has; anything else, and what has another shape, comes back as it is.
        like: the tensor that says how it is shared; where it is not, the value comes back as it is.

    Returns:
        The value, shared out as that one.
    """
    is_alike = isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == like.shape
    if not isinstance(like, DTensor) or not is_alike:
        return value
    placed = value.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def own_share(value: Tensor) -> Tensor:
    """Give the part of a tensor that this device holds: all of it, where it is not shared."""
    local: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return local


def whole(value: Tensor) -> Tensor:
    """Give all of a tensor; every process has to ask where it is shared."""
    gathered: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return gathered


def refuse_precision(precision: Any) -> None:
    """See that sharded training can be done in a precision.

    Args:
        precision: ``lightning.trainer.precision``.

    Raises:
        ValueError: it cannot.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"--strategy {FSDP} trains in float32 and with --precision bf16-mixed, not with {precision!r}: give one of"
            " them, or --strategy ddp"
        )


def refuse_unshardable(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """See, before a run begins, that its model can be shared out if that is asked for.

    Args:
        trainer: the run's trainer.
        model: the model; one that can says so with ``shared_blocks``.

    Raises:
        ValueError: it cannot; says what to type instead.
    """
    if not isinstance(trainer.strategy, ShardedStrategy):
        return
    blocks = getattr(model, "shared_blocks", None)
    if blocks is None:
        raise ValueError(
            f"--strategy {FSDP} shards diffusion models; {type(model).__name__} trains with --strategy ddp"
        )
    target = (getattr(model, "optimizer_config", None) or {}).get("target", TORCHS_OPTIMIZERS)
    if not target.startswith(TORCHS_OPTIMIZERS):
        raise ValueError(
            f"--strategy {FSDP} works with torch's own optimisers, not with {target}: set"
            " model.params.optimizer_config.target to torch.optim.AdamW, or train with --strategy ddp"
        )
    covered = {id(parameter) for block in blocks() for parameter in block.parameters()}
    others = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in covered]
    if others:
        raise ValueError(f"--strategy {FSDP} cannot shard {', '.join(others[:3])}; train with --strategy ddp")


def weights_are_finite(trainer: pl.Trainer, module: torch.nn.Module) -> bool:
    """Tell, in all processes alike, whether training has not blown up."""
    trained = (own_share(parameter) for parameter in module.parameters() if parameter.requires_grad)
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in trained)
    return trainer.strategy.reduce_boolean_decision(finite) if isinstance(trainer.strategy, ShardedStrategy) else finite
