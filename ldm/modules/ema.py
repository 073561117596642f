"""Exponential moving average of a model's weights, stored under the lineage's buffer names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give a model's parameters by their plain names, also where compiling has wrapped parts of it."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}


class LitEma(nn.Module):
    """Shadow copy of a model's trainable parameters.

    Each is a buffer named as the parameter with the dots removed, beside ``decay`` and ``num_updates``.

    Args:
        model: the model to follow; parameters that need no gradient are left out.
        decay: weight of the past, within 0 and 1.
        use_num_updates: warm up: use min(decay, (1 + n) / (10 + n)) at the n-th update.

    Raises:
        ValueError: decay out of range.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"the EMA decay is {decay}; it must lie within 0 and 1")
        self.m_name2s_name = {
            name: name.replace(".", "") for name, parameter in _parameters(model).items() if parameter.requires_grad
        }
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int32))
        parameters = _parameters(model)
        for name, shadow_name in self.m_name2s_name.items():
            self.register_buffer(shadow_name, parameters[name].detach().clone())
        self.collected_params: list[Tensor] = []

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the shadow towards the model: shadow -= (1 - decay) * (shadow - parameter)."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = _parameters(model)
        shadows = dict(self.named_buffers())
        for name, shadow_name in self.m_name2s_name.items():
            shadow = shadows[shadow_name]
            shadow.sub_((1.0 - decay) * (shadow - parameters[name]))

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
        live = [parameter.detach().clone() for parameter in model.parameters()]
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
