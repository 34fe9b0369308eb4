"""How live twins read each other's KV across processes: over TCP, in the time that the real bytes would take.

No KV moves, there is none: a reader asks whether the source still keeps it, waits, and lets the source free
it. One connection for each pair of reader and source, one JSON array a line:

    reader -> source   ["hello", instance, incarnation], ["hold", id], ["ask", number, id], ["free", id],
                       ["drop", id]
    source -> reader   [number, kept]

What a connection held is given back to its lease when it closes, so a reader that dies leaks nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from cluster.instance import Role
from cluster.keep_alive import keep_alive
from cluster.placement import sharing
from cluster.sim_engine import KvGone
from cluster.spec import ClusterSpec

logger = logging.getLogger(__name__)

CONNECT_DEADLINE_S = 2.0
# A source that is stopped, not dead, keeps its connections; this is how long its readers believe in it.
ANSWER_DEADLINE_S = 5.0

Message = list[str | int | bool]


class Source(Protocol):
    """The engine whose KV is read (`cluster.sim_engine.SimEngine`)."""

    def held(self, request_id: str) -> bool: ...
    def lease_again(self, request_id: str) -> None: ...
    def release(self, request_ids: list[str]) -> None: ...


def nic_bytes_per_s(spec: ClusterSpec, role: Role) -> float:
    """What an instance of a role sends or receives to or from other nodes, in bytes per second."""
    links = spec.sim.links_of(role)
    # Without NVLink the way to the NIC is PCIe.
    rate = (
        links.nic_bytes_per_s
        if links.nvlink_bytes_per_s
        else min(links.nic_bytes_per_s, links.pcie_bytes_per_s)
    )
    return rate * spec.pool(role).ranks


def inside_bytes_per_s(spec: ClusterSpec, role: Role) -> float:
    """What an instance of a role sends or receives within its node, in bytes per second."""
    return spec.sim.links_of(role).link_bytes_per_s * spec.pool(role).ranks


def _beside(spec: ClusterSpec, instance_id: str) -> frozenset[str]:
    """Who shares the node of an instance, where the spec says that."""
    nodes = sharing(spec) if spec.colocate else ()
    return frozenset(other for node in nodes if instance_id in node for other in node if other != instance_id)


class SocketExchange:
    """The `KvExchange` of a live twin: reads from other twins, and serves its own KV to them.

    A transfer takes what it would alone on the NICs of both ends. Contention, which the simulator shares out
    fairly (`kv_transfer.link_model`), is not modelled: processes know nothing of each other's transfers. Who
    shares a node is known where the spec says it (`colocate`): those have NVLink between them.

    Attributes:
        source: the engine whose KV is served; to be set before `start`.
    """

    source: Source

    def __init__(
        self,
        *,
        host: str,
        instance_id: str,
        incarnation: str,
        bytes_per_s: float,
        kv_bytes_per_token: int,
        latency_s: float,
        overlap: bool = False,
        beside: tuple[frozenset[str], float] = (frozenset(), 0.0),
    ) -> None:
        """
        Args:
            host: address of this machine that other workers reach.
            bytes_per_s: of this instance's NICs.
            latency_s: from asking for KV until its first byte.
            overlap: whether chunks of a prompt have moved while later ones were computed.
            beside: the instances of its node, and the bytes per second of its links to them.
        """
        self._host = host
        self._life = [instance_id, incarnation]
        self._bytes_per_s = bytes_per_s
        self._kv_bytes_per_token = kv_bytes_per_token
        self._latency_s = latency_s
        self._overlap = overlap
        self._beside, self._beside_bytes_per_s = beside
        self._server: asyncio.Server | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._sources: dict[tuple[Any, ...], _SourceLink] = {}

    @classmethod
    def of(
        cls,
        spec: ClusterSpec,
        role: Role,
        *,
        host: str,
        instance_id: str,
        incarnation: str,
        kv_bytes_per_token: int,
    ) -> SocketExchange:
        """The exchange of an instance of a spec."""
        return cls(
            host=host,
            instance_id=instance_id,
            incarnation=incarnation,
            bytes_per_s=nic_bytes_per_s(spec, role),
            kv_bytes_per_token=kv_bytes_per_token,
            latency_s=spec.sim.network.latency_s if spec.sim.hardware else 0.0,
            overlap=spec.transfer.overlap,
            beside=(_beside(spec, instance_id), inside_bytes_per_s(spec, role)),
        )

    async def start(self) -> None:
        """Let others read. Raises OSError when `host` is no address of this machine."""
        self._server = await asyncio.start_server(self._serve, self._host, 0)

    async def close(self) -> None:
        """End all connections: what others held here, and what was held of others, is given back."""
        if self._server is not None:
            self._server.close()
        links = list(self._sources.values())
        tasks = [*self._readers, *(link.task for link in links)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- cluster.sim_engine.KvExchange

    def address(self) -> dict[str, Any]:
        if self._server is None:
            raise RuntimeError("the exchange was not started")
        instance_id, incarnation = self._life
        return {
            "remote_host": self._host,
            "remote_port": self._server.sockets[0].getsockname()[1],
            "remote_instance": instance_id,
            "remote_incarnation": incarnation,
            "remote_bytes_per_s": self._bytes_per_s,
            "remote_beside_bytes_per_s": self._beside_bytes_per_s,
        }

    def hold(self, handle: Mapping[str, Any]) -> None:
        self._link_to(handle).say("hold", handle["remote_request_id"])

    def let_go(self, handle: Mapping[str, Any]) -> None:
        self._link_to(handle).say("drop", handle["remote_request_id"])

    async def read(self, handle: Mapping[str, Any], tokens: int) -> None:
        began_s = asyncio.get_running_loop().time()
        request_id = handle["remote_request_id"]
        link = self._link_to(handle)
        if not await link.keeps(request_id):
            raise KvGone(request_id=request_id, detail="its source does not keep it any more")
        # From the first word on: asking is a part of the latency.
        await link.until(began_s + self._transfer_s(handle, tokens), request_id)
        link.say("free", request_id)

    def _transfer_s(self, handle: Mapping[str, Any], tokens: int) -> float:
        rate: float = min(self._bytes_per_s, handle["remote_bytes_per_s"])
        if handle["remote_instance"] in self._beside:
            rate = min(self._beside_bytes_per_s, handle["remote_beside_bytes_per_s"])
        size = float(tokens * self._kv_bytes_per_token)
        if self._overlap and handle.get("chunks_s"):
            # As kv_transfer.topology.exposed_bytes, which this package must not import.
            size = min(size, max(size * handle["last_chunk_share"], size - rate * handle["chunks_s"]))
        return self._latency_s + size / rate

    # --- as a reader

    def _link_to(self, handle: Mapping[str, Any]) -> _SourceLink:
        where = tuple(
            handle[key] for key in ("remote_host", "remote_port", "remote_instance", "remote_incarnation")
        )
        link = self._sources.get(where)
        if link is None:
            link = self._sources[where] = _SourceLink(*where)
            link.task.add_done_callback(lambda _: self._sources.pop(where, None))
        return link

    # --- as a source

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One reader's connection."""
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        held: set[str] = set()
        try:
            keep_alive(writer.get_extra_info("socket"))
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                hello = _message(await reader.readline())
            if hello != ["hello", *self._life]:
                logger.warning("a reader looks for %s here, this is %s", hello, self._life)
                return
            while line := await reader.readline():
                self._take(_message(line), held, writer)
        except (OSError, TimeoutError, ValueError) as error:
            logger.warning("lost a reader: %s", error or type(error).__name__)
        finally:
            self._readers.discard(task)
            for request_id in held:
                self.source.lease_again(request_id)
            writer.close()

    def _take(self, message: Message, held: set[str], writer: asyncio.StreamWriter) -> None:
        """Do what a reader says. Raises ValueError for what can't be read."""
        match message:
            case ["hold", str(request_id)]:
                if self.source.held(request_id):
                    held.add(request_id)
            case ["ask", int(number), str(request_id)]:
                kept = self.source.held(request_id)
                if kept:
                    held.add(request_id)
                writer.write(_line(number, kept))
            case ["free", str(request_id)]:
                held.discard(request_id)
                self.source.release([request_id])
            case ["drop", str(request_id)]:
                if request_id in held:
                    held.discard(request_id)
                    self.source.lease_again(request_id)
            case _:
                raise ValueError(f"unknown message {message!r}")


