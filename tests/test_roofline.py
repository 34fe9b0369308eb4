"""The roofline: its bounds, its monotonicity, what parallelism and experts do to it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.hardware import hardware_named
from cluster.latency import EMPTY_BATCH, Batch
from cluster.model_shape import named_shape
from cluster.roofline import EFFICIENCIES, RooflineLatency, efficiency_for

MODELS = ("opt-13b", "llama-3-70b", "mixtral-8x7b", "deepseek-v3")
HARDWARE = ("a100", "h100", "l40s", "generic")
IDEAL = replace(
    EFFICIENCIES["h100"],
    gemm=1.0, saturation_tokens=0.0, weight_bandwidth=1.0, elementwise_bandwidth=1.0, attention=1.0,
    kv_bandwidth=1.0, link_bandwidth=1.0, link_s=0.0, link_s_per_gpu=0.0, layer_s=0.0, iteration_s=0.0,
    request_s=0.0, stage_s=0.0,
)  # fmt: skip


def roofline(
    model: str = "llama-3-8b", hardware: str = "h100", ranks: int = 1, stages: int = 1
) -> RooflineLatency:
    return RooflineLatency(named_shape(model), hardware_named(hardware), ranks, pipeline_parallel_size=stages)


def decodes(count: int, context: int = 1000) -> Batch:
    return Batch(decode_requests=count, decode_context_tokens=count * context)


def prompt(tokens: int) -> Batch:
    return Batch(prefill_tokens=tokens, prefill_attention=tokens**2, prefill_requests=1)


@given(
    model=st.sampled_from(MODELS),
    hardware=st.sampled_from(HARDWARE),
    layout=st.sampled_from([(1, 1), (4, 1), (8, 2), (16, 1)]),
    efficiency=st.sampled_from([None, *EFFICIENCIES.values()]),
    batch=st.builds(
        Batch,
        st.integers(0, 20_000),
        st.integers(0, 10**9),
        st.integers(0, 64),
        st.integers(0, 512),
        st.integers(0, 10**6),
    ),
    more=st.builds(Batch, *[st.integers(0, 5000)] * 5),
)
def test_more_work_never_takes_less_time(model, hardware, layout, efficiency, batch, more) -> None:
    latency = RooflineLatency(
        named_shape(model), hardware_named(hardware), layout[0], layout[1], efficiency=efficiency
    )
    before = latency.iteration_s(batch)
    assert before >= 0
    for index, extra in enumerate(more):
        grown = batch._replace(**{Batch._fields[index]: batch[index] + extra})
        assert latency.iteration_s(grown) >= before * (1 - 1e-12)


def test_an_empty_batch_takes_no_time_and_it_holds_everywhere() -> None:
    assert roofline().iteration_s(Batch()) == 0.0
    assert roofline().region is None


def test_an_ideal_decode_reads_weights_and_kv_once() -> None:
    shape, gpu = named_shape("llama-3-8b"), hardware_named("h100")
    seconds = RooflineLatency(shape, gpu, 1, efficiency=IDEAL).iteration_s(decodes(1, 100_000))
    read = shape.weight_bytes - 2 * shape.hidden * shape.vocab  # of the embedding, a row
    read += 100_000 * shape.kv_bytes_per_token
    assert seconds == pytest.approx(read / gpu.memory_bytes_per_s, rel=0.001)


def test_an_ideal_prompt_computes_what_it_must() -> None:
    shape, gpu = named_shape("llama-3-8b"), hardware_named("h100")
    ideal = replace(IDEAL, elementwise_bandwidth=1e9)
    seconds = RooflineLatency(shape, gpu, 1, efficiency=ideal).iteration_s(prompt(8192))
    flops = 8192 * shape.flops_per_token + 8192**2 * shape.attention_flops_per_square_token
    head = shape.head_parameters * shape.dtype_bytes / gpu.memory_bytes_per_s
    assert seconds == pytest.approx(flops / gpu.flops + head, rel=1e-6)


def test_small_batches_cost_the_weights_and_large_ones_their_tokens() -> None:
    latency = roofline()
    assert latency.linear_s(32) < 1.05 * latency.linear_s(1)
    assert latency.linear_s(16_384) == pytest.approx(2 * latency.linear_s(8192), rel=0.05)


def test_more_ranks_are_faster_but_never_ideally() -> None:
    alone, four = roofline("llama-3-70b").iteration_s, roofline("llama-3-70b", ranks=4).iteration_s
    for batch in (prompt(4096), decodes(64)):
        assert alone(batch) / 4 < four(batch) < alone(batch)


def test_ranks_beyond_a_node_pay_for_the_network() -> None:
    assert roofline("llama-3-70b", ranks=16).iteration_s(prompt(8192)) > roofline(
        "llama-3-70b", ranks=8
    ).iteration_s(prompt(8192))


def test_an_iteration_passes_all_stages() -> None:
    one, two = roofline("llama-3-70b"), roofline("llama-3-70b", stages=2)
    extra = two.iteration_s(decodes(8)) - one.iteration_s(decodes(8))
    assert extra == pytest.approx(EFFICIENCIES["h100"].stage_s, rel=0.01)


@pytest.mark.parametrize("weight_bytes", [0.5, 1, 2])
def test_one_token_is_never_bound_by_its_products(weight_bytes: float) -> None:
    """A small batch's badly filled tiles must not cost more than reading quantized weights."""
    shape = replace(named_shape("llama-3-8b"), dtype_bytes=weight_bytes)
    factors = replace(EFFICIENCIES["h100"], layer_s=0.0, elementwise_bandwidth=1e9)
    gpu = hardware_named("h100")
    read_s = shape.shared_parameters * weight_bytes / (gpu.memory_bytes_per_s * factors.weight_bandwidth)
    assert RooflineLatency(shape, gpu, 1, efficiency=factors).linear_s(1) == pytest.approx(read_s)


