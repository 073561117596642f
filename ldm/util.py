"""From a ``target:`` string to an object, and the small helpers that CompVis code expects here.

Closed: nothing new moves in.
"""

from __future__ import annotations

import importlib
import logging
import sys
import sysconfig
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset

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


@runtime_checkable
class Schedule(Protocol):
    """What a ``scheduler_config`` names: gives the factor of the learning rate at a step."""

    def schedule(self, n: int) -> float:
        """Return the factor at optimiser step ``n``."""
        ...


def kind_problem(found: Any, kind: type) -> str | None:
    """Say why a target must not be called where a certain kind of object is wanted.

    A config that somebody gives away can name any function of the machine, ``os.system`` too. So a class has to be
    of the kind, and a function to state by its annotation that it returns one and to be no installed package's.

    Args:
        found: what the ``target:`` string names.
        kind: the class that it must be or make. For data sets, a class of the user's own that only has
            ``__len__`` and ``__getitem__`` does as well.

    Returns:
        The end of a sentence that begins with the target; None where it fits.
    """
    wanted = kind.__name__
    if isclass(found):
        if issubclass(found, kind):
            return None
        if kind is Dataset:
            if not (hasattr(found, "__getitem__") or hasattr(found, "__iter__")):
                return "is not a data set (it has no __getitem__)"
            if not _is_installed(found):
                return None
            return "is not a data set; derive it from torch.utils.data.Dataset"
        return f"is not a {wanted}, which this section needs"
    if not isfunction(found):
        return f"is neither a class nor a Python function, and this section needs a {wanted}"
    try:
        returned = typing.get_type_hints(found).get("return")
    except Exception:  # noqa: BLE001 - an annotation can hold any expression
        returned = None
    returned = typing.get_origin(returned) or returned
    if isclass(returned) and issubclass(returned, kind):
        if _is_installed(found) and found.__module__.partition(".")[0] != "ldm":
            # Those that build a model read its file too, some of them in ways that let the file run code.
            return f"is a function of an installed package; call it in a function of your own that says '-> {wanted}'"
        return None
    return f"is a function that does not say that it returns a {wanted}; write '-> {wanted}' where it is defined"


def _is_installed(found: Callable[..., Any]) -> bool:
    """Tell whether a class or function comes with Python or an installed package, rather than being the user's own."""
    module = found.__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "builtins" or module.partition(".")[0] in sys.stdlib_module_names:
        return True
    if file is None:
        return module != "__main__"
    path = Path(file).resolve()
    # By name too: a user's own folder of packages, or the system's, is not among those that Python tells of here.
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    folders = [Path(folder).resolve() for folder in map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))]
    return any(path.is_relative_to(folder) for folder in folders)


def instantiate_from_config(config: Mapping[str, Any] | str, kind: type | None = None) -> Any:
    """Build what a ``{target, params}`` mapping describes.

    Args:
        config: mapping with ``target`` (dotted path) and optional ``params`` (keyword arguments). The
            strings ``"__is_first_stage__"`` and ``"__is_unconditional__"`` stand for nothing to build.
        kind: what the target must be or return, see :func:`kind_problem`; None: anything, for configs that come
            from no file.

    Returns:
        The built object, or None for the two strings.

    Raises:
        ValueError: there is no ``target``, it cannot be imported or is of another kind; nothing was called.
    """
    if config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise ValueError(f"expected a mapping with the key 'target', got {config!r}")
    found = get_obj_from_str(config["target"])
    problem = None if kind is None else kind_problem(found, kind)
    if problem is not None:
        raise ValueError(f"target '{config['target']}' {problem}")
    return found(**(config.get("params") or {}))


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
