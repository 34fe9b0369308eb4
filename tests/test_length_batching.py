"""LAPS, by itself and in the twin."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.latency import ConstantLatency
from cluster.request import Slo
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest
from prefill_worker.length_batching import ALL, NOBODY, LengthBatching, short_tokens
from tests.test_roofline import roofline
from tests.test_simulation import spec_of

# Of 1,000 tokens half of the time of one is read weights, at 100 tokens.
SPEED = ConstantLatency(step_s=0.01, prefill_s_per_token=0.0001)
SHORT = short_tokens(SPEED, 100_000)


def test_what_is_short_follows_from_the_speed() -> None:
    assert 95 < SHORT <= 100
    assert short_tokens(ConstantLatency(prefill_s_per_token=0.001), 2048) == 0  # never cheaper together
    assert short_tokens(ConstantLatency(step_s=0.01), 2048) == 1023
    assert short_tokens(ConstantLatency(), 2048) == 0
    # Half of what an H100 can compute while it reads the weights once.
    assert 100 < short_tokens(roofline("llama-3-70b", ranks=4), 2048) < 300


def batching(window_s: float = 1.0) -> LengthBatching:
    return LengthBatching(SPEED, 100_000, window_s)


def test_short_and_long_take_turns_and_an_order_says_who_goes_first() -> None:
    both = [(50, 0.0, math.inf), (500, 0.0, math.inf)]
    one = batching()
    turns = [one.turn(both, 0.0, first_tokens=None, is_idle=False) for _ in range(4)]
    assert [(50 in turn, 500 in turn) for turn in turns] == [(True, False), (False, True)] * 2
    assert 50 in one.turn(both, 0.0, first_tokens=50, is_idle=False)
    assert 50 in one.turn(both, 0.0, first_tokens=50, is_idle=True)  # there is something to do meanwhile
    assert 500 in one.turn(both, 0.0, first_tokens=500, is_idle=True)
    assert one.turn(both[1:], 0.0, first_tokens=None, is_idle=True) == ALL


def test_an_idle_instance_waits_for_others_until_the_window_ends() -> None:
    one = batching()
    asked = [(30, 5.0, math.inf), (30, 5.5, math.inf)]
    assert one.turn(asked, 5.9, first_tokens=None, is_idle=True) == NOBODY
    assert one.held_until_s == 6.0
    assert one.turn(asked, 5.9, first_tokens=None, is_idle=False) == ALL
    assert one.turn(asked, 6.0, first_tokens=None, is_idle=True) == ALL
    assert one.turn([*asked, (50, 5.9, math.inf)], 5.9, first_tokens=None, is_idle=True) == ALL  # enough


def test_one_that_is_due_soon_does_not_wait() -> None:
    one = batching()
    assert one.turn([(50, 5.0, 6.0)], 5.0, first_tokens=50, is_idle=True) == ALL
    assert one.turn([(50, 5.0, 6.5)], 5.0, first_tokens=50, is_idle=True) == NOBODY
    assert one.held_until_s == pytest.approx(6.5 - 1.0 - 0.015)
    assert one.turn([(50, 5.0, 1.0)], 5.0, first_tokens=50, is_idle=True) == ALL


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.floats(0, 10), st.floats(0, 20) | st.just(math.inf)), min_size=1
    ),
    st.booleans(),
    st.booleans(),
)
def test_somebody_goes_unless_all_wait_and_nobody_waits_for_longer_than_the_window(
    asked: list[tuple[int, float, float]], is_idle: bool, by_order: bool
) -> None:
    one, now_s = batching(), 10.0
    first = min(asked, key=lambda prompt: prompt[2])[0] if by_order else None
    turn = one.turn(asked, now_s, first_tokens=first, is_idle=is_idle)
    if not turn:
        assert is_idle
        assert now_s < one.held_until_s <= min(came_s for _, came_s, _ in asked) + 1.0
        turn = one.turn(asked, one.held_until_s, first_tokens=first, is_idle=is_idle)
    going = [tokens for tokens, _, _ in asked if tokens in turn]
    assert going
    assert first is None or first in going
    if len(going) < len(asked):
        assert len({tokens <= one.short_tokens for tokens in going}) == 1


def first_tokens_s(
    asked: list[tuple[float, int]], order: str = "arrival", ttft_s: float = 9.0
) -> list[float]:
    """When each of (arrival, prompt tokens) had its token, at 10 ms and 0.1 ms a token, 300 a time."""
    spec = spec_of(
        policy="least_tokens",
        prefill_order=order,
        prefill_batching="by_length",
        engine_options={"max_num_batched_tokens": 300},
        sim={
            "step_s": 0.01,
            "prefill_s_per_token": 0.0001,
            "max_model_len": 8192,
            "network": {"latency_s": 0.0},
        },
    )
    requests = [WorkloadRequest(arrival_s=at_s, input_tokens=n, output_tokens=2) for at_s, n in asked]
    slo_class = SloClass(name="a", slo=Slo(ttft_s=ttft_s))
    result = Simulation(spec, requests, [slo_class] * len(asked)).run()
    return [request.arrival_s + request.ttft_s for request in result.requests if request.ttft_s is not None]


def test_short_ones_that_come_together_share_an_iteration() -> None:
    both = first_tokens_s([(1.0, 40), (1.004, 50)])
    assert both == [pytest.approx(1.007 + 0.01 + 0.009)] * 2
    # With the second there are enough; and one that is due soon waits for nobody.
    assert first_tokens_s([(1.0, 40), (1.004, 60)]) == [pytest.approx(1.004 + 0.02)] * 2
    assert first_tokens_s([(1.0, 40), (1.004, 50)], ttft_s=0.02)[0] == pytest.approx(1.014)


@pytest.mark.parametrize("order", ["arrival", "deadline"])
def test_a_short_one_waits_for_one_chunk_of_a_long_one_and_shares_none(order: str) -> None:
    long, short, other = first_tokens_s([(1.0, 900), (1.01, 40), (1.02, 50)], order)
    if order == "arrival":
        assert short == other == pytest.approx(1.04 + 0.019)
        assert long == pytest.approx(1.04 + 0.019 + 0.08)
    else:  # the long one is due first
        assert long == pytest.approx(1.12)
        assert short == other == pytest.approx(1.139)
