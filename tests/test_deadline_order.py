"""S-EDF, by itself and in the twin."""

from __future__ import annotations

import math

import pytest

from cluster.latency import ConstantLatency
from cluster.request import Slo
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest
from prefill_worker.deadline_order import DeadlineOrder
from tests.test_simulation import spec_of


def test_feasible_ones_by_deadline_then_those_without_one_then_those_that_are_late() -> None:
    order = DeadlineOrder(ConstantLatency(prefill_s_per_token=0.001))
    asked = {"late": 1.05, "soon": 1.2, "later": 5.0, "any": math.inf, "very late": 0.5}
    ranks = {name: order.rank(100, 0, deadline_s, 1.0) for name, deadline_s in asked.items()}
    assert sorted(ranks, key=lambda name: ranks[name]) == ["soon", "later", "any", "very late", "late"]
    # What is computed already need not be computed again.
    assert order.rank(40, 60, 1.05, 1.0) < order.rank(100, 0, 1.2, 1.0)


CLASSES = {name: SloClass(name=name, slo=Slo(ttft_s=ttft_s)) for name, ttft_s in (("a", 30.0), ("b", 1.0))}


def first_tokens_s(order: str, asked: list[tuple[float, int, str]]) -> list[float]:
    """When each of (arrival, prompt tokens, class) got its first token, at 1 ms per token, 100 a time."""
    spec = spec_of(
        policy="least_tokens",  # that rejects nobody, and computes no prompt elsewhere
        prefill_order=order,
        engine_options={"max_num_batched_tokens": 100},
        sim={"prefill_s_per_token": 0.001, "max_model_len": 8192, "network": {"latency_s": 0.0}},
    )
    requests = [WorkloadRequest(arrival_s=at_s, input_tokens=n, output_tokens=2) for at_s, n, _ in asked]
    result = Simulation(spec, requests, [CLASSES[name] for _, _, name in asked]).run()
    return [request.arrival_s + request.ttft_s for request in result.requests]


def test_a_long_prompt_gives_way_between_two_chunks_and_goes_on() -> None:
    asked = [(0.0, 2000, "a"), (0.25, 100, "b"), (0.26, 50, "b")]
    assert first_tokens_s("arrival", asked)[0] == pytest.approx(2.0)
    long, short, shorter = first_tokens_s("deadline", asked)
    assert short == pytest.approx(0.4)  # after the chunk that ran
    assert shorter == pytest.approx(0.45)  # while the long one gives way
    assert long == pytest.approx(2.15)  # nothing of it was computed twice


def test_whoever_is_too_late_makes_nobody_else_late() -> None:
    asked = [(0.0, 900, "b"), (0.01, 900, "b"), (0.02, 80, "b")]
    first, second, third = first_tokens_s("deadline", asked)
    assert first == pytest.approx(0.9)
    assert third == pytest.approx(1.0)  # in one chunk with 20 tokens of the second
    assert second == pytest.approx(1.88)


def test_the_order_of_arrival_stays_without_deadlines() -> None:
    spec = spec_of(prefill_order="deadline", sim={"prefill_s_per_token": 0.001, "max_model_len": 8192})
    requests = [WorkloadRequest(arrival_s=0.01 * n, input_tokens=500, output_tokens=2) for n in range(6)]
    result = Simulation(spec, requests).run()
    ends = [request.arrival_s + request.ttft_s for request in result.requests]
    assert ends == sorted(ends)
