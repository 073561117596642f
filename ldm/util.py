"""From a ``target:`` string to an object, and the small helpers that CompVis code expects here.

Closed: nothing new moves in.
"""

from __future__ import annotations

import importlib
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from inspect import isfunction
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

T = TypeVar("T")

logger = logging.getLogger(__name__)


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import the object that a ``target:`` string names.

    Args:
        string: dotted path, ``package.module.Name``.
        reload: import the module anew first.

    Returns:
        The class or function.

    Raises:
        ValueError: the string has no dot, the module cannot be found, or it holds no such name.
    """
    module_name, _, name = string.rpartition(".")
    if not module_name:
        raise ValueError(f"target '{string}' is not a dotted path; write package.module.Name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"target '{string}': cannot import '{module_name}' ({error})") from error
    if reload:
        module = importlib.reload(module)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ValueError(f"target '{string}': module '{module_name}' has no '{name}'") from error


def instantiate_from_config(config: Mapping[str, Any] | str) -> Any:
    """Build what a ``{target, params}`` mapping describes.

    Args:
        config: mapping with ``target`` (dotted path) and optional ``params`` (keyword arguments). The
            strings ``"__is_first_stage__"`` and ``"__is_unconditional__"`` stand for nothing to build.

    Returns:
        The built object, or None for the two strings.

    Raises:
        ValueError: there is no ``target`` or it cannot be imported.
    """
    if config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise ValueError(f"expected a mapping with the key 'target', got {config!r}")
    return get_obj_from_str(config["target"])(**(config.get("params") or {}))


def exists(value: Any) -> bool:
    """Tell whether a value is given (is not None)."""
    return value is not None


def default(value: T | None, fallback: T | Callable[[], T]) -> T:
    """Return ``value``, or the fallback (called if it is a function) when it is None."""
    if value is not None:
        return value
    return fallback() if isfunction(fallback) else fallback  # type: ignore[return-value]


def mean_flat(tensor: Tensor) -> Tensor:
    """Average over all dimensions but the first: (B, ...) -> (B,)."""
    return tensor.mean(dim=tuple(range(1, tensor.ndim)))


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Count a module's parameters; ``verbose`` also logs the number in millions."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if verbose:
        logger.info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total


def ismap(x: Any) -> bool:
    """Tell whether x is a batch of feature maps: a 4-d tensor with more than 3 channels."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Tell whether x is a batch of images: a 4-d tensor with 1 or 3 channels."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Draw captions as pictures, one caption a picture, black on white.

    Args:
        wh: width and height of each picture in pixels.
        xc: the captions.
        size: font size in pixels.

    Returns:
        float32 (B, 3, H, W) in [-1, 1].
    """
    width, height = wh
    font = ImageFont.load_default(size)
    characters = max(1, int(1.8 * width / size))
    pages = []
    for caption in xc:
        page = Image.new("RGB", (width, height), "white")
        lines = textwrap.wrap(caption, characters)
        ImageDraw.Draw(page).multiline_text((0, 0), "\n".join(lines), fill="black", font=font)
        pages.append(torch.from_numpy(np.asarray(page, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1))
    return torch.stack(pages)
