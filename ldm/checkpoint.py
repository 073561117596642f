"""Read, check and load checkpoints: Lightning ``.ckpt``, bare ``.ckpt`` and ``.safetensors``.

Reading cannot run code: pickles are read by torch's weights-only unpickler. Loading is strict: each key
that does not find its place is an error, but for a short list of tolerated ones, which are reported.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

SCHEDULE_TABLES: Final = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
"""Keys that the config computes: a file may lack them, and rounded copies never replace the exact ones."""

TOLERATED_UNEXPECTED: Final[Mapping[str, str]] = {
    "cond_stage_model.transformer.text_model.embeddings.position_ids": "position numbers, which are computed",
    "model_ema.": "moving averages, which use_ema: false does not use",
    "first_stage_model.loss.": "the loss that the first stage was trained with",
    "loss.": "the loss that the first stage was trained with",
    "loss.perceptual_loss.": "LPIPS, which perceptual_weight: 0 does not use",
    "embedding_manager.": "textual-inversion embeddings, which this trainer does not use",
}
"""Keys or key prefixes in a file that the model need not have, and what they are."""

# Checkpoints of Lightning before 1.6 hold classes of these packages as names of callbacks. They are read as
# inert stand-ins, as are numpy's numbers among schedulers' states; nothing of them is called.
_INERT_PACKAGES: Final = ("pytorch_lightning.callbacks.", "pytorch_lightning.utilities.", "main.")
_INERT_NAMES: Final = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode")

_ZIP: Final = b"PK\x03\x04"
"""What a zip archive begins with."""

_LFS_POINTER: Final = b"version https://git-lfs.github.com/"
"""What stands in place of a large file that git has not fetched."""

_ENCRYPTED: Final = 1
"""The bit of a zip record's flags that says so."""

_READ_AT_ONCE: Final = 1 << 20
"""Bytes."""

_LOCAL_HEADER: Final = struct.Struct("<26xHH")
"""The lengths of a name and of an extra field, at the end of what a zip archive puts before a record."""

_MOST_ENTRIES: Final = 50_000_000
"""Values that a checkpoint may hold besides the numbers inside its tensors, each counted as often as it is met."""

_DEEPEST: Final = 100
"""Containers inside each other; Lightning's own go ten deep."""

_DEEPEST_KEY: Final = 3
"""Tuples inside each other in a key."""

_PLAIN_TYPES: Final = (int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.layout, type(None))

_LONGEST_NAME: Final = 200
"""Characters of a key or reason that a message shows."""

_WHOLE_MODEL: Final = "name a whole model's .ckpt or .safetensors file"

_ROUNDING: Final = 1e-3
"""Relative difference that a schedule table may show from having been rounded on the way to the file."""


class _Inert:
    """Stands in for a class that an old checkpoint names; ignores whatever is done to it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take any arguments."""

    def __setstate__(self, state: object) -> None:
        """Drop the state."""

    def __setitem__(self, key: object, value: object) -> None:
        """Drop the item."""


class DamagedTensorError(ValueError):
    """A part of a checkpoint that is not what was written.

    Attributes:
        place: which part, and what is wrong with it.
    """

    def __init__(self, path: Path, place: str) -> None:
        super().__init__(
            f"checkpoint '{path}' is damaged at {place}; use another copy of the file, or an older checkpoint"
        )
        self.place = place


@dataclass(frozen=True)
class KeyReport:
    """What loading did.

    Attributes:
        loaded: number of tensors loaded.
        notes: one line for each group of keys that was passed over, or changed on the way.
    """

    loaded: int
    notes: list[str] = field(default_factory=list)


