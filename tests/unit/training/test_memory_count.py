from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.training.memory_count import BACKWARD, ENCODING, FORWARD, Growth, MemoryCount, count_step, growth_of


def build_unet(use_checkpoint: bool = False) -> UNetModel:
    return UNetModel(
        image_size=16,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=[1],
        channel_mult=[1, 2],
        num_heads=2,
        use_spatial_transformer=True,
        context_dim=16,
        use_checkpoint=use_checkpoint,
    )


def loss_of(unet: nn.Module, batch_size: int) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        context = torch.zeros(batch_size, 7, 16)
        out: Tensor = unet(torch.zeros(batch_size, 4, 16, 16), torch.zeros(batch_size).long(), context=context)
        return out.float().square().mean()

    return compute


def count(batch_size: int, mixed: bool = False, use_checkpoint: bool = False, fake: bool = True) -> MemoryCount:
    if not fake:
        unet = build_unet(use_checkpoint)
        return count_step(unet, loss_of(unet, batch_size), mixed)
    with FakeTensorMode():
        unet = build_unet(use_checkpoint)
        return count_step(unet, loss_of(unet, batch_size), mixed)


def saved_bytes(batch_size: int) -> int:
    """Bytes that autograd really keeps for the backward pass, parameters left out."""
    unet = build_unet()
    known = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(unet, batch_size)()
    assert loss.requires_grad
    return sum(kept.values())


def test_what_is_counted_without_memory_is_what_is_held_with_it() -> None:
    assert max(count(2).held) == pytest.approx(max(count(2, fake=False).held), rel=0.01)


def test_activations_are_what_autograd_keeps() -> None:
    counted = count(4)
    unet = build_unet()
    weights = sum(-(-each.numel() * 4 // 512) * 512 for each in unet.parameters())
    forward = [held for held, phase in zip(counted.held, counted.phases, strict=True) if phase == FORWARD]
    assert forward[-1] - weights == pytest.approx(saved_bytes(4), rel=0.05)


@pytest.mark.parametrize("mixed", [False, True])
def test_two_batches_foretell_a_third(mixed: bool) -> None:
    growth = growth_of(count(2, mixed), 2, count(3, mixed), 3)
    assert growth.peak(9)[0] == pytest.approx(max(count(9, mixed).held), rel=0.01)


def test_checkpointing_is_counted() -> None:
    assert max(count(8, mixed=True, use_checkpoint=True).held) < 0.8 * max(count(8, mixed=True).held)


def test_gradients_are_held_at_the_end_of_the_backward_pass() -> None:
    unet = build_unet()
    weights = sum(-(-each.numel() * 4 // 512) * 512 for each in unet.parameters())
    assert count(1).held[-1] == pytest.approx(2 * weights, rel=0.02)


def test_what_needs_no_gradient_is_encoding() -> None:
    layer = nn.Linear(4, 4)

    def compute() -> Tensor:
        with torch.no_grad():
            x = torch.zeros(2, 4) + 1
        return layer(x).sum()

    assert list(dict.fromkeys(count_step(layer, compute, mixed=False).phases)) == [ENCODING, FORWARD, BACKWARD]


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    growth = growth_of(count(2), 2, count(3), 3)
    capacity = 1.5 * growth.peak(6)[0]
    most = growth.largest_batch(capacity)
    assert growth.peak(most)[0] <= capacity < growth.peak(most + 1)[0]


def test_no_batch_fits_where_the_weights_alone_do_not() -> None:
    growth = growth_of(count(2), 2, count(3), 3)
    assert isinstance(growth, Growth)
    assert growth.largest_batch(1024) == 0
