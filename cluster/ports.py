"""TCP ports for what an engine binds, seconds after they were chosen."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

from cluster.errors import EnvironmentProblem

# Below are those of well-known services, Ray's and vLLM's defaults among them.
_FIRST_PORT = 20_000
# From where on Linux gives ports to clients, unless told otherwise; and how many are enough to draw from.
_FIRST_EPHEMERAL_PORT = 32_768
_ENOUGH_PORTS = 1000


def free_ports(host: str, count: int) -> list[int]:
    """So many TCP ports of `host` that are free now, and as far as it is set up like that, that the kernel
    gives to nobody who asks for any: seconds pass until an engine binds them. Raises EnvironmentProblem where
    there are none."""
    first, end = _FIRST_PORT, _first_ephemeral_port()
    if end < first + _ENOUGH_PORTS:
        end = _FIRST_EPHEMERAL_PORT
    ports: list[int] = []
    for port in random.sample(range(first, end), end - first):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            ports.append(port)
            if len(ports) == count:
                return ports
    raise EnvironmentProblem(
        problem=f"no {count} free TCP ports from {first} to {end - 1} at {host}",
        remedy="check that it is an address of this machine, and what listens there",
    )


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return _FIRST_EPHEMERAL_PORT
