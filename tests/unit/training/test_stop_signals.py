from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from ldm.training.stop_signals import Interrupted, StopSignals

HANDLED = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_ends_what_nobody_can_save(number: int) -> None:
    with pytest.raises(Interrupted) as stop, StopSignals():
        signal.raise_signal(number)
    assert stop.value.exit_code == 128 + number


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_a_request_while_training(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals:
        signals.deferred = True
        signal.raise_signal(number)
        assert signals.requested == number
    assert "saving" in capfd.readouterr().err


def test_a_second_signal_ends_at_once() -> None:
    with StopSignals() as signals:
        signals.deferred = True
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    with StopSignals() as signals:
        signals.install()
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="loader processes are not forked here")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, signal.SIGTERM)])
def test_a_forked_loader_process_outlives_ctrl_c_and_not_sigterm(number: int, status: int) -> None:
    with StopSignals() as signals:
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(told, b".")
            time.sleep(0.3)
            os._exit(0 if signals.requested is None else 9)
        os.read(ready, 1)
        os.kill(child, number)
        _, ended = os.waitpid(child, 0)
        assert ended == status
