"""Past-Future: the peak of memory to come, by itself and in the twin."""

from __future__ import annotations

import math
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from decode_worker.past_future import RESERVE, WINDOW, PastFuture
from deploy.simulator.run import Simulation
from deploy.workload import WorkloadRequest
from tests.test_simulation import spec_of


def gate_of(*lengths: int) -> PastFuture:
    """One that has seen nothing but these answers."""
    gate = PastFuture(Random(1))
    for number in range(WINDOW):
        gate.ended(lengths[number % len(lengths)])
    return gate


def test_before_anything_has_ended_answers_may_be_as_long_as_they_may() -> None:
    gate = PastFuture(Random(1))
    holding = [(100, 0, 900)] * 2
    assert gate.fits(holding, math.ceil(2000 / (1 - RESERVE)))
    assert not gate.fits(holding, 2000)


def test_the_peak_is_where_most_of_them_have_grown_most() -> None:
    # Both will end with 100: the older one after 10 more, when the other has 20.
    holding = [(190, 90, 900), (110, 10, 900)]
    gate = gate_of(100)
    # First it ends: 200 + 120. Then the other: 200.
    assert gate.fits(holding, math.ceil(320 / (1 - RESERVE)))
    assert not gate.fits(holding, math.floor(319 / (1 - RESERVE)))


def test_who_is_longer_than_all_before_it_may_get_all_it_may() -> None:
    gate = gate_of(100)
    assert not gate.fits([(300, 200, 900), (10, 0, 0)], 1000)
    assert gate.fits([(300, 200, 400), (10, 0, 0)], 600)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(0, 50), st.integers(51, 400)), min_size=1),
    st.lists(st.integers(1, 400), min_size=1, max_size=20),
)
def test_never_less_than_now_nor_more_than_all_at_their_longest(
    holding: list[tuple[int, int, int]], lengths: list[int]
) -> None:
    gate = gate_of(*lengths)
    now = sum(tokens for tokens, _, _ in holding)
    longest = sum(tokens + limit - done for tokens, done, limit in holding)
    assert now <= gate._peak_tokens(holding) <= longest
    assert gate.fits(holding, math.ceil(longest / (1 - RESERVE)))
    assert not gate.fits(holding, math.floor((now - 1) / (1 - RESERVE)))


def preemptions(admission: str) -> tuple[int, float]:
    """Of decodes in a memory that holds a third of what comes, and the mean time per request."""
    spec = spec_of(
        decode_admission=admission,
        engine_options={"enable_prefix_caching": False},
        sim={"step_s": 0.01, "kv_capacity_tokens": 4096, "max_model_len": 2048},
    )
    rng = Random(3)
    requests = [
        WorkloadRequest(arrival_s=0.02 * n, input_tokens=100, output_tokens=rng.randrange(50, 600))
        for n in range(300)
    ]
    result = Simulation(spec, requests).run()
    assert all(request.status == "ok" for request in result.requests)
    evicted = sum(use.preemptions for use in result.instances if use.instance_id.startswith("decode"))
    return evicted, result.duration_s


def test_nothing_is_evicted_later() -> None:
    evicted, took_s = preemptions("free_blocks")
    spared, calm_s = preemptions("predicted_peak")
    assert evicted > 50
    assert spared <= evicted / 20
    assert calm_s < took_s * 1.1