def read_checkpoint(path: str | Path, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint file, safely.

    Args:
        path: a ``.ckpt``/``.pt``/``.pth`` or ``.safetensors`` file.
        verify: whether to compare every tensor with its checksum first, see :func:`verify_checkpoint`;
            without it the tensors stay on the disk until they are looked at.

    Returns:
        A dictionary with ``state_dict`` (str -> tensor) and, for Lightning files, everything else in them.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it is damaged, empty of weights, or holds code.
    """
    path = Path(path)
    if path.is_dir():
        raise OSError(f"checkpoint '{path}' is a folder; name the .ckpt or .safetensors file inside it")
    if not path.is_file():
        raise OSError(f"checkpoint '{path}' does not exist")
    is_safetensors = path.suffix.lower() == ".safetensors"
    if verify and not is_safetensors:
        verify_checkpoint(path)
    content = _read_safetensors(path) if is_safetensors else _read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint '{path}' holds a {type(content).__name__}, not weights; {_WHOLE_MODEL}")
    content = _Reader(path).plain(content)
    if not isinstance(content.get("state_dict"), dict):
        content = {"state_dict": content}
    weights = content["state_dict"]
    strangers = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    unnamed = [repr(key) for key in weights if not isinstance(key, str)]
    if strangers or unnamed or not weights:
        found = f"{_first(strangers)} is no tensor" if strangers else "it is empty"
        found = f"{_first(unnamed)} is no key" if unnamed and not strangers else found
        raise ValueError(f"checkpoint '{path}' holds no state_dict of weights: {found}; {_WHOLE_MODEL}")
    return content


class _Reader:
    """Makes plain containers and tensors of what a file held, and refuses what only looks like them.

    The unpickler runs no code, yet it lets a file set attributes (a dictionary whose ``items`` is a number),
    claim tensors of terabytes that lie in a few bytes, and share one list so often that whoever walks through
    never arrives.

    Args:
        path: the file, for messages and for its size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file_size = path.stat().st_size
        self._seen: dict[int, tuple[Any, Any, int]] = {}
        self._above: set[int] = set()

    def plain(self, content: dict[Any, Any]) -> dict[Any, Any]:
        """Copy the containers; the tensors stay where they are.

        Args:
            content: what the unpickler gave.

        Returns:
            The same in dictionaries, lists and tuples.

        Raises:
            ValueError: it is not what a checkpoint holds.
        """
        copied: dict[Any, Any] = self._copy(content, "")[0]
        return copied

    def _copy(self, value: Any, name: str) -> tuple[Any, int]:
        """Copy one value; gives the copy, and how many values it is when all are written out."""
        if isinstance(value, Tensor):
            return self._tensor(value, name), 1
        if isinstance(value, (dict, list, tuple, set)):
            return self._container(value, name)
        if isinstance(value, (*_PLAIN_TYPES, _Inert)) or value is _Inert:
            return value, 1
        raise self._refusal(name, f"is a {type(value).__name__}")

    def _container(self, value: Any, name: str) -> tuple[Any, int]:
        if id(value) in self._seen:
            return self._seen[id(value)][1:]
        if id(value) in self._above or len(self._above) >= _DEEPEST:
            raise self._refusal(name, "is nested without end")
        self._above.add(id(value))
        count = 1
        copied: Any
        if isinstance(value, dict):
            copied = OrderedDict() if isinstance(value, OrderedDict) else {}
            for key, inner in dict.items(value):
                if not _is_plain_key(key):
                    raise self._refusal(name, f"has a {type(key).__name__} for a key")
                copied[key], inside = self._copy(inner, f"{name}.{key}" if name else str(key))
                count += inside
            # What torch notes of a state_dict's modules, and reads again.
            if isinstance(getattr(value, "_metadata", None), dict):
                copied._metadata = self._copy(vars(value)["_metadata"], f"{name}._metadata")[0]
        else:
            copies = [self._copy(inner, f"{name}.{number}") for number, inner in enumerate(value)]
            copied = type(value)(each for each, _ in copies)
            count += sum(inside for _, inside in copies)
        if count > _MOST_ENTRIES:
            raise self._refusal(name, f"holds more than {_MOST_ENTRIES:,} values")
        self._above.remove(id(value))
        self._seen[id(value)] = (value, copied, count)  # the value too: its number must not be given away again
        return copied, count

    def _tensor(self, value: Tensor, name: str) -> Tensor:
        if type(value) not in (Tensor, nn.Parameter) or value.device.type != "cpu":
            raise self._refusal(name, f"is a tensor without values ({type(value).__name__} on {value.device})")
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise self._refusal(name, "is a sparse, nested or quantised tensor")
        claimed = Tensor.numel(value) * Tensor.element_size(value)
        if claimed > self.file_size:
            raise self._refusal(name, f"claims {claimed:,} bytes, and the file has {self.file_size:,}")
        return Tensor.detach(value)

    def _refusal(self, name: str, what: str) -> ValueError:
        return ValueError(
            f"checkpoint '{self.path}' was refused: {_shown(name or 'its content')} {what}; that is nothing "
            "which training writes: get the file again from a source that you trust"
        )


def _is_plain_key(key: Any, depth: int = 0) -> bool:
    """Tell whether a key of a dictionary is a plain value, or a short nest of such."""
    if isinstance(key, tuple):
        return depth < _DEEPEST_KEY and all(_is_plain_key(inner, depth + 1) for inner in key)
    return isinstance(key, (*_PLAIN_TYPES, _Inert)) or key is _Inert


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file; see :func:`read_checkpoint`."""
    return read_checkpoint(path)["state_dict"]


def verify_checkpoint(path: str | Path) -> bool:
    """Compare each tensor of a ``.ckpt`` file with its checksum, in a few megabytes of memory.

    torch writes each tensor as a record of a zip archive, with its CRC-32, and does not look at that when
    it reads. Files without checksums (of torch before 1.6, or written without) have nothing to compare.

    Args:
        path: a ``.ckpt``/``.pt``/``.pth`` file.

    Returns:
        Whether the file has checksums.

    Raises:
        OSError: the file is missing or cannot be opened.
        ValueError: it is damaged; names the first tensor that is.
    """
    path = Path(path)
    if not _is_zip(path):
        return False
    _check_archive(path)
    record = None
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if not any(each.CRC for each in records):
                return False
            for record in records:
                with archive.open(record) as content:
                    while content.read(_READ_AT_ONCE):
                        pass
    # Damaged lengths and flags of a record send the reader anywhere.
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError) as error:
        if record is None:
            raise ValueError(_damaged(path)) from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not what was written"
        raise DamagedTensorError(path, f"{_content_of(path, record.filename)}: {reason}") from error
    return True


def _check_archive(path: Path) -> None:
    """Refuse archives of another kind than torch writes: packed ones can hold a million times their size."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:
        raise ValueError(_damaged(path)) from error
    names = {record.filename for record in records}
    claimed = sum(record.file_size for record in records)
    if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & _ENCRYPTED for record in records):
        what = "its records are compressed or encrypted"
    elif len(names) < len(records):
        what = "two of its records have one name"
    elif claimed > path.stat().st_size:
        what = f"its records claim {claimed:,} bytes, and the file has {path.stat().st_size:,}"
    elif any(name.endswith("/constants.pkl") for name in names):
        what = "it is a TorchScript program"
    else:
        return
    raise ValueError(
        f"checkpoint '{path}' was refused: {what}; get a .ckpt as torch.save writes it, or the file as .safetensors"
    )


