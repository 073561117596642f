"""Sets mixed at a ratio: exact over epochs, each on its own endless row."""

from __future__ import annotations

import inspect
import pickle
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from ldm.data.data_module import DataModuleFromConfig
from ldm.data.every_dream import EveryDreamBatch
from ldm.data.exposure_set import ExposureSet, Filler
from ldm.data.mixture import Mixture, parse_ratio
from ldm.data.sampler import EpochBatches, EpochLoader
from ldm.ledger import ledger_entries
from tests.unit.data.make_shards import write_shards

FOLDER = "ldm.data.every_dream.EveryDreamBatch"
SHARDS = "ldm.data.web_shards.WebShards"
Make = Callable[..., Mixture]


class Numbers:
    """A set of a known number of items, whose items are its indices."""

    def __init__(self, length: int, name: str = "numbers", seed: int = 0) -> None:
        self.length = length
        self.name = name
        self.seed = seed

    def epoch_start(self, epoch: int) -> int:
        return epoch * self.length

    def epoch_length(self, epoch: int) -> int:
        return self.length

    def training_sizes(self, epoch: int) -> npt.NDArray[np.int32]:
        return np.stack([np.full(self.length, self.length), np.arange(self.length)], axis=1).astype(np.int32)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"name": self.name, "index": int(index), "size": [self.length, index % self.length]}


class NumbersShuffled(Numbers):
    """The same, of which any stretch can be planned."""

    def sizes_between(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        return np.array([[self.length, index % self.length] for index in range(start, stop)], np.int32).reshape(-1, 2)


def mixture_of_numbers(ratio: str, **lengths: int) -> Mixture:
    sets = {
        name: {
            "target": f"{__name__}.{'NumbersShuffled' if name.startswith('s') else 'Numbers'}",
            "params": {"length": length, "name": name},
        }
        for name, length in lengths.items()
    }
    return Mixture(ratio, sets)


@pytest.fixture
def make(tmp_path: Path, make_root: Callable[..., Path]) -> Make:
    """Mix a folder of 3 pictures, shown twice an epoch, with shards of 15 samples."""
    root = make_root("man/a.png", "man/b.png", "woman/c.png", root="people")
    write_shards(tmp_path / "laion", [5, 3, 7])

    def make(ratio: str = "man 1 : laion 1", laion: dict[str, Any] | None = None, **params: Any) -> Mixture:
        sets = {
            "man": {"target": FOLDER},
            "laion": {
                "target": SHARDS,
                "params": {
                    "shards": str(tmp_path / "laion"),
                    "shard_cache_dir": str(tmp_path / "cache"),
                    **(laion or {}),
                },
            },
        }
        return Mixture(ratio, sets, **{"data_root": str(root), "size": 16, "repeats": 2, **params})

    return make


@pytest.mark.parametrize(
    ("ratio", "shares"),
    [
        ("man 1 : laion 1", {"man": 1, "laion": 1}),
        ("man 1, laion 1", {"man": 1, "laion": 1}),
        ({"man": 2, "laion": 0.5}, {"man": 1, "laion": Fraction(1, 4)}),
        ({"man 1": "laion 2"}, {"man": 1, "laion": 2}),
        ("man 2:laion 1.5 : ffhq 1/2", {"man": 1, "laion": Fraction(3, 4), "ffhq": Fraction(1, 4)}),
    ],
)
def test_a_ratio_is_read_exactly(ratio: str | dict[str, Any], shares: dict[str, Fraction]) -> None:
    assert parse_ratio(ratio) == shares


@pytest.mark.parametrize("ratio", ["", "man", "man 1 laion 1", "man 0 : laion 1", "man 1 : man 2", "man -1", "man 1/0"])
def test_another_text_is_no_ratio(ratio: str) -> None:
    with pytest.raises(ValueError, match="ratio"):
        parse_ratio(ratio)


@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(1, 7),
    second=st.integers(1, 9),
    third=st.integers(1, 9),
    shares=st.tuples(*[st.fractions(Fraction(1, 7), 4, max_denominator=7)] * 3),
    epochs=st.integers(1, 9),
)
def test_the_ratio_is_exact_over_epochs(
    first: int, second: int, third: int, shares: tuple[Fraction, Fraction, Fraction], epochs: int
) -> None:
    ratio = f"a {shares[0]} : b {shares[1]} : s {shares[2]}"
    mixture = mixture_of_numbers(ratio, a=first, b=second, s=third)
    shown = Counter(mixture[index]["name"] for index in range(mixture.epoch_start(epochs)))
    assert shown["a"] == epochs * first
    assert shown["b"] == epochs * first * shares[1] // shares[0]
    assert shown["s"] == epochs * first * shares[2] // shares[0]


