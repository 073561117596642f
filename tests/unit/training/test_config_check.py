from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import nn

from ldm.training.cli import parse_options
from ldm.training.config import load_run_config
from ldm.training.targets import accepted_parameters, resolve_target
from tests.unit.training import dummy_targets
from tests.unit.training.test_config import CONFIG, DUMMY

Check = Callable[..., list[str]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Give the problems of the dummy config with overrides, without their `override: ` in front."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(CONFIG, encoding="utf-8")
    Path("pictures").mkdir()

    def problems(*words: str) -> list[str]:
        try:
            load_run_config(parse_options(["--base", "a.yaml", "-t", "--data_root", "pictures", *words]))
        except ValueError as error:
            return [line.removeprefix("override: ") for line in str(error).splitlines()]
        return []

    return problems


def test_a_right_config_has_no_problems(check: Check) -> None:
    assert check() == []


def test_a_typo_in_a_boolean_names_file_key_value_and_type(check: Check) -> None:
    Path("b.yaml").write_text("data:\n  params:\n    wrap: flase\n", encoding="utf-8")
    assert check("-b", "b.yaml") == [
        "b.yaml:3: data.params.wrap: expected true or false, got 'flase' (text); did you mean false?"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.params.batch_size=six", "data.params.batch_size: expected a whole number, got 'six' (text)"),
        ("data.params.batch_size=2.0", "data.params.batch_size: expected a whole number, got 2.0 (number); write 2"),
        ("data.params.batch_size='6'", "data.params.batch_size: expected a whole number, got '6' (text); "
         "remove the quotes"),
        ("data.params.batch_size=true", "data.params.batch_size: expected a whole number, got true (true/false)"),
        ("model.base_learning_rate=low", "model.base_learning_rate: expected a number, got 'low' (text)"),
        ("model.params.mode=esp", "model.params.mode: expected one of eps, v, got 'esp' (text); did you mean eps?"),
        (
            "model.params.unet_config.params.depths=3",
            "model.params.unet_config.params.depths: expected a list of whole numbers, got 3 (whole number)",
        ),
        ("lightning.trainer.max_epochs=1e1", "lightning.trainer.max_epochs: expected a whole number or null, "
         "got 10.0 (number); write 10"),
        ("lightning.find_unused_parameters=1", "lightning.find_unused_parameters: expected true or false, "
         "got 1 (whole number)"),
        ("run.scale_lr=1", "run.scale_lr: expected true or false, got 1 (whole number)"),
    ],
)  # fmt: skip
def test_a_wrong_type_says_what_is_expected(check: Check, override: str, message: str) -> None:
    assert check(override) == [message]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.x=1", "modle: the top of a config has no key modle; did you mean model?"),
        ("model.prams.x=1", "model.prams: model has no key prams; did you mean params?"),
        ("model.params.timestep=1", "model.params.timestep: Model has no key timestep; did you mean timesteps?"),
        ("data.params.batch_sizes=1", "data.params.batch_sizes: Data has no key batch_sizes; did you mean batch_size?"),
        (
            "model.params.unet_config.params.dephts=[1]",
            "model.params.unet_config.params.dephts: Part has no key dephts; did you mean depths?",
        ),
        ("lightning.trianer.x=1", "lightning.trianer: lightning has no key trianer; did you mean trainer?"),
        (
            "lightning.trainer.max_epoch=1",
            "lightning.trainer.max_epoch: Lightning's Trainer has no key max_epoch; did you mean max_epochs?",
        ),
        ("run.sed=1", "run.sed: the run section has no key sed; did you mean seed?"),
        (
            "lightning.modelcheckpoint.params.save_topk=1",
            "lightning.modelcheckpoint.params.save_topk: RunCheckpoint has no key save_topk; did you mean save_top_k?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(check: Check, override: str, message: str) -> None:
    assert check(override) == [message]


@pytest.mark.parametrize(
    "override",
    [
        "data.params.train.params.size=500",
        "data.params.train.params.size=0",
        "data.params.train.params.flip_p=1.5",
        "data.params.train.params.flip_p=-0.1",
        "data.params.train.params.conditional_dropout=2",
        "data.params.train.params.repeats=0",
        "data.params.num_workers=-1",
        "data.params.batch_size=0",
        "model.base_learning_rate=0",
        "model.base_learning_rate=-1e-6",
        "model.base_learning_rate=.nan",
        "model.base_learning_rate=.inf",
        "model.params.model_lr=0.0",
        "model.params.timesteps=0",
        "lightning.trainer.accumulate_grad_batches=0",
        "lightning.trainer.max_epochs=0",
        "lightning.trainer.max_steps=-2",
        "lightning.trainer.check_val_every_n_epoch=0",
        "lightning.trainer.gradient_clip_val=-1",
        "lightning.trainer.limit_train_batches=1.5",
        "lightning.modelcheckpoint.params.save_top_k=-2",
        "lightning.modelcheckpoint.params.keep_last_n=-1",
        "run.seed=4294967296",
    ],
)
def test_a_number_out_of_range_is_one_problem(check: Check, override: str) -> None:
    found = check(override)
    assert len(found) == 1
    assert found[0].startswith(override.partition("=")[0])
    assert "is out of range; it must be" in found[0]


@pytest.mark.parametrize(
    "override",
    [
        "data.params.train.params.size=8",
        "data.params.train.params.size=null",
        "data.params.train.params.flip_p=1",
        "data.params.num_workers=0",
        "lightning.trainer.max_epochs=-1",
        "lightning.trainer.max_steps=-1",
        "lightning.trainer.limit_train_batches=1.0",
        "lightning.trainer.precision=16-mixed",
        "lightning.trainer.precision=32",
        "lightning.trainer.check_val_every_n_epoch=null",
    ],
)
def test_a_number_at_the_edge_of_its_range_is_right(check: Check, override: str) -> None:
    assert check(override) == []


def test_a_learning_rate_of_its_own_may_be_zero_for_a_frozen_network(check: Check) -> None:
    words = ("model.params.model_lr=0.0", "model.params.unfreeze_model=false", "model.params.cond_stage_trainable=true")
    assert check(*words) == []


def test_nothing_to_train_is_a_problem(check: Check) -> None:
    assert check("model.params.unfreeze_model=false") == [
        "model.params.unfreeze_model: nothing to train: unfreeze_model and cond_stage_trainable are both false; "
        "set one to true"
    ]


def test_a_missing_learning_rate_is_a_problem(check: Check) -> None:
    assert "model.base_learning_rate: is missing" in check("model.base_learning_rate=null")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"model.target={DUMMY}.Modle", f"has no Modle; did you mean {DUMMY}.Model?"),
        ("model.target=tests.unit.training.dumy_targets.Model", f"did you mean {DUMMY}.Model?"),
        ("model.target=Model", "is not a dotted path"),
        (f"model.target={'x' * 1000}", f"target '{'x' * 200}…' is not a dotted path"),
        (f"model.target={DUMMY}", "is a module; name a class in it"),
        (f"model.target={DUMMY}.NUMBER", "is no class or function (but of type int)"),
        (f"model.target={DUMMY}.Part", "is not a LightningModule, which this section needs"),
        (f"data.target={DUMMY}.Part", "is not a LightningDataModule, which this section needs"),
        (f"data.params.train.target={DUMMY}.Model", "is not a data set"),
        (f"model.params.unet_config.target={DUMMY}.Pictures", "is not a Module, which this section needs"),
        (f"lightning.callbacks.mine.target={DUMMY}.Part", "is not a Callback, which this section needs"),
        (f"lightning.logger.target={DUMMY}.Part", "is not a Logger, which this section needs"),
        ("model.params.unet_config.target=ldm.models.autoencoder.VQModelInterface2", "ldm.models.autoencoder"),
    ],
)
def test_a_wrong_target_says_what_is_wrong(check: Check, override: str, message: str) -> None:
    found = check(override)
    assert found
    assert found[0].startswith(override.partition("=")[0])
    assert message in found[0]


