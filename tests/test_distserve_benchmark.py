"""What the comparison with DistServe computes besides simulations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.distserve import balanced
from benchmarks.distserve_engine import Latencies, Placement, Trial, Twins, with_overheads
from cluster.latency import Batch, DecodeCost, LatencyProfile, PrefillCost, ProfiledLatency
from cluster.request import Slo
from deploy.planner.deployment import Layout

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
SLO = Slo(ttft_s=0.2, tpot_s=0.1)
PROFILE = LatencyProfile(
    model="m",
    machine="a",
    source="test",
    prefill=(PrefillCost(base_s=0.02, token_s=1e-4, attention_s=1e-8),),
    decode=(DecodeCost(base_s=0.03, request_s=1e-4, context_s=1e-6),),
    region=Batch(1, 1, 1, 1, 1)._asdict(),
)


@pytest.mark.parametrize(
    ("prefill_rps", "decode_rps", "gpus", "most", "counts"),
    [
        (1.0, 1.0, (1, 1), 8, (1, 1)),  # the fewest GPUs of equally good ones
        (1.0, 2.0, (1, 1), 8, (2, 1)),
        (5.0, 2.0, (2, 1), 8, (1, 2)),  # 2 and 5 would be better, and need 9 GPUs
        (5.0, 2.0, (2, 1), 9, (2, 5)),
        (4.0, 9.0, (4, 4), 8, (1, 1)),  # all that there is room for
    ],
)
def test_phases_are_balanced(
    prefill_rps: float, decode_rps: float, gpus: tuple[int, int], most: int, counts: tuple[int, int]
) -> None:
    assert balanced(prefill_rps, decode_rps, *gpus, most) == counts


latencies = st.tuples(st.floats(0.001, 10), st.floats(0.001, 10))


@given(st.lists(latencies, min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 1.0]))
def test_the_slo_scale_is_the_smallest_that_reaches_the_target(
    found: list[tuple[float, float]], target: float
) -> None:
    run = Latencies(found)
    scale = run.slo_scale(SLO, target)

    def attainment(factor: float) -> float:
        return run.attainment(Slo(ttft_s=SLO.ttft_s * factor, tpot_s=SLO.tpot_s * factor))

    assert attainment(scale * (1 + 1e-9)) >= target
    assert attainment(scale * (1 - 1e-9)) < target


def test_both_bounds_must_hold_for_the_same_request() -> None:
    run = Latencies([(0.1, 0.05), (0.3, 0.05), (0.1, 0.2), (math.inf, math.inf)])
    assert run.attainment(SLO) == 0.25


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_pass_takes_what_simdistserve_takes_for_all_its_stages(stages: int) -> None:
    model = ProfiledLatency(with_overheads(PROFILE, stages))
    prompts = Batch(prefill_tokens=1000, prefill_attention=600**2 + 400**2, prefill_requests=2)
    decodes = Batch(decode_requests=10, decode_context_tokens=5000)
    stage_s = (0.02 + 1e-4 * 1000 + 1e-8 * (600**2 + 400**2)) / stages + stages * 1e-3
    assert model.iteration_s(prompts) == pytest.approx(stages * stage_s + 2e-3 + 1e-7 * 1000)
    stage_s = (0.03 + 1e-4 * 10 + 1e-6 * 5000) / stages
    assert model.iteration_s(decodes) == pytest.approx(stages * stage_s + 2e-3 + 1e-7 * 5000)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not beside the checkout")
def test_placements_run_on_the_gpus_and_the_memory_of_the_paper(tmp_path: Path) -> None:
    twins = Twins(tmp_path, TRACES, Trial(requests=20, seed=0))
    split = Placement.split("opt-66b", Layout(4, 1), Layout(2, 2), 1, 1)
    one = Placement.unsplit("opt-66b", "vllm", Layout(4, 1), 2, "separate")
    for placement in (split, one):
        spec = twins.spec(placement)
        pools = (spec.prefill, spec.decode)
        assert sum(pool.count * pool.ranks for pool in pools) == placement.gpus == 8
        assert twins.run(placement, 0.1).attainment(Slo(ttft_s=60.0, tpot_s=1.0)) == 1.0
    assert twins.spec(split).decode.engine_options["num_gpu_blocks_override"] == 78_512 // 16
    assert twins.spec(one).sim.separate_prefill