def _content_of(path: Path, record: str) -> str:
    """Say what a record of a zipped checkpoint holds: the name of its tensor where that can be found out."""
    if record.endswith("/data.pkl"):
        return "its list of tensors"
    if "/data/" not in record:
        return f"its record {record}"
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            starts = {
                each.filename: _content_start(file, each.header_offset)
                for each in archive.infolist()
                if "/data/" in each.filename and each.file_size
            }
        names: dict[int, str] = {}
        for name, tensor in _named_tensors(_unpickle(path, is_zip=True)):
            if tensor.untyped_storage().nbytes():
                names.setdefault(tensor.untyped_storage().data_ptr(), name)
        # The file is mapped into memory as a whole, so that its tensors lie there as they lie in it.
        here = min(names) + starts[record] - min(starts.values())
        return f"tensor {names[here]}"
    except Exception:  # noqa: BLE001 - the file is known to be damaged: whatever this is comes of that
        return f"its record {record}"


def _content_start(file: Any, header: int) -> int:
    """Find where a zip record's content begins, in bytes from the file's beginning."""
    file.seek(header)
    return header + 30 + sum(_LOCAL_HEADER.unpack(file.read(30)))


def _named_tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Go through a nest of containers; weights have their checkpoint keys as names."""
    if isinstance(content, Tensor):
        yield name.removeprefix(".").removeprefix("state_dict."), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _named_tensors(value, f"{name}.{key}")
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            yield from _named_tensors(value, f"{name}.{number}")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(safetensors.torch.load_file(path))
    except MemoryError as error:
        raise MemoryError(_too_large(path)) from error
    except Exception as error:
        raise ValueError(_damaged(path, "safetensors")) from error


def _read_pickle(path: Path) -> Any:
    is_zip = _is_zip(path)
    if is_zip:
        _check_archive(path)
    try:
        return _unpickle(path, is_zip)
    except pickle.UnpicklingError as error:
        refused = re.search(r"unsupported (?:global|class|operand)[: ]+(?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
        names = [name for name in _unsafe_names(path) if not _is_inert(name)]
        names = names or [name for name in (refused.groups() if refused else ()) if "." in name]
        if not names:
            raise ValueError(_damaged(path)) from error
        raise ValueError(
            f"checkpoint '{path}' was refused: it holds more than weights ({_first(names)}), and reading it could "
            "run code; get the file as .safetensors, or from a source that stores weights alone"
        ) from error
    except MemoryError as error:
        raise MemoryError(_too_large(path)) from error
    except Exception as error:
        raise ValueError(_damaged(path)) from error


def _too_large(path: Path) -> str:
    return (
        f"checkpoint '{path}' ({path.stat().st_size:,} bytes) asks for more memory than there is; close other "
        "programs, or get the file again"
    )


def _unpickle(path: Path, is_zip: bool) -> Any:
    """Read what is allowed; the tensors of a zipped file stay on the disk until they are looked at."""
    inert = list(filter(_is_inert, _unsafe_names(path)))
    context = torch.serialization.safe_globals([(_Inert, name) for name in inert]) if inert else nullcontext()
    with context:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _is_inert(name: str) -> bool:
    """Tell whether a name is read as a stand-in."""
    return name.startswith(_INERT_PACKAGES) or name in _INERT_NAMES


def _is_zip(path: Path) -> bool:
    """Tell the formats apart by a file's beginning; the list of records at its end must be there too."""
    with path.open("rb") as file:  # an OSError from here on is one of reading a damaged file
        head = file.read(len(_ZIP))
    if head.startswith(pickle.PROTO):
        return False  # the old format, whose tensors can look like anything
    try:
        is_zip = zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        is_zip = False
    if is_zip != (head == _ZIP):
        raise ValueError(_damaged(path))
    return is_zip


