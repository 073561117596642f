"""Predicts how much GPU memory a run needs, before anything is trained: for the largest pictures of its data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import default_collate

from ldm.optimizers import build_optimizer
from ldm.training.memory_count import Growth, count_step, growth_of
from ldm.training.summary import model_parts, training_shapes
from ldm.util import get_obj_from_str, instantiate_from_config

GIB: Final = 2**30
GB: Final = 0.975 * GIB
"""Bytes that a card offers for each GB on its box: those are GiB, of which the driver reports some percent less."""

WORKSPACE: Final = 192 * 2**20
"""Bytes that cuBLAS and cuDNN work in; an estimate."""

SLACK: Final = 0.03
"""Share of the rest that the allocator loses between its blocks; an estimate."""

CONTEXT: Final = 512 * 2**20
"""Bytes of a card that the driver keeps for itself and for kernels; an estimate."""

CARDS: Final = (8, 12, 16, 24, 48, 80)
"""Sizes of cards in GB that are shown where there is no GPU to plan for."""

COUNTED: Final = (2, 3)
"""Sizes of the batches that are counted; what one picture adds follows from them."""

PROBE: Final = (64, 128)
"""Shape of the weight by which an optimiser's state is measured."""

KNOWN_STATES: Final[Mapping[str, float]] = {"AdamW8bit": 2.03, "Adam8bit": 2.03, "AdamW4bit": 1.06, "AdamWFp8": 2.02}
"""Bytes of state for each parameter, of optimisers whose step needs a compiler or a GPU, scales included."""

MIXED: Final = ("bf16-mixed", "16-mixed", "16", "bf16", 16)
WHOLE: Final[Mapping[Any, torch.dtype]] = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "32-true": torch.float32,
    "32": torch.float32,
    32: torch.float32,
    None: torch.float32,
}


@dataclass(frozen=True)
class MemoryPlan:
    """What a run's memory goes to.

    Attributes:
        batch_size: pictures in a batch of one device.
        shape: width and height of the largest training pictures, in pixels.
        precision: Lightning's name of the number formats.
        weights: bytes of each part's weights.
        gradients: bytes of all gradients.
        optimizer: the optimiser's class.
        state: bytes of its state.
        copies: bytes that several devices need for exchanging gradients.
        growth: bytes that a step holds beside the optimiser's state.
    """

    batch_size: int
    shape: tuple[int, int]
    precision: str
    weights: Mapping[str, int]
    gradients: int
    optimizer: str
    state: int
    copies: int
    growth: Growth

    def peak(self, batch_size: int) -> int:
        """Predict the most bytes that the allocator takes for batches of a size."""
        return round((self.growth.peak(batch_size)[0] + self._beside()) * (1 + SLACK)) + WORKSPACE

    def largest_batch(self, capacity: float) -> int:
        """Give the most pictures in a batch on a device of ``capacity`` bytes; 0 if not even one fits."""
        usable = (capacity - CONTEXT - WORKSPACE) / (1 + SLACK)
        return self.growth.largest_batch(usable - self._beside())

    def _beside(self) -> int:
        return self.state + self.copies

    def line(self) -> str:
        """Say in one line what is needed, as the start summary does."""
        phase = self.growth.peak(self.batch_size)[1]
        width, height = self.shape
        return f"{_gib(self.peak(self.batch_size))} at the most, in {phase} of {self.batch_size} x {width}x{height}"

    def lines(self, devices: Sequence[tuple[str, float]]) -> list[str]:
        """Write the whole plan.

        Args:
            devices: name and bytes of each device to propose a batch for.

        Returns:
            Its lines, without line ends.
        """
        phase = self.growth.peak(self.batch_size)[1]
        standing = sum(self.weights.values())
        width, height = self.shape
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.weights.items())
        rows = [
            ("weights", standing, parts),
            ("gradients", self.gradients, ""),
            ("optimiser", self.state, f"the state of {self.optimizer}"),
            ("exchange", self.copies, "the gradients once more, between devices"),
            ("each picture", self.peak(self.batch_size + 1) - self.peak(self.batch_size), "more or less in the batch"),
            ("peak", self.peak(self.batch_size), f"predicted, in {phase}; workspaces and slack are estimates"),
        ]
        lines = [f"memory plan: batches of {self.batch_size} pictures of {width}x{height}, precision {self.precision}"]
        lines += [f"    {name:<13}{_gib(size):>10}  {said}".rstrip() for name, size, said in rows if size]
        for name, capacity in devices:
            most = self.largest_batch(capacity)
            fits = f"largest batch_size {most}" if most else "not even one picture fits"
            lines.append(f"    {name} ({_gib(capacity)}): {fits}")
        return lines


