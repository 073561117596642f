"""Denoising diffusion implicit models."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampling import Guide, Sampler, StepNoise, StepTable, ddim_update, timestep_batch


class DDIMSampler(Sampler):
    """DDIM: deterministic at eta 0, DDPM's noise at eta 1.

    Reference:
        Song et al. 2020, arXiv 2010.02502, eq. 12.
    """

    def step(
        self, x: Tensor, table: StepTable, index: int, guide: Guide, noise: StepNoise, history: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Take one DDIM step; see :meth:`Sampler.step`."""
        eps = self.predict_eps(x, timestep_batch(table, index, x), guide)
        return ddim_update(self.model, x, eps, table, index, noise)
