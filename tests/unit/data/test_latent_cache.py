"""What is kept of latents, under which name, and what happens to what is damaged."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.image_transform import Placement, read_training_bytes
from ldm.data.latent_cache import (
    DamagedEntryError,
    DiskEntries,
    Encoding,
    LatentCache,
    LostLatentsError,
    MemoryEntries,
    View,
    content_digests,
    entry_key,
    shared_file_path,
)

KEY = "ab" + 62 * "0"
PLACEMENT = Placement(size=(16, 8), box=(0.0, 0.0, 32.0, 16.0), flip=False)
ENCODING = Encoding(weights="w", channels=8, factor=4, dtype=torch.float32)
GIVEN = {"weights": "w", "channels": 8, "factor": 4, "dtype": torch.float32}


def moments(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((8, 2, 4), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> DiskEntries | MemoryEntries:
    if request.param == "disk":
        return DiskEntries(tmp_path / "cache")
    return MemoryEntries({"ff" + 62 * "0": (8, 2, 4), KEY: (8, 2, 4)}, torch.float32)


# --- entries -----------------------------------------------------------------------------------------------


def test_an_entry_is_read_as_it_was_written(store: DiskEntries | MemoryEntries) -> None:
    store.write(KEY, moments())
    assert torch.equal(store.read(KEY), moments())


def test_an_entry_that_was_not_written_is_not_found(store: DiskEntries | MemoryEntries) -> None:
    with pytest.raises(FileNotFoundError):
        store.read(KEY)


def test_a_discarded_entry_is_not_found(store: DiskEntries | MemoryEntries) -> None:
    store.write(KEY, moments())
    store.discard(KEY)
    with pytest.raises(FileNotFoundError):
        store.read(KEY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_of_an_encoder_is_kept_without_loss(tmp_path: Path, dtype: torch.dtype) -> None:
    disk, memory = DiskEntries(tmp_path), MemoryEntries({KEY: (8, 2, 4)}, dtype)
    for each in (disk, memory):
        each.write(KEY, moments(dtype=dtype))
        assert each.read(KEY).dtype == dtype
        assert torch.equal(each.read(KEY), moments(dtype=dtype))


@pytest.mark.parametrize("position", [-1, 100, 4])
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path, position: int) -> None:
    disk = DiskEntries(tmp_path)
    disk.write(KEY, moments())
    content = bytearray(disk.path(KEY).read_bytes())
    content[position] ^= 4
    disk.path(KEY).write_bytes(content)
    with pytest.raises(DamagedEntryError, match="is damaged"):
        disk.read(KEY)


@pytest.mark.parametrize("size", [0, 7, 200])
def test_a_truncated_entry_is_noticed(tmp_path: Path, size: int) -> None:
    disk = DiskEntries(tmp_path)
    disk.write(KEY, moments())
    disk.path(KEY).write_bytes(disk.path(KEY).read_bytes()[:size])
    with pytest.raises(DamagedEntryError, match="is damaged"):
        disk.read(KEY)


def test_an_entry_under_another_ones_name_is_noticed(tmp_path: Path) -> None:
    disk = DiskEntries(tmp_path)
    disk.write(KEY, moments())
    other = "ab" + 62 * "1"
    os.rename(disk.path(KEY), disk.path(other))
    with pytest.raises(DamagedEntryError, match="checksum differs"):
        disk.read(other)


def test_a_crash_before_the_rename_leaves_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskEntries(tmp_path)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            disk.write(KEY, moments())
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".partial"]
    with pytest.raises(FileNotFoundError):
        disk.read(KEY)


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cached latents cannot be written \(No space left on device\)"):
        DiskEntries(tmp_path).write(KEY, moments())
    assert list(tmp_path.glob("*/*")) == []


def test_only_old_leftovers_are_tidied_away(tmp_path: Path) -> None:
    disk = DiskEntries(tmp_path)
    disk.write(KEY, moments())
    old, fresh = (disk.path(KEY).with_suffix(f".safetensors.{name}.partial") for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    disk.tidy()
    assert (old.exists(), fresh.exists()) == (False, True)
    assert torch.equal(disk.read(KEY), moments())


@pytest.mark.parametrize("name", ["Downloads/film.partial", "Downloads/0.safetensors.1-2.partial", "ab/film.partial"])
def test_what_other_programs_have_left_behind_is_not_tidied_away(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir()
    theirs.write_bytes(b"half")
    os.utime(theirs, (0, 0))
    DiskEntries(tmp_path).tidy()
    assert theirs.exists()


def test_leftovers_in_a_folder_that_may_only_be_read_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskEntries(tmp_path)
    disk.write(KEY, moments())
    old = disk.path(KEY).with_suffix(".safetensors.old.partial")
    old.write_bytes(b"half")
    os.utime(old, (0, 0))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    disk.tidy()
    assert torch.equal(disk.read(KEY), moments())


def write_repeatedly(folder: str) -> None:
    disk = DiskEntries(folder)
    for _ in range(50):
        disk.write(KEY, moments())


def test_two_processes_may_write_the_same_entry(tmp_path: Path) -> None:
    disk = DiskEntries(tmp_path)
    disk.write(KEY, moments())
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_repeatedly, args=(str(tmp_path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert torch.equal(disk.read(KEY), moments())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(disk.path(KEY).parent.iterdir()) == [disk.path(KEY)]


def test_memory_refuses_moments_of_another_shape_than_planned() -> None:
    with pytest.raises(ValueError, match="were planned"):
        MemoryEntries({KEY: (8, 2, 4)}, torch.float32).write(KEY, torch.zeros(8, 4, 2))


def test_entries_of_several_shapes_share_one_block_of_memory() -> None:
    memory = MemoryEntries({KEY: (8, 2, 4), "cd": (8, 3, 3)}, torch.float16)
    memory.write("cd", torch.ones(8, 3, 3, dtype=torch.float16))
    memory.write(KEY, moments(dtype=torch.float16))
    assert memory.read("cd").eq(1).all()
    assert memory.read("cd").untyped_storage().data_ptr() == memory.read(KEY).untyped_storage().data_ptr()


def test_processes_of_a_machine_share_memory_that_leaves_no_file_behind() -> None:
    path = shared_file_path(f"test-{os.getpid()}")
    mine, theirs = (MemoryEntries({KEY: (8, 2, 4)}, torch.float32, path) for _ in range(2))
    for each in (mine, theirs):
        each.tidy()
    mine.write(KEY, moments())
    assert torch.equal(theirs.read(KEY), moments())
    assert not os.path.exists(path)


class ReadsFromMemory(Dataset[Tensor]):
    def __init__(self, memory: MemoryEntries) -> None:
        self.memory = memory

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return self.memory.read(KEY) + index


def test_forked_loader_processes_read_from_memory() -> None:
    memory = MemoryEntries({KEY: (8, 2, 4)}, torch.float32)
    memory.write(KEY, moments())
    loader = DataLoader(ReadsFromMemory(memory), batch_size=2, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(next(iter(loader)), torch.stack([moments(), moments() + 1]))


def test_spawned_loader_processes_are_handed_the_memory_and_no_copy_of_it() -> None:
    memory = MemoryEntries({KEY: (8, 2, 4), "large": (8, 256, 256)}, torch.float32)
    pickled = ForkingPickler.dumps(memory)
    memory.write(KEY, moments())
    assert len(pickled) < 2000
    assert torch.equal(pickle.loads(pickled).read(KEY), moments())


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"content": "other"},
        {"transform": "squash bilinear"},
        {"placement": replace(PLACEMENT, flip=True)},
        {"placement": replace(PLACEMENT, size=(8, 16))},
        {"placement": replace(PLACEMENT, box=(0.0, 0.0, 32.0, 15.999999999999998))},
        {"encoding": replace(ENCODING, weights="v")},
        {"encoding": replace(ENCODING, dtype=torch.bfloat16)},
    ],
)
def test_an_entry_has_another_name_where_anything_differs_that_its_numbers_follow_from(changed: dict) -> None:
    given = {"content": "c", "placement": PLACEMENT, "transform": "squash bicubic", "encoding": ENCODING}
    assert entry_key(**given) == entry_key(**given)
    assert entry_key(**(given | changed)) != entry_key(**given)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "abc"]
    for path, content in zip(paths, (b"x", b"x", b"y"), strict=True):
        Path(path).write_bytes(content)
    digests = content_digests(paths)
    assert digests[paths[0]] == digests[paths[1]] != digests[paths[2]]


def test_all_files_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)gone_1: has vanished .*\n.*gone_2: has vanished "):
        content_digests([str(tmp_path / "gone_1"), str(tmp_path / "gone_2")])


# --- a data set's cache ------------------------------------------------------------------------------------


def read_view(view: View) -> npt.NDArray[np.uint8]:
    return read_training_bytes(view.path, view.placement, "bucket", Image.Resampling.BICUBIC)


class Picnic:
    """Pictures of two shapes, each shown plain and mirrored, and their cache."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.views = []
        for number in range(count):
            path = folder / f"{number}.png"
            size = (16, 8) if number % 2 else (8, 16)
            pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            box = (0.0, 0.0, float(size[0]), float(size[1]))
            self.views += [View(str(path), Placement(size, box, flip)) for flip in (False, True)]
        self.folder = folder / "cache"

    def cache(self, mode: str = "disk", **encoding: object) -> LatentCache:
        cache = LatentCache(mode, str(self.folder), lambda: self.views, read_view, "bucket bicubic")
        cache.open(GIVEN | encoding)
        return cache

    def filled(self, mode: str = "disk") -> LatentCache:
        cache = self.cache(mode)
        fill(cache, cache.missing(0, 1))
        return cache


