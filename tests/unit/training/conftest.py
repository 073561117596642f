from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.training.toy import make_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures in two folders: twelve exposures at two repeats."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))
