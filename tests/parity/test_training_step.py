"""The loss, its gradients and AdamW's steps give the original's numbers."""

from __future__ import annotations

import pytest

from tests.parity.recording import build_tiny_sd

TOKEN_EMBEDDING = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def loss_of(model, oracle):
    context = model.get_learned_conditioning(oracle["in/tokens"][:2])
    return model.p_losses(oracle["latent/z"], context, oracle["in/q/t"], oracle["in/q/noise"])


@pytest.fixture(scope="module")
def differentiated(oracle_a):
    """A model after one backward pass, with its loss and logged parts."""
    model = build_tiny_sd()
    loss, logged = loss_of(model, oracle_a)
    loss.backward()
    return model, loss, logged


def test_the_loss_and_its_logged_parts_are_the_recorded_ones(differentiated, oracle_a):
    _, loss, logged = differentiated
    oracle_a.check("loss/value", loss)
    recorded = oracle_a.scalars["loss_dict_train"]
    assert {key: float(value) for key, value in logged.items()} == pytest.approx(recorded, rel=2e-5)


def test_the_loss_is_logged_as_validation_in_evaluation_mode(oracle_a):
    model = build_tiny_sd().eval()
    _, logged = loss_of(model, oracle_a)
    recorded = oracle_a.scalars["loss_dict_val"]
    assert {key: float(value) for key, value in logged.items()} == pytest.approx(recorded, rel=2e-5)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_both_distances_are_the_recorded_ones(tiny_sd, oracle_a, loss_type, monkeypatch):
    monkeypatch.setattr(tiny_sd, "loss_type", loss_type)
    output, target = oracle_a["loss/model_out"], oracle_a["in/q/noise"]
    oracle_a.check(f"loss/get_loss_mean_{loss_type}", tiny_sd.get_loss(output, target))
    per_sample = tiny_sd.get_loss(output, target, mean=False).mean(dim=(1, 2, 3))
    oracle_a.check(f"loss/get_loss_{loss_type}", per_sample)


def test_the_gradients_are_the_recorded_ones(differentiated, oracle_a):
    parameters = dict(differentiated[0].named_parameters())
    for key in oracle_a.keys("grad8/"):
        oracle_a.check(key, parameters[key.removeprefix("grad8/")].grad.flatten()[:8])


def test_the_gradient_norms_are_the_recorded_ones(differentiated, oracle_a):
    parameters = dict(differentiated[0].named_parameters())
    recorded = oracle_a.scalars["grad_norm_by_param"]
    floor = 1e-6 * max(recorded.values())
    compared = {key: norm for key, norm in recorded.items() if norm > floor}
    assert len(compared) > 200
    found = {key: float(parameters[key].grad.norm()) for key in compared}
    assert found == pytest.approx(compared, rel=1e-4)


def test_the_first_stage_gets_no_gradient(differentiated):
    assert all(parameter.grad is None for parameter in differentiated[0].first_stage_model.parameters())


def test_adamw_steps_give_the_recorded_weights_in_the_recorded_order(oracle_a):
    model = build_tiny_sd()
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    in_order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    assert in_order == oracle_a.scalars["adamw"]["param_names_in_optimizer_order"]

    def current(name):
        if name == "token_embedding_bos":
            return parameters[TOKEN_EMBEDDING][49406]
        if name == "token_embedding_unused_row5":
            return parameters[TOKEN_EMBEDDING][5]
        if name.startswith("full32/"):
            return parameters[name.removeprefix("full32/")].flatten()[:32]
        return parameters[name].flatten()[:8]

    for step in (1, 2, 3):
        optimizer.zero_grad()
        loss, _ = loss_of(model, oracle_a)
        assert loss.item() == pytest.approx(oracle_a.scalars["adamw"]["loss_before_each_step"][step - 1], rel=2e-5)
        loss.backward()
        optimizer.step()
        for key in oracle_a.keys(f"adamw/step{step}/"):
            value = current(key.removeprefix(f"adamw/step{step}/")).flatten()
            oracle_a.check(key, value[: len(oracle_a.arrays[key])])