def fake_moments(pixels: Tensor) -> Tensor:
    """Eight channels a cell of 4 x 4 pixels: the sums of some of them."""
    cells = pixels.float().mean(dim=3).unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    return cells[..., :8].permute(0, 3, 1, 2).contiguous()


def fill(cache: LatentCache, views: list[View]) -> None:
    for shown, pixels in cache.pictures(views, batch_size=2, num_workers=0):
        for view, own in zip(shown, fake_moments(pixels), strict=True):
            cache.write(view, own)


@pytest.fixture
def picnic(tmp_path: Path) -> Picnic:
    return Picnic(tmp_path)


@pytest.mark.parametrize("mode", ["disk", "memory"])
def test_a_view_is_read_as_it_was_encoded(picnic: Picnic, mode: str) -> None:
    cache = picnic.filled(mode)
    cache.finish()
    for view in picnic.views:
        expected = fake_moments(torch.from_numpy(read_view(view))[None])[0]
        assert torch.equal(cache.read(view), expected)


def test_a_second_run_makes_only_what_is_missing(picnic: Picnic) -> None:
    picnic.filled()
    assert picnic.cache().missing(0, 1) == []
    (picnic.folder.parent / "0.png").write_bytes((picnic.folder.parent / "2.png").read_bytes())
    Image.new("RGB", (16, 8), "red").save(picnic.folder.parent / "1.png")
    assert picnic.cache().missing(0, 1) == picnic.views[2:4]