def plan_memory(config: Mapping[str, Any], dataset: Any, devices: int = 1) -> MemoryPlan:
    """Predict a run's need of GPU memory by going through a training step on tensors that have no memory.

    Args:
        config: the merged configuration as plain containers.
        dataset: the training set.
        devices: how many devices share the work.

    Returns:
        The plan.

    Raises:
        ValueError: the model, or the precision, is one that cannot be planned for.
    """
    data, trainer = config["data"]["params"], (config.get("lightning") or {}).get("trainer") or {}
    precision = trainer.get("precision")
    if precision not in MIXED and precision not in WHOLE:
        raise ValueError(f"--memory_plan knows no precision {precision}; it plans for {', '.join(_said_precisions())}")
    item = dict(dataset[0])
    params = config["model"].get("params") or {}
    shapes = training_shapes(dataset)
    settings = {**config["model"], "params": {**copy.deepcopy(dict(params)), "ckpt_path": None}}
    if not hasattr(get_obj_from_str(config["model"]["target"]), "shared_step"):
        raise ValueError(f"--memory_plan plans for diffusion models, and {config['model']['target']} is none")
    caches = (data["train"].get("params") or {}).get("cache_latents", "off") not in ("off", False, None)
    dtype = WHOLE.get(precision, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with _default_dtype(dtype):
            model: Any = instantiate_from_config(settings, pl.LightningModule)
        if params.get("ema_device") == "cpu" and hasattr(model, "model_ema"):
            model.model_ema = nn.Identity()  # is in the host's memory, and no part of the step
        model.train()
        key = model.first_stage_key
        width, height = max(shapes, key=lambda shape: (shape[0] * shape[1], shape)) if shapes else _size(item[key])
        captions = [picture.caption for picture in getattr(dataset, "pictures", ())]
        counts = []
        for size in COUNTED:
            batch = default_collate([_plain(item)] * size)
            batch[key] = torch.zeros(size, height, width, _channels(item[key]))
            if captions and "caption" in batch:
                batch["caption"] = [max(captions, key=len)] * size
            if caches:
                batch["moments"] = model.encode_moments(batch.pop(key))
            accumulated = int(trainer.get("accumulate_grad_batches") or 1) > 1
            counts.append(_count(model, batch, precision in MIXED, accumulated))
        weights = _weight_bytes(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        total = sum(parameter.numel() for parameter in trained)
    name, per_parameter = _state_bytes(params.get("optimizer_config"), dtype)
    return MemoryPlan(
        batch_size=data["batch_size"],
        shape=(width, height),
        precision=str(precision or "32-true"),
        weights=weights,
        gradients=gradients,
        optimizer=name,
        state=round(total * per_parameter),
        copies=gradients if devices > 1 else 0,
        growth=growth_of(counts[0], COUNTED[0], counts[1], COUNTED[1]),
    )


def planned_devices(given: float | None) -> list[tuple[str, float]]:
    """List the devices to propose a batch for.

    Args:
        given: size of a card in GB; None for this machine's GPU, or where it has none for the usual sizes.

    Returns:
        Name and bytes of each.
    """
    if given:
        return [(f"a card of {given:g} GB", given * GB)]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return [(properties.name, float(properties.total_memory))]
    return [(f"a card of {size} GB", float(size * GB)) for size in CARDS]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in a dtype: those without memory cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _count(model: Any, batch: Mapping[str, Any], mixed: bool, accumulated: bool) -> Any:
    def compute_loss() -> Tensor:
        loss: Tensor = model.shared_step(batch)[0]
        return loss

    return count_step(model, compute_loss, mixed, accumulated)


def _weight_bytes(model: nn.Module) -> dict[str, int]:
    """Count the bytes of a model's parameters by part, and of its buffers, moving averages above all."""
    size = next(model.parameters()).element_size()
    weights = {part.name: size * (part.trained + part.frozen) for part in model_parts(model)}
    weights["averages and tables"] = sum(each.numel() * each.element_size() for each in model.buffers())
    return {name: count for name, count in weights.items() if count}


def _state_bytes(config: Mapping[str, Any] | None, dtype: torch.dtype) -> tuple[str, float]:
    """Name the optimiser, and measure the bytes that it keeps for each parameter: by a step on a small weight."""
    name = str((config or {}).get("target", "torch.optim.AdamW")).rpartition(".")[2]
    if name in KNOWN_STATES:
        return name, KNOWN_STATES[name]
    weight = nn.Parameter(torch.zeros(PROBE, dtype=dtype))
    optimizer = build_optimizer(config, [{"params": [weight]}], 1e-6)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = [each for each in optimizer.state[weight].values() if isinstance(each, Tensor) and each.numel() > 1]
    return name, sum(each.numel() * each.element_size() for each in held) / weight.numel()


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the training step is not given here: its draws come from torch's generators."""
    return {name: value for name, value in item.items() if name not in ("exposure", "loss_weight")}


def _size(picture: Tensor) -> tuple[int, int]:
    return int(picture.shape[1]), int(picture.shape[0])


def _channels(picture: Tensor) -> int:
    return int(picture.shape[2]) if picture.ndim == 3 else 1


def _said_precisions() -> list[str]:
    return [str(name) for name in (*MIXED[:2], *WHOLE) if isinstance(name, str) and not name.isdigit()]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
