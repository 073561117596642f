"""Run the whole test suite in the project's own environment: ``python scripts/run_tests.py [pytest arguments]``.

No GPU and no network are used. To run the tests marked ``gpu`` on a machine that has one:
``CUDA_VISIBLE_DEVICES=0 python scripts/run_tests.py -m gpu``. Standard library only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

from environment import SetupError, ensure_environment, run_live

# A file's tests share what is dear to build. One thread each: there is a process for every core.
PARALLEL: Final = ("-n", "auto", "--dist", "loadfile")
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_variables() -> dict[str, str]:
    """Choose the variables that keep tests off the network and, unless asked otherwise, off the GPU.

    Returns:
        Variables to set for pytest.
    """
    return {**OFFLINE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}


def main(argv: Sequence[str] | None = None) -> int:
    """Install the test extras where needed and run pytest.

    Args:
        argv: arguments; ``--unpinned`` is ours, all others go to pytest. None reads the command line.

    Returns:
        pytest's exit status, or 1 where the environment cannot be made.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    unpinned = "--unpinned" in arguments
    try:
        python = ensure_environment(["test"], unpinned=unpinned)
    except (SetupError, OSError) as problem:
        print(f"run_tests: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run_tests: stopped; run it again to go on", file=sys.stderr)
        return 130
    passed_on = [argument for argument in arguments if argument != "--unpinned"]
    return run_live([python, "-m", "pytest", *PARALLEL, *passed_on], test_variables())


if __name__ == "__main__":
    sys.exit(main())
