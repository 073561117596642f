from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from tests.unit.models.small import (
    build_text_model,
    first_stage_config,
    picture_batch,
    text_config,
    unet_config,
    with_random_weights,
)


@pytest.fixture(scope="module")
def model():
    """A text-to-image model; tests must leave it as it is."""
    return build_text_model()


def test_the_loss_of_an_exposure_does_not_depend_on_the_batch_it_is_in(model):
    batch = picture_batch(4)
    both, _ = model.shared_step(batch, batch["exposure"])
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    losses = [model.shared_step(half, half["exposure"])[0].item() for half in halves]
    assert both.item() == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_loss_of_an_exposure_does_not_depend_on_what_was_drawn_before(model):
    batch = picture_batch()
    first, _ = model.shared_step(batch, batch["exposure"])
    torch.rand(10)
    second, _ = model.shared_step(batch, batch["exposure"])
    assert first.item() == second.item()


def test_another_epoch_is_another_exposure(model):
    batch = picture_batch()
    later = batch["exposure"].clone()
    later[:, 1] = 1
    assert model.shared_step(batch, batch["exposure"])[0].item() != model.shared_step(batch, later)[0].item()


def test_batches_without_exposures_get_them_by_their_place(model, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    batch = {key: value for key, value in picture_batch().items() if key != "exposure"}
    first, again, next_batch = (model._exposures(batch, index) for index in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_batch)
    assert len({tuple(row) for row in first.tolist()}) == 2


@pytest.mark.parametrize(
    ("unfreeze_model", "cond_stage_trainable", "parts"),
    [(True, True, ["model", "cond_stage_model"]), (True, False, ["model"]), (False, True, ["cond_stage_model"])],
)
def test_exactly_the_parts_asked_for_are_trained(unfreeze_model, cond_stage_trainable, parts):
    model = build_text_model(unfreeze_model=unfreeze_model, cond_stage_trainable=cond_stage_trainable)
    assert list(model.trained_parameters()) == parts
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(parts)


def test_nothing_to_train_is_an_error():
    model = build_text_model(unfreeze_model=False, cond_stage_trainable=False)
    with pytest.raises(ValueError, match="nothing is to train"):
        model.configure_optimizers()


def test_an_encoder_that_freezes_itself_is_not_trained():
    config = text_config()
    config["params"]["freeze"] = True
    model = build_text_model(cond_stage_config=config)
    assert list(model.trained_parameters()) == ["model"]
    batch = picture_batch()
    model.shared_step(batch, batch["exposure"])[0].backward()


def test_frozen_parts_stay_in_evaluation_mode_while_training():
    model = build_text_model(cond_stage_trainable=False).train()
    assert model.model.training
    assert not model.first_stage_model.training
    assert not model.cond_stage_model.training


def test_model_lr_gives_the_unet_a_group_of_its_own():
    model = build_text_model(model_lr=1e-5)
    model.learning_rate = 1e-3
    groups = model.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [1e-5, 1e-3]
    assert len(groups[0]["params"]) == len(list(model.model.parameters()))


def test_a_schedule_multiplies_the_learning_rate():
    schedule = {
        "target": "ldm.lr_scheduler.EveryDreamScheduler",
        "params": {"warm_up_steps": 10, "f_start": 0.5, "f_max": 1.0, "f_min": 0.1, "steps_to_min": 20},
    }
    model = build_text_model(scheduler_config=schedule)
    model.learning_rate = 1e-3
    optimizers, schedulers = model.configure_optimizers()
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-4)
    assert schedulers[0]["interval"] == "step"


def test_a_learned_logvar_is_trained_logged_and_saved():
    model = build_text_model(learn_logvar=True, logvar_init=0.5).train()
    batch = picture_batch()
    loss, logged = model.shared_step(batch, batch["exposure"])
    loss.backward()
    assert model.logvar.grad is not None
    assert {"train/loss_gamma", "logvar"} <= set(logged)
    assert "logvar" in model.state_dict()
    assert list(model.trained_parameters()) == ["model", "cond_stage_model", "logvar"]


def test_moving_averages_follow_optimiser_steps_and_are_swapped_in_and_out():
    model = build_text_model(use_ema=True)
    live = next(model.model.parameters())
    with torch.no_grad():
        live.add_(1.0)
    changed = live.clone()
    with model.ema_scope():
        assert not torch.equal(live, changed)
    assert torch.equal(live, changed)
    model.model_ema(model.model)
    assert int(model.model_ema.num_updates) == 1


