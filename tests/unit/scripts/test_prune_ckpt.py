"""Pruning a checkpoint: what goes, what stays, and what happens when it cannot be done."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import checkpoint_files
import prune_ckpt
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ldm.checkpoint import load_weights, read_weights
from tests.unit.scripts.small_sd import build, lightning_checkpoint, small_config

LIVE = "model.diffusion_model.out.2.weight"
AVERAGE = "model_ema.diffusion_modelout2weight"
TEXT = "cond_stage_model.transformer.text_model."


def weights(ema: bool = True) -> dict[str, Tensor]:
    own = {
        "betas": torch.linspace(0.00085, 0.012, 1000),
        "scale_factor": torch.tensor(0.18215),
        LIVE: torch.full((4, 3), 1 / 3),
        TEXT + "embeddings.position_ids": torch.arange(77)[None],
        TEXT + "final_layer_norm.weight": torch.linspace(0.9, 1.1, 7),
    }
    averages = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(120, dtype=torch.int32),
        AVERAGE: torch.full((4, 3), 0.75),
    }
    return {**own, **averages} if ema else own


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    torch.save(lightning_checkpoint(weights()), path)
    return path


def plain(tmp_path: Path, content: dict[str, Any] | None = None) -> Path:
    path = tmp_path / "plain.ckpt"
    torch.save(content or lightning_checkpoint(weights(ema=False)), path)
    return path


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def prune(checkpoint: Path, *flags: str) -> dict[str, Any]:
    assert prune_ckpt.main(["--ckpt", str(checkpoint), *flags]) == 0
    return load(checkpoint.with_name("last-pruned.ckpt"))


def refuse(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert prune_ckpt.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_all_but_weights_step_and_epoch_is_dropped(checkpoint: Path) -> None:
    pruned = prune(checkpoint)
    assert set(pruned) == {"state_dict", "global_step", "epoch"}
    assert (pruned["global_step"], pruned["epoch"]) == (120, 3)


def test_weights_are_halved_unless_told_otherwise(checkpoint: Path) -> None:
    pruned = prune(checkpoint)["state_dict"]
    assert torch.equal(pruned[LIVE], weights()[LIVE].half())


def test_tables_integers_and_single_numbers_keep_their_precision(checkpoint: Path) -> None:
    pruned, before = prune(checkpoint)["state_dict"], weights()
    for key in ("betas", "scale_factor", TEXT + "embeddings.position_ids", "model_ema.decay", "model_ema.num_updates"):
        assert pruned[key].dtype == before[key].dtype
        assert torch.equal(pruned[key], before[key])


def test_full_leaves_every_tensor_as_it_is(checkpoint: Path) -> None:
    pruned, before = prune(checkpoint, "--full")["state_dict"], weights()
    assert set(pruned) == set(before)
    assert all(torch.equal(pruned[key], before[key]) and pruned[key].dtype == before[key].dtype for key in before)


def test_half_and_full_exclude_each_other(checkpoint: Path) -> None:
    with pytest.raises(SystemExit):
        prune_ckpt.main(["--ckpt", str(checkpoint), "--half", "--full"])


def test_moving_averages_stay_by_default_and_are_mentioned(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert AVERAGE in prune(checkpoint)["state_dict"]
    assert "--ema bake" in capsys.readouterr().out


def test_baking_puts_each_average_in_its_weights_place(checkpoint: Path) -> None:
    pruned = prune(checkpoint, "--ema", "bake")["state_dict"]
    assert torch.equal(pruned[LIVE], torch.full((4, 3), 0.75).half())
    assert not [key for key in pruned if key.startswith("model_ema.")]


def test_dropping_averages_leaves_the_weights(checkpoint: Path) -> None:
    pruned = prune(checkpoint, "--ema", "drop", "--full")["state_dict"]
    assert set(pruned) == set(weights(ema=False))
    assert torch.equal(pruned[LIVE], weights()[LIVE])


@pytest.mark.parametrize("choice", ["keep", "bake"])
def test_averages_that_are_not_there_cannot_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], choice: str
) -> None:
    line = refuse(capsys, "--ckpt", plain(tmp_path), "--ema", choice)
    assert "holds no moving averages" in line
    assert [path.name for path in tmp_path.iterdir()] == ["plain.ckpt"]


def test_an_average_without_its_weight_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = weights()
    del own[LIVE]
    assert AVERAGE in refuse(capsys, "--ckpt", plain(tmp_path, {"state_dict": own}), "--ema", "bake")


def test_a_first_stages_own_averages_are_baked_too(tmp_path: Path) -> None:
    own = {"encoder.conv_in.weight": torch.zeros(2), "model_ema.encoderconv_inweight": torch.ones(2)}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": own}, path)
    assert torch.equal(prune(path, "--ema", "bake")["state_dict"]["encoder.conv_in.weight"], torch.ones(2).half())


def test_the_sizes_before_and_after_are_told(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(checkpoint)
    after = checkpoint.with_name("last-pruned.ckpt").stat().st_size
    assert after < checkpoint.stat().st_size / 2
    line = capsys.readouterr().out.splitlines()[0]
    assert f"{checkpoint.stat().st_size:,} bytes before" in line
    assert f"{after:,} bytes after" in line


def test_a_safetensors_file_keeps_step_and_epoch_as_metadata(checkpoint: Path, tmp_path: Path) -> None:
    prune_ckpt.main(["--ckpt", str(checkpoint), "--format", "safetensors"])
    out = tmp_path / "last-pruned.safetensors"
    with safetensors.safe_open(out, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "global_step": "120", "epoch": "3"}
    assert safetensors.torch.load_file(out)[LIVE].dtype == torch.float16


def test_step_and_epoch_survive_the_way_through_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    prune_ckpt.main(["--ckpt", str(checkpoint), "--full", "--out", str(tmp_path / "a.safetensors")])
    prune_ckpt.main(["--ckpt", str(tmp_path / "a.safetensors"), "--full", "--out", str(tmp_path / "b.ckpt")])
    content = load(tmp_path / "b.ckpt")
    assert (content["global_step"], content["epoch"]) == (120, 3)


def test_an_output_whose_name_contradicts_the_format_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.ckpt"
    assert "contradict" in refuse(capsys, "--ckpt", checkpoint, "--out", out, "--format", "safetensors")


def test_the_input_is_never_overwritten(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checkpoint.read_bytes()
    line = refuse(capsys, "--ckpt", checkpoint, "--out", checkpoint, "--overwrite")
    assert "is the input" in line
    assert checkpoint.read_bytes() == before


def test_an_existing_output_is_replaced_only_on_demand(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.ckpt"
    out.write_bytes(b"precious")
    assert "--overwrite" in refuse(capsys, "--ckpt", checkpoint, "--out", out)
    assert out.read_bytes() == b"precious"
    assert prune_ckpt.main(["--ckpt", str(checkpoint), "--out", str(out), "--overwrite"]) == 0
    assert LIVE in load(out)["state_dict"]


def test_a_weight_beyond_half_precision_asks_for_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {**weights(ema=False), LIVE: torch.full((4, 3), 1e5)}
    assert "--full" in refuse(capsys, "--ckpt", plain(tmp_path, {"state_dict": own}))


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {**weights(ema=False), LIVE: torch.full((4, 3), float("nan"))}
    assert "NaN" in refuse(capsys, "--ckpt", plain(tmp_path, {"state_dict": own}))


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {LIVE: torch.zeros(1_000_000)[:4]}}, path)
    prune(path, "--full")
    assert path.with_name("last-pruned.ckpt").stat().st_size < 10_000


def full_disk(path: Path, *_: object) -> None:
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_as_torch_tells_it(path: Path, *_: object) -> None:
    path.write_bytes(b"half of it")
    raise RuntimeError("unexpected pos 2831424 vs 2831312\nException raised from valid at inline_container.cc:671")


def full_disk_as_safetensors_tells_it(path: Path, *_: object) -> None:
    path.write_bytes(b"half of it")
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fail", [full_disk, full_disk_as_torch_tells_it, full_disk_as_safetensors_tells_it])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    monkeypatch.setattr(checkpoint_files, "write_file", fail)
    line = refuse(capsys, "--ckpt", checkpoint)
    assert "could not write" in line
    assert "GB are free" in line
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_a_file_that_does_not_read_back_the_same_is_not_kept(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_files.write_file

    def write_wrongly(path: Path, own: dict[str, Tensor], *rest: Any) -> None:
        write(path, {**own, LIVE: own[LIVE] * 2}, *rest)

    monkeypatch.setattr(checkpoint_files, "write_file", write_wrongly)
    assert "does not read back" in refuse(capsys, "--ckpt", checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_a_missing_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refuse(capsys, "--ckpt", tmp_path / "gone.ckpt")


@pytest.mark.parametrize("ema", ["keep", "bake", "drop"])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_what_is_pruned_starts_a_new_run(tmp_path: Path, ema: str, ending: str) -> None:
    config = small_config()
    config["model"]["params"]["use_ema"] = True
    trained = build(config)
    source, out = tmp_path / "last.ckpt", tmp_path / f"out.{ending}"
    torch.save(lightning_checkpoint(trained.state_dict()), source)
    assert prune_ckpt.main(["--ckpt", str(source), "--out", str(out), "--ema", ema, "--full"]) == 0
    report = load_weights(trained, read_weights(out), source=str(out))
    assert report.loaded > 200
