"""Exponential moving average of a model's weights, stored under the lineage's buffer names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give a model's parameters by their plain names, also where compiling has wrapped parts of it."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}


class LitEma(nn.Module):
    """Shadow copy of a model's trainable parameters.

    Each is a buffer named as the parameter with the dots removed, beside ``decay`` and ``num_updates``. In the host's
    memory the shadow takes no room on the GPU; each move then copies the parameters there, and each time that it is
    swapped in the shadow is copied back, so it is worth moving it more rarely.

    Args:
        model: the model to follow; parameters that need no gradient are left out.
        decay: weight of the past, within 0 and 1.
        use_num_updates: warm up: use min(decay, (1 + n) / (10 + n)) at the n-th update.
        every: updates for which the shadow is moved once, by as much as by the decays of all of them: the average
            forgets as fast as with 1.
        on_cpu: keep the shadow in the host's memory, wherever the model is.

    Raises:
        ValueError: decay out of range, or ``every`` below 1, or above 1 with updates that are not counted.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        use_num_updates: bool = True,
        every: int = 1,
        on_cpu: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"the EMA decay is {decay}; it must lie within 0 and 1")
        if every < 1 or (every > 1 and not use_num_updates):
            raise ValueError(f"the EMA moves every {every} updates; give 1 or more, and 1 where they are not counted")
        self.every = every
        self.on_cpu = on_cpu
        self.m_name2s_name = {
            name: name.replace(".", "") for name, parameter in _parameters(model).items() if parameter.requires_grad
        }
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int32))
        parameters = _parameters(model)
        for name, shadow_name in self.m_name2s_name.items():
            self.register_buffer(shadow_name, parameters[name].detach().clone())
        self.collected_params: list[Tensor] = []
        if on_cpu:
            self.to("cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> LitEma:
        """Move and convert as asked, but leave what is to stay in the host's memory there."""
        return super()._apply(lambda tensor: _in_host_memory(fn(tensor)) if self.on_cpu else fn(tensor), recurse)

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Count an update, and move the shadow: shadow -= (1 - decay) * (shadow - parameter)."""
        decay: Tensor | float = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            if self.every == 1:
                decay = torch.minimum(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
            else:
                updates = int(self.num_updates)
                if updates % self.every:
                    return
                decay = self._decay_over(range(updates - self.every + 1, updates + 1))
        parameters = _parameters(model)
        shadows = dict(self.named_buffers())
        for name, shadow_name in self.m_name2s_name.items():
            shadow = shadows[shadow_name]
            shadow.sub_((1.0 - decay) * (shadow - parameters[name].to(shadow.device)))

    def _decay_over(self, updates: Iterable[int]) -> float:
        """Give the weight of the past after updates with these numbers, counted from 1."""
        decay = float(self.decay)
        return math.prod(min(decay, (1 + n) / (10 + n)) for n in updates)

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Start the averages anew from a model's weights."""
        parameters, shadows = _parameters(model), dict(self.named_buffers())
        for name, shadow_name in self.m_name2s_name.items():
            shadows[shadow_name].copy_(parameters[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's parameters with the shadow."""
        parameters = _parameters(model)
        shadows = dict(self.named_buffers())
        for name, shadow_name in self.m_name2s_name.items():
            parameters[name].copy_(shadows[shadow_name])

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Give a model the averages for the time of a ``with`` block, and its own weights back after it."""
        live = [
            parameter.detach().to("cpu", copy=True) if self.on_cpu else parameter.detach().clone()
            for parameter in model.parameters()
        ]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, kept in zip(model.parameters(), live, strict=True):
                    parameter.copy_(kept)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep a copy of parameters, for :meth:`restore`."""
        self.collected_params = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Write the kept copy back into the parameters."""
        for kept, parameter in zip(self.collected_params, parameters, strict=True):
            parameter.copy_(kept)
        self.collected_params = []


def _in_host_memory(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, unless it has no memory at all."""
    return tensor if tensor.is_meta else tensor.cpu()
