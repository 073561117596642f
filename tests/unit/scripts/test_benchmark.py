from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark
import benchmark_diffusers
import benchmark_sides
import pytest
import torch

TINY = benchmark.ROOT / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"
CARD = {"matmul_tflops": 100.0, "tflop_per_image": {"sum": 2.0}}


def parse(*words: str) -> argparse.Namespace:
    return benchmark.build_parser().parse_args([*words, "--device", "cpu"])


def model_params(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return benchmark_sides.load_config(options, torch.device("cpu"), folder)["model"]["params"]


def figures(seconds: float, peak_gib: float = 1.0, parameters: int = 5) -> dict[str, Any]:
    return {
        "batch_size": 6,
        "seconds_per_step": seconds,
        "peak_bytes": peak_gib * benchmark.GIB,
        "reserved_bytes": 2 * peak_gib * benchmark.GIB,
        "parameters": {"unet": parameters},
    }


def test_sides_take_turns_and_the_card_comes_first(tmp_path: Path) -> None:
    options = parse("--peer", "diffusers", "--rounds", "2", "--data_root", str(tmp_path))
    assert benchmark.plan(options) == [
        "card:",
        "ours:synthetic",
        "diffusers:synthetic",
        "ours:synthetic",
        "diffusers:synthetic",
        "ours:folder",
        "diffusers:folder",
        "ours:folder",
        "diffusers:folder",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "100"), "--size 100 is not allowed; give a multiple of 8"),
        (("--batch_size", "0"), "--batch_size 0 is not allowed"),
        (("--config", "no_such.yaml"), "no_such.yaml: no such file"),
        (("--data_root", "no_such_folder"), "no_such_folder: no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark.main(list(words))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_row_has_the_median_speed_and_the_largest_memory() -> None:
    row = benchmark.summarise("ours:synthetic", [figures(0.3, 1.0), figures(0.1, 3.0), figures(0.2, 2.0)], CARD)
    assert row["ms_per_step"] == pytest.approx(200)
    assert row["images_per_second"] == pytest.approx(30)
    assert (row["peak_gib"], row["reserved_gib"]) == (3.0, 6.0)
    assert row["tflops"] == pytest.approx(60)
    assert row["share_of_matmul"] == pytest.approx(0.6)


def test_a_side_that_failed_once_has_failed() -> None:
    row = benchmark.summarise("ours:synthetic", [figures(0.3), {"failed": "out of memory"}], CARD)
    assert row["failed"] == "out of memory"
    assert "ours on synthetic pictures failed: out of memory" in benchmark.format_table([row])


def test_the_table_has_a_line_a_side_and_dashes_for_what_is_unknown() -> None:
    row = benchmark.summarise("ours:synthetic", [figures(0.2)], {"failed": "no card"})
    header, line = benchmark.format_table([row]).splitlines()
    assert header.split()[:3] == ["pictures", "images/s", "ms/step"]
    assert line.split() == ["ours", "synthetic", "30.00", "200.0", "1.00", "2.00", "-", "-"]


def test_the_comparison_is_ours_over_theirs() -> None:
    rows = [
        benchmark.summarise("ours:synthetic", [figures(0.1, 3.0)], CARD),
        benchmark.summarise("diffusers:synthetic", [figures(0.2, 2.0)], CARD),
    ]
    assert benchmark.compare(rows, "diffusers") == [
        "ours to diffusers, synthetic pictures: 2.00 x the speed, 1.50 x the memory"
    ]


def test_models_of_different_size_are_not_compared() -> None:
    rows = [
        benchmark.summarise("ours:synthetic", [figures(0.1, parameters=5)], CARD),
        benchmark.summarise("diffusers:synthetic", [figures(0.2, parameters=6)], CARD),
    ]
    assert benchmark.compare(rows, "diffusers")[0].startswith("not comparable")


def test_a_512_pixel_picture_of_stable_diffusion_v1_is_3_57_tflop(tmp_path: Path) -> None:
    # Independent count: UNet 2.41, text encoder 0.04 (both forward and backward), VAE encoder 1.12 (forward).
    work = benchmark_sides.count_work(model_params(parse(), tmp_path), 512)
    assert work == pytest.approx({"unet": 2.41, "text_encoder": 0.04, "vae": 1.117, "sum": 3.566}, abs=0.005)


def test_what_is_frozen_needs_no_backward_pass(tmp_path: Path) -> None:
    params = model_params(parse("--config", str(TINY), "--size", "64"), tmp_path)
    trained = benchmark_sides.count_work(params, 64)
    frozen = benchmark_sides.count_work({**params, "cond_stage_trainable": False}, 64)
    assert frozen["text_encoder"] < 0.5 * trained["text_encoder"]
    assert frozen["unet"] < trained["unet"]
    assert frozen["vae"] == trained["vae"]


@pytest.mark.parametrize("words", [(), ("--config", str(TINY))])
def test_the_peer_has_our_number_of_parameters(tmp_path: Path, words: tuple[str, ...]) -> None:
    params = model_params(parse(*words), tmp_path)
    keys = {"unet": "unet_config", "vae": "first_stage_config", "text_encoder": "cond_stage_config"}
    with torch.device("meta"):
        peer = benchmark_diffusers.build_parts(params)
        ours = {name: benchmark_sides.instantiate_from_config(params[key]) for name, key in keys.items()}
    theirs = {name: getattr(peer, name) for name in keys}
    assert benchmark_sides.count_parameters(**ours) == benchmark_sides.count_parameters(**theirs)


def test_the_peer_has_the_configured_number_of_attention_heads(tmp_path: Path) -> None:
    with torch.device("meta"):
        peer = benchmark_diffusers.build_parts(model_params(parse(), tmp_path))
    assert {module.heads for name, module in peer.unet.named_modules() if name.endswith(("attn1", "attn2"))} == {8}


def test_checkpointing_is_changed_only_where_asked_for(tmp_path: Path) -> None:
    for words, expected in (((), True), (("--gradient_checkpointing", "off"), False)):
        params = model_params(parse(*words), tmp_path)
        assert params["unet_config"]["params"]["use_checkpoint"] is expected


def test_every_synthetic_batch_has_exposures_of_its_own() -> None:
    batches = benchmark_sides.SyntheticBatches(batch_size=2, size=8, count=6)
    rows = torch.cat([batches[index]["exposure"] for index in range(len(batches))])
    assert len(rows.unique(dim=0)) == 12
    assert batches[0]["image"].shape == (2, 8, 8, 3)
    assert float(batches[0]["image"].abs().max()) <= 1.0


def test_the_clock_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = benchmark_sides.StepClock(torch.device("cpu"), warmup=2, steps=3)
    # Steps of the warm-up end after 100 s and 200 s, the timed ones 2 s apart.
    ends = [100.0, 200.0, 202.0, 204.0, 206.0]
    monkeypatch.setattr(benchmark_sides.time, "perf_counter", lambda: ends[clock.done - 1])
    for _ in ends:
        clock.step(torch.tensor(1.0))
    assert clock.figures(batch_size=6)["seconds_per_step"] == pytest.approx(2.0)


@pytest.mark.parametrize(("steps", "loss", "message"), [(2, 1.0, "after 2 of 3"), (3, float("nan"), "became nan")])
def test_a_run_that_did_not_train_gives_no_figures(steps: int, loss: float, message: str) -> None:
    clock = benchmark_sides.StepClock(torch.device("cpu"), warmup=1, steps=2)
    for _ in range(steps):
        clock.step(torch.tensor(loss))
    with pytest.raises(ValueError, match=message):
        clock.figures(batch_size=1)


@pytest.mark.slow
def test_the_program_times_both_sides_on_a_tiny_model(tmp_path: Path) -> None:
    words = ["--config", str(TINY), "--size", "32", "--batch_size", "2", "--precision", "32-true", "--device", "cpu"]
    words += ["--steps", "1", "--warmup", "1", "--rounds", "1", "--peer", "diffusers", "--out", str(tmp_path / "out")]
    command = [sys.executable, str(benchmark.ROOT / "scripts" / "benchmark.py"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=benchmark.ROOT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    assert [row["side"] for row in report["rows"]] == ["ours", "diffusers"]
    assert all(row["images_per_second"] > 0 and row["peak_gib"] > 0 for row in report["rows"])
    assert report["rows"][0]["parameters"] == report["rows"][1]["parameters"]
    assert "ours to diffusers, synthetic pictures:" in ended.stdout.splitlines()[-1]