def test_a_condition_schedule_noises_the_condition():
    model = build_text_model(num_timesteps_cond=5)
    assert model.cond_ids[:6].tolist() == [0, 250, 500, 749, 999, 999]
    cond = torch.ones(2, 3, 32)
    exposures = picture_batch()["exposure"]
    t = torch.tensor([0, 4])
    noised = model.noised_condition(cond, t, exposures)
    assert (noised[0] - cond[0]).abs().max() < (noised[1] - cond[1]).abs().max()
    assert torch.equal(noised, model.noised_condition(cond, t, exposures))


def test_scale_by_std_takes_its_factor_from_the_first_batch_and_saves_it():
    scaled = build_text_model(scale_by_std=True)
    assert scaled.state_dict()["scale_factor"].item() == 1.0
    scaled._trainer = type("Trainer", (), {"global_step": 0, "current_epoch": 0, "global_rank": 0})()
    batch = picture_batch()
    scaled.on_train_batch_start(batch, 0)
    factor = scaled.scale_factor.item()
    assert factor != 1.0
    z, _ = scaled.get_input(batch, "image", exposures=batch["exposure"])
    assert z.std().item() == pytest.approx(1.0, rel=1e-5)
    assert scaled.state_dict()["scale_factor"].item() == factor


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_every_parameterisation_and_distance_trains(parameterization, loss_type):
    model = build_text_model(parameterization=parameterization, loss_type=loss_type)
    batch = picture_batch()
    loss, _ = model.shared_step(batch, batch["exposure"])
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())


def test_an_unknown_parameterisation_names_the_known_ones():
    with pytest.raises(ValueError, match="eps, x0, v"):
        build_text_model(parameterization="epsilon")


def test_an_unknown_conditioning_key_names_the_known_ones():
    with pytest.raises(ValueError, match="concat, crossattn, hybrid, adm"):
        build_text_model(conditioning_key="crossatn")


def build_map_model(conditioning_key, **params):
    """A model conditioned on a picture of its own latent size, through the first stage."""
    torch.manual_seed(0)
    return with_random_weights(
        LatentDiffusion(
            first_stage_config=first_stage_config(),
            cond_stage_config="__is_first_stage__",
            cond_stage_key="masked_image",
            conditioning_key=conditioning_key,
            use_ema=False,
            **params,
        )
    )


def test_a_concatenated_condition_is_the_first_stages_unscaled_mode():
    model = build_map_model("concat", unet_config=unet_config(in_channels=8), scale_factor=0.5)
    batch = picture_batch() | {"masked_image": picture_batch()["image"] * 0.5}
    z, c = model.get_input(batch, "image")
    expected = model.encode_first_stage(batch["masked_image"].permute(0, 3, 1, 2)).mode()
    assert torch.allclose(c, expected, atol=1e-6)
    loss, _ = model.shared_step(batch, batch["exposure"])
    loss.backward()
    assert model.apply_model(z, torch.tensor([1, 2]), c).shape == z.shape


def test_hybrid_conditions_reach_the_network_by_both_ways():
    model = build_text_model(unet={"in_channels": 8}, conditioning_key="hybrid")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    tokens, maps = torch.randn(2, 3, 32), torch.randn(2, 4, 8, 8)
    base = model.apply_model(x, t, {"c_crossattn": [tokens], "c_concat": [maps]})
    assert not torch.equal(base, model.apply_model(x, t, {"c_crossattn": [tokens + 1], "c_concat": [maps]}))
    assert not torch.equal(base, model.apply_model(x, t, {"c_crossattn": [tokens], "c_concat": [maps + 1]}))


def test_class_labels_reach_the_network_through_the_time_embedding():
    model = build_map_model("adm", unet_config=unet_config(num_classes=5, use_new_attention_order=True))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    first, second = (model.apply_model(x, t, torch.tensor(labels)) for labels in ([0, 1], [0, 4]))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_an_unconditional_model_trains():
    torch.manual_seed(0)
    model = LatentDiffusion(
        unet_config=unet_config(),
        first_stage_config=first_stage_config(),
        cond_stage_config="__is_unconditional__",
        use_ema=False,
    )
    batch = picture_batch()
    assert model.model.conditioning_key is None
    model.shared_step(batch, batch["exposure"])[0].backward()