@settings(max_examples=60, deadline=None)
@given(first=st.integers(1, 6), second=st.integers(1, 9), share=st.fractions(Fraction(1, 5), 3, max_denominator=5))
def test_every_set_goes_on_where_it_stopped(first: int, second: int, share: Fraction) -> None:
    mixture = mixture_of_numbers(f"a 1 : b {share} : s {share}", a=first, b=second, s=second)
    shown: dict[str, list[int]] = {"a": [], "b": [], "s": []}
    for index in range(mixture.epoch_start(6)):
        item = mixture[index]
        shown[item["name"]].append(item["index"])
    assert shown["a"] == list(range(6 * first))
    assert shown["s"] == list(range(len(shown["s"])))
    for start in range(0, len(shown["b"]) - second + 1, second):
        assert sorted(shown["b"][start : start + second]) == list(range(start, start + second))


@settings(max_examples=30, deadline=None)
@given(first=st.integers(1, 6), second=st.integers(1, 9), share=st.fractions(Fraction(1, 5), 3, max_denominator=5))
def test_sizes_are_planned_in_the_order_of_the_indices(first: int, second: int, share: Fraction) -> None:
    mixture = mixture_of_numbers(f"a 1 : b {share} : s {share}", a=first, b=second, s=second)
    for epoch in range(4):
        indices = range(mixture.epoch_start(epoch), mixture.epoch_start(epoch + 1))
        assert mixture.training_sizes(epoch).tolist() == [mixture[index]["size"] for index in indices]
        assert len(indices) == mixture.epoch_length(epoch)


def test_a_second_folder_is_shown_in_another_order_in_each_pass() -> None:
    mixture = mixture_of_numbers("a 1 : b 1", a=8, b=8)
    passes = [tuple(mixture[16 * epoch + 8 + number]["index"] % 8 for number in range(8)) for epoch in range(3)]
    assert len(set(passes)) == 3


def test_an_index_names_the_same_exposure_in_whatever_order_they_are_asked_for() -> None:
    indices = np.random.default_rng(0).permutation(60).tolist()
    in_order = mixture_of_numbers("a 1 : b 2/3 : s 5", a=3, b=4, s=7)
    mixed = mixture_of_numbers("a 1 : b 2/3 : s 5", a=3, b=4, s=7)
    wanted = [in_order[index] for index in range(60)]
    assert {index: mixed[index] for index in indices} == dict(enumerate(wanted))


def test_a_folder_is_mixed_with_shards(make: Make) -> None:
    mixture = make()
    assert isinstance(mixture, ExposureSet)
    assert len(mixture) == 12
    items = [mixture[index] for index in range(36)]
    by_set = Counter("laion" if "laion" in item["path"] else "man" for item in items)
    assert by_set == {"man": 18, "laion": 18}
    from_shards = [item["path"] for item in items if "laion" in item["path"]]
    assert len(set(from_shards[:15])) == 15
    assert {frozenset(item) for item in items} == {frozenset(items[0])}


def test_the_shards_of_later_epochs_are_not_looked_at(make: Make, tmp_path: Path) -> None:
    make("man 2 : laion 1").training_sizes(0)
    assert len(list((tmp_path / "cache" / "indices").glob("*.npz"))) == 1
    assert make().known_ahead is False


