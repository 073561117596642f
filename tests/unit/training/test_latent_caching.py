"""Filling the latent caches of a run before it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.data.data_module import DataModuleFromConfig
from ldm.training.latent_caching import LatentCaching, format_bytes, refuse_uncacheable, weights_digest
from tests.unit.training.latent_toy import LatentToy
from tests.unit.training.toy import ToyDiffusion, make_pictures


class OneOfMany:
    """A strategy of Lightning's, as one rank sees it whose partners do just as much as it does."""

    root_device = torch.device("cpu")
    restore_checkpoint_after_setup = False

    def __init__(self, world: int = 1, others_succeed: bool = True) -> None:
        self.world = world
        self.others_succeed = others_succeed

    def reduce(self, tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return tensor * self.world

    def reduce_boolean_decision(self, decision: bool) -> bool:
        return decision and self.others_succeed

    def broadcast(self, token: str) -> str:
        return token


class PlainPrecision:
    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


Run = Callable[..., DataModuleFromConfig]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Set a data module up and fill its caches; keywords change the trainer."""
    make_pictures(tmp_path / "pictures", per_folder=3, folders=2, size=16)

    def run(model: Any = None, validation: str = "off", cache: str = "disk", **trainer: Any) -> DataModuleFromConfig:
        params = {"data_root": str(tmp_path / "pictures"), "size": 16, "cache_dir": str(tmp_path / "cache")}
        data = DataModuleFromConfig(
            batch_size=2,
            num_workers=0,
            train={"target": "ldm.data.every_dream.EveryDreamBatch", "params": params | {"cache_latents": cache}},
            validation={
                "target": "ldm.data.ed_validate.EDValidateBatch",
                "params": params | {"cache_latents": validation},
            },
        )
        data.setup()
        defaults: dict[str, Any] = {
            "strategy": OneOfMany(),
            "precision_plugin": PlainPrecision(),
            "enable_validation": True,
            "is_global_zero": True,
            "global_rank": 0,
            "local_rank": 0,
            "world_size": 1,
            "num_devices": 1,
            "num_nodes": 1,
        }
        fake: Any = SimpleNamespace(datamodule=data, **(defaults | trainer))
        LatentCaching().on_fit_start(fake, model or LatentToy())
        return data

    return run


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_each_picture_is_encoded_once_and_read_from_then_on(run: Run, cache: str) -> None:
    model = LatentToy()
    data = run(model, cache=cache)
    assert model.encoded == 6 + 1, "and an empty picture, which tells the size"
    shown = data.datasets["train"][0]
    expected = run(model, cache="off").datasets["train"][0]["image"]
    assert torch.allclose(shown["moments"][:3].mean(dim=(1, 2)), torch.from_numpy(expected).mean(dim=(0, 1)))
    assert data.datasets["train"].latent_cache.is_ready


def test_training_and_validation_share_what_they_have_in_common(run: Run) -> None:
    model = LatentToy()
    run(model, validation="disk")
    assert model.encoded == 6 + 2


def test_a_validation_that_does_not_take_place_is_not_cached(run: Run) -> None:
    data = run(validation="disk", enable_validation=False)
    assert "image" in data.datasets["validation"][0]


def test_another_encoder_encodes_anew(run: Run) -> None:
    run(LatentToy())
    other = LatentToy()
    run(other)
    with torch.no_grad():
        other.first_stage_model.weight[0, 0] += 1
    before = other.encoded
    run(other)
    assert other.encoded == before + 1 + 6


def test_the_size_is_told_before_anything_is_written(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.data.latent_cache.DiskEntries.free_bytes", lambda self: 6 * 6 * 4 * 4 - 1)
    model = LatentToy()
    with caplog.at_level(logging.INFO), pytest.raises(ValueError) as refused:
        run(model)
    assert f"(train): 6 latents of 6 pictures, 0.6 kB, in {tmp_path / 'cache'}; 6 to make, 0.6 kB (0.6 kB free)" in (
        caplog.text
    )
    assert str(refused.value) == (
        f"data.params.train.params.cache_latents: 0.6 kB of latents do not fit into {tmp_path / 'cache'}, which has "
        "0.6 kB free; make room, name another folder as cache_dir, or lower cache_crops"
    )
    assert model.encoded == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_too_little_memory_is_told_before_it_is_filled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.data.latent_cache.available_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"do not fit into memory, .*set cache_latents: disk"):
        run(cache="memory")


class Overflows(LatentToy):
    def encode_moments(self, pictures: Tensor) -> Tensor:
        return super().encode_moments(pictures) / (pictures[:, :1, :1, :1] > 0).float()


def test_all_pictures_without_finite_latents_are_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        run(Overflows())
    lines = str(refused.value).splitlines()
    assert len(lines) > 2
    assert all(line.endswith(".png: its latents are no finite numbers") for line in lines[:-1])
    assert lines[-1] == "train with another --precision, such as bf16-mixed"


def test_each_rank_encodes_its_share(run: Run) -> None:
    encoded = []
    for rank in (0, 1):
        model = LatentToy()
        run(model, strategy=OneOfMany(2), global_rank=rank, local_rank=rank, world_size=2, num_devices=2)
        encoded.append(model.encoded - 1)
    assert encoded == [3, 3]


def test_a_machine_with_a_folder_of_its_own_makes_what_others_have_made_elsewhere(run: Run) -> None:
    model = LatentToy()
    run(model, strategy=OneOfMany(2), global_rank=1, world_size=2, num_nodes=2)
    assert model.encoded == 1 + 6


def test_a_rank_ends_when_another_one_fails(run: Run) -> None:
    with pytest.raises(ValueError, match="failed on another device"):
        run(strategy=OneOfMany(2, others_succeed=False), world_size=2, num_devices=2)


def test_a_failure_is_raised_as_it_is_where_it_happens(run: Run) -> None:
    with pytest.raises(ValueError, match="no finite numbers"):
        run(Overflows(), strategy=OneOfMany(2), world_size=2, num_devices=2)


class ReadsLate(OneOfMany):
    restore_checkpoint_after_setup = True


def test_a_strategy_that_has_the_weights_too_late_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="cache_latents: the strategy ReadsLate gives a continued run its weights"):
        run(strategy=ReadsLate())


# --- what is refused before a run --------------------------------------------------------------------------


def test_a_model_that_trains_on_pixels_is_refused_in_one_line() -> None:
    datasets = {"train": SimpleNamespace(latent_cache=object())}
    with pytest.raises(ValueError) as refused:
        refuse_uncacheable(ToyDiffusion(), datasets)
    assert str(refused.value) == (
        "data.params.train.params.cache_latents: a ToyDiffusion is trained on the pictures themselves; set it to off"
    )


@pytest.mark.parametrize("datasets", [{}, {"train": SimpleNamespace(latent_cache=None)}, {"train": [1, 2]}])
def test_any_model_will_do_where_nothing_is_cached(datasets: dict[str, Any]) -> None:
    refuse_uncacheable(ToyDiffusion(), datasets)


def test_a_model_that_encodes_is_accepted() -> None:
    refuse_uncacheable(LatentToy(), {"train": SimpleNamespace(latent_cache=object())})


# --- digests and sizes -------------------------------------------------------------------------------------


def test_a_digest_tells_any_weight_from_another() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    changed, halved = build(), build().half()
    with torch.no_grad():
        changed[0].bias[1] = torch.nextafter(changed[0].bias[1], torch.tensor(9.0))
    digests = {weights_digest(module) for module in (build(), build(), changed, halved, nn.ModuleList(build()))}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 kB"), (65_536, "65.5 kB"), (2_500_000, "2.5 MB"), (78_643_200_000, "78.6 GB")]
)
def test_bytes_are_written_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