def test_a_target_whose_own_import_fails_hands_the_reason_on(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("broken_module.py").write_text("raise RuntimeError('the license server is away')\n", encoding="utf-8")
    Path("needy_module.py").write_text("import package_that_nobody_has\n", encoding="utf-8")
    found = check("model.target=broken_module.X", "data.target=needy_module.X")
    assert "importing broken_module fails with RuntimeError: the license server is away" in found[0]
    assert "needs the package package_that_nobody_has, which is not installed" in found[1]


def test_a_section_inside_one_with_a_wrong_target_is_checked_too(check: Check) -> None:
    found = check("model.target=Model", "model.params.unet_config.params.dephts=1")
    assert len(found) == 2
    assert "did you mean depths?" in found[1]


def test_sections_in_lists_and_mappings_are_checked(check: Check) -> None:
    found = check(
        f"model.params.extras.inner.part={{target: {DUMMY}.Part, params: {{widht: 3}}}}",
        f"model.params.parts=[{{target: {DUMMY}.Prat}}]",
    )
    assert "model.params.extras.inner.part.params.widht: Part has no key widht; did you mean width?" in found
    assert any("model.params.parts.0.target" in line and f"did you mean {DUMMY}.Part?" in line for line in found)


def test_a_function_is_a_target_too(check: Check) -> None:
    assert check(f"model.params.extras.part={{target: {DUMMY}.build_part, params: {{width: 3}}}}") == []
    assert check(f"model.params.extras.part={{target: {DUMMY}.build_part, params: {{wide: 3}}}}") != []


FOREIGN = (
    *("os.system", "subprocess.call", "subprocess.Popen", "builtins.eval", "builtins.open", "io.FileIO"),
    *("shutil.rmtree", "numpy.memmap", "mailbox.mbox", "torch.hub.load", "torch.jit.load", f"{DUMMY}.build_something"),
)
"""What a config must not be able to call."""


@pytest.mark.parametrize(
    ("section", "kind", "targets"),
    [
        ("data.params.train", "Dataset|data set", FOREIGN),
        ("model.params.unet_config", "Module", FOREIGN),
        ("model", "LightningModule", FOREIGN[:1]),
        ("data", "LightningDataModule", FOREIGN[:1]),
        ("model.params.extras.scheduler_config", "Schedule", FOREIGN[:1]),
        ("lightning.callbacks.mine", "Callback", FOREIGN[:1]),
        ("lightning.logger", "Logger", FOREIGN[:1]),
        ("lightning.modelcheckpoint", "Checkpoint", FOREIGN[:1]),
    ],
)
def test_a_target_that_does_something_else_is_refused_before_it_is_called(
    check: Check, section: str, kind: str, targets: Sequence[str]
) -> None:
    for target in targets:
        found = [line for line in check(f"{section}.target={target}") if line.startswith(f"{section}.target: target")]
        assert len(found) == 1
        reason = rf"{re.escape(target)} is (not a|neither a class|a function that does not say).*({kind})"
        assert re.search(reason, found[0])


def test_a_data_set_of_ones_own_need_not_be_torchs(check: Check) -> None:
    assert not any("target" in line for line in check(f"data.params.train.target={DUMMY}.OwnPictures"))


def test_a_function_that_says_what_it_returns_may_stand_for_a_class(check: Check) -> None:
    assert not any(".target" in line for line in check(f"model.params.unet_config.target={DUMMY}.build_part"))


def test_a_section_without_target_is_recognised_by_its_params(check: Check) -> None:
    found = check("model.params.extras.part={taget: x, params: {}}")
    assert found == ["model.params.extras.part: has params but no target; is taget meant to be target?"]


def test_a_missing_parameter_is_told_with_its_type(check: Check) -> None:
    assert "model.params.unet_config.params.width: is missing; Part needs it (a whole number)" in " ".join(
        check("model.params.unet_config.params=null")
    )


def test_a_data_set_with_open_keywords_takes_any(check: Check) -> None:
    assert check(f"data.params.train={{target: {DUMMY}.SelfContained, params: {{anything: 1}}}}") == []


def test_an_annotation_for_type_checkers_alone_accepts_anything(check: Check) -> None:
    assert check("model.params.unresolvable=abc") == []


def test_a_section_that_is_no_mapping_says_so(check: Check) -> None:
    assert "data.params.train.params: expected keys below it, got 5 (whole number)" in check(
        "data.params.train.params=5"
    )


def test_a_callback_that_is_unknown_needs_a_target(check: Check) -> None:
    assert check("lightning.callbacks.mine.params.x=1") == [
        "lightning.callbacks.mine: has no target; add target: package.module.Name"
    ]


def test_what_the_image_logger_hands_on_is_checked_against_the_model(check: Check) -> None:
    callback = "lightning.callbacks.image_logger.params"
    assert check(f"{callback}.log_images_kwargs.ddim_steps=5") == []
    assert check(f"{callback}.log_images_kwargs.ddim_stepz=5") == [
        f"{callback}.log_images_kwargs.ddim_stepz: log_images has no key ddim_stepz; did you mean ddim_steps?"
    ]


def test_two_checkpoint_rhythms_exclude_each_other(check: Check) -> None:
    section = "lightning.modelcheckpoint.params"
    assert "exclude each other" in check(f"{section}.every_n_epochs=1", f"{section}.every_n_train_steps=5")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lightning.trainer.strategy=dpp", "'dpp' is unknown; did you mean ddp?"),
        ("lightning.trainer.accelerator=gpuu", "'gpuu' is unknown; did you mean gpu?"),
        ("lightning.trainer.max_time=3h", "write days:hours:minutes:seconds"),
        ("lightning.modelcheckpoint.params.train_time_interval=2h", "write days:hours:minutes:seconds"),
        ("lightning.trainer.devices=0", "0 is neither a number of devices"),
        ("lightning.trainer.devices=2.5", "expected"),
        ("lightning.trainer.precision=fp16", "did you mean 16-mixed?"),
        ("lightning.trainer.callbacks=[1]", "callbacks belong under lightning.callbacks"),
        ("lightning.trainer.gradient_clip_algorithm=max", "one of norm, value"),
    ],
)
def test_a_trainer_argument_that_lightning_would_refuse_is_told(check: Check, override: str, message: str) -> None:
    found = check(override)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "64", "transformer-engine-float16"])
