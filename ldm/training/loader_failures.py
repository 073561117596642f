"""What it means to the user that a loader process died, or could not get what it needs."""

from __future__ import annotations

import errno
import os
import re
import signal
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

NOT_ENOUGH_MEMORY: Final = (errno.ENOMEM, errno.EAGAIN)
MORE_SHARED_MEMORY: Final = "give it more (Docker: --shm-size=8g)"
NO_PROCESSES: Final = "data.params.num_workers=0"
TOO_MANY_FILES: Final = ("Too many open files", "received 0 items of ancdata")

_DEATH: Final = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*)", re.DOTALL)
_SIGNAL: Final = re.compile(r"is killed by signal: ([^.]+)\.")
_EXIT: Final = re.compile(r"exit code (\d+)")
_FROM_WORKER: Final = re.compile(r"Caught \w+ in DataLoader worker process")


def explain_loader_failure(error: Exception, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Word a failure of the loader processes themselves, not of what they read.

    Args:
        error: what awaiting a batch raised.
        config: the merged configuration.

    Returns:
        What happened, with the likely reason and remedy; and what to add to the command that continues the run, empty
        where nothing. None where the failure is another.
    """
    text = str(error)
    fewer = _fewer(config)
    lower = f"lower data.params.num_workers ({_number_now(config)} now)"
    exit_code = getattr(error, "exit_code", None)
    if isinstance(error, ChildProcessError) and exit_code is not None:
        name = signal.Signals(-exit_code).name if exit_code < 0 else None
        return _word_death(str(getattr(error, "process_id", "")), name, exit_code, lower, fewer)
    deaths = [found for found in map(_DEATH.search, _texts_of_runtime_errors(error)) if found is not None]
    if deaths:
        # That a process died is noticed twice, and the first notice knows more.
        code = _EXIT.search(deaths[-1].group(2))
        name = _signal_name(deaths[-1].group(2))
        return _word_death(deaths[-1].group(1), name, int(code.group(1)) if code else 0, lower, fewer)
    if _is_lack_of_shared_memory(text):
        return f"a loader process got no shared memory (/dev/shm is full): {MORE_SHARED_MEMORY}, or {lower}", fewer
    if any(words in text for words in TOO_MANY_FILES):
        return f"the loader processes hit the limit of open files: type ulimit -n 65536 first, or {lower}", fewer
    if isinstance(error, MemoryError) and _FROM_WORKER.match(text):
        return f"a loader process found no host memory for a picture: close other programs, or {lower}", fewer
    if isinstance(error, OSError) and error.errno in NOT_ENOUGH_MEMORY and _is_from_starting_processes(error):
        return f"a loader process could not be started ({error.strerror}): close other programs, or {lower}", fewer
    return None


def _texts_of_runtime_errors(error: BaseException | None) -> list[str]:
    """List what an error says, and the errors that it comes from, as far as they are such as torch raises."""
    texts = []
    while isinstance(error, RuntimeError):
        texts.append(str(error))
        error = error.__cause__
    return texts


def _word_death(processes: str, name: str | None, exit_code: int, lower: str, fewer: str) -> tuple[str, str]:
    """Say which process died, of which signal if of one, and why that may be."""
    if name == "SIGBUS":
        likely = f"most likely the shared memory (/dev/shm) is full: {MORE_SHARED_MEMORY}, or {lower}"
        return f"loader process {processes} died of SIGBUS; {likely}", fewer
    if name == "SIGKILL":
        likely = f"most likely the host memory ran out (dmesg tells): close other programs, or {lower}"
        return f"loader process {processes} was killed (SIGKILL); {likely}", fewer
    if name is not None:
        likely = "a fault in a library that reads pictures, or in the memory; without loader processes it shows where"
        return f"loader process {processes} died of {name}: {likely}", NO_PROCESSES
    ended = f"ended with exit code {exit_code}" if exit_code else "ended unexpectedly"
    likely = f"if nobody ended it, the host memory may have run out (dmesg tells): {lower}"
    return f"loader process {processes} {ended}; {likely}", fewer


def _signal_name(how: str) -> str | None:
    """Find the signal that a description names; None where it names none."""
    found = _SIGNAL.search(how)
    if found is None:
        return None
    names = {signal.strsignal(number): number.name for number in signal.Signals}
    return names.get(found.group(1).strip(), found.group(1).strip())


def _is_lack_of_shared_memory(text: str) -> bool:
    return "unable to allocate shared memory" in text or ("/torch_" in text and "No space left on device" in text)


def _is_from_starting_processes(error: BaseException) -> bool:
    """Tell whether an error comes out of Python's own code that starts processes."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "multiprocessing" in Path(frames[-1].filename).parts


def _number_now(config: Mapping[str, Any]) -> int:
    """Give the number of loader processes, as the data module chooses it where the configuration does not."""
    params = config["data"]["params"]
    said = params.get("num_workers")
    return min(params["batch_size"] * 2, os.cpu_count() or 1) if said is None else int(said)


def _fewer(config: Mapping[str, Any]) -> str:
    """Say which smaller number of loader processes to try."""
    return f"data.params.num_workers={_number_now(config) // 2}"
