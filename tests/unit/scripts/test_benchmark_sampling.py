"""The sampling benchmark measures both sides, and says how they stand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import benchmark_sampling
import pytest
import torch

TINY = benchmark_sampling.ROOT / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"
SMALL = ["--config", str(TINY), "--size", "32", "--steps", "2", "--runs", "2", "--batch_size", "2", "--device", "cpu"]


def parse(*words: str) -> argparse.Namespace:
    return benchmark_sampling.build_parser().parse_args([*SMALL, *words])


def figures(sampling: float, decoding: float = 1.0, peak_gib: float = 1.0) -> dict[str, Any]:
    seconds = {"sampling": [sampling] * 2, "decoding": [decoding] * 2}
    return {"seconds": seconds, "peak_bytes": peak_gib * benchmark_sampling.GIB, "device": "CPU", "torch": "2"}


@pytest.mark.parametrize("side", [benchmark_sampling.OURS, benchmark_sampling.DIFFUSERS])
@pytest.mark.parametrize("precision", ["bf16", "full"])
def test_a_side_is_measured(side: str, precision: str) -> None:
    measured = benchmark_sampling.measure_here(parse("--measure", side, "--precision", precision))
    for stage in ("sampling", "decoding"):
        assert len(measured["seconds"][stage]) == 2
        assert min(measured["seconds"][stage]) > 0


def test_both_sides_sample_latents_and_decode_pictures_of_one_size() -> None:
    options = parse("--precision", "full")
    from sampling_common import read_model_config

    section = read_model_config(options.config)
    sizes = []
    with torch.no_grad():
        for build in (benchmark_sampling.build_ours, benchmark_sampling.build_diffusers):
            sample, decode = build(options, section, torch.device("cpu"))
            latents = sample()
            sizes.append((tuple(latents.shape), [picture.shape for picture in decode(latents)]))
    assert sizes == [((2, 4, 8, 8), [(32, 32, 3)] * 2)] * 2


def test_sides_take_turns_and_the_comparison_stands_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measure(side: str, arguments: Any) -> dict[str, Any]:
        asked.append(side)
        return figures(1.0 if side == benchmark_sampling.OURS else 3.0)

    monkeypatch.setattr(benchmark_sampling, "measure_apart", measure)
    assert benchmark_sampling.main([*SMALL, "--rounds", "2"]) == 0
    assert asked == ["ours", "diffusers", "ours", "diffusers"]
    assert capsys.readouterr().out.splitlines()[-1] == "ours to diffusers: 2.00 x the speed, 1.00 x the memory"


def test_a_row_has_the_median_times_and_the_largest_memory() -> None:
    rounds = [figures(1.0, peak_gib=2.0), figures(2.0, peak_gib=3.0), figures(7.0)]
    row = benchmark_sampling.summarise("ours", rounds, parse())
    assert (row["sampling"], row["seconds_per_batch"], row["peak_gib"]) == (2.0, 3.0, 3.0)
    assert row["images_per_second"] == pytest.approx(2 / 3)
    assert row["steps_per_second"] == pytest.approx(1.0)


def test_a_side_that_failed_once_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_sampling, "measure_apart", lambda *_: {"failed": "no such card"})
    assert benchmark_sampling.main(SMALL) == 1
    assert "ours failed: no such card" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "100"), "--size 100 is not allowed; give a multiple of 8"),
        (("--steps", "0"), "--steps 0 is not allowed"),
        (("--config", "no_such.yaml"), "no_such.yaml: no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark_sampling.main(list(words))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_without_a_model_is_a_failure_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("data: {}\n", encoding="utf-8")
    options = parse("--measure", "ours", "--config", str(tmp_path / "empty.yaml"))
    assert "empty.yaml" in benchmark_sampling.measure_here(options)["failed"]
