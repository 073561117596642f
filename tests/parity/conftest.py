"""Fixtures that the parity tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.recording import Recording, build_tiny_sd


@pytest.fixture(scope="session")
def oracle_a() -> Recording:
    """Numbers of the small Stable Diffusion v1 model."""
    return Recording("A")


@pytest.fixture(scope="session")
def oracle_g() -> Recording:
    """Numbers of functions without a network."""
    return Recording("G")


@pytest.fixture(scope="session")
def tiny_sd() -> Any:
    """The recorded model; tests must leave its weights as they are."""
    return build_tiny_sd()


@pytest.fixture(scope="session")
def contexts(tiny_sd: Any, oracle_a: Recording) -> tuple[Tensor, Tensor]:
    """Encoded captions of two pictures, and the encoded empty prompt for both."""
    with torch.no_grad():
        hidden = tiny_sd.get_learned_conditioning(oracle_a["in/tokens"])
    return hidden[:2], hidden[2:3].repeat(2, 1, 1)


@pytest.fixture
def scripted_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Tensor]], Any]:
    """Make torch's normal draws return recorded tensors, in order."""

    @contextmanager
    def script(draws: list[Tensor]) -> Iterator[None]:
        left = list(draws)
        with monkeypatch.context() as patch:
            for name in ("randn", "randn_like"):
                patch.setattr(torch, name, lambda *args, **kwargs: left.pop(0))
            yield
        assert not left, f"{len(left)} recorded draws were not used"

    return script
