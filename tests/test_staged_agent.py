"""StagedAgent: two stages of a source read as one, over agents of our own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from kv_transfer.agent_zmq import OWN
from kv_transfer.staged_agent import StageCard, StagedAgent, staged
from kv_transfer.stages_vllm import Gathering, joined
from tests.test_read_agent import PIECE, PIECES, Side, _notes

# Each side has two regions of PIECES pieces; the reader of two stages has four.
REGIONS = 2


class Reader:
    """Memory for all regions of two stages, and an agent that knows staged ones."""

    def __init__(self) -> None:
        self.sides = Side("reader-a"), Side("reader-b")
        self.memory = numpy.zeros((2 * REGIONS, PIECES, PIECE), dtype=numpy.uint8)
        inner = self.sides[0].agent
        rows = [(self.memory.ctypes.data, self.memory.nbytes, 0, "")]
        self.registered = inner.register_memory(inner.get_reg_descs(rows, "DRAM"))
        self.agent = StagedAgent(inner)
        begins = self.memory.ctypes.data + numpy.arange(2 * REGIONS * PIECES) * PIECE
        full = numpy.full_like(begins, PIECE)
        self.rows = numpy.stack([begins, full, numpy.zeros_like(begins)], axis=1).astype(numpy.uint64)
        self.own = self.agent.prep_xfer_dlist(OWN, self.agent.get_xfer_descs(self.rows, "DRAM"))


@pytest.fixture
def world() -> Iterator[tuple[Reader, Side, Side]]:
    reader, first, second = Reader(), Side("stage-0"), Side("stage-1")
    yield reader, first, second
    for side in (*reader.sides, first, second):
        side.agent.deregister_memory(side.registered)


def meet(reader: Reader, *stages: Side) -> tuple[str, Any]:
    """Name and descriptors of all stages' memory."""
    cards = [StageCard(stage.agent.get_agent_metadata(), REGIONS, 0) for stage in stages]
    name = reader.agent.add_remote_agent(staged(cards))
    rows = numpy.concatenate([stage.rows for stage in stages]).astype(numpy.uint64)
    return name, reader.agent.prep_xfer_dlist(name, reader.agent.get_xfer_descs(rows, "DRAM"))


def finish(agent: StagedAgent, handle: Any) -> str:
    state = agent.transfer(handle)
    until = time.monotonic() + 10
    while state == "PROC" and time.monotonic() < until:
        time.sleep(0.001)
        state = agent.check_xfer_state(handle)
    return state


def test_a_read_of_a_block_is_of_every_stage_and_each_is_told(world: tuple[Reader, Side, Side]) -> None:
    reader, first, second = world
    for number, stage in enumerate((first, second)):
        regions = 10 * number + numpy.arange(REGIONS)
        stage.memory[:] = (100 + regions).reshape(REGIONS, 1, 1)
    _, theirs = meet(reader, first, second)
    block, place = 7, 9
    every = numpy.arange(2 * REGIONS) * PIECES
    handle = reader.agent.make_prepped_xfer(
        "READ", reader.own, every + place, theirs, every + block, notif_msg=b"r-1:1"
    )
    assert finish(reader.agent, handle) == "DONE"
    assert reader.memory[:, place, 0].tolist() == [100, 101, 110, 111]
    assert int(reader.memory.sum()) == (100 + 101 + 110 + 111) * PIECE
    told = reader.agent.get_xfer_telemetry(handle)
    assert (told.totalBytes, told.descCount) == (4 * PIECE, 4)
    for stage in (first, second):
        assert _notes(stage.agent) == {"reader-a": [b"r-1:1"]}
    reader.agent.release_xfer_handle(handle)
    reader.agent.release_dlist_handle(theirs)


def test_a_note_reaches_all_stages_and_a_removed_one_is_gone_whole(world: tuple[Reader, Side, Side]) -> None:
    reader, first, second = world
    name, _ = meet(reader, first, second)
    reader.agent.send_notif(name, notif_msg=b"HB:1")
    for stage in (first, second):
        assert _notes(stage.agent) == {"reader-a": [b"HB:1"]}
    assert reader.agent.check_remote_metadata(name)
    reader.agent.remove_remote_agent(name)
    assert not reader.agent.check_remote_metadata("stage-0")
    assert not reader.agent.check_remote_metadata("stage-1")


def test_a_source_without_stages_is_read_as_before(world: tuple[Reader, Side, Side]) -> None:
    reader, first, _ = world
    first.memory[:] = 5
    name = reader.agent.add_remote_agent(first.agent.get_agent_metadata())
    assert name == "stage-0"
    rows = first.rows.astype(numpy.uint64)
    theirs = reader.agent.prep_xfer_dlist(name, reader.agent.get_xfer_descs(rows, "DRAM"))
    handle = reader.agent.make_prepped_xfer("READ", reader.own, [3], theirs, [4], notif_msg=b"n")
    assert finish(reader.agent, handle) == "DONE"
    assert int(reader.memory.sum()) == 5 * PIECE
    assert reader.agent.get_xfer_telemetry(handle).totalBytes == PIECE
    reader.agent.release_xfer_handle(handle)


