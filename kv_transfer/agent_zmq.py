"""ReadAgent: any `Transport` behind the face of a NIXL agent, as vLLM's connector uses it.

vLLM's NIXL connector knows of NIXL only an agent, and uses 17 of its methods. With another agent of the same
face it keeps what it can: different tensor parallelism on both sides, sliding windows, leases, statistics.
What a `Transport` lacks are notes between agents; those go over ZeroMQ.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy
import zmq
from numpy.typing import NDArray

from kv_transfer.plan import Runs
from kv_transfer.transport import Peer, Region, Transfer, TransferFailed, TransferState, Transport

# Name of the agent itself where descriptors are prepared, as in NIXL.
OWN = "NIXL_INIT_AGENT"
Rows = NDArray[numpy.uint64]


class _Card(msgspec.Struct, array_like=True):
    """What an agent tells others: where it takes notes, and what its transport described of which regions."""

    name: str
    transport: str
    endpoint: str
    described: bytes
    begins: list[int]
    sizes: list[int]


@dataclass(frozen=True, slots=True)
class _Places:
    """Descriptors of one agent: region, offset in it and bytes, [n] each."""

    agent: str
    region: NDArray[numpy.int64]
    offset: NDArray[numpy.int64]
    size: NDArray[numpy.int64]


@dataclass(slots=True)
class _Read:
    """A read, made and perhaps begun. `note` is sent to its source when it is done."""

    source: str
    runs: Runs
    note: bytes
    transfer: Transfer | None = None
    begun_s: float = 0.0
    posted_s: float = 0.0
    ended_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Telemetry:
    """As NIXL's: microseconds and bytes."""

    xferDuration: float
    postDuration: float
    totalBytes: int
    descCount: int


