"""First stages: autoencoders between pictures and latents."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm import exposure
from ldm.checkpoint import load_weights, read_weights
from ldm.models.keyed_batches import batch_exposures, count_real, loss_weights, move_draw, move_pictures
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import Schedule, instantiate_from_config

Batch = Mapping[str, Any]

ADAM_BETAS: Final = (0.5, 0.9)
COMMITMENT: Final = 0.25
"""Weight of the quantiser's second term."""

AUTOENCODER, DISCRIMINATOR = 0, 1
"""The two optimisers' numbers, as the losses know them."""

POSTERIOR_DRAWS: Final = {AUTOENCODER: "posterior", DISCRIMINATOR: "posterior_discriminator"}
"""What the posterior is drawn for: the two optimisers see two samples."""


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


@dataclass(frozen=True)
class _Pictures:
    """A batch's pictures, without its fillers; or the fillers, where there is nothing else.

    Attributes:
        x: (n, C, H, W) in [-1, 1].
        exposures: int64 (n, 4).
        weights: (n,) how much each counts; None where each counts 1.
        rows: pictures of the batch, fillers included.
        real: how many are no fillers: n, or 0; see :func:`~ldm.models.keyed_batches.count_real`.
    """

    x: Tensor
    exposures: Tensor
    weights: Tensor | None
    rows: int
    real: float


def _weighing(loss_weight: Tensor | None) -> dict[str, Tensor]:
    """Word the pictures' weights as a loss's argument; losses of CompVis' signature do without where all are 1."""
    return {} if loss_weight is None else {"loss_weight": loss_weight}


def _uncounted() -> None:
    """Stand in for Lightning's count of optimiser steps."""


