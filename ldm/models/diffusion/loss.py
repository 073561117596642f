"""The diffusion losses: distances, timestep weights and their combination. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.models.diffusion.gaussian_diffusion import unknown_parameterization

if TYPE_CHECKING:
    from ldm.models.diffusion.noise_schedule import NoiseSchedule


def distance(pred: Tensor, target: Tensor, loss_type: str, mean: bool = True) -> Tensor:
    """Compare a prediction with its target.

    Args:
        pred: the prediction.
        target: what it should be, of the same shape.
        loss_type: ``l2`` (squared error) or ``l1`` (absolute error).
        mean: average over everything; otherwise element by element.

    Returns:
        A scalar, or a tensor of the shape given.

    Raises:
        ValueError: unknown loss type.
    """
    reduction = "mean" if mean else "none"
    if loss_type == "l2":
        return F.mse_loss(pred, target, reduction=reduction)
    if loss_type == "l1":
        return F.l1_loss(pred, target, reduction=reduction)
    raise ValueError(f"model.params.loss_type is '{loss_type}'; use l2 or l1")


def lvlb_weights(schedule: NoiseSchedule, parameterization: str) -> Tensor:
    """Compute the weights that turn the simple loss into the variational bound.

    For ``x0`` the denominator is 2 - abar, as in the lineage, where 2 (1 - abar) was probably meant.

    Args:
        schedule: the noise schedule.
        parameterization: ``eps``, ``x0`` or ``v`` (all ones).

    Returns:
        float32 (T,); the first entry, infinite for ``eps``, is replaced by the second.

    Raises:
        ValueError: unknown parameterisation.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 12 (``eps``).
    """
    tables = schedule.tensors()
    if parameterization == "eps":
        betas, alphas_cumprod = tables["betas"], tables["alphas_cumprod"]
        weights = betas**2 / (2 * tables["posterior_variance"] * (1 - betas) * (1 - alphas_cumprod))
    elif parameterization == "x0":
        weights = 0.5 * tables["alphas_cumprod"].sqrt() / (2.0 - tables["alphas_cumprod"])
    elif parameterization == "v":
        weights = torch.ones_like(tables["betas"])
    else:
        raise ValueError(unknown_parameterization(parameterization))
    weights[0] = weights[min(1, len(weights) - 1)]
    return weights


@dataclass(frozen=True)
class LossParts:
    """A batch's loss and what it is made of; each a scalar tensor.

    Attributes:
        loss: what is minimised.
        loss_simple: mean error, unweighted.
        loss_vlb: mean error under the variational bound's weights.
        loss_gamma: mean error under the learned log-variance.
    """

    loss: Tensor
    loss_simple: Tensor
    loss_vlb: Tensor
    loss_gamma: Tensor


def combine(
    errors: Tensor,
    logvar: Tensor,
    vlb_weights: Tensor,
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
) -> LossParts:
    """Combine the errors of a batch to its loss.

    loss = l_simple_weight * mean(L / exp(logvar) + logvar) + original_elbo_weight * mean(vlb_weights * L).

    Args:
        errors: (B,) mean error L of each picture.
        logvar: (B,) log-variance at each picture's timestep.
        vlb_weights: (B,) weight of the variational bound there.
        l_simple_weight: weight of the simple term.
        original_elbo_weight: weight of the variational term.

    Returns:
        The loss and its parts.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 12 and 14; Rombach et al. 2022, arXiv 2112.10752, eq. 2.
    """
    loss_gamma = (errors / torch.exp(logvar) + logvar).mean()
    loss_vlb = (vlb_weights * errors).mean()
    return LossParts(
        loss=l_simple_weight * loss_gamma + original_elbo_weight * loss_vlb,
        loss_simple=errors.mean(),
        loss_vlb=loss_vlb,
        loss_gamma=loss_gamma,
    )
