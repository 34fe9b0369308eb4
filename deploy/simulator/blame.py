"""Which stage cost a simulated cluster its SLOs: every miss is blamed to exactly one cause.

The rule, for a request that isn't cancelled and didn't meet its SLO:

1. Without a complete answer, the cause is its status (rejected, failed, timeout).
2. With its first token too late, the cause is one of the stages before it: the one whose time is furthest
   above the median of that stage among the requests of the same SLO class that met (above 0 where none did).
3. Otherwise its TPOT was too high, and the cause is found the same way among the stages after the first
   token, each divided by the tokens after the first. That is each stage's share in the TPOT; undivided, a
   long answer would always be blamed on decode, and a slow hand-over before a short one never found.

A request that broke both bounds is blamed for the first one: its TTFT was lost before its decode began. Of
equal excesses the earlier stage is the cause.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.request import Slo
from deploy.simulator.result import STAGES, SimulatedRequest
from deploy.workload import percentile

Bound = Literal["ttft", "tpot", "answer"]
STAGES_OF: dict[Bound, tuple[str, ...]] = {"ttft": STAGES[:2], "tpot": STAGES[2:], "answer": ()}
_Group = tuple[str, Slo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Misses with one cause.

    Attributes:
        name: a stage, or the status of requests without a complete answer.
        bound: what they missed: "ttft", "tpot" or "answer".
        misses: how many.
        excess_s: how far that stage was above the median of those that met, as the median over these
            misses, in seconds (for "tpot" seconds per output token after the first); None for a status.
    """

    name: str
    bound: Bound
    misses: int
    excess_s: float | None


def missed_bound(request: SimulatedRequest) -> Bound | None:
    """What the request missed first; None when it met its SLO or was cancelled."""
    if request.met or request.status == "cancelled":
        return None
    if request.status != "ok":
        return "answer"
    return "ttft" if request.ttft_s is None or request.ttft_s > request.slo.ttft_s else "tpot"


def causes_of_misses(requests: Sequence[SimulatedRequest]) -> tuple[Cause, ...]:
    """Every cause, the most frequent first; their misses sum to the requests that missed."""
    usual = _medians_of_met(requests)
    excesses: dict[tuple[Bound, str], list[float]] = defaultdict(list)
    for request in requests:
        bound = missed_bound(request)
        if bound == "answer":
            excesses[bound, request.status].append(0.0)
        elif bound is not None:
            stage, excess_s = _worst_stage(request, bound, usual)
            excesses[bound, stage].append(excess_s)
    found = [
        Cause(
            name=name,
            bound=bound,
            misses=len(values),
            excess_s=None if bound == "answer" else percentile(values, 50),
        )
        for (bound, name), values in excesses.items()
    ]
    return tuple(sorted(found, key=lambda cause: (-cause.misses, cause.bound, cause.name)))


def _shares(request: SimulatedRequest) -> tuple[float, ...]:
    """What each stage adds to the bound it counts for: TTFT before the first token, TPOT after it."""
    tokens_after_first = max(1, request.output_tokens - 1)
    before = len(STAGES_OF["ttft"])
    return tuple(
        time_s if place < before else time_s / tokens_after_first
        for place, time_s in enumerate(request.stages)
    )


def _medians_of_met(requests: Sequence[SimulatedRequest]) -> dict[_Group, tuple[float, ...]]:
    met: dict[_Group, list[tuple[float, ...]]] = defaultdict(list)
    for request in requests:
        if request.met:
            met[request.slo_class, request.slo].append(_shares(request))
    return {
        group: tuple(percentile(stage, 50) for stage in zip(*shares, strict=True))
        for group, shares in met.items()
    }


def _worst_stage(
    request: SimulatedRequest, bound: Bound, usual: dict[_Group, tuple[float, ...]]
) -> tuple[str, float]:
    medians = usual.get((request.slo_class, request.slo), (0.0,) * len(STAGES))
    excess = dict(zip(STAGES, map(float.__sub__, _shares(request), medians), strict=True))
    # max() keeps the first of equals, and the stages are in the order of the clock.
    stage = max(STAGES_OF[bound], key=excess.__getitem__)
    return stage, excess[stage]
