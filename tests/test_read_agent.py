"""ReadAgent: what vLLM's connector does with an agent, between two in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from kv_transfer.agent_zmq import OWN, ReadAgent
from kv_transfer.local_transport import LocalTransport
from kv_transfer.transport import TransferFailed

PIECE = 1024
PIECES = 64


class Side:
    """An agent, its memory in two regions, and descriptors of all its pieces."""

    def __init__(self, name: str) -> None:
        self.agent = ReadAgent(name, LocalTransport())
        self.memory = numpy.zeros((2, PIECES, PIECE), dtype=numpy.uint8)
        size = PIECES * PIECE
        rows = [(self.memory[i].ctypes.data, size, 0, "") for i in (1, 0)]
        self.registered = self.agent.register_memory(self.agent.get_reg_descs(rows, "DRAM"))
        begins = self.memory.ctypes.data + numpy.arange(2 * PIECES) * PIECE
        self.rows = numpy.stack([begins, numpy.full_like(begins, PIECE), numpy.zeros_like(begins)], axis=1)

    def pieces(self, agent: str, rows: Any) -> int:
        return self.agent.prep_xfer_dlist(agent, self.agent.get_xfer_descs(rows.astype(numpy.uint64), "DRAM"))


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    both = Side("reader"), Side("source")
    yield both
    for side in both:
        side.agent.deregister_memory(side.registered)


def _read(reader: Side, source: Side, to: list[int], of: list[int]) -> int:
    name = reader.agent.add_remote_agent(source.agent.get_agent_metadata())
    return reader.agent.make_prepped_xfer(
        "READ", reader.pieces(OWN, reader.rows), to, reader.pieces(name, source.rows), of, notif_msg=b"r-1:1"
    )


def _finish(agent: ReadAgent, handle: int) -> str:
    state = agent.transfer(handle)
    while state == "PROC":
        time.sleep(0.001)
        state = agent.check_xfer_state(handle)
    return state


def _notes(agent: ReadAgent) -> dict[str, list[bytes]]:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if notes := agent.get_new_notifs():
            return notes
        time.sleep(0.001)
    return {}


def test_a_read_arrives_and_its_source_is_told_once(sides: tuple[Side, Side]) -> None:
    reader, source = sides
    source.memory[:] = numpy.arange(2 * PIECES).reshape(2, PIECES, 1)
    # The first two go on at both sides, and are one piece.
    handle = _read(reader, source, [5, 6, 100], [70, 71, 3])
    assert _finish(reader.agent, handle) == "DONE"
    got = reader.memory.reshape(2 * PIECES, PIECE)
    assert [int(got[i][0]) for i in (5, 6, 100)] == [70, 71, 3]
    assert int(got.sum()) == (70 + 71 + 3) * PIECE
    told = reader.agent.get_xfer_telemetry(handle)
    assert (told.totalBytes, told.descCount) == (3 * PIECE, 2)
    assert told.xferDuration >= told.postDuration > 0
    assert reader.agent.check_xfer_state(handle) == "DONE"
    assert _notes(source.agent) == {"reader": [b"r-1:1"]}
    assert source.agent.get_new_notifs() == {}
    reader.agent.release_xfer_handle(handle)


def test_a_note_of_its_own_reaches_the_other(sides: tuple[Side, Side]) -> None:
    reader, source = sides
    name = reader.agent.add_remote_agent(source.agent.get_agent_metadata())
    reader.agent.send_notif(name, notif_msg=b"HB:1")
    assert _notes(source.agent) == {"reader": [b"HB:1"]}


def test_an_agent_that_was_removed_is_not_known(sides: tuple[Side, Side]) -> None:
    reader, source = sides
    handle = _read(reader, source, [0], [0])
    assert reader.agent.check_remote_metadata("source")
    reader.agent.remove_remote_agent("source")
    assert not reader.agent.check_remote_metadata("source")
    with pytest.raises(TransferFailed, match="not known here"):
        reader.agent.transfer(handle)
    with pytest.raises(TransferFailed, match="not known here"):
        reader.agent.send_notif("source", b"x")


def test_what_is_outside_the_memory_is_refused(sides: tuple[Side, Side]) -> None:
    reader, _ = sides
    for shift in (-PIECE, 2 * PIECES * PIECE):
        with pytest.raises(TransferFailed, match="outside the memory"):
            reader.pieces(OWN, reader.rows[:1] + numpy.array([shift, 0, 0]))


def test_another_transport_and_something_else_are_refused(sides: tuple[Side, Side]) -> None:
    reader, source = sides
    theirs = source.agent.get_agent_metadata()
    with pytest.raises(TransferFailed, match="the other's transport is other"):
        reader.agent.add_remote_agent(theirs.replace(b"\xa5local", b"\xa5other"))
    with pytest.raises(TransferFailed, match="not one of this transport"):
        reader.agent.add_remote_agent(b"nixl's own metadata")


def test_sides_that_differ_and_writes_are_refused(sides: tuple[Side, Side]) -> None:
    reader, source = sides
    name = reader.agent.add_remote_agent(source.agent.get_agent_metadata())
    mine, theirs = reader.pieces(OWN, reader.rows), reader.pieces(name, source.rows)
    with pytest.raises(TransferFailed, match="differ in their pieces"):
        reader.agent.make_prepped_xfer("READ", mine, [1, 2], theirs, [1])
    with pytest.raises(TransferFailed, match="it reads only"):
        reader.agent.make_prepped_xfer("WRITE", mine, [1], theirs, [1])
