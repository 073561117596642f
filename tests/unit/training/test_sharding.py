from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ldm.training.company import Company
from ldm.training.sharding import ShardedStrategy, refuse_unshardable
from tests.unit.training.toy import ToyDiffusion
from tests.unit.training.toy_run import prepare_toy_run


class ShardableToy(ToyDiffusion):
    """Could be shared out."""

    def __init__(self, optimizer_config: dict[str, Any] | None = None, blocks: int = 4) -> None:
        super().__init__()
        self.optimizer_config = optimizer_config
        self.blocks = blocks

    def shared_blocks(self) -> list[nn.Module]:
        return list(self.model)[: self.blocks]


def refuse(model: ToyDiffusion, pictures: Path, folder: Path, strategy: str = "fsdp") -> None:
    trainer = prepare_toy_run(folder, pictures, model=model, devices=2, strategy=strategy)[0].trainer
    assert isinstance(trainer.strategy, ShardedStrategy) == (strategy == "fsdp")
    refuse_unshardable(trainer, model)


def test_what_can_be_shared_out_is_not_refused(pictures: Path, tmp_path: Path) -> None:
    refuse(ShardableToy({"target": "torch.optim.SGD"}), pictures, tmp_path)


def test_a_model_that_cannot_be_shared_out_is_refused_under_fsdp_alone(pictures: Path, tmp_path: Path) -> None:
    refuse(ToyDiffusion(), pictures, tmp_path / "ddp", "ddp")
    with pytest.raises(ValueError, match="shards diffusion models; ToyDiffusion trains with --strategy ddp"):
        refuse(ToyDiffusion(), pictures, tmp_path)


def test_weights_that_no_block_has_are_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot shard model\.3\.weight, model\.3\.bias"):
        refuse(ShardableToy(blocks=3), pictures, tmp_path)


def test_an_optimiser_of_another_library_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="works with torch's own optimisers, not with torchao"):
        refuse(ShardableToy({"target": "torchao.optim.AdamW8bit"}), pictures, tmp_path)


def test_a_precision_that_does_not_go_with_it_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not with '16-mixed': give one of them"):
        prepare_toy_run(tmp_path, pictures, devices=2, strategy="fsdp", precision="16-mixed")


def test_on_one_device_nobody_else_is_blamed(pictures: Path, tmp_path: Path) -> None:
    company = Company()
    run = prepare_toy_run(tmp_path, pictures)[0]
    company.setup(run.trainer, run.model, "fit")
    company.tell(2)
    assert company.blame(RuntimeError("broken")) is None