def test_diffusion_on_pixels_trains_and_samples():
    torch.manual_seed(0)
    model = DDPM(unet_config=unet_config(in_channels=3, out_channels=3), timesteps=4, image_size=8, use_ema=True)
    batch = picture_batch(size=(8, 8))
    model.shared_step(batch, batch["exposure"])[0].backward()
    assert model.sample(2).shape == (2, 3, 8, 8)
    assert set(model.log_images(batch, N=2, ddim_steps=2)) == {"inputs", "samples"}


@pytest.mark.parametrize("size", [(16, 32), (18, 14)])
def test_log_images_have_the_size_and_aspect_of_the_batch(size):
    model = build_text_model(unet={"channel_mult": [1, 1]})
    rows = model.log_images(picture_batch(size=size), N=2, ddim_steps=2)
    assert set(rows) == {"inputs", "reconstruction", "conditioning", "samples", "samples_cfg_scale_5.00"}
    assert {tuple(row.shape) for row in rows.values()} == {(2, 3, *size)}


def test_pixel_models_log_images_of_the_batchs_size():
    rows = build_pixel_model().log_images(picture_batch(size=(9, 7)), N=2, ddim_steps=2)
    assert {tuple(row.shape) for row in rows.values()} == {(2, 3, 9, 7)}


def test_a_batch_of_odd_latent_sides_trains():
    model = build_text_model(unet={"channel_mult": [1, 1], "use_checkpoint": True})
    batch = picture_batch(size=(18, 14))
    model.shared_step(batch, batch["exposure"])[0].backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())


def test_saved_keys_are_clean_and_come_back_into_a_compiled_model():
    model = build_text_model()
    plain = list(model.state_dict())
    model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="eager")
    checkpoint = {"state_dict": model.state_dict()}
    assert any("_orig_mod" in key for key in checkpoint["state_dict"])
    model.on_save_checkpoint(checkpoint)
    assert list(checkpoint["state_dict"]) == plain
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])


def build_pixel_model(**params):
    torch.manual_seed(0)
    config = unet_config(in_channels=3, out_channels=3)
    return with_random_weights(DDPM(unet_config=config, timesteps=4, image_size=8, **({"use_ema": False} | params)))


def test_the_pixel_model_keeps_compvis_argument_order():
    model = build_pixel_model()
    x, t, noise = torch.randn(2, 3, 8, 8), torch.tensor([1, 3]), torch.randn(2, 3, 8, 8)
    first, again = (model.p_losses(x, t, noise)[0] for _ in range(2))
    assert first.item() == again.item()
    assert len(model.p_mean_variance(x=x, t=t, clip_denoised=True)) == 3
    assert model.p_sample(x, t).shape == x.shape
    samples, intermediates = model.p_sample_loop((2, 3, 8, 8), return_intermediates=True)
    assert samples.shape == x.shape
    assert len(intermediates) == 3
    assert model.sample(5).shape == (5, 3, 8, 8)


def test_the_latent_model_keeps_compvis_argument_order(model):
    c, x_T = torch.randn(2, 3, 32), torch.randn(2, 4, 8, 8)
    samples, intermediates = model.sample(c, 2, True, x_T, False, 3, shape=(2, 4, 8, 8))
    assert samples.shape == x_T.shape
    assert torch.equal(intermediates[0], x_T)


def save(tmp_path, model, **extra):
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": model.state_dict() | extra}, path)
    return str(path)


def test_a_checkpoint_path_in_the_config_is_loaded(tmp_path):
    source = build_text_model()
    loaded = build_text_model(ckpt_path=save(tmp_path, source), unet={"num_heads": 2}, unfreeze_model=True)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_missing_checkpoint_path_is_an_error_also_in_subclasses():
    class Derived(DDPM):
        pass

    with pytest.raises(OSError, match="does not exist"):
        Derived(unet_config=unet_config(in_channels=3, out_channels=3), use_ema=False, ckpt_path="none.ckpt")


def test_ignored_keys_keep_their_values(tmp_path):
    source = build_text_model()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    weights = {key: value for key, value in source.state_dict().items() if not key.startswith("first_stage_model")}
    torch.save(weights, tmp_path / "weights.ckpt")
    loaded = build_text_model(ckpt_path=str(tmp_path / "weights.ckpt"), ignore_keys=["first_stage_model"])
    conv_in = "first_stage_model.encoder.conv_in.weight"
    assert not torch.equal(loaded.state_dict()[conv_in], source.state_dict()[conv_in])
    time_embed = "model.diffusion_model.time_embed.0.weight"
    assert torch.equal(loaded.state_dict()[time_embed], source.state_dict()[time_embed])


