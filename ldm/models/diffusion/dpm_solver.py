"""DPM-Solver++(2M): good samples in some twenty steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.models.diffusion.sampling import Guide, Sampler, StepNoise, StepTable, timestep_batch

_FEW_STEPS = 15
"""Below this many steps the last one is of first order: an extrapolation over a long step overshoots."""


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M): multi-step, of second order, on predictions of x_0; deterministic.

    With alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) and the half log signal-to-noise ratio
    lambda_t = log(alpha_t / sigma_t), a step from s to t, h = lambda_t - lambda_s apart, is

        x_t = (sigma_t / sigma_s) x_s - alpha_t (exp(-h) - 1) D,   D = x0_s + h / (2 h') (x0_s - x0_r),

    where x0_r is the prediction of the step before, h' long. The first step has none, so D = x0_s; so has the
    last of fewer than 15 steps.

    Args:
        model: see :class:`Sampler`.
        schedule: see :class:`Sampler`.
        denoise_to_zero: end at x_0 itself, not at the model's lowest noise level.

    Reference:
        Lu et al. 2022, arXiv 2211.01095, proposition 4.1 and algorithm 2.
    """

    def __init__(self, model: Any, schedule: str = "linear", denoise_to_zero: bool = False) -> None:
        super().__init__(model, schedule)
        self.denoise_to_zero = denoise_to_zero

    def choose_timesteps(self, method: str, steps: int, verbose: bool = False) -> NDArray[np.int64]:
        """Choose the timesteps; ``uniform`` spaces S steps evenly from T - 1 down to 0, where the last one arrives."""
        highest = self.ddpm_num_timesteps - 1
        if method != "uniform" or not 1 <= steps <= highest:
            return super().choose_timesteps(method, steps, verbose)
        return np.linspace(0, highest, steps + 1).round().astype(np.int64)[1:]

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the timesteps; see :meth:`Sampler.make_schedule`.

        Raises:
            ValueError: eta is not 0.
        """
        if ddim_eta != 0.0:
            raise ValueError(f"DPM-Solver++ adds no noise: eta is {ddim_eta}, it must be 0")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)
        if self.denoise_to_zero:
            self.table = replace(self.table, alphas_prev=np.append(1.0, self.table.alphas_prev[1:]))

    def step(
        self, x: Tensor, table: StepTable, index: int, guide: Guide, noise: StepNoise, history: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Take one step; see :meth:`Sampler.step`."""
        pred_x0 = self.predict_x0(x, timestep_batch(table, index, x), guide)
        if noise.quantize_x0:
            pred_x0 = self.model.first_stage_model.quantize(pred_x0)[0]
        signal, signal_prev = float(table.alphas[index]), float(table.alphas_prev[index])
        estimate = pred_x0
        is_short_last = index == 0 and (len(table.timesteps) < _FEW_STEPS or signal_prev == 1.0)
        if history and not is_short_last:
            step, step_before = (_log_snr_step(table, place) for place in (index, index + 1))
            estimate = pred_x0 + step / (2.0 * step_before) * (pred_x0 - history[-1])
        history[:] = [pred_x0]
        # exp(-h) is written as a ratio: it stays finite where one end has no noise, or no signal.
        shrink = math.sqrt((1.0 - signal_prev) / (1.0 - signal))
        decay = shrink * math.sqrt(signal / signal_prev)
        return shrink * x + math.sqrt(signal_prev) * (1.0 - decay) * estimate, pred_x0


def _log_snr_step(table: StepTable, index: int) -> float:
    """Give h = lambda_t - lambda_s of the step that begins at a table index."""

    def log_snr(signal: float) -> float:
        return 0.5 * math.log(signal / (1.0 - signal)) if signal > 0.0 else -math.inf

    return log_snr(float(table.alphas_prev[index])) - log_snr(float(table.alphas[index]))