class ReadAgent:
    """Methods, arguments and answers are NIXL's (`nixl_agent`, 1.5), as far as vLLM 0.32 uses them.

    Descriptors are arrays [n, 3] of address, bytes and device, or tuples that begin so.
    """

    def __init__(self, name: str, transport: Transport, host: str = "127.0.0.1") -> None:
        """
        Args:
            host: address of this machine at which other agents reach it.
        """
        self._name, self._transport = name, transport
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._endpoint = f"tcp://{host}:{self._inbox.bind_to_random_port(f'tcp://{host}')}"
        self._described = b""
        self._regions: list[Region] = []
        self._cards: dict[str, _Card] = {}
        self._peers: dict[str, Peer] = {}
        self._outboxes: dict[str, zmq.Socket[bytes]] = {}
        self._handles: dict[int, _Places | _Read] = {}
        self._last_handle = 0
        # vLLM connects in a thread of its own.
        self._lock = threading.RLock()

    # --- memory

    def get_reg_descs(self, rows: Sequence[tuple[Any, ...]], mem_type: str | None = None) -> list[Region]:
        """Regions to be registered."""
        on_gpu = mem_type == "VRAM"
        return [Region(address=int(r[0]), size=int(r[1]), device=int(r[2]) if on_gpu else None) for r in rows]

    def register_memory(self, regions: list[Region], backends: Sequence[str] = ()) -> list[Region]:
        """Let others read these, too."""
        # In the order of addresses, in which descriptors are looked up.
        self._regions = sorted([*self._regions, *regions], key=lambda region: region.address)
        self._described = self._transport.register(self._regions)
        return regions

    def deregister_memory(self, regions: list[Region]) -> None:
        """Nothing is read any more once the agent's memory is given back."""
        with self._lock:
            if self._regions:
                self._regions = []
                self._transport.close()
                for outbox in self._outboxes.values():
                    outbox.close(linger=100)
                self._inbox.close(linger=0)
                self._outboxes = {}

    # --- other agents

    def get_agent_metadata(self) -> bytes:
        """What another needs for `add_remote_agent`."""
        card = _Card(
            self._name,
            self._transport.name,
            self._endpoint,
            self._described,
            [region.address for region in self._regions],
            [region.size for region in self._regions],
        )
        return msgspec.msgpack.encode(card)

    def add_remote_agent(self, metadata: bytes) -> str:
        """Returns its name. Raises TransferFailed for one that can't be reached, or has another transport."""
        try:
            card = msgspec.msgpack.decode(metadata, type=_Card)
        except msgspec.DecodeError:
            raise self._failed("the other's agent is not one of this transport") from None
        if card.transport != self._transport.name:
            raise self._failed(f"the other's transport is {card.transport}")
        peer = self._transport.connect(card.described)
        with self._lock:
            outbox = self._context.socket(zmq.PUSH)
            outbox.connect(card.endpoint)
            self._cards[card.name], self._peers[card.name] = card, peer
            self._outboxes[card.name] = outbox
        return card.name

    def remove_remote_agent(self, agent: str) -> None:
        """Forget another."""
        with self._lock:
            self._cards.pop(agent, None)
            if (peer := self._peers.pop(agent, None)) is not None:
                self._transport.disconnect(peer)
            if (outbox := self._outboxes.pop(agent, None)) is not None:
                outbox.close(linger=100)

    def check_remote_metadata(self, agent: str, descs: Any = None) -> bool:
        """Whether another is known here."""
        return agent in self._cards

    def send_notif(self, agent: str, notif_msg: bytes, backend: str | None = None) -> None:
        """Raises TransferFailed for an agent that is not known."""
        with self._lock:
            outbox = self._outboxes.get(agent)
            if outbox is None:
                raise self._failed(f"agent {agent} is not known here")
            outbox.send_multipart([self._name.encode(), notif_msg])

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        """Notes that came since the last call, by their senders."""
        notes: dict[str, list[bytes]] = defaultdict(list)
        with self._lock:
            while self._inbox.poll(0):
                sender, note = self._inbox.recv_multipart()
                notes[sender.decode()].append(note)
        return notes

    # --- reads

    def get_xfer_descs(self, rows: Rows, mem_type: str | None = None) -> Rows:
        """Descriptors as they are."""
        return numpy.asarray(rows, dtype=numpy.uint64)

    def prep_xfer_dlist(self, agent: str, rows: Rows) -> int:
        """A handle of many descriptors of one agent. Raises TransferFailed for one outside its regions."""
        if agent == OWN:
            begins, sizes = [r.address for r in self._regions], [r.size for r in self._regions]
        else:
            begins, sizes = self._cards[agent].begins, self._cards[agent].sizes
        address, size = rows[:, 0].astype(numpy.int64), rows[:, 1].astype(numpy.int64)
        region = numpy.searchsorted(numpy.array(begins), address, side="right") - 1
        offset = address - numpy.array(begins)[region]
        if (region < 0).any() or (offset + size > numpy.array(sizes)[region]).any():
            raise self._failed("a descriptor is outside the memory that was registered")
        return self._keep(_Places(agent, region, offset, size))

    def make_prepped_xfer(
        self,
        operation: str,
        local: int,
        local_indices: Any,
        remote: int,
        remote_indices: Any,
        notif_msg: bytes = b"",
        **_: Any,
    ) -> int:
        """A read of some of another's descriptors into some of ours, joined where both go on."""
        mine, theirs = self._handles[local], self._handles[remote]
        if operation != "READ" or not isinstance(mine, _Places) or not isinstance(theirs, _Places):
            raise self._failed(f"it reads only, into what was prepared; not {operation}")
        to, of = numpy.asarray(local_indices), numpy.asarray(remote_indices)
        if len(to) != len(of) or (mine.size[to] != theirs.size[of]).any():
            raise self._failed("the two sides differ in their pieces")
        runs = Runs(theirs.region[of], theirs.offset[of], mine.region[to], mine.offset[to], mine.size[to])
        return self._keep(_Read(theirs.agent, runs.joined(), notif_msg))

    def transfer(self, handle: int, notif_msg: bytes = b"") -> str:
        """Begin a read; returns its state."""
        read = self._read(handle)
        peer = self._peers.get(read.source)
        if peer is None:
            raise self._failed(f"agent {read.source} is not known here")
        read.begun_s = time.perf_counter()
        read.transfer = self._transport.read(peer, read.runs)
        read.posted_s = time.perf_counter()
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: int) -> str:
        """PROC, DONE or ERR; the source is told when it is found to be done."""
        read = self._read(handle)
        assert read.transfer is not None
        if read.transfer.state is TransferState.POSTED:
            return "PROC"
        if not read.ended_s:
            read.ended_s = time.perf_counter()
            if read.note and read.transfer.state is TransferState.DONE:
                self.send_notif(read.source, read.note)
        return "DONE" if read.transfer.state is TransferState.DONE else "ERR"

    def get_xfer_telemetry(self, handle: int) -> _Telemetry:
        """Times of a read that is done."""
        read = self._read(handle)
        return _Telemetry(
            (read.ended_s - read.begun_s) * 1e6,
            (read.posted_s - read.begun_s) * 1e6,
            read.runs.bytes,
            len(read.runs),
        )

    def release_xfer_handle(self, handle: int) -> None:
        """Raises TransferFailed for a read that is under way still: its memory is written to."""
        read = self._read(handle)
        if read.transfer is not None and read.transfer.state is TransferState.POSTED:
            raise self._failed("it is under way")
        del self._handles[handle]

    def release_dlist_handle(self, handle: int) -> None:
        """Forget prepared descriptors."""
        self._handles.pop(handle, None)

    def _read(self, handle: int) -> _Read:
        read = self._handles[handle]
        assert isinstance(read, _Read)
        return read

    def _keep(self, what: _Places | _Read) -> int:
        with self._lock:
            self._last_handle += 1
            self._handles[self._last_handle] = what
            return self._last_handle

    def _failed(self, detail: str) -> TransferFailed:
        return TransferFailed(transport=self._transport.name, detail=detail)
