"""What to do about a lack of memory, in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import pytorch_lightning as pl
import torch

from ldm.training.batch_splitting import SPLIT, can_split

MUCH_BY_OTHERS: Final = 2 * 2**30
"""Bytes on a device beyond this process's own (and its driver's, below one GiB) that are worth a word."""

SPLITS: Final = ("train", "validation")

SHOWN: Final = 120
"""Characters of the original message that are shown."""


def advise_on_memory(error: BaseException, trainer: pl.Trainer, config: Mapping[str, Any], has_begun: bool) -> str:
    """Say what was too much for which memory, and what to change.

    Args:
        error: the lack of memory.
        trainer: the trainer.
        config: the merged configuration.
        has_begun: whether the first step was reached.

    Returns:
        One line, the most useful remedy first.
    """
    device = trainer.strategy.root_device
    original = str(error).strip().splitlines() or [type(error).__name__]
    # A loader process sends its traceback with it; what was wrong stands at the end.
    reason = (original[-1] if original[0].startswith("Caught ") else original[0])[:SHOWN]
    if _is_of_host(error, device, original[0]):
        full = f"out of memory: the computer's memory{_in_gib(_host_memory())} is full"
        return f"{full}: {_host_remedies(config)} ({reason})"
    where = f"{device}{_described(device)}"
    if not has_begun:
        advice = ["close other programs that use it", *_caching_remedies(config), "take one with more memory"]
        return f"out of memory before the first step, on {where}: {', or '.join(advice)} ({reason})"
    return f"{_what_was_too_much(config, where)}: {', or '.join(_remedies(trainer, config))} ({reason})"


def _what_was_too_much(config: Mapping[str, Any], where: str) -> str:
    """Name what was asked of the device."""
    if config["run"].get("on_oom") == SPLIT:
        return f"out of memory in spite of --on_oom split, on {where}"
    batch_size, size = config["data"]["params"]["batch_size"], _size(config)
    of_size = "" if size is None else f" of size {size}"
    if batch_size == 1:
        return f"out of memory: 1 picture{of_size} is too much for {where}"
    return f"out of memory: {batch_size} pictures{of_size} at once are too much for {where}"


def _remedies(trainer: pl.Trainer, config: Mapping[str, Any]) -> list[str]:
    """Say what makes a step smaller."""
    batch_size, size = config["data"]["params"]["batch_size"], _size(config)
    unet = ((config["model"].get("params") or {}).get("unet_config") or {}).get("params") or {}
    precision = ((config.get("lightning") or {}).get("trainer") or {}).get("precision")
    advice = []
    if config["run"].get("on_oom") != SPLIT and batch_size > 1:
        if can_split(trainer, trainer.lightning_module):
            advice.append("add --on_oom split (takes a batch in parts, with the same result)")
        advice.append(f"lower data.params.batch_size ({batch_size} now)")
    if unet.get("use_checkpoint", True) not in (True, None):  # false, or a share of the blocks
        advice.append("set model.params.unet_config.params.use_checkpoint=true")
    if precision in (None, 32, "32", "32-true"):
        advice.append("use --precision bf16-mixed (16-mixed on cards before 2020)")
    advice.append(f"lower data.params.train.params.size{'' if size is None else f' ({size} now)'}")
    return advice


def _caching_remedies(config: Mapping[str, Any]) -> list[str]:
    """Say what makes latents that are cached before the first step take less of the device's memory."""
    data = config["data"]["params"]
    caches = any(_params(data, split).get("cache_latents", "off") not in ("off", False) for split in SPLITS)
    return [f"lower data.params.batch_size ({data['batch_size']} now)"] if caches and data["batch_size"] > 1 else []


def _host_remedies(config: Mapping[str, Any]) -> str:
    """Say what takes less of the computer's memory."""
    data, lightning = config["data"]["params"], config.get("lightning") or {}
    advice = ["close other programs"]
    workers = data.get("num_workers")
    if workers != 0:
        advice.append(f"lower data.params.num_workers{'' if workers is None else f' ({workers} now)'}")
    splits = [name for name in SPLITS if _params(data, name).get("cache_latents") == "memory"]
    if splits:
        advice.append("set " + " and ".join(f"data.params.{name}.params.cache_latents=disk" for name in splits))
    if ((lightning.get("modelcheckpoint") or {}).get("params") or {}).get("background"):
        advice.append("set lightning.modelcheckpoint.params.background=false")
    return ", or ".join(advice)


def _is_of_host(error: BaseException, device: torch.device, first_line: str) -> bool:
    """Tell whether it was the computer's memory that did not suffice, for something else than the training step."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, MemoryError) or first_line.startswith("Caught "):
        return True
    return device.type != "cpu" and any(
        words in str(error) for words in ("DefaultCPUAllocator", "can't allocate memory")
    )


def _params(data: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    params: Mapping[str, Any] = (data.get(split) or {}).get("params") or {}
    return params


def _size(config: Mapping[str, Any]) -> Any:
    """Give the size of the training pictures, where the configuration has it."""
    return _params(config["data"]["params"], "train").get("size")


def _described(device: torch.device) -> str:
    """Name a device, its memory, and what others hold of it."""
    if device.type != "cuda":
        return _in_gib(_host_memory())
    try:
        name = torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
    except RuntimeError:  # a driver that is past answering
        return ""
    held = f", {others / 2**30:.1f} GiB of it held by other programs" if others > MUCH_BY_OTHERS else ""
    return f" ({name}, {total / 2**30:.1f} GiB{held})"


def _host_memory() -> int | None:
    """Find the computer's memory in bytes, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _in_gib(count: int | None) -> str:
    """Write a size in brackets, or nothing."""
    return "" if count is None else f" ({count / 2**30:.1f} GiB)"
