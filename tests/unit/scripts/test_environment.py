from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import environment
import pytest
from environment import SetupError

VERSION = ".".join(map(str, sys.version_info[:3]))


class Machine:
    """Stands in for the slow parts, making an environment and running pip, and counts them."""

    def __init__(self) -> None:
        self.made = 0
        self.installed: list[list[str]] = []
        self.pip_works = True

    def make_venv(self, venv: Path) -> None:
        self.made += 1
        venv.mkdir(parents=True, exist_ok=True)
        (venv / environment.UNFINISHED).touch()

    def interpreter_version(self, python: Path) -> str | None:
        return VERSION if self.made else None

    def install(self, python: Path, extras: Sequence[str], unpinned: bool, venv: Path) -> None:
        self.installed.append(list(extras))
        if not self.pip_works:
            raise SetupError("pip could not install the project")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(environment, "_make_venv", machine.make_venv)
    monkeypatch.setattr(environment, "_interpreter_version", machine.interpreter_version)
    monkeypatch.setattr(environment, "_install", machine.install)
    return machine


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    for name in environment.INPUTS:
        (root / name).write_text("first line\nsecond line\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("version", [(3, 9), (2, 7)])
def test_an_old_python_is_refused_by_name(version: tuple[int, int]) -> None:
    with pytest.raises(SetupError, match=rf"Python 3\.10 or newer is needed, and this is Python {version[0]}\."):
        environment.require_python(version)


def test_python_3_10_is_accepted() -> None:
    environment.require_python((3, 10))


def test_a_first_run_makes_the_environment_and_installs(machine: Machine, tmp_path: Path) -> None:
    environment.ensure_environment(["quickstart"], venv=tmp_path / "venv")
    assert (machine.made, machine.installed) == (1, [["quickstart"]])


def test_a_second_run_installs_nothing(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        environment.ensure_environment(["quickstart"], venv=tmp_path / "venv")
    assert (machine.made, machine.installed) == (1, [["quickstart"]])
    assert "nothing to install" in capsys.readouterr().out


def test_further_extras_are_added_to_those_installed(machine: Machine, tmp_path: Path) -> None:
    environment.ensure_environment(["quickstart"], venv=tmp_path / "venv")
    environment.ensure_environment(["test"], venv=tmp_path / "venv")
    environment.ensure_environment(["quickstart"], venv=tmp_path / "venv")
    assert (machine.made, machine.installed) == (1, [["quickstart"], ["quickstart", "test"]])


def test_unpinned_versions_are_another_install(machine: Machine, tmp_path: Path) -> None:
    environment.ensure_environment(["quickstart"], venv=tmp_path / "venv")
    environment.ensure_environment(["quickstart"], unpinned=True, venv=tmp_path / "venv")
    assert len(machine.installed) == 2


def test_after_a_failed_install_the_next_run_starts_anew(machine: Machine, tmp_path: Path) -> None:
    machine.pip_works = False
    with pytest.raises(SetupError):
        environment.ensure_environment(["quickstart"], venv=tmp_path / "venv")
    machine.pip_works = True
    environment.ensure_environment(["quickstart"], venv=tmp_path / "venv")
    assert machine.made == 2
    assert environment.installed_extras(tmp_path / "venv", environment.wanted_key(VERSION, False)) == {"quickstart"}


def test_an_environment_made_by_the_user_is_installed_into_and_kept(machine: Machine, tmp_path: Path) -> None:
    machine.made = 1  # its interpreter answers, and it holds no mark of ours
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "own").touch()
    environment.ensure_environment(["quickstart"], venv=tmp_path / "venv")
    assert machine.made == 1
    assert machine.installed == [["quickstart"]]
    assert (tmp_path / "venv" / "own").exists()


def test_a_half_made_environment_is_replaced_by_one_that_works(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(environment, "_install", machine.install)
    venv = tmp_path / "venv"
    (venv / "lib").mkdir(parents=True)
    (venv / "lib" / "left_over").touch()
    (venv / environment.UNFINISHED).touch()
    python = environment.ensure_environment([], venv=venv)
    answer = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, check=True)
    assert str(venv) in answer.stdout
    assert not (venv / "lib" / "left_over").exists()
    assert not (venv / environment.UNFINISHED).exists()


def test_the_environment_does_not_delete_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / environment.UNFINISHED).touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(SetupError, match="cannot be mended by its own Python"):
        environment.ensure_environment([], venv=tmp_path)
    assert (tmp_path / environment.UNFINISHED).exists()


