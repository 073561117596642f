"""Builds the data sets that a config names, and the loaders that feed them to the trainer."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset, IterableDataset

from ldm.data.buckets import count_batches
from ldm.data.ed_validate import EDValidateBatch
from ldm.data.every_dream import EveryDreamBatch, check_pictures
from ldm.data.exposure_set import ExposureSet
from ldm.data.inspection import quick_look, summarise
from ldm.data.loader_signals import outlive_group_signals
from ldm.data.mixture import Mixture
from ldm.data.picture_header import PictureHeader
from ldm.data.resume import TrainerProgress, saved_position, settle_resume
from ldm.data.sampler import EpochBatches, EpochLoader
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

SPLITS: Final = ("train", "validation", "test", "predict")


class WrappedDataset(Dataset[Any]):
    """Makes a torch data set of any object that has a length and gives items by number."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class DataModuleFromConfig(pl.LightningDataModule):
    """Data sets and loaders from ``{target, params}`` configs.

    Args:
        batch_size: exposures in a batch of one device, at least 1.
        train: config of the training set, or None.
        validation: config of the validation set, or None.
        test: config of the test set, or None.
        predict: config of the prediction set, or None.
        wrap: wrap data sets of other projects that are no torch data sets (:class:`WrappedDataset`).
        num_workers: loader processes for each loader; 0 loads in the main process; None: two for each picture
            of a batch, at most one for each processor core.
        shuffle_test_loader: draw an order for the test set.
        use_worker_init_fn: seed Python's and numpy's global generators in each worker, for data sets of other
            projects that draw from them; the sets of ``ldm.data`` need no such thing.
        shuffle_val_dataloader: draw an order for the validation set.
        seed: the run's seed.

    Attributes:
        datasets: the data sets by split (``train``, ``validation``, ``test``, ``predict``), after :meth:`setup`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        seed: int = 23,
    ) -> None:
        super().__init__()
        problems = []
        if batch_size < 1:
            problems.append(f"data.params.batch_size {batch_size!r} is not allowed; give at least 1")
        if num_workers is not None and num_workers < 0:
            problems.append(
                f"data.params.num_workers {num_workers!r} is not allowed; give 0 (no worker processes) or more"
            )
        if problems:
            raise ValueError("\n".join(problems))
        self.batch_size = batch_size
        self.num_workers = min(batch_size * 2, os.cpu_count() or 1) if num_workers is None else num_workers
        self.dataset_configs = {
            split: config
            for split, config in zip(SPLITS, (train, validation, test, predict), strict=True)
            if config is not None
        }
        self.wrap = wrap
        self.shuffle = {
            "train": True,
            "validation": shuffle_val_dataloader,
            "test": shuffle_test_loader,
            "predict": False,
        }
        self.use_worker_init_fn = use_worker_init_fn
        self.seed = seed
        self.datasets: dict[str, Any] = {}
        self._saved_position: dict[str, Any] | None = None
        self._train_batches: EpochBatches
        self._train_loader: tuple[pl.Trainer | None, EpochLoader] | None = None
        self._val_loader: tuple[pl.Trainer | None, EpochLoader] | None = None
        self._steps: dict[tuple[str, int, int], int] = {}

    def setup(self, stage: str | None = None) -> None:
        """Build every data set, and decode every picture once; a second call does nothing.

        Args:
            stage: ignored: what a run will need fails before it starts.

        Raises:
            ValueError: a data set that cannot be used; pictures that cannot be read, all of them named; a batch
                larger than the training set.
            OSError: a data root that does not exist.
        """
        if self.datasets:
            return
        datasets = {split: self._build(split, config) for split, config in self.dataset_configs.items()}
        ours = {
            key: folder
            for split, dataset in datasets.items()
            for key, folder in _folder_sets(f"data.params.{split}.params", dataset)
        }
        if isinstance(datasets.get("train"), EDValidateBatch):
            raise ValueError(
                f"data.params.train.target {self.dataset_configs['train']['target']!r} is a validation set (each "
                "picture once, always with the same noise); write target: ldm.data.every_dream.EveryDreamBatch"
            )
        headers = check_pictures((f"{key}.on_bad_image", dataset) for key, dataset in ours.items())
        _tell_what_is_left_out(ours.values(), headers)
        self.datasets = datasets
        self._check_batch_size()

    def _build(self, split: str, config: Mapping[str, Any]) -> Any:
        dataset = instantiate_from_config(config, Dataset)
        where = f"data.params.{split}.target {config.get('target')!r}"
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise ValueError(f"{where}: gives no items by number; name a data set with __len__ and __getitem__")
        if len(dataset) == 0:
            raise ValueError(f"{where}: holds no items")
        return WrappedDataset(dataset) if self.wrap and not isinstance(dataset, Dataset) else dataset

    def _check_batch_size(self) -> None:
        if "train" not in self.datasets:
            return
        exposures = len(self.datasets["train"])
        together = self.batch_size * self._num_replicas
        if together > exposures:
            ranks = f" on {self._num_replicas} devices" if self._num_replicas > 1 else ""
            largest = exposures // self._num_replicas
            remedy = (
                f"data.params.batch_size={largest}" if largest else f"more pictures, or at most {exposures} devices"
            )
            raise ValueError(
                f"data.params.batch_size {self.batch_size}{ranks} is larger than the training set: "
                f"{exposures} exposures an epoch (pictures times repeats); use {remedy}, or raise "
                "data.params.train.params.repeats"
            )

    @property
    def _num_replicas(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def steps_per_epoch(self, split: str, num_replicas: int | None = None, epoch: int = 0) -> int:
        """Count the batches that one pass over a split takes on each device.

        Args:
            split: ``train``, ``validation``, ``test`` or ``predict``.
            num_replicas: number of devices; None: the trainer's, 1 before there is a trainer.
            epoch: from 0; epochs differ where folders are shown fractions of times.

        Returns:
            Batches; 0 where the config names no such split.
        """
        if split not in self.datasets:
            return 0
        dataset, together = self.datasets[split], self.batch_size * (num_replicas or self._num_replicas)
        # A long run in fractions has many epochs but few different ones.
        epoch %= getattr(dataset, "epochs_repeat_after", epoch + 1)
        key = (split, together, epoch)
        if key not in self._steps:
            self._steps[key] = count_batches(dataset, together, epoch)
        return self._steps[key]

    def _batches(self, split: str) -> EpochBatches:
        trainer = self.trainer
        overfits = trainer is not None and bool(getattr(trainer, "overfit_batches", 0))
        batches = EpochBatches(
            self.datasets[split],
            self.batch_size,
            seed=self.seed,
            shuffle=self.shuffle[split] and not overfits,
            num_replicas=self._num_replicas,
            rank=trainer.global_rank if trainer is not None else 0,
            only_epoch=0 if overfits else None,
        )
        alone = 0 < len(batches.dataset) % batches.together < batches.num_replicas
        if alone and batches.rank == 0 and not isinstance(batches.dataset, ExposureSet):
            logger.info(
                "%s: %d items do not divide among %d devices; some are shown twice an epoch",
                split,
                len(batches.dataset),
                batches.num_replicas,
            )
        return batches

    def _loader(self, split: str, batches: EpochBatches | None) -> EpochLoader:
        dataset = self.datasets[split]
        trainer = self.trainer
        if trainer is not None and hasattr(dataset, "as_bytes"):
            dataset.as_bytes = True  # a quarter of the numbers to carry; on_after_batch_transfer scales them
        return EpochLoader(
            dataset,
            **({"batch_size": self.batch_size} if batches is None else {"batch_sampler": batches}),
            progress=TrainerProgress(trainer) if trainer is not None and split == "train" else None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            worker_init_fn=seed_global_generators if self.use_worker_init_fn else outlive_group_signals,
        )

    def train_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Build the training loader; an empty list where the config names no training set.

        Where epochs differ in length, the trainer asks before each one, and gets the same loader again.
        """
        if "train" not in self.datasets:
            return []
        trainer = self.trainer
        if self._train_loader is not None and self._train_loader[0] is trainer and trainer is not None:
            loader = self._train_loader[1]
            self._train_batches.set_epoch(trainer.current_epoch)
            return loader
        self._check_batch_size()
        self._train_batches = self._batches("train")
        if self._saved_position and trainer is not None:
            settle_resume(trainer, self._saved_position, self._train_batches)
            self._saved_position = None
        if trainer is not None and self._epochs_differ():
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        self._train_loader = (trainer, self._loader("train", self._train_batches))
        return self._train_loader[1]

    def _epochs_differ(self) -> bool:
        """Tell whether epochs may have different numbers of batches."""
        dataset = self.datasets["train"]
        shown_anew = self._train_batches.segments(self._train_batches.epoch)
        return bool(shown_anew) or getattr(dataset, "epochs_differ", False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scale the pictures of a batch that was carried as bytes, on the device (the trainer calls this)."""
        if not isinstance(batch, Mapping) or not isinstance(batch.get("image"), torch.Tensor):
            return batch
        if batch["image"].dtype != torch.uint8:
            return batch
        return {**batch, "image": bytes_to_unit_range(batch["image"])}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs so that a run goes on within an epoch (the trainer calls this)."""
        if self.trainer is None or self._train_loader is None:
            return {}
        return saved_position(self.trainer, self._train_batches)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's position until the training loader is asked for (the trainer calls this)."""
        self._saved_position = state_dict

    def val_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Build the validation loader; an empty list where the config names no validation set.

        A trainer that asks again (see :meth:`train_dataloader`) gets the same loader, whose processes go on.
        """
        if "validation" not in self.datasets:
            return []
        if self._val_loader is None or self.trainer is None or self._val_loader[0] is not self.trainer:
            self._val_loader = (self.trainer, self._loader("validation", self._batches("validation")))
        return self._val_loader[1]

    def test_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Build the test loader; an empty list where the config names no test set."""
        return self._loader("test", self._batches("test")) if "test" in self.datasets else []

    def predict_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Build the prediction loader; an empty list where the config names no prediction set."""
        return self._loader("predict", None) if "predict" in self.datasets else []


def bytes_to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Scale 8-bit pixels to [-1, 1] on their device.

    Args:
        pixels: uint8, any shape.

    Returns:
        float32 of the same shape, value / 127.5 - 1 rounded once: the very numbers that
        :func:`ldm.data.image_transform.to_unit_range` gives.
    """
    values = torch.arange(256, dtype=torch.float64, device=pixels.device).div_(127.5).sub_(1.0).float()
    return values.index_select(0, pixels.reshape(-1).int()).view(pixels.shape)


def seed_global_generators(worker_id: int) -> None:
    """Seed Python's and numpy's global generators in a loader process from its torch seed.

    Args:
        worker_id: number of the process; torch's seed differs by it already.
    """
    outlive_group_signals(worker_id)
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)


