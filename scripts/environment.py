"""The project's own virtual environment: made once, mended when an install was cut short, never installed twice.

Used by ``quickstart.py`` and ``run_tests.py``, which start before anything is installed: standard library only,
and no shell, so that it works the same on Linux, macOS and Windows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
VENV: Final = ROOT / ".venv"

OLDEST_PYTHON: Final = (3, 10)

# Written last, so an environment that holds it is complete.
STAMP: Final = "everydream-installed.json"
# There from the first step of an install to its end: where it is left behind, the install was cut short.
UNFINISHED: Final = "everydream-unfinished"

# What decides which packages are installed.
INPUTS: Final = ("pyproject.toml", "setup.py", "constraints.txt")

SHOWN_PIP_LINES: Final = ("Downloading ", "Building ", "Installing collected packages", "Successfully built")
PIP_TAIL_LINES: Final = 20


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def require_python(version: Sequence[int] = tuple(sys.version_info[:2])) -> None:
    """Refuse a Python that is too old, before its syntax errors would.

    Args:
        version: major and minor number; those of the running Python by default.

    Raises:
        SetupError: it is older than ``OLDEST_PYTHON``.
    """
    if tuple(version[:2]) < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        raise SetupError(
            f"Python {needed} or newer is needed, and this is Python {version[0]}.{version[1]}. "
            "Install a newer one (https://www.python.org/downloads/) and start this script with it."
        )


def venv_python(venv: Path = VENV) -> Path:
    """Name the interpreter of a virtual environment.

    Args:
        venv: the environment's folder.

    Returns:
        The interpreter's path, whether or not it exists.
    """
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def shown(path: Path) -> str:
    """Write a path as a user in the project's folder would type it.

    Args:
        path: a path in the project or anywhere else.

    Returns:
        The path relative to the project's folder where it lies inside, else the whole path.
    """
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def wanted_key(python_version: str, unpinned: bool, root: Path = ROOT) -> str:
    """Condense everything but the extras that decides what an install would put in place.

    Args:
        python_version: version of the environment's interpreter, such as ``3.11.7``.
        unpinned: whether constraints.txt is left out.
        root: the project's folder.

    Returns:
        A hexadecimal digest; the same for files that differ in line endings alone.
    """
    digest = hashlib.sha256(f"{python_version} unpinned={unpinned}".encode())
    for name in INPUTS:
        digest.update(f"\0{name}\0".encode())
        digest.update((root / name).read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def installed_extras(venv: Path, key: str) -> set[str] | None:
    """Read what is completely installed in an environment.

    Args:
        venv: the environment's folder.
        key: what :func:`wanted_key` gives today.

    Returns:
        The extras installed under that key; None where nothing is, or under another key, or not completely.
    """
    if (venv / UNFINISHED).exists():
        return None
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
        return set(stamp["extras"]) if stamp["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_live(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> int:
    """Run a program in the project's folder with its output going straight to the terminal.

    Ctrl-C reaches the program as well; it is then waited for, so that it can save and end by itself.

    Args:
        command: program and arguments.
        environment: variables to set beside the inherited ones.

    Returns:
        Its exit status.
    """
    sys.stdout.flush()
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env={**os.environ, **(environment or {})})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def ensure_environment(extras: Sequence[str], unpinned: bool = False, venv: Path = VENV) -> Path:
    """Make the environment if it is missing or broken, and install the project into it unless that is done already.

    Args:
        extras: names from ``[project.optional-dependencies]``; those already installed stay.
        unpinned: take the newest versions that pyproject.toml allows, not those of constraints.txt.
        venv: the environment's folder.

    Returns:
        The environment's interpreter.

    Raises:
        SetupError: the environment cannot be made or the install fails.
    """
    require_python()
    python = venv_python(venv)
    version = None if (venv / UNFINISHED).exists() else _interpreter_version(python)
    if version is None:
        _make_venv(venv)
        version = _interpreter_version(python)
        if version is None:
            raise SetupError(
                f"the environment in {shown(venv)} was made but its {python.name} does not run. "
                "Delete that folder and try another Python."
            )
    require_python([int(part) for part in version.split(".")[:2]])

    key = wanted_key(version, unpinned)
    present = installed_extras(venv, key)
    if present is not None and present.issuperset(extras):
        print(f"environment: {shown(venv)} (Python {version}), nothing to install")
        return python

    # An environment that was installed for other inputs keeps the extras it had.
    every_extra = sorted(set(extras) | _stamped_extras(venv))
    (venv / STAMP).unlink(missing_ok=True)
    (venv / UNFINISHED).touch()
    _install(python, every_extra, unpinned, venv)
    (venv / STAMP).write_text(json.dumps({"key": key, "extras": every_extra}, indent=1) + "\n", encoding="utf-8")
    (venv / UNFINISHED).unlink()
    return python


def _stamped_extras(venv: Path) -> set[str]:
    try:
        return set(json.loads((venv / STAMP).read_text(encoding="utf-8"))["extras"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _interpreter_version(python: Path) -> str | None:
    """Ask an interpreter for its version; None where it does not run or has no pip."""
    question = "import pip, sys; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        answer = subprocess.run([str(python), "-c", question], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _make_venv(venv: Path) -> None:
    if Path(sys.prefix).resolve() == venv.resolve():
        raise SetupError(
            f"the environment in {shown(venv)} is incomplete and cannot be mended by its own Python. "
            "Start this script with the Python that is installed on the machine."
        )
    if venv.exists():
        print(f"environment: {shown(venv)} is incomplete, making it anew")
        shutil.rmtree(venv)
    else:
        print(f"environment: making {shown(venv)} with Python {sys.version.split()[0]}")
    venv.mkdir(parents=True)
    (venv / UNFINISHED).touch()
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if made.returncode != 0:
        major, minor = sys.version_info[:2]
        raise SetupError(
            f"{(made.stdout + made.stderr).strip()}\n"
            f"Python's module venv cannot make an environment in {shown(venv)}. On Debian and Ubuntu it is a package "
            f"of its own: sudo apt install python{major}.{minor}-venv. Elsewhere reinstall Python with pip included."
        )


def install_command(python: Path, extras: Sequence[str], unpinned: bool) -> list[str]:
    """Write pip's command line.

    Args:
        python: the environment's interpreter.
        extras: names from ``[project.optional-dependencies]``.
        unpinned: leave constraints.txt out.

    Returns:
        Program and arguments.
    """
    project = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--editable", project]
    return command if unpinned else [*command, "--constraint", str(ROOT / "constraints.txt")]


def _install(python: Path, extras: Sequence[str], unpinned: bool, venv: Path) -> None:
    names = ", ".join(extras) or "no extras"
    print(f"installing the project ({names}); the first time it fetches some 3 GB and takes a few minutes", flush=True)
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=PIP_TAIL_LINES)
    with (venv / "install.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            install_command(python, extras, unpinned),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                log.write(line)
                tail.append(line)
                if line.lstrip().startswith(SHOWN_PIP_LINES):
                    print(f"  {line.strip()[:110]}", flush=True)
    if process.returncode != 0:
        raise SetupError(
            "pip could not install the project. Its last lines:\n"
            f"{''.join(tail)}"
            f"The whole output is in {shown(venv / 'install.log')}. What to do: no connection or an unreachable index: "
            "try again when it is back (what was fetched is kept). No space left: free about 12 GB. "
            "No matching distribution for this machine: add --unpinned, or use Python 3.11."
        )
    print(f"installed in {time.monotonic() - start:.0f} s")
