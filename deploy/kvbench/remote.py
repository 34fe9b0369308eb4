"""Memory of another machine to be read: one serves it, the other asks for it, over one TCP connection.

A JSON line each way, and then the connection is the lease: the memory is there until it closes.
"""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from cluster.errors import EnvironmentProblem, ServingError
from cluster.keep_alive import keep_alive
from cluster.spec import TransportName

# Given sizes, transport and device: what the transport describes of such memory, and the address at which
# this machine is reached from there.
Source = Callable[[tuple[int, ...], TransportName, str], AbstractContextManager[tuple[bytes, str]]]

BETWEEN_MACHINES = ("nixl", "torch")
CONNECT_S, ANSWER_S = 10.0, 90.0
# Of a line: what an agent says of itself is some kilobytes.
MOST_LINE_BYTES = 1 << 24


def address_of(word: str) -> tuple[str, int]:
    """HOST:PORT. Raises ValueError for a word that is none."""
    host, sign, port = word.rpartition(":")
    if not sign or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{word!r}, expected HOST:PORT")
    return host, int(port)


def serve(
    address: tuple[str, int],
    source: Callable[[str], Source],
    say: Callable[[str], None],
    *,
    times: int | None = None,
) -> None:
    """Give memory to whoever asks, one after the other, until interrupted.

    Args:
        address: at which the other machine reaches this one, and its port.
        source: of this host's address, what makes memory.
        times: to serve; None for ever.

    Raises EnvironmentProblem where the address can't be listened at.
    """
    host, port = address
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise EnvironmentProblem(
            problem=f"{host}:{port} can't be listened at ({error.strerror})",
            remedy="give an address of this machine that the other reaches, and a free port",
        ) from None
    with listening:
        say(f"on the other machine: pdserve kvbench --from {host}:{port}")
        served = 0
        while times is None or served < times:
            connection, (there, _) = listening.accept()
            served += 1
            with connection:
                try:
                    _give(connection, source(host), f"{there}: ", say)
                except (OSError, ValueError, KeyError) as error:
                    say(f"{there}: {error}")


def _give(connection: socket.socket, source: Source, who: str, say: Callable[[str], None]) -> None:
    connection.settimeout(ANSWER_S)
    asked = _receive(connection)
    sizes, transport, device = tuple(map(int, asked["sizes"])), asked["transport"], asked["device"]
    if transport not in BETWEEN_MACHINES or device not in ("cpu", "cuda"):
        _send(connection, {"error": f"it has {' and '.join(BETWEEN_MACHINES)}, not {transport} for {device}"})
        return
    say(f"{who}{sum(sizes) / 2**20:,.0f} MiB for {transport}")
    try:
        with source(sizes, transport, device) as (described, _):
            _send(connection, {"described": base64.b64encode(described).decode()})
            connection.settimeout(None)
            keep_alive(connection)
            connection.recv(1)  # ends when the other closes, or is gone
    except ServingError as error:
        _send(connection, {"error": str(error)})


def source_at(address: tuple[str, int]) -> Source:
    """Memory of the machine that serves there. Raises EnvironmentProblem, when it is asked for."""

    @contextmanager
    def ask(sizes: tuple[int, ...], transport: TransportName, device: str) -> Iterator[tuple[bytes, str]]:
        where = f"{address[0]}:{address[1]}"
        try:
            connection = socket.create_connection(address, timeout=CONNECT_S)
        except OSError as error:
            raise EnvironmentProblem(
                problem=f"nobody serves memory at {where} ({error.strerror or error})",
                remedy=f"run `pdserve kvbench --serve {where}` on that machine",
            ) from None
        with connection:
            connection.settimeout(ANSWER_S)
            try:
                _send(connection, {"sizes": sizes, "transport": transport, "device": device})
                answer = _receive(connection)
            except (OSError, ValueError) as error:
                raise EnvironmentProblem(
                    problem=f"{where} did not answer ({error})", remedy="see what it wrote there"
                ) from None
            if "error" in answer:
                raise EnvironmentProblem(problem=f"at {where}: {answer['error']}", remedy="mend it there")
            yield base64.b64decode(answer["described"]), connection.getsockname()[0]

    return ask


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Raises ValueError for what is no message."""
    with connection.makefile("rb") as lines:
        line = lines.readline(MOST_LINE_BYTES)
    message = json.loads(line) if line.endswith(b"\n") else None
    if not isinstance(message, dict):
        raise ValueError("it sent no whole message")
    return message