def test_one_ignored_key_without_a_list_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"give a list of prefixes: \[loss\]"):
        build_text_model(ckpt_path=save(tmp_path, build_text_model()), ignore_keys="loss")


def test_loading_the_unet_alone_leaves_the_rest_and_starts_its_averages(tmp_path):
    source = build_pixel_model()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    path = save(tmp_path, source, **{"first_stage_model.conv.weight": torch.ones(1)})
    loaded = build_pixel_model(use_ema=True, ckpt_path=path, load_only_unet=True)
    weight = "diffusion_model.time_embed.0.weight"
    assert torch.equal(loaded.model.state_dict()[weight], source.model.state_dict()[weight])
    assert torch.equal(loaded.model_ema.diffusion_modeltime_embed0weight, source.model.state_dict()[weight])


def test_moving_averages_work_on_compiled_networks():
    model = build_text_model(use_ema=True)
    model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="eager")
    model.model_ema(model.model)
    with model.ema_scope():
        pass
    assert int(model.model_ema.num_updates) == 1


def test_scopes_of_the_averages_may_be_nested():
    model = build_text_model(use_ema=True)
    live = next(model.model.parameters())
    with torch.no_grad():
        live.add_(1.0)
    changed = live.clone()
    with model.ema_scope(), model.ema_scope():
        assert not torch.equal(live, changed)
    assert torch.equal(live, changed)


def test_weights_that_bring_a_scale_keep_it():
    model = build_text_model(scale_by_std=True)
    model.scale_factor.fill_(0.5)
    model._trainer = type("Trainer", (), {"global_step": 0, "current_epoch": 0, "global_rank": 0})()
    model.on_train_batch_start(picture_batch(), 0, 0)
    assert model.scale_factor.item() == 0.5


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scale_by_std": True, "scale_factor": 0.18}, "not both"),
        ({"cond_stage_config": "__is_first_stage__", "conditioning_key": "concat"}, "cannot be true"),
        ({"cond_stage_config": None}, "'target'"),
        ({"num_timesteps_cond": 0.5}, "it must be 1 to 1000"),
    ],
)
def test_contradictory_settings_are_errors(params, message):
    with pytest.raises(ValueError, match=message):
        build_text_model(**params)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with averages after five batches, two accumulated, through a real Trainer."""
    model = build_text_model(use_ema=True)
    model.learning_rate = 1e-2
    before = [parameter.detach().clone() for parameter in model.model.parameters()]
    batches = [picture_batch() for _ in range(5)]
    trainer = pl.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path_factory.mktemp("trained"),
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(model, loader, loader)
    return model, trainer, before


def test_averages_move_once_an_optimiser_step(trained):
    model, trainer, _ = trained
    assert trainer.global_step == 3
    assert int(model.model_ema.num_updates) == 3


def test_validation_is_logged_with_live_and_with_averaged_weights(trained):
    _, trainer, _ = trained
    metrics = trainer.callback_metrics
    for name in ("loss_simple", "loss_vlb", "loss"):
        assert f"val/{name}" in metrics
        assert metrics[f"val/{name}"] != metrics[f"val/{name}_ema"]


def test_gradients_are_freed_after_the_step(trained):
    assert all(parameter.grad is None for parameter in trained[0].parameters())


def test_training_changes_every_weight_of_the_network(trained):
    model, _, before = trained
    assert not any(torch.equal(old, new) for old, new in zip(before, model.model.parameters(), strict=True))


def gradients(model, batch):
    """The loss, what is logged, and each parameter's gradient."""
    model.zero_grad()
    loss, logged = model.shared_step(batch, batch["exposure"])
    loss.backward()
    return loss.item(), logged, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def weighted_batch(*weights):
    return picture_batch(len(weights)) | {"loss_weight": torch.tensor(weights)}


def first_rows(batch, count):
    return {key: value[:count] for key, value in batch.items()}


def test_weights_of_one_change_no_bit():
    model = build_text_model(learn_logvar=True, original_elbo_weight=0.1)
    plain, ones = gradients(model, picture_batch(3)), gradients(model, weighted_batch(1.0, 1.0, 1.0))
    assert plain[:2] == ones[:2]
    assert all(torch.equal(a, b) for a, b in zip(plain[2], ones[2], strict=True))


