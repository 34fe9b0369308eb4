"""What vLLM's prefix cache stores and evicts, as the changes that routers are told of.

vLLM publishes its KV events on a ZeroMQ socket, numbered, and drops what a slow subscriber can't take. A gap
is noticed by the numbers: then nothing that was known is sure any more, and all of it is forgotten.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from cluster import vllm_api
from cluster.block_names import BlockChanges, BlockNames
from cluster.ports import free_ports
from cluster.wire import Blocks

logger = logging.getLogger(__name__)

# Places of a block by vLLM's words, which says GPU for an engine's own memory, on a CPU too.
_OWN = 1
_PLACES = {None: _OWN, "GPU": _OWN, "CPU": 2}
_ELSEWHERE = 4
# Blocks that leave a sliding window say nothing of those that the other layers keep.
_WHOLE_PROMPT_KINDS = (None, "full_attention", "sink_full_attention", "mla_attention")


def _of_rank(endpoint: str, rank: int) -> str:
    """Where a data-parallel rank publishes: vLLM adds its number to the port."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + rank}" if rank else endpoint


class VllmKvEvents:
    """Subscribes to one engine's events.

    Attributes:
        config: vLLM's `KVEventsConfig` of the engine: where it shall publish them.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        """
        Args:
            options: of the engine. If others shall have its events too, they name where; we listen there.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="pdserve-kv-", ignore_cleanup_errors=True)
        rank = options.get("data_parallel_rank") or 0
        endpoint = f"ipc://{Path(self._directory.name) / 'events'}"
        if rank:  # vLLM gives each rank an endpoint of its own, and can't do that with a file
            endpoint = f"tcp://127.0.0.1:{free_ports('127.0.0.1', 1)[0] - rank}"
        ours = {"enable_kv_cache_events": True, "endpoint": endpoint}
        given = options.get("kv_events_config")
        self.config = vllm_api.KVEventsConfig(**(given or ours))
        # vLLM listens at files and at `*`, and connects to any other address.
        self._listens = bool(rank) and not given
        self._endpoint = _of_rank(self.config.endpoint.replace("*", "127.0.0.1"), rank)
        self._decoder = msgspec.msgpack.Decoder(vllm_api.KVEventBatch)
        self._names = BlockNames()
        # Where a block is that can be found by name, a bit for each place.
        self._places: dict[Any, int] = {}
        self._changes = BlockChanges()
        self._next = 0
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.SUB)

    def open(self) -> None:
        """Subscribe. The engine may begin later."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.subscribe(self.config.topic)
        if self._listens:
            self._socket.bind(self._endpoint)
        else:
            self._socket.connect(self._endpoint)

    async def changes(self) -> Blocks:
        """The next changes, as many as have come."""
        while not self._changes:
            self._take(await self._socket.recv_multipart())
        while await self._socket.poll(0):
            self._take(await self._socket.recv_multipart())
        return self._changes.take()

    def close(self) -> None:
        """Leave, and remove what was made."""
        self._context.destroy(linger=0)
        self._directory.cleanup()

    def _take(self, frames: list[bytes]) -> None:
        _, number, payload = frames
        found = int.from_bytes(number, "big")
        if found != self._next:
            logger.warning("lost %d batches of KV events: the prefix index begins anew", found - self._next)
            self._clear()
        self._next = found + 1
        for event in self._decoder.decode(payload).events:
            self._apply(event)

    def _apply(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "AllBlocksCleared":
            self._changes.removed(self._names.removed(self._gone(list(self._places), _OWN)))
        elif kind == "BlockRemoved":
            self._changes.removed(self._names.removed(self._left(event)))
        elif (place := _PLACES.get(event.medium, _ELSEWHERE)) != _OWN:
            # What comes from another instance's files is there before it is in the engine, and named.
            for key in _keys(event):
                self._places[key] = self._places.get(key, 0) | place
        elif event.kv_cache_spec_kind in _WHOLE_PROMPT_KINDS and not _follows_from_more(event):
            before = event.parent_block_hash
            key_before = None if before is None else (event.group_idx, before)
            stored = self._names.stored(_keys(event), key_before, event.token_ids, event.block_size)
            self._changes.stored(stored)
            for key in _keys(event):
                self._places[key] = self._places.get(key, 0) | _OWN

    def host_is_empty(self) -> None:
        """Nothing is left but in the engine's own memory."""
        self._changes.removed(self._names.removed(self._gone(list(self._places), ~_OWN)))

    def _left(self, event: Any) -> Iterator[Any]:
        """Blocks that are nowhere any more."""
        return self._gone(_keys(event), _PLACES.get(event.medium, _ELSEWHERE))

    def _gone(self, keys: Iterable[Any], place: int) -> Iterator[Any]:
        for key in keys:
            if left := self._places.get(key, 0) & ~place:
                self._places[key] = left
            elif self._places.pop(key, 0):
                yield key

    def _clear(self) -> None:
        self._places.clear()
        self._names.clear()
        self._changes.clear()


def _keys(event: Any) -> list[tuple[int | None, Any]]:
    return [(event.group_idx, name) for name in event.block_hashes]


def _follows_from_more(event: Any) -> bool:
    """Whether its blocks' KV follows from more than their tokens."""
    return event.lora_name is not None or any(event.extra_keys or ())
