"""Connections whose other end may be gone without a word."""

from __future__ import annotations

import socket
from typing import Any

# Idle seconds, seconds between probes, probes: a host that is gone is noticed in ten seconds.
_OPTIONS = {socket.TCP_KEEPIDLE: 4, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}


def keep_alive(connection: Any) -> None:
    """Let the kernel probe the other end of a TCP socket (or asyncio's view of one) while it is idle."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _OPTIONS.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
