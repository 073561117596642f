"""Damage files in every way, and see that reading them ends in success or in one clear line.

python scripts/fuzz_files.py [--minutes 10] [--seed N] [--keep DIR] [--kinds ckpt png ...]

Checkpoints (.ckpt in both of torch's formats, .safetensors, diffusers folders, cached latents), pictures of each
format, shards and their indexes, captions, settings, configs and the records of runs are made here, then changed: bits
flip, pieces go, come twice or from another file, lengths and offsets lie. Each is read in a process of its own with a
limit of time and memory, so that a crash or an endless loop is seen too.

Exit status: 0 nothing was found, 1 some files were read badly (--keep DIR keeps them), 2 it could not be tried.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from checkpoint_files import ROOT, report_errors
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import load_weights, read_weights
from ldm.data.folder_settings import read_folder_settings
from ldm.data.image_transform import place, read_picture, read_training_bytes, resample_filter
from ldm.data.latent_cache import DiskEntries
from ldm.data.picture_header import read_header
from ldm.data.sidecars import read_caption_list, read_sidecar
from ldm.data.tar_index import build_index, read_caption, read_index, read_member, write_index
from ldm.diffusers_format import FolderFormat, read_folder, schedule_tables
from ldm.ledger import read_ledger
from ldm.training.checkpoint_io import StreamingCheckpointIO
from ldm.training.cli import Options
from ldm.training.config import load_run_config
from ldm.training.run_record import read_record

TINY: Final = ROOT / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"

SECONDS: Final = 10.0
"""The longest that reading one small file may take."""

MEMORY: Final = 4 << 30
"""Bytes of address space that the reading process may take beyond what it begins with."""

LONGEST_LINE: Final = 3000
"""Characters of an error."""

SHOWN: Final = 20
"""Findings that are listed."""

CRASH, HANG, BUG, CLEAN, READ = "crash", "hang", "bug", "clean", "read"
"""How reading a file can end; the first three are findings."""

NUMBERS: Final = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**40,
    2**63 - 1,
    2**64 - 1,
)
"""Lengths and offsets that programs stumble over."""

WORDS: Final = (
    *(
        b"[" * 3000,
        b"{" * 200,
        b'{"a":' * 2000,
        b"${a}",
        b"${",
        b"&a [*a]",
        b"*a",
        b"<<: *a",
        b"!!python/name:os.system ",
    ),
    *(
        b"\0",
        b"\x1b[2J",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"../../x",
        b"/etc/passwd",
        b"\r",
        b"\t",
    ),
    *(b"9" * 5000, b"1e999", b"-1", b"NaN", b"null", b'"', b"'", b": ", b"\n", b"- ", b"%s", b"0x" + b"f" * 4000),
)
"""What text is spiked with."""


class Layer(torch.nn.Module):
    """What the small checkpoints are the weights of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)


# --- reading -----------------------------------------------------------------------------------------------


def read_ckpt(path: Path) -> None:
    """Read a checkpoint as a run that is continued does, and load its weights."""
    content = StreamingCheckpointIO().load_checkpoint(path)
    load_weights(Layer(), content["state_dict"], source=str(path))


def read_safetensors(path: Path) -> None:
    """Read and load weights."""
    load_weights(Layer(), read_weights(path), source=str(path))


def read_diffusers(path: Path) -> None:
    """Read a folder in the form of diffusers."""
    read_folder(path, tiny_params())


def read_latents(path: Path) -> None:
    """Read a cached latent."""
    DiskEntries(path.parent.parent).read(path.parent.name + path.stem)


def read_image(path: Path) -> None:
    """Read a picture in the ways that training and checking do."""
    header = read_header(path)
    size = (header.width, header.height)
    placement = place(size, (16, 16), "bucket", "center", (0.5, 0.5), flip=True)
    read_training_bytes(path, placement, "bucket", resample_filter("bicubic"))
    read_picture(path)


def read_shard(path: Path) -> None:
    """Read a shard's index and all that it names."""
    index = build_index(str(path), "stamp")
    with path.open("rb") as file:
        for number in range(len(index)):
            index.name(number)
            read_caption(file, index.texts[number])
            try:
                read_picture(io.BytesIO(read_member(file, *map(int, index.pictures[number]))))
            except OSError:
                continue  # its header could be read, and its pixels cannot


