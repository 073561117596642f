"""What two processes do together, on the CPU; all of it by one pair, since starting one takes the most time."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.ledger import read_ledger
from ldm.training.run import main
from tests.end_to_end.conftest import SMALL, TINY, FinishedRun
from tests.end_to_end.two_devices import train_together

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the processes' library for CPUs is not built there")

TOY = """
model: {base_learning_rate: 0.01, target: tests.unit.training.toy.ToyDiffusion}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: {target: ldm.data.every_dream.EveryDreamBatch, params: {size: 16, repeats: 2}}
lightning: {trainer: {max_epochs: 2, accelerator: cpu, devices: 2}}
"""

CACHED = """
model: {base_learning_rate: 0.01, target: tests.unit.training.latent_toy.LatentToy}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 1
    num_workers: 1
    train: {target: ldm.data.every_dream.EveryDreamBatch, params: {size: 16, repeats: 1, cache_latents: memory}}
    validation: {target: ldm.data.ed_validate.EDValidateBatch, params: {size: 16, cache_latents: disk}}
lightning:
  trainer: {max_epochs: 2, accelerator: cpu, devices: 2}
  callbacks: {image_logger: {params: {disabled: true}}}
"""

CPU = "lightning.trainer.accelerator=cpu"
TWO = ["lightning.trainer.devices=2", "data.params.batch_size=1"]
ONE = ["lightning.trainer.devices=1", "data.params.batch_size=2", "lightning.trainer.strategy=auto"]
SMALLER = [
    CPU,
    "model.params.use_ema=true",
    "model.params.unet_config.params.use_checkpoint=true",
    "model.params.unet_config.params.channel_mult=[1,2]",
    "model.params.unet_config.params.attention_resolutions=[2]",
    "model.params.cond_stage_config.params.text_config.num_hidden_layers=1",
    "data.params.train.params.repeats=1",
    "lightning.trainer.limit_val_batches=1",
]
"""The tiny model with half its tensors; two steps an epoch, with a validation after it."""

STEPS = "lightning.trainer.max_steps"

TOLERANCE = 1e-6
"""Of Adam's first moments after three steps: they are sums of gradients, of up to 1e-1 here, in another order.

The weights themselves differ by more where a gradient is all but 0: Adam divides it by its own size.
"""

WEIGHT_TOLERANCE = 5e-4
"""A sixth of the way that weights and their averages can have gone: three steps of 1e-3."""


@dataclass
class Together:
    """What the two processes were told, and what came of it."""

    folder: Path
    statuses: list[list[int]]
    said: list[str]

    def run(self, name: str) -> FinishedRun:
        return FinishedRun(next((self.folder / name).iterdir()))


@pytest.fixture(scope="module")
def together(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """All runs of two processes, one after the other; the last one breaks their connection."""
    folder = tmp_path_factory.mktemp("together")
    for name, text in (("toy", TOY), ("cached", CACHED)):
        (folder / f"{name}.yaml").write_text(text)
    for number, size in enumerate([(64, 64), (64, 64), (64, 64), (96, 32), (32, 96)]):
        path = folder / "pictures" / "mixed" / f"a shape_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize(size).save(path)
    plain = str(workplace / "MyProject")
    tiny = ["--base", str(TINY), "-t", "--no-test", "--data_root", plain, *SMALL, *SMALLER]
    assert main([*tiny, *ONE, f"{STEPS}=1", "-n", "single", "-l", str(folder / "single")]) == 0
    single = next((folder / "single").iterdir())
    shutil.copytree(folder / "single", folder / "sharded_later")
    assert main(["-t", "-r", str(single), f"{STEPS}=3"]) == 0

    def new(name: str, *words: str) -> list[str]:
        return [*words, "-n", name, "-l", str(folder / name)]

    sharded = [*TWO, "lightning.trainer.strategy=fsdp"]
    fails = "lightning.callbacks.fails={target: tests.end_to_end.two_devices.FailsAlone}"
    commands = [
        new("shapes", "-b", "toy.yaml", "-t", "--data_root", "pictures"),
        new("cached", "-b", "cached.yaml", "-t", "--data_root", plain),
        new("ddp", *tiny, *TWO, f"{STEPS}=3"),
        new("fsdp", *tiny, *sharded, f"{STEPS}=1"),
        ["-t", "-r", str(folder / "sharded_later" / single.name), *sharded, f"{STEPS}=3"],
        new("fails", "-b", "toy.yaml", "-t", "--data_root", plain, "data.params.batch_size=1", fails),
    ]
    statuses, said = train_together(folder, commands)
    return Together(folder, statuses, said)


def moments(run: FinishedRun) -> torch.Tensor:
    states: dict[int, Any] = run.last["optimizer_states"][0]["state"]
    return torch.cat([state["exp_avg"].flatten() for state in states.values()])


def assert_same(one: FinishedRun, other: FinishedRun) -> None:
    assert one.last["global_step"] == other.last["global_step"] == 3
    assert list(one.last["state_dict"]) == list(other.last["state_dict"])
    assert float(moments(one).abs().max()) > 1e3 * TOLERANCE
    torch.testing.assert_close(moments(one), moments(other), rtol=0, atol=TOLERANCE)
    weights = other.last["state_dict"]
    for key, value in one.last["state_dict"].items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=WEIGHT_TOLERANCE)


def test_every_run_ends_as_it_should_in_both_processes(together: Together) -> None:
    assert together.statuses == [[0, 0, 0, 0, 0, 2]] * 2, "\n".join(together.said)


def test_pictures_of_several_shapes_are_seen_once_each(together: Together) -> None:
    run = together.run("shapes")
    entries = [entry for name in ("exposure.jsonl", "exposure.rank1.jsonl") for entry in read_ledger(run.path / name)]
    times = Counter((entry["epoch"], entry["item"], entry["repeat"]) for entry in entries)
    assert (len(times), set(times.values())) == (2 * 2 * 5, {1})
    # Six squares in batches of four, two of each other shape: 2 + 1 + 1 steps an epoch on each device.
    assert run.last["global_step"] == 8


def test_the_work_of_caching_latents_is_shared_and_so_is_what_comes_of_it(together: Together) -> None:
    for place in ("in memory", "in latent_cache"):
        assert "".join(together.said).count(f"4 latents of 4 pictures, 0.4 kB, {place}; 4 to make, 0.4 kB") == 1
    assert len(list((together.folder / "latent_cache").glob("*/*"))) == 4
    assert together.run("cached").last["global_step"] == 4


def test_two_devices_train_as_one_does_with_the_same_global_batch(together: Together) -> None:
    assert_same(together.run("single"), together.run("ddp"))


def test_a_run_of_one_device_is_continued_with_its_weights_shared_out(together: Together) -> None:
    assert_same(together.run("single"), together.run("sharded_later"))


def test_a_run_with_its_weights_shared_out_is_continued_on_one_device(together: Together) -> None:
    run = together.run("fsdp")
    assert main(["-t", "-r", str(run.path), *ONE, f"{STEPS}=3"]) == 0
    assert_same(together.run("single"), run)


def test_a_failure_of_one_process_ends_both_with_its_line_alone(together: Together) -> None:
    errors = [line for said in together.said for line in said.splitlines() if line.startswith(("error:", "Traceback"))]
    assert errors == ["error: device 1: the picture is gone"]
