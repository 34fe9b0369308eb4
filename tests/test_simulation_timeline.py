"""The trace file for Perfetto."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from deploy.simulator.result import FaultMark, IterationSpan, SimulationResult
from deploy.simulator.timeline import REQUESTS_PID, write_timeline
from tests import simulated
from tests.simulated import request, result


def written(found: SimulationResult, path: Path, **options: int) -> dict[str, Any]:
    write_timeline(found, path, **options)
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def of(trace: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def names(trace: dict[str, Any], what: str) -> dict[tuple[int, int], str]:
    events = [event for event in of(trace, "M") if event["name"] == what]
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in events}


def test_an_instance_is_a_process_and_its_iterations_are_slices(tmp_path: Path) -> None:
    spans = (
        IterationSpan("decode-0", 1.0, 1.5, "decode", 20, 0, 8),
        IterationSpan("prefill-0", 0.25, 0.5, "prefill", 1, 512, 0),
    )
    trace = written(result(spans=spans), tmp_path / "t.json")
    assert names(trace, "process_name") == {(0, 0): "requests", (1, 0): "prefill-0", (2, 0): "decode-0"}
    prefill, decode = of(trace, "X")
    assert prefill == {
        "ph": "X",
        "name": "prefill",
        "cat": "iteration",
        "ts": 250_000.0,
        "dur": 250_000.0,
        "pid": 1,
        "tid": 0,
        "args": {"iterations": 1, "prefill_tokens": 512, "decode_requests": 0},
    }
    assert (decode["pid"], decode["ts"], decode["dur"], decode["args"]["iterations"]) == (2, 1e6, 5e5, 20)


def test_an_instance_that_is_only_in_spans_has_its_process(tmp_path: Path) -> None:
    trace = written(result(spans=(IterationSpan("gone", 0.0, 1.0, "decode", 1, 0, 1),)), tmp_path / "t.json")
    assert "gone" in names(trace, "process_name").values()


def test_iterations_that_overlap_have_lanes_of_their_own(tmp_path: Path) -> None:
    times = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, 3.5)]
    spans = tuple(IterationSpan("decode-0", start, end, "decode", 1, 0, 1) for start, end in times)
    trace = written(result(spans=spans), tmp_path / "t.json")
    assert [event["tid"] for event in of(trace, "X")] == [0, 1, 0, 2]
    assert names(trace, "thread_name") == {
        (2, 0): "iterations",
        (2, 1): "iterations, lane 2",
        (2, 2): "iterations, lane 3",
    }


def test_a_request_has_a_slice_for_each_stage_that_took_time(tmp_path: Path) -> None:
    trace = written(
        result(request((0.5, 1.0, 0.0, 0.25, 0.0, 2.0), arrival_s=10.0, index=4)), tmp_path / "t.json"
    )
    begins = [(event["name"], event["ts"]) for event in of(trace, "b")]
    assert begins == [
        ("request", 10e6),
        ("prefill_queue", 10e6),
        ("prefill", 10.5e6),
        ("transfer", 11.5e6),
        ("decode", 11.75e6),
    ]
    assert {event["id"] for event in of(trace, "b") + of(trace, "e")} == {4}
    about = of(trace, "b")[0]["args"]
    assert (about["status"], about["slo_class"], about["prefill"], about["met"]) == (
        "ok",
        "chat",
        "prefill-0",
        False,
    )


def test_only_the_first_requests_are_in_it_and_it_says_so(tmp_path: Path) -> None:
    requests = [request((1.0,), arrival_s=float(9 - number), index=number) for number in range(10)]
    trace = written(result(*requests), tmp_path / "t.json", max_requests=3)
    assert [event["args"]["index"] for event in of(trace, "b") if event["name"] == "request"] == [9, 8, 7]
    assert trace["otherData"]["notes"] == [
        "the first 3 of 10 requests by arrival are shown",
        "iterations were not recorded",
    ]
    assert names(trace, "process_name")[REQUESTS_PID, 0] == "requests (first 3 of 10)"


def test_faults_are_marks_over_all_processes(tmp_path: Path) -> None:
    trace = written(result(faults=(FaultMark(3.0, "decode-0 killed"),)), tmp_path / "t.json")
    (mark,) = of(trace, "i")
    assert (mark["name"], mark["ts"], mark["s"]) == ("decode-0 killed", 3e6, "g")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_requests is -1, expected at least 0"):
        write_timeline(result(), tmp_path / "t.json", max_requests=-1)
    with pytest.raises(OSError, match="No such file"):
        write_timeline(result(), tmp_path / "nowhere" / "t.json")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(simulated.results())
def test_slices_nest_and_bytes_repeat(tmp_path: Path, found: SimulationResult) -> None:
    trace = written(found, tmp_path / "first.json")
    write_timeline(found, tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    assert len(of(trace, "X")) == len(found.spans)
    threads: dict[tuple[int, int], float] = defaultdict(float)
    for event in of(trace, "X"):
        assert event["dur"] >= 0
        assert event["ts"] >= threads[event["pid"], event["tid"]] - 0.002, "slices of a thread don't overlap"
        threads[event["pid"], event["tid"]] = event["ts"] + event["dur"]
    assert set(threads) <= set(names(trace, "thread_name"))
    open_slices: list[str] = []
    now_us = 0.0
    for event in trace["traceEvents"]:
        if event["ph"] == "b":
            now_us = event["ts"] if not open_slices else now_us
            assert event["ts"] >= now_us
            open_slices.append(event["name"])
        elif event["ph"] == "e":
            assert event["ts"] >= now_us
            assert open_slices.pop() == event["name"]
        now_us = event["ts"] if event["ph"] in "be" else now_us
    assert open_slices == []
