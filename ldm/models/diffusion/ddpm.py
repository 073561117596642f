"""The diffusion models as Lightning modules: what is trained, what is frozen, what is logged.

Wiring only: the formulas stand in the files beside this one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from einops import rearrange
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn

from ldm import exposure
from ldm.checkpoint import load_weights, read_weights, without_wrapper_prefixes
from ldm.lr_scheduler import span_run
from ldm.models.autoencoder import VQModelInterface
from ldm.models.batch_parts import BatchParts
from ldm.models.diffusion import ancestral, gaussian_diffusion, image_rows, loss, sharding
from ldm.models.diffusion.conditioning import CONDITIONING_KEYS, Condition, as_arguments
from ldm.models.diffusion.noise_schedule import build_noise_schedule, condition_timesteps
from ldm.models.diffusion.trained_parts import PART_NAMES, parameter_groups, refuse_contradictions
from ldm.models.keyed_batches import Batch, batch_exposures, count_real, loss_weights, move_draw, move_pictures
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl
from ldm.modules.ema import LitEma
from ldm.optimizers import build_optimizer, evaluate, evaluation_copies, evaluation_weights, step_context
from ldm.util import Schedule, instantiate_from_config, mean_flat

logger = logging.getLogger(__name__)


def _refuse_codebook_ids(asked: bool) -> None:
    if asked:
        raise ValueError("return_codebook_ids: models that predict codebook ids are not supported")


class DiffusionWrapper(pl.LightningModule):
    """Hands the network its condition in the way the model was built for.

    Args:
        diff_model_config: ``{target, params}`` of the network.
        conditioning_key: None, ``concat``, ``crossattn``, ``hybrid`` or ``adm``.

    Raises:
        ValueError: unknown key.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            names = ", ".join("null" if key is None else key for key in CONDITIONING_KEYS)
            raise ValueError(f"model.params.conditioning_key is '{conditioning_key}'; use one of {names}")
        self.diffusion_model = instantiate_from_config(diff_model_config, nn.Module)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Apply the network.

        Args:
            x: (B, C, H, W).
            t: int64 (B,).
            c_concat: maps (B, C', H, W) to put beside x.
            c_crossattn: tokens (B, L, D) to attend to; for ``adm`` the class labels (B,).

        Returns:
            (B, C, H, W).
        """
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *(c_concat or [])], dim=1)
        if self.conditioning_key in ("crossattn", "hybrid"):
            return self.diffusion_model(x, t, context=torch.cat(list(c_crossattn or []), dim=1))
        if self.conditioning_key == "adm":
            return self.diffusion_model(x, t, y=c_crossattn[0] if c_crossattn else None)
        return self.diffusion_model(x, t)


class DDPM(pl.LightningModule):
    """Denoising diffusion on pictures, and the base of latent diffusion.

    Args:
        unet_config: ``{target, params}`` of the network.
        timesteps: number of timesteps T.
        beta_schedule: ``linear``, ``cosine``, ``sqrt_linear`` or ``sqrt``.
        loss_type: ``l2`` or ``l1``.
        ckpt_path: weights to load.
        ignore_keys: prefixes of keys in that file to pass over.
        load_only_unet: load only the network's weights from it.
        monitor: metric that checkpoints are chosen by.
        use_ema: keep a moving average of the network's weights.
        ema_device: ``cpu`` keeps it in the host's memory; None beside the network.
        ema_every: optimiser steps for which it is moved once; see :class:`~ldm.modules.ema.LitEma`.
        first_stage_key: name of the pictures in a batch.
        image_size: height and width of a sample, in pixels (latent cells for latent diffusion).
        channels: channels of a sample.
        log_every_t: timesteps between logged intermediates.
        clip_denoised: clip estimates of x_0 to [-1, 1] in ancestral sampling.
        linear_start, linear_end, cosine_s, given_betas: see
            :func:`~ldm.models.diffusion.noise_schedule.build_noise_schedule`.
        original_elbo_weight: weight of the variational bound in the loss.
        v_posterior: weight of beta in the posterior variance.
        l_simple_weight: weight of the simple loss.
        conditioning_key: how conditions reach the network.
        parameterization: ``eps``, ``x0`` or ``v``: what the network predicts.
        scheduler_config: ``{target, params}`` of a learning-rate schedule.
        optimizer_config: ``{target, params}`` of the optimiser; AdamW if None. Without ``params.lr`` it has the run's
            learning rate.
        learn_logvar: learn a log-variance for each timestep.
        logvar_init: its initial value.
        unfreeze_model: train the network.
        model_lr: the network's learning rate; the base learning rate if None.
        min_snr_gamma: weigh the loss by min-SNR-gamma; see :func:`~ldm.models.diffusion.loss.min_snr_weights`.
        debiased_estimation: weigh it by :func:`~ldm.models.diffusion.loss.debiased_weights` instead.
        offset_noise: strength of :func:`~ldm.models.diffusion.loss.offset_noise`; 0 for none.
        input_perturbation: strength of :func:`~ldm.models.diffusion.loss.perturbed_noise`; 0 for none.
        zero_terminal_snr: leave no signal at the last timestep; not with ``eps``, which then has nothing to learn.

    Raises:
        ValueError: unknown or contradictory settings.

    Attributes:
        learning_rate: base learning rate, set by the run.
        total_steps: optimiser steps of the run, set by it; None where nothing limits them.
        stops: optimiser steps after which a part is trained no more, by part.
        parts: takes batches in parts where they do not fit into memory; None takes each as a whole.

    Reference:
        Ho et al. 2020, arXiv 2006.11239.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    lvlb_weights: Tensor
    logvar: Tensor
    first_stage_model: Any

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int | Sequence[int] = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        unfreeze_model: bool = True,
        model_lr: float | None = None,
        min_snr_gamma: float | None = None,
        debiased_estimation: bool = False,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
        zero_terminal_snr: bool = False,
        ema_device: Literal["cpu"] | None = None,
        ema_every: int = 1,
        optimizer_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if parameterization not in gaussian_diffusion.PARAMETERIZATIONS:
            raise ValueError(gaussian_diffusion.unknown_parameterization(parameterization))
        if min_snr_gamma is not None and debiased_estimation:
            raise ValueError("model.params: min_snr_gamma and debiased_estimation both weigh the loss; give one")
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(f"model.params.min_snr_gamma is {min_snr_gamma}; it must be above 0 (5 is usual)")
        for name, strength in (("offset_noise", offset_noise), ("input_perturbation", input_perturbation)):
            if strength < 0:
                raise ValueError(f"model.params.{name} is {strength}; it must be 0 (off) or above")
        if zero_terminal_snr and parameterization == "eps":
            raise ValueError(
                "model.params.zero_terminal_snr needs parameterization v or x0: eps cannot predict x_0 there"
            )
        self.parameterization = parameterization
        self.cond_stage_model: nn.Module | None = None
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.loss_type = loss_type
        self.monitor = monitor
        self.v_posterior = v_posterior
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.offset_noise = offset_noise
        self.input_perturbation = input_perturbation
        self.zero_terminal_snr = zero_terminal_snr
        self.min_snr_gamma = min_snr_gamma
        self.debiased_estimation = debiased_estimation
        self.scheduler_config = scheduler_config
        self.use_scheduler = scheduler_config is not None
        self.optimizer_config = optimizer_config
        self.unfreeze_model = unfreeze_model
        self.model_lr = model_lr
        self.cond_lr: float | None = None
        self.stops: dict[str, int] = {}
        self.learning_rate = 0.0
        self.total_steps: int | None = None
        self.parts: BatchParts | None = None

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model, every=ema_every, on_cpu=ema_device == "cpu")
            # Devices need not tell each other averages of the same weights, nor could NCCL send what is not on a GPU.
            self._ddp_params_and_buffers_to_ignore = [f"model_ema.{name}" for name, _ in self.model_ema.named_buffers()]
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.learn_logvar = learn_logvar
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.model.requires_grad_(unfreeze_model)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute the noise schedule and register its tables under the checkpoint's names."""
        schedule = build_noise_schedule(
            given_betas,
            beta_schedule,
            timesteps,
            linear_start,
            linear_end,
            cosine_s,
            self.v_posterior,
            self.zero_terminal_snr,
        )
        for name, table in schedule.tensors().items():
            self.register_buffer(name, table)
        self.register_buffer("lvlb_weights", loss.lvlb_weights(schedule, self.parameterization), persistent=False)
        self.num_timesteps = len(schedule.betas)
        self.linear_start = linear_start
        self.linear_end = linear_end

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a file, strictly, but for keys that begin with an entry of ``ignore_keys``.

        Args:
            path: ``.ckpt`` or ``.safetensors``.
            ignore_keys: prefixes to pass over: what they name keeps its values.
            only_model: load only the network (keys below ``model.``); moving averages start from it.

        Raises:
            OSError, ValueError: see :mod:`ldm.checkpoint`.
        """
        weights = read_weights(path)
        if only_model:
            network = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
            load_weights(self.model, network, source=path, ignore_keys=ignore_keys)
            if self.use_ema:
                self.model_ema.reset(self.model)
        else:
            load_weights(self, weights, source=path, ignore_keys=ignore_keys)

    # --- the diffusion process -----------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise x_0 to timestep t; see :func:`~ldm.models.diffusion.gaussian_diffusion.q_sample`."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return gaussian_diffusion.q_sample(self, x_start, t, noise)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give mean, variance and log-variance of q(x_t | x_0)."""
        return gaussian_diffusion.q_mean_variance(self, x_start, t)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)."""
        return gaussian_diffusion.q_posterior(self, x_start, x_t, t)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Recover x_0 from x_t and the noise."""
        return gaussian_diffusion.predict_start_from_noise(self, x_t, t, noise)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None, return_ids: bool = False) -> Tensor:
        """Apply the network to noisy samples under an encoded condition.

        Args:
            x_noisy: (B, C, H, W).
            t: int64 (B,).
            cond: see :mod:`ldm.models.diffusion.conditioning`.
            return_ids: accepted for CompVis callers.

        Returns:
            (B, C, H, W): the network's output.
        """
        return self.model(x_noisy, t, **as_arguments(cond, self.model.conditioning_key))

    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Give mean, variance and clipped log-variance of p(x_{t-1} | x_t), unconditionally.

        See :func:`~ldm.models.diffusion.ancestral.p_mean_variance`.
        """
        return ancestral.p_mean_variance(self, x, None, t, clip_denoised)[:3]

    def p_sample(self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False) -> Tensor:
        """Draw x_{t-1} given x_t, unconditionally; see :func:`~ldm.models.diffusion.ancestral.p_sample`."""
        return ancestral.p_sample(self, x, None, t, clip_denoised, repeat_noise)[0]

    def p_sample_loop(self, shape: Sequence[int], return_intermediates: bool = False) -> Any:
        """Sample unconditionally; see :func:`~ldm.models.diffusion.ancestral.p_sample_loop`."""
        samples, intermediates = ancestral.p_sample_loop(self, None, shape, verbose=False)
        return (samples, intermediates) if return_intermediates else samples

    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Any:
        """Sample (batch_size, channels, image_size, image_size) unconditionally."""
        return self.p_sample_loop(self._sample_shape(batch_size), return_intermediates)

    def _sample_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return batch_size, self.channels, height, width

    def noised_condition(self, cond: Condition, t: Tensor, exposures: Tensor | None = None) -> Condition:
        """Noise the condition as far as the model's timesteps of the condition ask for: not at all, here."""
        return cond

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Give KL(q(x_T | x_0) || N(0, 1)) in bits, averaged over elements: (B,)."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device, dtype=torch.int64)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        nats = normal_kl(mean, log_variance, 0.0, 0.0)
        return mean_flat(nats) / torch.log(torch.tensor(2.0))

    # --- the loss ------------------------------------------------------------------------------------------

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Compare prediction and target by ``loss_type``; see :func:`~ldm.models.diffusion.loss.distance`."""
        return loss.distance(pred, target, self.loss_type, mean)

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss at given timesteps, unconditionally; see :meth:`losses`."""
        return self.losses(x_start, None, t, noise)

    def losses(
        self,
        x_start: Tensor,
        cond: Condition,
        t: Tensor,
        noise: Tensor | None = None,
        shown_noise: Tensor | None = None,
        loss_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss at given timesteps.

        Args:
            x_start: (B, C, H, W) clean samples.
            cond: encoded condition, or None.
            t: int64 (B,).
            noise: standard normals of x_start's shape; drawn if None.
            shown_noise: what the network's input is noised with, where that shall differ from the target's noise.
            loss_weight: (B,) how much each picture counts, 0 for a filler; 1 if None.

        Returns:
            The loss, which is the sum of the pictures' weighted losses over B, and what to log: ``loss_simple``,
            ``loss_vlb``, ``loss`` under ``train/`` or ``val/``, which are means over the pictures that are no fillers;
            of these ``loss`` alone is weighted.

        Reference:
            Ho et al. 2020, arXiv 2006.11239, algorithm 1; Rombach et al. 2022, arXiv 2112.10752, eq. 3.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_noisy = self.q_sample(x_start, t, noise if shown_noise is None else shown_noise)
        output = self.apply_model(x_noisy, t, cond)
        target = gaussian_diffusion.training_target(self, self.parameterization, x_start, noise, t)
        # float32 keeps small errors apart when the network runs in half precision.
        errors = mean_flat(self.get_loss(output.float(), target.float(), mean=False))
        parts = loss.combine(
            errors,
            self.logvar[t],
            self.lvlb_weights[t],
            self.l_simple_weight,
            self.original_elbo_weight,
            self._timestep_weights(t),
            loss_weight,
        )
        prefix = "train" if self.training else "val"
        logged = {f"{prefix}/loss_simple": parts.loss_simple.detach()}
        if self.learn_logvar:
            logged[f"{prefix}/loss_gamma"] = parts.loss_gamma.detach()
            logged["logvar"] = self.logvar.detach().mean()
        logged[f"{prefix}/loss_vlb"] = parts.loss_vlb.detach()
        logged[f"{prefix}/loss"] = parts.loss_shown.detach()
        return parts.loss, logged

    def _timestep_weights(self, t: Tensor) -> Tensor | float:
        """Give the weight of the simple loss at each timestep."""
        if self.min_snr_gamma is not None:
            return loss.min_snr_weights(self.alphas_cumprod[t], self.min_snr_gamma, self.parameterization)
        if self.debiased_estimation:
            return loss.debiased_weights(self.alphas_cumprod[t], self.parameterization)
        return 1.0

    def _random_timesteps(self, x: Tensor) -> Tensor:
        return torch.randint(0, self.num_timesteps, (x.shape[0],), device=x.device).long()

    def forward(
        self, x: Tensor, exposures: Tensor | None = None, loss_weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of clean samples at random timesteps; see :meth:`losses`.

        Args:
            x: (B, C, H, W).
            exposures: int64 (B, 4): what timesteps and noise are drawn from; torch's generators if None.
            loss_weight: (B,) how much each picture counts; 1 if None.
        """
        t = self._draw_timesteps(x, exposures)
        return self.losses(x, None, t, *self._draw_noise(x, exposures), loss_weight=loss_weight)

    def timesteps_of(self, exposures: Tensor) -> Tensor:
        """Draw the timesteps at which exposures are trained.

        Args:
            exposures: int64 (B, 4).

        Returns:
            int64 (B,) on the CPU, in [0, num_timesteps).
        """
        return exposure.randint("timestep", exposures, self.num_timesteps)

    def _draw_timesteps(self, x: Tensor, exposures: Tensor | None) -> Tensor:
        if exposures is None:
            return self._random_timesteps(x)
        return move_draw(self.timesteps_of(exposures), x.device)

    def _draw_noise(self, x: Tensor, exposures: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Draw the noise to predict, and the noise to show the network where that differs."""
        noise, shown_noise = self._draw_normals("noise", x, exposures), None
        if self.offset_noise > 0:
            offsets = self._draw_normals("offset_noise", x[:, :, :1, :1], exposures)
            noise = loss.offset_noise(noise, offsets, self.offset_noise)
        if self.input_perturbation > 0:
            perturbation = self._draw_normals("input_perturbation", x, exposures)
            shown_noise = loss.perturbed_noise(noise, perturbation, self.input_perturbation)
        return noise, shown_noise

    def _draw_normals(self, purpose: str, like: Tensor, exposures: Tensor | None) -> Tensor:
        """Draw standard normals of a tensor's shape: for each exposure, or from torch's generators."""
        if exposures is None:
            return torch.randn_like(like.float())
        return move_draw(exposure.randn(purpose, exposures, like.shape[1:]), like.device)

    def get_input(self, batch: Batch, k: str) -> Any:
        """Take pictures or maps from a batch: (B, H, W) or (B, H, W, C) -> float32 (B, C, H, W)."""
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        return rearrange(x, "b h w c -> b c h w").contiguous().float()

    def shared_step(self, batch: Batch, exposures: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a batch's loss and what to log."""
        x = self.get_input(batch, self.first_stage_key)
        return self(x, exposures, loss_weight=self._loss_weight(batch, x))

    def _loss_weight(self, batch: Batch, x: Tensor) -> Tensor | None:
        """Give how much each picture counts, on x's device; None where each counts 1."""
        weights = loss_weights(batch, len(x))
        return None if weights is None else move_draw(weights, x.device)

    # --- Lightning -----------------------------------------------------------------------------------------

    def _exposures(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the batch's exposure keys on the CPU; batches of foreign data sets get them by position."""
        return batch_exposures(
            batch, self.first_stage_key, batch_idx, self.current_epoch, self.global_rank, training=self.training
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device, but for what is needed on the CPU."""
        move = super().transfer_batch_to_device
        return move_pictures(batch, lambda rest: move(rest, device, dataloader_idx))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute and log a batch's loss; a batch of fillers has none to log."""
        exposures = self._exposures(batch, batch_idx)
        step = self.shared_step if self.parts is None else self.parts.train
        value, logged = step(batch, exposures)
        real = count_real(loss_weights(batch, len(exposures)), len(exposures))
        if real:
            self.log_dict(logged, logger=True, on_step=True, on_epoch=True, batch_size=real)  # type: ignore[arg-type]
        reached = torch.full((), float(self.global_step), device=self.device)  # a number would wait for the device
        self.log("global_step", reached, logger=True, on_step=True, on_epoch=False)
        return value

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log a batch's loss with the live weights, and (suffix ``_ema``) with the averaged ones."""
        self._log_evaluation(batch, batch_idx, "val")

    @torch.no_grad()
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the figures of :meth:`validation_step` under ``test/``."""
        self._log_evaluation(batch, batch_idx, "test")

    def _log_evaluation(self, batch: Batch, batch_idx: int, prefix: str) -> None:
        exposures = self._exposures(batch, batch_idx)
        step = self.shared_step if self.parts is None else self.parts.evaluate
        with evaluation_weights(self._optimizers()):
            _, live = step(batch, exposures)
            averaged = live
            if self.use_ema:
                with self.ema_scope():
                    _, averaged = step(batch, exposures)
        named = {key.replace("val/", f"{prefix}/"): value for key, value in live.items()}
        named |= {key.replace("val/", f"{prefix}/") + "_ema": value for key, value in averaged.items()}
        # Fillers too are logged, with a count of 0: the devices average together, so each has to know every name.
        real = count_real(loss_weights(batch, len(exposures)), len(exposures))
        self.log_dict(named, logger=True, on_step=False, on_epoch=True, batch_size=real, sync_dist=True)  # type: ignore[arg-type]

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Swap the averaged weights in for the time of a ``with`` block; nothing happens without EMA."""
        if not self.use_ema:
            yield
            return
        with self.model_ema.swapped_into(self.model):
            yield

    def trained_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Give the parameters to train by part, in the order of the optimiser; parts without any are left out."""
        parts = {"model": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}
        if self.learn_logvar:
            parts["logvar"] = [self.logvar]  # type: ignore[list-item]
        return {name: parameters for name, parameters in parts.items() if parameters}

    def on_train_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop training what has had its optimiser steps.

        Without gradients the optimiser passes it over: no decay, and its state stays as it is.
        """
        for name, steps in self.stops.items():
            part = getattr(self, name)
            if self.global_step >= steps and any(parameter.requires_grad for parameter in part.parameters()):
                part.requires_grad_(False)
                self.train(self.training)
                if self.global_rank == 0:
                    logger.info("step %d: the %s is trained no more", self.global_step, PART_NAMES[name])

    def describe_training(self) -> list[str]:
        """Say what the counts of trained parameters do not: a line each."""
        lines = [
            f"the {PART_NAMES[name]} is trained for {steps:,} optimiser steps" for name, steps in self.stops.items()
        ]
        if self.use_ema and (self.model_ema.on_cpu or self.model_ema.every > 1):
            place = "in the host's memory" if self.model_ema.on_cpu else "beside the UNet"
            every = self.model_ema.every
            lines.append(f"moving average: {place}, moved every {f'{every} optimiser steps' if every > 1 else 'step'}")
        return lines

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the optimiser's parameter groups, in the order of its state in checkpoints.

        Returns:
            A mapping a group: ``params``, and ``lr`` where it is not ``learning_rate``; see
            :func:`~ldm.models.diffusion.trained_parts.parameter_groups`.

        Raises:
            ValueError: nothing is to be trained.
        """
        parts = self.trained_parameters()
        if not parts:
            raise ValueError(
                "nothing is to train: set model.params.unfreeze_model or model.params.cond_stage_trainable to True"
            )
        return parameter_groups(parts, self.model_lr, self.cond_lr)

    def configure_optimizers(self) -> Any:
        """Build the optimiser over the parameter groups, AdamW unless told otherwise, and the learning-rate schedule.

        Raises:
            ValueError: nothing is to be trained, or the optimiser cannot be had.

        Reference:
            Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2.
        """
        optimizer = build_optimizer(
            self.optimizer_config, self.parameter_groups(), self.learning_rate, may_fuse=self._may_fuse()
        )
        schedule = self.build_schedule()
        if schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=schedule.schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    def build_schedule(self) -> Schedule | None:
        """Build the learning-rate schedule: what multiplies the rates of all groups at each optimiser step.

        Returns:
            The schedule; None where the rates stay as they are.
        """
        if self.scheduler_config is None:
            return None
        schedule: Schedule = instantiate_from_config(self.scheduler_config, Schedule)
        span_run(schedule, self.total_steps)
        return schedule

    def _may_fuse(self) -> bool:
        """Tell whether the fused optimiser can be used: it unscales by itself, so Lightning cannot clip before it."""
        trainer = self._trainer
        return trainer is None or trainer.precision != "16-mixed" or not trainer.gradient_clip_val

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Give the trainer's optimisers; none where there is no trainer."""
        return [] if self._trainer is None else list(self._trainer.optimizers)

    def shared_blocks(self) -> list[nn.Module]:
        """Give what is trained as blocks that FSDP shares out over the devices, inner ones before outer ones.

        Raises:
            ValueError: a part stops while the run goes on, or the averages are to stay in the host's memory.
        """
        if self.stops or (self.use_ema and self.model_ema.on_cpu):
            raise ValueError(
                "--strategy fsdp takes neither model.params.cond_stop_after, model_stop_after nor ema_device: remove "
                "them, or train with --strategy ddp"
            )
        blocks = sharding.network_blocks(self.model.diffusion_model) if sharding.is_trained(self.model) else []
        encoder = self.cond_stage_model
        if encoder is not None and sharding.is_trained(encoder):
            blocks += sharding.text_encoder_blocks(encoder)
        return blocks

    def configure_model(self) -> None:
        """Share what is trained out over the devices, where the trainer's strategy asks for that."""
        if self._trainer is None or not isinstance(self._trainer.strategy, ModelParallelStrategy):
            return
        sharding.shard(self.shared_blocks(), self.device_mesh["data_parallel"])  # type: ignore[index]
        if self.use_ema:
            sharding.shard_averages(self.model_ema, self.model)

    def take_in_parts(self, at_once: MutableMapping[str, int], tell: Callable[[str, int, int], None]) -> None:
        """From here on take a batch that does not fit into memory in parts.

        Args:
            at_once: the most pictures at once, as far as that is known; kept up to date.
            tell: told of each new limit; see :class:`~ldm.models.batch_parts.BatchParts` for both.
        """
        self.parts = BatchParts(self, at_once, tell)

    def step_context(self) -> AbstractContextManager[None]:
        """Give the context that the trainer computes training steps in: its precision."""
        return self.trainer.precision_plugin.train_step_context()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate a batch's loss, in parts where it was computed so."""
        if self.parts is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.parts.backward(loss)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take an optimiser step, free its gradients, and move the averaged weights towards the new ones."""
        with step_context(self._optimizers()):
            super().optimizer_step(*args, **kwargs)
        # Lightning frees them after the next forward pass, whose activations then need room beside them.
        self.zero_grad(set_to_none=True)
        if self.parts is not None:
            self.parts.begin_step()
        if self.use_ema:
            self.model_ema(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the weights to evaluate under the checkpoint's own keys, also from compiled modules."""
        weights = {**checkpoint["state_dict"], **evaluation_copies(self, self._optimizers())}
        checkpoint["state_dict"] = without_wrapper_prefixes(weights)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the keys back into the names that this module's wrappers give them."""
        stored = checkpoint["state_dict"]
        wrapped = {next(iter(without_wrapper_prefixes({key: 0}))): key for key in self.state_dict(keep_vars=True)}
        checkpoint["state_dict"] = {wrapped.get(key, key): value for key, value in stored.items()}

    def on_fit_end(self) -> None:
        """Leave the model at its evaluation weights, for the test and for whoever goes on with it."""
        evaluate(self._optimizers())

    @torch.no_grad()
    def log_images(
        self, batch: Batch, N: int = 8, sample: bool = True, ddim_steps: int = 40, ddim_eta: float = 1.0
    ) -> dict[str, Tensor]:
        """Make the picture rows to look at; see :func:`ldm.models.diffusion.image_rows.pixel_rows`."""
        with evaluation_weights(self._optimizers()):
            return image_rows.pixel_rows(self, batch, N, sample, ddim_steps, ddim_eta)


class LatentDiffusion(DDPM):
    """Diffusion on the latents of a first stage, under an encoded condition.

    Args:
        first_stage_config: ``{target, params}`` of the autoencoder; frozen.
        cond_stage_config: ``{target, params}`` of the condition's encoder, or ``__is_first_stage__`` or
            ``__is_unconditional__``.
        num_timesteps_cond: levels of noise on the condition; 1 for none.
        cond_stage_key: name of the condition in a batch.
        cond_stage_trainable: train the condition's encoder.
        concat_mode: where no ``conditioning_key`` is given, concatenate the condition instead of attending to it.
        cond_stage_forward: method of the encoder to call, if not ``encode``.
        conditioning_key: how conditions reach the network.
        scale_factor: factor from the first stage's latents to the network's.
        scale_by_std: take 1 / standard deviation of the first batch's latents as that factor.
        cond_lr: the learning rate of the condition's encoder; the base learning rate if None.
        cond_stop_after: optimiser steps after which the condition's encoder is trained no more.
        model_stop_after: optimiser steps after which the network is trained no more.
        cond_train_last_layers: train only that many of the encoder's last layers, with its final layer norm; all if
            None.
        cond_train_embeddings: train the encoder's token and position embeddings too.
        ckpt_path, ignore_keys, load_only_unet: weights to load; see :class:`DDPM`.
        **kwargs: arguments of :class:`DDPM`.

    Raises:
        ValueError: unknown or contradictory settings.

    Reference:
        Rombach et al. 2022, arXiv 2112.10752.
    """

    scale_factor: Tensor | float
    cond_ids: Tensor

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        cond_lr: float | None = None,
        cond_stop_after: int | None = None,
        model_stop_after: int | None = None,
        cond_train_last_layers: int | None = None,
        cond_train_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.num_timesteps_cond = num_timesteps_cond or 1
        if not 1 <= self.num_timesteps_cond <= self.num_timesteps:
            raise ValueError(
                f"model.params.num_timesteps_cond is {num_timesteps_cond}; it must be 1 to {self.num_timesteps}"
            )
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            cond_ids = condition_timesteps(self.num_timesteps, self.num_timesteps_cond)
            self.register_buffer("cond_ids", cond_ids, persistent=False)
        self.concat_mode = concat_mode
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_forward = cond_stage_forward
        self.scale_by_std = scale_by_std
        if scale_by_std and scale_factor != 1.0:
            raise ValueError("model.params: give scale_factor or scale_by_std, not both")
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(1.0))
        else:
            self.scale_factor = scale_factor

        self.first_stage_model = instantiate_from_config(first_stage_config, nn.Module)
        self.first_stage_model.requires_grad_(False)
        if cond_stage_config == "__is_first_stage__" and cond_stage_trainable:
            raise ValueError(
                "model.params: cond_stage_trainable cannot be true where the condition's encoder is the first stage"
            )
        if cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(cond_stage_config, nn.Module)
            if getattr(self.cond_stage_model, "frozen", False):
                self.cond_stage_trainable = False
            if self.cond_stage_model is not None:
                self.cond_stage_model.requires_grad_(self.cond_stage_trainable)
        refuse_contradictions(
            self.unfreeze_model,
            self.cond_stage_trainable and self.cond_stage_model is not None,
            model_stop_after,
            cond_stop_after,
            {"cond_lr": cond_lr, "cond_train_last_layers": cond_train_last_layers},
        )
        self._freeze_within_encoder(cond_train_last_layers, cond_train_embeddings)
        self.cond_lr = cond_lr
        stops = {"model": model_stop_after, "cond_stage_model": cond_stop_after}
        self.stops = {name: steps for name, steps in stops.items() if steps is not None}
        if self.shorten_cond_schedule and getattr(self.cond_stage_model, "long_captions", "cut") == "chunk":
            raise ValueError(
                "model.params: num_timesteps_cond above 1 noises the copies that long_captions: chunk makes apart; "
                "leave one of them out"
            )
        self.clip_denoised = False
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
        self.train(self.training)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Switch what is trained between training and evaluation; what is frozen stays in evaluation."""
        super().train(mode)
        self.first_stage_model.eval()
        encoder = self.cond_stage_model
        if encoder is not None and not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()
        return self

    def _freeze_within_encoder(self, last_layers: int | None, embeddings: bool) -> None:
        """Freeze what is not to be trained of an encoder that is."""
        encoder: Any = self.cond_stage_model
        if not self.cond_stage_trainable or (last_layers is None and embeddings):
            return
        if not hasattr(encoder, "train_last_layers"):
            raise ValueError(
                f"model.params: {type(encoder).__name__} has no layers to choose from; remove cond_train_last_layers "
                "and cond_train_embeddings"
            )
        if last_layers is None:
            encoder.freeze_embeddings()
        else:
            encoder.train_last_layers(last_layers)

    # --- first stage ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Encode pictures (B, C, H, W) in [-1, 1] by the first stage: a posterior, or latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any, noise: Tensor | None = None) -> Tensor:
        """Draw latents from a posterior (or take them as they are) and scale them for the network.

        Args:
            encoder_posterior: a posterior over latents, or latents (B, C, h, w).
            noise: standard normals for the draw; drawn if None.

        Returns:
            (B, C, h, w).
        """
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            z = encoder_posterior.sample(noise)
        elif isinstance(encoder_posterior, Tensor):
            z = encoder_posterior
        else:
            raise ValueError(
                f"the first stage encodes to a {type(encoder_posterior).__name__}, which is neither a posterior nor "
                "latents; a VQ first stage has target: ldm.models.autoencoder.VQModelInterface"
            )
        return self.scale_factor * z

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Decode the network's latents (B, C, h, w) to pictures.

        Args:
            z: scaled latents.
            predict_cids: z holds scores of the codes of a VQ first stage (B, n_embed, h, w), or codes (B, h, w).
            force_not_quantize: decode vector-quantised latents as they are.
        """
        if predict_cids:
            codes = z.argmax(dim=1) if z.ndim == 4 else z
            codebook = self.first_stage_model.quantize
            z = codebook.get_codebook_entry(codes.reshape(-1), (*codes.shape, codebook.e_dim))
        z = z / self.scale_factor
        if isinstance(self.first_stage_model, VQModelInterface):
            return self.first_stage_model.decode(z, force_not_quantize=predict_cids or force_not_quantize)
        return self.first_stage_model.decode(z)

    # --- condition -----------------------------------------------------------------------------------------

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode a condition: captions, labels or maps, as the encoder takes them."""
        encoder: Any = self.cond_stage_model
        if self.cond_stage_forward is not None:
            return getattr(encoder, self.cond_stage_forward)(c)
        encoded = encoder.encode(c) if callable(getattr(encoder, "encode", None)) else encoder(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def get_input(
        self,
        batch: Batch,
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        exposures: Tensor | None = None,
        return_pictures: bool = False,
    ) -> list[Any]:
        """Turn a batch into latents and condition.

        Args:
            batch: pictures (B, H, W, C) in [-1, 1] under ``k``, or their ``moments`` from :meth:`encode_moments`
                instead; and the condition.
            k: name of the pictures.
            return_first_stage_outputs: also return pictures and reconstructions.
            force_c_encode: encode the condition also where its encoder is trained (which the loss then does).
            cond_key: name of the condition, ``cond_stage_key`` if None.
            return_original_cond: also return the condition as the batch has it.
            bs: use only the first ``bs`` entries.
            exposures: int64 (B, 4): what the latents are drawn from; torch's generators if None.
            return_pictures: also return the pictures, without reconstructions.

        Returns:
            ``[z, c]``, then ``x, x_rec`` or ``x``, then ``xc``, as asked for. For a batch of moments, x is decoded
            from their means.

        Raises:
            ValueError: the condition is made from the pictures, and the batch has moments instead.
        """
        is_cached = k == self.first_stage_key and k not in batch and "moments" in batch
        x = None if is_cached else super().get_input(batch, k)[:bs].to(self.device)
        posterior = self._cached_posterior(batch, bs) if x is None else self.encode_first_stage(x)
        noise = None
        if exposures is not None and isinstance(posterior, DiagonalGaussianDistribution):
            noise = self._draw_normals("posterior", posterior.mean, exposures[:bs])
        z = self.get_first_stage_encoding(posterior, noise).detach()

        c = xc = None
        if self.model.conditioning_key is not None:
            xc = self._original_condition(batch, cond_key or self.cond_stage_key, x, bs)
            c = xc if self.cond_stage_trainable and not force_c_encode else self.get_learned_conditioning(xc)
        out = [z, c]
        if x is None and (return_first_stage_outputs or return_pictures):
            x = image_rows.decode_one_by_one(self, self.get_first_stage_encoding(posterior.mode().float()))
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        elif return_pictures:
            out.append(x)
        if return_original_cond:
            out.append(xc)
        return out

    @torch.no_grad()
    def encode_moments(self, pictures: Tensor) -> Tensor:
        """Encode pictures to what a cache of latents holds: all that training needs of them.

        Args:
            pictures: (B, H, W, C) in [-1, 1].

        Returns:
            (B, 2 C', h, w): mean and log-variance of the latents, in the dtype that the first stage computes in.

        Raises:
            ValueError: this model cannot be trained on these alone; says why.
        """
        if self.model.conditioning_key is not None and self.cond_stage_key == self.first_stage_key:
            raise ValueError(self._needs_pictures())
        posterior = self.encode_first_stage(DDPM.get_input(self, {"pictures": pictures}, "pictures").to(self.device))
        if not isinstance(posterior, DiagonalGaussianDistribution):
            kind = type(self.first_stage_model).__name__
            raise ValueError(f"its first stage, {kind}, gives no mean and log-variance, which are what a cache holds")
        return posterior.parameters

    def _cached_posterior(self, batch: Batch, bs: int | None) -> DiagonalGaussianDistribution:
        # In the layout that the encoder's attention leaves them in, which the last bits of a step depend on.
        moments = batch["moments"][:bs].to(self.device, memory_format=torch.channels_last)
        return DiagonalGaussianDistribution(moments)

    def _needs_pictures(self) -> str:
        return f"its condition is made from the pictures (model.params.cond_stage_key: {self.cond_stage_key})"

    def _original_condition(self, batch: Batch, key: str, x: Tensor | None, bs: int | None) -> Any:
        if key == self.first_stage_key:
            if x is None:
                raise ValueError(f"a batch of cached latents does not do for this model: {self._needs_pictures()}")
            return x
        if key in ("caption", "coordinates_bbox", "txt"):
            return batch[key][:bs]
        if key == "class_label":
            return {
                name: value[:bs] if bs is not None and hasattr(value, "__getitem__") else value
                for name, value in batch.items()
            }
        return DDPM.get_input(self, batch, key)[:bs].to(self.device)

    # --- sampling ------------------------------------------------------------------------------------------

    def p_mean_variance(  # type: ignore[override]
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        clip_denoised: bool,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Give mean, variance and clipped log-variance of p(x_{t-1} | x_t), and with ``return_x0`` the x_0.

        See :func:`~ldm.models.diffusion.ancestral.p_mean_variance`; ``return_codebook_ids`` is refused.
        """
        _refuse_codebook_ids(return_codebook_ids)
        parts = ancestral.p_mean_variance(
            self, x, c, t, clip_denoised, quantize_denoised, score_corrector, corrector_kwargs
        )
        return parts if return_x0 else parts[:3]

    def p_sample(  # type: ignore[override]
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draw x_{t-1} given x_t, and with ``return_x0`` also give the estimate of x_0.

        See :func:`~ldm.models.diffusion.ancestral.p_sample`; ``return_codebook_ids`` is refused.
        """
        _refuse_codebook_ids(return_codebook_ids)
        sample, x0 = ancestral.p_sample(
            self,
            x,
            c,
            t,
            clip_denoised,
            repeat_noise,
            temperature,
            noise_dropout,
            quantize_denoised=quantize_denoised,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        return (sample, x0) if return_x0 else sample

    def p_sample_loop(  # type: ignore[override]
        self, cond: Condition, shape: Sequence[int], return_intermediates: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Sample by stepping through every timestep.

        Further arguments are, in this order, those of :func:`~ldm.models.diffusion.ancestral.p_sample_loop`
        from ``x_T`` on.
        """
        samples, intermediates = ancestral.p_sample_loop(self, cond, shape, *args, **kwargs)
        return (samples, intermediates) if return_intermediates else samples

    def sample(  # type: ignore[override]
        self,
        cond: Condition = None,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Sample with :meth:`p_sample_loop`; the shape comes from ``channels`` and ``image_size`` if not given."""
        return self.p_sample_loop(
            cond,
            self._sample_shape(batch_size) if shape is None else shape,
            return_intermediates,
            x_T=x_T,
            verbose=verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
            **kwargs,
        )

    # --- loss ----------------------------------------------------------------------------------------------

    def p_losses(  # type: ignore[override]
        self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss at given timesteps under an encoded condition; see :meth:`losses`."""
        return self.losses(x_start, cond, t, noise)

    def shared_step(self, batch: Batch, exposures: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a batch's loss and what to log."""
        z, c = self.get_input(batch, self.first_stage_key, exposures=exposures)
        return self(z, c, exposures, loss_weight=self._loss_weight(batch, z))

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        c: Condition = None,
        exposures: Tensor | None = None,
        loss_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of latents at random timesteps; see :meth:`losses`.

        Args:
            x: (B, C, h, w) scaled latents.
            c: the condition; not yet encoded where its encoder is trained.
            exposures: int64 (B, 4): what timesteps and noise are drawn from; torch's generators if None.
            loss_weight: (B,) how much each picture counts; 1 if None.
        """
        t = self._draw_timesteps(x, exposures)
        if self.model.conditioning_key is not None:
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            c = self.noised_condition(c, t, exposures)
        return self.losses(x, c, t, *self._draw_noise(x, exposures), loss_weight=loss_weight)

    def noised_condition(self, cond: Condition, t: Tensor, exposures: Tensor | None = None) -> Condition:
        """Noise the condition to the timestep that ``num_timesteps_cond`` assigns to each t."""
        if not self.shorten_cond_schedule or cond is None:
            return cond
        if not isinstance(cond, Tensor):
            raise ValueError("model.params.num_timesteps_cond above 1 needs a condition that is one tensor")
        return self.q_sample(cond, self.cond_ids[t], self._draw_normals("condition_noise", cond, exposures))

    @torch.no_grad()
    def log_images(
        self,
        batch: Batch,
        N: int = 8,
        sample: bool = True,
        ddim_steps: int = 40,
        ddim_eta: float = 1.0,
        n_row: int = 4,
        unconditional_guidance_scale: float = 5.0,
        unconditional_guidance_label: str = "",
    ) -> dict[str, Tensor]:
        """Make the picture rows to look at; see :func:`ldm.models.diffusion.image_rows.latent_rows`."""
        with evaluation_weights(self._optimizers()):
            return image_rows.latent_rows(
                self,
                batch,
                N,
                n_row,
                sample,
                ddim_steps,
                ddim_eta,
                unconditional_guidance_scale,
                unconditional_guidance_label,
            )

    def trained_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Give the parameters to train by part: the network, the condition's encoder, the log-variances."""
        parts = super().trained_parameters()
        if self.cond_stage_trainable and self.cond_stage_model is not None:
            logvar = parts.pop("logvar", None)
            parts["cond_stage_model"] = [p for p in self.cond_stage_model.parameters() if p.requires_grad]
            if logvar:
                parts["logvar"] = logvar
        return {name: parameters for name, parameters in parts.items() if parameters}

    @torch.no_grad()
    def on_train_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the latents' scale on the very first batch, where ``scale_by_std`` asks for it.

        Fillers repeat other devices' pictures and are left out, unless there is nothing else.
        """
        super().on_train_batch_start(batch, batch_idx, dataloader_idx)
        first = self.global_step == 0 and self.current_epoch == 0 and batch_idx == 0
        if not first or not isinstance(self.scale_factor, Tensor) or float(self.scale_factor) != 1.0:
            return  # a factor that is there already came with the weights
        exposures = self._exposures(batch, batch_idx)
        is_keyed = "exposure" in batch

        def latents(batch: Batch, exposures: Tensor) -> Tensor:
            return self.get_input(batch, self.first_stage_key, exposures=exposures if is_keyed else None)[0]

        if self.parts is None:
            z = latents(batch, exposures)
        else:
            z = torch.cat(self.parts.for_each(latents, batch, exposures))
        weights = loss_weights(batch, len(z))
        if weights is not None and weights.any():
            z = z[(weights > 0).to(z.device)]
        self.scale_factor.copy_(1.0 / z.flatten().std())
