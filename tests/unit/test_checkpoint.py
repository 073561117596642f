from __future__ import annotations

import os
import pickle
import re
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from ldm.checkpoint import (
    SCHEDULE_TABLES,
    load_weights,
    read_checkpoint,
    read_weights,
    verify_checkpoint,
    without_wrapper_prefixes,
)


class Model(nn.Module):
    """Two layers, one schedule table."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.model = nn.Linear(width, 2)
        self.first_stage_model = nn.Linear(2, 2)
        self.register_buffer("alphas_cumprod", torch.linspace(0.99, 0.1, 10))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def other() -> dict[str, torch.Tensor]:
    """Weights that differ from a new model's."""
    return weights_of(Model())


@pytest.mark.parametrize("kind", ["lightning", "bare", "safetensors"])
def test_every_kind_of_file_gives_its_weights(tmp_path, other, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.ckpt")
    if kind == "safetensors":
        safetensors.torch.save_file(other, path)
    else:
        torch.save({"state_dict": other, "global_step": 5} if kind == "lightning" else other, path)
    assert all(torch.equal(value, other[key]) for key, value in read_weights(path).items())


def test_lightnings_other_entries_are_read_too(tmp_path, other):
    torch.save({"state_dict": other, "global_step": 5}, tmp_path / "w.ckpt")
    assert read_checkpoint(tmp_path / "w.ckpt")["global_step"] == 5


def test_the_old_unzipped_format_is_read(tmp_path, other):
    torch.save({"state_dict": other}, tmp_path / "w.ckpt", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "w.ckpt").keys() == other.keys()


def test_callback_classes_of_old_lightning_files_are_read_as_nothing(tmp_path, other, monkeypatch):
    name = "pytorch_lightning.callbacks.of_2022"
    module = types.ModuleType(name)
    exec("class ModelCheckpoint: pass", module.__dict__)
    module.ModelCheckpoint.__module__ = name
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": other, "callbacks": {module.ModelCheckpoint: {"best": 1}}}, tmp_path / "w.ckpt")
    content = read_checkpoint(tmp_path / "w.ckpt")
    assert list(content["callbacks"].values()) == [{"best": 1}]


class Malicious:
    """Runs a command when it is unpickled by an unsafe reader."""

    def __reduce__(self):
        return os.system, ("touch should_not_exist",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_holds_code_is_refused_and_runs_none(tmp_path, other, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": other, "x": Malicious()}, "w.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"w\.ckpt' was refused.*system.*safetensors"):
        read_checkpoint("w.ckpt")
    assert not (tmp_path / "should_not_exist").exists()


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_truncated_file_is_called_damaged(tmp_path, other, suffix):
    path = tmp_path / f"w.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": other}, path)
    else:
        safetensors.torch.save_file(other, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, this is no checkpoint", b"rubbish\n", b"model:\n  target: x\n", b"<html>", pickle.dumps([1, 2])],
)
def test_a_file_that_is_no_checkpoint_says_so(tmp_path, content):
    path = tmp_path / "w.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.ckpt' (is damaged|holds a list)"):
        read_checkpoint(path)


def test_a_flipped_bit_is_told_with_the_name_of_its_tensor(tmp_path, other):
    path = tmp_path / "w.ckpt"
    moments = torch.rand(50)
    torch.save({"state_dict": other, "optimizer_states": [{"state": {7: {"exp_avg": moments}}}]}, path)
    for name, tensor in (("optimizer_states.0.state.7.exp_avg", moments), *other.items()):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[whole.index(tensor.numpy().tobytes())] ^= 64
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"w\.ckpt' is damaged at tensor {re.escape(name)}: .*older checkpoint"):
            read_checkpoint(path)
        path.write_bytes(whole)


def test_whichever_byte_is_wrong_the_file_is_refused_or_its_content_is_right(tmp_path, other):
    path = tmp_path / "w.ckpt"
    torch.save({"state_dict": other, "global_step": 5}, path)
    whole = path.read_bytes()
    refusals = []
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert content["global_step"] == 5
            assert all(torch.equal(content["state_dict"][key], value) for key, value in other.items())
    assert len(refusals) > 50
    assert all("w.ckpt" in line and "\n" not in line for line in refusals)


def test_a_file_written_without_checksums_is_read(tmp_path, other):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": other}, tmp_path / "w.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not verify_checkpoint(tmp_path / "w.ckpt")
    assert read_weights(tmp_path / "w.ckpt").keys() == other.keys()


def test_a_file_of_the_old_unzipped_format_is_read(tmp_path, other):
    torch.save({"state_dict": other}, tmp_path / "w.ckpt", _use_new_zipfile_serialization=False)
    assert not verify_checkpoint(tmp_path / "w.ckpt")
    assert read_weights(tmp_path / "w.ckpt").keys() == other.keys()


def test_a_file_that_is_cut_short_says_that_its_end_is_missing(tmp_path, other):
    torch.save({"state_dict": other}, tmp_path / "w.ckpt")
    (tmp_path / "w.ckpt").write_bytes((tmp_path / "w.ckpt").read_bytes()[:-30])
    with pytest.raises(ValueError, match="its end is missing"):
        read_checkpoint(tmp_path / "w.ckpt")