def test_other_weights_of_the_encoder_find_nothing(picnic: Picnic) -> None:
    picnic.filled()
    assert len(picnic.cache(weights="v").missing(0, 1)) == len(picnic.views)


def test_a_damaged_entry_is_named_deleted_and_made_anew(picnic: Picnic, caplog: pytest.LogCaptureFixture) -> None:
    picnic.filled()
    damaged = sorted(picnic.folder.glob("*/*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    cache = picnic.cache()
    missing = cache.missing(0, 1)
    assert len(missing) == 1
    assert str(damaged) in caplog.text
    assert not damaged.exists()
    fill(cache, missing)
    assert cache.missing(0, 1) == []


def test_damage_during_training_names_the_picture_and_the_remedy(picnic: Picnic) -> None:
    cache = picnic.filled()
    cache.finish()
    for path in picnic.folder.glob("*/*"):
        path.unlink()
    with pytest.raises(LostLatentsError, match=r"0\.png: its cached latents cannot be read: .* is gone$"):
        cache.read(picnic.views[0])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_without_gap_or_overlap(picnic: Picnic, world: int) -> None:
    cache = picnic.cache()
    shares = [cache.missing(rank, world) for rank in range(world)]
    together = [view for share in shares for view in share]
    assert sorted(together, key=repr) == sorted(picnic.views, key=repr)


def test_what_one_rank_has_written_leaves_the_shares_of_the_others_as_they_were(picnic: Picnic) -> None:
    expected = picnic.cache().missing(1, 2)
    first = picnic.cache()
    fill(first, first.missing(0, 2))
    assert picnic.cache().missing(1, 2) == expected


def test_batches_are_of_one_size_and_no_larger_than_asked(picnic: Picnic) -> None:
    cache = picnic.cache()
    for batch_size in (1, 3):
        batches = list(cache.pictures(cache.missing(0, 1), batch_size, num_workers=0))
        assert {len(views) == len(pixels) <= batch_size for views, pixels in batches} == {True}
        assert sorted((view for views, _ in batches for view in views), key=repr) == sorted(picnic.views, key=repr)


def test_bytes_are_known_before_anything_is_encoded(picnic: Picnic) -> None:
    cache = picnic.cache()
    assert cache.bytes_needed() == 6 * 8 * 2 * 4 * 4
    fill(cache, cache.missing(0, 1))
    files = list(picnic.folder.glob("*/*"))
    assert len(files) == 6
    assert all(8 * 2 * 4 * 4 <= path.stat().st_size < 8 * 2 * 4 * 4 + 512 for path in files)


def test_all_pictures_that_cannot_be_decoded_are_told_at_once(picnic: Picnic) -> None:
    for number in (0, 2):
        (picnic.folder.parent / f"{number}.png").write_bytes(b"no picture %d" % number)
    cache = picnic.cache()
    with pytest.raises(ValueError, match=r"(?s)0\.png: .*\n.*2\.png: "):
        fill(cache, cache.missing(0, 1))
    assert len(cache.missing(0, 1)) == 4, "the sound picture's latents are kept"


def test_pictures_of_the_same_content_share_an_entry(tmp_path: Path) -> None:
    picnic = Picnic(tmp_path, count=1)
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(picnic.views[0].path).read_bytes())
    picnic.views += [replace(view, path=str(copy)) for view in picnic.views]
    cache = picnic.filled()
    assert len(cache) == 2
    assert torch.equal(cache.read(picnic.views[0]), cache.read(picnic.views[2]))
