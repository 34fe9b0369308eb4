"""Which stage a missed SLO is blamed on; times in the tests are worked out by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request import Slo
from deploy.simulator.blame import STAGES_OF, Cause, causes_of_misses, missed_bound
from deploy.simulator.result import STAGES, SimulatedRequest
from tests import simulated
from tests.simulated import CHAT, request

GOOD = (0.1, 0.4, 0.0, 0.02, 0.08, 0.5)  # TTFT 0.5 s, TPOT 0.06 s over the ten tokens after the first


def only_cause(*requests: SimulatedRequest) -> Cause:
    (cause,) = causes_of_misses(requests)
    return cause


def test_nothing_missed_nothing_blamed() -> None:
    assert causes_of_misses([]) == ()
    assert causes_of_misses([request(GOOD), request((), status="cancelled")]) == ()


@pytest.mark.parametrize("status", ["rejected", "failed", "timeout"])
def test_without_a_complete_answer_the_status_is_the_cause(status: str) -> None:
    late = request((9.0,), status=status)  # type: ignore[arg-type]
    assert only_cause(late) == Cause(name=status, bound="answer", misses=1, excess_s=None)


def test_a_late_first_token_is_blamed_on_the_stage_furthest_above_the_usual() -> None:
    # The queue is the longer stage, 0.65 s above the usual 0.1 s; the prefill is 0.2 s above the usual 0.4 s.
    cause = only_cause(request(GOOD), request((0.75, 0.6, 0, 0.02, 0.08, 0.5)))
    assert (cause.name, cause.bound, cause.misses) == ("prefill_queue", "ttft", 1)
    assert cause.excess_s == pytest.approx(0.65)
    # Here the prefill is: 0.3 s above, the queue 0.25 s.
    assert only_cause(request(GOOD), request((0.35, 0.7))).name == "prefill"


def test_the_median_is_that_of_the_requests_that_met_in_the_same_class() -> None:
    others = [request((0.9, 0.05), slo_class="batch") for _ in range(5)]
    late = request((0.5, 0.6))
    # In its own class the usual is 0.1 s and 0.4 s: 0.4 s against 0.2 s. By the other class it were prefill.
    assert only_cause(request(GOOD), *others, late).name == "prefill_queue"
    assert only_cause(*others, late).name == "prefill", "nobody of its class met: above 0"


def test_a_high_tpot_is_blamed_on_what_a_stage_adds_per_token() -> None:
    long_good = request((0.1, 0.4, 0, 0.02, 0.08, 50.0), output_tokens=1001)  # decode 0.05 s per token
    # Two tokens: the transfer adds 0.15 s to the one token's time, decode 0.03 s less than usual.
    short = request((0.1, 0.4, 0.0, 0.15, 0.0, 0.02), output_tokens=2)
    cause = only_cause(long_good, short)
    assert (cause.name, cause.bound) == ("transfer", "tpot")
    assert cause.excess_s == pytest.approx(0.15 - 0.02 / 1000)


@pytest.mark.parametrize(("place", "stage"), list(enumerate(STAGES))[2:])
def test_every_stage_after_the_first_token_can_be_the_cause(place: int, stage: str) -> None:
    slow = tuple(time_s + (2.0 if at == place else 0.0) for at, time_s in enumerate(GOOD))
    cause = only_cause(request(GOOD), request(slow))
    assert (cause.name, cause.bound) == (stage, "tpot")
    assert cause.excess_s == pytest.approx(0.2)


def test_of_both_bounds_the_first_token_counts() -> None:
    assert missed_bound(request((2.0, 0.1, 0, 0, 0, 99.0))) == "ttft"


def test_of_equal_excesses_the_earlier_stage_is_the_cause() -> None:
    assert only_cause(request((1.0, 1.0))).name == "prefill_queue"


def test_the_most_frequent_cause_is_first_and_its_excess_is_a_median() -> None:
    late = [request((queue_s, 0.4)) for queue_s in (1.1, 2.1, 4.1)]
    causes = causes_of_misses([request(GOOD), request((), status="rejected"), *late])
    assert [(cause.name, cause.misses) for cause in causes] == [("prefill_queue", 3), ("rejected", 1)]
    assert causes[0].excess_s == pytest.approx(2.0)


def test_one_token_is_never_blamed_on_its_tpot() -> None:
    assert missed_bound(request((0.1, 0.1), output_tokens=1, slo=Slo(ttft_s=1.0, tpot_s=1e-9))) is None
    assert missed_bound(request((3.0,), output_tokens=1, slo=CHAT)) == "ttft"


@settings(deadline=None)
@given(st.lists(simulated.requests, max_size=40))
def test_causes_sum_to_the_misses(requests: Sequence[SimulatedRequest]) -> None:
    causes = causes_of_misses(requests)
    judged = [one for one in requests if one.status != "cancelled"]
    assert sum(cause.misses for cause in causes) == len(judged) - sum(one.met for one in judged)
    by_bound: Counter[str] = Counter()
    for cause in causes:
        by_bound[cause.bound] += cause.misses
        assert cause.bound == "answer" or cause.name in STAGES_OF[cause.bound]
    assert by_bound == Counter(filter(None, map(missed_bound, requests)))
    assert causes == causes_of_misses(list(reversed(requests))), "whatever their order"
