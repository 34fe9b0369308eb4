"""StagedAgent: the pipeline stages of a source of KV as one agent, which has all layers.

vLLM's pull connector reads from one agent per tensor-parallel rank of its source, and a source with pipeline
stages has as many per rank as stages. Behind this face of an agent the stages of a rank are one: its memory
is theirs one after the other, a read is one read of each, and what is told to it is told to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy

# What a name of several agents begins with; NIXL's are UUIDs.
_STAGES = "stages:"


class StageCard(msgspec.Struct, array_like=True):
    """What a stage's agent tells others.

    Attributes:
        metadata: as the agent itself says it.
        regions: of the memory that it has, of the regions that all stages have one after the other.
        device: of that memory.
    """

    metadata: bytes
    regions: int
    device: int


def staged(stages: Sequence[StageCard]) -> bytes:
    """What `add_remote_agent` takes for all of them at once, in the order of their layers."""
    return _STAGES.encode() + msgspec.msgpack.encode(list(stages))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Descriptors, [n, 3] of address, bytes and device, until it is known whose they are."""

    rows: Any
    mem_type: str | None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Descriptors of each stage; `begins[i]` is the first row of stage `i`."""

    handles: list[Any]
    begins: list[int]


@dataclass(slots=True)
class _Parts:
    """A read of several stages; `left` are those that are not known to be done."""

    handles: list[Any]
    left: list[Any] = field(default_factory=list)
    failed: bool = False


class StagedAgent:
    """An agent with NIXL's face, that knows staged ones too; all else is the agent's own."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._stages: dict[str, list[StageCard]] = {}
        self._names: dict[str, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    # --- other agents

    def add_remote_agent(self, metadata: bytes) -> str:
        """Returns its name, or one for all of its stages."""
        if not metadata.startswith(_STAGES.encode()):
            name: str | bytes = self._agent.add_remote_agent(metadata)
            return name.decode() if isinstance(name, bytes) else name
        cards = msgspec.msgpack.decode(metadata.removeprefix(_STAGES.encode()), type=list[StageCard])
        names = [self.add_remote_agent(card.metadata) for card in cards]
        whole = _STAGES + "+".join(names)
        self._stages[whole], self._names[whole] = cards, names
        return whole

    def remove_remote_agent(self, agent: str) -> None:
        self._stages.pop(agent, None)
        for name in self._names.pop(agent, [agent]):
            self._agent.remove_remote_agent(name)

    def check_remote_metadata(self, agent: str, *args: Any) -> bool:
        return all(self._agent.check_remote_metadata(name, *args) for name in self._names.get(agent, [agent]))

    def send_notif(self, agent: str, notif_msg: bytes, **more: Any) -> None:
        for name in self._names.get(agent, [agent]):
            self._agent.send_notif(name, notif_msg=notif_msg, **more)

    # --- reads

    def get_xfer_descs(self, rows: Any, mem_type: str | None = None) -> _Rows:
        return _Rows(rows, mem_type)

    def prep_xfer_dlist(self, agent: str, descs: _Rows) -> Any:
        """Of several stages, which have equal parts of the rows for each of their regions."""
        cards = self._stages.get(agent)
        if cards is None:
            return self._prepare(agent, descs.rows, descs.mem_type)
        rows = numpy.asarray(descs.rows, dtype=numpy.uint64)
        each, rest = divmod(len(rows), sum(card.regions for card in cards))
        if rest:
            raise ValueError(f"{len(rows)} descriptors are not as many for each region of {agent}")
        handles, begins, begin = [], [], 0
        for name, card in zip(self._names[agent], cards, strict=True):
            end = begin + each * card.regions
            part = rows[begin:end].copy()
            part[:, 2] = card.device
            handles.append(self._prepare(name, part, descs.mem_type))
            begins.append(begin)
            begin = end
        return _Prepared(handles, begins)

    def release_dlist_handle(self, handle: Any) -> None:
        for one in handle.handles if isinstance(handle, _Prepared) else [handle]:
            self._agent.release_dlist_handle(one)

    def make_prepped_xfer(
        self,
        operation: str,
        local: Any,
        local_indices: Any,
        remote: Any,
        remote_indices: Any,
        notif_msg: bytes = b"",
        **more: Any,
    ) -> Any:
        """One read of each stage; each stage is told when its own is done."""
        if not isinstance(remote, _Prepared):
            return self._agent.make_prepped_xfer(
                operation, local, local_indices, remote, remote_indices, notif_msg=notif_msg, **more
            )
        to, of = numpy.asarray(local_indices), numpy.asarray(remote_indices)
        stage = numpy.searchsorted(numpy.array(remote.begins), of, side="right") - 1
        parts = _Parts([])
        try:
            for number, (handle, begin) in enumerate(zip(remote.handles, remote.begins, strict=True)):
                mine = stage == number
                # A read of whole blocks is of all layers, so of every stage.
                part = self._agent.make_prepped_xfer(
                    operation, local, to[mine], handle, of[mine] - begin, notif_msg=notif_msg, **more
                )
                parts.handles.append(part)
        except Exception:
            self.release_xfer_handle(parts)
            raise
        return parts

    def transfer(self, handle: Any, *args: Any) -> str:
        if not isinstance(handle, _Parts):
            state: str = self._agent.transfer(handle, *args)
            return state
        for part in handle.handles:
            try:
                self._agent.transfer(part, *args)
            except Exception:
                if not handle.left:
                    raise
                # Others write to memory already: it is told when they are at rest.
                handle.failed = True
                break
            handle.left.append(part)
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: Any) -> str:
        """DONE when all are; ERR when one is, or can't be asked, and none is under way."""
        if not isinstance(handle, _Parts):
            state: str = self._agent.check_xfer_state(handle)
            return state
        under_way = []
        for part in handle.left:
            try:
                found = self._agent.check_xfer_state(part)
            except Exception:  # as NIXL tells of a peer that is gone
                found = "ERR"
            if found == "PROC":
                under_way.append(part)
            elif found != "DONE":
                handle.failed = True
        handle.left = under_way
        if under_way:
            return "PROC"
        return "ERR" if handle.failed else "DONE"

    def get_xfer_telemetry(self, handle: Any) -> Any:
        """Of all parts: they move side by side."""
        if not isinstance(handle, _Parts):
            return self._agent.get_xfer_telemetry(handle)
        found = [self._agent.get_xfer_telemetry(part) for part in handle.handles]
        return SimpleNamespace(
            xferDuration=max(one.xferDuration for one in found),
            postDuration=sum(one.postDuration for one in found),
            totalBytes=sum(one.totalBytes for one in found),
            descCount=sum(one.descCount for one in found),
        )

    def release_xfer_handle(self, handle: Any) -> None:
        """Of several parts those that can be are released; raises for the first that can't."""
        if not isinstance(handle, _Parts):
            self._agent.release_xfer_handle(handle)
            return
        first: Exception | None = None
        for part in list(handle.handles):
            try:
                self._agent.release_xfer_handle(part)
            except Exception as error:
                first = first or error
            else:  # it is never asked again
                handle.handles.remove(part)
                handle.left = [one for one in handle.left if one is not part]
        if first is not None:
            raise first

    def _prepare(self, agent: str, rows: Any, mem_type: str | None) -> Any:
        return self._agent.prep_xfer_dlist(agent, self._agent.get_xfer_descs(rows, mem_type))
