"""A run that mixes a folder with shards, from the shipped overlay."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ldm.training.run import main
from tests.conftest import ROOT
from tests.end_to_end.conftest import SMALL, TINY
from tests.unit.data.make_shards import write_shards

OVERLAY = ROOT / "configs" / "stable-diffusion" / "overlays" / "mix_shards.yaml"
LAION = "data.params.train.params.sets.laion.params"


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "exposure.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_mixed_run_shows_both_sets_at_the_ratio_also_where_it_is_resumed(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "laion", [2, 3], sizes=((48, 48), (96, 48)))
    command = [
        *("--base", str(TINY), str(OVERLAY), "-t", "--no-test", "-n", "mixed", "-l", str(tmp_path / "logs")),
        *("--actual_resume", str(workplace / "tiny.ckpt"), "--data_root", str(workplace / "MyProject")),
        *SMALL,
        f"{LAION}.shards={tmp_path / 'laion'}",
        f"{LAION}.shard_cache_dir={tmp_path / 'cache'}",
        "data.params.train.params.resize_mode=bucket",
        "data.params.train.params.repeats=1",
        "data.params.train.params.ratio=man 1 : laion 2",
        "lightning.trainer.limit_val_batches=0",
    ]
    assert main([*command, "--max_steps", "3"]) == 0
    assert "training set: an epoch mixes 4 exposures of man (EveryDreamBatch) and 8" in capsys.readouterr().out
    (run,) = (tmp_path / "logs").iterdir()
    assert main(["-t", "-r", str(run), "--max_steps=-1", "--max_epochs", "2"]) == 0

    shown = Counter(entry["path"] for entry in ledger(run))
    from_folder = {path: times for path, times in shown.items() if ".tar/" not in path}
    from_shards = {path: times for path, times in shown.items() if ".tar/" in path}
    assert list(from_folder.values()) == [2, 2, 2, 2]
    assert sorted(from_shards.values()) == [3, 3, 3, 3, 4]
    assert {tuple(entry["size"]) for entry in ledger(run)} == {(32, 32), (40, 24)}
