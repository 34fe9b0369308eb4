"""A simulation as a trace file for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

The format is Chrome's Trace Event Format, JSON object form. A process is an instance and its slices are
stretches of iterations; the requests are one more process, with a nested asynchronous slice for each stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.simulator.result import STAGES, IterationSpan, SimulatedRequest, SimulationResult

MAX_REQUESTS = 2000
REQUESTS_PID = 0
_Event = dict[str, object]


def write_timeline(result: SimulationResult, path: Path | str, *, max_requests: int = MAX_REQUESTS) -> None:
    """Write the trace file, event by event; times are microseconds of virtual time.

    Only the first `max_requests` requests by arrival are in it (a viewer slows down with each), the file says
    so. Raises ValueError for a negative limit and OSError for a path that can't be written.
    """
    if max_requests < 0:
        raise ValueError(f"max_requests is {max_requests!r}, expected at least 0")
    shown = sorted(result.requests, key=lambda request: (request.arrival_s, request.index))[:max_requests]
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"displayTimeUnit": "ms",\n')
        file.write(f'"otherData": {_json(_facts(result, len(shown)))},\n"traceEvents": [')
        separator = "\n"
        for event in _events(result, shown):
            file.write(separator + _json(event))
            separator = ",\n"
        file.write("\n]}\n")


def _facts(result: SimulationResult, shown: int) -> _Event:
    notes = []
    if shown < len(result.requests):
        notes.append(f"the first {shown:,} of {len(result.requests):,} requests by arrival are shown")
    if not result.spans:
        notes.append("iterations were not recorded")
    return {
        "simulation": result.name,
        "seed": result.seed,
        "notes": notes,
        "warnings": list(result.warnings),
    }


def _events(result: SimulationResult, shown: Sequence[SimulatedRequest]) -> Iterator[_Event]:
    spans: dict[str, list[IterationSpan]] = {use.instance_id: [] for use in result.instances}
    for span in result.spans:
        spans.setdefault(span.instance_id, []).append(span)
    label = f"requests (first {len(shown):,} of {len(result.requests):,})"
    yield from _process(REQUESTS_PID, label if len(shown) < len(result.requests) else "requests")
    for pid, instance_id in enumerate(spans, start=REQUESTS_PID + 1):
        yield from _process(pid, instance_id)
    for mark in result.faults:
        # "g": across all processes, so that it is seen beside whatever it broke.
        yield {
            "ph": "i",
            "s": "g",
            "name": mark.text,
            "cat": "fault",
            "ts": _us(mark.at_s),
            "pid": 0,
            "tid": 0,
        }
    for pid, own in enumerate(spans.values(), start=REQUESTS_PID + 1):
        yield from _iterations(pid, own)
    for request in shown:
        yield from _stages(request)


def _process(pid: int, name: str) -> Iterator[_Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}


def _iterations(pid: int, spans: Sequence[IterationSpan]) -> Iterator[_Event]:
    """Slices of one process. Iterations that overlap (a pipeline's) go to lanes of their own: a viewer nests
    the slices of a thread, and these are not nested."""
    lane_ends: list[float] = []
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        lane = next((lane for lane, end_s in enumerate(lane_ends) if end_s <= span.start_s), len(lane_ends))
        if lane == len(lane_ends):
            lane_ends.append(0.0)
            name = "iterations" if lane == 0 else f"iterations, lane {lane + 1}"
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": lane, "args": {"name": name}}
        lane_ends[lane] = span.end_s
        start_us = _us(span.start_s)
        yield {
            "ph": "X",
            "name": span.what,
            "cat": "iteration",
            "ts": start_us,
            "dur": round(_us(span.end_s) - start_us, 3),
            "pid": pid,
            "tid": lane,
            "args": {
                "iterations": span.iterations,
                "prefill_tokens": span.prefill_tokens,
                "decode_requests": span.decode_requests,
            },
        }


def _stages(request: SimulatedRequest) -> Iterator[_Event]:
    """A slice from arrival to end and in it one for each stage that took time.

    Times are summed over attempts: the stages of a request that was moved are not where they were, but as
    long as they were.
    """
    common: _Event = {"cat": "request", "id": request.index, "pid": REQUESTS_PID, "tid": 0}
    about = {
        "index": request.index,
        "status": request.status,
        "met": request.met,
        "slo_class": request.slo_class,
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
        "ttft_s": request.ttft_s,
        "tpot_s": request.tpot_s,
        "prefill": request.prefill,
        "decode": request.decode,
        "moves": request.moves,
        "error": request.error,
    }
    # One name for all: Perfetto then stacks them in one group instead of a track for each.
    yield {**common, "ph": "b", "name": "request", "ts": _us(request.arrival_s), "args": about}
    now_s = request.arrival_s
    for stage, time_s in zip(STAGES, request.stages, strict=True):
        # Not after the request's own end, where the sum of the stages has a rounding error.
        end_s = min(request.end_s, now_s + time_s)
        if end_s > now_s:
            yield {**common, "ph": "b", "name": stage, "ts": _us(now_s)}
            yield {**common, "ph": "e", "name": stage, "ts": _us(end_s)}
        now_s = end_s
    yield {**common, "ph": "e", "name": "request", "ts": _us(request.end_s)}


def _us(time_s: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(time_s * 1e6, 3)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