class _Autoencoder(pl.LightningModule, ABC):
    """What all autoencoders share: how they are built, loaded, trained and logged.

    Autoencoder and discriminator are trained in turn on every batch, the discriminator on a
    reconstruction by the autoencoder's new weights. A step of a run is one of the autoencoder: the
    discriminator's are not counted, so that ``max_steps``, ``disc_start`` and the names of checkpoints mean what
    they mean for every other model.

    Subclasses say how to reconstruct, and how their loss is called.

    Reference:
        Esser et al. 2021, arXiv 2012.09841, section 3.1.
    """

    colorize: Tensor
    model_ema: LitEma
    accumulates_and_clips: Final = True
    """Tells the run that this model applies the trainer's accumulation and gradient clipping itself."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        image_key: str,
        colorize_nlabels: int | None,
        monitor: str | None,
    ) -> None:
        super().__init__()
        _refuse_unknown_keys(ddconfig)
        self.automatic_optimization = False
        self.learning_rate = 0.0
        self.lr_g_factor = 1.0
        self.scheduler_config: Mapping[str, Any] | None = None
        self.use_ema = False
        self.image_key = image_key
        self.embed_dim = embed_dim
        self.monitor = monitor
        self.downsampling_factor = 2 ** (len(ddconfig["ch_mult"]) - 1)
        self.encoder = Encoder(**_arguments(ddconfig, Encoder))
        self.decoder = Decoder(**_arguments(ddconfig, Decoder))
        self.loss = instantiate_from_config(lossconfig, nn.Module)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights from a file, strictly, but for keys that begin with an entry of ``ignore_keys``.

        Args:
            path: ``.ckpt`` or ``.safetensors``.
            ignore_keys: prefixes to pass over.

        Raises:
            OSError, ValueError: see :mod:`ldm.checkpoint`.
        """
        weights = {key: value for key, value in read_weights(path).items() if not key.startswith(tuple(ignore_keys))}
        load_weights(self, weights, source=path)

    def get_last_layer(self) -> Tensor:
        """Return the decoder's last weights, by which adversarial losses are balanced."""
        return self.decoder.conv_out.weight

    def get_input(self, batch: Batch, k: str) -> Tensor:
        """Take pictures or maps from a batch: (B, H, W) or (B, H, W, C) -> float32 (B, C, H, W)."""
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        return rearrange(x, "b h w c -> b c h w").contiguous().float().to(self.device)

    def check_size(self, x: Tensor) -> None:
        """Refuse pictures (B, C, H, W) that would lose their last rows or columns in being encoded.

        Raises:
            ValueError: height or width does not divide by the pixels that a latent cell is wide.
        """
        height, width = x.shape[2:]
        if height % self.downsampling_factor or width % self.downsampling_factor:
            raise ValueError(
                f"pictures of {width}x{height} pixels cannot be encoded: width and height must be multiples of "
                f"{self.downsampling_factor} for this first stage; choose another size, or resize_mode: squash"
            )

    @abstractmethod
    def reconstruct(self, x: Tensor, exposures: Tensor, purpose: str) -> tuple[Any, ...]:
        """Reconstruct pictures, with all that the loss needs beside the reconstructions.

        Args:
            x: pictures (B, C, H, W) in [-1, 1].
            exposures: int64 (B, 4): what random draws hang on.
            purpose: what the draws are for.

        Returns:
            Reconstructions (B, C, H, W), and what :meth:`compute_loss` needs beside them.
        """

    @abstractmethod
    def compute_loss(
        self,
        x: Tensor,
        reconstructed: tuple[Any, ...],
        optimizer_idx: int,
        step: int,
        split: str,
        loss_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the loss on what :meth:`reconstruct` returned; ``loss_weight`` (B,) is how much each picture counts."""

    # --- Lightning -----------------------------------------------------------------------------------------

    def _exposures(self, batch: Batch, batch_idx: int) -> Tensor:
        return batch_exposures(
            batch, self.image_key, batch_idx, self.current_epoch, self.global_rank, training=self.training
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device, but for what is needed on the CPU."""
        move = super().transfer_batch_to_device
        return move_pictures(batch, lambda rest: move(rest, device, dataloader_idx))

    def _pictures(self, batch: Batch, batch_idx: int) -> _Pictures:
        """Take a batch's pictures without its fillers, which no loss then has to tell from the others."""
        x, exposures = self.get_input(batch, self.image_key), self._exposures(batch, batch_idx)
        weights = loss_weights(batch, len(x))
        count = count_real(weights, len(x))
        if weights is None or count == 0:
            return _Pictures(x, exposures, None, len(x), count)
        real = weights > 0
        weights = weights[real]
        return _Pictures(
            x=x[real.to(x.device)],
            exposures=exposures[real],
            weights=None if bool((weights == 1).all()) else move_draw(weights, x.device),
            rows=len(x),
            real=count,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Train the autoencoder, then the discriminator, on a batch.

        Gradients are gathered over ``accumulate_grad_batches`` batches for both. Fillers count nothing, and are
        not logged: each loss is the sum of the pictures' weighted losses over all rows of the batch.
        """
        pictures = self._pictures(batch, batch_idx)
        accumulate = self.trainer.accumulate_grad_batches
        steps = (batch_idx + 1) % accumulate == 0 or self.trainer.is_last_batch
        before = self.global_step
        optimizers: Any = self.optimizers()
        optimizers[DISCRIMINATOR]._on_before_step = _uncounted
        optimizers[DISCRIMINATOR]._on_after_step = _uncounted
        losses = []
        for number, name in ((AUTOENCODER, "aeloss"), (DISCRIMINATOR, "discloss")):
            optimizer = optimizers[number]
            self.toggle_optimizer(optimizer)
            with torch.set_grad_enabled(number == AUTOENCODER):
                reconstructed = self.reconstruct(pictures.x, pictures.exposures, POSTERIOR_DRAWS[number])
            loss, logged = self.compute_loss(pictures.x, reconstructed, number, before, "train", pictures.weights)
            if pictures.real:
                shown = {name: loss.detach().clone()}
                self.log_dict(shown, on_step=True, on_epoch=True, batch_size=pictures.real)  # type: ignore[arg-type]
                self.log_dict(logged, on_step=True, on_epoch=False, batch_size=pictures.real)  # type: ignore[arg-type]
            loss = loss * (pictures.real / pictures.rows)
            losses.append(loss.detach().clone())
            self.manual_backward(loss / accumulate)
            if steps:
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        if steps:
            self._after_steps()
        # The share of a step's loss, as Lightning hands it on for models that it optimises itself.
        return {"loss": losses[AUTOENCODER] / accumulate}

    def _after_steps(self) -> None:
        """Move the learning rates and the averaged weights on."""
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()
        if self.use_ema:
            self.model_ema(self)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip gradients as the trainer's ``gradient_clip_val`` and ``gradient_clip_algorithm`` say."""
        self.clip_gradients(optimizer)

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log both losses with the live weights under ``val/``, and with the averaged ones under ``val_ema/``."""
        self._log_evaluation(batch, batch_idx, "val")

    @torch.no_grad()
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the figures of :meth:`validation_step` under ``test/``."""
        self._log_evaluation(batch, batch_idx, "test")

    def _log_evaluation(self, batch: Batch, batch_idx: int, split: str) -> None:
        pictures = self._pictures(batch, batch_idx)
        figures = self._evaluate(pictures, split)
        if self.use_ema:
            with self.ema_scope():
                figures |= self._evaluate(pictures, f"{split}_ema")
        # Fillers too are logged, with a count of 0: the devices average together, so each has to know every name.
        self.log_dict(figures, on_step=False, on_epoch=True, batch_size=pictures.real, sync_dist=True)  # type: ignore[arg-type]

    def _evaluate(self, pictures: _Pictures, split: str) -> dict[str, Tensor]:
        reconstructed = self.reconstruct(pictures.x, pictures.exposures, POSTERIOR_DRAWS[AUTOENCODER])
        arguments = (self.global_step, split, pictures.weights)
        loss, figures = self.compute_loss(pictures.x, reconstructed, AUTOENCODER, *arguments)
        _, judged = self.compute_loss(pictures.x, reconstructed, DISCRIMINATOR, *arguments)
        return {**figures, **judged, f"{split}/aeloss": loss}

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Swap the averaged weights in for the time of a ``with`` block; nothing happens without EMA."""
        if not self.use_ema:
            yield
            return
        with self.model_ema.swapped_into(self):
            yield

    def configure_optimizers(self) -> Any:
        """Build Adam for the autoencoder (with what its loss learns), and for the discriminator.

        Returns:
            The two optimisers, and their learning-rate schedules where there are any.

        Raises:
            ValueError: the loss has no discriminator.

        Reference:
            Kingma & Ba 2014, arXiv 1412.6980, algorithm 1.
        """
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is None:
            raise ValueError(
                f"model.params.lossconfig.target names {type(self.loss).__name__}, with which a first stage cannot be "
                "trained; write ldm.modules.losses.LPIPSWithDiscriminator (for AutoencoderKL), or "
                "ldm.modules.losses.VQLPIPSWithDiscriminator (for VQModel)"
            )
        judges = list(discriminator.parameters())
        known = {id(parameter) for parameter in judges}
        makers = [
            parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in known
        ]
        optimizers = [
            torch.optim.Adam(makers, lr=self.lr_g_factor * self.learning_rate, betas=ADAM_BETAS),
            torch.optim.Adam(judges, lr=self.learning_rate, betas=ADAM_BETAS),
        ]
        if self.scheduler_config is None:
            return optimizers, []
        schedule = instantiate_from_config(self.scheduler_config, Schedule)
        schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lr_lambda=schedule.schedule) for each in optimizers]
        return optimizers, [{"scheduler": each, "interval": "step", "frequency": 1} for each in schedulers]

    def to_rgb(self, x: Tensor) -> Tensor:
        """Colour maps of more than three channels for logging: (B, C, H, W) -> (B, 3, H, W) in [-1, 1]."""
        if x.shape[1] <= 3:
            return x
        colours = getattr(self, "colorize", None)
        if colours is None:
            colours = torch.randn(3, x.shape[1], 1, 1, generator=torch.Generator().manual_seed(0)).to(x)
        coloured = F.conv2d(x, colours)
        lowest, highest = coloured.min(), coloured.max()
        return 2.0 * (coloured - lowest) / (highest - lowest).clamp_min(1e-8) - 1.0


class AutoencoderKL(_Autoencoder):
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
        encode_slice: encode at most that many pictures at once: smaller in memory; all if None.

    Attributes:
        learning_rate: learning rate of both optimisers, set by the run.

    Raises:
        ValueError: ``ddconfig`` holds an unknown key, ``double_z`` is not true, or ``encode_slice`` is below 1.

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
        encode_slice: int | None = None,
    ) -> None:
        if not ddconfig.get("double_z", True):
            raise ValueError("first_stage_config: ddconfig.double_z must be true: the posterior has a variance")
        if encode_slice is not None and encode_slice < 1:
            raise ValueError(f"first_stage_config: encode_slice is {encode_slice}; give 1 or more, or null for all")
        super().__init__(ddconfig, lossconfig, embed_dim, image_key, colorize_nlabels, monitor)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.encode_slice = encode_slice
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Encode pictures (B, C, H, W) in [-1, 1] to the posterior over latents (B, embed_dim, H/f, W/f).

        Raises:
            ValueError: see :meth:`check_size`.
        """
        self.check_size(x)
        parts = x.split(self.encode_slice or len(x))
        moments = [self.quant_conv(self.encoder(part)) for part in parts]
        return DiagonalGaussianDistribution(moments[0] if len(moments) == 1 else torch.cat(moments))

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

    def reconstruct(self, x: Tensor, exposures: Tensor, purpose: str) -> tuple[Any, ...]:
        """Reconstruct pictures by a draw from their posterior; see the base class."""
        posterior = self.encode(x)
        noise = move_draw(exposure.randn(purpose, exposures, posterior.mean.shape[1:]), x.device)
        return self.decode(posterior.sample(noise.to(posterior.mean.dtype))), posterior

    def compute_loss(
        self,
        x: Tensor,
        reconstructed: tuple[Any, ...],
        optimizer_idx: int,
        step: int,
        split: str,
        loss_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the loss on what :meth:`reconstruct` returned; see the base class."""
        reconstructions, posterior = reconstructed
        return self.loss(
            x,
            reconstructions,
            posterior,
            optimizer_idx,
            step,
            last_layer=self.get_last_layer(),
            split=split,
            **_weighing(loss_weight),
        )

    @torch.no_grad()
    def log_images(self, batch: Batch, N: int = 8, only_inputs: bool = False) -> dict[str, Tensor]:
        """Make rows of pictures to look at.

        Args:
            batch: as the model is trained on.
            N: pictures of the batch to use, at most.
            only_inputs: leave out what the model makes of them.

        Returns:
            Pictures float32 (n, 3, H, W), about within [-1, 1], by name: ``inputs``, ``reconstructions``, and
            ``samples``, decoded from standard normals.
        """
        x = self.get_input(batch, self.image_key)[:N]
        rows = {"inputs": self.to_rgb(x)}
        if only_inputs:
            return rows
        reconstructions, posterior = self(x)
        samples = self.decode(torch.randn_like(posterior.mean))
        return {"samples": self.to_rgb(samples), "reconstructions": self.to_rgb(reconstructions), **rows}


class VQModel(_Autoencoder):
    """Autoencoder whose latents are entries of a learned codebook.

    Args:
        ddconfig: arguments of :class:`~ldm.modules.diffusionmodules.model.Encoder` and ``Decoder``;
            ``double_z`` must be false.
        lossconfig: ``{target, params}`` of the training loss; ``torch.nn.Identity`` where it is not trained.
        n_embed: number of codes.
        embed_dim: channels of a code.
        ckpt_path: weights to load.
        ignore_keys: prefixes of keys in that file to pass over.
        image_key: name of the pictures in a batch.
        colorize_nlabels: number of label colours for logging segmentation maps.
        monitor: metric that checkpoints are chosen by.
        batch_resize_range: train on pictures resized to a size between these two, in steps of 16 pixels.
        scheduler_config: ``{target, params}`` of a learning-rate schedule, for both optimisers.
        lr_g_factor: factor on the autoencoder's learning rate.
        remap: ``.npy`` file of the codes in use, by whose order codes are numbered.
        sane_index_shape: give codes as (B, h, w) instead of flat.
        use_ema: keep a moving average of all trained weights.

    Attributes:
        learning_rate: learning rate of the discriminator, set by the run.

    Raises:
        ValueError: ``ddconfig`` holds an unknown key, or ``double_z`` is not false.

    Reference:
        Esser et al. 2021, arXiv 2012.09841, section 3.1; van den Oord et al. 2017, arXiv 1711.00937, eq. 3.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: tuple[int, int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
    ) -> None:
        if ddconfig.get("double_z", True):
            raise ValueError("first_stage_config: ddconfig.double_z must be false: codes have no variance")
        super().__init__(ddconfig, lossconfig, embed_dim, image_key, colorize_nlabels, monitor)
        self.n_embed = n_embed
        from taming.modules.vqvae.quantize import VectorQuantizer2  # by VQ first stages alone

        # In its older form, which all published models were trained with, the factor is on the codebook's term.
        self.quantize = VectorQuantizer2(
            n_embed, embed_dim, beta=COMMITMENT, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.batch_resize_range = batch_resize_range
        self.scheduler_config = scheduler_config
        self.lr_g_factor = lr_g_factor
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> Any:
        """Encode pictures to codes.

        Args:
            x: (B, C, H, W) in [-1, 1].

        Returns:
            Latents (B, embed_dim, H/f, W/f) made of codes; the codebook loss; and a tuple whose last entry
            holds the codes, int64 (B*h*w,), or (B, h, w) with ``sane_index_shape``.
        """
        return self.quantize(self.encode_to_prequant(x))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Encode pictures (B, C, H, W) to latents (B, embed_dim, h, w) that are no codes yet.

        Raises:
            ValueError: see :meth:`check_size`.
        """
        self.check_size(x)
        return self.quant_conv(self.encoder(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Decode latents (B, embed_dim, h, w), as they are, to pictures (B, C, h*f, w*f)."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Decode codes, int64 (B, h, w), to pictures (B, C, h*f, w*f).

        Raises:
            ValueError: the codes have another shape.
        """
        if code_b.ndim != 3:
            raise ValueError(f"codes to decode must be (batch, height, width), not of shape {tuple(code_b.shape)}")
        quant = self.quantize.get_codebook_entry(code_b.reshape(-1), (*code_b.shape, self.embed_dim))
        return self.decoder(self.post_quant_conv(quant))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Encode, quantise and decode.

        Args:
            input: pictures (B, C, H, W) in [-1, 1].
            return_pred_indices: also return the codes.

        Returns:
            Reconstructions of the input's shape, the codebook loss, and the codes if asked for.
        """
        quant, codebook_loss, (_, _, indices) = self.quantize(self.encode_to_prequant(input))
        reconstructions = self.decoder(self.post_quant_conv(quant))
        return (reconstructions, codebook_loss, indices) if return_pred_indices else (reconstructions, codebook_loss)

    def reconstruct(self, x: Tensor, exposures: Tensor, purpose: str) -> tuple[Any, ...]:
        """Reconstruct pictures; see the base class. Nothing is drawn."""
        return self(x, return_pred_indices=True)

    def compute_loss(
        self,
        x: Tensor,
        reconstructed: tuple[Any, ...],
        optimizer_idx: int,
        step: int,
        split: str,
        loss_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the loss on what :meth:`reconstruct` returned; see the base class."""
        reconstructions, codebook_loss, indices = reconstructed
        return self.loss(
            codebook_loss,
            x,
            reconstructions,
            optimizer_idx,
            step,
            last_layer=self.get_last_layer(),
            split=split,
            predicted_indices=indices,
            **_weighing(loss_weight),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Train on a batch, resized first where ``batch_resize_range`` asks for it."""
        if self.batch_resize_range is not None:
            size = self._draw_size(self._exposures(batch, batch_idx))
            x = F.interpolate(self.get_input(batch, self.image_key), size=size, mode="bicubic")
            batch = {**batch, self.image_key: rearrange(x, "b c h w -> b h w c")}
        return super().training_step(batch, batch_idx)

    def _draw_size(self, exposures: Tensor) -> int:
        """Draw a batch's size; the first few are of the largest, so that memory runs out then or never."""
        lower, upper = self.batch_resize_range or (0, 0)
        sizes = range(lower, upper + 1, 16)
        if self.global_step <= 4:
            return upper
        return sizes[int(exposure.uniform("resize", exposures[0]) * len(sizes))]

    @torch.no_grad()
    def log_images(
        self, batch: Batch, N: int = 8, only_inputs: bool = False, plot_ema: bool = False
    ) -> dict[str, Tensor]:
        """Make rows of pictures to look at.

        Args:
            batch: as the model is trained on.
            N: pictures of the batch to use, at most.
            only_inputs: leave out what the model makes of them.
            plot_ema: also reconstruct with the averaged weights.

        Returns:
            Pictures float32 (n, 3, H, W), about within [-1, 1], by name: ``inputs``, ``reconstructions``,
            ``reconstructions_ema``.
        """
        x = self.get_input(batch, self.image_key)[:N]
        rows = {"inputs": self.to_rgb(x)}
        if only_inputs:
            return rows
        rows["reconstructions"] = self.to_rgb(self(x)[0])
        if plot_ema:
            with self.ema_scope():
                rows["reconstructions_ema"] = self.to_rgb(self(x)[0])
        return rows


class VQModelInterface(VQModel):
    """A :class:`VQModel` as a diffusion model uses it: latents are quantised on the way out, not on the way in."""

    def encode(self, x: Tensor) -> Tensor:
        """Encode pictures (B, C, H, W) in [-1, 1] to latents (B, embed_dim, h, w) that are no codes yet."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Decode latents to pictures.

        Args:
            h: (B, embed_dim, h, w).
            force_not_quantize: decode them as they are, instead of their nearest codes.

        Returns:
            (B, C, h*f, w*f).
        """
        quant = h if force_not_quantize else self.quantize(h)[0]
        return self.decoder(self.post_quant_conv(quant))


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
