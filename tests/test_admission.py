"""Who is rejected, with what."""

from __future__ import annotations

import math
import pickle

import pytest

from cluster.errors import Rejected
from cluster.request import NO_SLO, ServeRequest, Slo
from router.admission import LEAST_CHANCE, require_chance
from router.predictor import Prediction


def predicted(chance: float, ttft_s: float = 0.5, tpot_s: float = 0.02) -> Prediction:
    return Prediction(
        queue_s=0.1, work_s=0.1, ttft_s=ttft_s, tpot_s=tpot_s, stage_s=0.2, iteration_s=0.02,
        output_tokens=200, chance=chance,
    )  # fmt: skip


def request(slo: Slo) -> ServeRequest:
    return ServeRequest(request_id="r", prompt_token_ids=[1], max_tokens=9, slo=slo)


def test_a_chance_is_given() -> None:
    require_chance(request(NO_SLO), None)
    require_chance(request(Slo(ttft_s=0.4)), predicted(LEAST_CHANCE))


def test_a_rejection_says_what_would_be_and_when_to_come_back() -> None:
    with pytest.raises(Rejected) as caught:
        require_chance(request(Slo(ttft_s=0.3)), predicted(0.01, ttft_s=4.7))
    error = caught.value
    assert (error.http_status, error.reason, error.retry_after_s) == (429, "rejected-saturated", 5)
    assert str(error) == (
        "too busy for this request's SLO: TTFT would be 4700 ms, its bound is 300 ms; try again in 5 s"
    )
    again = pickle.loads(pickle.dumps(error))
    assert again.facts == error.facts
    assert again.tpot_bound_s == math.inf


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
        require_chance(request(slo), predicted(0.0, **found))
    assert caught.value.retry_after_s == retry_s
