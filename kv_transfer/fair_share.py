"""Max-min fair rates of flows over links, kept fair from one change to the next. Pure.

A flow's rate is raised together with all others' until one of its links is full (progressive filling;
Bertsekas and Gallager, Data Networks, 2nd ed., section 6.5.2). An allocation is max-min fair exactly when
each flow has a bottleneck: a full link on which no flow is faster. That makes a change local: only flows
whose bottleneck it broke get a new rate.

Flows from one instance to another have equal links, hence equal rates, and are kept together as a path. A
path counts the bytes it has served per flow; a flow ends when that count has grown by its size, as in the
virtual time of fair queueing (Parekh and Gallager, IEEE/ACM ToN 1(3), 1993), so a new rate costs the same for
one flow as for a hundred.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

_TOLERANCE = 1e-9  # relative; sums of a few hundred rates round to about 1e-14


@dataclass(eq=False, slots=True)
class Link:
    """One direction of a link.

    `paths` are those with bytes under way; `waiting` counts flows that have yet to begin. The rest is scratch
    of the filling: bytes per second not given away, flows without a rate, the highest rate given, and whether
    it is the bottleneck of a path that was given one.
    """

    nominal_bytes_per_s: float
    capacity_bytes_per_s: float
    paths: dict[Path, None] = field(default_factory=dict)
    waiting: int = 0
    room: float = 0.0
    open: int = 0
    top: float = 0.0
    binds: bool = False

    def resize(self, capacity_bytes_per_s: float) -> None:
        """Change the capacity, for better or for worse of all its paths."""
        self.capacity_bytes_per_s = capacity_bytes_per_s
        for path in self.paths:
            path.dirty = True


@dataclass(eq=False, slots=True)
class Path:
    """The flows from one instance to another that have begun.

    `flows` is a heap by `served_bytes` at a flow's end; `flowing` counts those not aborted; `served_bytes`
    was true at `updated_s`, which lies ahead for a flow alone in its latency. `share` is the filling's new
    rate. `dirty` asks for a new rate and a new event; an event holds while it carries the `version`.
    """

    source: str
    target: str
    links: tuple[Link, ...]
    cut: bool = False
    flows: list[tuple[float, int, Flow]] = field(default_factory=list)
    flowing: int = 0
    served_bytes: float = 0.0
    updated_s: float = 0.0
    rate_bytes_per_s: float = 0.0
    bottleneck: Link | None = None
    share: float = 0.0
    version: int = 0
    dirty: bool = False

    def settle(self, now_s: float) -> None:
        """Count what was served until now at the present rate."""
        if now_s > self.updated_s:
            self.served_bytes += self.rate_bytes_per_s * (now_s - self.updated_s)
            self.updated_s = now_s

    def add(self, flow: Flow, now_s: float) -> None:
        """One flow more, whose bytes begin now; the first one occupies the links."""
        if self.flowing:
            self.settle(now_s)
        else:
            self.served_bytes, self.updated_s = 0.0, now_s
            for link in self.links:
                link.paths[self] = None
        flow.end_bytes = self.served_bytes + flow.size_bytes
        heappush(self.flows, (flow.end_bytes, flow.order, flow))
        self.flowing += 1
        self.dirty = True

    def remove(self) -> None:
        """One flow less; its entry in `flows` is the caller's, or left until it comes to the front."""
        self.flowing -= 1
        self.dirty = True
        if not self.flowing:
            self.flows.clear()
            self.rate_bytes_per_s = 0.0
            self.version += 1
            for link in self.links:
                del link.paths[self]


@dataclass(eq=False, slots=True)
class Flow:
    """One transfer: `waiting` in its latency, unless it was alone on its links and is in its path at once;
    then flowing; then `over`. `end_bytes` is its path's `served_bytes` at its end; `order` is that of the
    starts."""

    flow_id: str
    path: Path
    size_bytes: float
    begin_s: float
    order: int
    end_bytes: float = 0.0
    waiting: bool = False
    over: bool = False


def fair_shares(changed: Iterable[Link]) -> dict[Path, None]:
    """The paths whose rates may move after a change of these links or of the flows on them, with their fair
    rates in `share`; all other rates stay fair."""
    chosen = {path: None for link in changed for path in link.paths if path.dirty or path.bottleneck is link}
    while unfair := _fill(chosen):
        chosen.update(unfair)
    return chosen


def _fill(chosen: dict[Path, None]) -> dict[Path, None]:
    """Progressive filling of the chosen paths beside the others' rates, into `share`.

    Returns the other paths whose rates can't stay: together with them it is to be done again.
    """
    touched: dict[Link, None] = {}
    for path in chosen:
        path.share = -1.0
        for link in path.links:
            if link not in touched:
                touched[link] = None
                link.room, link.open, link.binds = link.capacity_bytes_per_s, 0, False
            link.open += path.flowing
    beside = [(link, path) for link in touched for path in link.paths if path not in chosen]
    for link, path in beside:
        link.room -= path.rate_bytes_per_s * path.flowing
    levels = [(link.room / link.open, number, link) for number, link in enumerate(touched)]
    heapify(levels)
    while levels:
        level, number, link = heappop(levels)
        if not link.open:
            continue
        now_level = link.room / link.open
        if now_level > level:
            # Its paths were given less elsewhere. Levels only rise, so what is on top and true is the lowest.
            heappush(levels, (now_level, number, link))
        else:
            _give(link, max(0.0, now_level), chosen)
    return {path: None for link, path in beside if _breaks(link, path)}


def _give(full: Link, level: float, chosen: dict[Path, None]) -> None:
    """Fix the rate of the link's chosen paths that have none yet."""
    full.binds = True
    for path in full.paths:
        if path in chosen and path.share < 0:
            path.share, path.bottleneck = level, full
            for link in path.links:
                link.room -= level * path.flowing
                link.open -= path.flowing
                link.top = level


def _breaks(link: Link, path: Path) -> bool:
    """Whether a path beside the chosen ones is faster than those that this link binds, or was bound by this
    link and is no longer."""
    if link.binds and path.rate_bytes_per_s > link.top * (1 + _TOLERANCE):
        return True
    if path.bottleneck is not link:
        return False
    has_room = link.room > link.capacity_bytes_per_s * _TOLERANCE
    return has_room or path.rate_bytes_per_s < link.top * (1 - _TOLERANCE)
