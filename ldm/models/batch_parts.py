"""Takes a batch in parts, one after the other, where it does not fit into memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

from ldm.models.keyed_batches import Batch, count_real, loss_weights, slice_rows
from ldm.out_of_memory import free_memory, is_out_of_memory

TRAINING: Final = "training"
VALIDATION: Final = "validation"

Losses = tuple[Tensor, dict[str, Tensor]]
Result = TypeVar("Result")


class TrainedInParts(Protocol):
    """What a model offers whose batches are taken in parts."""

    def shared_step(self, batch: Batch, exposures: Tensor | None = None) -> Losses:
        """Compute a batch's loss, a mean over its rows, and what to log, means over its real pictures."""
        ...

    def step_context(self) -> AbstractContextManager[None]:
        """Give the context that a training step computes in: its precision."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        ...


@dataclass(frozen=True)
class _Part:
    """Some pictures of a batch.

    Attributes:
        batch: all that the batch says of them.
        exposures: int64 (n, 4), the keys of their draws.
        share: their share of the batch's rows.
    """

    batch: Batch
    exposures: Tensor
    share: float


@dataclass
class _Taken:
    """A batch whose gradient the next optimiser step takes in.

    Attributes:
        batch: the batch.
        exposures: int64 (B, 4), the keys of its draws.
        loss: a leaf with the value of its loss, which the trainer differentiates in place of the loss.
        first: the first part's share of the loss, with its graph, until that has been differentiated.
    """

    batch: Batch
    exposures: Tensor
    loss: Tensor
    first: Tensor | None

    @property
    def factor(self) -> Tensor | None:
        """What the loss was multiplied by: for accumulation, for precision, for a batch that is not full."""
        return self.loss.grad


class BatchParts:
    """Takes batches in as few, equal parts as fit into memory; their gradients add up to that of the whole batch.

    All that is done with a picture is done in its part, and its draws are keyed, so it is shown as it would be in the
    whole batch. A part that does not fit is halved, and later batches are taken in parts of that size at once.

    Nothing is counted twice: where memory runs out in a backward pass, all gradients since the last optimiser step
    are cleared, and all batches since then are differentiated anew. The step itself is not tried again.

    The trainer is given a leaf instead of a loss: the graph stays in here, so that the memory of a failed attempt
    comes free although the trainer still holds its loss, and what the leaf's gradient then is tells what the
    trainer's precision, its accumulation and its callbacks have multiplied the loss by.

    With more than one part, all but the first are computed twice: without a graph, for the value of the loss, and again
    in the backward pass.

    Args:
        model: the model.
        at_once: the most pictures at once, for ``training`` and for ``validation``, where that has turned out to be
            limited; kept up to date.
        tell: told of each new limit: for which of these two, pictures that did not fit, pictures from here on.
    """

    def __init__(
        self, model: TrainedInParts, at_once: MutableMapping[str, int], tell: Callable[[str, int, int], None]
    ) -> None:
        self.model = model
        self.at_once = at_once
        self.tell = tell
        self._tried = 0
        self._current: _Taken | None = None
        self._since_step: list[_Taken] = []

    def train(self, batch: Batch, exposures: Tensor) -> Losses:
        """Compute the loss of a batch to train on, and what to log: as the model's ``shared_step`` does.

        Args:
            batch: the batch.
            exposures: int64 (B, 4): the keys of its draws.

        Returns:
            The loss as a leaf, to be handed to :meth:`backward`, and what to log.

        Raises:
            RuntimeError, MemoryError: not even one picture fits into memory.
        """

        def attempt() -> tuple[Sequence[_Part], list[Losses]]:
            largest, *others = parts = self._parts(TRAINING, batch, exposures)
            with torch.no_grad():
                losses = [self.model.shared_step(part.batch, part.exposures) for part in others]
            return parts, [self.model.shared_step(largest.batch, largest.exposures), *losses]

        parts, losses = self._until_it_fits(TRAINING, attempt)
        value, logged = _joined(parts, losses)
        leaf = value.detach().clone().requires_grad_()
        self._current = _Taken(batch, exposures, leaf, losses[0][0] * parts[0].share)
        return leaf, logged

    def backward(self, loss: Tensor) -> None:
        """Add a batch's gradient to those of the parameters.

        Args:
            loss: what has become of the leaf that :meth:`train` gave; any other loss is differentiated as it is.

        Raises:
            RuntimeError, MemoryError: not even one picture fits into memory.
        """
        loss.backward()
        if self._current is not None:
            current, self._current = self._current, None
            self._until_it_fits(TRAINING, lambda: self._add_gradient(current))
            self._since_step.append(current)

    def begin_step(self) -> None:
        """Forget the batches of the last optimiser step: their gradients are gone."""
        self._current = None
        self._since_step.clear()

    def evaluate(self, batch: Batch, exposures: Tensor) -> Losses:
        """Compute the loss of a batch without gradients, and what to log: as the model's ``shared_step`` does.

        Args:
            batch: the batch.
            exposures: int64 (B, 4): the keys of its draws.

        Returns:
            The loss, and what to log.

        Raises:
            RuntimeError, MemoryError: not even one picture fits into memory.
        """

        def attempt() -> Losses:
            parts = self._parts(VALIDATION, batch, exposures)
            return _joined(parts, [self.model.shared_step(part.batch, part.exposures) for part in parts])

        return self._until_it_fits(VALIDATION, attempt)

    def for_each(self, compute: Callable[[Batch, Tensor], Result], batch: Batch, exposures: Tensor) -> list[Result]:
        """Compute something of each part of a batch to train on.

        Args:
            compute: gives it, from a part and the keys of its draws.
            batch: the batch.
            exposures: int64 (B, 4): the keys of its draws.

        Returns:
            One result a part, in the order of the pictures.

        Raises:
            RuntimeError, MemoryError: not even one picture fits into memory.
        """
        return self._until_it_fits(
            TRAINING, lambda: [compute(part.batch, part.exposures) for part in self._parts(TRAINING, batch, exposures)]
        )

    def _add_gradient(self, current: _Taken) -> None:
        """Add a batch's gradient; after a failure begin with the first batch since the last optimiser step."""
        if current.first is not None:
            _, *others = self._parts(TRAINING, current.batch, current.exposures)
            first, current.first = current.first, None
            first.backward(current.factor)
            self._differentiate(others, current)
            return
        self.model.zero_grad(set_to_none=True)
        for taken in [*self._since_step, current]:
            self._differentiate(self._parts(TRAINING, taken.batch, taken.exposures), taken)

    def _differentiate(self, parts: Sequence[_Part], taken: _Taken) -> None:
        """Add the gradient of some of a batch's parts, one after the other."""
        for part in parts:
            with self.model.step_context():
                loss, _ = self.model.shared_step(part.batch, part.exposures)
            (loss * part.share).backward(taken.factor)

    def _parts(self, stage: str, batch: Batch, exposures: Tensor) -> list[_Part]:
        """Cut a batch into parts that differ by a picture at most, the largest first."""
        rows = len(exposures)
        count = math.ceil(rows / min(rows, self.at_once.get(stage, rows)))
        stops = [math.ceil(rows * (number + 1) / count) for number in range(count)]
        starts = [0, *stops[:-1]]
        self._tried = max(stop - start for start, stop in zip(starts, stops, strict=True))
        if count == 1:
            return [_Part(batch, exposures, 1.0)]
        return [
            _Part(slice_rows(batch, rows, start, stop), exposures[start:stop], (stop - start) / rows)
            for start, stop in zip(starts, stops, strict=True)
        ]

    def _until_it_fits(self, stage: str, attempt: Callable[[], Result]) -> Result:
        """Try with ever smaller parts until memory suffices, and tell what was needed."""
        known, failed = self.at_once.get(stage), 0
        while True:
            try:
                result = attempt()
                break
            except (RuntimeError, MemoryError) as error:
                if self._tried == 1 or not is_out_of_memory(error):
                    if failed:
                        self._put_back(stage, known)
                    raise
            # The exception is gone by now, and with it the frames that held the failed attempt's tensors.
            failed = failed or self._tried
            self.at_once[stage] = math.ceil(self._tried / 2)
            free_memory()
        if failed:
            self.tell(stage, failed, self.at_once[stage])
        return result

    def _put_back(self, stage: str, known: int | None) -> None:
        """Forget limits that have not helped: the next attempt to continue the run may have more memory."""
        if known is None:
            del self.at_once[stage]
        else:
            self.at_once[stage] = known


def _joined(parts: Sequence[_Part], losses: Sequence[Losses]) -> Losses:
    """Put the parts' losses and what they log together to those of the whole batch."""
    if len(parts) == 1:
        return losses[0]
    real = [count_real(loss_weights(part.batch, len(part.exposures)), len(part.exposures)) for part in parts]
    total = sum(real)
    # A batch of fillers logs zeros, whatever their weights.
    weights = [count / total for count in real] if total else [part.share for part in parts]
    value = torch.stack([loss.detach() * part.share for part, (loss, _) in zip(parts, losses, strict=True)]).sum()
    logged = {
        name: torch.stack([each[name] * weight for weight, (_, each) in zip(weights, losses, strict=True)]).sum()
        for name in losses[0][1]
    }
    return value, logged
