"""What a data set of this project offers beside its items, so that epochs can be planned over it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


class Filler(int):
    """An index whose item only keeps a device busy: the item comes with ``loss_weight`` 0.

    Where the last batch of a shape holds fewer pictures than there are devices, the others get one of these,
    for they have to take part in the step.
    """


@runtime_checkable
class ExposureSet(Protocol):
    """An endless row of exposures, numbered from 0, of which each epoch takes the next stretch.

    An index alone names an exposure for ever: ``self[index]`` gives the same item in every process and run.
    Epochs may differ in length (a folder that is shown every second epoch).

    Attributes:
        seed: the run's seed.
    """

    seed: int

    def epoch_start(self, epoch: int) -> int:
        """Give the index of an epoch's first exposure; 0 for epoch 0."""
        ...

    def epoch_length(self, epoch: int) -> int:
        """Count the exposures of an epoch."""
        ...

    def training_sizes(self, epoch: int) -> npt.NDArray[np.int32]:
        """Give the sizes of an epoch's training pictures.

        Args:
            epoch: from 0.

        Returns:
            int32 (exposures, 2): width and height in pixels, in the order of the indices. Pictures of one
            batch have one size.
        """
        ...

    def __len__(self) -> int:
        """Count the exposures of epoch 0."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one exposure; a :class:`Filler` gives the same item with ``loss_weight`` 0."""
        ...
