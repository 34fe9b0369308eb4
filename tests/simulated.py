"""Builders of what a simulation found, and any such thing for hypothesis."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from cluster.instance import Role
from cluster.latency import Batch
from cluster.request import NO_SLO, Slo
from deploy.replay_report import STATUSES, Status
from deploy.simulator.result import (
    FaultMark,
    InstanceUse,
    IterationSpan,
    SimulatedRequest,
    SimulationResult,
    StageTimes,
)

CHAT = Slo(ttft_s=1.0, tpot_s=0.1)


def request(
    stages: tuple[float, ...],
    *,
    output_tokens: int = 11,
    arrival_s: float = 0.0,
    status: Status = "ok",
    slo: Slo = CHAT,
    slo_class: str = "chat",
    error: str | None = None,
    index: int = 0,
) -> SimulatedRequest:
    """A request whose latencies are what its stages come to; without a first token where it has no complete
    answer."""
    times = StageTimes(*stages)
    ttft_s = times.prefill_queue + times.prefill if status == "ok" else None
    rest_s = sum(times[2:])
    return SimulatedRequest(
        index=index,
        slo_class=slo_class,
        slo=slo,
        status=status,
        input_tokens=100,
        output_tokens=output_tokens,
        arrival_s=arrival_s,
        end_s=arrival_s + sum(times),
        ttft_s=ttft_s,
        tpot_s=rest_s / (output_tokens - 1) if status == "ok" and output_tokens > 1 else None,
        stages=times,
        prefill="prefill-0",
        decode="decode-0",
        error=error,
    )


def use(role: Role = Role.PREFILL, number: int = 0, **facts: object) -> InstanceUse:
    """An instance that was there for 100 s, 40 of them busy."""
    known: dict[str, object] = {
        "instance_id": f"{role.value}-{number}",
        "role": role,
        "gpus": 1,
        "present_s": 100.0,
        "busy_s": 40.0,
        "iterations": 50,
        "prefill_tokens": 0,
        "decode_tokens": 0,
        "prefix_hit_tokens": 0,
        "preemptions": 0,
        "kv_peak": 0.5,
        "kv_mean": 0.25,
        "peak": Batch(prefill_tokens=64),
    }
    return InstanceUse(**(known | facts))  # type: ignore[arg-type]


def result(*requests: SimulatedRequest, **facts: object) -> SimulationResult:
    """A simulation of 100 s."""
    known: dict[str, object] = {
        "name": "small",
        "seed": 7,
        "duration_s": 100.0,
        "requests": requests,
        "instances": (use(Role.PREFILL), use(Role.DECODE)),
        "kv_bytes_moved": 0,
        "kv_tokens_moved": 0,
        "kv_tokens_recomputed": 0,
    }
    return SimulationResult(**(known | facts))  # type: ignore[arg-type]


# To the nanosecond: no clock gives the 2e-313 s that hypothesis is fond of.
_time_s = st.floats(min_value=0, max_value=50).map(lambda time_s: round(time_s, 9))
_bound_s = st.one_of(st.just(math.inf), st.floats(min_value=1e-3, max_value=20))
_share = st.floats(min_value=0, max_value=1)
_names = st.sampled_from(["chat", "batch", "</script><b>&\x00\ud800", ""])

requests = st.builds(
    request,
    st.tuples(*[_time_s] * 6),
    output_tokens=st.integers(min_value=1, max_value=500),
    arrival_s=_time_s,
    status=st.sampled_from(STATUSES),
    slo=st.one_of(st.just(NO_SLO), st.builds(Slo, ttft_s=_bound_s, tpot_s=_bound_s)),
    slo_class=_names,
    error=st.one_of(st.none(), st.text(max_size=120)),
)
spans = st.builds(
    lambda instance_id, start_s, length_s, what: IterationSpan(
        instance_id, start_s, start_s + length_s, what, 1, 10, 2
    ),
    st.sampled_from(["prefill-0", "decode-1", "gone"]),
    _time_s,
    _time_s,
    st.sampled_from(["prefill", "decode", "mixed"]),
)


@st.composite
def uses(draw: st.DrawFn) -> InstanceUse:
    """An instance; none computes for longer than it is there."""
    present_s = draw(_time_s)
    return use(
        draw(st.sampled_from(Role)),
        draw(st.integers(min_value=0, max_value=2)),
        present_s=present_s,
        busy_s=present_s * draw(_share),
        kv_peak=draw(_share),
        kv_mean=draw(_share),
        decode_tokens=draw(st.integers(min_value=0, max_value=100)),
        iterations=draw(st.integers(min_value=0, max_value=100)),
    )


@st.composite
def results(draw: st.DrawFn) -> SimulationResult:
    """Anything that a simulation could find, also nothing at all."""
    found = tuple(draw(st.lists(requests, max_size=25)))
    return result(
        *found,
        name=draw(_names),
        duration_s=draw(st.sampled_from([0.0, 1e-3, 250.0])),
        instances=tuple(draw(st.lists(uses(), max_size=4))),
        spans=tuple(draw(st.lists(spans, max_size=12))),
        faults=tuple(FaultMark(at_s, "x < y & z") for at_s in draw(st.lists(_time_s, max_size=2))),
        warnings=tuple(draw(st.lists(_names, max_size=2))),
        wall_s=draw(st.sampled_from([0.0, 2.0])),
        events=draw(st.integers(min_value=0, max_value=10**6)),
    )
