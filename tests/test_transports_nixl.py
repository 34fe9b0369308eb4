"""Transports between two real processes: what arrives, what fails, and that waiting costs no core."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy
import pytest
from numpy.typing import NDArray

from kv_transfer import torch_transport
from kv_transfer.layout import KvLayout, Order
from kv_transfer.local_transport import LocalTransport
from kv_transfer.nixl_transport import NixlTransport
from kv_transfer.plan import Runs, make_plan
from kv_transfer.torch_transport import TorchTransport
from kv_transfer.transport import Region, TransferFailed, TransferState, Transport

KINDS = {"local": LocalTransport, "torch": TorchTransport, "nixl": NixlTransport}
each_kind = pytest.mark.parametrize("kind", ["local", "torch", pytest.param("nixl", marks=pytest.mark.vllm)])
DEADLINE_S = 60.0
SOURCE = KvLayout(layers=3, kv_heads=4, place_bytes=64, block_tokens=32, blocks=80)
TARGET = KvLayout(
    layers=3, kv_heads=4, place_bytes=64, block_tokens=16, blocks=160, order=Order.LBNHC, tensor_parallel=2
)


@pytest.fixture(autouse=True)
def over_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,shm,self,cma")


def _memory(layout: KvLayout, rank: int) -> list[NDArray[numpy.uint8]]:
    return [numpy.zeros(layout.region_bytes(rank), dtype=numpy.uint8) for _ in range(layout.regions_of(rank))]


def _regions(memory: list[NDArray[numpy.uint8]]) -> list[Region]:
    return [Region(address=part.ctypes.data, size=part.nbytes) for part in memory]


def _source_content() -> list[NDArray[numpy.uint8]]:
    rng = numpy.random.default_rng(0)
    return [rng.integers(0, 255, part.nbytes, dtype=numpy.uint8) for part in _memory(SOURCE, 0)]


def _be_source(kind: str, pipe: Connection) -> None:
    memory = _source_content()
    transport = KINDS[kind]()
    pipe.send(transport.register(_regions(memory)))
    pipe.recv()
    transport.close()


@contextmanager
def _source(kind: str) -> Iterator[tuple[bytes, multiprocessing.process.BaseProcess]]:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_be_source, args=(kind, there), daemon=True)
    process.start()
    try:
        assert here.poll(DEADLINE_S)
        yield here.recv(), process
        if process.is_alive():
            here.send(None)
    finally:
        process.join(10)
        process.kill()
        process.join()


@contextmanager
def _reader(kind: str, memory: list[NDArray[numpy.uint8]]) -> Iterator[Transport]:
    transport: Transport = KINDS[kind]()
    transport.register(_regions(memory))
    try:
        yield transport
    finally:
        transport.close()


def _whole(memory: list[NDArray[numpy.uint8]]) -> Runs:
    regions = numpy.arange(len(memory))
    zeros = numpy.zeros_like(regions)
    return Runs(regions, zeros, regions, zeros, numpy.array([part.nbytes for part in memory]))


@each_kind
def test_a_request_of_one_layout_is_read_into_another(kind: str) -> None:
    plan, sent = make_plan(SOURCE, TARGET), _source_content()
    rng = numpy.random.default_rng(1)
    from_blocks, to_blocks = rng.permutation(80).tolist(), rng.permutation(160).tolist()
    tokens = 80 * 32
    with _source(kind) as (described, _):
        for rank in range(TARGET.ranks):
            got = _memory(TARGET, rank)
            with _reader(kind, got) as transport:
                runs = plan.runs((0, rank), from_blocks, to_blocks, range(tokens))
                assert len(runs) > 5 * 1024  # more than one call of the kernel takes
                transport.read(transport.connect(described), runs).wait(DEADLINE_S)
            for layer in range(3):
                theirs = sent[layer].reshape(80, 4, 32, 64)[from_blocks][:, rank * 2 : rank * 2 + 2]
                mine = got[layer].reshape(160, 16, 2, 64)[to_blocks].reshape(80, 32, 2, 64)
                assert (theirs.transpose(0, 2, 1, 3) == mine).all()


@each_kind
def test_a_source_that_was_killed_fails_the_read_and_its_successor_is_not_read(kind: str) -> None:
    got = _memory(SOURCE, 0)
    with _source(kind) as (described, process), _reader(kind, got) as transport:
        peer = transport.connect(described)
        transport.read(peer, _whole(got)).wait(DEADLINE_S)
        process.kill()
        process.join()
        with _source(kind):
            transfer = transport.read(peer, _whole(got))
            with pytest.raises(TransferFailed):
                transfer.wait(DEADLINE_S)
            assert transfer.state is TransferState.FAILED


def _be_reader(described: bytes, pipe: Connection) -> None:
    memory = _memory(SOURCE, 0)
    transport = TorchTransport()
    transport.register(_regions(memory))
    transport.read(transport.connect(described), _whole(memory)).wait(DEADLINE_S)
    pipe.send(True)
    time.sleep(DEADLINE_S)


def test_a_reader_that_was_killed_leaves_no_thread_at_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_transport, "IDLE_S", 0.2)

    def sessions() -> int:
        return sum(thread.name == "torch-session" for thread in threading.enumerate())

    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    memory, source = _source_content(), TorchTransport()
    process = spawn.Process(target=_be_reader, args=(source.register(_regions(memory)), there), daemon=True)
    process.start()
    try:
        assert here.poll(DEADLINE_S)
        assert sessions() == 1
        process.kill()
        until = time.monotonic() + 20
        while sessions() and time.monotonic() < until:
            time.sleep(0.1)
        assert sessions() == 0
    finally:
        process.kill()
        process.join()
        source.close()


def test_the_local_transport_does_not_take_another_process_for_its_peer() -> None:
    got = _memory(SOURCE, 0)
    with _source("local") as (described, process), _reader("local", got) as transport:
        process.kill()
        process.join()
        with pytest.raises(TransferFailed, match="is gone"):
            transport.connect(described)
    with _reader("local", got) as transport:
        mine = transport.register(_regions(got))
        peer = transport.connect(mine)
        renewed = type(peer)(peer.pid, peer.started - 1, peer.addresses)  # type: ignore[call-arg, attr-defined]
        with pytest.raises(TransferFailed, match="another one now"):
            transport.read(renewed, _whole(got)).wait(DEADLINE_S)


def test_the_local_transport_reads_no_gpu() -> None:
    transport = LocalTransport()
    try:
        with pytest.raises(ValueError, match="main memory only"):
            transport.register([Region(address=0, size=1, device=0)])
    finally:
        transport.close()


@each_kind
def test_memory_that_is_not_there_is_a_failure(kind: str) -> None:
    got = _memory(SOURCE, 0)
    with _source(kind) as (described, _), _reader(kind, got) as transport:
        peer = transport.connect(described)
        runs = _whole(got)
        beyond = Runs(
            runs.source_region,
            runs.source_offset + (1 << 40),
            runs.target_region,
            runs.target_offset,
            runs.size,
        )
        with pytest.raises(TransferFailed):
            transport.read(peer, beyond).wait(DEADLINE_S)


@each_kind
def test_an_idle_transport_takes_next_to_no_time_of_a_core(kind: str) -> None:
    got = _memory(SOURCE, 0)
    with _source(kind) as (described, _), _reader(kind, got) as transport:
        transport.read(transport.connect(described), _whole(got)).wait(DEADLINE_S)
        time.sleep(0.2)
        before = os.times()
        time.sleep(2.0)
        after = os.times()
    assert (after.user + after.system) - (before.user + before.system) < 0.4
