"""Sample pictures during training."""

from __future__ import annotations

import errno
import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.training.batches import batch_captions, batch_length, readable_rows
from ldm.training.disk import Disk
from ldm.training.image_sheet import grid, image_to_tensor, overview, to_pixels
from ldm.training.sharding import ShardedStrategy

logger = logging.getLogger(__name__)

JPEG_QUALITY: Final = 95
SAMPLE_SEED: Final = 0
CAPTION_KIND: Final = "conditioning"
NEEDED_ROOM: Final = 1 << 25
"""Bytes that must be free for sample pictures: the last room is the checkpoints'."""


class ImageLogger(pl.Callback):
    """Writes what the model makes of the current batch, now and then.

    Each time gives, in ``<run folder>/images/<split>/``, one grid a kind (inputs, reconstruction, samples,
    guided samples), an overview that sets each picture's versions side by side above its caption, and
    the captions as text; and the same pictures in TensorBoard. Training goes on as if nothing had
    happened: random generators, train and eval modes and gradients are left as they were.

    Args:
        batch_frequency: optimiser steps between two times.
        max_images: most pictures of a batch.
        clamp: cut off values outside [-1, 1].
        increase_log_steps: also at steps 1, 2, 4, 8 … below ``batch_frequency``.
        rescale: map [-1, 1] to [0, 1].
        disabled: write nothing.
        log_on_batch_idx: count the batches of an epoch instead of optimiser steps.
        log_first_step: also after the first step.
        log_images_kwargs: further arguments for the model's ``log_images``, such as ``ddim_steps`` or
            ``unconditional_guidance_scale``.
        log_all_val: write every validation batch; without it the first batch of a validation that falls on a
            step that is due.

    Raises:
        ValueError: if ``batch_frequency`` or ``max_images`` is below 1.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: dict[str, Any] | None = None,
        log_all_val: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("batch_frequency", batch_frequency), ("max_images", max_images)):
            if value < 1:
                raise ValueError(
                    f"image logger: {name} {value} must be at least 1 (to write no pictures, set disabled: true)"
                )
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.increase_log_steps = increase_log_steps
        self.rescale = rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.log_all_val = log_all_val
        self.disk = Disk()
        self._seen_step = 0

    def is_due(self, count: int) -> bool:
        """Tell whether pictures are due.

        Args:
            count: optimiser steps done (or the batch's number, if ``log_on_batch_idx``).

        Returns:
            True at multiples of the frequency, and at the early steps that were asked for.
        """
        if count < 1:
            return False
        is_early_step = self.increase_log_steps and count < self.batch_frequency and count & (count - 1) == 0
        return count % self.batch_frequency == 0 or is_early_step or (self.log_first_step and count == 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step that a resumed run begins at."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write pictures of a training batch if they are due."""
        has_stepped = trainer.global_step != self._seen_step
        self._seen_step = trainer.global_step
        if self.log_on_batch_idx:
            due = self.is_due(batch_idx + 1)
        else:
            due = has_stepped and self.is_due(trainer.global_step)
        if due:
            self.log_img(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write pictures of a validation batch if they are wanted."""
        if trainer.sanity_checking or trainer.global_step == 0:
            return
        if self.log_all_val or (batch_idx == 0 and not self.log_on_batch_idx and self.is_due(trainer.global_step)):
            self.log_img(trainer, pl_module, batch, batch_idx, "val")

    def log_img(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str
    ) -> None:
        """Make and write the pictures of a batch.

        Args:
            trainer: the trainer; its ``default_root_dir`` is the run folder.
            pl_module: the model; one without ``log_images`` is passed over.
            batch: the batch.
            batch_idx: its number in the epoch.
            split: ``"train"`` or ``"val"``.

        A picture that cannot be written is told of, and does not end a run.
        """
        log_images = getattr(pl_module, "log_images", None)
        batch = readable_rows(batch)
        if self.disabled or not callable(log_images):
            return
        # A network that is shared out computes in all processes or in none.
        is_shared = isinstance(trainer.strategy, ShardedStrategy)
        has_pictures = batch is not None
        if is_shared:
            has_pictures = trainer.strategy.reduce_boolean_decision(has_pictures)
        if batch is None or not has_pictures or not (is_shared or trainer.is_global_zero):
            return
        count = min(self.max_images, batch_length(batch))
        try:
            with undisturbed(trainer, pl_module):
                images = log_images(batch, **self._arguments(log_images, count, split))
        except torch.OutOfMemoryError:
            if is_shared:
                raise  # the other processes are still computing
            logger.warning(
                "no sample pictures from step %d on: out of memory (lower image_logger max_images %d,"
                " or data.params.batch_size)",
                trainer.global_step,
                self.max_images,
            )
            self.disabled = True
            return
        if not trainer.is_global_zero:
            return
        captions = batch_captions(batch)
        try:
            self._write(trainer, images, captions[:count] if captions else None, count, batch_idx, split)
        except OSError as error:
            logger.warning(
                "sample pictures of step %d could not all be written in %s: %s",
                trainer.global_step,
                Path(trainer.default_root_dir) / "images" / split,
                error.strerror or error,
            )

    def _arguments(self, log_images: Any, count: int, split: str) -> dict[str, Any]:
        """Choose the keyword arguments that this model's ``log_images`` takes."""
        parameters = inspect.signature(log_images).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        taken: dict[str, Any] = {"N": count} if takes_any or "N" in parameters else {}
        if "split" in parameters:
            taken["split"] = split
        return {**taken, **self.log_images_kwargs}

    def _write(
        self,
        trainer: pl.Trainer,
        images: Mapping[str, Any],
        captions: list[str] | None,
        count: int,
        batch_idx: int,
        split: str,
    ) -> None:
        """Write one time's files, and hand the pictures to the loggers."""
        folder = Path(trainer.default_root_dir) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        if self.disk.free(folder) < NEEDED_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ending = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        columns: dict[str, Tensor] = {}
        sheets: dict[str, Image.Image] = {}
        for kind, value in images.items():
            if not isinstance(value, Tensor):
                continue
            rows = value[None] if value.ndim == 3 else value  # a model may hand out a grid of its own
            pixels = to_pixels(rows[: self.max_images], self.clamp, self.rescale)
            sheets[kind] = grid(pixels)
            is_caption = kind == CAPTION_KIND and captions is not None  # it stands below the row already
            if value.ndim == 4 and len(pixels) == count and not is_caption:
                columns[kind] = pixels
        if columns:
            sheets["overview"] = overview(columns, captions)
        for kind, sheet in sheets.items():
            sheet.save(folder / f"{kind}_{ending}.jpg", quality=JPEG_QUALITY, subsampling=0)
            for run_logger in trainer.loggers:
                experiment: Any = getattr(run_logger, "experiment", None)
                if hasattr(experiment, "add_image"):
                    experiment.add_image(f"{split}/{kind}", image_to_tensor(sheet), trainer.global_step)
        if captions:
            text = "".join(f"{number}: {caption}\n" for number, caption in enumerate(captions))
            (folder / f"captions_{ending}.txt").write_text(text, encoding="utf-8")


@contextmanager
def undisturbed(trainer: pl.Trainer, module: nn.Module) -> Iterator[None]:
    """Let a model be used inside a training loop without a trace.

    Args:
        trainer: the trainer, for its precision.
        module: the model. Inside it is in eval mode, without gradients, at the precision of training.

    Yields:
        Nothing. Afterwards the random generators and each submodule's mode are what they were.
    """
    modes = {submodule: submodule.training for submodule in module.modules()}
    device = trainer.strategy.root_device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # The same noise each time, so that pictures of two steps differ by what was learnt between them.
        torch.manual_seed(SAMPLE_SEED)
        module.eval()
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                yield
        finally:
            for submodule, mode in modes.items():
                submodule.training = mode
