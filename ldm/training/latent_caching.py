"""Encodes the pictures of data sets that ask for it once, before training, instead of in every step.

Whatever belongs to the first stage is here, whatever belongs to files is in the data set's ``latent_cache``
(:class:`ldm.data.latent_cache.LatentCache`). Pictures are encoded just as a training step would, in the run's
precision, so that training sees the same numbers with and without a cache.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint import without_wrapper_prefixes
from ldm.training.console import is_terminal
from ldm.training.progress import format_duration
from ldm.training.summary import plural

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

CACHED_SPLITS: Final = ("train", "validation")
"""The splits that a run shows more than once."""

PROBE_SIDE: Final = 64
"""Side in pixels of the empty picture that tells whether a model can be trained on latents alone."""

LINE_SECONDS: Final = 30.0


def refuse_uncacheable(model: Any, datasets: Mapping[str, Any]) -> None:
    """Refuse to cache latents for a model that needs the pictures, before a run begins.

    Args:
        model: the model.
        datasets: the data sets by split.

    Raises:
        ValueError: a data set has a cache, and the model cannot be trained on latents alone; says why.
    """
    for split, dataset in datasets.items():
        if getattr(dataset, "latent_cache", None) is None:
            continue
        key = f"data.params.{split}.params.cache_latents"
        if not hasattr(model, "encode_moments"):
            raise ValueError(f"{key}: a {type(model).__name__} is trained on the pictures themselves; set it to off")
        try:
            model.encode_moments(torch.zeros(1, PROBE_SIDE, PROBE_SIDE, 3))
        except ValueError as error:
            raise ValueError(f"{key}: latents cannot be cached for this model: {error}; set it to off") from error


class LatentCaching(pl.Callback):
    """Fills the latent caches of a run's data sets, which share the work among the ranks.

    Training and validation then read latents; a test after training shows each picture once, and encodes it then.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill the caches, now that the model has its weights and its device, and no loader has begun.

        Raises:
            ValueError: too little room; pictures that cannot be read, or have no latents.
            OSError: the cache cannot be written.
        """
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        for split in CACHED_SPLITS:
            cache = getattr(datasets.get(split), "latent_cache", None)
            if cache is None or cache.is_ready or (split == "validation" and not trainer.enable_validation):
                continue
            if trainer.strategy.restore_checkpoint_after_setup:
                raise ValueError(
                    f"data.params.{split}.params.cache_latents: the strategy {type(trainer.strategy).__name__} gives a "
                    "continued run its weights too late for it; use strategy ddp, or set it to off"
                )
            _Filling(trainer, pl_module, cache, split).run()


class _Filling:
    """One data set's cache, being filled."""

    def __init__(self, trainer: pl.Trainer, model: Any, cache: Any, split: str) -> None:
        self.trainer = trainer
        self.model = model
        self.cache = cache
        self.split = split
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.batch_size: int = data.batch_size
        self.num_workers: int = data.num_workers
        self.scale: Callable[[Any, int], Any] = data.on_after_batch_transfer

    def run(self) -> None:
        """Fill it."""
        trainer, cache = self.trainer, self.cache
        in_memory = cache.mode == "memory"
        token = trainer.strategy.broadcast(secrets.token_hex(8)) if in_memory and trainer.num_devices > 1 else None
        self._together(lambda: cache.open(self._encoding(), token))
        cache.tidy()
        local, everywhere = (trainer.local_rank, trainer.num_devices), (trainer.global_rank, trainer.world_size)
        self._fill(*(local if in_memory else everywhere))
        if not in_memory and trainer.num_nodes > 1:
            # The folder may be one that each machine has to itself; there is nothing left to do where it is not.
            self._fill(*local)
        cache.finish()

    def _together(self, work: Callable[[], Result]) -> Result:
        """Do a rank's part and wait for the others; end all when one fails, for which the others would wait."""
        outcome: list[Result] = []
        failure: Exception | None = None
        try:
            outcome.append(work())
        except Exception as error:  # noqa: BLE001 - raised again as soon as the other ranks know
            failure = error
        all_done = self.trainer.strategy.reduce_boolean_decision(failure is None)
        if failure is not None:
            raise failure
        if not all_done:
            raise ValueError(f"caching latents ({self.split}) failed on another device, which says why")
        return outcome[0]

    def _encoding(self) -> dict[str, Any]:
        """Find out what the first stage gives, by an empty picture of the smallest size."""
        width, height = self.cache.smallest_size()
        moments = self._encode(torch.zeros((1, height, width, 3), dtype=torch.uint8))
        return {
            "weights": weights_digest(self.model.first_stage_model),
            "channels": moments.shape[1],
            "factor": height // moments.shape[2],
            "dtype": moments.dtype,
        }

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode pictures uint8 (B, H, W, 3) as a training step does."""
        pictures: Tensor = self.scale({"image": pixels.to(self.model.device)}, 0)["image"]
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            moments: Tensor = self.model.encode_moments(pictures)
        return moments

    def _fill(self, rank: int, world: int) -> None:
        """Make what is missing, in shares."""
        cache = self.cache
        missing = self._together(lambda: cache.missing(rank, world))
        total, needed = (self._over_ranks(value) for value in (len(missing), cache.bytes_needed(missing)))
        self._together(lambda: self._tell(total, needed))
        if total:
            began = time.monotonic()
            self._together(lambda: self._make(missing))
            seconds = time.monotonic() - began
            logger.info("made %s in %s (%.1f/s)", plural(total, "latent"), format_duration(seconds), total / seconds)

    def _over_ranks(self, value: int) -> int:
        """Add a number up over the ranks."""
        counted = torch.tensor(value, dtype=torch.int64, device=self.trainer.strategy.root_device)
        return int(self.trainer.strategy.reduce(counted, reduce_op="sum"))

    def _tell(self, missing: int, needed: int) -> None:
        """Say how much is going to be kept where, and refuse what does not fit."""
        cache = self.cache
        free = cache.free_bytes()
        place = "memory" if cache.mode == "memory" else cache.folder
        room = "" if free is None else f" ({format_bytes(free)} free)"
        logger.info(
            "cached latents (%s): %s of %s, %s, in %s; %s",
            self.split,
            plural(len(cache), "latent"),
            plural(cache.count_pictures(), "picture"),
            format_bytes(cache.bytes_needed()),
            place,
            f"{missing:,} to make, {format_bytes(needed)}{room}" if missing else "all there",
        )
        if free is not None and needed > free:
            raise ValueError(
                f"data.params.{self.split}.params.cache_latents: {format_bytes(needed)} of latents do not fit "
                f"into {place}, which has {format_bytes(free)} free; {cache.remedy()}"
            )

    def _make(self, missing: Sequence[Any]) -> None:
        """Encode some views of pictures."""
        problems: dict[str, None] = {}
        with _Progress(f"caching latents ({self.split})", len(missing), self.trainer.is_global_zero) as progress:
            for views, pixels in self.cache.pictures(missing, self.batch_size, self.num_workers):
                moments = self._encode(pixels).cpu()
                for view, own in zip(views, moments, strict=True):
                    if own.isfinite().all():
                        self.cache.write(view, own)
                    else:
                        problems[f"{view.path}: its latents are no finite numbers"] = None
                progress.add(len(views))
        if problems:
            raise ValueError("\n".join([*problems, "train with another --precision, such as bf16-mixed"]))


class _Progress:
    """Shows how far a task is: a bar on a terminal, a line now and then anywhere else."""

    def __init__(self, label: str, total: int, is_shown: bool) -> None:
        self.label = label
        self.total = total
        self.is_shown = is_shown
        self.done = 0
        self._told = time.monotonic()
        self._bar = tqdm(desc=label, total=total, file=sys.stdout) if is_shown and is_terminal() else None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """Count what has been done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.is_shown and time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            logger.info("%s: %d of %d", self.label, self.done, self.total)


def weights_digest(module: nn.Module) -> str:
    """Digest a module's class and weights.

    Args:
        module: the module, on any device.

    Returns:
        64 hexadecimal digits, which differ where any name, shape, dtype or value does.
    """
    hashed = hashlib.sha256(type(module).__name__.encode())
    for name, value in sorted(without_wrapper_prefixes(module.state_dict()).items()):
        hashed.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def format_bytes(count: int) -> str:
    """Write a number of bytes, such as ``78.6 MB``."""
    unit, size = next((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 0)) if count >= size)
    return f"{count / (size or 1e3):.1f} {unit}"
