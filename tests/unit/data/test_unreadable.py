"""Pictures that were sound when a run began and cannot be read any more."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from ldm.data.every_dream import EveryDreamBatch
from ldm.data.items import DataGoneError, UnreadableError, why_unreadable
from ldm.data.latent_cache import LostCacheError, LostLatentsError
from ldm.ledger import ledger_entries
from tests.unit.training.toy import make_pictures

ENCODING = {"weights": "w", "channels": 8, "factor": 8, "dtype": torch.float16}


def vanish(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def become_text(path: Path) -> None:
    path.write_bytes(b"no picture")


def become_empty(path: Path) -> None:
    path.write_bytes(b"")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def shrink(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path)


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (vanish, "has vanished since the run began"),
    (truncate, "cannot be read: "),
    (become_text, "cannot be read: not a picture, or a damaged one"),
    (become_empty, "cannot be read: not a picture: the file is empty"),
    (become_a_folder, "cannot be read: a folder, not a picture"),
    (shrink, "cannot be read: is 8x8 pixels now, less than when the data set was read"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "root", per_folder=2, size=32)


def build(root: Path, on_bad_image: str = "error", **params: object) -> EveryDreamBatch:
    """Build a set that has seen its pictures."""
    dataset = EveryDreamBatch(str(root), **{"size": 32, "repeats": 2, "on_bad_image": on_bad_image, **params})  # type: ignore[arg-type]
    dataset.training_sizes(0)
    return dataset


def cached(root: Path, folder: Path, on_bad_image: str = "error") -> EveryDreamBatch:
    """Build a set whose latents lie in a folder."""
    dataset = build(root, on_bad_image, cache_latents="disk", cache_dir=str(folder))
    cache = dataset.latent_cache
    assert cache is not None
    cache.open(ENCODING)
    for view in cache.missing(0, 1):
        cache.write(view, torch.ones(8, 4, 4, dtype=torch.float16))
    cache.finish()
    return dataset


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_picture_that_breaks_is_named_with_what_has_become_of_it(
    root: Path, fault: Callable[[Path], None], reason: str
) -> None:
    dataset = build(root)
    path = Path(dataset[0]["path"])
    fault(path)
    with pytest.raises(UnreadableError) as raised:
        dataset[0]
    assert str(raised.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_a_picture_that_breaks_gives_an_item_of_the_same_form_that_counts_nothing_where_such_are_skipped(
    root: Path, fault: Callable[[Path], None], reason: str
) -> None:
    dataset = build(root, "skip", flip_p=0.5, conditional_dropout=0.5)
    sound = dataset[0]
    fault(Path(sound["path"]))
    item = dataset[0]
    assert item.keys() == sound.keys()
    assert item["unreadable"].startswith(f"{sound['path']}: {reason}")
    assert (sound["unreadable"], item["loss_weight"].item()) == ("", 0.0)
    assert (item["image"].shape, item["image"].dtype) == (sound["image"].shape, sound["image"].dtype)
    for name in ("caption", "dropped", "flip"):
        assert item[name] == sound[name]
    assert all(torch.equal(item[name], sound[name]) for name in ("exposure", "training_size", "crop"))


def test_a_picture_that_comes_back_is_shown_again(root: Path) -> None:
    dataset = build(root, "skip")
    path = Path(dataset[0]["path"])
    content = path.read_bytes()
    path.unlink()
    assert dataset[0]["unreadable"]
    path.write_bytes(content)
    assert (dataset[0]["unreadable"], dataset[0]["loss_weight"].item()) == ("", 1.0)


def test_a_picture_of_bytes_is_replaced_by_bytes(root: Path) -> None:
    dataset = build(root, "skip")
    dataset.as_bytes = True
    Path(dataset[0]["path"]).unlink()
    assert dataset[0]["image"].dtype == np.uint8


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_data_root_that_goes_away_is_named_itself_and_never_skipped(root: Path, on_bad_image: str) -> None:
    dataset = build(root, on_bad_image)
    shutil.rmtree(root)
    with pytest.raises(DataGoneError, match=r"root: the folder has gone since the run began$"):
        dataset[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_reason_reaches_the_batch(root: Path, workers: int) -> None:
    dataset = build(root, "skip")
    Path(dataset[1]["path"]).unlink()
    batch = next(iter(DataLoader(dataset, batch_size=3, num_workers=workers)))
    assert [bool(reason) for reason in batch["unreadable"]] == [False, True, False]
    assert batch["loss_weight"].tolist() == [1, 0, 1]


def test_the_ledger_leaves_out_what_was_not_shown(root: Path) -> None:
    dataset = build(root, "skip")
    Path(dataset[1]["path"]).unlink()
    entries = ledger_entries(default_collate([dataset[index] for index in range(3)]))
    assert [entry["path"] for entry in entries] == [dataset[index]["path"] for index in (0, 2)]


@pytest.mark.parametrize(("code", "says"), [(errno.EIO, "Input/output error"), (errno.EACCES, "Permission denied")])
def test_what_the_disk_says_is_told(code: int, says: str) -> None:
    error = OSError(f"a.png: {says}")
    error.__cause__ = OSError(code, os.strerror(code), "a.png")
    assert why_unreadable("a.png", error) == f"a.png: cannot be read: {says}"


@pytest.mark.parametrize("cause", [MemoryError(), OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.png")])
def test_what_the_system_lacks_is_no_fault_of_the_picture(cause: Exception) -> None:
    error = OSError("a.png: it cannot be had")
    error.__cause__ = cause
    with pytest.raises((MemoryError, OSError), match="it cannot be had") as raised:
        why_unreadable("a.png", error)
    assert not isinstance(raised.value, UnreadableError)


@pytest.mark.parametrize("fault", [vanish, truncate, become_text])
def test_latents_that_are_lost_are_told_with_the_picture_and_what_makes_them_anew(
    root: Path, tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    dataset = cached(root, tmp_path / "cache")
    for entry in (tmp_path / "cache").glob("*/*.safetensors"):
        fault(entry)
    with pytest.raises(LostLatentsError, match=r"0_\.png: its cached latents cannot be read: ") as raised:
        dataset[0]
    assert "makes them anew" in raised.value.remedy


def test_latents_that_are_lost_count_nothing_where_such_pictures_are_skipped(root: Path, tmp_path: Path) -> None:
    dataset = cached(root, tmp_path / "cache", "skip")
    sound = dataset[0]
    for entry in (tmp_path / "cache").glob("*/*.safetensors"):
        entry.unlink()
    item = dataset[0]
    assert item.keys() == sound.keys()
    assert (item["moments"].shape, item["moments"].dtype) == (sound["moments"].shape, sound["moments"].dtype)
    assert (item["moments"].abs().sum().item(), item["loss_weight"].item()) == (0, 0)
    assert "its cached latents cannot be read" in item["unreadable"]


def test_a_cache_folder_that_goes_away_is_named_itself(root: Path, tmp_path: Path) -> None:
    dataset = cached(root, tmp_path / "cache", "skip")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(LostCacheError, match=r"cache_dir .*cache: the folder has gone since the run began$"):
        dataset[0]


def test_pictures_that_break_before_their_latents_are_made_count_nothing_where_such_are_skipped(
    root: Path, tmp_path: Path
) -> None:
    dataset = build(root, "skip", cache_latents="disk", cache_dir=str(tmp_path / "cache"))
    gone, broken = (Path(dataset[index]["path"]) for index in (0, 1))
    gone.unlink()
    broken.write_bytes(b"no picture")
    cache = dataset.latent_cache
    assert cache is not None
    cache.open(ENCODING)
    for views, pixels in cache.pictures(cache.missing(0, 1), batch_size=2, num_workers=0):
        for view in views:
            cache.write(view, torch.ones(8, *(side // 8 for side in pixels.shape[1:3]), dtype=torch.float16))
    cache.finish()
    items = [dataset[index] for index in range(4)]
    assert [item["loss_weight"].item() for item in items] == [0, 0, 1, 1]
    assert items[0]["unreadable"] == f"{gone}: has vanished since the run began"
    assert items[1]["unreadable"].startswith(f"{broken}: cannot be read: not a picture")


def test_pictures_that_break_before_their_latents_are_made_are_told_together(root: Path, tmp_path: Path) -> None:
    dataset = build(root, cache_latents="disk", cache_dir=str(tmp_path / "cache"))
    for index in (0, 1):
        Path(dataset[index]["path"]).unlink()
    cache = dataset.latent_cache
    assert cache is not None
    with pytest.raises(ValueError, match=r"(?s)0_\.png: has vanished since the run began\n.*1_\.png: has vanished"):
        cache.open(ENCODING)


def test_latents_of_nothing_but_unreadable_pictures_are_refused(root: Path, tmp_path: Path) -> None:
    dataset = build(root, "skip", cache_latents="disk", cache_dir=str(tmp_path / "cache"))
    for path in root.glob("*/*.png"):
        path.unlink()
    cache = dataset.latent_cache
    assert cache is not None
    with pytest.raises(ValueError, match="has vanished since the run began"):
        cache.open(ENCODING)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), OSError("a\nb.png: not a picture")])
def test_a_name_with_a_line_end_in_it_makes_no_second_line(error: OSError) -> None:
    reason = why_unreadable("a\nb.png", error)
    assert reason.startswith("a\\nb.png: ")
    assert reason.isprintable()