class Slow:
    """An agent whose reads end when they are told to."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.released: list[int] = []

    def add_remote_agent(self, metadata: bytes) -> bytes:
        return metadata

    def get_xfer_descs(self, rows: Any, mem_type: str | None) -> Any:
        return rows

    def prep_xfer_dlist(self, agent: str, rows: Any) -> str:
        return agent

    def make_prepped_xfer(self, _: str, __: Any, ___: Any, remote: str, *____: Any, **_____: Any) -> int:
        if self.states[int(remote)] == "NOT MADE":
            raise RuntimeError("no such memory")
        return int(remote)

    def transfer(self, handle: int) -> str:
        if self.states[handle] == "RAISES":
            raise RuntimeError("no way there")
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: int) -> str:
        assert handle not in self.released, "asked for what was given back"
        if self.states[handle] == "GONE":
            raise RuntimeError("the peer is gone")
        return self.states[handle]

    def release_xfer_handle(self, handle: int) -> None:
        if self.states[handle] == "PROC":
            raise RuntimeError("under way")
        assert handle not in self.released, "given back twice"
        self.released.append(handle)


def slow_stages(*states: str) -> tuple[Slow, StagedAgent, Any]:
    inner = Slow(*states)
    agent = StagedAgent(inner)
    name = agent.add_remote_agent(staged([StageCard(str(n).encode(), 1, 0) for n in range(len(states))]))
    rows = numpy.zeros((len(states) * 4, 3))
    return inner, agent, agent.prep_xfer_dlist(name, agent.get_xfer_descs(rows))


def slow_read(*states: str) -> tuple[Slow, StagedAgent, Any]:
    inner, agent, theirs = slow_stages(*states)
    every = numpy.arange(len(states)) * 4
    return inner, agent, agent.make_prepped_xfer("READ", "own", every, theirs, every)


def test_nothing_is_called_failed_while_a_part_writes() -> None:
    inner, agent, handle = slow_read("ERR", "PROC")
    assert agent.transfer(handle) == "PROC"
    with pytest.raises(RuntimeError, match="under way"):
        agent.release_xfer_handle(handle)
    inner.states[1] = "DONE"
    assert agent.check_xfer_state(handle) == "ERR"
    agent.release_xfer_handle(handle)
    assert sorted(inner.released) == [0, 1]


def test_a_stage_that_is_gone_is_given_back_once_and_not_asked_again() -> None:
    inner, agent, handle = slow_read("PROC", "GONE")
    assert agent.transfer(handle) == "PROC"
    with pytest.raises(RuntimeError, match="under way"):
        agent.release_xfer_handle(handle)
    assert inner.released == [1]
    assert agent.check_xfer_state(handle) == "PROC"
    inner.states[0] = "DONE"
    assert agent.check_xfer_state(handle) == "ERR"
    agent.release_xfer_handle(handle)
    assert sorted(inner.released) == [0, 1]


def test_a_read_that_one_stage_can_not_have_leaves_nothing_behind() -> None:
    inner, agent, theirs = slow_stages("DONE", "NOT MADE")
    with pytest.raises(RuntimeError, match="no such memory"):
        agent.make_prepped_xfer("READ", "own", [0, 4], theirs, [0, 4])
    assert inner.released == [0]


def test_a_part_that_does_not_begin_fails_the_read_when_the_others_rest() -> None:
    inner, agent, handle = slow_read("PROC", "RAISES")
    assert agent.transfer(handle) == "PROC"
    inner.states[0] = "DONE"
    assert agent.check_xfer_state(handle) == "ERR"
    _, agent, handle = slow_read("RAISES", "PROC")
    with pytest.raises(RuntimeError, match="no way there"):
        agent.transfer(handle)


@dataclass
class Description:
    """As much of vLLM's `NixlAgentMetadata` as is joined."""

    kv_caches_base_addr: list[int]
    num_blocks: int = 10
    engine_id: str = "e"
    agent_metadata: bytes = b"m"
    device_id: int = 0
    block_lens: list[int] = field(default_factory=lambda: [8])
    block_strides: list[int] = field(default_factory=lambda: [8])
    block_size: int = 16
    kv_cache_layout: str = "L"
    physical_blocks_per_logical_kv_block: int = 1
    region_num_blocks: list[int] | None = None
    region_group_ids: list[int] | None = field(default_factory=lambda: [0])
    region_names: list[str] | None = None
    region_mem_types: list[str] | None = None
    region_members: list[list[str]] = field(default_factory=list)


def test_stages_are_joined_in_the_order_of_their_layers() -> None:
    gathering = Gathering(2)
    assert gathering.add(0, Description([1])) is None
    assert gathering.add(1, Description([2])) is None
    whole = gathering.add(0, Description([3], device_id=1))
    assert whole.kv_caches_base_addr == [1, 3]
    assert (whole.block_lens, whole.region_group_ids, whole.region_names) == ([8, 8], [0, 0], None)
    assert whole.agent_metadata == staged([StageCard(b"m", 1, 0), StageCard(b"m", 1, 1)])
    assert gathering.add(1, Description([4])).kv_caches_base_addr == [2, 4]
    with pytest.raises(ValueError, match=r"e: its pipeline stages differ in num_blocks: \[10, 11\]"):
        joined([Description([1]), Description([2], num_blocks=11)])


def test_rows_that_are_not_as_many_for_each_region_are_refused() -> None:
    agent = StagedAgent(SimpleNamespace(add_remote_agent=lambda metadata: metadata))
    name = agent.add_remote_agent(staged([StageCard(b"0", 1, 0), StageCard(b"1", 2, 0)]))
    with pytest.raises(ValueError, match="not as many for each region"):
        agent.prep_xfer_dlist(name, agent.get_xfer_descs(numpy.zeros((4, 3))))
