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


def _from_x0_weights(weights: Tensor, snr: Tensor, parameterization: str) -> Tensor:
    """Word weights on the error of x_0 as weights on the error of what the network predicts.

    The errors' squares are proportional: 1 for x_0, SNR for the noise, SNR + 1 for v.
    """
    if parameterization == "eps":
        return weights / snr
    if parameterization == "x0":
        return weights
    if parameterization == "v":
        return weights / (snr + 1.0)
    raise ValueError(unknown_parameterization(parameterization))


def _signal_to_noise_ratio(alphas_cumprod: Tensor) -> Tensor:
    return alphas_cumprod / (1.0 - alphas_cumprod)


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, parameterization: str) -> Tensor:
    """Compute the min-SNR-gamma weights: min(SNR, gamma) on the error of x_0.

    Args:
        alphas_cumprod: alpha-bar at some timesteps, of any shape.
        gamma: bound on the weight, above 0; the paper's is 5.
        parameterization: ``eps``, ``x0`` or ``v``.

    Returns:
        The weights, of that shape.

    Raises:
        ValueError: unknown parameterisation.

    Reference:
        Hang et al. 2023, arXiv 2303.09556, section 3.4.
    """
    snr = _signal_to_noise_ratio(alphas_cumprod)
    return _from_x0_weights(snr.clamp(max=gamma), snr, parameterization)


def debiased_weights(alphas_cumprod: Tensor, parameterization: str) -> Tensor:
    """Compute the weights of debiased estimation: 1 / sqrt(SNR) on the error of the noise.

    Args:
        alphas_cumprod: alpha-bar at some timesteps, of any shape.
        parameterization: ``eps``, ``x0`` or ``v``.

    Returns:
        The weights, of that shape.

    Raises:
        ValueError: unknown parameterisation.

    Reference:
        Yu et al. 2023, arXiv 2310.08442, section 3.
    """
    snr = _signal_to_noise_ratio(alphas_cumprod)
    return _from_x0_weights(snr.sqrt(), snr, parameterization)


def offset_noise(noise: Tensor, offsets: Tensor, strength: float) -> Tensor:
    """Shift each channel of each picture's noise by a normal draw, so that overall brightness is learnt too.

    Args:
        noise: standard normals (B, C, H, W).
        offsets: standard normals (B, C, 1, 1).
        strength: standard deviation of the shift; 0.05 to 0.1 is usual.

    Returns:
        (B, C, H, W).

    Reference:
        Guttenberg 2023, "Diffusion with Offset Noise" (crosslabs.org); Lin et al. 2023, arXiv 2305.08891, section 6.
    """
    return noise + strength * offsets


def perturbed_noise(noise: Tensor, perturbation: Tensor, strength: float) -> Tensor:
    """Perturb the noise that the network is shown, while its target stays the noise itself.

    Args:
        noise: standard normals (B, C, H, W).
        perturbation: standard normals of the same shape.
        strength: standard deviation of the perturbation; the paper's is 0.1.

    Returns:
        (B, C, H, W).

    Reference:
        Ning et al. 2023, arXiv 2301.11706, algorithm 1.
    """
    return noise + strength * perturbation


@dataclass(frozen=True)
class LossParts:
    """A batch's loss and what it is made of; each a scalar tensor.

    Attributes:
        loss: what is minimised.
        loss_shown: the same, divided by the pictures that are no fillers.
        loss_simple: mean error, unweighted.
        loss_vlb: mean error under the variational bound's weights.
        loss_gamma: mean error under the learned log-variance.
    """

    loss: Tensor
    loss_shown: Tensor
    loss_simple: Tensor
    loss_vlb: Tensor
    loss_gamma: Tensor


def combine(
    errors: Tensor,
    logvar: Tensor,
    vlb_weights: Tensor,
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
    weights: Tensor | float = 1.0,
    loss_weight: Tensor | None = None,
) -> LossParts:
    """Combine the errors of a batch to its loss.

    loss = mean(p (l_simple_weight * (w L / exp(logvar) + logvar) + original_elbo_weight * vlb_weights * L)).

    The other parts are means over the pictures that are no fillers, and leave p out: so they can be compared between
    runs that weigh their folders otherwise.

    Args:
        errors: (B,) mean error L of each picture.
        logvar: (B,) log-variance at each picture's timestep.
        vlb_weights: (B,) weight of the variational bound there.
        l_simple_weight: weight of the simple term.
        original_elbo_weight: weight of the variational term.
        weights: (B,) weight w of the simple term at each picture's timestep.
        loss_weight: (B,) weight p of each picture, 0 for a filler; 1 if None.

    Returns:
        The loss and its parts.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 12 and 14; Rombach et al. 2022, arXiv 2112.10752, eq. 2.
    """
    each_gamma = weights * errors / torch.exp(logvar) + logvar
    each_vlb = vlb_weights * errors
    if loss_weight is None:
        loss_weight = torch.ones_like(errors)
    real = (loss_weight > 0).to(errors.dtype)
    # A factor behind the mean, not a sum over a count: it is exactly 1 where all are real. A batch of fillers gives 0.
    rows_to_real = len(errors) / real.sum().clamp(min=1.0)
    gamma, vlb = (loss_weight * each_gamma).mean(), (loss_weight * each_vlb).mean()
    loss = l_simple_weight * gamma + original_elbo_weight * vlb
    return LossParts(
        loss=loss,
        loss_shown=loss * rows_to_real,
        loss_simple=(real * errors).mean() * rows_to_real,
        loss_vlb=(real * each_vlb).mean() * rows_to_real,
        loss_gamma=(real * each_gamma).mean() * rows_to_real,
    )
