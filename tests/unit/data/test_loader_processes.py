from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest

from ldm.data.loader_processes import LoaderDeathError, LoaderProcesses

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="Windows has no such signal")


@pytest.fixture
def process() -> Iterator[BaseProcess]:
    """A process that has nothing to do; the signal's handler is put back afterwards."""
    before = signal.getsignal(signal.SIGCHLD)
    started = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    started.start()
    yield started
    started.kill()
    started.join()
    signal.signal(signal.SIGCHLD, before)


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)


def kill_and_wait(process: BaseProcess) -> None:
    kill(process)
    process.join()


def test_a_death_in_the_middle_of_a_step_raises_when_the_next_batch_is_awaited(process: BaseProcess) -> None:
    processes = LoaderProcesses([process])
    kill_and_wait(process)
    with pytest.raises(LoaderDeathError) as raised, processes.awaiting():
        pytest.fail("nothing can be awaited of the dead")
    assert (raised.value.process_id, raised.value.exit_code) == (process.pid, -signal.SIGKILL)


def test_a_death_while_a_batch_is_awaited_raises_at_once(process: BaseProcess) -> None:
    processes = LoaderProcesses([process])

    def wait() -> None:
        with processes.awaiting():
            kill(process)
            time.sleep(30)

    began = time.monotonic()
    with pytest.raises(LoaderDeathError):
        wait()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("lost", [ConnectionResetError, EOFError, FileNotFoundError, RuntimeError])
def test_a_batch_that_is_lost_with_its_process_is_told_as_that_ones_death(
    process: BaseProcess, lost: type[Exception]
) -> None:
    processes = LoaderProcesses([process])

    def wait() -> None:
        with processes.awaiting():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            kill_and_wait(process)
            raise lost

    with pytest.raises(LoaderDeathError):
        wait()


def test_other_failures_come_through(process: BaseProcess) -> None:
    with pytest.raises(RuntimeError, match="the toy broke"), LoaderProcesses([process]).awaiting():
        raise RuntimeError("the toy broke")