def _folder_sets(key: str, dataset: Any) -> Iterator[tuple[str, EveryDreamBatch]]:
    """Find the folders of a data set, itself or those that it mixes, with the key path of their params."""
    if isinstance(dataset, EveryDreamBatch):
        yield key, dataset
    elif isinstance(dataset, Mixture):
        for name, part in dataset.parts.items():
            yield from _folder_sets(f"{key}.sets.{name}.params", part)


def _tell_what_is_left_out(datasets: Iterable[EveryDreamBatch], headers: Mapping[str, PictureHeader]) -> None:
    """Name what is not used, or not as it may have been meant, each once for all splits."""
    first_of_root: dict[str, EveryDreamBatch] = {}
    for dataset in datasets:
        first_of_root.setdefault(os.path.realpath(dataset.data_root), dataset)
    roots = list(first_of_root.values())

    def gathered(name: str) -> list[str]:
        return [item for dataset in roots for item in getattr(dataset, name)]

    _tell_of(gathered("left_out"), "file left out, no picture", "files left out, no pictures")
    _tell_of(gathered("orphans"), "caption without a picture", "captions without a picture")
    _tell_of(
        gathered("empty_captions"),
        "picture has an empty caption (nothing precedes the first underscore)",
        "pictures have an empty caption (nothing precedes the first underscore)",
    )
    for line in gathered("scan_warnings"):
        logger.warning("%s", line)
    for line in summarise(quick_look(roots, headers)):
        logger.warning("%s", line)
    for dataset in roots:
        for folder, count in dataset.switched_off.items():
            logger.info(
                "left out: %s (%d %s), for its multiply is 0", folder, count, "picture" if count == 1 else "pictures"
            )
    hidden = gathered("hidden")
    if hidden:
        logger.debug("left out, hidden: %s", ", ".join(hidden))


def _tell_of(names: list[str], one: str, several: str) -> None:
    if names:
        logger.warning("%d %s: %s", len(names), one if len(names) == 1 else several, ", ".join(names))
