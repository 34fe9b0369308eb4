"""Twins of a data-parallel group: their iterations begin and end together, as the experts are those of all.

vLLM's ranks do so: whoever has no request computes along, for the others. Twins in different processes can't:
there each takes the time that it would if the others had as much to do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cluster.latency import EMPTY_BATCH, Batch, LatencyModel, group_s

if TYPE_CHECKING:
    from cluster.sim_engine import SimEngine


class SimGroup:
    """One group, over all its lives.

    Attributes:
        size: twins that it has when it is whole; nothing is computed before, or after one is gone.
    """

    def __init__(self, latency: LatencyModel, size: int) -> None:
        self._latency = latency
        self.size = size
        self._members: list[SimEngine] = []
        self._is_broken = False

    def join(self, engine: SimEngine) -> None:
        """It is there."""
        self._members.append(engine)
        if len(self._members) == self.size:
            for member in self._members:
                member.look_again()

    def leave(self, engine: SimEngine) -> None:
        """It is gone; the others wait until all are."""
        if engine in self._members:
            self._members.remove(engine)
            self._is_broken = bool(self._members)
            self.changed()

    @property
    def busy_until_s(self) -> float:
        """When the running iteration ends, or the last one did."""
        if self._is_broken or len(self._members) < self.size:
            return math.inf
        return max(member.busy_until_s for member in self._members)

    def launch(self, now_s: float) -> None:
        """Begin the next iteration, if none runs and somebody has work."""
        if self.busy_until_s > now_s:
            return
        decided = [member.decide(now_s) for member in self._members]
        steps = [step for step, _ in decided]
        if not any(steps):
            return
        batches = [step.batch if step else EMPTY_BATCH for step in steps]
        slowdown = max(member.slowdown for member in self._members)
        loads_s = max(member.loads_s(step) for member, step in zip(self._members, steps, strict=True))
        ends = [now_s + slowdown * group_s(self._latency, batches) + loads_s]
        quiet_s = min(member.quiet_s for member in self._members)
        is_settled = all(settled for _, settled in decided) and not any(m.holds for m in self._members)
        if quiet_s and is_settled and not any(step and step.chunks for step in steps):
            self._run_ahead(batches, ends, slowdown, quiet_s)
        for member, step in zip(self._members, steps, strict=True):
            if step:
                member.begin(step, now_s, list(ends))

    def changed(self) -> None:
        """Of the iterations decided ahead, only the one that runs stays, of all."""
        for member in self._members:
            member.forget_ahead()

    def _run_ahead(self, batches: list[Batch], ends: list[float], slowdown: float, quiet_s: float) -> None:
        """Add the ends of the iterations that will follow as long as nothing changes but the contexts."""
        most = min(member.most_ahead() for member in self._members)
        last_s = ends[0] + quiet_s
        free = [member.free_blocks for member in self._members]
        for ahead in range(1, most):
            free = [left - one.blocks_at(ahead) for left, one in zip(free, self._members, strict=True)]
            if min(free) < 0 or ends[-1] > last_s:
                break
            batches = [
                one._replace(decode_context_tokens=one.decode_context_tokens + one.decode_requests)
                for one in batches
            ]
            ends.append(ends[-1] + slowdown * group_s(self._latency, batches))
