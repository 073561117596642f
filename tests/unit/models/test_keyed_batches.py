from __future__ import annotations

import torch

from tests.unit.models.small import build_text_model, picture_batch


def test_a_batch_is_moved_and_its_exposure_keys_stay_on_the_cpu():
    moved = build_text_model().transfer_batch_to_device(picture_batch(), torch.device("meta"), 0)
    assert moved["image"].device.type == "meta"
    assert moved["exposure"].device.type == "cpu"


def test_batches_without_exposure_keys_are_moved_whole():
    moved = build_text_model().transfer_batch_to_device([torch.zeros(2)], torch.device("meta"), 0)
    assert moved[0].device.type == "meta"
