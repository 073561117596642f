"""What the two first-stage losses share: reconstruction, discriminator, and the balance between them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.losses.vqperceptual import hinge_d_loss, vanilla_d_loss
from torch import Tensor, nn

from ldm.modules.losses.lpips import LocalLPIPS

DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
SMALLEST_GRADIENT = 1e-4
LARGEST_WEIGHT = 1e4


class AdversarialLoss(nn.Module):
    """A perceptual distance and a patch discriminator.

    Args:
        disc_start: step from which the discriminator counts.
        disc_num_layers: its layers that halve the size.
        disc_in_channels: channels of what it looks at (those of the pictures and of the condition).
        disc_factor: factor on both adversarial losses from ``disc_start`` on.
        disc_weight: factor on the generator's adversarial loss, beside the adaptive weight.
        perceptual_weight: weight of LPIPS beside the absolute error; 0 leaves LPIPS out.
        use_actnorm: normalise by ActNorm instead of batch statistics.
        disc_conditional: show the discriminator the condition too.
        disc_loss: ``hinge`` or ``vanilla``.
        disc_ndf: channels of its first layer.

    Raises:
        ValueError: unknown ``disc_loss``, or a negative ``perceptual_weight``.
        OSError: ``perceptual_weight`` is above 0 and the weights of LPIPS are not on this machine.

    Reference:
        Esser et al. 2021, arXiv 2012.09841, section 3.1.
    """

    def __init__(
        self,
        disc_start: int,
        disc_num_layers: int,
        disc_in_channels: int,
        disc_factor: float,
        disc_weight: float,
        perceptual_weight: float,
        use_actnorm: bool,
        disc_conditional: bool,
        disc_loss: Literal["hinge", "vanilla"],
        disc_ndf: int = 64,
    ) -> None:
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise ValueError(f"lossconfig.params.disc_loss is '{disc_loss}'; use one of hinge, vanilla")
        if perceptual_weight < 0:
            raise ValueError(f"lossconfig.params.perceptual_weight is {perceptual_weight}; it must be 0 or more")
        self.perceptual_weight = perceptual_weight
        if perceptual_weight > 0:
            self.perceptual_loss = LocalLPIPS()
        self.discriminator = NLayerDiscriminator(
            input_nc=disc_in_channels, n_layers=disc_num_layers, use_actnorm=use_actnorm, ndf=disc_ndf
        ).apply(weights_init)
        self.discriminator_iter_start = disc_start
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional

    def factor_at(self, global_step: int) -> float:
        """Give the adversarial losses' factor at a step: 0 before ``disc_start``."""
        return self.disc_factor if global_step >= self.discriminator_iter_start else 0.0

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None = None) -> Tensor:
        """Balance reconstruction and adversarial loss by their gradients at the decoder's last layer.

        Args:
            nll_loss: scalar reconstruction loss.
            g_loss: scalar adversarial loss of the generator.
            last_layer: weights of the last layer; may be left out where nothing is trained.

        Returns:
            A scalar without gradient; 0 in evaluation where the losses' gradients do not reach the last layer.

        Raises:
            ValueError: they do not reach it in training.

        Reference:
            Esser et al. 2021, arXiv 2012.09841, eq. 7.
        """
        gradients = [_gradient(value, last_layer) for value in (nll_loss, g_loss)]
        if gradients[0] is None or gradients[1] is None:
            if self.training and torch.is_grad_enabled():
                raise ValueError("the adaptive weight needs last_layer, the weights that made the reconstructions")
            return torch.zeros((), device=nll_loss.device)
        ratio = gradients[0].norm() / (gradients[1].norm() + SMALLEST_GRADIENT)
        weight = ratio.clamp(0.0, LARGEST_WEIGHT).detach()
        return weight * self.discriminator_weight

    def judge(self, pictures: Tensor, cond: Tensor | None) -> Tensor:
        """Apply the discriminator to pictures (B, C, H, W), beside their condition where it wants one.

        Returns:
            Logits (B, 1, h, w), one a patch; high for real.

        Raises:
            ValueError: a condition is missing, or there is one that is not wanted.
        """
        if self.disc_conditional != (cond is not None):
            given = "without" if cond is None else "with"
            raise ValueError(f"disc_conditional is {self.disc_conditional}, and the loss is called {given} cond")
        return self.discriminator(pictures if cond is None else torch.cat((pictures, cond), dim=1))

    def generator_loss(self, reconstructions: Tensor, cond: Tensor | None, loss_weight: Tensor | None = None) -> Tensor:
        """Give the generator's adversarial loss: minus the mean logit of its pictures, each by its weight (B,)."""
        return -weighted(self.judge(reconstructions.contiguous(), cond), loss_weight).mean()

    def discriminator_step(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        global_step: int,
        cond: Tensor | None,
        split: str,
        loss_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the discriminator's loss on real pictures and reconstructions, and what to log."""
        logits_real = self.judge(inputs.detach().contiguous(), cond)
        logits_fake = self.judge(reconstructions.detach().contiguous(), cond)
        if loss_weight is None:
            judgement = self.disc_loss(logits_real, logits_fake)
        else:
            singly = [self.disc_loss(*pair) for pair in zip(logits_real, logits_fake, strict=True)]
            judgement = (loss_weight * torch.stack(singly)).mean()
        loss: Tensor = self.factor_at(global_step) * judgement
        return loss, named(
            split,
            disc_loss=loss.detach().clone(),
            logits_real=logits_real.detach().mean(),
            logits_fake=logits_fake.detach().mean(),
        )

    def reconstruction_error(self, error: Tensor, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Add the perceptual distance to an error of each pixel.

        Returns:
            The sum (B, C, H, W), and the distance (B, 1, 1, 1), or 0 where it is left out.
        """
        if self.perceptual_weight == 0:
            return error, torch.zeros(1, device=error.device)
        distance = self.perceptual_loss(inputs.contiguous(), reconstructions.contiguous())
        return error + self.perceptual_weight * distance, distance


def _gradient(value: Tensor, weights: Tensor | None) -> Tensor | None:
    """Differentiate a scalar by weights, which it need not depend on."""
    if weights is None or not (value.requires_grad and weights.requires_grad):
        return None
    return torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)[0]


def weighted(values: Tensor, loss_weight: Tensor | None) -> Tensor:
    """Weigh what belongs to pictures (B, ...) by a weight each (B,); None leaves it as it is."""
    return values if loss_weight is None else values * loss_weight.reshape(-1, *([1] * (values.ndim - 1)))


def named(split: str, **figures: Any) -> dict[str, Tensor]:
    """Put figures under a split's name."""
    return {f"{split}/{name}": value for name, value in figures.items()}
