"""NixlTransport: reads with NIXL over UCX, which takes RDMA, CUDA IPC, shared memory or TCP."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy
from nixl._api import nixl_agent, nixl_agent_config
from numpy.typing import NDArray

from kv_transfer.nixl_progress import calm_progress_thread
from kv_transfer.plan import Runs
from kv_transfer.transport import Region, Transfer, TransferFailed, are_on_gpu

NAME = "nixl"
# NIXL tells of an end only when it is asked. Short reads are asked for often, long ones less and less.
_FIRST_ASK_S, _LAST_ASK_S = 20e-6, 1e-3


class NixlPeer(msgspec.Struct, array_like=True):
    """An agent's metadata and its regions: address and GPU, -1 for main memory. `agent` is its name here."""

    metadata: bytes
    addresses: list[int]
    devices: list[int]
    agent: str = ""


class NixlTransport:
    """One NIXL agent. Any thread may post; one thread sees to ends, and sleeps when nothing is on its way."""

    name = NAME

    def __init__(self, *, threads: int = 0) -> None:
        """
        Args:
            threads: of UCX, 0 for its default.
        """
        calm_progress_thread()
        config = nixl_agent_config(backends=["UCX"], **({"num_threads": threads} if threads else {}))
        self._agent: Any = nixl_agent(str(uuid.uuid4()), config)
        self._mine = NixlPeer(b"", [], [])
        self._registered: list[Any] = []
        self._posted: list[tuple[Any, Transfer]] = []
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="nixl-transport", daemon=True)
        self._thread.start()

    def register(self, regions: Sequence[Region]) -> bytes:
        """See `Transport`; all regions are in main memory, or all on GPUs."""
        rows = [(r.address, r.size, r.device or 0, "") for r in regions]
        descriptors = self._agent.get_reg_descs(rows, "VRAM" if are_on_gpu(regions) else "DRAM")
        self._registered.append(self._agent.register_memory(descriptors))
        self._mine = NixlPeer(
            self._agent.get_agent_metadata(),
            [r.address for r in regions],
            [-1 if r.device is None else r.device for r in regions],
        )
        return msgspec.msgpack.encode(self._mine)

    def connect(self, described: bytes) -> NixlPeer:
        """See `Transport`."""
        peer = msgspec.msgpack.decode(described, type=NixlPeer)
        try:
            name = self._agent.add_remote_agent(peer.metadata)
        except Exception as error:  # NIXL's binding raises its own kinds, one for each status
            raise _failed(error) from error
        peer.agent = name.decode() if isinstance(name, bytes) else str(name)
        return peer

    def read(self, peer: NixlPeer, runs: Runs) -> Transfer:
        """See `Transport`."""
        transfer = Transfer()
        try:
            theirs = self._descriptors(peer, runs.source_region, runs.source_offset, runs.size)
            mine = self._descriptors(self._mine, runs.target_region, runs.target_offset, runs.size)
            handle = self._agent.initialize_xfer("READ", mine, theirs, peer.agent)
            state = self._agent.transfer(handle)
        except Exception as error:
            transfer.settle(_failed(error))
            return transfer
        with self._news:
            if state in ("DONE", "ERR"):
                self._settle(handle, transfer, state)
            else:
                self._posted.append((handle, transfer))
                self._news.notify()
        return transfer

    def disconnect(self, peer: NixlPeer) -> None:
        """See `Transport`."""
        self._agent.remove_remote_agent(peer.agent)

    def close(self) -> None:
        """See `Transport`."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()
        for handle, transfer in self._posted:
            self._agent.release_xfer_handle(handle)
            transfer.settle(TransferFailed(transport=NAME, detail="the transport was closed"))
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._posted, self._registered = [], []

    def _descriptors(
        self,
        of: NixlPeer,
        region: NDArray[numpy.int64],
        offset: NDArray[numpy.int64],
        size: NDArray[numpy.int64],
    ) -> Any:
        table = numpy.empty((len(size), 3), dtype=numpy.uint64)
        table[:, 0] = numpy.array(of.addresses, dtype=numpy.uint64)[region] + offset.astype(numpy.uint64)
        table[:, 1] = size
        table[:, 2] = numpy.maximum(numpy.array(of.devices), 0)[region]
        return self._agent.get_xfer_descs(table, "DRAM" if of.devices[0] < 0 else "VRAM")

    def _watch(self) -> None:
        pause_s = _FIRST_ASK_S
        while True:
            with self._news:
                while not self._posted and not self._closed:
                    self._news.wait()
                    pause_s = _FIRST_ASK_S
                if self._closed:
                    return
                left = []
                for handle, transfer in self._posted:
                    try:
                        state = self._agent.check_xfer_state(handle)
                    except Exception as error:
                        transfer.settle(_failed(error))
                        continue
                    if state in ("DONE", "ERR"):
                        self._settle(handle, transfer, state)
                    else:
                        left.append((handle, transfer))
                pause_s = _FIRST_ASK_S if len(left) < len(self._posted) else min(2 * pause_s, _LAST_ASK_S)
                self._posted = left
            time.sleep(pause_s)

    def _settle(self, handle: Any, transfer: Transfer, state: str) -> None:
        self._agent.release_xfer_handle(handle)
        transfer.settle(None if state == "DONE" else _failed("NIXL reports an error"))


def _failed(why: object) -> TransferFailed:
    return TransferFailed(transport=NAME, detail=str(why) or type(why).__name__)
