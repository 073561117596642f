from __future__ import annotations

import math

import pytest
import torch

from ldm.models.keyed_batches import loss_weights, move_pictures
from tests.unit.models.small import build_text_model, picture_batch


def test_a_batch_is_moved_and_its_exposure_keys_stay_on_the_cpu():
    moved = build_text_model().transfer_batch_to_device(picture_batch(), torch.device("meta"), 0)
    assert moved["image"].device.type == "meta"
    assert moved["exposure"].device.type == "cpu"


def test_batches_without_exposure_keys_are_moved_whole():
    moved = build_text_model().transfer_batch_to_device([torch.zeros(2)], torch.device("meta"), 0)
    assert moved[0].device.type == "meta"


@pytest.mark.parametrize("name", ["loss_weight", "training_size", "crop", "flip", "dropped"])
def test_what_the_loss_and_the_ledger_read_on_the_cpu_stays_there(name):
    batch = {"image": torch.zeros(2, 4, 4, 3), name: torch.ones(2)}
    moved = move_pictures(batch, lambda rest: {key: value.to("meta") for key, value in rest.items()})
    assert (moved["image"].device.type, moved[name].device.type) == ("meta", "cpu")


@pytest.mark.parametrize("batch", [{}, {"loss_weight": None}, {"loss_weight": torch.ones(2)}])
def test_pictures_that_all_count_one_have_no_weights(batch):
    assert loss_weights(batch, 2) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], r"give one weight a picture, shape \(2,\)"), ([1.0, -1.0], "at least 0"), ([1.0, math.nan], "at least 0")],
)
def test_weights_that_cannot_be_followed_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        loss_weights({"loss_weight": torch.tensor(weights)}, 2)