def test_a_missing_venv_module_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="ensurepip is not available", stderr="")
    monkeypatch.setattr(environment, "_interpreter_version", lambda python: None)
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SetupError, match=r"(?s)ensurepip is not available.*apt install python3\.\d+-venv"):
        environment.ensure_environment([], venv=tmp_path / "venv")


@pytest.mark.parametrize("name", environment.INPUTS)
def test_the_key_follows_every_input(inputs: Path, name: str) -> None:
    before = environment.wanted_key("3.11.7", False, inputs)
    with (inputs / name).open("a", encoding="utf-8") as file:
        file.write("more\n")
    assert environment.wanted_key("3.11.7", False, inputs) != before


def test_the_key_follows_the_python_version(inputs: Path) -> None:
    assert environment.wanted_key("3.11.7", False, inputs) != environment.wanted_key("3.12.1", False, inputs)


def test_the_key_does_not_follow_line_endings(inputs: Path) -> None:
    before = environment.wanted_key("3.11.7", False, inputs)
    for name in environment.INPUTS:
        (inputs / name).write_bytes((inputs / name).read_bytes().replace(b"\n", b"\r\n"))
    assert environment.wanted_key("3.11.7", False, inputs) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "k"}', '{"key": "other", "extras": []}'])
def test_a_damaged_or_other_stamp_counts_as_nothing_installed(tmp_path: Path, content: str) -> None:
    (tmp_path / environment.STAMP).write_text(content, encoding="utf-8")
    assert environment.installed_extras(tmp_path, "k") is None


def test_a_stamp_beside_an_unfinished_install_does_not_count(tmp_path: Path) -> None:
    (tmp_path / environment.STAMP).write_text(json.dumps({"key": "k", "extras": ["test"]}), encoding="utf-8")
    assert environment.installed_extras(tmp_path, "k") == {"test"}
    (tmp_path / environment.UNFINISHED).touch()
    assert environment.installed_extras(tmp_path, "k") is None


def test_pip_is_given_the_constraints_unless_told_otherwise() -> None:
    pinned = environment.install_command(Path("python"), ["test"], unpinned=False)
    assert pinned[-2:] == ["--constraint", str(environment.ROOT / "constraints.txt")]
    assert f"{environment.ROOT}[test]" in pinned
    assert "--constraint" not in environment.install_command(Path("python"), ["test"], unpinned=True)


def test_a_failing_pip_is_reported_with_its_last_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "for n in range(100): print('line', n)\nraise SystemExit(1)"
    monkeypatch.setattr(environment, "install_command", lambda *args: [sys.executable, "-c", program])
    with pytest.raises(SetupError) as caught:
        environment._install(Path("python"), [], False, tmp_path)
    message = str(caught.value)
    assert "line 99\n" in message
    assert "line 79\n" not in message
    assert "What to do" in message
    assert "line 0\n" in (tmp_path / "install.log").read_text(encoding="utf-8")


def test_run_live_returns_the_exit_status() -> None:
    assert environment.run_live([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_run_live_lets_an_interrupted_program_end_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.waits = 0

        def wait(self) -> int:
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(environment.subprocess, "Popen", Interrupted)
    assert environment.run_live(["program"]) == 130


def test_paths_in_the_project_are_shown_as_typed_there(tmp_path: Path) -> None:
    assert environment.shown(environment.ROOT / "logs" / "run") == str(Path("logs", "run"))
    assert environment.shown(tmp_path) == str(tmp_path)
