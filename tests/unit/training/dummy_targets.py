"""Small classes for configs in tests to name: no networks, no pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from fractions import Fraction

NUMBER = 3


class Part(nn.Module):
    def __init__(self, width: int, depths: Sequence[int] = (1, 2), rate: float = 0.5) -> None:
        super().__init__()


class Base(pl.LightningModule):
    def __init__(
        self,
        timesteps: int = 1000,
        unfreeze_model: bool = True,
        model_lr: float | None = None,
        mode: Literal["eps", "v"] = "eps",
        unresolvable: Fraction | None = None,
    ) -> None:
        super().__init__()


class Model(Base):
    def __init__(
        self,
        unet_config: Mapping[str, Any],
        cond_stage_trainable: bool = False,
        extras: Mapping[str, Any] | None = None,
        parts: Sequence[Mapping[str, Any]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def log_images(self, batch: Any, ddim_steps: int = 40) -> None:
        """Take what the image logger hands on."""


class Pictures(Dataset[int]):
    def __init__(
        self,
        data_root: str,
        size: int | None = 512,
        repeats: int = 10,
        flip_p: float = 0.0,
        conditional_dropout: float = 0.0,
        resize_mode: str | None = None,
        seed: int = 23,
    ) -> None:
        super().__init__()

    def __getitem__(self, index: int) -> int:
        return index


class SelfContained(Dataset[int]):
    """A data set that brings its own pictures and takes any keyword."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()

    def __getitem__(self, index: int) -> int:
        return index


class Data(pl.LightningDataModule):
    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        seed: int = 23,
    ) -> None:
        super().__init__()


def build_part(width: int) -> Part:
    return Part(width)


def build_something(width: int):  # type: ignore[no-untyped-def]
    return Part(width)


class OwnPictures:
    """A data set of a user who knows nothing of torch's class."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index
