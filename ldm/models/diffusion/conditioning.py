"""Conditions in their several shapes, and classifier-free guidance.

A condition is a tensor, a list of tensors, or a dictionary that says how each part reaches the UNet:
``{"c_crossattn": [tokens], "c_concat": [maps]}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Condition = Any
"""Tensor | list of tensors | dict of lists of tensors | None."""

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")
"""How a condition reaches the UNet: not at all, as input channels, by attention, by both, or as class labels."""


def as_arguments(cond: Condition, conditioning_key: str | None) -> dict[str, Any]:
    """Word a condition as the keyword arguments of the diffusion wrapper.

    Args:
        cond: the condition.
        conditioning_key: one of ``CONDITIONING_KEYS``.

    Returns:
        ``{"c_concat": [...]}`` and/or ``{"c_crossattn": [...]}``; empty for None.
    """
    if cond is None:
        return {}
    if isinstance(cond, Mapping):
        return {key: list(value) if isinstance(value, (list, tuple)) else [value] for key, value in cond.items()}
    parts = list(cond) if isinstance(cond, (list, tuple)) else [cond]
    return {"c_concat" if conditioning_key == "concat" else "c_crossattn": parts}


def batch_together(first: Condition, second: Condition) -> Condition:
    """Put two conditions of one form into one batch, the first one's pictures first.

    Captions may have been encoded to different numbers of tokens: each side's tokens are then repeated whole to one
    length, which leaves what is attended to as it is (see
    :class:`~ldm.modules.encoders.modules.FrozenCLIPEmbedder`).

    Raises:
        ValueError: the two are of different kinds.
    """
    if first is None and second is None:
        return None
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if _are_tokens([first, second]) and first.shape[1] != second.shape[1]:
            length = math.lcm(first.shape[1], second.shape[1])
            first, second = (tokens.repeat(1, length // tokens.shape[1], 1) for tokens in (first, second))
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {key: batch_together(first[key], second[key]) for key in first}
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        if len(first) > 1 and _are_tokens([*first, *second]) and _lengths(first) != _lengths(second):
            # All are attended to together, so together they have to be repeated.
            return [batch_together(torch.cat(list(first), dim=1), torch.cat(list(second), dim=1))]
        return [batch_together(a, b) for a, b in zip(first, second, strict=True)]
    raise ValueError("conditioning and unconditional_conditioning must have the same form to guide by them")


def _are_tokens(parts: Sequence[Any]) -> bool:
    """Tell whether all parts are tokens (B, L, D); maps have four dimensions, labels one."""
    return all(isinstance(part, Tensor) and part.ndim == 3 for part in parts)


def _lengths(parts: Sequence[Tensor]) -> list[int]:
    return [part.shape[1] for part in parts]


def guided_output(
    apply_model: Callable[[Tensor, Tensor, Condition], Tensor],
    x: Tensor,
    t: Tensor,
    cond: Condition,
    uncond: Condition = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Apply the network with classifier-free guidance: e_u + s (e_c - e_u).

    Args:
        apply_model: the network, ``(x, t, cond) -> output``.
        x: (B, C, H, W).
        t: (B,).
        cond: the condition.
        uncond: the condition to move away from; None for no guidance.
        guidance_scale: s; 1 for no guidance.

    Returns:
        (B, C, H, W).

    Reference:
        Ho & Salimans 2022, arXiv 2207.12598, eq. 6 (there w = s - 1).
    """
    if uncond is None or guidance_scale == 1.0:
        return apply_model(x, t, cond)
    both = apply_model(torch.cat([x, x]), torch.cat([t, t]), batch_together(uncond, cond))
    output_uncond, output_cond = both.chunk(2)
    return output_uncond + guidance_scale * (output_cond - output_uncond)