def test_a_precision_that_rounds_the_weights_is_refused(check: Check, precision: str) -> None:
    (problem,) = check(f"lightning.trainer.precision={precision}")
    assert all(name in problem for name in (precision, "32-true", "bf16-mixed", "16-mixed"))


def test_a_key_of_another_section_is_sent_there(check: Check) -> None:
    assert check("data.params.train.params.long_captions=chunk") == [
        "data.params.train.params.long_captions: does not belong here; write "
        "model.params.cond_stage_config.params.long_captions=chunk"
    ]


def test_long_captions_are_cut_or_chunked(tmp_path: Path) -> None:
    tiny = Path(__file__).resolve().parents[3] / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"
    command = ["--base", str(tiny), "-t", "--data_root", str(tmp_path)]
    key = "model.params.cond_stage_config.params.long_captions"
    load_run_config(parse_options([*command, f"{key}=chunk"]))
    with pytest.raises(ValueError, match=rf"{key}: expected one of cut, chunk, got 'whole'"):
        load_run_config(parse_options([*command, f"{key}=whole"]))


def test_all_problems_are_told_at_once(check: Check) -> None:
    found = check("data.params.wrap=flase", "data.params.batch_size=0", "run.sed=3", "model.params.timestep=3")
    assert len(found) == 4


