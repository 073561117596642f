"""What a ``target:`` string names, and which ``params:`` it takes.

The checker asks before anything is built; nothing here calls a target.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from ldm.training.config_tree import nearest

_LONGEST_TARGET: Final = 200
"""Characters of what is no target that a message shows."""

TAKES_ANYTHING: Final = ("torch.nn.modules.linear.Identity",)
"""Classes that take every argument and use none."""

COMES_LATER: Final[Mapping[str, str]] = {
    "ldm.models.autoencoder.IdentityFirstStage": "training in pixel space",
    "ldm.modules.encoders.modules.ClassEmbedder": "class-conditional models",
    "ldm.modules.encoders.modules.BERTEmbedder": "BERT-conditioned models",
    "ldm.modules.encoders.modules.TransformerEmbedder": "BERT-conditioned models",
    "ldm.modules.encoders.modules.SpatialRescaler": "layout and super-resolution models",
    "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder": "conditioning on OpenAI CLIP embeddings",
    "ldm.modules.encoders.modules.FrozenClipImageEmbedder": "conditioning on images",
    "ldm.models.diffusion.classifier.NoisyLatentImageClassifier": "classifier guidance",
    "ldm.modules.embedding_manager.EmbeddingManager": "textual inversion, which is not part of this trainer",
}
"""Names of the lineage that this version may not have; asked only when the import has failed."""


OPTIONAL: Final[Mapping[str, str]] = {
    "bitsandbytes": "bitsandbytes",
    "lion_pytorch": "lion-pytorch",
    "prodigyopt": "prodigyopt",
    "schedulefree": "schedulefree",
    "torchao": "torchao",
}
"""Packages of optimisers, by the name that they are imported under: what pip calls them."""


@dataclass(frozen=True)
class Parameter:
    """One key that a target's ``params:`` may hold.

    Attributes:
        annotation: its resolved type; ``inspect.Parameter.empty`` or text where there is none.
        default: its default; ``inspect.Parameter.empty`` where the key must be given.
        owner: the class or function that takes it.
    """

    annotation: Any
    default: Any
    owner: str

    @property
    def required(self) -> bool:
        """Whether the key must be given."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Accepted:
    """What a target takes.

    Attributes:
        parameters: by name.
        open: whether other names may be taken too (keywords that leave our sight).
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False


def resolve_target(target: str) -> Any:
    """Import what a ``target:`` string names.

    Args:
        target: dotted path ``package.module.Name``.

    Returns:
        The class or function.

    Raises:
        ValueError: it cannot be imported; one line that names the nearest known one.
    """
    module_name, _, name = target.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        shown = target if len(target) <= _LONGEST_TARGET else f"{target[:_LONGEST_TARGET]}…"
        raise ValueError(f"target {shown!r} is not a dotted path such as ldm.data.every_dream.EveryDreamBatch")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise ValueError(
                f"target {target}: importing {module_name} needs the package {missing}, which is not installed; "
                f"type: pip install {missing.split('.')[0]}"
            ) from None
        raise ValueError(_missing_module(target, module_name, name)) from None
    except Exception as error:  # noqa: BLE001 - a user's own module may raise anything; the reason is handed on
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"target {target}: importing {module_name} fails with {type(error).__name__}: {''.join(reason)}"
        ) from None
    found = getattr(module, name, None)
    if found is None:
        if target in COMES_LATER:
            raise ValueError(_later(target))
        if _find(target) is not None:
            raise ValueError(_is_module(target))
        public = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        match = nearest(name, public)
        hint = f"did you mean {module_name}.{match}?" if match else "check the name"
        raise ValueError(f"target {target}: the module {module_name} has no {name}; {hint}")
    if isinstance(found, types.ModuleType):
        raise ValueError(_is_module(target))
    if not callable(found):
        raise ValueError(f"target {target} is no class or function (but of type {type(found).__name__})")
    return found


def comes_with(target: str, run: Path) -> bool:
    """Tell whether the code that a target names lies in a run's folder, or in a package that holds that folder.

    Python takes any folder below the working directory for a package, ``logs`` too: a run that somebody gives
    away could bring a module along and name it in its saved config. Nothing is imported to find out.

    Args:
        target: dotted path.
        run: the run's folder.

    Returns:
        Whether it does.
    """
    try:
        specification = importlib.machinery.PathFinder.find_spec(target.partition(".")[0])
    except (ImportError, ValueError):
        return False
    if specification is None:
        return False
    run = run.resolve()
    packages = [Path(folder).resolve() for folder in specification.submodule_search_locations or ()]
    if any(run.is_relative_to(folder) or folder.is_relative_to(run) for folder in packages):
        return True
    return specification.has_location and Path(str(specification.origin)).resolve().is_relative_to(run)


def accepted_parameters(target: Any) -> Accepted:
    """Read which keywords a class or function takes.

    A class that hands ``**kwargs`` on is followed up its method resolution order.

    Args:
        target: a class or function.

    Returns:
        The parameters, those of subclasses first.
    """
    if f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}" in TAKES_ANYTHING:
        return Accepted(open=True)
    if not inspect.isclass(target):
        parameters, passes_on = _own_parameters(target, getattr(target, "__name__", str(target)), bound=False)
        return Accepted(parameters, open=passes_on)
    parameters = {}
    passes_on = False
    for owner in target.__mro__:
        initialiser = vars(owner).get("__init__")
        if owner is torch.nn.Module:  # its own **kwargs take nothing
            return Accepted(parameters)
        if owner is object:  # keywords handed on this far were used by the last class itself
            return Accepted(parameters, open=passes_on)
        if initialiser is None:
            continue
        own, passes_on = _own_parameters(initialiser, owner.__name__, bound=True)
        parameters = {**own, **parameters}
        if not passes_on:
            return Accepted(parameters)
    return Accepted(parameters)


def _own_parameters(function: Callable[..., Any], owner: str, *, bound: bool) -> tuple[dict[str, Parameter], bool]:
    """Read one signature: its keywords, and whether it takes ``**kwargs``."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return {}, True
    listed = list(signature.parameters.values())[1 if bound else 0 :]
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    found: dict[str, Parameter] = {}
    passes_on = False
    for parameter in listed:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            passes_on = True
        elif parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            found[parameter.name] = Parameter(_resolved(parameter.annotation, namespace), parameter.default, owner)
    return found, passes_on


