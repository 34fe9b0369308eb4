"""TorchTransport: torch.distributed point to point, gloo for main memory and NCCL for GPUs.

For machines where NIXL is not there, or whose fabric is tuned for NCCL. A read is one-sided to its caller;
at the source a thread per reader gathers the pieces into one message, which the reader scatters. The groups
are of two, made when a reader connects, and end with either side.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import numpy
import torch
import torch.distributed as dist
import zmq

from kv_transfer.plan import Runs
from kv_transfer.transport import Region, Transfer, TransferFailed, are_on_gpu

NAME = "torch"
CONNECT_S = 10.0
# A message that does not arrive within this has no sender.
MESSAGE_S = 30.0
# A reader that asks for nothing is looked for this often: gloo tells of its end only who sends to it.
IDLE_S = 5.0
# Of both sides' staging memory, per reader.
MESSAGE_BYTES = 32 << 20
_REFUSED = -1


class TorchPeer(msgspec.Struct, frozen=True, array_like=True):
    """Where a source listens, and whether its regions are on a GPU."""

    endpoint: str
    host: str
    on_gpu: bool


class _Join(msgspec.Struct, array_like=True):
    """A reader's first message: the store at which the group of two meets."""

    host: str
    port: int


class _Ask(msgspec.Struct, array_like=True):
    """A reader's further ones: pieces by region, offset and bytes, as arrays of int64."""

    region: bytes
    offset: bytes
    size: bytes