def test_a_mixture_says_what_an_epoch_shows(make: Make) -> None:
    assert make("man 2 : laion 1").summary_line == (
        "an epoch mixes 6 exposures of man (EveryDreamBatch) and 3 exposures of laion (WebShards)"
    )


def test_what_is_given_for_all_holds_for_each_set_that_does_not_say_otherwise(make: Make) -> None:
    mixture = make(laion={"size": 24}, flip_p=0.25, repeats=4)
    man, laion = mixture.parts["man"], mixture.parts["laion"]
    assert (man.size, laion.size, man.flip_p, laion.flip_p, man.repeats) == (16, 24, 0.25, 0.25, 4)
    assert man.seed != laion.seed


def test_everything_that_a_folder_takes_can_be_given_for_all() -> None:
    assert inspect.signature(EveryDreamBatch).parameters.keys() <= inspect.signature(Mixture).parameters.keys()


def test_a_second_folder_is_not_repeated(make_root: Callable[..., Path]) -> None:
    first, second = make_root("a/1.png", root="first"), make_root("a/1.png", "a/2.png", root="second")
    sets = {"new": {"target": FOLDER}, "old": {"target": FOLDER, "params": {"data_root": str(second)}}}
    mixture = Mixture("new 1 : old 1", sets, data_root=str(first), repeats=5, size=8)
    assert (mixture.parts["new"].repeats, mixture.parts["old"].repeats) == (5, 1)
    keys = [tuple(mixture[index]["exposure"].tolist()) for index in range(40)]
    assert len(set(keys)) == 40


def test_shards_alone_are_trained_on_with_what_the_main_file_says(make: Make, tmp_path: Path) -> None:
    shards = {"shards": str(tmp_path / "laion"), "shard_cache_dir": str(tmp_path / "cache")}
    sets = {"laion": {"target": SHARDS, "params": shards}}
    assert len(Mixture("laion 1", sets, repeats=3, size=16, data_root="without effect")) == 45


def test_pictures_are_carried_as_bytes_where_the_loader_wishes(make: Make) -> None:
    mixture = make()
    mixture.as_bytes = True
    assert {mixture[index]["image"].dtype for index in range(12)} == {np.dtype(np.uint8)}


def test_a_filler_of_a_mixture_counts_nothing(make: Make) -> None:
    mixture = make()
    assert [float(mixture[Filler(index)]["loss_weight"]) for index in (0, 11)] == [0.0, 0.0]


def test_batches_mix_the_sets_and_hold_each_exposure_once(make: Make) -> None:
    mixture = make()
    batches = EpochBatches(mixture, 4, seed=3)
    loaded = list(DataLoader(mixture, batch_sampler=batches, num_workers=1))
    assert sorted(path for batch in loaded for path in batch["path"]) == sorted(
        mixture[index]["path"] for index in range(12)
    )
    assert any(len({"laion" in path for path in batch["path"]}) == 2 for batch in loaded)


def test_a_mixtures_ledger_entry_is_shown_again(make: Make) -> None:
    mixture = make(crop="random")
    for index in range(12):
        item = mixture[index]
        again = mixture.replay(ledger_entries(default_collate([item]))[0])
        np.testing.assert_array_equal(again["image"], item["image"])


def test_a_mixture_can_be_sent_to_another_process(make: Make) -> None:
    mixture = make()
    again = pickle.loads(pickle.dumps(mixture))
    assert [again[index]["path"] for index in range(24)] == [mixture[index]["path"] for index in range(24)]


def test_epochs_follow_each_other_without_a_gap() -> None:
    mixture = mixture_of_numbers("a 3 : b 2", a=4, b=100)
    starts = [mixture.epoch_start(epoch) for epoch in range(8)]
    assert starts[0] == 0
    assert {after - before for before, after in pairwise(starts)} == {6, 7}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratio": "man 1 : ffhq 1"}, "ratio names ffhq, which sets does not hold; it has man, laion"),
        ({"data_root": None}, "set man has no data_root: add --data_root"),
        ({"size": 7}, "set man: EveryDreamBatch: size 7"),
        ({"set": "val"}, "a mixture is for training"),
        ({"cache_latents": "disk"}, "set it to off"),
        ({"laion": {"shards": "nowhere/*.tar"}}, "set laion: shards: nowhere"),
    ],
)
def test_a_mixture_that_cannot_be_made_is_refused(make: Make, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**params)