class _SourceLink:
    """A reader's connection to one life of a source; made once, and not again when it is lost."""

    def __init__(self, host: str, port: int, instance_id: str, incarnation: str) -> None:
        loop = asyncio.get_running_loop()
        self._address = host, port
        self._instance_id = instance_id
        self._unsent = [_line("hello", instance_id, incarnation)]
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._numbers = itertools.count()
        self._lost: asyncio.Future[str] = loop.create_future()
        self.task = loop.create_task(self._run(), name=f"kv-of-{instance_id}")

    def say(self, *words: str | int) -> None:
        """Send it now, or once connected. A source that can't be reached has nothing to free."""
        if self._writer is None:
            self._unsent.append(_line(*words))
        elif not self._lost.done():
            self._writer.write(_line(*words))

    async def keeps(self, request_id: str) -> bool:
        """Whether the source keeps the KV, for this reader from now on. Raises KvGone."""
        number = next(self._numbers)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self.say("ask", number, request_id)
        try:
            first: list[asyncio.Future[Any]] = [answer, self._lost]
            await asyncio.wait(first, timeout=ANSWER_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise self._gone(request_id, f"no answer in {ANSWER_DEADLINE_S:g} s")
        finally:
            del self._answers[number]

    async def until(self, when_s: float, request_id: str) -> None:
        """Wait for a loop time. Raises KvGone when the source is lost before."""
        left_s = when_s - asyncio.get_running_loop().time()
        if left_s > 0:
            await asyncio.wait([self._lost], timeout=left_s)
        if self._lost.done():
            raise self._gone(request_id, "")

    def _gone(self, request_id: str, why: str) -> KvGone:
        why = self._lost.result() if self._lost.done() else why
        return KvGone(request_id=request_id, detail=f"{self._instance_id}: {why}")

    async def _run(self) -> None:
        why = "this reader is closing"
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                reader, writer = await asyncio.open_connection(*self._address)
            self._writer = writer
            keep_alive(writer.get_extra_info("socket"))
            writer.write(b"".join(self._unsent))
            while line := await reader.readline():
                number, kept = _message(line)
                if (answer := self._answers.get(int(number))) is not None and not answer.done():
                    answer.set_result(bool(kept))
            why = "its connection closed"
        except TimeoutError:
            why = f"no connection in {CONNECT_DEADLINE_S:g} s"
        except (OSError, ValueError) as error:
            why = str(error)
        finally:
            self._lost.set_result(why)
            if self._writer is not None:
                self._writer.close()
            logger.info("no KV of %s can be read any more: %s", self._instance_id, why)


def _line(*words: str | int | bool) -> bytes:
    return msgspec.json.encode(words) + b"\n"


def _message(line: bytes) -> Message:
    message: Message = msgspec.json.decode(line, type=Message)  # its errors are ValueErrors
    return message
