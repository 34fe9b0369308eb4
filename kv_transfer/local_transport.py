"""LocalTransport: between processes of one machine by `process_vm_readv`, main memory only.

The kernel copies straight from the other process, up to 1,024 pieces a call, and the other side does nothing.
For tests, and where NIXL is not there.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy
from numpy.typing import NDArray

from cluster.errors import EnvironmentProblem
from kv_transfer.plan import Runs
from kv_transfer.transport import Region, Transfer, TransferFailed

NAME = "local"
# UIO_MAXIOV of Linux.
_MOST_PIECES = 1024
_PR_SET_PTRACER = 0x59616D61
_ANYBODY = ctypes.c_ulong(-1)

_libc = ctypes.CDLL(None, use_errno=True)


class LocalPeer(msgspec.Struct, frozen=True, array_like=True):
    """A process and its regions. `started` is the clock tick at which it began, as process ids are used
    again."""

    pid: int
    started: int
    addresses: list[int]


class LocalTransport:
    """Reads in one thread, one transfer after another."""

    name = NAME

    def __init__(self) -> None:
        if not hasattr(_libc, "process_vm_readv"):
            raise EnvironmentProblem(
                problem="this system has no process_vm_readv", remedy="use Linux, or NIXL as the transport"
            )
        # Where Yama restricts tracing, it must be allowed by who is read; elsewhere this call is an error.
        _libc.prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)
        self._mine: list[int] = []
        self._jobs: queue.SimpleQueue[tuple[LocalPeer, Runs, Transfer] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="local-transport", daemon=True)
        self._thread.start()

    def register(self, regions: Sequence[Region]) -> bytes:
        """See `Transport`. Raises ValueError for memory of a GPU."""
        if any(region.device is not None for region in regions):
            raise ValueError("the local transport reads main memory only")
        self._mine = [region.address for region in regions]
        pid = os.getpid()
        return msgspec.msgpack.encode(LocalPeer(pid, _started(pid), self._mine))

    def connect(self, described: bytes) -> LocalPeer:
        """See `Transport`."""
        peer = msgspec.msgpack.decode(described, type=LocalPeer)
        if problem := _problem(peer):
            raise problem
        return peer

    def read(self, peer: LocalPeer, runs: Runs) -> Transfer:
        """See `Transport`."""
        transfer = Transfer()
        self._jobs.put((peer, runs, transfer))
        return transfer

    def disconnect(self, peer: LocalPeer) -> None:
        """See `Transport`; nothing is kept of a peer."""

    def close(self) -> None:
        """See `Transport`."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            peer, runs, transfer = job
            transfer.settle(_problem(peer) or self._copy(peer, runs))

    def _copy(self, peer: LocalPeer, runs: Runs) -> TransferFailed | None:
        theirs = _pieces(peer.addresses, runs.source_region, runs.source_offset, runs.size)
        mine = _pieces(self._mine, runs.target_region, runs.target_offset, runs.size)
        at = 0
        while at < len(runs):
            end = min(at + _MOST_PIECES, len(runs))
            count = end - at
            moved = _libc.process_vm_readv(
                peer.pid, _pointer(mine, at), count, _pointer(theirs, at), count, 0
            )
            if moved < 0:
                return _failed(os.strerror(ctypes.get_errno()))
            # It may end early, at the end of a piece or within one.
            ends = numpy.cumsum(theirs[at:end, 1])
            whole = int(numpy.searchsorted(ends, moved, side="right"))
            if whole == 0 and moved == 0:
                return _failed("the other's memory is not there")
            at += whole
            if whole < count and (within := moved - (int(ends[whole - 1]) if whole else 0)):
                for pieces in (mine, theirs):
                    pieces[at] += numpy.array([within, -within], dtype=numpy.int64).astype(numpy.uint64)
        return None


def _failed(detail: str) -> TransferFailed:
    return TransferFailed(transport=NAME, detail=detail)


def _problem(peer: LocalPeer) -> TransferFailed | None:
    """Why a peer can't be read from; None when it is the process that it was."""
    try:
        started = _started(peer.pid)
    except OSError:
        return _failed(f"process {peer.pid} is gone")
    if started != peer.started:
        return _failed(f"process {peer.pid} is another one now")
    return None


def _started(pid: int) -> int:
    """The clock tick at which a process began, since the machine did."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    # The second field is a name in brackets that may have anything in it.
    return int(stat.rpartition(")")[2].split()[19])


def _pieces(
    addresses: list[int],
    region: NDArray[numpy.int64],
    offset: NDArray[numpy.int64],
    size: NDArray[numpy.int64],
) -> NDArray[numpy.uint64]:
    """An array of `struct iovec`: [n, 2], address and bytes."""
    table = numpy.empty((len(size), 2), dtype=numpy.uint64)
    table[:, 0] = numpy.array(addresses, dtype=numpy.uint64)[region] + offset.astype(numpy.uint64)
    table[:, 1] = size
    return table


def _pointer(pieces: NDArray[numpy.uint64], at: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(pieces.ctypes.data + at * pieces.itemsize * 2)
