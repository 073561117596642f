from __future__ import annotations

import math

import pytest
import torch

from ldm.models.keyed_batches import loss_weights
from tests.unit.models.small import build_text_model, picture_batch


def test_a_batch_is_moved_and_its_exposure_keys_stay_on_the_cpu():
    moved = build_text_model().transfer_batch_to_device(picture_batch(), torch.device("meta"), 0)
    assert moved["image"].device.type == "meta"
    assert moved["exposure"].device.type == "cpu"


def test_batches_without_exposure_keys_are_moved_whole():
    moved = build_text_model().transfer_batch_to_device([torch.zeros(2)], torch.device("meta"), 0)
    assert moved[0].device.type == "meta"


def test_loss_weights_stay_on_the_cpu_too():
    batch = {"image": torch.zeros(2, 8, 8, 3), "loss_weight": torch.tensor([1.0, 0.0])}
    moved = build_text_model().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["image"].device.type == "meta"
    assert moved["loss_weight"].tolist() == [1.0, 0.0]


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