def test_keywords_handed_on_are_followed_up_the_classes() -> None:
    accepted = accepted_parameters(dummy_targets.Model)
    assert {"unet_config", "timesteps", "mode"} <= set(accepted.parameters)
    assert not accepted.open


def test_identity_takes_anything() -> None:
    assert accepted_parameters(nn.Identity).open


def test_a_target_of_the_lineage_that_comes_later_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.training.targets.COMES_LATER", {"ldm.models.nowhere.Thing": "a later feature"})
    with pytest.raises(ValueError, match="is not in this version of the trainer: it belongs to a later feature"):
        resolve_target("ldm.models.nowhere.Thing")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("{target: torch.optim.AdamW, params: {betas: [0.9, 0.99]}}", None),
        ("{target: torch.optim.Adam, params: {weight_decays: 1}}", ".params.weight_decays: Adam has no key weight_de"),
        ("{target: torch.optim.AdamW, params: {amsgrad: 1}}", ".params.amsgrad: expected true or false, got 1"),
        ("{target: torch.optim.AdamW, params: {lr: 0}}", ".params.lr: 0 is out of range; it must be above 0"),
        ("{target: torch.optim.AdamW, params: {params: []}}", ".params.params: AdamW has no key params"),
        ("{target: torch.optim.AdamX}", ".target: target torch.optim.AdamX: the module torch.optim has no AdamX; did"),
        ("{target: torch.optim.LBFGS}", ".target: target torch.optim.LBFGS takes no groups of parameters"),
        ("{target: torch.nn.Linear}", ".target: target torch.nn.Linear is not a Optimizer, which this section needs"),
    ],
)
def test_an_optimiser_is_checked_like_every_section(check: Check, params: str, message: str | None) -> None:
    found = check(f"model.params.optimizer_config={params}", "model.target=ldm.models.diffusion.ddpm.DDPM")
    told = [line for line in found if line.startswith("model.params.optimizer_config")]
    assert len(told) == (message is not None)
    assert all(line.startswith(f"model.params.optimizer_config{message}") for line in told)


def test_a_package_of_optimisers_that_is_missing_is_named_as_pip_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ValueError) as refused:
        resolve_target("lion_pytorch.Lion")
    words = "target lion_pytorch.Lion needs the package lion_pytorch; type: pip install lion-pytorch"
    assert str(refused.value) == words
