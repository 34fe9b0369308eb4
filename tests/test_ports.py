"""Ports that an engine binds seconds after they were chosen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.errors import EnvironmentProblem
from cluster.ports import free_ports


def test_they_are_free_and_no_client_gets_them() -> None:
    ports = free_ports("127.0.0.1", 20)
    assert len(set(ports)) == 20
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(20_000 <= port < first for port in ports)
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_there_are_some_where_the_kernel_gives_all_to_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ports._first_ephemeral_port", lambda: 1024)
    assert all(20_000 <= port < 32_768 for port in free_ports("127.0.0.1", 3))


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(EnvironmentProblem, match=r"at 192\.0\.2\.1"):
        free_ports("192.0.2.1", 1)