def _damaged(path: Path, kind: str = "checkpoint") -> str:
    """Say that a file is not what it is called, and what it looks like."""
    size = path.stat().st_size
    return f"checkpoint '{path}' is damaged or no {kind} file ({size:,} bytes): {_looks_like(path)}"


def _looks_like(path: Path) -> str:
    """Tell what a file that is no checkpoint may be, and what to do about it."""
    with path.open("rb") as file:
        head = file.read(512)
    is_safetensors = path.suffix.lower() == ".safetensors"
    if not head:
        return "it is empty; get the file again"
    if head.startswith(_LFS_POINTER):
        return "it only points to the real file; type git lfs pull where it comes from, or download it by itself"
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, perhaps one that asks to log in or to accept a licence; download the file again"
    if all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head):
        return "it is text; get the .ckpt or .safetensors file again"
    if is_safetensors and head.startswith((_ZIP, pickle.PROTO)):
        return "it looks like a .ckpt file; rename it so"
    if not is_safetensors and head[8:10] == b'{"':
        return "it looks like a .safetensors file; rename it so"
    if head.startswith(_ZIP):
        return "its end is missing or damaged; get the file again, or use an older one"
    return "was it copied whole? Get the file again, or use an older one"


def _unsafe_names(path: Path) -> list[str]:
    """List what a zipped checkpoint would have imported; nothing for the old unzipped format."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001 - whatever a damaged pickle leads to; reading it gives the reason
        return []


def _first(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(_shown, names[:count])) + more


def _shown(text: str) -> str:
    """Write what a file says so that it stays on its line and does nothing to a terminal."""
    cut = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}…"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in cut)


def without_wrapper_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the name parts that compiled (``_orig_mod``) or parallel (``module``) wrappers put into keys."""
    clean = {}
    for key, value in state_dict.items():
        parts = [part for part in key.split(".") if part != "_orig_mod"]
        clean[".".join(parts[1:] if parts[0] == "module" else parts)] = value
    return clean


