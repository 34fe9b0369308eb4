"""Who has refused a request, and what is left of its time."""

from __future__ import annotations

import math

import pytest

from cluster.errors import InstanceBusy
from cluster.request import NO_SLO, ServeRequest, Slo
from router.offers import Offers


def offers(slo: Slo, longest_s: float = 120.0) -> Offers:
    return Offers(ServeRequest(request_id="r", prompt_token_ids=[1], max_tokens=2, slo=slo), longest_s, 10.0)


def busy(instance: str, wait_s: float) -> InstanceBusy:
    return InstanceBusy(instance=instance, wait_s=wait_s)


def test_it_waits_for_the_first_to_have_room_and_asks_that_one_again() -> None:
    made = offers(Slo(ttft_s=4.0))
    assert made.refused == frozenset()
    made.add(busy("a", 3.0), 10.0)
    made.add(busy("b", 1.0), 10.5)
    assert (made.refused, made.room_s, made.count) == ({"a", "b"}, 11.5, 2)
    made.again()
    assert made.refused == {"a"}
    made.add(busy("b", 2.5), 11.5)
    assert (made.room_s, made.count) == (13.0, 3)


def test_what_is_left_of_a_bound() -> None:
    made = offers(Slo(ttft_s=4.0, tpot_s=0.1))
    assert made.left(Slo(ttft_s=4.0, tpot_s=0.1), 11.0) == Slo(ttft_s=3.0, tpot_s=0.1)
    assert made.left(Slo(ttft_s=4.0, tpot_s=0.1), 99.0) == Slo(ttft_s=0.0, tpot_s=0.1)
    assert offers(NO_SLO).left(NO_SLO, 11.0) == NO_SLO


def test_without_a_bound_the_longest_prompt_is_one() -> None:
    made = offers(NO_SLO, longest_s=2.0)
    assert made.give_up_s == 12.0
    made.add(busy("a", 5.0), 10.0)
    error = made.rejection(10.0)
    assert (error.ttft_s, error.ttft_bound_s, error.retry_after_s) == (5.0, 2.0, 3)
    assert "TTFT would be 5000 ms, its bound is 2000 ms; try again in 3 s" in str(error)


def test_a_rejection_after_a_wait_says_how_long_it_was() -> None:
    made = offers(Slo(ttft_s=4.0))
    made.add(busy("a", 1.0), 10.0)
    assert made.rejection(14.0).ttft_s == pytest.approx(4.0)
    assert made.rejection(14.0).retry_after_s == 1
    assert made.rejection(14.0).tpot_bound_s == math.inf
