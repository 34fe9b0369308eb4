"""KV transfers as flows that share links max-min fairly, for the simulator. Pure: it is told `now_s`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from cluster.errors import ServingError
from kv_transfer.fair_share import Flow, Link, Path, fair_shares
from kv_transfer.topology import Topology

_SAME = 1e-12  # relative; a rate that moved less keeps its value, and its flows their ends


class LinkCut(ServingError):
    """A transfer that can't start: its path is cut. Facts: `source`, `target`."""

    retryable = True
    http_status = 503
    reason = "link-cut"

    source: str = ""
    target: str = ""

    def describe(self) -> str:
        return f"the network from {self.source} to {self.target} is cut"


# Time, number (so that equal times keep their order), path, and either the version of the path whose first
# flow ends or the flow that begins.
_Event: TypeAlias = tuple[float, int, Path, int, Flow | None]


class LinkModel:
    """Transfers under way over a topology. Same calls, same answers.

    Time never goes back: a call with an earlier `now_s` than the one before raises ValueError. What ends
    while another call moves the time is kept for the next `advance`.
    """

    def __init__(self, topology: Topology, *, latency_s: float = 0.0) -> None:
        """`latency_s` passes in every transfer before its first byte. Raises ValueError if it is negative."""
        if not 0 <= latency_s < math.inf:
            raise ValueError(f"latency_s is {latency_s!r}, expected a finite number of seconds >= 0")
        self._topology = topology
        self._latency_s = latency_s
        self._links = {name: Link(rate, rate) for name, rate in topology.links.items()}
        self._paths: dict[tuple[str, str], Path] = {}
        self._flows: dict[str, Flow] = {}
        self._finished: dict[str, None] = {}
        self._events: list[_Event] = []
        self._numbers = 0
        self._now_s = -math.inf

    def __len__(self) -> int:
        """Flows under way."""
        return len(self._flows)

    def start(self, flow_id: str, source: str, target: str, size_bytes: float, now_s: float) -> None:
        """Begin a transfer. Raises LinkCut, and ValueError for an id in use, a bad size or an unknown
        instance."""
        if flow_id in self._flows or flow_id in self._finished:
            raise ValueError(f"flow {flow_id!r} is under way already, or its end was not fetched by advance")
        if not 0 <= size_bytes < math.inf:
            raise ValueError(f"flow {flow_id!r}: size_bytes is {size_bytes!r}, expected a finite number >= 0")
        path = self._path(source, target)
        if path.cut:
            raise LinkCut(source=source, target=target)
        self._run_to(now_s)
        self._numbers += 1
        flow = Flow(flow_id, path, size_bytes, now_s + self._latency_s, self._numbers)
        self._flows[flow_id] = flow
        # Flows begin in the order they start in, so nobody can come between a flow whose links are empty now
        # and its bytes; it needs no event to begin.
        if size_bytes and not any(link.paths or link.waiting for link in path.links):
            path.add(flow, flow.begin_s)
            path.bottleneck = min(path.links, key=lambda link: link.capacity_bytes_per_s)
            path.rate_bytes_per_s = path.bottleneck.capacity_bytes_per_s
            self._schedule(path)
            return
        flow.waiting = True
        for link in path.links:
            link.waiting += 1
        self._push(flow.begin_s, path, 0, flow)
        if not self._latency_s:
            self._run_to(now_s)

    def next_end(self) -> tuple[float, str] | None:
        """When to call `advance` next, and for which flow: none ends before. That flow ends then, or, where
        links are shared, its latency is over and may put other ends off: ask again. None if nothing is to
        come."""
        if self._finished:
            return self._now_s, next(iter(self._finished))
        events = self._events
        while events and not self._holds(events[0]):
            heappop(events)
        if not events:
            return None
        at_s, _, path, _, flow = events[0]
        return at_s, (flow or path.flows[0][2]).flow_id

    def advance(self, now_s: float) -> list[str]:
        """Let the time pass; the flows that ended since the last call, in the order of their ends."""
        self._run_to(now_s)
        finished = list(self._finished)
        self._finished.clear()
        return finished

    def abort(self, flow_id: str, now_s: float) -> None:
        """End a flow early and give its share to the others; it will not be reported, even if it ended at
        this very time. Raises ValueError for a flow that is not under way."""
        self._run_to(now_s)
        if flow_id in self._finished:
            del self._finished[flow_id]
        elif flow_id in self._flows:
            self._share(self._drop(self._flows[flow_id]), now_s)
        else:
            raise ValueError(f"flow {flow_id!r} is not under way")

    def cut(self, source: str, target: str, now_s: float) -> list[str]:
        """Cut the path in this direction: its flows fail, and new ones until `restore`. Returns the failed
        ids in the order of their starts. Raises ValueError for an unknown instance."""
        path = self._path(source, target)
        self._run_to(now_s)
        path.cut = True
        failed = [flow for flow in self._flows.values() if flow.path is path]
        for flow in failed:
            self._drop(flow)
        self._share(path.links, now_s)
        return [flow.flow_id for flow in failed]

    def restore(self, source: str, target: str) -> None:
        """Allow transfers on a path again. Raises ValueError for an unknown instance."""
        self._path(source, target).cut = False

    def scale_link(self, name: str, factor: float, now_s: float) -> None:
        """Set a link (a name of `Topology.links`) to `factor` of its nominal capacity; at 0 its flows stand
        still. Raises ValueError for an unknown link or a negative factor."""
        if name not in self._links:
            raise ValueError(f"no link {name!r}; Topology.links_of(instance) names an instance's links")
        if not 0 <= factor < math.inf:
            raise ValueError(f"link {name!r}: factor is {factor!r}, expected a finite number >= 0")
        self._run_to(now_s)
        link = self._links[name]
        link.resize(link.nominal_bytes_per_s * factor)
        self._share((link,), now_s)

    def rate_bytes_per_s(self, flow_id: str) -> float:
        """The flow's rate at the time told last; 0 in its latency. Raises KeyError if it is not under way."""
        flow = self._flows[flow_id]
        return 0.0 if flow.waiting or flow.begin_s > self._now_s else flow.path.rate_bytes_per_s

    def left_bytes(self, flow_id: str) -> float:
        """Bytes the flow has yet to move at the time told last. Raises KeyError if it is not under way."""
        flow, path = self._flows[flow_id], self._flows[flow_id].path
        if flow.waiting:
            return flow.size_bytes
        passed_s = max(0.0, self._now_s - path.updated_s)
        return max(0.0, flow.end_bytes - path.served_bytes - path.rate_bytes_per_s * passed_s)

    def _path(self, source: str, target: str) -> Path:
        path = self._paths.get((source, target))
        if path is None:
            names = self._topology.path(source, target)
            path = Path(source, target, tuple(self._links[name] for name in names))
            self._paths[source, target] = path
        return path

    def _push(self, at_s: float, path: Path, version: int, flow: Flow | None) -> None:
        self._numbers += 1
        heappush(self._events, (at_s, self._numbers, path, version, flow))
        if len(self._events) > 4 * len(self._flows) + 64:  # mostly events that no longer hold
            self._events = [event for event in self._events if self._holds(event)]
            heapify(self._events)

    @staticmethod
    def _holds(event: _Event) -> bool:
        _, _, path, version, flow = event
        return path.version == version if flow is None else flow.waiting

    def _schedule(self, path: Path) -> None:
        """Put the path's next end into the events; an earlier one of it holds no longer."""
        path.dirty = False
        path.version += 1
        while path.flows[0][2].over:
            heappop(path.flows)
        if path.rate_bytes_per_s > 0:
            left_bytes = max(0.0, path.flows[0][0] - path.served_bytes)
            self._push(path.updated_s + left_bytes / path.rate_bytes_per_s, path, path.version, None)

    def _run_to(self, now_s: float) -> None:
        """Let everything happen that is due."""
        if not self._now_s <= now_s < math.inf:
            raise ValueError(f"now_s is {now_s!r}, but it was {self._now_s!r} before: time only goes forward")
        while self._events and self._events[0][0] <= now_s:
            at_s = self._events[0][0]
            changed: dict[Link, None] = {}
            while self._events and self._events[0][0] == at_s:
                event = heappop(self._events)
                if self._holds(event):
                    self._happen(event)
                    changed.update(dict.fromkeys(event[2].links))
            self._share(changed, at_s)
        self._now_s = now_s

    def _happen(self, event: _Event) -> None:
        at_s, _, path, _, begins = event
        if begins is not None:
            self._stop_waiting(begins)
            if begins.size_bytes:
                path.add(begins, at_s)
            else:
                self._finish(begins)
            return
        path.served_bytes, path.updated_s = path.flows[0][0], at_s
        while path.flows and path.flows[0][0] <= path.served_bytes:
            flow = heappop(path.flows)[2]
            if not flow.over:
                self._finish(flow)
                path.remove()

    def _finish(self, flow: Flow) -> None:
        flow.over = True
        del self._flows[flow.flow_id]
        self._finished[flow.flow_id] = None

    def _stop_waiting(self, flow: Flow) -> None:
        flow.waiting = False
        for link in flow.path.links:
            link.waiting -= 1

    def _drop(self, flow: Flow) -> tuple[Link, ...]:
        """Forget a flow that did not end; returns the links that it leaves."""
        flow.over = True
        del self._flows[flow.flow_id]
        if flow.waiting:
            self._stop_waiting(flow)
        else:
            flow.path.remove()
        return flow.path.links

    def _share(self, changed: Iterable[Link], now_s: float) -> None:
        """Make the rates fair again after a change of these links or of the flows on them."""
        for path in fair_shares(changed):
            if abs(path.share - path.rate_bytes_per_s) > _SAME * path.rate_bytes_per_s:
                path.settle(now_s)
                path.rate_bytes_per_s = path.share
                self._schedule(path)
            elif path.dirty:
                self._schedule(path)