def load_weights(
    module: nn.Module, state_dict: Mapping[str, Tensor], source: str, ignore_keys: Sequence[str] = ()
) -> KeyReport:
    """Load weights into a module, strictly.

    The module is changed only when everything fits. Schedule tables are compared, never loaded. A module
    with moving averages that the file lacks starts them from the loaded weights.

    Args:
        module: the model.
        state_dict: the file's weights under checkpoint keys, in any floating dtype.
        source: the file's name, for messages.
        ignore_keys: prefixes of keys to pass over; what they name in the module keeps its values.

    Returns:
        What was loaded and what was passed over.

    Raises:
        ValueError: keys are missing or unexpected, shapes differ, values are NaN or infinite, or the
            file was made with another noise schedule.
    """
    if isinstance(ignore_keys, str):
        raise ValueError(f"ignore_keys is '{ignore_keys}'; give a list of prefixes: [{ignore_keys}]")
    ignored = tuple(ignore_keys)
    weights = {key: value for key, value in without_wrapper_prefixes(state_dict).items() if not key.startswith(ignored)}
    own = without_wrapper_prefixes(module.state_dict(keep_vars=True))
    own = {key: value for key, value in own.items() if not key.startswith(ignored)}
    notes = [f"keys that begin with {', '.join(ignored)} are passed over, as asked"] if ignored else []

    tables = {key for key in SCHEDULE_TABLES if key in own}
    if getattr(module, "zero_terminal_snr", False):
        notes.append("the noise schedule is rescaled to zero terminal SNR: the file's own is not compared")
    else:
        notes += _compare_schedule(own, weights, tables, source)

    missing = [key for key in own if key not in weights and key not in tables]
    unexpected = [key for key in weights if key not in own and key not in SCHEDULE_TABLES]
    averages = [key for key in own if key.startswith("model_ema.")]
    if averages and all(key in missing for key in averages):
        missing = [key for key in missing if key not in set(averages)]
        notes.append(f"{len(averages)} moving averages are not in the file: they start from its weights")
    else:
        averages = []
    for prefix, meaning in TOLERATED_UNEXPECTED.items():
        passed = [key for key in unexpected if key.startswith(prefix)]
        # With use_ema the model has such keys of its own: then an unknown one is an error like any other.
        if passed and not any(key.startswith(prefix) for key in own):
            unexpected = [key for key in unexpected if not key.startswith(prefix)]
            notes.append(f"{len(passed)} keys of the file are not used ({passed[0]}…): {meaning}")

    loadable = [key for key in own if key in weights and key not in tables]
    mismatched = [
        f"{key} is {tuple(weights[key].shape)}, the model needs {tuple(own[key].shape)}"
        for key in loadable
        if weights[key].shape != own[key].shape
    ]
    if missing or unexpected or mismatched:
        raise ValueError(_misfit_message(source, missing, unexpected, mismatched, total=len(own) - len(tables)))
    _refuse_non_finite(weights, loadable, source)

    halves = sorted(
        {str(weights[key].dtype).removeprefix("torch.") for key in loadable} - {"float32", "int32", "int64"}
    )
    if halves:
        notes.append(f"the file holds {', '.join(halves)}: converted to the model's precision")
    with torch.no_grad():
        for key in loadable:
            own[key].copy_(weights[key])
        if averages:
            _start_averages(own, averages)
    return KeyReport(loaded=len(loadable), notes=notes)