def read_index_file(path: Path) -> None:
    """Read the index of a shard."""
    if read_index(str(path)) is None:
        raise ValueError("the index is built again")


def read_captions(path: Path) -> None:
    """Read a list of captions."""
    problems = read_caption_list(str(path))[1]
    if problems:
        raise ValueError(problems[0])


def read_settings(path: Path) -> None:
    """Read a folder's settings."""
    problems = read_folder_settings(str(path), None)[1]
    if problems:
        raise ValueError(problems[0])


def read_config(path: Path) -> None:
    """Read and check a config."""
    try:
        load_run_config(Options(base=[str(path)]))
    except ValueError as error:
        lines = str(error).splitlines()
        raise ValueError(max(lines, key=len) if all(map(str.strip, lines)) else str(error)) from error


def read_run(path: Path) -> None:
    """Read a run's record."""
    if path.name == "run.json":
        read_record(path.parent)
        return
    for _ in read_ledger(path):
        pass


def read_text_sidecar(path: Path) -> None:
    """Read a caption."""
    read_sidecar(str(path))


# --- what is changed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: the file's name as it is read; a folder's where ``files`` has several.
        seeds: sound contents: for each, its files by their path below the folder, or one under the name ``""``.
        read: reads it.
        change: changes the content of one file in a way that knows its structure.
    """

    name: str
    seeds: Sequence[Mapping[str, bytes]]
    read: Callable[[Path], None]
    change: Callable[[bytes, random.Random], bytes] | None = None


def flip_bits(content: bytearray, draw: random.Random) -> None:
    """Flip single bits."""
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def cut_end(content: bytearray, draw: random.Random) -> None:
    """Lose the end."""
    del content[draw.randrange(len(content)) :]


def cut_out(content: bytearray, draw: random.Random) -> None:
    """Lose a piece."""
    start = draw.randrange(len(content))
    del content[start : start + draw.choice((1, 2, 4, 16, 512))]


def repeat(content: bytearray, draw: random.Random) -> None:
    """Have a piece twice, somewhere."""
    start = draw.randrange(len(content))
    piece = content[start : start + draw.choice((1, 4, 32, 512))]
    place_at = draw.randrange(len(content))
    content[place_at:place_at] = piece * draw.choice((1, 1, 100))


def overwrite(content: bytearray, draw: random.Random) -> None:
    """Put noise, zeros or ones over a piece."""
    start = draw.randrange(len(content))
    length = min(draw.choice((1, 4, 16, 512)), len(content) - start)
    content[start : start + length] = draw.choice((draw.randbytes(length), bytes(length), b"\xff" * length))


def lie_about_length(content: bytearray, draw: random.Random) -> None:
    """Put a number that is a wrong length or offset somewhere."""
    size = draw.choice((1, 2, 4, 8))
    number = draw.choice((*NUMBERS, len(content), draw.randrange(2 * len(content))))
    start = draw.randrange(len(content))
    content[start : start + size] = (number % 256**size).to_bytes(size, draw.choice(("little", "big")))


def spike(content: bytearray, draw: random.Random) -> None:
    """Put a word with a meaning somewhere."""
    start = draw.randrange(len(content) + 1)
    content[start : start + draw.choice((0, 0, 5))] = draw.choice(WORDS)


MUTATIONS: Final = (flip_bits, cut_end, cut_out, repeat, overwrite, lie_about_length, spike)


def mutate(content: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """Change a file's bytes in one to four random ways."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if not changed:
            return b""
        if draw.random() < 0.1:
            other = draw.choice(others) or b"\0"
            changed[draw.randrange(len(changed)) :] = other[draw.randrange(len(other)) :]
        else:
            draw.choice(MUTATIONS)(changed, draw)
    return bytes(changed)


