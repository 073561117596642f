"""Pseudo linear multi-step sampling."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampling import Guide, Sampler, StepNoise, StepTable, ddim_update, timestep_batch

_ADAMS_BASHFORTH = ((), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the newest prediction and those before it, by how many are remembered."""


class PLMSSampler(Sampler):
    """PLMS: DDIM steps along a combination of the last four noise predictions; deterministic.

    Reference:
        Liu et al. 2022, arXiv 2202.09778, eq. 12 and algorithm 2.
    """

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the timesteps; see :meth:`Sampler.make_schedule`.

        Raises:
            ValueError: eta is not 0.
        """
        if ddim_eta != 0.0:
            raise ValueError(f"PLMS adds no noise: eta is {ddim_eta}, it must be 0")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def step(
        self, x: Tensor, table: StepTable, index: int, guide: Guide, noise: StepNoise, history: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Take one step; the first is a Heun step, for there is no history yet."""
        eps = self.predict_eps(x, timestep_batch(table, index, x), guide)
        if not history:
            guess, _ = ddim_update(self.model, x, eps, table, index, noise)
            eps_next = self.predict_eps(guess, timestep_batch(table, max(index - 1, 0), x), guide)
            combined = (eps + eps_next) / 2
        else:
            weights = _ADAMS_BASHFORTH[min(len(history), 3)]
            recent = [eps, *reversed(history[-3:])]
            combined = sum(weight * past for weight, past in zip(weights, recent, strict=True))  # type: ignore[assignment]
        history.append(eps)
        del history[:-3]
        return ddim_update(self.model, x, combined, table, index, noise)