def _resolved(annotation: Any, namespace: dict[str, Any]) -> Any:
    """Resolve a postponed annotation; one whose names exist for type checkers alone stays text."""
    if not isinstance(annotation, str):
        return annotation
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, globalns=namespace)["value"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return annotation


def _later(target: str) -> str:
    return f"target {target} is not in this version of the trainer: it belongs to {COMES_LATER[target]}"


def _is_module(target: str) -> str:
    return f"target {target} is a module; name a class in it, as {target}.ClassName"


def _missing_module(target: str, module_name: str, name: str) -> str:
    """Explain a module that does not exist, with the nearest that does."""
    if target in COMES_LATER:
        return _later(target)
    parts = module_name.split(".")
    if parts[0] in OPTIONAL and _find(parts[0]) is None:
        return f"target {target} needs the package {parts[0]}; type: pip install {OPTIONAL[parts[0]]}"
    known = ""
    siblings: list[str] = [module.name for module in pkgutil.iter_modules()]
    for depth in range(1, len(parts) + 1):
        prefix = ".".join(parts[:depth])
        specification = _find(prefix)
        if specification is None:
            break
        known = prefix
        siblings = [module.name for module in _children(specification)]
    wrong = parts[len(known.split(".")) if known else 0]
    match = nearest(wrong, siblings)
    where = f"there is no module {wrong!r} in {known}" if known else f"there is no module {wrong!r}"
    if match is None:
        listed = f" (it has: {', '.join(sorted(siblings))})" if known and 0 < len(siblings) <= 12 else ""
        return f"target {target}: {where}{listed}; check the name"
    rest = parts[len(known.split(".")) + 1 if known else 1 :]
    return f"target {target}: {where}; did you mean {'.'.join(filter(None, [known, match, *rest, name]))}?"


def _find(module_name: str) -> Any:
    """Find a module without running more than its parent packages."""
    try:
        return importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None


def _children(specification: Any) -> Iterator[pkgutil.ModuleInfo]:
    """List the modules of a package; none for a plain module."""
    locations = specification.submodule_search_locations
    return pkgutil.iter_modules(list(locations)) if locations else iter(())
