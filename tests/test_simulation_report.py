"""What a simulation is summed up to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings

from cluster.instance import Role
from cluster.request import NO_SLO
from deploy.replay_report import STATUSES
from deploy.simulator.report import SimulationReport
from deploy.simulator.result import STAGES, FaultMark, SimulationResult
from tests import simulated
from tests.simulated import CHAT, request, result, use

# Two of the class "chat" met, one was late, one rejected, one cancelled; the one of "free" met.
MIXED = result(
    request((0.1, 0.4, 0.0, 0.1, 0.1, 0.5)),
    request((0.3, 0.4, 0.0, 0.1, 0.1, 0.5), arrival_s=10.0),
    request((3.0, 0.4, 0.0, 0.1, 0.1, 1.5), arrival_s=20.0),
    request((), status="rejected", error="rejected-saturated", output_tokens=0),
    request((0.5,), status="cancelled", output_tokens=0),
    request((9.0, 1.0, 0.0, 0.0, 0.0, 90.0), slo=NO_SLO, slo_class="free"),
    instances=(
        use(Role.PREFILL, 0, prefill_tokens=300, prefix_hit_tokens=100, preemptions=1, kv_peak=0.9),
        use(Role.PREFILL, 1, gpus=2, present_s=50.0, busy_s=50.0, preemptions=2, kv_mean=0.55, starts=2),
        use(Role.DECODE, 0, decode_tokens=400, iterations=100),
    ),
    kv_bytes_moved=1_530_000_000,
    kv_tokens_moved=400,
    kv_tokens_recomputed=5,
    warnings=("decode_requests reached 512, measured up to 256",),
    faults=(FaultMark(50.0, "decode-0 killed"),),
    wall_s=2.0,
    events=1000,
)
REPORT = SimulationReport.of(MIXED)


def test_counts_attainment_and_goodput() -> None:
    overall = REPORT.overall
    assert overall.counts == {"ok": 4, "rejected": 1, "failed": 0, "timeout": 0, "cancelled": 1}
    assert (overall.judged, overall.met, REPORT.missed) == (5, 3, 2)
    assert overall.attainment == 3 / 5, "the cancelled one isn't judged"
    assert (overall.ttft_missed, overall.tpot_missed) == (1, 1), "the late one broke both bounds"
    assert REPORT.goodput_rps == 0.03
    assert REPORT.gpus == 4
    assert REPORT.goodput_rps_per_gpu == 0.03 / 4
    assert REPORT.present_gpu_s == 100 + 2 * 50 + 100
    assert REPORT.busy_gpu_s == 40 + 2 * 50 + 40
    assert REPORT.met_per_gpu_hour == 3 * 3600 / 300


def test_classes_are_judged_apart() -> None:
    chat, free = REPORT.classes
    assert [(group.name, group.slo) for group in (chat, free)] == [("chat", CHAT), ("free", NO_SLO)]
    assert (chat.judged, chat.met, chat.attainment) == (4, 2, 0.5)
    assert (free.judged, free.met, free.attainment) == (1, 1, 1.0)


def test_one_class_with_two_bounds_is_two_groups() -> None:
    stricter = replace(CHAT, ttft_s=0.2)
    report = SimulationReport.of(result(request((0.3,)), request((0.3,), slo=stricter)))
    assert [(group.slo, group.met) for group in report.classes] == [(stricter, 0), (CHAT, 1)]


def test_times_are_those_of_complete_answers() -> None:
    latencies = REPORT.overall.latencies
    assert list(latencies) == ["ttft_s", "tpot_s", "e2e_s", *(f"{stage}_s" for stage in STAGES)]
    ttft = latencies["ttft_s"]
    assert ttft is not None
    assert ttft.mean == pytest.approx((0.5 + 0.7 + 3.4 + 10.0) / 4)
    assert ttft.p50 == pytest.approx((0.7 + 3.4) / 2)
    assert ttft.max == 10.0
    queue = latencies["prefill_queue_s"]
    assert queue is not None
    assert queue.mean == pytest.approx((0.1 + 0.3 + 3.0 + 9.0) / 4)
    e2e = latencies["e2e_s"]
    assert e2e is not None
    assert e2e.max == pytest.approx(100.0)


def test_pools() -> None:
    prefill, decode = REPORT.pools
    assert (prefill.role, prefill.instances, prefill.gpus, prefill.starts) == (Role.PREFILL, 2, 3, 3)
    assert prefill.busy_share == 140 / 200
    assert prefill.kv_peak == 0.9
    assert prefill.kv_mean == pytest.approx((0.25 * 100 + 0.55 * 50) / 150)
    assert prefill.prefix_hit_share == 100 / 400
    assert prefill.preemptions == 3
    assert prefill.decode_batch is None
    assert decode.decode_batch == 4.0
    assert decode.prefix_hit_share is None, "no prompt token was found or computed"


def test_throughput_is_that_of_complete_answers() -> None:
    said = REPORT.to_json()
    assert said["request_rps"] == 0.04
    assert said["input_tokens_per_s"] == 4.0
    assert said["output_tokens_per_s"] == 0.44


def test_json_has_what_the_report_says() -> None:
    said = json.loads(json.dumps(REPORT.to_json(), allow_nan=False))
    assert said["attainment"] == 0.6
    assert said["counts"] == {"ok": 4, "rejected": 1, "failed": 0, "timeout": 0, "cancelled": 1}
    assert said["slo_classes"][0]["slo"] == {"ttft_s": 1.0, "tpot_s": 0.1}
    assert said["slo_classes"][1]["slo"] == {"ttft_s": None, "tpot_s": None}, "JSON has no infinity"
    assert said["misses"]["total"] == 2
    assert [cause["name"] for cause in said["misses"]["causes"]] == ["rejected", "prefill_queue"]
    moved = [said[f"kv_{name}"] for name in ("bytes_moved", "tokens_moved", "tokens_recomputed")]
    assert moved == [1_530_000_000, 400, 5]
    assert [pool["role"] for pool in said["pools"]] == ["prefill", "decode"]
    assert said["instances"][0]["peak"]["prefill_tokens"] == 64
    assert said["faults"] == [{"at_s": 50.0, "text": "decode-0 killed"}]
    assert said["errors"] == [{"error": "rejected-saturated", "count": 1}]
    assert said["cost"] == {"wall_s": 2.0, "events": 1000, "events_per_s": 500.0}


def test_without_its_cost_real_time_is_nowhere() -> None:
    slower = SimulationReport.of(replace(MIXED, wall_s=99.0))
    first, second = (json.dumps(report.to_json(with_cost=False)) for report in (REPORT, slower))
    assert first == second
    assert REPORT.to_text(with_cost=False) == slower.to_text(with_cost=False)
    assert REPORT.to_text() != slower.to_text()


def test_a_simulation_of_nothing() -> None:
    report = SimulationReport.of(result(duration_s=0.0, instances=()))
    assert (report.overall.attainment, report.goodput_rps, report.goodput_rps_per_gpu) == (None, 0.0, None)
    assert report.met_per_gpu_hour is None
    assert "attainment  - (0 of 0 met their SLO)" in report.to_text()
    json.dumps(report.to_json(), allow_nan=False)


@settings(deadline=None)
@given(simulated.results())
def test_shares_are_shares_and_the_json_is_plain(found: SimulationResult) -> None:
    report = SimulationReport.of(found)
    for group in (report.overall, *report.classes):
        assert group.attainment is None or 0 <= group.attainment <= 1
        assert tuple(group.counts) == STATUSES
    assert sum(group.judged for group in report.classes) == report.overall.judged
    assert sum(group.met for group in report.classes) == report.overall.met
    assert sum(cause.misses for cause in report.causes) == report.missed
    said = report.to_json()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    again = SimulationReport.of(replace(found, wall_s=found.wall_s + 1))
    assert json.dumps(again.to_json(with_cost=False)) == json.dumps(report.to_json(with_cost=False))
