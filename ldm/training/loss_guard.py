"""Notices a loss or a gradient that is no finite number, and says which pictures it came from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.training.run_directory import RunDirectory, resume_command
from ldm.training.sharding import whole

logger = logging.getLogger(__name__)

MOST_SKIPPED: Final = 10
"""How many steps in a row are left out before the run ends: by then it is the model that has blown up."""

REPORTS: Final = "not_finite"

LEAST_SCALE: Final = 1.0
"""Scale of a 16-bit loss below which gradients that are not finite are no longer a matter of the scale."""


class NotFiniteError(ValueError):
    """The loss or the gradient is no finite number, and the run ends."""


@dataclass
class _Step:
    """What led up to an optimiser step.

    Attributes:
        number: the step, from 1.
        epoch: from 0.
        batches: number, and what it says of its pictures, of each batch whose gradient the step takes in.
        losses: number of the batch, and loss on the model's device, of each backward pass.
        verdict: float32 (2,) on the CPU: whether a loss, and whether the gradient, is no finite number (0 or 1).
        arrived: when the verdict has arrived from the device; None: at once.
    """

    number: int
    epoch: int
    batches: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    losses: list[tuple[int, Tensor]] = field(default_factory=list)
    verdict: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class LossGuard(pl.Callback):
    """Ends the run at a loss or gradient that is no finite number, or leaves the step out.

    The pictures, captions and timesteps of the step's batches are written to ``<run>/not_finite/step-….json``;
    ``last.ckpt`` stays what it was. On a GPU the verdict on a step is read one step later, so that nothing waits
    for the device; nothing is saved before it is read. A step that is left out changes no weights and no moments; the
    step is counted, and the schedule and the moving averages go on.

    With 16-bit mixed precision a gradient beyond the range is ordinary: the loss is scaled down and the step is left
    out. There only the loss counts, until that scale has fallen below 1.

    Args:
        on_nan: ``stop`` or ``skip``.
        base_learning_rate: the configured one, for the message; None if unknown.
    """

    def __init__(self, on_nan: str = "stop", base_learning_rate: float | None = None) -> None:
        self.on_nan = on_nan
        self.base_learning_rate = base_learning_rate
        self.skipped: list[int] = []
        self._current: _Step | None = None
        self._pending: list[_Step] = []

    def state_dict(self) -> dict[str, Any]:
        """Store which steps were left out."""
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back which steps were left out."""
        self.skipped = [int(step) for step in state_dict.get("skipped", ())]

    # --- what is going on -----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the coming batch."""
        if self._current is None or self._current.verdict is not None:
            self._current = _Step(trainer.global_step + 1, trainer.current_epoch)
        said = batch if isinstance(batch, Mapping) else {}
        self._current.batches.append(
            (batch_idx, {key: said[key] for key in ("path", "caption", "exposure") if key in said})
        )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note its loss."""
        if self._current is not None:
            # As the model gave it: not its share of a step, nor scaled for 16 bits. A copy: it is weighed in place.
            value = loss.detach().float().reshape(()) * trainer.accumulate_grad_batches
            scaler = _scaler(trainer)
            if scaler is not None:
                value = value / scaler.scale(torch.ones_like(value))
            self._current.losses.append((self._current.batches[-1][0], value))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the step that is about to be taken; where that costs nothing, before it is taken."""
        self._settle(trainer, pl_module)
        step = self._current
        if step is None or not step.losses:
            return
        bad = _judge(torch.stack([loss for _, loss in step.losses]), optimizer)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        step.verdict = bad
        if bad.is_cuda:
            step.verdict = torch.empty(2, pin_memory=True).copy_(bad, non_blocking=True)
            step.arrived = torch.cuda.Event()
            step.arrived.record()
        self._pending.append(step)
        if not bad.is_cuda:
            self._settle(trainer, pl_module, optimizer)
        elif self.on_nan == "skip" and _scaler(trainer) is None:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                # What a gradient scaler tells a fused optimiser: it then leaves the step out, on the device.
                optimizer.found_inf = bad.max()  # type: ignore[attr-defined]
            else:
                self._settle(trainer, pl_module, optimizer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the verdict on the last step."""
        self._settle(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the verdict on the last step."""
        self._settle(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the verdict on the last step before anything of it is written."""
        self._settle(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was left out."""
        self._settle(trainer, pl_module)
        if self.skipped and trainer.is_global_zero:
            logger.warning(
                "%s left out, as %s loss or gradient was no finite number: %s",
                "1 step was" if len(self.skipped) == 1 else f"{len(self.skipped)} steps were",
                "its" if len(self.skipped) == 1 else "their",
                ", ".join(map(str, self.skipped)),
            )

    # --- what follows ---------------------------------------------------------------------------------------

    def _settle(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Read the verdicts that are due; ``optimizer``: the one that has not yet taken the last of these steps."""
        pending, self._pending = self._pending, []
        for step in pending:
            if step.arrived is not None:
                step.arrived.synchronize()
            assert step.verdict is not None
            loss_is_bad, gradient_is_bad = (bool(flag) for flag in step.verdict.tolist())
            scaler = _scaler(trainer)
            if gradient_is_bad and not loss_is_bad and scaler is not None and scaler.get_scale() >= LEAST_SCALE:
                continue
            is_left_out = step.number in self.skipped[-1:]  # for another optimiser of the same step
            if (loss_is_bad or gradient_is_bad) and not is_left_out:
                self._leave_out(trainer, pl_module, step, loss_is_bad)
                is_left_out = True
            if is_left_out:
                for group in optimizer.param_groups if optimizer is not None else ():
                    for parameter in group["params"]:
                        parameter.grad = None  # which optimisers pass over

    def _leave_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: _Step, loss_is_bad: bool) -> None:
        """Write down where a step came from, and end the run or go on without it.

        Raises:
            NotFiniteError: the run ends.
        """
        losses = [(batch, float(loss)) for batch, loss in step.losses]
        batch, shown = next((pair for pair in losses if not math.isfinite(pair[1])), (step.batches[-1][0], None))
        what = f"the loss is {shown}" if shown is not None else "the gradient is not finite"
        if loss_is_bad and shown is None:
            what = "the loss on another device is not finite"
        where = f"at step {step.number} (epoch {step.epoch + 1}, batch {batch + 1})"
        file = self._write_report(trainer, pl_module, step, losses)
        recorded = f"; its pictures, captions and timesteps are in {file}" if file is not None else ""
        self.skipped.append(step.number)
        in_a_row = next(
            (count for count, number in enumerate(reversed(self.skipped)) if number != step.number - count),
            len(self.skipped),
        )
        if self.on_nan == "skip" and in_a_row < MOST_SKIPPED:
            explained = f"the step is left out{recorded}" if self.skipped == [step.number] else "left out too"
            logger.warning("%s %s: %s", what, where, explained)
            return
        if self.on_nan == "skip":
            where += f", for the {MOST_SKIPPED}th time in a row"
        raise NotFiniteError(f"{what} {where}{recorded}; {self._advice(trainer)}")

    def _advice(self, trainer: pl.Trainer) -> str:
        """Say what to do about it, and what to type."""
        run = _run_folder(trainer)
        rate = "a lower one" if self.base_learning_rate is None else f"{self.base_learning_rate / 10:g}"
        words = f"model.base_learning_rate={rate}"
        others = ["--precision bf16-mixed"] if str(trainer.precision).startswith("16") else []
        others += ["--on_nan skip"] if self.on_nan != "skip" else []
        instead = "".join(f", or with {words}" for words in others)
        kept = "last.ckpt stays as it was: continue from it with a lower learning rate:"
        said = kept if RunDirectory(run, "").last_checkpoint.is_file() else "nothing had been saved: type"
        return f"{said} {resume_command(run, f'{words} --accept_changes')}{instead}"

    def _write_report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: _Step, losses: Sequence[tuple[int, float]]
    ) -> Path | None:
        """Write down what a step was made of; gives the file, or None where it cannot be written."""
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        file = _run_folder(trainer) / REPORTS / f"step-{step.number:06d}{rank}.json"
        # Of a batch's several losses the first one that is no finite number, else the first.
        telling_last = sorted(losses, key=lambda pair: math.isfinite(pair[1]))[::-1]
        # As text: JSON has no words for what is no finite number.
        by_batch = {batch: repr(loss) for batch, loss in telling_last}
        try:
            content = {
                "step": step.number,
                "epoch": step.epoch,
                "batches": [
                    {"batch": batch, "loss": by_batch.get(batch), "pictures": _pictures(pl_module, said)}
                    for batch, said in step.batches
                ],
            }
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content, indent=1), encoding="utf-8")
        except Exception as error:  # noqa: BLE001 - a data set of another kind must not hide what is reported
            logger.warning("%s could not be written: %s", file, error)
            return None
        return file


def _run_folder(trainer: pl.Trainer) -> Path:
    """Give the run's folder: the other devices have named one of their own, by the time at which they started."""
    return Path(trainer.strategy.broadcast(str(trainer.default_root_dir)))


def _judge(losses: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Tell, on the device, whether a loss, and whether the gradient, is no finite number: float32 (2,) of 0 and 1."""
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    norm = whole(torch.nn.utils.get_total_norm(gradients)) if gradients else torch.zeros((), device=losses.device)
    finite = torch.stack([torch.isfinite(losses).all(), torch.isfinite(norm.to(losses.device))])
    return (~finite).float()


def _scaler(trainer: pl.Trainer) -> Any:
    """Give what scales the loss in 16-bit mixed precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _pictures(pl_module: pl.LightningModule, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put together what is known of a batch's pictures."""
    columns: dict[str, Sequence[Any]] = {key: list(said[key]) for key in ("path", "caption") if key in said}
    if "exposure" in said:
        exposures = said["exposure"].cpu()
        columns["exposure"] = exposures.tolist()
        timesteps = getattr(pl_module, "timesteps_of", None)
        if timesteps is not None:
            columns["timestep"] = timesteps(exposures).tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
