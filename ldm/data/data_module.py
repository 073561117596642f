"""Builds the data sets that a config names, and the loaders that feed them to the trainer."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset, IterableDataset

from ldm.data.ed_validate import EDValidateBatch
from ldm.data.every_dream import EveryDreamBatch, check_pictures
from ldm.data.resume import TrainerProgress, saved_position, settle_resume
from ldm.data.sampler import EpochLoader, EpochSampler, steps_per_epoch
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
        self._saved_position: dict[str, int] | None = None

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
        ours = {split: dataset for split, dataset in datasets.items() if isinstance(dataset, EveryDreamBatch)}
        if isinstance(datasets.get("train"), EDValidateBatch):
            raise ValueError(
                f"data.params.train.target {self.dataset_configs['train']['target']!r} is a validation set (each "
                "picture once, always with the same noise); write target: ldm.data.every_dream.EveryDreamBatch"
            )
        check_pictures((f"data.params.{split}.params.on_bad_image", dataset) for split, dataset in ours.items())
        _tell_what_is_left_out(ours.values())
        self.datasets = datasets
        self._check_batch_size()

    def _build(self, split: str, config: Mapping[str, Any]) -> Any:
        dataset = instantiate_from_config(config)
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

    def steps_per_epoch(self, split: str, num_replicas: int | None = None) -> int:
        """Count the batches that one pass over a split takes on each device.

        Args:
            split: ``train``, ``validation``, ``test`` or ``predict``.
            num_replicas: number of devices; None: the trainer's, 1 before there is a trainer.

        Returns:
            Batches; 0 where the config names no such split.
        """
        if split not in self.datasets:
            return 0
        return steps_per_epoch(len(self.datasets[split]), self.batch_size, num_replicas or self._num_replicas)

    def _loader(self, split: str) -> EpochLoader:
        dataset = self.datasets[split]
        trainer = self.trainer
        sampler = EpochSampler(
            len(dataset),
            seed=self.seed,
            shuffle=self.shuffle[split],
            num_replicas=self._num_replicas,
            rank=trainer.global_rank if trainer is not None else 0,
            index_names_epoch=isinstance(dataset, EveryDreamBatch) and dataset.set == "train",
        )
        if sampler.padding and sampler.rank == 0:
            logger.info(
                "%s: %d exposures do not divide among %d devices; %d of them are shown twice an epoch",
                split,
                sampler.length,
                sampler.num_replicas,
                sampler.padding,
            )
        return EpochLoader(
            dataset,
            sampler=sampler,
            progress=TrainerProgress(trainer) if trainer is not None and split == "train" else None,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            worker_init_fn=seed_global_generators if self.use_worker_init_fn else None,
        )

    def train_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Build the training loader; an empty list where the config names no training set."""
        if "train" not in self.datasets:
            return []
        self._check_batch_size()
        if self._saved_position is not None and self.trainer is not None:
            settle_resume(self.trainer, self._saved_position, *self._train_sizes)
            self._saved_position = None
        return self._loader("train")

    @property
    def _train_sizes(self) -> tuple[int, int]:
        return len(self.datasets["train"]), self.batch_size * self._num_replicas

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs so that a run goes on within an epoch (the trainer calls this)."""
        if self.trainer is None or "train" not in self.datasets:
            return {}
        return saved_position(self.trainer, *self._train_sizes)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's position until the training loader is asked for (the trainer calls this)."""
        self._saved_position = state_dict

    def val_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Build the validation loader; an empty list where the config names no validation set."""
        return self._loader("validation") if "validation" in self.datasets else []

    def test_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Build the test loader; an empty list where the config names no test set."""
        return self._loader("test") if "test" in self.datasets else []

    def predict_dataloader(self) -> EpochLoader | list[EpochLoader]:
        """Build the prediction loader; an empty list where the config names no prediction set."""
        return self._loader("predict") if "predict" in self.datasets else []


def seed_global_generators(worker_id: int) -> None:
    """Seed Python's and numpy's global generators in a loader process from its torch seed.

    Args:
        worker_id: number of the process; torch's seed differs by it already.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)


def _tell_what_is_left_out(datasets: Iterable[EveryDreamBatch]) -> None:
    """Name the files that are not used and the pictures without a caption, each once for all splits."""
    roots = {os.path.realpath(dataset.data_root): dataset for dataset in datasets}.values()
    left_out = [name for dataset in roots for name in dataset.left_out]
    hidden = [name for dataset in roots for name in dataset.hidden]
    empty = [name for dataset in roots for name in dataset.empty_captions]
    if left_out:
        nouns = ("file", "picture") if len(left_out) == 1 else ("files", "pictures")
        logger.warning("%d %s left out, no %s: %s", len(left_out), *nouns, ", ".join(left_out))
    if hidden:
        logger.debug("left out, hidden: %s", ", ".join(hidden))
    if empty:
        logger.warning(
            "%d %s an empty caption (nothing precedes the first underscore): %s",
            len(empty),
            "picture has" if len(empty) == 1 else "pictures have",
            ", ".join(empty),
        )
