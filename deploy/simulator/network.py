"""The network of a simulation: twins read each other's KV over links that they share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from cluster.errors import SpecError
from cluster.instance import Role
from cluster.placement import placements_of
from cluster.sim_engine import KvGone, SimEngine
from cluster.spec import ClusterSpec
from kv_transfer.link_model import LinkCut, LinkModel
from kv_transfer.topology import LinkRates, Topology, exposed_bytes


class SimNetwork:
    """All transfers of a simulated cluster."""

    def __init__(self, spec: ClusterSpec) -> None:
        placements = placements_of(spec)
        rates = {role: _rates(spec, role) for role in Role}
        roles = dict(spec.places())
        topology = Topology(placements, {instance_id: rates[role] for instance_id, role in roles.items()})
        self._nodes = {one.instance_id: f"node-{one.node}" for one in placements}
        self._topology = topology
        latency_s = spec.sim.network.latency_s if spec.sim.hardware else 0.0
        self._links = LinkModel(topology, latency_s=latency_s)
        self._overlap = spec.transfer.overlap
        self._sources: dict[str, tuple[str, SimEngine]] = {}
        self._moving: dict[str, asyncio.Future[None]] = {}
        self._flows: dict[str, tuple[str, str]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0
        self.bytes_moved = 0
        self.tokens_moved = 0

    def node_of(self, instance_id: str) -> str:
        """The node that an instance is on."""
        return self._nodes[instance_id]

    def join(self, instance_id: str, incarnation: str, engine: SimEngine) -> None:
        """A life's KV can be read."""
        self._sources[instance_id] = incarnation, engine

    def leave(self, instance_id: str) -> None:
        """A life is over: what is read from it or by it stops."""
        self._sources.pop(instance_id, None)
        for flow_id, ends in list(self._flows.items()):
            if instance_id in ends:
                self._links.abort(flow_id, self._now())
                self._fail(flow_id, f"{instance_id} is gone")
        self._arm()

    def cut(self, source: str, target: str) -> None:
        """The way from one instance to another fails, with what moves on it."""
        for flow_id in self._links.cut(source, target, self._now()):
            self._fail(flow_id, f"the link from {source} to {target} is cut")
        self._arm()

    def restore(self, source: str, target: str) -> None:
        """It works again."""
        self._links.restore(source, target)

    def exchange(self, instance_id: str, incarnation: str, kv_bytes_per_token: int) -> _Exchange:
        """One life's way to read and to be read."""
        return _Exchange(self, instance_id, incarnation, kv_bytes_per_token)

    def source_of(self, handle: Mapping[str, Any]) -> SimEngine | None:
        """The engine that keeps a handle's blocks; None when that life is over."""
        life = self._sources.get(handle["remote_instance"])
        return life[1] if life is not None and life[0] == handle["remote_incarnation"] else None

    async def move(self, source: str, target: str, handle: Mapping[str, Any], size_bytes: float) -> None:
        """Move bytes between two instances. Raises KvGone."""
        self._count += 1
        flow_id = f"{handle['remote_request_id']}#{self._count}"
        moving = asyncio.get_running_loop().create_future()
        try:
            self._links.start(
                flow_id, source, target, self._exposed(source, target, handle, size_bytes), self._now()
            )
        except LinkCut as cut:
            raise KvGone(request_id=handle["remote_request_id"], detail=str(cut)) from None
        self._moving[flow_id] = moving
        self._flows[flow_id] = source, target
        self._arm()
        try:
            await moving
        except asyncio.CancelledError:
            if self._moving.pop(flow_id, None) is not None:
                del self._flows[flow_id]
                self._links.abort(flow_id, self._now())
                self._arm()
            raise
        self.bytes_moved += int(size_bytes)

    def _exposed(self, source: str, target: str, handle: Mapping[str, Any], size_bytes: float) -> float:
        """Bytes that are left to move now that the prefill has ended."""
        if not self._overlap or not handle.get("chunks_s"):
            return size_bytes
        return exposed_bytes(
            size_bytes,
            size_bytes * handle["last_chunk_share"],
            handle["chunks_s"],
            self._topology.path_bytes_per_s(source, target),
        )

    def _fail(self, flow_id: str, detail: str) -> None:
        moving = self._moving.pop(flow_id)
        del self._flows[flow_id]
        if not moving.done():
            moving.set_exception(KvGone(request_id=flow_id.rsplit("#", 1)[0], detail=detail))

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        following = self._links.next_end()
        if following is not None:
            self._timer = asyncio.get_running_loop().call_at(following[0], self._tick)

    def _tick(self) -> None:
        self._timer = None
        for flow_id in self._links.advance(self._now()):
            del self._flows[flow_id]
            moving = self._moving.pop(flow_id)
            if not moving.done():
                moving.set_result(None)
        self._arm()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class _Exchange:
    """One life's `KvExchange`."""

    def __init__(
        self, network: SimNetwork, instance_id: str, incarnation: str, kv_bytes_per_token: int
    ) -> None:
        self._network = network
        self._instance_id = instance_id
        self._incarnation = incarnation
        self._kv_bytes_per_token = kv_bytes_per_token

    def address(self) -> dict[str, Any]:
        return {"remote_instance": self._instance_id, "remote_incarnation": self._incarnation}

    def hold(self, handle: Mapping[str, Any]) -> None:
        source = self._network.source_of(handle)
        if source is not None:
            source.held(handle["remote_request_id"])

    def let_go(self, handle: Mapping[str, Any]) -> None:
        source = self._network.source_of(handle)
        if source is not None:
            source.lease_again(handle["remote_request_id"])

    async def read(self, handle: Mapping[str, Any], tokens: int) -> None:
        request_id = handle["remote_request_id"]
        source = self._network.source_of(handle)
        if source is None or not source.held(request_id):
            raise KvGone(request_id=request_id, detail="its source does not keep it any more")
        await self._network.move(
            handle["remote_instance"], self._instance_id, handle, tokens * self._kv_bytes_per_token
        )
        self._network.tokens_moved += tokens
        source.release([request_id])


def _rates(spec: ClusterSpec, role: Role) -> LinkRates:
    links = spec.sim.links_of(role)
    try:
        return LinkRates(
            nic_bytes_per_s=links.nic_bytes_per_s,
            nvlink_bytes_per_s=links.nvlink_bytes_per_s,
            pcie_bytes_per_s=links.pcie_bytes_per_s,
        )
    except ValueError as error:
        raise SpecError(
            file="(spec)", path="sim.network", value=spec.sim.network, allowed=str(error)
        ) from None
