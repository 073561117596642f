"""Counts the bytes that a training step would hold, without holding them: on tensors that have no memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK: Final = 512
"""Bytes that the GPU's allocator rounds each tensor up to."""

ENCODING: Final = "encoding the pictures"
FORWARD: Final = "the forward pass"
BACKWARD: Final = "the backward pass"

IN_FLOAT32: Final = (nn.LayerNorm, nn.GroupNorm)
"""What autocasting computes in float32 on a GPU, and in the dtype that comes on a CPU; the rest of that list
holds nothing for the backward pass here.

Reference:
    https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
"""


@dataclass
class MemoryCount:
    """Bytes that are held, operation by operation.

    Attributes:
        live: bytes held now.
        held: bytes held after each operation.
        phases: what each operation belonged to.
    """

    live: int = 0
    held: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory until nothing refers to it any more; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK

        def forget(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self.live += size

    def note(self, phase: str) -> None:
        """Note what is held now."""
        self.held.append(self.live)
        self.phases.append(phase)


class CountMemory(TorchDispatchMode):
    """Counts what operations allocate, in a ``with`` block.

    Args:
        count: where to.

    Attributes:
        phase: what operations belong to from now on; what needs no gradient in a forward pass is the encoding.
    """

    def __init__(self, count: MemoryCount) -> None:
        super().__init__()
        self.count = count
        self.phase = FORWARD

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count its results."""
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor):
                self.count.add(each)
        is_encoding = self.phase == FORWARD and not torch.is_grad_enabled()
        self.count.note(ENCODING if is_encoding else self.phase)
        return out


def _as_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.float() if isinstance(each, Tensor) else each for each in inputs)


def count_step(
    model: nn.Module,
    compute_loss: Callable[[], Tensor],
    mixed: bool,
    accumulated: bool = False,
) -> MemoryCount:
    """Count what a training step holds beside the optimiser's state; the gradients are freed at its end.

    Args:
        model: the model; its parameters and buffers count too.
        compute_loss: runs the forward pass.
        mixed: whether it runs in mixed precision.
        accumulated: whether the gradients of an earlier batch are there already.

    Returns:
        The bytes held from operation to operation.
    """
    gc.collect()
    count = MemoryCount()
    for tensor in (*model.parameters(), *model.buffers()):
        count.add(tensor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = [module for module in model.modules() if isinstance(module, IN_FLOAT32)] if mixed else []
    hooks = [module.register_forward_pre_hook(_as_float32) for module in norms]
    mode = CountMemory(count)
    if accumulated:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
            count.add(parameter.grad)
    with mode:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = compute_loss()
        mode.phase = BACKWARD
        loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return count


@dataclass(frozen=True)
class Growth:
    """How the bytes that a step holds grow with the batch.

    Attributes:
        constant: float64 (operations,), bytes after each operation that no picture adds to.
        per_picture: float64 (operations,), bytes after each operation for each picture.
        phases: what each operation belongs to.
    """

    constant: npt.NDArray[np.float64]
    per_picture: npt.NDArray[np.float64]
    phases: tuple[str, ...]

    def peak(self, batch_size: int) -> tuple[int, str]:
        """Give the most bytes at once for a batch, and what belongs to that moment."""
        held = self.constant + batch_size * self.per_picture
        moment = int(held.argmax())
        return int(held[moment]), self.phases[moment]

    def largest_batch(self, capacity: float) -> int:
        """Give the most pictures for which no more than ``capacity`` bytes are held; 0 if not even one fits."""
        if (self.constant > capacity).any():
            return 0
        grows = self.per_picture > 0
        return int(((capacity - self.constant[grows]) / self.per_picture[grows]).min())


def growth_of(small: MemoryCount, few: int, large: MemoryCount, many: int) -> Growth:
    """Work out how memory grows from the same step with two sizes of batch.

    Args:
        small: the count with fewer pictures.
        few: their number.
        large: the count with more pictures.
        many: their number.

    Returns:
        The growth: of every operation, where both took the same ones; of the phases' peaks, where they did not.
    """
    if small.phases == large.phases:
        first, second = np.asarray(small.held, np.float64), np.asarray(large.held, np.float64)
        phases = tuple(small.phases)
    else:
        phases = tuple(dict.fromkeys([*small.phases, *large.phases]))
        first, second = (_peaks(count, phases) for count in (small, large))
    per_picture = (second - first) / (many - few)
    return Growth(first - few * per_picture, per_picture, phases)


def _peaks(count: MemoryCount, phases: tuple[str, ...]) -> npt.NDArray[np.float64]:
    held, belongs = np.asarray(count.held, np.float64), np.asarray(count.phases)
    return np.asarray([held[belongs == phase].max(initial=0) for phase in phases])