def _start_averages(own: Mapping[str, Tensor], averages: Iterable[str]) -> None:
    """Copy each weight to its moving average, whose name is the weight's with the dots removed.

    A diffusion model averages what is below ``model.``; a first stage, which has no such part, all of itself.
    """
    averaged = [key for key in own if key.startswith("model.")] or list(own)
    live = {"model_ema." + key.removeprefix("model.").replace(".", ""): key for key in averaged}
    for key in averages:
        if key in live:
            own[key].copy_(own[live[key]])


def _compare_schedule(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], tables: Iterable[str], source: str
) -> list[str]:
    rounded = 0
    for key in sorted(tables):
        if key not in weights or own[key].is_meta:
            continue
        stored, exact = weights[key].double(), own[key].double().cpu()
        rounding = torch.finfo(weights[key].dtype).eps if weights[key].is_floating_point() else 0.0
        if stored.shape != exact.shape or (key == "alphas_cumprod" and not _agree(stored, exact, rounding)):
            raise ValueError(
                f"checkpoint '{source}' was made with another noise schedule ({key} differs); set timesteps, "
                "beta_schedule, linear_start and linear_end of the config as in the model's own config"
            )
        rounded += not torch.equal(stored.float(), exact.float())
    return [f"{rounded} schedule tables are rounded in the file: the exact ones are kept"] if rounded else []


def _agree(stored: Tensor, exact: Tensor, rounding: float) -> bool:
    return bool(torch.allclose(stored, exact, rtol=max(_ROUNDING, rounding), atol=1e-6))


def _refuse_non_finite(weights: Mapping[str, Tensor], keys: Iterable[str], source: str) -> None:
    bad = [key for key in keys if weights[key].is_floating_point() and not bool(torch.isfinite(weights[key]).all())]
    if bad:
        raise ValueError(
            f"checkpoint '{source}' holds NaN or infinite values in {len(bad)} tensors ({_first(bad)}); "
            "use an earlier checkpoint"
        )


def _misfit_message(
    source: str, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str], total: int
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of the model's {total} keys are missing ({_first(missing, 1)})")
    if unexpected:
        parts.append(f"{len(unexpected)} keys are unexpected ({_first(unexpected, 1)})")
    if mismatched:
        parts.append(f"{len(mismatched)} shapes differ ({_first(mismatched, 1)})")
    # The cause first: the keys are for whom it does not satisfy.
    return f"checkpoint '{source}' does not fit the model: {_likely_cause(missing, unexpected)} ({'; '.join(parts)})"


def _likely_cause(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    def any_starts(keys: Sequence[str], *prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if any_starts(unexpected, "down_blocks.", "unet.", "text_encoder.", "time_embedding."):
        return "this looks like one part of a diffusers folder; name the folder, which holds model_index.json"
    if any_starts(unexpected, "lora_", "lycoris_"):
        return "this looks like a LoRA, not a whole model; name the base model's checkpoint"
    if any_starts(unexpected, "cond_stage_model.model."):
        return "this is a Stable Diffusion 2 model; what is read here is Stable Diffusion v1"
    if any_starts(unexpected, "conditioner."):
        return "this is an SDXL model; what is read here is Stable Diffusion v1"
    if any_starts(missing, "first_stage_model.") and not any_starts(missing, "model.diffusion_model."):
        return "the file holds no VAE; use a whole model's checkpoint"
    if any_starts(unexpected, "encoder.", "decoder.", "quant_conv."):
        return "this looks like a VAE alone, not a whole model"
    return "it belongs to another architecture than the config describes"
