"""The loss of vector-quantised autoencoders."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.losses.adversarial import AdversarialLoss, named, weighted


def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Measure how evenly a codebook is used.

    Args:
        predicted_indices: int64 codes of any shape.
        n_embed: size of the codebook.

    Returns:
        The perplexity (``n_embed`` where all codes are used alike, 1 where one is), and the number of
        codes that occur.
    """
    shares = F.one_hot(predicted_indices.reshape(-1), n_embed).float().mean(dim=0)
    perplexity = torch.exp(-(shares * torch.log(shares + 1e-10)).sum())
    return perplexity, (shares > 0).sum()


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction error, codebook loss and adversarial loss.

    Args:
        disc_start: step from which the discriminator counts.
        codebook_weight: weight of the codebook loss.
        pixelloss_weight: accepted for CompVis configs; unused there too.
        disc_num_layers, disc_in_channels, disc_factor, disc_weight, perceptual_weight, use_actnorm,
        disc_conditional, disc_loss, disc_ndf: see :class:`~ldm.modules.losses.adversarial.AdversarialLoss`.
        n_classes: size of the codebook: with it the codebook's use is logged.
        perceptual_loss: ``lpips``, the only one.
        pixel_loss: ``l1`` or ``l2``.

    Raises:
        ValueError: unknown ``perceptual_loss`` or ``pixel_loss``.

    Reference:
        Esser et al. 2021, arXiv 2012.09841, section 3.1, eqs. 5 to 7.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: Literal["hinge", "vanilla"] = "hinge",
        n_classes: int | None = None,
        perceptual_loss: Literal["lpips"] = "lpips",
        pixel_loss: Literal["l1", "l2"] = "l1",
    ) -> None:
        if perceptual_loss != "lpips":
            raise ValueError(f"lossconfig.params.perceptual_loss is '{perceptual_loss}'; use lpips")
        if pixel_loss not in ("l1", "l2"):
            raise ValueError(f"lossconfig.params.pixel_loss is '{pixel_loss}'; use one of l1, l2")
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
            disc_ndf,
        )
        self.codebook_weight = codebook_weight
        self.pixel_weight = pixelloss_weight
        self.n_classes = n_classes
        self.pixel_loss = pixel_loss

    def forward(
        self,
        codebook_loss: Tensor | None,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
        loss_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the autoencoder or of the discriminator.

        Args:
            codebook_loss: the quantiser's loss; None counts as 0.
            inputs: pictures (B, C, H, W) in [-1, 1].
            reconstructions: (B, C, H, W).
            optimizer_idx: 0 for the autoencoder's loss, 1 for the discriminator's.
            global_step: steps of the autoencoder so far.
            last_layer: the decoder's last weights.
            cond: condition (B, C', H, W) for a conditional discriminator.
            split: prefix of the logged names.
            predicted_indices: int64 codes, for the log of the codebook's use.
            loss_weight: (B,) weights of the pictures in every term; 1 if None. The quantiser gives one number for the
                batch, which is weighed by their mean.

        Returns:
            The scalar loss (averaged over pixels, channels and pictures), and what to log; of that the totals and
            adversarial losses alone are weighted.
        """
        if optimizer_idx == 1:
            return self.discriminator_step(inputs, reconstructions, global_step, cond, split, loss_weight)
        codebook = torch.zeros((), device=inputs.device) if codebook_loss is None else codebook_loss.mean()
        difference = inputs.contiguous() - reconstructions.contiguous()
        error = difference.abs() if self.pixel_loss == "l1" else difference.square()
        error, distance = self.reconstruction_error(error, inputs, reconstructions)
        nll = error.mean()
        counted_nll, counted_codebook = nll, codebook
        if loss_weight is not None:
            counted_nll, counted_codebook = weighted(error, loss_weight).mean(), codebook * loss_weight.mean()
        g_loss = self.generator_loss(reconstructions, cond, loss_weight)
        weight = self.calculate_adaptive_weight(counted_nll, g_loss, last_layer)
        factor = self.factor_at(global_step)
        loss = counted_nll + weight * factor * g_loss + self.codebook_weight * counted_codebook
        logged = named(
            split,
            # A copy: gradient accumulation may scale the loss in place.
            total_loss=loss.detach().clone(),
            quant_loss=codebook.detach(),
            nll_loss=nll.detach(),
            rec_loss=error.detach().mean(),
            p_loss=distance.detach().mean(),
            d_weight=weight,
            disc_factor=torch.tensor(factor),
            g_loss=g_loss.detach(),
        )
        if predicted_indices is not None and self.n_classes is not None:
            perplexity, usage = measure_perplexity(predicted_indices, self.n_classes)
            logged |= named(split, perplexity=perplexity, cluster_usage=usage.float())
        return loss, logged
