"""The error catalogue: what a user sees first, and the exit status, for each thing that can go wrong.

Each fault is injected into a small workplace and met by the real program. ``docs/troubleshooting.md`` has a row for
each message here, and no other.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pytorch_lightning as pl
import safetensors.torch
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from ldm.data.every_dream import EveryDreamBatch
from ldm.training.run import main
from ldm.training.run_record import process_mark
from tests.conftest import ROOT
from tests.end_to_end.conftest import TINY
from tests.unit.training.faulty_disk import FaultyDisk
from tests.unit.training.toy import ToyDiffusion, make_pictures

HERE: Final = "tests.end_to_end.test_error_catalogue"
TABLE: Final = ROOT / "docs" / "troubleshooting.md"
ROW: Final = re.compile(r"\| `(?P<message>[^|]+)` \| [^|]+ \| [^|]+ \| (?P<status>\d+) \|")
LONGEST_LINE: Final = 380
"""Characters of a line, with the short paths that are used here. What is longer is not read."""

YAML = """\
model:
  base_learning_rate: 0.01
  target: tests.unit.training.toy.ToyDiffusion
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: {target: ldm.data.every_dream.EveryDreamBatch, params: {size: 16, repeats: 2}}
lightning:
  callbacks: {image_logger: {params: {disabled: true}}}
  trainer: {max_epochs: 1}
"""
PICTURE = Path("pictures/folder0/a plain square 0_.png")
RUN = Path("logs/run")
CHECKPOINTS = RUN / "checkpoints"
LAST = CHECKPOINTS / "last.ckpt"
WEB_PAGE = b"<!DOCTYPE html><html><body>Sign in to download</body></html>"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4265380512\n"

Inject = Callable[[pytest.MonkeyPatch], object]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: what, in a few words.
        said: the first line that a user reads, without ``error: ``; ``…`` stands for whatever differs. A row of the
            table begins with it.
        words: the command line.
        inject: makes it happen; the working folder is the workplace.
        remedy: what the line says to do.
        program: the script that is started instead of main.py.
        status: the exit status.
        lines: how many lines it takes; one for each problem, and one that says what to do about all.
        is_late: whether the run has begun by then.
    """

    name: str
    said: str
    words: Sequence[str] = ()
    inject: Inject = lambda patch: None
    remedy: str = ""
    program: str = "main"
    status: int = 2
    lines: int = 1
    is_late: bool = False


# --- models, data and callbacks that fail ------------------------------------------------------------------


