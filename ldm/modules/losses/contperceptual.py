"""The loss of autoencoders with a normal posterior."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, named, weighted


class LPIPSWithDiscriminator(AdversarialLoss):
    """Likelihood of the pictures under a Laplace-like decoder, KL divergence, and adversarial loss.

    Args:
        disc_start: step from which the discriminator counts.
        logvar_init: initial logarithm of the decoder's scale, which is learned with the generator.
        kl_weight: weight of the KL divergence.
        pixelloss_weight: accepted for CompVis configs; unused there too.
        disc_num_layers, disc_in_channels, disc_factor, disc_weight, perceptual_weight, use_actnorm,
        disc_conditional, disc_loss: see :class:`~ldm.modules.losses.adversarial.AdversarialLoss`.

    Reference:
        Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: Literal["hinge", "vanilla"] = "hinge",
    ) -> None:
        super().__init__(
            disc_start,
            disc_num_layers,
            disc_in_channels,
            disc_factor,
            disc_weight,
            perceptual_weight,
            use_actnorm,
            disc_conditional,
            disc_loss,
        )
        self.kl_weight = kl_weight
        self.pixel_weight = pixelloss_weight
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)))

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | float | None = None,
        loss_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the autoencoder or of the discriminator.

        Args:
            inputs: pictures (B, C, H, W) in [-1, 1].
            reconstructions: (B, C, H, W).
            posteriors: what the reconstructions' latents were drawn from.
            optimizer_idx: 0 for the autoencoder's loss, 1 for the discriminator's.
            global_step: steps of the autoencoder so far.
            last_layer: the decoder's last weights.
            cond: condition (B, C', H, W) for a conditional discriminator.
            split: prefix of the logged names.
            weights: weights of the pictures' likelihoods: (B,), or what broadcasts against (B, C, H, W).
            loss_weight: (B,) weights of the pictures in every term; 1 if None.

        Returns:
            The scalar loss (summed over pixels and channels, averaged over pictures), and what to log; of that the
            totals and adversarial losses alone are weighted.
        """
        if optimizer_idx == 1:
            return self.discriminator_step(inputs, reconstructions, global_step, cond, split, loss_weight)
        error = torch.abs(inputs.contiguous() - reconstructions.contiguous())
        error, _ = self.reconstruction_error(error, inputs, reconstructions)
        each_nll = error / torch.exp(self.logvar) + self.logvar
        nll = each_nll.sum() / len(inputs)
        if isinstance(weights, Tensor) and weights.ndim == 1:
            weights = weights.reshape(-1, 1, 1, 1)
        counted_nll = nll if loss_weight is None else weighted(each_nll, loss_weight).sum() / len(inputs)
        weighted_nll = counted_nll
        if weights is not None:
            weighted_nll = (weights * weighted(each_nll, loss_weight)).sum() / len(inputs)
        each_kl = posteriors.kl()
        kl = each_kl.sum() / len(inputs)
        counted_kl = kl if loss_weight is None else (loss_weight * each_kl).sum() / len(inputs)
        g_loss = self.generator_loss(reconstructions, cond, loss_weight)
        if self.disc_factor > 0:
            weight = self.calculate_adaptive_weight(counted_nll, g_loss, last_layer)
        else:
            weight = torch.zeros((), device=nll.device)
        factor = self.factor_at(global_step)
        loss = weighted_nll + self.kl_weight * counted_kl + weight * factor * g_loss
        return loss, named(
            split,
            # A copy: gradient accumulation may scale the loss in place.
            total_loss=loss.detach().clone(),
            logvar=self.logvar.detach().clone(),
            kl_loss=kl.detach(),
            nll_loss=nll.detach().clone(),
            rec_loss=error.detach().mean(),
            d_weight=weight,
            disc_factor=torch.tensor(factor),
            g_loss=g_loss.detach(),
        )
