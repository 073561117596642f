from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kill_and_resume import CALLS, IN_SAVE, Aim, Found, Kill, describe, settings

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("killed")
    path = os.pathsep.join([str(project_root), str(project_root / "scripts"), os.environ.get("PYTHONPATH", "")])
    script = project_root / "tests" / "unit" / "scripts" / "kill_at_calls.py"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(place)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads((place / "outcomes.json").read_text())
    return found


@pytest.mark.parametrize("moment", [f"{when} {call}" for when in ("before", "after") for call in CALLS])
def test_a_run_killed_at_a_call_to_the_disk_continues_as_if_unbroken(moment: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[moment] == [-9, 0, 0.0, None]


def test_any_two_settings_meet() -> None:
    values = [tuple(vars(setting).values()) for setting in settings()]
    for one in range(len(values[0])):
        for two in range(one):
            assert len({(each[one], each[two]) for each in values}) == 4


def test_as_many_kills_as_wished_are_aimed_into_saves() -> None:
    aim = Aim(seed=1, share=1 / 3)
    kills: list[Kill] = []
    for _ in range(90):
        strike = aim.next(kills, seconds=1.0)
        in_save = strike.how == "save" or (strike.how == "call" and strike.what in IN_SAVE)
        kills.append(Kill("step", in_save, 0, Found()))
    assert sum(kill.in_save for kill in kills) >= 30


def test_kills_are_counted_by_where_they_fell_and_what_was_left() -> None:
    kills = [
        Kill("step", False, 0, Found()),
        Kill("step", True, 1, Found(partial=True, continued_from="last.ckpt")),
        Kill("validation", False, 2, Found(continued_from="another")),
    ]
    text = "\n".join(describe(kills, 3.0))
    assert "  inside a save: 1\n  step: 1\n  validation: 1\n" in text
    assert "begun anew: 1\n" in text
    assert "continued from last.ckpt: 1, from another one: 1\n" in text
    assert "temporary name: 1, damaged checkpoints: 0" in text
