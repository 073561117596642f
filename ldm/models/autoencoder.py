"""First stages: autoencoders between pictures and latents."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import load_weights, read_weights
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config


def _refuse_unknown_keys(ddconfig: Mapping[str, Any]) -> None:
    known = list(inspect.signature(Encoder).parameters)
    known += [name for name in inspect.signature(Decoder).parameters if name not in known]
    for key in ddconfig:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; known keys: {', '.join(known)}"
            raise ValueError(f"first_stage_config: ddconfig has no key '{key}'{hint}")


def _arguments(ddconfig: Mapping[str, Any], half: type[nn.Module]) -> dict[str, Any]:
    """Pick what one half takes: the two share a ddconfig, and each has keys that the other lacks."""
    taken = inspect.signature(half).parameters
    return {str(key): value for key, value in ddconfig.items() if key in taken}


class AutoencoderKL(pl.LightningModule):
    """Autoencoder with a normal posterior that is pulled towards the standard normal.

    Args:
        ddconfig: arguments of :class:`~ldm.modules.diffusionmodules.model.Encoder` and ``Decoder``.
        lossconfig: ``{target, params}`` of the training loss; ``torch.nn.Identity`` where it is not trained.
        embed_dim: channels of the latent.
        ckpt_path: weights to load.
        ignore_keys: prefixes of keys in that file to pass over.
        image_key: name of the pictures in a batch.
        colorize_nlabels: number of label colours for logging segmentation maps.
        monitor: metric that checkpoints are chosen by.

    Raises:
        ValueError: ``ddconfig`` holds an unknown key, or ``double_z`` is not true.

    Reference:
        Rombach et al. 2022, arXiv 2112.10752, section 3.1; Kingma & Welling 2013, arXiv 1312.6114.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        _refuse_unknown_keys(ddconfig)
        if not ddconfig.get("double_z", True):
            raise ValueError("first_stage_config: ddconfig.double_z must be true: the posterior has a variance")
        self.image_key = image_key
        self.encoder = Encoder(**_arguments(ddconfig, Encoder))
        self.decoder = Decoder(**_arguments(ddconfig, Decoder))
        self.loss = instantiate_from_config(lossconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.embed_dim = embed_dim
        self.downsampling_factor = 2 ** (len(ddconfig["ch_mult"]) - 1)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        self.monitor = monitor
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights from a file, strictly, but for keys that begin with an entry of ``ignore_keys``."""
        weights = {key: value for key, value in read_weights(path).items() if not key.startswith(tuple(ignore_keys))}
        load_weights(self, weights, source=path)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Encode pictures (B, C, H, W) in [-1, 1] to the posterior over latents (B, embed_dim, H/f, W/f)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, embed_dim, h, w), unscaled, to pictures (B, C, h*f, w*f)."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Encode and decode.

        Args:
            input: pictures (B, C, H, W) in [-1, 1].
            sample_posterior: decode a sample instead of the mode.

        Returns:
            Reconstructions of the input's shape, and the posterior.
        """
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def get_last_layer(self) -> Tensor:
        """Return the decoder's last weights, by which adversarial losses are balanced."""
        return self.decoder.conv_out.weight


class IdentityFirstStage(nn.Module):
    """A first stage that leaves pictures as they are, for diffusion on pixels.

    Args:
        vq_interface: also offer ``quantize``.
    """

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()
        self.vq_interface = vq_interface
        self.downsampling_factor = 1

    def encode(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def decode(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def quantize(self, x: Tensor) -> Any:
        """Return x, in the shape of a quantiser's answer where ``vq_interface`` is set."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x
