"""What the scripts share that make new checkpoint files: rounding, moving averages, writing and reading back."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ldm.checkpoint import SCHEDULE_TABLES, without_wrapper_prefixes  # noqa: E402
from ldm.training.console import harmless  # noqa: E402

FORMATS: Final = ("ckpt", "safetensors")

AVERAGES: Final = "model_ema."
"""Prefix of the moving averages; behind it stands the weight's key with the dots removed."""

AVERAGE_COUNTERS: Final = ("model_ema.decay", "model_ema.num_updates")

NEVER_HALVED: Final = (*SCHEDULE_TABLES, *AVERAGE_COUNTERS, "lvlb_weights", "logvar", "scale_factor")
"""Tables and single numbers, whose precision matters and whose size does not."""

KEPT_COUNTERS: Final = ("global_step", "epoch")
"""What stays of a Lightning checkpoint beside its weights."""


def own_weights(state_dict: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Take a file's weights under their plain keys.

    Args:
        state_dict: the weights as read.
        source: the file, for messages.

    Returns:
        The weights without the key parts that wrappers add.

    Raises:
        ValueError: weights are NaN or infinite.
    """
    weights = without_wrapper_prefixes(state_dict)
    bad = [key for key, value in weights.items() if key not in SCHEDULE_TABLES and not _is_finite(value)]
    if bad:
        raise ValueError(
            f"checkpoint '{source}' holds NaN or infinite values in {len(bad)} tensors ({bad[0]}…); "
            "use an earlier checkpoint"
        )
    return weights


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def averaged_keys(weights: Mapping[str, Tensor], source: Path) -> dict[str, str]:
    """Find the weight that each moving average belongs to.

    Args:
        weights: a checkpoint's weights.
        source: the file, for messages.

    Returns:
        Key of the average -> key of the weight; empty where the file holds no averages.

    Raises:
        ValueError: an average belongs to no weight of the file.
    """
    averages = [key for key in weights if key.startswith(AVERAGES) and key not in AVERAGE_COUNTERS]
    live = [key for key in weights if not key.startswith(AVERAGES)]
    # Diffusion models average `model`, first stages average themselves.
    owners = {AVERAGES + key.replace(".", ""): key for key in live}
    owners |= {AVERAGES + key.removeprefix("model.").replace(".", ""): key for key in live if key.startswith("model.")}
    lost = [key for key in averages if key not in owners or weights[owners[key]].shape != weights[key].shape]
    if lost:
        raise ValueError(f"checkpoint '{source}': {len(lost)} moving averages belong to no weight of it ({lost[0]}…)")
    return {key: owners[key] for key in averages}


def apply_averages(weights: Mapping[str, Tensor], choice: str | None, source: Path) -> dict[str, Tensor]:
    """Keep, bake in or drop the moving averages (EMA).

    Args:
        weights: a checkpoint's weights.
        choice: ``keep`` or ``bake`` (put each average in its weight's place), which need averages; ``drop``;
            None keeps them where there are any.
        source: the file, for messages.

    Returns:
        The weights to write.

    Raises:
        ValueError: averages are asked for and the file holds none.
    """
    owners = averaged_keys(weights, source)
    if not owners and choice in ("keep", "bake"):
        raise ValueError(
            f"checkpoint '{source}' holds no moving averages (EMA): it was trained with use_ema: false, or they were "
            f"dropped before; leave out --ema"
        )
    if choice in (None, "keep"):
        return dict(weights)
    kept = {key: value for key, value in weights.items() if not key.startswith(AVERAGES)}
    if choice == "bake":
        kept |= {owner: weights[average].to(weights[owner].dtype) for average, owner in owners.items()}
    return kept


def halve(weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Round weights to half precision (float16).

    Integers, schedule tables and single numbers stay as they are.

    Args:
        weights: a checkpoint's weights.
        source: the file, for messages.

    Returns:
        The rounded weights.

    Raises:
        ValueError: a weight is too large for half precision, which ends at 65504.
    """
    halved = {
        key: value.half() if value.is_floating_point() and value.ndim > 0 and key not in NEVER_HALVED else value
        for key, value in weights.items()
    }
    bad = [key for key, value in halved.items() if key not in SCHEDULE_TABLES and not _is_finite(value)]
    if bad:
        raise ValueError(
            f"checkpoint '{source}': {len(bad)} tensors hold values that half precision cannot ({bad[0]}…); use --full"
        )
    return halved


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Make sure that writing a file replaces nothing that it should not.

    Args:
        target: the file to write.
        source: the file that is read.
        overwrite: whether an existing file may be replaced; the source never is.

    Raises:
        ValueError: the target is the source.
        OSError: the target exists.
    """
    if target.exists() and source.exists() and os.path.samefile(target, source):
        raise ValueError(f"the output '{target}' is the input; give another name with --out")
    if target.is_dir():
        raise OSError(f"the output '{target}' is a folder; name a file")
    if target.exists() and not overwrite:
        raise OSError(f"the output '{target}' exists; give another name, or --overwrite to replace it")


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Lend a neighbouring name that becomes the target if all goes well, and vanishes if not.

    Args:
        target: the file or folder to make; its parent folder is made if it is missing.

    Yields:
        The name to write to.

    Raises:
        OSError: what was written could not be written, naming the target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        _replace(partial, target)
    except BaseException as error:
        _remove_quietly(partial)
        # torch reports a full disk as a RuntimeError of its file writer, safetensors as an error of its own.
        if isinstance(error, (OSError, RuntimeError, safetensors.SafetensorError)):
            free = shutil.disk_usage(target.parent).free
            reason = str(error).partition("\n")[0]
            raise OSError(f"could not write '{target}' ({free / 1e9:.1f} GB are free there): {reason}") from error
        raise


def _replace(partial: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(partial, target)
        return
    previous = target.with_name(f"{target.name}.{os.getpid()}.previous")
    os.replace(target, previous)
    os.replace(partial, target)
    shutil.rmtree(previous)


def _remove_quietly(path: Path) -> None:
    """Delete what is half-written while another exception is on its way up."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError:
        return  # the exception in flight is the one to show


def write_file(path: Path, weights: Mapping[str, Tensor], counters: Mapping[str, int], file_format: str) -> None:
    """Write a checkpoint file to the disk.

    Args:
        path: the file.
        weights: what goes into ``state_dict``.
        counters: numbers to keep beside it, such as ``global_step``; the metadata of a safetensors file.
        file_format: ``ckpt`` or ``safetensors``.

    Raises:
        OSError, RuntimeError, SafetensorError: it cannot be written.
    """
    compact = {key: _alone(value) for key, value in weights.items()}
    if file_format == "safetensors":
        path.touch()
        mode = path.stat().st_mode  # safetensors takes everyone else's permission to read away
        metadata = {"format": "pt", **{name: str(value) for name, value in counters.items()}}
        safetensors.torch.save_file(compact, path, metadata=metadata)
        path.chmod(mode)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        return
    with path.open("wb") as stream:
        torch.save({"state_dict": compact, **counters}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _alone(value: Tensor) -> Tensor:
    """Give a tensor storage of its own size: a view would be saved with all that it is a view of."""
    value = value.detach()
    is_whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if is_whole else value.clone(memory_format=torch.contiguous_format)


def verify_file(path: Path, weights: Mapping[str, Tensor], counters: Mapping[str, int], file_format: str) -> None:
    """Read a checkpoint file back and compare it with what was meant, bit for bit.

    Args:
        path: the file.
        weights: its weights.
        counters: the numbers beside them.
        file_format: its format.

    Raises:
        OSError: it cannot be read, or holds something else.
    """
    try:
        if file_format == "safetensors":
            stored = safetensors.torch.load_file(path)
            with safetensors.safe_open(path, "pt") as opened:
                noted = {name: int(value) for name, value in opened.metadata().items() if name in KEPT_COUNTERS}
        else:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            stored = content.pop("state_dict")
            noted = content
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise OSError(f"what was written cannot be read back ({error})") from error
    different = [key for key, value in weights.items() if key not in stored or not identical(stored[key], value)]
    if different or len(stored) != len(weights) or noted != dict(counters):
        what = f"{len(different)} tensors differ ({different[0]}…)" if different else "it holds other keys"
        raise OSError(f"what was written does not read back as it should: {what}; check the disk")


def identical(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same bit for bit, precision and shape included."""
    return a.dtype == b.dtype and torch.equal(a, b)


def write_verified(target: Path, weights: Mapping[str, Tensor], counters: Mapping[str, int], file_format: str) -> None:
    """Write a checkpoint file beside its place, read it back, and put it there if it is right.

    Args:
        target: the file to make.
        weights: what goes into ``state_dict``.
        counters: numbers to keep beside it.
        file_format: ``ckpt`` or ``safetensors``.

    Raises:
        OSError: it cannot be written or does not read back as it should; nothing is left behind.
    """
    with unfinished(target) as partial:
        write_file(partial, weights, counters, file_format)
        verify_file(partial, weights, counters, file_format)


def format_of(path: Path) -> str | None:
    """Tell the format that a file's name stands for, or None."""
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in FORMATS else None


def report_errors(program: str, work: Callable[[], int]) -> int:
    """Run a script's work, and show what the user can put right as one line.

    Args:
        program: the script's name.
        work: returns the exit status.

    Returns:
        The exit status; 2 after such an error.
    """
    try:
        return work()
    except (OSError, ValueError, MemoryError) as error:
        print(harmless(f"{program}: {str(error) or 'out of memory'}"), file=sys.stderr)
        return 2
