"""What every test stands on: no network, few threads, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Before torch is imported. Tiny models are slower on many threads, and the programs that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OFFLINE_FOLDER = Path(__file__).parent / "offline"


def _cut_off_network() -> None:
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE_FOLDER), *([path] if path else [])])
    spec = importlib.util.spec_from_file_location("everydream_offline", OFFLINE_FOLDER / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


_cut_off_network()

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run, and no limit on their time: a busy machine must not fail a test.
settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds main.py."""
    return ROOT


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