def test_few_tokens_touch_few_experts() -> None:
    latency = RooflineLatency(named_shape("deepseek-v3"), hardware_named("h200"), 8, efficiency=IDEAL)
    one, all_touched = latency.linear_s(1), latency.linear_s(512)
    assert all_touched > 8 * one  # 8 of 256 experts, and the shared layers
    assert latency.linear_s(513) < 1.01 * all_touched


def expert_group(size: int) -> RooflineLatency:
    return RooflineLatency(named_shape("deepseek-v3"), hardware_named("h200"), 1, data_parallel_size=size)


def test_a_group_reads_its_experts_once() -> None:
    """Alone, every GPU would have to read all experts for a batch that touches them all."""
    batch = decodes(64, 1000)
    alone = roofline("deepseek-v3", hardware="h200").iteration_s(batch)
    assert expert_group(32).iteration_s(batch) < alone / 4


def test_a_group_takes_as_long_as_its_slowest_instance() -> None:
    latency = expert_group(8)
    batch, empty = decodes(64, 1000), EMPTY_BATCH
    equal = latency.group_s([batch] * 8)
    assert equal == pytest.approx(latency.iteration_s(batch))
    one = latency.group_s([batch] + [empty] * 7)
    assert 0.0 < one < equal  # the experts have an eighth to do, attention as much
    assert latency.group_s([prompt(4096)] + [batch] * 7) > latency.group_s([prompt(4096)] + [empty] * 7)
    assert latency.group_s([empty] * 8) == 0.0


def test_only_experts_are_shared() -> None:
    with pytest.raises(ValueError, match="data parallel size is 2, expected at least 1, and 1 without"):
        RooflineLatency(named_shape("llama-3-8b"), hardware_named("h100"), 1, data_parallel_size=2)


def test_latent_attention_is_not_divided_by_ranks() -> None:
    def context_cost_s(model: str, ranks: int) -> float:
        latency = roofline(model, hardware="h200", ranks=ranks)
        return latency.iteration_s(decodes(1, 100_000)) - latency.iteration_s(decodes(1, 0))

    assert context_cost_s("deepseek-v3", 8) > 0.5 * context_cost_s("deepseek-v3", 1)
    assert context_cost_s("llama-3-70b", 8) == pytest.approx(context_cost_s("llama-3-70b", 1) / 8)


def test_the_host_hides_behind_long_work_only() -> None:
    slow_host = replace(EFFICIENCIES["h100"], launch_s=1e-3)
    latency = RooflineLatency(named_shape("llama-3-8b"), hardware_named("h100"), 1, efficiency=slow_host)
    assert latency.iteration_s(decodes(1)) == pytest.approx(32e-3, rel=0.05)
    assert latency.iteration_s(prompt(8192)) == roofline().iteration_s(prompt(8192))


@pytest.mark.parametrize(("hardware", "fitted_on"), [("h200", "h200"), ("b200", "h100"), ("l40s", "a100")])
def test_hardware_without_measurements_takes_the_nearest(hardware: str, fitted_on: str) -> None:
    assert efficiency_for(hardware_named(hardware)) is EFFICIENCIES[fitted_on]


def test_every_set_says_where_it_is_from() -> None:
    assert all(factors.source for factors in EFFICIENCIES.values())


@pytest.mark.parametrize(("ranks", "stages"), [(0, 1), (1, 0), (1, 33)])
def test_impossible_layouts_are_told(ranks: int, stages: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1, and at most 32 stages"):
        roofline(ranks=ranks, stages=stages)


def test_it_loads_no_numpy() -> None:
    probe = "import sys, cluster.roofline, cluster.latency_fit; print('numpy' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run(
        [sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "False"
