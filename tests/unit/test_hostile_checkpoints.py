"""Checkpoint files that were made to do harm: each gives one line, and nothing of it is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint import read_checkpoint
from ldm.modules.losses.lpips import _read as read_lpips
from ldm.training.checkpoint_io import StreamingCheckpointIO
from ldm.training.recovery import newest_valid_checkpoint

MARKER = "code_was_run"


class Bomb:
    """Makes a folder when an unsafe reader meets it."""

    def __reduce__(self) -> Any:
        return os.mkdir, (MARKER,)


class BuildsBomb:
    """Looks like a tensor that is built by a function of torch, whose argument is the bomb."""

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (Bomb(), 0, (1,), (1,), False, OrderedDict())


class HookedTensor:
    """A tensor whose hooks are the bomb."""

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_parameter, (torch.ones(1), True, {"hook": Bomb()})


class FromType:
    """A tensor subclass with a function and a state of the file's choice."""

    def __reduce__(self) -> Any:
        return torch._tensor._rebuild_from_type_v2, (os.mkdir, torch.Tensor, (MARKER,), {})


def checkpoint() -> dict[str, Any]:
    """What Lightning writes, in small."""
    return {
        "state_dict": {"layer.weight": torch.ones(2, 2), "layer.bias": torch.zeros(2)},
        "epoch": 1,
        "global_step": 5,
        "pytorch-lightning_version": "2.6.0",
        "optimizer_states": [{"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 5}],
        "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 1}}}},
        "callbacks": {"ModelCheckpoint{}": {"best_model_path": ""}},
        "hparams_name": "kwargs",
        "hyper_parameters": {"learning_rate": 0.1},
        "DataModuleFromConfig": {"order": "0"},
    }


POSITIONS = (
    ("state_dict", "layer.weight"),
    ("state_dict", "new key"),
    ("optimizer_states", 0, "state", 0, "step"),
    ("optimizer_states", 0, "param_groups", 0, "lr"),
    ("lr_schedulers", 0, "base_lrs"),
    ("lr_schedulers", 0, "_lr_lambdas"),
    ("loops", "fit_loop", "epoch_progress", "current", "completed"),
    ("loops", "fit_loop", "state_dict"),
    ("callbacks", "ModelCheckpoint{}", "best_model_path"),
    ("callbacks", "Another{}"),
    ("hyper_parameters", "learning_rate"),
    ("hyper_parameters", "_class_path"),
    ("hyper_parameters", "_instantiator"),
    ("hparams_name",),
    ("datamodule_hyper_parameters",),
    ("datamodule_hparams_name",),
    ("DataModuleFromConfig", "order"),
    ("pytorch-lightning_version",),
    ("legacy_pytorch-lightning_version",),
    ("epoch",),
    ("global_step",),
    ("amp_scaling_state",),
    ("MixedPrecision",),
    ("checksums",),
)


def plant(bomb: object, position: tuple[Any, ...]) -> dict[str, Any]:
    content = checkpoint()
    place: Any = content
    for step in position[:-1]:
        place = place[step]
    place[position[-1]] = bomb
    return content


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refuse(read: Callable[[], object], words: str = "refused") -> str:
    """See that a file is refused in one line and has done nothing."""
    with pytest.raises(ValueError, match=words) as caught:
        read()
    assert not Path(MARKER).exists()
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("position", POSITIONS, ids=lambda position: ".".join(map(str, position)))
def test_code_in_any_place_of_a_checkpoint_is_refused_and_not_run(position: tuple[Any, ...], zipped: bool) -> None:
    torch.save(plant(Bomb(), position), "w.ckpt", _use_new_zipfile_serialization=zipped)
    assert "mkdir" in refuse(lambda: StreamingCheckpointIO().load_checkpoint("w.ckpt"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("bomb", [BuildsBomb, HookedTensor, FromType])
def test_code_in_what_a_tensor_is_built_from_is_refused_and_not_run(bomb: type, zipped: bool) -> None:
    torch.save(plant(bomb(), ("state_dict", "layer.weight")), "w.ckpt", _use_new_zipfile_serialization=zipped)
    assert "mkdir" in refuse(lambda: read_checkpoint("w.ckpt"))


@pytest.mark.parametrize(
    "nested", [{Bomb(): 1}, [(Bomb(),)], {"a": [{"b": (1, {Bomb()})}]}], ids=["key", "list", "set"]
)
def test_code_in_a_key_or_deep_inside_is_refused_and_not_run(nested: object) -> None:
    torch.save(plant(nested, ("state_dict", "x")), "w.ckpt")
    assert "mkdir" in refuse(lambda: read_checkpoint("w.ckpt"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_of_any_protocol_is_refused_and_not_run(protocol: int) -> None:
    Path("w.ckpt").write_bytes(pickle.dumps({"state_dict": Bomb()}, protocol=protocol))
    refuse(lambda: read_checkpoint("w.ckpt"), "refused|damaged")


def test_a_persistent_id_that_is_code_is_refused_and_not_run() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", Bomb()) if isinstance(obj, str) and obj == "here" else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"state_dict": "here"})
    replace_record("w.ckpt", "data.pkl", stream.getvalue())
    assert "mkdir" in refuse(lambda: read_checkpoint("w.ckpt"))


def replace_record(path: str, record: str, content: bytes, **how: Any) -> None:
    """Write a checkpoint with one record of the archive replaced by another, or added."""
    torch.save(checkpoint(), "whole.ckpt")
    with zipfile.ZipFile("whole.ckpt") as whole, zipfile.ZipFile(path, "w") as made:
        for each in whole.infolist():
            if not each.filename.endswith(f"/{record}"):
                made.writestr(each.filename, whole.read(each))
        made.writestr(f"whole/{record}", content, **how)
    Path("whole.ckpt").unlink()


def test_a_pickle_under_another_name_in_the_archive_is_not_read() -> None:
    replace_record("w.ckpt", "code.pkl", pickle.dumps(Bomb()))
    assert read_checkpoint("w.ckpt")["global_step"] == 5
    assert not Path(MARKER).exists()


def test_records_whose_names_lead_elsewhere_are_not_written_there() -> None:
    replace_record("w.ckpt", f"../../{MARKER}", b"x")
    read_checkpoint("w.ckpt")
    assert sorted(os.listdir()) == ["w.ckpt"]
    assert not (Path("..") / MARKER).exists()


def test_a_torchscript_program_is_refused() -> None:
    replace_record("w.ckpt", "constants.pkl", pickle.dumps(()))
    refuse(lambda: read_checkpoint("w.ckpt"), "TorchScript")


def test_the_tar_format_of_the_first_torch_is_refused_and_not_run() -> None:
    with tarfile.open("w.ckpt", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Bomb())
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    refuse(lambda: read_checkpoint("w.ckpt"), "damaged or no checkpoint")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packed_record_is_refused_before_it_is_unpacked(method: int) -> None:
    replace_record("w.ckpt", "data/9", bytes(1 << 24), compress_type=method)
    refuse(lambda: read_checkpoint("w.ckpt"), "compressed")


def test_a_record_that_stands_there_twice_is_refused() -> None:
    replace_record("w.ckpt", "version", b"3\n")
    with zipfile.ZipFile("w.ckpt", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("whole/data.pkl", pickle.dumps(Bomb()))
    refuse(lambda: read_checkpoint("w.ckpt"), "one name")


def test_an_archive_that_claims_terabytes_is_refused() -> None:
    torch.save(checkpoint(), "w.ckpt")
    content = bytearray(Path("w.ckpt").read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    Path("w.ckpt").write_bytes(content)
    refuse(lambda: read_checkpoint("w.ckpt"), "claim 4,294|damaged")


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused() -> None:
    torch.save(plant(torch.ones(1).expand(10**12), ("state_dict", "layer.weight")), "w.ckpt")
    line = refuse(lambda: read_checkpoint("w.ckpt"), r"state_dict\.layer\.weight claims 4,000,000,000,000 bytes")
    assert "get the file again" in line


def test_storage_of_terabytes_in_the_old_format_is_refused() -> None:
    torch.save({"w": torch.ones(3)}, "w.ckpt", _use_new_zipfile_serialization=False)
    content = Path("w.ckpt").read_bytes()
    # The number of elements in the storage's persistent id: BININT1 3 becomes LONG1 of 2 ** 45.
    claimed = content.replace(b"K\x03N", b"\x8a\x06" + (2**45).to_bytes(6, "little") + b"N")
    assert claimed != content
    Path("w.ckpt").write_bytes(claimed)
    refuse(lambda: read_checkpoint("w.ckpt"), "damaged")


@pytest.mark.parametrize(
    "strange",
    [
        lambda: torch.ones(2).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantised"],
)
@pytest.mark.parametrize("position", [("state_dict", "layer.weight"), ("optimizer_states", 0, "state", 0, "step")])
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_no_plain_one_is_refused(
    strange: Callable[[], torch.Tensor], position: tuple[Any, ...]
) -> None:
    torch.save(plant(strange(), position), "w.ckpt")
    refuse(lambda: read_checkpoint("w.ckpt"), "sparse|without values")


def test_attributes_that_a_file_gives_to_its_dictionaries_are_dropped() -> None:
    class Weights(OrderedDict[str, torch.Tensor]):
        def __reduce__(self) -> Any:
            return OrderedDict, (), {"items": 5, "_metadata": {"": {"version": 1}}}, None, iter(self.items())

    torch.save({**checkpoint(), "state_dict": Weights(checkpoint()["state_dict"])}, "w.ckpt")
    weights = read_checkpoint("w.ckpt")["state_dict"]
    assert len(weights.items()) == 2
    assert weights._metadata == {"": {"version": 1}}


def endless() -> list[Any]:
    content: list[Any] = []
    content.append(content)
    return content


def shared_without_end() -> list[Any]:
    content: list[Any] = ["ha"]
    for _ in range(60):
        content = [content, content]
    return content


def deep() -> list[Any]:
    content: list[Any] = []
    for _ in range(300):
        content = [content]
    return content


@pytest.mark.parametrize("make", [endless, shared_without_end, deep])
def test_containers_that_nobody_can_walk_through_are_refused(make: Callable[[], object]) -> None:
    torch.save(plant(make(), ("callbacks", "x")), "w.ckpt")
    refuse(lambda: read_checkpoint("w.ckpt"), r"callbacks\.x.* (nested without end|holds more than)")


def test_a_key_that_is_no_text_is_refused() -> None:
    torch.save(plant(torch.ones(1), ("state_dict", 5)), "w.ckpt")
    refuse(lambda: read_checkpoint("w.ckpt"), "5 is no key")


def test_names_that_would_control_the_terminal_are_shown_harmlessly() -> None:
    torch.save(plant(3, ("state_dict", "\x1b[2J\nerror: all is well\x07")), "w.ckpt")
    assert r"\x1b[2J\nerror: all is well\x07 is no tensor" in refuse(lambda: read_checkpoint("w.ckpt"), "no tensor")


def test_a_bomb_among_a_runs_checkpoints_is_named_and_the_next_older_one_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.save(plant(Bomb(), ("callbacks", "x")), "last.ckpt")
    torch.save(checkpoint(), "older.ckpt")
    assert newest_valid_checkpoint(Path("last.ckpt")).name == "older.ckpt"
    assert "mkdir" in caplog.text
    assert not Path(MARKER).exists()


def test_a_bomb_in_the_place_of_lpips_weights_is_not_run() -> None:
    torch.save({"lin0.model.1.weight": Bomb()}, "vgg.pth")
    refuse(lambda: read_lpips(Path("vgg.pth")), "vgg.pth is damaged or no file of weights")
