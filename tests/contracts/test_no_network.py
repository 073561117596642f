"""The suite itself: no test, and no program that a test starts, can reach the network."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

# A documentation address (RFC 5737): nothing answers there even where a network is.
FOREIGN = ("192.0.2.1", 80)


def test_a_test_cannot_connect_to_another_machine() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client,
        pytest.raises(OSError, match=r"no network.*192\.0\.2\.1"),
    ):
        client.connect(FOREIGN)


def test_a_test_cannot_look_up_a_name() -> None:
    with pytest.raises(OSError, match=r"no network.*example\.org"):
        socket.getaddrinfo("example.org", 443)


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_a_started_program_cannot_connect_either() -> None:
    program = f"import socket; socket.socket().connect({FOREIGN!r})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "the tests use no network" in ended.stderr
