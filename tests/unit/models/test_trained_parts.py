"""What is trained, at which rate and for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from tests.unit.models.small import build_text_model, picture_batch, text_config

BATCHES = [picture_batch() for _ in range(6)]


def encoder_config(layers: int = 3, **params: Any) -> dict[str, Any]:
    config = text_config()
    config["params"]["text_config"]["num_hidden_layers"] = layers
    config["params"] |= params
    return config


def build(**params: Any) -> LatentDiffusion:
    model = build_text_model(**params)
    model.learning_rate = 1e-3
    return model


def copies(part: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in part.parameters()]


class Snapshots(pl.Callback):
    """Copies of the encoder and of the network, and of their optimiser state, before each optimiser step."""

    def __init__(self) -> None:
        self.encoder: dict[int, list[Tensor]] = {}
        self.network: dict[int, list[Tensor]] = {}
        self.moments: dict[int, list[Tensor]] = {}
        self.has_gradients: dict[int, tuple[bool, bool]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.look(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.has_gradients[trainer.global_step] = tuple(  # type: ignore[assignment]
            any(parameter.grad is not None for parameter in part.parameters())
            for part in (pl_module.model, pl_module.cond_stage_model)
        )

    def look(self, trainer: Any, pl_module: Any) -> None:
        step = trainer.global_step
        self.encoder[step], self.network[step] = copies(pl_module.cond_stage_model), copies(pl_module.model)
        state = trainer.optimizers[0].state
        self.moments[step] = [
            state[parameter]["exp_avg"].clone()
            for parameter in pl_module.cond_stage_model.parameters()
            if parameter in state
        ]


def fit(
    model: LatentDiffusion, folder: Path, steps: int, resume: Path | None = None, **arguments: Any
) -> tuple[Snapshots, pl.Trainer]:
    watch = Snapshots()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[watch],
        **arguments,
    )
    trainer.fit(model, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=resume, weights_only=True)
    return watch, trainer


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_cond_lr_gives_the_text_encoder_a_group_of_its_own() -> None:
    model = build(cond_lr=1e-6)
    groups = model.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-6]
    assert list(map(id, groups[1]["params"])) == list(map(id, model.cond_stage_model.parameters()))  # type: ignore[union-attr]


def test_each_part_has_its_rate_and_what_has_none_the_base_rate() -> None:
    model = build(model_lr=1e-5, cond_lr=1e-6, learn_logvar=True)
    assert [group["lr"] for group in model.configure_optimizers().param_groups] == [1e-5, 1e-6, 1e-3]


@pytest.mark.parametrize("rates", [{"model_lr": 1e-5}, {"cond_lr": 1e-6}, {"model_lr": 1e-5, "cond_lr": 1e-6}])
def test_the_order_of_all_parameters_does_not_depend_on_the_rates(rates: dict[str, float]) -> None:
    model = build(learn_logvar=True)
    (whole,) = model.parameter_groups()
    model.model_lr, model.cond_lr = rates.get("model_lr"), rates.get("cond_lr")
    apart = [parameter for group in model.parameter_groups() for parameter in group["params"]]
    assert list(map(id, apart)) == list(map(id, whole["params"]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_encoder_that_has_had_its_steps_changes_no_more(tmp_path: Path, accumulate: int) -> None:
    watch, trainer = fit(build(cond_stop_after=2), tmp_path, 4, accumulate_grad_batches=accumulate)
    assert trainer.global_step == 4
    assert not same(watch.encoder[1], watch.encoder[2])
    assert same(watch.encoder[2], watch.encoder[4])
    assert same(watch.moments[2], watch.moments[4])
    assert not same(watch.network[3], watch.network[4])
    assert watch.has_gradients == {0: (True, True), 1: (True, True), 2: (True, False), 3: (True, False)}


def test_a_stopped_encoder_is_encoded_with_no_graph(tmp_path: Path) -> None:
    model = build(cond_stop_after=1)
    fit(model, tmp_path, 2)
    assert not model.get_learned_conditioning(["a cat"]).requires_grad
    assert model.training
    assert not model.cond_stage_model.training  # type: ignore[union-attr]


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_network_that_has_had_its_steps_lets_the_encoder_go_on(tmp_path: Path, use_checkpoint: bool) -> None:
    model = build(model_stop_after=1, unet={"use_checkpoint": use_checkpoint})
    watch, _ = fit(model, tmp_path, 3)
    assert same(watch.network[1], watch.network[3])
    assert not same(watch.encoder[2], watch.encoder[3])
    assert watch.has_gradients[2] == (False, True)


@pytest.mark.parametrize("saved_at", [1, 2, 3])
def test_a_run_resumed_around_the_stop_equals_the_unbroken_one(tmp_path: Path, saved_at: int) -> None:
    settings = {"cond_stop_after": 2, "cond_lr": 1e-4, "use_ema": True}
    unbroken = build(**settings)
    fit(unbroken, tmp_path, 4)
    _, trainer = fit(build(**settings), tmp_path, saved_at)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = build(**settings)
    fit(resumed, tmp_path, 4, resume=tmp_path / "saved.ckpt")
    expected = unbroken.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())


def test_batches_taken_in_parts_stop_the_encoder_as_whole_ones_do(tmp_path: Path) -> None:
    model = build(cond_stop_after=1)
    model.take_in_parts({"training": 1}, lambda *said: None)
    watch, _ = fit(model, tmp_path, 3)
    assert same(watch.encoder[1], watch.encoder[3])
    assert not same(watch.encoder[0], watch.encoder[1])


def trained_names(encoder: nn.Module) -> set[str]:
    names = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    return {".".join(name.split(".")[2:5] if ".layers." in name else name.split(".")[2:3]) for name in names}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"encoder.layers.1", "encoder.layers.2", "final_layer_norm"}),
        ({"clip_skip": 1}, {"encoder.layers.0", "encoder.layers.1", "final_layer_norm"}),
        ({"layer": "hidden", "layer_idx": 2}, {"encoder.layers.0", "encoder.layers.1"}),
        ({"layer": "hidden", "layer_idx": -1}, {"encoder.layers.1", "encoder.layers.2"}),
    ],
)
def test_only_the_last_layers_that_are_used_are_trained(settings: dict[str, Any], expected: set[str]) -> None:
    model = build(cond_stage_config=encoder_config(**settings), cond_train_last_layers=2)
    assert trained_names(model.cond_stage_model) == expected  # type: ignore[arg-type]
    batch = picture_batch()
    model.shared_step(batch, batch["exposure"])[0].backward()
    for parameter in model.cond_stage_model.parameters():  # type: ignore[union-attr]
        assert (parameter.grad is not None) == parameter.requires_grad


def test_the_embeddings_can_be_left_as_they_are() -> None:
    model = build(cond_train_embeddings=False)
    assert trained_names(model.cond_stage_model) == {"encoder.layers.0", "final_layer_norm"}  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 4])
def test_more_layers_than_the_encoder_uses_are_an_error(count: int) -> None:
    encoder = FrozenCLIPEmbedder(**encoder_config(layers=4, clip_skip=1)["params"])
    with pytest.raises(ValueError, match=f"is {count}; it must lie within 1 and 3"):
        encoder.train_last_layers(count)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cond_stage_trainable": False, "cond_lr": 1e-6}, "cond_lr has no effect"),
        ({"cond_stage_trainable": False, "cond_stop_after": 5}, "cond_stop_after has no effect"),
        ({"cond_stage_config": encoder_config(freeze=True), "cond_train_last_layers": 1}, "has no effect"),
        ({"unfreeze_model": False, "model_stop_after": 5}, "model_stop_after has no effect"),
        ({"unfreeze_model": False, "cond_stop_after": 5}, "cond_stop_after: 5 would leave nothing to train"),
        ({"model_stop_after": 9, "cond_stop_after": 5}, "model_stop_after: 9 would leave nothing to train"),
        ({"cond_stage_trainable": False, "model_stop_after": 9}, "would leave nothing to train"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(**params)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("params", [{"cond_stop_after": 2}, {"use_ema": True, "ema_device": "cpu"}])
def test_what_cannot_be_sharded_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--strategy fsdp takes neither"):
        build(**params).shared_blocks()


def test_gradients_are_clipped_over_all_groups_together(tmp_path: Path) -> None:
    model = build(cond_lr=1e-6)
    norms: list[list[float]] = []
    clip = model.configure_gradient_clipping

    def total_norm() -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))

    def measured(*arguments: Any, **keywords: Any) -> None:
        before = total_norm()
        clip(*arguments, **keywords)
        norms.append([before, total_norm()])

    model.configure_gradient_clipping = measured  # type: ignore[method-assign]
    fit(model, tmp_path, 2, gradient_clip_val=1e-3)
    assert [before > 1e-2 for before, _ in norms] == [True, True]
    assert [after for _, after in norms] == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_rates_keep_their_ratio_under_a_schedule() -> None:
    config = {"target": "ldm.lr_scheduler.CosineScheduler", "params": {"warm_up_steps": 2, "f_start": 0.1}}
    model = build(model_lr=4e-5, cond_lr=1e-5, scheduler_config=config)
    model.total_steps = 8
    (optimizer,), (schedule,) = model.configure_optimizers()
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule["scheduler"].step()
    assert [network / encoder for network, encoder in rates] == pytest.approx([4.0] * 8)
    assert rates[0][0] == pytest.approx(4e-6)
    assert rates[2][0] == pytest.approx(4e-5)