def change_zip(content: bytes, draw: random.Random) -> bytes:
    """Change a record of an archive, whose checksums and lengths are right all the same; or its list of records."""
    if draw.random() < 0.3:
        changed = bytearray(content)
        place_at = draw.choice(
            [at for mark in (b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06") for at in _places(content, mark)]
        )
        start = place_at + 4 + draw.randrange(44)
        size = draw.choice((2, 4))
        changed[start : start + size] = (draw.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        return bytes(changed)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(each.filename, archive.read(each)) for each in archive.infolist()]
    pickles = [number for number, (name, _) in enumerate(records) if name.endswith(".pkl")]
    number = draw.choice(pickles) if pickles and draw.random() < 0.8 else draw.randrange(len(records))
    name, held = records[number]
    records[number] = (
        name if draw.random() < 0.95 else f"../{name}",
        mutate(held, [each for _, each in records], draw),
    )
    written = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w") as archive:
        warnings.simplefilter("ignore")
        for name, held in records:
            archive.writestr(
                name, held, compress_type=draw.choice((zipfile.ZIP_STORED,) * 30 + (zipfile.ZIP_DEFLATED,))
            )
    return written.getvalue()


def _places(content: bytes, mark: bytes) -> list[int]:
    """Find all places of a mark."""
    found, start = [], content.find(mark)
    while start >= 0:
        found.append(start)
        start = content.find(mark, start + 1)
    return found


def change_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Let the header lie about types, shapes, offsets and its own length."""
    length = struct.unpack("<Q", content[:8])[0]
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    number: Any = draw.choice((*NUMBERS, -1, 1.5, "3", None, [], length, len(content)))
    what = draw.randrange(7)
    if what == 0:
        entry["dtype"] = draw.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X9", None, 3))
    elif what == 1:
        entry["shape"] = draw.choice(([number], [number, number], [2, number], [0, 2**63], [1] * 70, number))
    elif what == 2:
        entry["data_offsets"] = draw.choice(([0, number], [number, number], [number, 0], [4, 2], [number], number))
    elif what == 3:
        header[draw.choice((name, "../x", "", "\x1b[2J", "__metadata__", "x" * 100_000))] = draw.choice(
            (dict(entry), number)
        )
    elif what == 4:
        header["__metadata__"] = draw.choice(({"a": number}, {"a": "b" * 10_000}, number, {"a": {"b": {}}}))
    text = json.dumps(header).encode()
    if what == 5:
        text = text.replace(b"}", b"," + text[1:-1] + b"}", 1)
    elif what == 6:
        text = mutate(text, [text], draw)
    stated = len(text) if draw.random() < 0.9 else draw.choice(NUMBERS) % 2**64
    return struct.pack("<Q", stated) + text + content[8 + length :] + draw.choice((b"", b"", b"\0" * 5))


def change_tar(content: bytes, draw: random.Random) -> bytes:
    """Change a member's header and make its checksum right again."""
    changed = bytearray(content)
    start = 512 * draw.randrange(max(1, len(content) // 512))
    at, size = draw.choice(((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    values = (b"../../x.png", b"/etc/x.png", b"0" * 12, b"7" * 12, b"\x80" + b"\xff" * 11, b"-1", b"1256LKgxSV", b"\0")
    changed[start + at : start + at + size] = draw.choice((*values, draw.randbytes(size))).ljust(size, b"\0")[:size]
    header = changed[start : start + 512]
    if len(header) == 512:
        header[148:156] = b" " * 8
        changed[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(changed)


# --- sound files -------------------------------------------------------------------------------------------


def tiny_params() -> dict[str, Any]:
    """Give ``model.params`` of the embedded config."""
    params: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(TINY).model.params)  # type: ignore[assignment]
    return params


def _saved(content: Any, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _checkpoint() -> dict[str, Any]:
    layer = Layer()
    optimiser = torch.optim.AdamW(layer.parameters())
    layer.layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    counts = {"current": {"ready": 1, "completed": 1}, "total": {"ready": 1, "completed": 1}}
    return {
        "state_dict": layer.state_dict(),
        "epoch": 1,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.0",
        "optimizer_states": [optimiser.state_dict()],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 1}],
        "loops": {"fit_loop": {"epoch_progress": counts}},
        "callbacks": {"ModelCheckpoint": {"best_model_path": "a", "kth_value": torch.tensor(1.0)}},
        "hyper_parameters": {"rate": 1e-6},
    }


def _picture(picture_format: str, mode: str = "RGB", **how: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, picture_format, **how)
    return stream.getvalue()


def _pictures() -> dict[str, list[bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "jpg": [_picture("JPEG"), _picture("JPEG", progressive=True, exif=exif), _picture("JPEG", "CMYK")],
        "png": [_picture("PNG"), _picture("PNG", "P", exif=exif), _picture("PNG", "RGBA"), _picture("PNG", "LA")],
        "bmp": [_picture("BMP"), _picture("BMP", "P")],
        "gif": [_picture("GIF")],
        "tiff": [_picture("TIFF"), _picture("TIFF", compression="tiff_lzw"), _picture("TIFF", compression="jpeg")],
    }
    for name in ("webp", "avif"):
        if f".{name}" in Image.registered_extensions() and Image.registered_extensions()[f".{name}"] in Image.SAVE:
            made[name] = [_picture(name.upper()), _picture(name.upper(), "RGBA")]
    return made


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in (
            ("000.jpg", _picture("JPEG")),
            ("000.txt", b"a cat"),
            ("001.png", _picture("PNG")),
            ("001.json", b'{"caption": "a dog"}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _folder() -> dict[str, bytes]:
    """Make a diffusers folder with a few weights of each part."""
    params = tiny_params()
    betas = schedule_tables(params)["betas"].tolist()
    files = {
        name: json.dumps(content).encode()
        for name, content in FolderFormat(params).configs(betas, params["scale_factor"]).items()
    }
    weights = {
        "unet": "conv_in.weight",
        "vae": "quant_conv.weight",
        "text_encoder": "text_model.final_layer_norm.weight",
    }
    for part, key in weights.items():
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        files[f"{part}/{stem}.safetensors"] = safetensors.torch.save({key: torch.ones(4)})
    return files


def _sharded(folder: Mapping[str, bytes]) -> dict[str, bytes]:
    """Lay the UNet's weights out as an index and its shards."""
    files = dict(folder)
    weights = files.pop("unet/diffusion_pytorch_model.safetensors")
    index = {"weight_map": {"conv_in.weight": "part-1.safetensors"}}
    return {
        **files,
        "unet/part-1.safetensors": weights,
        "unet/diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode(),
    }


def make_kinds(work: Path) -> dict[str, Kind]:
    """Make sound files of every kind.

    Args:
        work: an empty folder for what can only be made as a file.

    Returns:
        The kinds by name.
    """
    torch.manual_seed(0)
    checkpoint = _checkpoint()
    weights = {key: value.clone() for key, value in checkpoint["state_dict"].items()}
    DiskEntries(work / "latents").write("entry", torch.ones(8, 2, 2))
    latents = DiskEntries(work / "latents").path("entry")
    (work / "shard.tar").write_bytes(_tar())
    write_index(build_index(str(work / "shard.tar"), "stamp"), str(work / "index.npz"))
    folder = _folder()
    parts = ("began", "state", "wall_seconds", "process", "data", "config", "device")
    record = {"sessions": [dict.fromkeys(parts, "x")], "data_sets": {}}
    kinds = {
        "ckpt": Kind(
            "w.ckpt",
            [{"": _saved(checkpoint, True)}, {"": _saved(weights, True)}],
            read_ckpt,
            change_zip,
        ),
        "legacy": Kind("w.ckpt", [{"": _saved(checkpoint, False)}, {"": _saved(weights, False)}], read_ckpt),
        "safetensors": Kind(
            "w.safetensors", [{"": safetensors.torch.save(weights)}], read_safetensors, change_safetensors
        ),
        "diffusers": Kind("folder", [folder, _sharded(folder)], read_diffusers),
        "latents": Kind(
            f"{latents.parent.name}/{latents.name}", [{"": latents.read_bytes()}], read_latents, change_safetensors
        ),
        "shard": Kind("0.tar", [{"": _tar()}], read_shard, change_tar),
        "index": Kind("0.npz", [{"": (work / "index.npz").read_bytes()}], read_index_file, change_zip),
        "caption": Kind("a.txt", [{"": "ein Bär\nauf dem Eis".encode()}], read_text_sidecar),
        "captions": Kind("captions.jsonl", [{"": b'{"file_name": "1.jpg", "text": "a cat"}\n' * 3}], read_captions),
        "settings": Kind("folder.yaml", [{"": b"multiply: 2\nflip_p: 0.5\n"}], read_settings),
        "yaml": Kind("a.yaml", [{"": TINY.read_bytes()}], read_config),
        "record": Kind("run.json", [{"": json.dumps(record).encode()}], read_run),
        "ledger": Kind("exposure.jsonl", [{"": b'{"run_epoch": 0, "batch": 1}\n' * 3}], read_run),
    }
    pictures = {
        name: Kind(f"a.{name}", [{"": each} for each in seeds], read_image) for name, seeds in _pictures().items()
    }
    return {**kinds, **pictures}


# --- the process that reads --------------------------------------------------------------------------------


def serve(connection: Connection, kinds: Mapping[str, Kind]) -> None:
    """Read the files that are named to this process, and say how each reading ended.

    Args:
        connection: gives kind and path; takes outcome and message.
        kinds: the kinds of files.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries written in C say of damaged files
        os.dup2(nowhere, stream)
    _limit_memory()
    while True:
        try:
            kind, path = connection.recv()
        except EOFError:
            return
        connection.send(judge(kinds[kind].read, Path(path)))


def judge(read: Callable[[Path], None], path: Path) -> tuple[str, str]:
    """Read a file, and tell a clean end from another.

    Args:
        read: the reader.
        path: the file.

    Returns:
        One of ``READ``, ``CLEAN`` and ``BUG``, and the error's message.
    """
    try:
        read(path)
    except (ValueError, OSError, MemoryError) as error:
        message = str(error)
        is_line = 0 < len(message) <= LONGEST_LINE and "\n" not in message and "\x1b" not in message
        is_documented = isinstance(error, (OSError, MemoryError)) or type(error) in (ValueError, *_own_errors())
        return (CLEAN if is_line and is_documented else BUG), f"{type(error).__name__}: {message}"
    except Exception as error:  # noqa: BLE001 - what this script is looking for
        return BUG, f"{type(error).__name__}: {error}"
    return READ, ""


def _own_errors() -> tuple[type[ValueError], ...]:
    """List the project's own kinds of ValueError; Python's, such as UnicodeDecodeError, say nothing to a user."""
    return tuple(each for each in ValueError.__subclasses__() if each.__module__.startswith("ldm."))


def _limit_memory() -> None:
    """Bound the process's memory where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    statm = Path("/proc/self/statm")
    if statm.is_file():
        taken = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


class Reader:
    """A process that reads files, begun anew after each crash."""

    def __init__(self, kinds: Mapping[str, Kind], seconds: float = SECONDS) -> None:
        self.kinds = kinds
        self.seconds = seconds
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
        self.process: Any = None
        self.connection: Any = None

    def read(self, kind: str, path: Path) -> tuple[str, str]:
        """Have a file read; gives the outcome and a message."""
        if self.process is None:
            self.connection, theirs = self.context.Pipe()
            self.process = self.context.Process(target=serve, args=(theirs, self.kinds), daemon=True)
            self.process.start()
            theirs.close()
        self.connection.send((kind, str(path)))
        if not self.connection.poll(self.seconds):
            self.close()
            return HANG, f"not read within {self.seconds:g} s"
        try:
            outcome: tuple[str, str] = self.connection.recv()
            return outcome
        except EOFError:
            process = self.process
            process.join()
            self.close()
            return CRASH, f"the process ended with status {process.exitcode}"

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
            self.process = None


# --- the search --------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What was found.

    Attributes:
        counts: of kind and outcome.
        findings: kind, outcome, message and number of each file that was read badly.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[tuple[str, str, str, int]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Write the tally as a table, and the first findings."""
        rows = [f"{'kind':12} {'executions':>10} {'clean errors':>12} {'read':>8} {'findings':>8}"]
        for kind in sorted({kind for kind, _ in self.counts}):
            by = {outcome: self.counts[kind, outcome] for outcome in (CRASH, HANG, BUG, CLEAN, READ)}
            bad = by[CRASH] + by[HANG] + by[BUG]
            rows.append(f"{kind:12} {sum(by.values()):10,} {by[CLEAN]:12,} {by[READ]:8,} {bad:8,}")
        rows.append(f"{'all':12} {self.counts.total():10,}")
        first: dict[tuple[str, str, str], int] = {}
        for kind, outcome, message, number in self.findings:
            first.setdefault((kind, outcome, message[:80]), number)
        rows += [f"{outcome} of {kind} number {number}: {text!r}" for (kind, outcome, text), number in first.items()][
            :SHOWN
        ]
        return rows


def damaged(kind: Kind, draw: random.Random) -> dict[str, bytes]:
    """Damage a file, or one file of a folder.

    Args:
        kind: what to damage.
        draw: the source of randomness.

    Returns:
        The files.
    """
    files = dict(draw.choice(kind.seeds))
    name = draw.choice(sorted(files))
    others = [content for seed in kind.seeds for content in seed.values()]
    change = kind.change or (change_safetensors if name.endswith(".safetensors") else None)
    if change is not None and draw.random() < 0.6:
        files[name] = change(files[name], draw)
    else:
        files[name] = mutate(files[name], others, draw)
    return files


def search(
    kinds: Mapping[str, Kind], seconds: float, seed: int, work: Path, keep: Path | None, reader: Reader
) -> Tally:
    """Damage and read files until the time is over.

    Args:
        kinds: what to damage, in turn.
        seconds: how long.
        seed: the same seed damages the same files in the same ways.
        work: a folder for the files.
        keep: where those go that are read badly.
        reader: what reads them.

    Returns:
        What was found.
    """
    tally = Tally()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        for name, kind in kinds.items():
            number += 1
            files = damaged(kind, random.Random(f"{seed} {name} {number}"))
            place_at = work / "case"
            write_case(place_at, kind, files)
            outcome, message = reader.read(name, place_at / kind.name)
            tally.counts[name, outcome] += 1
            if outcome in (CRASH, HANG, BUG):
                tally.findings.append((name, outcome, message, number))
                if keep is not None:
                    shutil.copytree(place_at, keep / f"{number}-{name}-{outcome}", dirs_exist_ok=True)
            shutil.rmtree(place_at)
    return tally


def write_case(folder: Path, kind: Kind, files: Mapping[str, bytes]) -> None:
    """Write damaged files under the names that their reader expects."""
    for name, content in files.items():
        path = folder / kind.name / name if name else folder / kind.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="another seed damages the files in other ways")
    parser.add_argument("--keep", type=Path, help="folder for the files that are read badly")
    parser.add_argument("--kinds", nargs="+", help="only these kinds of files (default: all)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the search.

    Args:
        argv: the words of the command line; None takes the process's own.

    Returns:
        The exit status.
    """
    options = parse_arguments(argv)
    return report_errors("fuzz_files.py", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Make the sound files, see that they are read, and search.

    Raises:
        ValueError: a kind is unknown, or a sound file is not read.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        kinds = make_kinds(work)
        unknown = sorted(set(options.kinds or ()) - set(kinds))
        if unknown:
            raise ValueError(f"--kinds {' '.join(unknown)}: there is no such kind; there are {', '.join(kinds)}")
        kinds = {name: kind for name, kind in kinds.items() if name in (options.kinds or kinds)}
        reader = Reader(kinds)
        try:
            check_seeds(kinds, work, reader)
            tally = search(kinds, 60 * options.minutes, options.seed, work, options.keep, reader)
        finally:
            reader.close()
    print("\n".join(tally.lines()))
    return 1 if tally.findings else 0


def check_seeds(kinds: Mapping[str, Kind], work: Path, reader: Reader) -> None:
    """See that the files are read as they were made: damaging others would prove nothing."""
    for name, kind in kinds.items():
        for files in kind.seeds:
            write_case(work / "sound", kind, files)
            outcome, message = reader.read(name, work / "sound" / kind.name)
            shutil.rmtree(work / "sound")
            if outcome != READ:
                raise ValueError(f"a sound file of the kind {name} is not read: {message}")


if __name__ == "__main__":
    sys.exit(main())
