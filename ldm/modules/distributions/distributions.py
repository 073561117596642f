"""The distributions that the autoencoder's posterior and the variational bound are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DiracDistribution:
    """A distribution with all its mass at one value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        """Return the value."""
        return self.value

    def mode(self) -> Tensor:
        """Return the value."""
        return self.value


class DiagonalGaussianDistribution:
    """A normal distribution with independent components, from stacked means and log-variances.

    Args:
        parameters: (B, 2C, H, W): means, then log-variances, which are clamped to [-30, 20].
        deterministic: take the variance as zero.

    Attributes:
        mean, logvar, std, var: (B, C, H, W).
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draw mean + std * noise.

        Args:
            noise: standard normals (B, C, H, W); drawn here if None.

        Returns:
            (B, C, H, W).
        """
        if noise is None:
            noise = torch.randn(self.mean.shape).to(device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Compute the Kullback-Leibler divergence from ``other``, or from the standard normal.

        Returns:
            (B,) in nats, summed over C, H and W; ``[0.]`` when deterministic.

        Reference:
            Kingma & Welling 2013, arXiv 1312.6114, appendix B.
        """
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            terms = (
                (self.mean - other.mean).square() / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
            )
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: tuple[int, ...] | list[int] = (1, 2, 3)) -> Tensor:
        """Compute the negative log-likelihood of a sample in nats, summed over ``dims``."""
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=tuple(dims))

    def mode(self) -> Tensor:
        """Return the mean."""
        return self.mean


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Compute KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) element by element, in nats.

    Args:
        mean1: mean of the first distribution.
        logvar1: its log-variance, of the same shape.
        mean2: mean of the second, a number or a tensor that broadcasts against the first.
        logvar2: its log-variance, likewise.

    Returns:
        A tensor of the broadcast shape.

    Reference:
        Ho et al. 2020, arXiv 2006.11239, eq. 5 (its terms).
    """
    mean2 = torch.as_tensor(mean2, dtype=mean1.dtype, device=mean1.device)
    logvar2 = torch.as_tensor(logvar2, dtype=mean1.dtype, device=mean1.device)
    logvar1 = torch.as_tensor(logvar1, dtype=mean1.dtype, device=mean1.device)
    return 0.5 * (
        logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + (mean1 - mean2).square() * torch.exp(-logvar2)
    )