def test_a_set_that_the_ratio_does_not_name_is_left_out_and_told(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        mixture = make(ratio="laion 1")
    assert list(mixture.parts) == ["laion"]
    assert "since ratio does not name them: man" in caplog.text


def test_problems_of_all_sets_are_told_at_once(make: Make) -> None:
    with pytest.raises(ValueError) as raised:
        make(flip_p=2)
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == ["set man", "set laion"]


def test_two_folders_cannot_share_one_root(make_root: Callable[..., Path]) -> None:
    root = make_root("a/1.png")
    sets = {"new": {"target": FOLDER}, "old": {"target": FOLDER}}
    with pytest.raises(ValueError, match="only one can take --data_root"):
        Mixture("new 1 : old 1", sets, data_root=str(root))


def test_a_set_of_another_project_is_told_that_it_cannot_be_mixed(make: Make) -> None:
    sets = {"man": {"target": "torch.utils.data.TensorDataset"}}
    with pytest.raises(ValueError, match="cannot be mixed"):
        Mixture("man 1", sets)


def data_module(mixture_params: dict[str, Any], **params: Any) -> DataModuleFromConfig:
    train = {"target": "ldm.data.mixture.Mixture", "params": mixture_params}
    return DataModuleFromConfig(batch_size=4, num_workers=0, train=train, **params)


def mixing_params(tmp_path: Path, root: Path) -> dict[str, Any]:
    shards = {"shards": str(tmp_path / "laion"), "shard_cache_dir": str(tmp_path / "cache")}
    return {
        "ratio": "man 1 : laion 1",
        "sets": {"man": {"target": FOLDER}, "laion": {"target": SHARDS, "params": shards}},
        "data_root": str(root),
        "size": 16,
        "repeats": 2,
    }


def test_a_mixture_is_loaded_as_any_set_is(tmp_path: Path, make_root: Callable[..., Path]) -> None:
    root = make_root("man/a.png", "man/b.png", "woman/c.png")
    write_shards(tmp_path / "laion", [5, 3, 7], sizes=((12, 12), (24, 12)))
    data = data_module(mixing_params(tmp_path, root))
    data.setup()
    loader = data.train_dataloader()
    shown: Counter[str] = Counter()
    assert isinstance(loader, EpochLoader)
    for batch in loader:
        assert batch["image"].shape[0] == len(batch["caption"])
        shown.update(batch["path"])
    assert (sum(shown.values()), data.steps_per_epoch("train")) == (12, len(loader))
    assert sum("laion" in path for path in shown) == 6


def test_broken_pictures_of_a_mixed_folder_are_named_before_training(
    tmp_path: Path, make_root: Callable[..., Path]
) -> None:
    root = make_root("man/a.png", "man/b.png")
    (root / "man" / "b.png").write_bytes(b"none")
    write_shards(tmp_path / "laion", [3])
    with pytest.raises(ValueError, match=r"data\.params\.train\.params\.sets\.man\.params\.on_bad_image=skip"):
        data_module(mixing_params(tmp_path, root)).setup()


def test_broken_pictures_of_a_mixed_folder_are_left_out_where_that_is_wished(
    tmp_path: Path, make_root: Callable[..., Path]
) -> None:
    root = make_root("man/a.png", "man/b.png")
    (root / "man" / "b.png").write_bytes(b"none")
    write_shards(tmp_path / "laion", [3])
    data = data_module({**mixing_params(tmp_path, root), "on_bad_image": "skip"})
    data.setup()
    assert len(data.datasets["train"]) == 4
