"""Runs the cases between two processes, each beside a plain copy of as many bytes within one."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

import torch

from cluster.errors import EnvironmentProblem
from cluster.spec import TransportName
from deploy.kvbench.cases import Bench, Case
from deploy.kvbench.remote import Source
from deploy.kvbench.report import Row
from kv_transfer.plan import Runs
from kv_transfer.transport import Peer, Region, Transfer, TransferFailed, Transport
from kv_transfer.transports import make_transport

DEADLINE_S = 60.0
# Words whose content is compared after each first read.
MOST_CHECKED = 512
WORD_BYTES = 4


def open_transport(name: TransportName, device: str, host: str = "127.0.0.1") -> Transport:
    """Raises EnvironmentProblem when it is not there."""
    if device == "cpu":
        # As engines on CPUs have it; a choice of the user's stays.
        os.environ.setdefault("UCX_TLS", "tcp,shm,self,cma")
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    try:
        return make_transport(name, host)
    except ImportError as error:
        raise EnvironmentProblem(
            problem=f"the library of transport {name} is not there ({error})",
            remedy="install the package, or give --transport local",
        ) from error


def measure(
    bench: Bench,
    *,
    transport: TransportName,
    device: str,
    rounds: int,
    say: Callable[[str], None],
    source: Source | None = None,
) -> list[Row]:
    """All cases, round by round. Raises TransferFailed for what did not arrive as it was sent.

    Args:
        source: whose memory is read; another process' here by default.
    """
    torch.set_num_threads(1)
    memory = source or own_memory("127.0.0.1")
    with memory(bench.source_regions, transport, device) as (described, host):
        reader = _Reader(bench, open_transport(transport, device, host), device, described)
        try:
            times: list[list[tuple[float, float]]] = [[] for _ in bench.cases]
            for number in range(rounds + 1):
                say(f"{bench.name} over {transport}: round {number} of {rounds}")
                for case, taken in zip(bench.cases, times, strict=True):
                    # The first round opens connections and touches memory; what it reads is looked at.
                    read_s = reader.read(case, check=number == 0)
                    taken.append((read_s, reader.copy(case.bytes)))
        finally:
            reader.close()
    return [
        Row(
            bench=bench.name,
            transport=transport,
            what=case.what,
            bytes=case.bytes,
            runs=case.runs,
            transfers=len(case.transfers),
            read_s=median(read_s for read_s, _ in taken[1:]),
            copy_s=median(copy_s for _, copy_s in taken[1:]),
        )
        for case, taken in zip(bench.cases, times, strict=True)
    ]


class _Reader:
    """Reads from a source in another process."""

    def __init__(self, bench: Bench, transport: Transport, device: str, described: bytes) -> None:
        self._device = device
        self._memory = [
            torch.zeros(_words(size), dtype=torch.int32, device=device) for size in bench.target_regions
        ]
        longest = max(case.bytes for case in bench.cases)
        self._copied = [torch.ones(_words(longest), dtype=torch.int32, device=device) for _ in range(2)]
        self._transport = transport
        self._transport.register(_regions(self._memory))
        self._peer: Peer = self._transport.connect(described)

    def read(self, case: Case, *, check: bool) -> float:
        """Seconds; raises TransferFailed when `check` finds other content than the source has."""
        if check:
            for part in self._memory:
                part.zero_()
        self._synchronize()
        begin = time.perf_counter()
        if case.at_once:
            posted: list[Transfer] = [self._transport.read(self._peer, runs) for runs in case.transfers]
            for transfer in posted:
                transfer.wait(DEADLINE_S)
        else:
            for runs in case.transfers:
                self._transport.read(self._peer, runs).wait(DEADLINE_S)
        taken_s = time.perf_counter() - begin
        if check:
            for runs in case.transfers:
                self._check(runs)
        return taken_s

    def copy(self, size: int) -> float:
        """Seconds for a plain copy of as many bytes, by one thread where it is main memory's."""
        source, target = self._copied
        self._synchronize()
        begin = time.perf_counter()
        target[: _words(size)].copy_(source[: _words(size)])
        self._synchronize()
        return time.perf_counter() - begin

    def close(self) -> None:
        self._transport.close()

    def _check(self, runs: Runs) -> None:
        step = max(1, len(runs) // MOST_CHECKED)
        for i in range(0, len(runs), step):
            size = int(runs.size[i]) // WORD_BYTES
            sent = int(runs.source_region[i]) + int(runs.source_offset[i]) // WORD_BYTES
            at = int(runs.target_offset[i]) // WORD_BYTES
            got = self._memory[int(runs.target_region[i])][at : at + size]
            if (int(got[0]), int(got[-1])) != (sent, sent + size - 1):
                raise TransferFailed(
                    transport=self._transport.name,
                    detail=f"piece {i} of {len(runs)} arrived otherwise than it was sent",
                )

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def _words(size: int) -> int:
    return -(-size // WORD_BYTES)


def _regions(memory: list[torch.Tensor]) -> list[Region]:
    return [
        Region(address=part.data_ptr(), size=part.nbytes, device=part.get_device() if part.is_cuda else None)
        for part in memory
    ]


def _be_source(
    sizes: tuple[int, ...], transport: TransportName, device: str, host: str, pipe: Connection
) -> None:
    """Has memory to be read, until told to end. A word's content is its place, and its region added."""
    memory = [
        torch.arange(_words(size), dtype=torch.int32, device=device) + number
        for number, size in enumerate(sizes)
    ]
    if device == "cuda":
        torch.cuda.synchronize()
    source = open_transport(transport, device, host)
    pipe.send(source.register(_regions(memory)))
    pipe.poll(None)
    source.close()


def own_memory(host: str) -> Source:
    """Memory of another process on this machine, which others reach at `host`."""
    return partial(_source, host)


@contextmanager
def _source(
    host: str, sizes: tuple[int, ...], transport: TransportName, device: str
) -> Iterator[tuple[bytes, str]]:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_be_source, args=(sizes, transport, device, host, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(DEADLINE_S):
            raise EnvironmentProblem(
                problem="the process to be read from did not start",
                remedy="see what it wrote, and give it more memory or a smaller --tokens",
            )
        yield here.recv(), host
    except EOFError as error:
        raise EnvironmentProblem(
            problem="the process to be read from ended",
            remedy="see what it wrote, and give it more memory or a smaller --tokens",
        ) from error
    finally:
        here.close()
        process.join(10)
        process.kill()
        process.join()
