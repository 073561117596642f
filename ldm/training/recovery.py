"""Which checkpoint of a run can be trusted to continue from."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ldm.checkpoint import read_checkpoint

logger = logging.getLogger(__name__)


def newest_valid_checkpoint(last: Path) -> Path:
    """Find the newest checkpoint of a run that is whole and holds what continuing needs.

    ``last.ckpt`` comes first, then the others by the step that they reached. Each one that is damaged, and
    was to be used, is named in the log.

    Args:
        last: the run's ``last.ckpt``, beside which the others lie; it may be missing.

    Returns:
        The checkpoint. All of it has been compared with its checksums.

    Raises:
        FileNotFoundError: there is no checkpoint at all.
        ValueError: none can be used, with a line for each.
    """
    problems: list[str] = []
    if last.is_file():
        problem = _problem(last)
        if problem is None:
            return last
        problems.append(problem)
    others = [path for path in last.parent.glob("*.ckpt") if path.name != last.name]
    if not others and not problems:
        raise FileNotFoundError(f"no checkpoint (*.ckpt) in {last.parent}")
    judged = [last] if problems else []
    for path in sorted(others, key=_age, reverse=True):
        if any(os.path.samefile(path, each) for each in judged):
            continue  # another name of a file that was found damaged
        judged.append(path)
        problem = _problem(path)
        if problem is None:
            for line in problems:
                logger.warning("%s", line)
            if problems:
                logger.warning("continuing from %s instead", path)
            return path
        problems.append(problem)
    problems.append(f"no checkpoint in {last.parent} can be continued")
    raise ValueError("\n".join(problems))


def refuse_weights_alone(path: Path) -> None:
    """See that a checkpoint holds what continuing needs. Its tensors are not read.

    Args:
        path: the file.

    Raises:
        ValueError: it is damaged, or holds weights without the optimiser.
        OSError: it cannot be opened.
    """
    problem = _problem(path, verify=False)
    if problem is not None:
        raise ValueError(problem)


def _problem(path: Path, verify: bool = True) -> str | None:
    """Read a checkpoint; gives what keeps it from being continued."""
    try:
        content = read_checkpoint(path, verify)
    except (ValueError, OSError) as error:
        return str(error)
    if "optimizer_states" not in content:
        return (
            f"checkpoint '{path}' holds the weights alone, without the optimiser, and cannot be continued; name"
            " another one of the run, or start a new run from its weights with --actual_resume"
        )
    return None


def _age(path: Path) -> tuple[int, int]:
    """Tell newer checkpoints from older ones: by step, and where that does not tell, by when they were written."""
    try:
        step = read_checkpoint(path, verify=False).get("global_step")
    except (ValueError, OSError):
        step = None  # that it is damaged is said when its turn comes
    return (step if isinstance(step, int) else -1, path.stat().st_mtime_ns)
