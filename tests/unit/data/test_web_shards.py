"""The training set of tar shards: its row of exposures, its items, and what is wrong with them."""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from ldm.data.exposure_set import ExposureSet, Filler
from ldm.data.image_transform import Placement
from ldm.data.items import UnreadableError
from ldm.data.sampler import EpochBatches
from ldm.data.shard_files import GIB
from ldm.data.web_shards import ShardRow, WebShards
from ldm.ledger import ledger_entries
from tests.unit.data.make_shards import picture_bytes, sample, write_shards, write_tar
from tests.unit.file_server import serve_files

Make = Callable[..., WebShards]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a set of the shards in ``laion``, which has three of 5, 3 and 7 samples unless it is there already."""

    def make(**params: Any) -> WebShards:
        if not (tmp_path / "laion").exists():
            write_shards(tmp_path / "laion", [5, 3, 7], sizes=((16, 16), (32, 16)))
        return WebShards(
            **{"shards": str(tmp_path / "laion"), "size": 16, "shard_cache_dir": str(tmp_path / "cache"), **params}
        )

    return make


def captions(dataset: Any, start: int, stop: int) -> list[str]:
    return [dataset[index]["caption"] for index in range(start, stop)]


def test_it_can_be_planned_over(make: Make) -> None:
    assert isinstance(make(), ExposureSet)


def test_each_pass_shows_each_sample_once_in_another_order(make: Make) -> None:
    dataset = make()
    passes = [captions(dataset, 15 * number, 15 * number + 15) for number in range(3)]
    assert all(sorted(shown) == sorted(f"caption {number}" for number in range(15)) for shown in passes)
    assert len({tuple(shown) for shown in passes}) == 3


def test_consecutive_exposures_come_from_few_shards(make: Make) -> None:
    shards = [make()[index]["path"].split("/")[-2] for index in range(15)]
    changes = sum(before != after for before, after in pairwise(shards))
    assert changes == 2


def test_shards_may_be_shuffled_together(make: Make) -> None:
    dataset = make(shuffle_shards=2)
    assert sorted(captions(dataset, 15, 30)) == sorted(f"caption {number}" for number in range(15))
    shards = [dataset[index]["path"].split("/")[-2] for index in range(15)]
    assert sum(before != after for before, after in pairwise(shards)) > 2


def test_the_order_depends_on_the_seed_alone(make: Make) -> None:
    assert captions(make(seed=1), 0, 30) == captions(make(seed=1), 0, 30) != captions(make(seed=2), 0, 30)


def test_an_epoch_takes_as_many_passes_as_samples_are_repeated(make: Make) -> None:
    dataset = make(repeats=2)
    assert (len(dataset), dataset.epoch_start(1)) == (30, 30)
    assert set(Counter(captions(dataset, 0, 30)).values()) == {2}
    assert len({tuple(dataset[index]["exposure"].tolist()) for index in range(30)}) == 30


def test_the_tags_of_a_caption_are_shuffled_behind_the_first(make: Make, tmp_path: Path) -> None:
    write_tar(tmp_path / "laion" / "00000.tar", {"1.png": picture_bytes(1), "1.txt": b"person, a, b, c, d"})
    shown = captions(make(shuffle_tags=True, keep_tags=1), 0, 20)
    assert len(set(shown)) > 5
    assert {(caption.split(", ")[0], tuple(sorted(caption.split(", ")[1:]))) for caption in shown} == {
        ("person", ("a", "b", "c", "d"))
    }


def test_short_epochs_follow_each_other_on_one_row(make: Make) -> None:
    dataset = make(exposures_per_epoch=4)
    assert len(dataset) == 4
    starts = [dataset.epoch_start(epoch) for epoch in range(5)]
    assert starts == [0, 4, 8, 12, 16]
    assert [caption for start in starts for caption in captions(dataset, start, start + 4)] == captions(make(), 0, 20)


def test_a_short_epoch_indexes_no_shard_that_it_does_not_reach(make: Make, tmp_path: Path) -> None:
    dataset = make(exposures_per_epoch=3)
    dataset.training_sizes(0)
    assert len(list((tmp_path / "cache" / "indices").glob("*.npz"))) == 1


def test_a_row_tells_any_position_without_those_before_it() -> None:
    counts = [5, 0, 3, 7]
    whole = ShardRow(4, counts.__getitem__, seed=3, together=2)
    row = [whole.locate(position) for position in range(45)]
    assert [ShardRow(4, counts.__getitem__, seed=3, together=2).locate(position) for position in range(45)] == row
    assert [Counter(entry[1] for entry in row if entry[0] == number) for number in range(3)] == [{0: 5, 2: 3, 3: 7}] * 3
    listed = []
    for shards, chosen in whole.stretches(4, 38):
        owners = np.repeat(shards, [counts[shard] for shard in shards])
        listed += owners[chosen].tolist()
    assert listed == [shard for _, shard, _ in row[4:38]]


def test_shards_say_what_an_epoch_shows(make: Make) -> None:
    assert make().summary_line == "3 shards, 15 exposures an epoch"
    dataset = make(exposures_per_epoch=3)
    dataset.training_sizes(0)
    assert dataset.summary_line.startswith("3 shards, 3 exposures an epoch, ")


def test_training_sizes_are_those_of_the_items(make: Make) -> None:
    dataset = make(exposures_per_epoch=7)
    sizes = dataset.training_sizes(1)
    assert sizes.dtype == np.int32
    assert sizes.tolist() == [list(dataset[index]["image"].shape[1::-1]) for index in range(7, 14)]
    assert {tuple(size) for size in sizes.tolist()} == {(16, 16), (24, 8)}


@pytest.mark.parametrize(
    ("params", "sizes"),
    [
        ({"resize_mode": "squash"}, {(16, 16)}),
        ({"size": None}, {(16, 16), (32, 16)}),
        ({"size": None, "resize_mode": "center_crop"}, {(16, 16)}),
    ],
)
def test_other_resize_modes_give_their_sizes(make: Make, params: dict[str, Any], sizes: set[tuple[int, int]]) -> None:
    dataset = make(**params)
    assert {tuple(size) for size in dataset.training_sizes(0).tolist()} == sizes
    assert {dataset[index]["image"].shape[1::-1] for index in range(15)} == sizes


def test_an_item_holds_what_a_folders_item_holds(make: Make, tmp_path: Path) -> None:
    item = make(loss_weight=0.5)[0]
    assert item["image"].dtype == np.float32
    assert item["path"].startswith(str(tmp_path / "laion" / "0000"))
    assert item["path"].endswith(".png")
    assert item["exposure"].dtype == torch.int64
    assert item["crop"].dtype == torch.float64
    assert float(item["loss_weight"]) == 0.5
    assert (item["flip"], item["dropped"]) == (False, False)


def test_a_filler_is_the_same_item_without_weight(make: Make) -> None:
    dataset = make()
    item, filler = dataset[4], dataset[Filler(4)]
    assert float(filler["loss_weight"]) == 0
    assert filler["path"] == item["path"]
    np.testing.assert_array_equal(filler["image"], item["image"])


def test_the_pixels_are_those_of_the_picture(make: Make) -> None:
    item = make(size=None)[0]
    number = int(item["caption"].split()[1])
    assert np.rint((item["image"][0, 0] + 1) * 127.5).tolist() == [number, 0, 7]


def test_exposures_have_keys_of_their_own_that_do_not_depend_on_the_folders_place(make: Make, tmp_path: Path) -> None:
    dataset = make()
    rows = {tuple(dataset[index]["exposure"].tolist()) for index in range(45)}
    assert len(rows) == 45
    write_shards(tmp_path / "elsewhere" / "laion", [5, 3, 7], sizes=((16, 16), (32, 16)))
    moved = make(shards=str(tmp_path / "elsewhere" / "laion"))
    assert {tuple(moved[index]["exposure"].tolist()) for index in range(45)} == rows


def test_captions_are_dropped_and_pictures_flipped_by_exposure(make: Make) -> None:
    dataset = make(conditional_dropout=0.5, flip_p=0.5)
    items = [dataset[index] for index in range(45)]
    assert {(item["dropped"], item["caption"] == "") for item in items} == {(True, True), (False, False)}
    assert {item["flip"] for item in items} == {True, False}


def test_outside_training_nothing_is_drawn_and_all_epochs_are_alike(make: Make) -> None:
    dataset = make(set="val", conditional_dropout=1.0, flip_p=1.0, exposures_per_epoch=6)
    assert captions(dataset, 0, 6) == [f"caption {number}" for number in range(6)]
    assert captions(dataset, dataset.epoch_start(3), dataset.epoch_start(4)) == captions(dataset, 0, 6)
    assert dataset.training_sizes(3).tolist() == dataset.training_sizes(0).tolist()
    assert dataset[0]["flip"] is False
    assert dataset[0]["exposure"].tolist()[:2] == [0, 0]
    assert len(make(set="val", exposures_per_epoch=100)) == 15


def test_two_nodes_with_workers_see_each_sample_once_a_pass(make: Make) -> None:
    shown = []
    for rank in range(2):
        dataset = make()
        batches = EpochBatches(dataset, 2, seed=5, num_replicas=2, rank=rank)
        for epoch in range(2):
            batches.set_epoch(epoch)
            for batch in DataLoader(dataset, batch_sampler=batches, num_workers=2 if rank == 0 else 0):
                shown += [
                    (epoch, caption)
                    for caption, weight in zip(batch["caption"], batch["loss_weight"].tolist(), strict=True)
                    if weight > 0
                ]
    assert Counter(shown) == {(epoch, f"caption {number}"): 1 for epoch in range(2) for number in range(15)}


def test_an_epoch_goes_on_in_the_middle_with_the_same_batches(make: Make) -> None:
    whole = list(EpochBatches(make(exposures_per_epoch=9), 2, seed=5).batches(1))
    rest = list(EpochBatches(make(exposures_per_epoch=9), 2, seed=5).batches(1, start=2))
    assert rest == whole[2:]
    assert [make(exposures_per_epoch=9)[index]["caption"] for index in rest[0]] == [
        make()[index]["caption"] for index in whole[2]
    ]


def test_it_can_be_sent_to_another_process(make: Make) -> None:
    dataset = make()
    len(dataset)
    assert captions(pickle.loads(pickle.dumps(dataset)), 0, 15) == captions(dataset, 0, 15)


def test_a_ledgers_entry_is_shown_again(make: Make) -> None:
    dataset = make(crop="random", flip_p=0.5, conditional_dropout=0.5, loss_weight=0.5)
    for index in range(15):
        item = dataset[index]
        entry = json.loads(json.dumps(ledger_entries(default_collate([item]))[0]))
        again = dataset.replay(entry)
        assert again.keys() == item.keys()
        for key, value in item.items():
            np.testing.assert_array_equal(again[key], value)


def test_a_ledgers_entry_of_other_shards_is_told(make: Make) -> None:
    with pytest.raises(OSError, match=r"other/00000\.tar/1\.png: there is no such sample"):
        make().read_pixels("other/00000.tar/1.png", Placement((16, 16), (0.0, 0.0, 16.0, 16.0), False))


def damage(folder: Path) -> None:
    """Write a sound shard, one with two bad samples, and one that is cut off."""
    write_tar(folder / "00000.tar", {**sample(0), **sample(1)})
    write_tar(folder / "00001.tar", {**sample(2), "3.png": picture_bytes(3), "4.png": b"none", "4.txt": b"text"})
    path = write_tar(folder / "00002.tar", {**sample(5), **sample(6)})
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"000000006.png") + 512 + 10])


def test_all_that_is_wrong_with_shards_is_told_at_once(make: Make, tmp_path: Path) -> None:
    damage(tmp_path / "laion")
    with pytest.raises(ValueError) as raised:
        len(make())
    lines = str(raised.value).splitlines()
    assert [line.removeprefix(f"{tmp_path}/laion/").split(": ")[0] for line in lines[:3]] == [
        "00001.tar/3",
        "00001.tar/4",
        "00002.tar",
    ]
    assert "cut off within" in lines[2]
    assert "on_bad_image: skip" in lines[3]


def test_bad_samples_are_left_out_and_named_where_that_is_wished(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(tmp_path / "laion")
    dataset = make(on_bad_image="skip")
    assert sorted(captions(dataset, 0, len(dataset))) == ["caption 0", "caption 1", "caption 2", "caption 5"]
    assert sum("skipped" in record.message for record in caplog.records) == 3


def test_a_picture_that_breaks_when_it_is_decoded_ends_the_run_with_its_name(make: Make, tmp_path: Path) -> None:
    write_tar(tmp_path / "laion" / "00000.tar", {"9.png": picture_bytes(9)[:-200], "9.txt": b"nine"})
    with pytest.raises(OSError, match=r"laion/00000\.tar/9\.png: "):
        make()[0]


def test_a_picture_that_breaks_when_it_is_decoded_teaches_nothing_where_such_are_skipped(
    make: Make, tmp_path: Path
) -> None:
    write_tar(tmp_path / "laion" / "00000.tar", {"9.png": picture_bytes(9)[:-200], "9.txt": b"nine"})
    item = make(on_bad_image="skip")[0]
    assert float(item["loss_weight"]) == 0
    assert item["image"].shape == (16, 16, 3)
    assert "00000.tar/9.png: cannot be read: " in item["unreadable"]


def test_a_shard_that_vanishes_during_a_run_is_named(make: Make, tmp_path: Path) -> None:
    dataset = make()
    len(dataset)
    for shard in dataset.shards:
        Path(shard).unlink()
    with pytest.raises(UnreadableError, match=r"laion/0000\d\.tar: has vanished since the run began"):
        dataset[0]


def test_samples_of_a_shard_that_changes_during_a_run_teach_nothing_where_such_are_skipped(make: Make) -> None:
    dataset = make(on_bad_image="skip")
    sound = dataset[0]
    Path(sound["path"]).parent.write_bytes(b"something else")
    item = dataset[0]
    assert item.keys() == sound.keys()
    assert (sound["unreadable"], float(item["loss_weight"])) == ("", 0.0)
    assert ".tar: cannot be read: has changed since its index was built" in item["unreadable"]


def test_shards_without_a_sample_are_refused(make: Make, tmp_path: Path) -> None:
    write_tar(tmp_path / "laion" / "00000.tar", {"readme.md": b"nothing"})
    with pytest.raises(ValueError, match="no sample"):
        len(make())


def test_every_wrong_argument_is_told_at_once(make: Make) -> None:
    with pytest.raises(ValueError) as raised:
        make(size=7, set="no", exposures_per_epoch=0, flip_p=2, crop="left", on_bad_image="hide", shard_cache_gib=0)
    assert len(str(raised.value).splitlines()) == 7


def test_shards_at_a_url_are_trained_on_as_local_ones_are(make: Make, tmp_path: Path) -> None:
    local = make(shard_cache_dir=str(tmp_path / "local"))
    with serve_files() as server:
        for path in (tmp_path / "laion").glob("*.tar"):
            server.files[f"laion/{path.name}"] = path.read_bytes()
        remote = make(shards=server.url + "laion/{00000..00002}.tar")
        assert remote.training_sizes(0).tolist() == local.training_sizes(0).tolist()
        for index in range(15):
            np.testing.assert_array_equal(remote[index]["image"], local[index]["image"])
            assert remote[index]["exposure"].tolist() == local[index]["exposure"].tolist()
        assert len(server.requests) == 3


def test_a_copy_that_was_removed_to_make_room_is_fetched_again(make: Make, tmp_path: Path) -> None:
    make()
    with serve_files() as server:
        for path in (tmp_path / "laion").glob("*.tar"):
            server.files[path.name] = path.read_bytes()
        room = max(map(len, server.files.values())) + 10
        remote = make(shards=server.url + "{00000..00002}.tar", shard_cache_gib=room / GIB)
        assert captions(remote, 0, 30) == captions(make(shard_cache_dir=str(tmp_path / "local")), 0, 30)
        assert len(server.requests) > 3


def test_an_epoch_larger_than_the_cache_is_warned_of(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make()
    with serve_files() as server, caplog.at_level(logging.WARNING):
        for path in (tmp_path / "laion").glob("*.tar"):
            server.files[path.name] = path.read_bytes()
        room = max(map(len, server.files.values())) + 10
        make(shards=server.url + "{00000..00002}.tar", shard_cache_gib=room / GIB).training_sizes(0)
    assert "fetched over and over" in caplog.text


def test_what_the_next_epoch_reads_is_fetched_ahead(make: Make, tmp_path: Path) -> None:
    make()
    with serve_files() as server:
        for path in (tmp_path / "laion").glob("*.tar"):
            server.files[path.name] = path.read_bytes()
        remote = make(shards=server.url + "{00000..00002}.tar", exposures_per_epoch=4)
        remote.training_sizes(0)
        until = time.monotonic() + 10
        while len(list((tmp_path / "cache" / "indices").glob("*.npz"))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert len({path for path, _ in server.requests}) == 2
