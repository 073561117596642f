"""Cuts a Python process off from the network: Python imports this file at start where its folder is on PYTHONPATH.

``tests/conftest.py`` puts it there, so that the programs which end-to-end tests start are cut off as well.
Loopback addresses and Unix sockets stay open: data loader workers and process groups need them.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex
_getaddrinfo = socket.getaddrinfo


def is_local(host: str | bytes | None) -> bool:
    """Tell whether a host name or address means this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(name).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(host: object) -> None:
    raise OSError(f"the tests use no network, and something tried to reach {host!r}")


def _guard(family: int, address: Any) -> None:
    if family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
        refuse(address[0])


def _offline_connect(self: socket.socket, address: Any) -> None:
    _guard(self.family, address)
    _connect(self, address)


def _offline_connect_ex(self: socket.socket, address: Any) -> int:
    _guard(self.family, address)
    return _connect_ex(self, address)


def _offline_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_local(host):
        refuse(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = _offline_connect
socket.socket.connect_ex = _offline_connect_ex
socket.getaddrinfo = _offline_getaddrinfo
