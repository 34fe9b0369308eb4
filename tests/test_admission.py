"""Who is rejected, with what."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest

from cluster.errors import Rejected, RejectedAsCostly, RejectedForOthers
from cluster.request import NO_SLO, ServeRequest, Slo
from router.admission import LEAST_CHANCE, RESERVED, Admission
from router.predictor import Prediction


def predicted(chance: float, ttft_s: float = 0.5, tpot_s: float = 0.02) -> Prediction:
    return Prediction(
        queue_s=0.1, work_s=0.1, ttft_s=ttft_s, tpot_s=tpot_s, iteration_s=0.02,
        output_tokens=200, chance=chance,
    )  # fmt: skip


def request(slo: Slo, tenant: str = "", priority: int = 0) -> ServeRequest:
    return ServeRequest(
        request_id="r",
        prompt_token_ids=[1] * 1000,
        max_tokens=9,
        slo=slo,
        tenant=tenant,
        priority=priority,
    )


def test_a_chance_is_given() -> None:
    Admission().require(request(NO_SLO), None, 0.0)
    Admission().require(request(Slo(ttft_s=0.6)), predicted(LEAST_CHANCE), 0.0)


def test_a_rejection_says_what_would_be_and_when_to_come_back() -> None:
    with pytest.raises(Rejected) as caught:
        Admission().require(request(Slo(ttft_s=0.3)), predicted(0.01, ttft_s=4.7), 0.0)
    error = caught.value
    assert (error.http_status, error.reason, error.retry_after_s) == (429, "rejected-saturated", 5)
    assert str(error) == (
        "too busy for this request's SLO: TTFT would be 4700 ms, its bound is 300 ms; try again in 5 s"
    )
    again = pickle.loads(pickle.dumps(error))
    assert again.facts == error.facts
    assert again.tpot_bound_s == math.inf


def test_who_costs_others_more_than_it_gets_is_told_so() -> None:
    costly = replace(predicted(0.6), harm=0.7, queue_s=2.4)
    with pytest.raises(
        RejectedAsCostly, match=r"its chance to keep its SLO 60%, and others would lose 0\.70"
    ) as caught:
        Admission().require(request(Slo(ttft_s=0.6)), costly, 0.0)
    assert (caught.value.reason, caught.value.retry_after_s) == ("rejected-costly", 3)
    Admission().require(request(Slo(ttft_s=0.6)), replace(costly, harm=0.6), 0.0)


def test_a_bound_below_a_millisecond_is_not_called_none() -> None:
    with pytest.raises(Rejected, match=r"TTFT would be 10 ms, its bound is 0\.5 ms"):
        Admission().require(request(Slo(ttft_s=0.0005)), predicted(0.0, ttft_s=0.01), 0.0)


@pytest.mark.parametrize(
    ("slo", "found", "retry_s"),
    [
        (Slo(ttft_s=0.3), {"ttft_s": 0.31}, 1),
        (Slo(ttft_s=0.3), {"ttft_s": 1e4}, 60),
        (Slo(tpot_s=0.01), {"tpot_s": 0.045}, 5),
    ],
)
def test_when_to_come_back(slo: Slo, found: dict[str, float], retry_s: int) -> None:
    with pytest.raises(Rejected) as caught:
        Admission().require(request(slo), predicted(0.0, **found), 0.0)
    assert caught.value.retry_after_s == retry_s


def test_without_an_slo_nobody_waits_for_longer_than_would_be_ended() -> None:
    admission = Admission(longest_s=120.0)
    admission.require(request(NO_SLO), predicted(1.0, ttft_s=119.0), 0.0)
    with pytest.raises(Rejected, match="its bound is 120000 ms"):
        admission.require(request(NO_SLO), predicted(1.0, ttft_s=121.0), 0.0)


def test_who_has_had_more_than_others_leaves_room_for_them() -> None:
    admission, slo = Admission(), Slo(ttft_s=1.0)
    late, later = predicted(0.9, ttft_s=0.69), predicted(0.9, ttft_s=0.71)
    for number in range(40):  # alone it may have all
        admission.require(request(slo, "big"), later, number * 0.1)
        admission.admitted(request(slo, "big"), later)
    admission.require(request(slo, "small"), later, 4.0)
    for _ in range(40):
        admission.admitted(request(slo, "big"), later)
    with pytest.raises(RejectedForOthers, match="this tenant has had more than others") as caught:
        admission.require(request(slo, "big"), later, 4.2)
    assert caught.value.http_status == 429
    assert caught.value.limit_s == pytest.approx(1 - RESERVED)
    admission.require(request(slo, "big"), late, 4.3)
    admission.require(request(slo, "small"), later, 4.3)
    # The other has not come for a minute: alone again.
    admission.require(request(slo, "big"), later, 70.0)


def test_lower_classes_are_shed_first() -> None:
    admission, slo = Admission(), Slo(ttft_s=1.0)
    later = predicted(0.9, ttft_s=0.71)
    admission.require(request(slo, priority=0), later, 0.0)
    admission.require(request(slo, priority=-1), later, 0.0)
    with pytest.raises(RejectedForOthers, match="its priority is lower than others'"):
        admission.require(request(slo, priority=1), later, 0.0)