def test_numbers_of_numpy_among_the_schedulers_are_read_as_nothing(tmp_path, other):
    states = [{"_last_lr": [np.float64(1e-4)]}]
    torch.save({"state_dict": other, "lr_schedulers": states}, tmp_path / "w.ckpt")
    assert read_weights(tmp_path / "w.ckpt").keys() == other.keys()


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(OSError, match="does not exist"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(OSError, match="is a folder"):
        read_checkpoint(tmp_path)


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match="no state_dict of weights"):
        read_checkpoint(tmp_path / "w.ckpt")


def test_fitting_weights_are_loaded_all(other):
    model = Model()
    report = load_weights(model, other, source="f")
    assert report.loaded == 4
    assert report.notes == []
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


def test_half_precision_weights_are_converted_and_reported(other):
    model = Model()
    report = load_weights(model, {key: value.half() for key, value in other.items()}, source="f")
    assert model.model.weight.dtype == torch.float32
    assert any("float16" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.bias"), r"1 of the model's 4 keys are missing \(model\.bias\)"),
        (lambda weights: weights.update({"stranger": torch.ones(1)}), r"1 keys are unexpected \(stranger\)"),
        (lambda weights: weights.update({"model.bias": torch.ones(3)}), r"1 shapes differ \(model\.bias is \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed(other, change, message):
    model = Model()
    before = weights_of(model)
    change(other)
    with pytest.raises(ValueError, match=message):
        load_weights(model, other, source="f")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "cause"),
    [
        ("down_blocks.0.weight", "diffusers"),
        ("lora_unet_x.weight", "LoRA"),
        ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
        ("conditioner.embedders.0.weight", "SDXL"),
        ("encoder.conv_in.weight", "VAE alone"),
    ],
)
def test_the_likely_cause_of_a_misfit_is_named(other, key, cause):
    with pytest.raises(ValueError, match=cause):
        load_weights(Model(), other | {key: torch.ones(1)}, source="f")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_by_name(other, value):
    other["model.weight"][0, 0] = value
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 tensors \(model\.weight\)"):
        load_weights(Model(), other, source="f")


@pytest.mark.parametrize(
    "key",
    [
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "model_ema.modelweight",
        "first_stage_model.loss.logvar",
    ],
)
def test_tolerated_keys_are_passed_over_and_reported(other, key):
    report = load_weights(Model(), other | {key: torch.ones(1)}, source="f")
    assert len(report.notes) == 1
    assert key in report.notes[0]


def test_schedule_tables_may_be_missing(other):
    del other["alphas_cumprod"]
    assert load_weights(Model(), other, source="f").loaded == 4


def test_rounded_schedule_tables_never_replace_the_exact_ones(other):
    model = Model()
    exact = model.alphas_cumprod.clone()
    report = load_weights(model, other | {"alphas_cumprod": exact.half()}, source="f")
    assert torch.equal(model.alphas_cumprod, exact)
    assert any("schedule" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_real_schedule_is_recognised_in_half_precision(dtype):
    from ldm.models.diffusion.noise_schedule import build_noise_schedule

    model = Model()
    model.alphas_cumprod = build_noise_schedule(linear_start=0.00085, linear_end=0.012).tensors()["alphas_cumprod"]
    stored = {key: value.to(dtype) for key, value in weights_of(model).items()}
    assert load_weights(model, stored, source="f").loaded == 4


def test_weights_of_another_noise_schedule_are_refused(other):
    other["alphas_cumprod"] = torch.linspace(0.9, 0.2, 10)
    with pytest.raises(ValueError, match="another noise schedule"):
        load_weights(Model(), other, source="f")


def test_moving_averages_that_the_file_lacks_start_from_its_weights(other):
    model = Model()
    model.model_ema = nn.Module()
    model.model_ema.register_buffer("weight", torch.zeros(2, 3))
    model.model_ema.register_buffer("bias", torch.zeros(2))
    report = load_weights(model, other, source="f")
    assert torch.equal(model.model_ema.weight, other["model.weight"])
    assert any("moving averages" in note for note in report.notes)


def test_names_of_compiled_and_parallel_wrappers_are_removed():
    wrapped = {"module.model._orig_mod.weight": 1, "model._orig_mod.bias": 2, "betas": 3}
    assert without_wrapper_prefixes(wrapped) == {"model.weight": 1, "model.bias": 2, "betas": 3}


def test_the_twelve_schedule_tables_are_named():
    assert len(set(SCHEDULE_TABLES)) == 12


@pytest.mark.parametrize("key", [(64, 96), ((1, "a"), None), b"name", True, 1.5, None, torch.float32])
def test_what_callbacks_of_ones_own_keep_may_have_any_plain_key(tmp_path, key):
    kept = {"callbacks": {"Mine": {"seen": {key: 3}}}, "state_dict": {"layer.weight": torch.ones(2)}}
    torch.save(kept, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["callbacks"] == kept["callbacks"]