def test_fillers_count_only_as_rows():
    model = build_text_model(learn_logvar=True, original_elbo_weight=0.1, min_snr_gamma=5.0)
    filled = gradients(model, weighted_batch(1.0, 1.0, 0.0))
    alone = gradients(model, first_rows(picture_batch(3), 2))
    assert filled[0] * 3 == pytest.approx(alone[0] * 2, rel=1e-5)
    assert {name: value.item() for name, value in filled[1].items()} == pytest.approx(
        {name: value.item() for name, value in alone[1].items()}, rel=1e-5
    )
    # The scale of both is some 1e-2; a gradient of 0 is rounding noise.
    assert all(torch.allclose(a * 3, b * 2, rtol=1e-4, atol=1e-6) for a, b in zip(filled[2], alone[2], strict=True))


def test_a_batch_of_fillers_leaves_gradients_of_zero():
    loss, logged, grads = gradients(build_text_model(), weighted_batch(0.0, 0.0))
    assert loss == 0.0
    assert all(torch.isfinite(value) for value in logged.values())
    assert grads
    assert not any(grad.any() for grad in grads)


def test_a_pictures_weight_scales_its_part_of_the_loss(model):
    batch = weighted_batch(2.0, 0.5)
    parts = [
        model.shared_step(batch | {"loss_weight": torch.tensor(only)}, batch["exposure"])[0].item()
        for only in ([1.0, 0.0], [0.0, 1.0])
    ]
    assert model.shared_step(batch, batch["exposure"])[0].item() == pytest.approx(2.0 * parts[0] + 0.5 * parts[1])


def test_the_pixel_model_follows_weights_too():
    model = build_pixel_model()
    batch = weighted_batch(1.0, 1.0, 0.0)
    alone = first_rows(picture_batch(3), 2)
    filled = model.shared_step(batch, batch["exposure"])[0].item()
    assert filled * 3 == pytest.approx(2 * model.shared_step(alone, alone["exposure"])[0].item(), rel=1e-5)


def test_fillers_are_left_out_of_the_scale():
    factors = []
    for batch in (weighted_batch(1.0, 1.0, 0.0), first_rows(picture_batch(3), 2), picture_batch(3)):
        scaled = build_text_model(scale_by_std=True)
        scaled._trainer = type("Trainer", (), {"global_step": 0, "current_epoch": 0, "global_rank": 0})()
        scaled.on_train_batch_start(batch, 0)
        factors.append(scaled.scale_factor.item())
    assert factors[0] == pytest.approx(factors[1], rel=1e-5)
    assert factors[0] != pytest.approx(factors[2], rel=1e-5)


class BesideAnIdleDevice(SingleDeviceStrategy):
    """One of two devices, where the other has had nothing but fillers; averages as Lightning does."""

    def reduce(self, tensor, group=None, reduce_op="mean"):
        half = tensor / 2
        return tensor.copy_(half) if tensor.is_floating_point() else tensor.copy_(half.to(tensor.dtype))


def measured(model, monkeypatch, *batches):
    connector = "pytorch_lightning.trainer.connectors.accelerator_connector._AcceleratorConnector"
    monkeypatch.setattr(f"{connector}.is_distributed", True)
    trainer = pl.Trainer(
        strategy=BesideAnIdleDevice("cpu"),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    return trainer.validate(model, torch.utils.data.DataLoader(list(batches), batch_size=None), verbose=False)[0]


def test_what_is_validated_is_the_mean_over_real_pictures_of_all_devices(monkeypatch):
    model = build_text_model()
    filled = measured(model, monkeypatch, weighted_batch(1.0, 1.0, 0.0), weighted_batch(0.0), weighted_batch(1.0))
    alone = (first_rows(picture_batch(3), 2), picture_batch(1))
    singly = [model.eval().shared_step(batch, batch["exposure"])[1] for batch in alone]
    expected = (2 * singly[0]["val/loss_simple"].item() + singly[1]["val/loss_simple"].item()) / 3
    assert filled["val/loss_simple"] == pytest.approx(expected, rel=1e-5)


def test_a_training_epoch_logs_the_mean_over_real_pictures():
    model = build_text_model()
    batches = [weighted_batch(1.0, 1.0, 0.0), weighted_batch(0.0), weighted_batch(1.0)]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))  # at a learning rate of 0
    alone = (first_rows(picture_batch(3), 2), picture_batch(1))
    singly = [model.train().shared_step(batch, batch["exposure"])[1] for batch in alone]
    expected = (2 * singly[0]["train/loss"].item() + singly[1]["train/loss"].item()) / 3
    assert trainer.callback_metrics["train/loss_epoch"].item() == pytest.approx(expected, rel=1e-5)
