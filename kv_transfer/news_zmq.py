"""How a source of KV tells readers how far their prompts are: one-way messages, and one lost does no harm."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import msgspec
import zmq

from kv_transfer.early_read import Progress

logger = logging.getLogger(__name__)

# Readers that a source keeps a connection to; one more takes the place of the one it wrote to longest ago.
MOST_READERS = 1024


class NewsSender:
    """A source's way to any number of readers. Never waits: what can't be sent now is dropped, and told again
    with the next chunk."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def send(self, address: str, progress: Progress) -> None:
        socket = self._sockets.pop(address, None)
        if socket is None:
            if len(self._sockets) >= MOST_READERS:
                self._sockets.pop(next(iter(self._sockets))).close(linger=0)
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)
        self._sockets[address] = socket
        try:
            socket.send(msgspec.msgpack.encode(progress), flags=zmq.DONTWAIT)
        except zmq.Again:
            logger.debug("news for %s dropped: nobody reads there", address)

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close(linger=0)
        self._sockets.clear()
        self._context.term()


class NewsListener:
    """Where a reader hears of prompts that are computed elsewhere."""

    def __init__(self, address: str) -> None:
        """Raises zmq.ZMQError when the address is taken."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)

    def news(self) -> Iterator[Progress]:
        """What has come; never waits."""
        while True:
            try:
                message = self._socket.recv(flags=zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                yield msgspec.msgpack.decode(message, type=Progress)
            except msgspec.MsgspecError as error:
                logger.error("dropped news that can't be read: %s", error)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
