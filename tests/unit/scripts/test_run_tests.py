from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import run_tests
from environment import SetupError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Mapping[str, str]]]:
    calls: list[tuple[list[str], Mapping[str, str]]] = []

    def run_live(command: list[object], variables: Mapping[str, str]) -> int:
        calls.append(([str(part) for part in command], variables))
        return 3

    monkeypatch.setattr(run_tests, "ensure_environment", lambda *args, **kwargs: Path("python"))
    monkeypatch.setattr(run_tests, "run_live", run_live)
    return calls


def test_arguments_are_passed_on_to_pytest(calls: list[tuple[list[str], Mapping[str, str]]]) -> None:
    run_tests.main(["-k", "scan", "--unpinned"])
    assert calls[0][0] == ["python", "-m", "pytest", "-n", "auto", "--dist", "loadfile", "-k", "scan"]


def test_the_exit_status_is_pytest_s(calls: list[tuple[list[str], Mapping[str, str]]]) -> None:
    assert run_tests.main([]) == 3


def test_gpus_are_hidden_unless_asked_for(
    calls: list[tuple[list[str], Mapping[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run_tests.main([])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run_tests.main([])
    assert [variables["CUDA_VISIBLE_DEVICES"] for _, variables in calls] == ["", "0"]


def test_no_tests_run_where_the_environment_fails(
    calls: list[tuple[list[str], Mapping[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> Path:
        raise SetupError("no space left")

    monkeypatch.setattr(run_tests, "ensure_environment", fail)
    assert run_tests.main([]) == 1
    assert calls == []
