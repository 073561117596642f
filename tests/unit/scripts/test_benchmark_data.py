from __future__ import annotations

import json
import os
from pathlib import Path

import benchmark_data
import pytest
from benchmark_data import ENTROPY, PIPELINE, Rate
from PIL import Image


@pytest.mark.parametrize(
    ("text", "cores", "counts"), [(None, 6, [1, 2, 4, 6]), (None, 8, [1, 2, 4, 8]), ("8, 1,8", 2, [1, 8])]
)
def test_worker_counts_rise_to_all_cores_unless_they_are_named(text: str | None, cores: int, counts: list[int]) -> None:
    assert benchmark_data.worker_counts(text, cores) == counts


@pytest.mark.parametrize("text", ["0", "two", "1,,2"])
def test_a_wrong_list_of_worker_counts_is_an_error_that_shows_one(text: str) -> None:
    with pytest.raises(ValueError, match="such as 1,2,4"):
        benchmark_data.worker_counts(text, 2)


def test_a_target_in_reach_names_the_fewest_workers() -> None:
    core = Rate(PIPELINE, 0, 200.0)
    rates = [core, Rate(PIPELINE, 1, 80.0), Rate(PIPELINE, 2, 160.0), Rate(ENTROPY, 1, 90)]
    lines = benchmark_data.format_report(rates, 150)
    assert lines[-1] == "150 images/s are reached with 2 workers"
    assert lines[1].split() == ["a", "core,", "at", "most", "200.0"]
    assert lines[3].split() == ["2", "workers", "160.0", "80.0"]


def test_a_target_out_of_reach_names_the_cores_that_it_takes() -> None:
    lines = benchmark_data.format_report([Rate(PIPELINE, 1, 20.0), Rate(PIPELINE, 2, 30.0)], 150)
    assert lines[-1].endswith("30.0 with 2 workers; at 20.0 a worker they take 8 cores like these")


def test_a_synthetic_photograph_is_a_jpeg_of_the_asked_size_that_differs_from_the_next(tmp_path: Path) -> None:
    first, second = benchmark_data.make_photographs(tmp_path, 2, 0.12)
    assert Image.open(first).size == (400, 300)
    assert Path(first).read_bytes() != Path(second).read_bytes()
    assert 0.1 < os.path.getsize(first) / 120_000 < 0.6  # bytes a pixel, as photographs have


def test_every_kind_of_work_is_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--images",
        "2",
        "--megapixels",
        "0.2",
        "--size",
        "64",
        "--batch_size",
        "2",
        "--workers",
        "1",
        "--seconds",
        "0.01",
    ]
    assert benchmark_data.main([*options, "--out", str(tmp_path / "rates.json")]) == 0
    rates = json.loads((tmp_path / "rates.json").read_text())
    kinds = ["training", "reduced decode", "whole decode", "entropy coding"]
    assert [(rate["work"], rate["workers"]) for rate in rates] == [(kind, n) for n in (0, 1) for kind in kinds]
    assert all(rate["images_per_second"] > 0 for rate in rates)
    assert "training/worker" in capsys.readouterr().out


def test_a_folder_without_pictures_is_an_error_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark_data.main(["--data_root", str(tmp_path)]) == 1
    assert "holds no pictures" in capsys.readouterr().err