class NeedsMemory(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


class BlowsUp(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 3 else loss


class Breaks(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise IndexError("index 4 is out of range")
        return super().training_step(batch, batch_idx)


class LosesAPicture(ToyDiffusion):
    def on_train_start(self) -> None:
        PICTURE.unlink()


class RotsAPicture(ToyDiffusion):
    def on_train_start(self) -> None:
        PICTURE.unlink()
        PICTURE.symlink_to(Path("toy.yaml").resolve())


class GetsCtrlC(ToyDiffusion):
    number = signal.SIGINT

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            signal.raise_signal(self.number)
        return super().training_step(batch, batch_idx)


class GetsSigterm(GetsCtrlC):
    number = signal.SIGTERM


class GetsCtrlCTwice(GetsCtrlC):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            signal.raise_signal(self.number)
        return super().training_step(batch, batch_idx)


class GetsCtrlCEarly(ToyDiffusion):
    def __init__(self) -> None:
        super().__init__()
        signal.raise_signal(signal.SIGINT)


class LosesItsLoader(EveryDreamBatch):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class RaisingCallback(pl.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyError("colour")


# --- how faults are injected -------------------------------------------------------------------------------


def write(path: str | Path, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def puts(path: str | Path, content: str | bytes) -> Inject:
    """Write a file."""
    return lambda patch: write(path, content)


def yaml_with(old: str, new: str) -> Inject:
    """Write the config with one thing changed."""
    assert old in YAML
    return puts("mine.yaml", YAML.replace(old, new))


def break_pictures(count: int) -> Inject:
    return lambda patch: [
        path.write_bytes(b"not a picture") for path in sorted(Path("pictures").rglob("*.png"))[:count]
    ]


def link_a_picture(patch: pytest.MonkeyPatch) -> None:
    """Put a link in a picture's place, which can go without harm."""
    PICTURE.rename("a picture elsewhere.png")
    PICTURE.symlink_to(Path("a picture elsewhere.png").resolve())


def put_huge_picture(patch: pytest.MonkeyPatch) -> None:
    """A PNG of a few bytes that says it has ten thousand megapixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    write(PICTURE, b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


def saves(name: str, content: Callable[[], object]) -> Inject:
    """Save something as a checkpoint."""
    return lambda patch: torch.save(content(), name)


def toy_weights(**changes: torch.Tensor) -> dict[str, Any]:
    return {"state_dict": {**ToyDiffusion().state_dict(), **{key.replace("_", "."): changes[key] for key in changes}}}


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code-has-run",)


def tiny_weights() -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load("tiny.ckpt", weights_only=True)["state_dict"]
    return weights


def as_sd2() -> dict[str, torch.Tensor]:
    """A tiny model under Stable Diffusion 2's names."""
    ours, theirs = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
    return {key.replace(ours, theirs): value for key, value in tiny_weights().items()}


def as_sdxl() -> dict[str, torch.Tensor]:
    ours, theirs = "cond_stage_model.", "conditioner.embedders.0."
    return {key.replace(ours, theirs): value for key, value in tiny_weights().items()}


def without_vae() -> dict[str, torch.Tensor]:
    return {key: value for key, value in tiny_weights().items() if not key.startswith("first_stage_model.")}


def with_other_schedule() -> dict[str, torch.Tensor]:
    weights = tiny_weights()
    return {**weights, "alphas_cumprod": weights["alphas_cumprod"] ** 2}


def lying_safetensors(patch: pytest.MonkeyPatch) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    write("some.safetensors", struct.pack("<Q", len(header)) + header + bytes(16))


def save_ckpt_as_safetensors(patch: pytest.MonkeyPatch) -> None:
    shutil.copy("toy.ckpt", "some.safetensors")


def save_safetensors_as_ckpt(patch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file(toy_weights()["state_dict"], "toy.safetensors")
    Path("toy.safetensors").rename("some.ckpt")


def change_checkpoints(change: Callable[[Path], object], *names: str) -> Inject:
    """Change some or all of a run's checkpoints."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        for path in sorted(CHECKPOINTS.iterdir()):
            if not names or path.name in names:
                change(path)

    return inject


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rot(path: Path) -> None:
    """Flip a bit of a weight."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["model.0.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def prune(path: Path) -> None:
    torch.save({"state_dict": torch.load(path, weights_only=True)["state_dict"]}, path)


def drop_a_weight(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["model.0.weight"]
    torch.save(content, path)


def add_a_group(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["optimizer_states"][0]["param_groups"] *= 2
    torch.save(content, path)


def pretend_to_run(patch: pytest.MonkeyPatch) -> None:
    """Let the run's record say that a process is at it: the one that started the tests."""
    record = json.loads((RUN / "run.json").read_text())
    number = os.getppid()
    session = record["sessions"][-1]
    session["state"] = "running"
    session["process"] = {
        **session["process"],
        "id": number,
        "host": socket.gethostname(),
        "mark": process_mark(number),
    }
    (RUN / "run.json").write_text(json.dumps(record))


def disk_that_fails(fault: int, at: int = 0, stays: bool = True) -> Inject:
    """Let the disk fail at something it is asked for when a checkpoint is saved."""
    return lambda patch: patch.setattr("ldm.training.checkpoint_io.Disk", lambda: FaultyDisk(at, fault, stays=stays))


class SmallDisk(FaultyDisk):
    """A disk that is nearly full."""

    def __init__(self) -> None:
        super().__init__(at=-1, fault=errno.EIO)

    def free(self, folder: Path) -> int:
        return 10


def fill_the_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("ldm.training.checkpoint_io.Disk", SmallDisk)


# --- command lines -----------------------------------------------------------------------------------------


def train(*words: str, base: str = "toy.yaml", data: str = "pictures") -> tuple[str, ...]:
    """The everyday command."""
    return ("--base", base, "-t", "-n", "new", "--data_root", data, *words)


def start_from(checkpoint: str, base: str = "toy.yaml") -> tuple[str, ...]:
    return train("--actual_resume", checkpoint, base=base)


def resume(*words: str, run: str | Path = RUN) -> tuple[str, ...]:
    return ("-t", "-r", str(run), *words)


def model(name: str) -> tuple[str, ...]:
    """The everyday command with a model that fails."""
    return train(f"model.target={HERE}.{name}")


COMMAND_LINE = [
    Fault("no words", "nothing was asked for; the everyday command …", remedy="python main.py --base"),
    Fault("a misspelt flag", "unknown flag --…; did you mean --…?", train("--max_epoch", "3")),
    Fault("a flag without its value", "--…: a value is missing; write …", ("--base", "toy.yaml", "-t", "--data_root")),
    Fault("no --base", "no config was given: …", ("-t",), remedy="add --base configs/"),
    Fault("no -t", "nothing was asked for: add -t …", ("--base", "toy.yaml")),
    Fault(
        "a path with a space",
        "'…' belongs to no flag; …",
        train(data="my", base="toy.yaml")[:-1] + ("my", "pictures"),
        remedy="a value with spaces in quotes",
    ),
    Fault("text for a number", "--…: expected …, got '…'", train("--max_epochs", "three")),
    Fault("a choice that is none", "--…: invalid choice: …", train("--on_nan", "go"), remedy="stop"),
    Fault("-r with -n", "-n/--name and -r/--resume exclude each other: …", resume("-n", "new"), remedy="leave out -n"),
    Fault(
        "-r with --actual_resume",
        "--actual_resume and -r/--resume exclude each other: …",
        resume("--actual_resume", "toy.ckpt"),
        remedy="leave out one",
    ),
    Fault(
        "--accept_changes alone",
        "--accept_changes belongs to -r/--resume: …",
        train("--accept_changes"),
        remedy="leave",
    ),
    Fault(
        "--warm_optimizer alone",
        "--warm_optimizer starts a new run with a checkpoint's optimiser state: …",
        train("--warm_optimizer"),
        remedy="--actual_resume CKPT",
    ),
    Fault("a slash in the name", "-n/--name '…': / cannot be part of a folder name", train("-n", "a/b")),
    Fault(
        "a name that is too long",
        "the run folder's name … has … letters, more than …",
        train("-n", "n" * 250),
        remedy="-n/--name",
    ),
]

CONFIGS = [
    Fault("a config that is not there", "…: no such config file; did you mean …?", train(base="toi.yaml")),
    Fault(
        "a bracket that is not closed",
        "…: not valid YAML: …",
        train(base="mine.yaml"),
        puts("mine.yaml", "model: [unclosed\n"),
        remedy="mine.yaml:2",
    ),
    Fault(
        "tabs in a config",
        "…: not valid YAML: …",
        train(base="mine.yaml"),
        puts("mine.yaml", "model:\n\ttarget: a\n"),
        remedy="spaces, not with tabs",
    ),
    Fault(
        "a key that stands twice",
        "…: not valid YAML: …",
        train(base="mine.yaml"),
        puts("mine.yaml", YAML + "data: {}\n"),
        remedy="duplicate key data",
    ),
    Fault(
        "a tag that would run code",
        "…: not valid YAML: …",
        train(base="mine.yaml"),
        puts("mine.yaml", YAML + "more: !!python/object/apply:os.mkdir ['code-has-run']\n"),
        remedy="plain values only",
    ),
    Fault("a folder as a config", "…: is a folder; --base takes YAML files", train(base="pictures")),
    Fault("a checkpoint as a config", "…: not a YAML text file …", train(base="toy.ckpt"), remedy="not UTF-8"),
    Fault(
        "a config in an old encoding",
        "…: not a YAML text file …",
        train(base="mine.yaml"),
        puts("mine.yaml", "# größe\n".encode("latin-1")),
    ),
    Fault(
        "an empty config", "…: the file is empty; …", train(base="mine.yaml"), puts("mine.yaml", ""), remedy="model:"
    ),
    Fault(
        "a list as a config",
        "…: expected keys such as model: and data: at the top, …",
        train(base="mine.yaml"),
        puts("mine.yaml", "- a\n"),
    ),
    Fault(
        "a config without a model",
        "config: model: is missing; …",
        train(base="mine.yaml"),
        puts("mine.yaml", YAML[YAML.index("data:") :]),
    ),
    Fault("a misspelt key", "…: … has no key …; did you mean …?", train("data.params.wraps=true"), remedy="wrap?"),
    Fault("text for a number in a config", "…: expected …, got …", train("data.params.batch_size=two")),
    Fault("a number out of range", "…: … is out of range; it must be …", train("model.base_learning_rate=0")),
    Fault(
        "more loader processes than a machine bears",
        "…: … is out of range; it must be …",
        train("data.params.num_workers=1000000"),
    ),
    Fault("a target that is not there", "…: target …: the module … has no …; did you mean …?", model("Break")),
    Fault(
        "a target in a module that is not there",
        "…: target …: there is no module '…' in …",
        train("model.target=ldm.models.difusion.ddpm.LatentDiffusion"),
        remedy="did you mean ldm.models.diffusion.ddpm",
    ),
    Fault(
        "a value that was left open",
        "…: must be given; set it in a YAML file or with …",
        train(base="mine.yaml"),
        yaml_with("batch_size: 2", "batch_size: ???"),
        remedy="data.params.batch_size=VALUE",
    ),
    Fault(
        "a reference to nothing",
        "…: ${…} names no key of the config; …",
        train(base="mine.yaml"),
        yaml_with("batch_size: 2", "batch_size: ${batch}"),
        remedy="mine.yaml:7: data.params.batch_size: ${batch} names",
    ),
    Fault("an override that is no YAML", "override …: the value is not valid YAML: …", train("data.params.wrap=[1")),
    Fault(
        "three mistakes at once",
        "…: … has no key …; did you mean …?",
        train("data.params.bach_size=2", "data.params.wrap=flase", "model.base_learning_rate=0"),
        lines=3,
    ),
]

MACHINE = [
    Fault(
        "a device whose package is missing",
        "lightning.trainer cannot have what it asks for: …",
        train("--strategy", "deepspeed"),
        remedy="pip install",
    ),
    Fault("a precision that is none", "--…: expected …, got '…'", train("--precision", "12")),
    Fault("a list of GPUs that is none", "flag --gpus: '…' is not a list of GPU numbers; …", train("--gpus", "first")),
    Fault("a strategy that is none", "flag --…: lightning.trainer.…: '…' is unknown; …", train("--strategy", "fast")),
    Fault("a log folder that is a file", "cannot write the run folder …", train("-l", "toy.yaml"), remedy="--logdir"),
    Fault("no data root", "data_root is missing: add --data_root FOLDER, …", ("--base", "toy.yaml", "-t")),
    Fault(
        "a data root that is not there", "…: data_root … does not exist; …", train(data="picture"), remedy="pictures?"
    ),
    Fault(
        "a data root that is a file", "…: data_root … is a file; …", train(data="toy.ckpt"), remedy="name the folder"
    ),
]

NO_GPU = Fault(
    "no GPU", "…: a GPU is asked for, but PyTorch finds no CUDA GPU on this machine; …", train("--gpus", "0,")
)

DATA = [
    Fault("an empty folder", "…: holds no pictures; …", train(data="empty"), lambda patch: Path("empty").mkdir()),
    Fault(
        "a picture in the root",
        "…: lies in the data root; move it into a subfolder of it…",
        train(),
        lambda patch: shutil.copy(PICTURE, "pictures/a cat.png"),
    ),
    Fault(
        "a subfolder as the root",
        "…: lies in the data root; move it into a subfolder of it…",
        train(data="pictures/folder0"),
        lines=3,
        remedy="name the folder above",
    ),
    Fault(
        "pictures too deep",
        "…: lies deeper than one layer of subfolders; …",
        train(),
        lambda patch: make_pictures(Path("pictures/folder0"), per_folder=1, folders=1),
        remedy="recursive: True",
    ),
    Fault(
        "some broken pictures",
        "…: not a picture, or a damaged one …",
        train(),
        break_pictures(2),
        lines=3,
        remedy=".png",
    ),
    Fault("nothing but broken pictures", "…: not a picture, or a damaged one …", train(), break_pictures(6), lines=7),
    Fault("an empty file as a picture", "…: not a picture: the file is empty", train(), puts(PICTURE, b""), lines=2),
    Fault(
        "a web page as a picture",
        "…: not a picture, or a damaged one …",
        train(),
        puts("pictures/folder0/cat.jpg", WEB_PAGE),
        lines=2,
    ),
    Fault("a picture of a thousand gigapixels", "…: a decompression bomb, …", train(), put_huge_picture, lines=2),
    Fault(
        "a link to nothing",
        "…: No such file or directory",
        train(),
        lambda patch: os.symlink("gone.png", "pictures/folder0/link.png"),
        lines=2,
    ),
    Fault(
        "a pipe as a picture",
        "…: cannot be read (…); …",
        train(),
        lambda patch: os.mkfifo("pictures/folder0/pipe.png"),
        remedy="remove it",
    ),
    Fault(
        "a GIF that is called .jpg",
        "warning: extensions that do not fit the content (…): …",
        train(),
        lambda patch: Image.new("RGB", (16, 16)).save("pictures/folder0/cat.jpg", "GIF"),
        status=0,
        lines=0,
        is_late=True,
    ),
    Fault(
        "a picture of another kind",
        "warning: … left out, no picture: …",
        train(),
        puts("pictures/folder0/cat.heic", b"\0\0\0\x1cftypheic"),
        status=0,
        lines=0,
        is_late=True,
    ),
    Fault(
        "a caption in an old encoding",
        "…: is no UTF-8 text (…); save it as UTF-8",
        train(),
        puts(PICTURE.with_suffix(".txt"), "größe".encode("latin-1")),
    ),
    Fault(
        "a caption in UTF-16",
        "…: is UTF-16 text; save it as UTF-8",
        train(),
        puts(PICTURE.with_suffix(".txt"), "größe".encode("utf-16")),
    ),
    Fault(
        "a word in multiply.txt",
        "…: multiply '…' is no number from 0 up, such as …",
        train(),
        puts("pictures/folder0/multiply.txt", "twice"),
    ),
    Fault(
        "all folders switched off",
        "…: no picture is left, since multiply is 0 in all its folders (…); raise it",
        train(),
        lambda patch: [write(f"pictures/folder{number}/multiply.txt", "0") for number in (0, 1)],
    ),
    Fault(
        "a misspelt setting of a folder",
        "…: '…' is no setting of a folder; did you mean '…'?",
        train(),
        puts("pictures/folder0/folder.yaml", "multiplly: 2\n"),
        remedy="line 1",
    ),
    Fault(
        "a damaged folder.yaml",
        "…: is no YAML (…); write lines such as …",
        train(),
        puts("pictures/folder0/folder.yaml", "multiply: [2\n"),
    ),
    Fault(
        "folder.yml",
        "…: has no effect under this name; rename it to folder.yaml",
        train(),
        puts("pictures/folder0/folder.yml", "multiply: 2\n"),
    ),
    Fault(
        "a damaged captions.jsonl",
        "…: is no JSON (…); correct it",
        train(),
        puts("pictures/folder0/captions.jsonl", '{"file_name": "1.png", "text": "a cat"\n'),
        remedy="captions.jsonl: line 1",
    ),
    Fault(
        "a captions.jsonl with other keys",
        "…: lacks '…'; write an object such as …",
        train(),
        puts("pictures/folder0/captions.jsonl", '{"file_name": "1.png", "caption": "a cat"}\n'),
    ),
    Fault(
        "a captions.jsonl that leads elsewhere",
        "…: 'file_name' '…' leads out of its folder; …",
        train(),
        puts("pictures/folder0/captions.jsonl", '{"file_name": "../../1.png", "text": "a cat"}\n'),
    ),
    Fault(
        "a batch larger than the data",
        "data.params.batch_size … is larger than the training set: …",
        train("data.params.batch_size=1000"),
        remedy="use data.params.batch_size=12",
    ),
    Fault(
        "a limit that leaves nothing",
        "lightning.trainer.…: … is none; give … or more, or a number of batches such as 1",
        train("--limit_train_batches", "0.01"),
    ),
]

NO_PERMISSION = Fault(
    "a picture that may not be read",
    "…: Permission denied",
    train(),
    lambda patch: PICTURE.chmod(0),
    lines=2,
)

CHECKPOINT_FILES = [
    Fault("no such checkpoint", "…: actual_resume … does not exist; …", start_from("toi.ckpt"), remedy="toy.ckpt?"),
    Fault(
        "a folder as a checkpoint", "…: actual_resume … is a folder without model_index.json, …", start_from("pictures")
    ),
    Fault(
        "an empty checkpoint",
        "checkpoint '…' is damaged or no … file (…): it is empty; …",
        start_from("some.ckpt"),
        puts("some.ckpt", b""),
    ),
    Fault(
        "a checkpoint cut short",
        "checkpoint '…' is damaged or no … file (…): its end is missing or damaged; …",
        start_from("some.ckpt"),
        lambda patch: write("some.ckpt", Path("toy.ckpt").read_bytes()[:1500]),
        remedy="get the file again",
    ),
    Fault(
        "a web page as a checkpoint",
        "checkpoint '…' is damaged or no … file (…): it is a web page, …",
        start_from("some.ckpt"),
        puts("some.ckpt", WEB_PAGE),
        remedy="download the file again",
    ),
    Fault(
        "a web page as .safetensors",
        "checkpoint '…' is damaged or no … file (…): it is a web page, …",
        start_from("some.safetensors"),
        puts("some.safetensors", WEB_PAGE),
    ),
    Fault(
        "a git-lfs pointer",
        "checkpoint '…' is damaged or no … file (…): it only points to the real file; …",
        start_from("some.safetensors"),
        puts("some.safetensors", LFS_POINTER),
        remedy="git lfs pull",
    ),
    Fault(
        "text as a checkpoint",
        "checkpoint '…' is damaged or no … file (…): it is text; …",
        start_from("some.ckpt"),
        puts("some.ckpt", b"404: Not Found"),
    ),
    Fault(
        "a .ckpt that is called .safetensors",
        "checkpoint '…' is damaged or no … file (…): it looks like a … file; rename it so",
        start_from("some.safetensors"),
        save_ckpt_as_safetensors,
        remedy=".ckpt file",
    ),
    Fault(
        "a .safetensors that is called .ckpt",
        "checkpoint '…' is damaged or no … file (…): it looks like a … file; rename it so",
        start_from("some.ckpt"),
        save_safetensors_as_ckpt,
        remedy=".safetensors file",
    ),
    Fault(
        "a header that lies",
        "checkpoint '…' is damaged or no … file (…): was it copied whole? …",
        start_from("some.safetensors"),
        lying_safetensors,
    ),
    Fault(
        "a checkpoint that holds code",
        "checkpoint '…' was refused: it holds more than weights (…), …",
        start_from("some.ckpt"),
        saves("some.ckpt", lambda: {"state_dict": {"weight": Malicious()}}),
        remedy="get the file as .safetensors",
    ),
    Fault(
        "a pickle that is no checkpoint",
        "checkpoint '…' is damaged or no … file (…): was it copied whole? …",
        start_from("some.ckpt"),
        lambda patch: write("some.ckpt", pickle.dumps({"state_dict": Malicious()})),
    ),
    Fault(
        "a textual inversion",
        "checkpoint '…' holds no state_dict of weights: …",
        start_from("some.pt"),
        saves("some.pt", lambda: {"string_to_param": {"*": torch.ones(1, 3)}, "name": "cat"}),
        remedy="name a whole model's",
    ),
    Fault(
        "a list as a checkpoint",
        "checkpoint '…' holds a …, not weights; …",
        start_from("some.ckpt"),
        saves("some.ckpt", lambda: [torch.ones(1)]),
    ),
    Fault(
        "a LoRA",
        "checkpoint '…' does not fit the model: this looks like a LoRA, …",
        start_from("some.ckpt"),
        saves("some.ckpt", lambda: {"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)}),
        remedy="name the base model's checkpoint",
    ),
    Fault(
        "one part of a diffusers folder",
        "checkpoint '…' does not fit the model: this looks like one part of a diffusers folder; …",
        start_from("some.ckpt"),
        saves("some.ckpt", lambda: {"down_blocks.0.weight": torch.ones(2, 2)}),
        remedy="name the folder",
    ),
    Fault(
        "another size of model",
        "checkpoint '…' does not fit the model: it belongs to another architecture …",
        start_from("some.ckpt"),
        saves("some.ckpt", lambda: toy_weights(model_0_weight=torch.ones(9, 9))),
        remedy="model.0.weight is (9, 9), the model needs (8, 3)",
    ),
    Fault(
        "NaN in a checkpoint",
        "checkpoint '…' holds NaN or infinite values in …; use an earlier checkpoint",
        start_from("some.ckpt"),
        saves("some.ckpt", lambda: toy_weights(model_0_bias=torch.full((8,), float("nan")))),
        remedy="model.0.bias",
    ),
    Fault(
        "Stable Diffusion 2",
        "checkpoint '…' does not fit the model: this is a Stable Diffusion 2 model; …",
        start_from("some.ckpt", base=str(TINY)),
        saves("some.ckpt", as_sd2),
    ),
    Fault(
        "SDXL",
        "checkpoint '…' does not fit the model: this is an SDXL model; …",
        start_from("some.ckpt", base=str(TINY)),
        saves("some.ckpt", as_sdxl),
    ),
    Fault(
        "a checkpoint without a VAE",
        "checkpoint '…' does not fit the model: the file holds no VAE; …",
        start_from("some.ckpt", base=str(TINY)),
        saves("some.ckpt", without_vae),
    ),
    Fault(
        "another noise schedule",
        "checkpoint '…' was made with another noise schedule (…); …",
        start_from("some.ckpt", base=str(TINY)),
        saves("some.ckpt", with_other_schedule),
        remedy="set timesteps, beta_schedule",
    ),
]

RESUMING = [
    Fault("no such run", "flag --resume: … does not exist; …", resume(run="logs/rum"), remedy="did you mean logs/run?"),
    Fault(
        "no log folder",
        "the log folder … does not exist; name it with -l/--logdir",
        resume(run="last"),
        lambda patch: shutil.rmtree("logs"),
    ),
    Fault(
        "nothing to continue",
        "-r/--resume: nothing to continue in the log folder …",
        resume(run="last"),
        lambda patch: (shutil.rmtree("logs"), Path("logs").mkdir()),
        remedy="name a run folder",
    ),
    Fault(
        "a run without checkpoints",
        "flag --resume: … holds no checkpoint (…); …",
        resume(),
        change_checkpoints(Path.unlink),
        remedy="name another run folder",
    ),
    Fault(
        "a run without configs",
        "flag --resume: … is not part of a run folder (…); …",
        resume(),
        lambda patch: shutil.rmtree(RUN / "configs"),
        remedy="--base YAML --actual_resume CHECKPOINT",
    ),
    Fault(
        "a file outside of a run",
        "flag --resume: … is not part of a run folder (…); …",
        resume(run="toy.ckpt"),
        remedy="--actual_resume",
    ),
    Fault(
        "a damaged last.ckpt",
        "warning: checkpoint '…' is damaged …",
        resume("--max_epochs", "2"),
        change_checkpoints(cut, "last.ckpt"),
        status=0,
        lines=0,
        is_late=True,
    ),
    Fault(
        "damaged checkpoints only",
        "checkpoint '…' is damaged or no … file (…): its end is missing or damaged; …",
        resume(),
        change_checkpoints(cut),
        lines=3,
    ),
    Fault(
        "a bit that has rotted",
        "checkpoint '…' is damaged at …; use another copy of the file, or an older checkpoint",
        resume("--max_epochs", "2", run=LAST),
        change_checkpoints(rot, "last.ckpt"),
        remedy="tensor model.0.weight",
    ),
    Fault(
        "weights alone",
        "checkpoint '…' holds the weights alone, without the optimiser, and cannot be continued; …",
        resume(run=LAST),
        change_checkpoints(prune),
        remedy="--actual_resume",
    ),
    Fault(
        "changed data",
        "changed since the checkpoint was saved: …",
        resume("--max_epochs", "2"),
        lambda patch: PICTURE.unlink(),
        lines=2,
        remedy="1 picture removed",
    ),
    Fault(
        "changed settings",
        "changed since the checkpoint was saved: …",
        resume("model.base_learning_rate=0.5", "data.params.train.params.flip_p=0.5"),
        lines=3,
    ),
    Fault(
        "a run that is still running",
        "--resume …: process … is still training this run; wait for its end, or end it first",
        resume(),
        pretend_to_run,
    ),
    Fault(
        "fewer epochs than are done",
        "checkpoint … lies beyond lightning.trainer.max_epochs=…; raise that to go on",
        resume("--max_epochs", "1", run="logs/long"),
    ),
    Fault(
        "a run that is finished",
        "warning: nothing is left to train: … is at the end of its run (…); raise …",
        resume(),
        status=0,
        lines=0,
        is_late=True,
    ),
    Fault(
        "another architecture",
        "checkpoint … does not fit the model: …; the run can only be continued with the architecture …",
        resume("--max_epochs", "2"),
        change_checkpoints(drop_a_weight),
        remedy="model.0.weight",
    ),
    Fault(
        "other parts trained",
        "checkpoint … does not fit the optimiser: which parts are trained has changed; …",
        resume("--max_epochs", "2"),
        change_checkpoints(add_a_group),
        remedy="cond_stage_trainable",
    ),
    Fault(
        "a damaged config",
        "…: not valid YAML: …",
        resume(),
        lambda patch: [path.write_text("model: [") for path in (RUN / "configs").iterdir()],
    ),
    Fault(
        "a damaged ledger",
        "warning: …, line …: …; it is kept as exposure.jsonl.damaged, and a new one is begun",
        resume("--max_epochs", "2"),
        puts(RUN / "exposure.jsonl", "{\n"),
        status=0,
        lines=0,
        is_late=True,
    ),
    Fault(
        "a ledger of something else",
        "warning: …: no exposures; it is kept as exposure.jsonl.damaged, and a new one is begun",
        resume("--max_epochs", "2"),
        puts(RUN / "exposure.jsonl", "{}\n"),
        status=0,
        lines=0,
        is_late=True,
    ),
    Fault(
        "curves that are a file",
        "…: File exists",
        resume("--max_epochs", "2"),
        lambda patch: (shutil.rmtree(RUN / "tensorboard"), (RUN / "tensorboard").write_text("mine")),
        remedy="logs/run/tensorboard",
    ),
    Fault(
        "a damaged record",
        "warning: … cannot be read: …: changes of the data since the save cannot be told",
        resume("--max_epochs", "2"),
        puts(RUN / "run.json", "{"),
        status=0,
        lines=0,
        is_late=True,
    ),
]

DURING_THE_RUN = [
    Fault(
        "no room for one checkpoint", "the disk is full: …", train(), fill_the_disk, is_late=True, remedy="make room"
    ),
    Fault(
        "a disk that is full at a save",
        "the disk is full: …",
        train("--max_epochs", "2"),
        disk_that_fails(errno.ENOSPC, at=8),
        is_late=True,
    ),
    Fault(
        "a broken disk",
        "could not write the checkpoint …: Input/output error; check the disk …",
        train(),
        disk_that_fails(errno.EIO, at=8),
        is_late=True,
        remedy="the checkpoints before it are intact",
    ),
    Fault(
        "a folder that was made read-only",
        "could not write the checkpoint …: Permission denied; make its folder writable for this user; …",
        train(),
        disk_that_fails(errno.EACCES, at=2),
        is_late=True,
    ),
    Fault("too little memory", "out of memory: …", model("NeedsMemory"), is_late=True, remedy="data.params.batch_size"),
    Fault("a loss that is NaN", "the loss is nan at step …", model("BlowsUp"), is_late=True, remedy="--on_nan skip"),
    Fault(
        "a fault in the model",
        "training failed at step …: …",
        model("Breaks"),
        status=1,
        is_late=True,
        remedy="IndexError: index 4 is out of range",
    ),
    Fault(
        "a fault in a callback",
        "training failed at step …: …",
        train(f"lightning.callbacks.mine.target={HERE}.RaisingCallback"),
        status=1,
        is_late=True,
        remedy="KeyError: 'colour'",
    ),
    Fault(
        "a picture that vanishes",
        "…: has vanished since the run began; …",
        model("LosesAPicture"),
        link_a_picture,
        is_late=True,
        remedy="python main.py -t -r logs/",
    ),
    Fault(
        "a picture that rots",
        "…: cannot be read: …; put it back and type …",
        train(f"model.target={HERE}.RotsAPicture", "--max_epochs", "2"),
        link_a_picture,
        is_late=True,
        remedy="--on_bad_image skip",
    ),
    Fault(
        "a loader process that is killed",
        "loader process …; …",
        train(f"data.params.train.target={HERE}.LosesItsLoader", "data.params.num_workers=1"),
        is_late=True,
        remedy="lower data.params.num_workers (1 now)",
    ),
    Fault("Ctrl-C", "warning: interrupted by SIGINT", model("GetsCtrlC"), status=130, lines=0, is_late=True),
    Fault("Ctrl-C twice", "warning: interrupted by SIGINT", model("GetsCtrlCTwice"), status=130, lines=0, is_late=True),
    Fault("Ctrl-C before training", "warning: interrupted by SIGINT", model("GetsCtrlCEarly"), status=130, lines=0),
    Fault("SIGTERM", "warning: interrupted by SIGTERM", model("GetsSigterm"), status=143, lines=0, is_late=True),
]

SCRIPTS = [
    Fault(
        "nothing to prune", "prune_ckpt: checkpoint '…' does not exist", ("--ckpt", "toi.ckpt"), program="prune_ckpt"
    ),
    Fault(
        "a web page to prune",
        "prune_ckpt: checkpoint '…' is damaged or no … file (…): …",
        ("--ckpt", "some.ckpt"),
        puts("some.ckpt", WEB_PAGE),
        program="prune_ckpt",
        remedy="web page",
    ),
    Fault(
        "a pruned file that is there already",
        "prune_ckpt: the output '…' exists; give another name, or --overwrite to replace it",
        ("--ckpt", "toy.ckpt"),
        puts("toy-pruned.ckpt", "mine"),
        program="prune_ckpt",
    ),
    Fault("nothing to convert", "convert: '…' does not exist; …", ("toi.ckpt", "new"), program="convert"),
    Fault(
        "a folder to convert that is no model",
        "convert: '…' is no diffusers folder: …",
        ("pictures", "new.ckpt"),
        program="convert",
        remedy="model_index.json",
    ),
    Fault(
        "a converted folder that is there already",
        "convert: OUT '…' exists; …",
        ("toy.ckpt", "pictures"),
        program="convert",
    ),
    Fault(
        "a prompt without a checkpoint",
        "…: error: --ckpt …: no such file or folder",
        ("--ckpt", "toi.ckpt", "--prompt", "a cat"),
        program="txt2img",
    ),
    Fault(
        "no prompt",
        "…: error: nothing to show: give --prompt TEXT, …",
        ("--ckpt", "toy.ckpt"),
        program="txt2img",
    ),
    Fault(
        "a size that is no multiple of 8",
        "…: error: --… is not allowed; give …",
        ("--ckpt", "toy.ckpt", "--prompt", "a cat", "--H", "100"),
        program="txt2img",
        remedy="a multiple of 8",
    ),
    Fault(
        "a folder to sample from that is no run",
        "…: error: --ckpt …: this folder has no checkpoints/last.ckpt; name a file",
        ("--ckpt", "pictures", "--prompt", "a cat"),
        program="txt2img",
    ),
    Fault(
        "no folder to check",
        "check_dataset: data_root '…' does not exist (looked in …); …",
        ("--data_root", "gone"),
        program="check_dataset",
        remedy="--data_root",
    ),
    Fault(
        "captions of no folder",
        "captions: data_root '…' does not exist (looked in …); …",
        ("show", "--data_root", "gone"),
        program="captions",
    ),
    Fault(
        "no log folder to list",
        "runs: the log folder '…' does not exist; name it: runs.py LOGDIR",
        ("gone",),
        program="runs",
    ),
    Fault(
        "no pictures to caption",
        "…: there is no such folder",
        ("caption", "gone", "--text", "a"),
        program="ground_truth",
    ),
    Fault(
        "a caption that no file name can hold",
        "--text '…': it holds /, which Windows allows in no file name",
        ("caption", "pictures", "--text", "a/b"),
        program="ground_truth",
    ),
]

ALWAYS = [
    *COMMAND_LINE,
    *CONFIGS,
    *MACHINE,
    *DATA,
    *CHECKPOINT_FILES,
    *RESUMING,
    *DURING_THE_RUN,
    *SCRIPTS,
]
HERE_ONLY = [
    pytest.param(NO_GPU, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"), id=NO_GPU.name),
    pytest.param(
        NO_PERMISSION,
        marks=pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"),
        id=NO_PERMISSION.name,
    ),
]


# --- the tests ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a config, pictures, checkpoints and two runs, to be copied for each fault."""
    folder = tmp_path_factory.mktemp("catalogue") / "template"
    folder.mkdir()
    (folder / "tiny.ckpt").symlink_to(workplace / "tiny.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write("toy.yaml", YAML)
        make_pictures(Path("pictures"))
        torch.save(toy_weights(), "toy.ckpt")
        for name, epochs in (("run", "1"), ("long", "3")):
            assert main(train("--max_epochs", epochs, "-l", name)) == 0
            Path("logs").mkdir(exist_ok=True)
            next(Path(name).iterdir()).rename(Path("logs", name))
            Path(name).rmdir()
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    folder = tmp_path / "place"
    shutil.copytree(template, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return folder


def run_program(fault: Fault) -> int:
    if fault.program == "main":
        return main(list(fault.words))
    status: int = importlib.import_module(fault.program).main(list(fault.words))
    return status


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for curves: TensorBoard opens a file before a checkpoint can be compared."""
    paths = (path for path in folder.rglob("*") if "tensorboard" not in path.parts)
    files = (path for path in paths if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def matches(said: str, line: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, said.split("…"))), line) is not None


@pytest.mark.parametrize("fault", [*(pytest.param(fault, id=fault.name) for fault in ALWAYS), *HERE_ONLY])
def test_the_first_line_and_the_status_are_those_of_the_table(
    fault: Fault, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault.inject(monkeypatch)
    before = contents(place)
    capsys.readouterr()
    assert run_program(fault) == fault.status
    told = capsys.readouterr()
    errors = told.err.splitlines()
    if fault.status == 1:
        assert told.err.count("Traceback") == 1  # of a fault in somebody's code, which needs it
        errors = errors[-1:]
    lines = errors or [line for line in told.out.splitlines() if line.startswith("warning: ")]
    said = lines[0].removeprefix("error: ")
    assert matches(fault.said, said), said
    assert fault.remedy in said
    assert len(errors) == fault.lines, errors
    assert "Traceback" not in "".join(errors)
    assert "During handling" not in told.err
    assert max(len(line.replace(str(place), "")) for line in lines) <= LONGEST_LINE
    assert not Path("code-has-run").exists()
    after = contents(place)
    if fault.is_late:
        kept = {name: content for name, content in before.items() if not name.startswith("logs")}
        assert {name: content for name, content in after.items() if not name.startswith("logs")} == kept
    else:
        assert after == before


def test_the_table_has_a_row_for_each_message_and_no_other() -> None:
    rows = [(row["message"], int(row["status"])) for row in ROW.finditer(TABLE.read_text(encoding="utf-8"))]
    assert len(rows) == len(set(rows))
    assert set(rows) == {(fault.said, fault.status) for fault in (*ALWAYS, NO_GPU, NO_PERMISSION)}