class TorchTransport:
    """One process's memory, and its reads of others'."""

    name = NAME

    def __init__(self, host: str = "127.0.0.1") -> None:
        """
        Args:
            host: address of this machine at which others reach it.
        """
        self._host = host
        self._memory: list[torch.Tensor] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._port = self._socket.bind_to_random_port(f"tcp://{host}")
        self._closed = threading.Event()
        self._sessions: dict[bytes, queue.SimpleQueue[_Ask | None]] = {}
        self._readers: list[_Reader] = []
        self._thread = threading.Thread(target=self._listen, name="torch-transport", daemon=True)
        self._thread.start()

    def register(self, regions: Sequence[Region]) -> bytes:
        """See `Transport`; all regions are in main memory, or all on GPUs."""
        on_gpu = are_on_gpu(regions)
        self._memory = [_bytes_of(region) for region in regions]
        endpoint = f"tcp://{self._host}:{self._port}"
        return msgspec.msgpack.encode(TorchPeer(endpoint, self._host, on_gpu))

    def connect(self, described: bytes) -> _Reader:
        """See `Transport`."""
        peer = msgspec.msgpack.decode(described, type=TorchPeer)
        reader = _Reader(peer, self._memory, self._context, self._host)
        self._readers.append(reader)
        return reader

    def read(self, peer: _Reader, runs: Runs) -> Transfer:
        """See `Transport`."""
        return peer.read(runs)

    def disconnect(self, peer: _Reader) -> None:
        """See `Transport`."""
        if peer in self._readers:
            self._readers.remove(peer)
            peer.close()

    def close(self) -> None:
        """See `Transport`."""
        for reader in self._readers:
            reader.close()
        self._closed.set()
        self._thread.join()
        for session in list(self._sessions.values()):
            session.put(None)
        self._socket.close(linger=0)
        self._context.term()

    def _listen(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        while not self._closed.is_set():
            if not poller.poll(200):
                continue
            reader, kind, body = self._socket.recv_multipart()
            if kind == b"J":
                asked: queue.SimpleQueue[_Ask | None] = queue.SimpleQueue()
                self._sessions[reader] = asked
                join = msgspec.msgpack.decode(body, type=_Join)
                threading.Thread(
                    target=self._serve, args=(reader, join, asked), name="torch-session", daemon=True
                ).start()
            elif (session := self._sessions.get(reader)) is not None:
                session.put(msgspec.msgpack.decode(body, type=_Ask) if kind == b"R" else None)

    def _serve(self, reader: bytes, join: _Join, asked: queue.SimpleQueue[_Ask | None]) -> None:
        """Answer one reader until it leaves, or is gone with the store at which the group met."""
        with contextlib.suppress(RuntimeError):
            store = dist.TCPStore(
                join.host, join.port, 2, is_master=False, timeout=timedelta(seconds=CONNECT_S)
            )
            group = _group(store, 0, on_gpu=self._memory[0].is_cuda)
            while True:
                try:
                    ask = asked.get(timeout=IDLE_S)
                except queue.Empty:
                    store.num_keys()
                    continue
                if ask is None:
                    break
                self._answer(group, ask)
        self._sessions.pop(reader, None)

    def _answer(self, group: Any, ask: _Ask) -> None:
        region, offset, size = (
            numpy.frombuffer(part, dtype=numpy.int64) for part in msgspec.structs.astuple(ask)
        )
        device = self._memory[0].device
        if not self._has(region, offset, size):
            _send(group, torch.tensor([_REFUSED], device=device))
            return
        message = torch.empty(int(size.sum()), dtype=torch.uint8, device=device)
        for rows, of, at in _by_region(self._memory, region, offset, size):
            _copy_rows(rows, of, message.view(-1, rows.shape[1]), at)
        _send(group, torch.tensor([message.numel()], device=device))
        _send(group, message)

    def _has(self, region: Any, offset: Any, size: Any) -> bool:
        sizes = numpy.array([part.numel() for part in self._memory], dtype=numpy.int64)
        if len(region) == 0 or region.min() < 0 or region.max() >= len(sizes):
            return False
        return bool(((offset >= 0) & (size > 0) & (offset + size <= sizes[region])).all())


class _Reader:
    """One source, read by one thread."""

    def __init__(
        self, peer: TorchPeer, memory: list[torch.Tensor], context: zmq.Context[Any], host: str
    ) -> None:
        self._memory, self._peer = memory, peer
        self._jobs: queue.SimpleQueue[tuple[Runs, Transfer] | None] = queue.SimpleQueue()
        self._store = dist.TCPStore(host, 0, 2, is_master=True, wait_for_workers=False)
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(peer.endpoint)
        self._socket.send_multipart([b"J", msgspec.msgpack.encode(_Join(host, self._store.port))])
        try:
            self._group = _group(self._store, 1, on_gpu=peer.on_gpu)
        except RuntimeError as error:
            self._socket.close(linger=0)
            raise _failed(error) from error
        self._broken: TransferFailed | None = None
        self._thread = threading.Thread(target=self._work, name="torch-reader", daemon=True)
        self._thread.start()

    def read(self, runs: Runs) -> Transfer:
        transfer = Transfer()
        self._jobs.put((runs, transfer))
        return transfer

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        self._socket.close(linger=100)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            runs, transfer = job
            if self._broken is None:
                transfer.settle(self._fetch(runs))
            else:
                transfer.settle(self._broken)
        self._socket.send_multipart([b"B", b""])

    def _fetch(self, runs: Runs) -> TransferFailed | None:
        try:
            for part in _messages(runs):
                ask = _Ask(part.source_region.tobytes(), part.source_offset.tobytes(), part.size.tobytes())
                self._socket.send_multipart([b"R", msgspec.msgpack.encode(ask)])
                device = self._memory[0].device
                head = torch.empty(1, dtype=torch.int64, device=device)
                _receive(self._group, head)
                if int(head) == _REFUSED:
                    return _failed("the source does not have what was asked for")
                message = torch.empty(int(head), dtype=torch.uint8, device=device)
                _receive(self._group, message)
                for to, rows, at in _by_region(
                    self._memory, part.target_region, part.target_offset, part.size
                ):
                    _copy_rows(message.view(-1, to.shape[1]), at, to, rows)
            if self._memory[0].is_cuda:
                torch.cuda.synchronize()
        except RuntimeError as error:
            # A message was lost, and with it the order of the later ones.
            self._broken = _failed(error)
            return self._broken
        return None


def _by_region(
    memory: list[torch.Tensor], region: Any, offset: Any, size: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(rows, which of them, which of the message's) for each region that has pieces; a row is as many bytes
    as divide all offsets and sizes."""
    unit = int(numpy.gcd.reduce(numpy.concatenate([offset, size])))
    # A region's end may be no multiple: what is beyond its last unit is in no piece.
    begins = numpy.cumsum(size) - size
    for number in numpy.unique(region):
        mine = region == number
        counts = size[mine] // unit
        firsts = numpy.repeat(offset[mine] // unit, counts)
        places = numpy.repeat(begins[mine] // unit, counts)
        within = numpy.arange(counts.sum()) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
        part = memory[int(number)]
        whole = part[: part.numel() // unit * unit].view(-1, unit)
        yield (
            whole,
            torch.from_numpy(firsts + within).to(part.device),
            torch.from_numpy(places + within).to(part.device),
        )


def _copy_rows(of: torch.Tensor, rows: torch.Tensor, to: torch.Tensor, at: torch.Tensor) -> None:
    if of.is_cuda:
        to[at] = of[rows]
    else:
        # numpy moves a row at once, torch byte by byte on CPUs.
        to.numpy()[at.numpy()] = of.numpy()[rows.numpy()]


def _messages(runs: Runs) -> Iterator[Runs]:
    """The same bytes in parts of at most `MESSAGE_BYTES`, where a piece is not larger itself."""
    part = (numpy.cumsum(runs.size) - 1) // MESSAGE_BYTES
    for number in numpy.unique(part):
        yield runs.pick(part == number)


def _group(store: dist.Store, rank: int, *, on_gpu: bool) -> Any:
    """A group of the source (0) and one reader (1)."""
    if not on_gpu:
        return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=CONNECT_S))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=MESSAGE_S)
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _send(group: Any, message: torch.Tensor) -> None:
    group.send([message], 1, 0).wait(timedelta(seconds=MESSAGE_S))


def _receive(group: Any, message: torch.Tensor) -> None:
    group.recv([message], 0, 0).wait(timedelta(seconds=MESSAGE_S))


class _OnGpu:
    """Memory of a GPU that torch shall take as it is."""

    def __init__(self, region: Region) -> None:
        self.__cuda_array_interface__ = {
            "shape": (region.size,),
            "typestr": "|u1",
            "data": (region.address, False),
            "version": 3,
        }


def _bytes_of(region: Region) -> torch.Tensor:
    """A tensor of bytes over memory that is somebody else's."""
    if region.device is not None:
        return torch.as_tensor(_OnGpu(region), device=f"cuda:{region.device}")
    memory = (ctypes.c_uint8 * region.size).from_address(region.address)
    return torch.from_numpy(numpy.ctypeslib.as_array(memory))


def _failed(why: object) -> TransferFailed:
    return TransferFailed(transport=NAME, detail=str(why).splitlines()[0])
