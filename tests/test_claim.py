"""What an attempt reserves, gives back, and tells of how long it took."""

from __future__ import annotations

import pytest

from cluster.instance import InstanceLoad, Role
from cluster.request import ServeRequest, Slo
from router.claim import Claim
from router.fleet import Fleet
from router.goodput import Goodput
from router.predictor import Predictor
from router.view import LastSeen
from tests.twins import info_of

ASKED = ServeRequest(
    request_id="r", prompt_token_ids=[1] * 1000, max_tokens=100, slo=Slo(ttft_s=2.0, tpot_s=0.1)
)


def fleet_of(*instance_ids: str) -> Fleet[LastSeen]:
    fleet: Fleet[LastSeen] = Fleet()
    for index, instance_id in enumerate(instance_ids):
        fleet.join(info_of(instance_id, index), LastSeen(InstanceLoad()))
    return fleet


def claim(fleet: Fleet[LastSeen], predictor: Predictor, now_s: float = 0.0) -> Claim:
    decision = Goodput(predictor).decide(ASKED, fleet, now_s)
    return Claim(fleet, ASKED, decision, lone=None, tokens=1000, now_s=now_s, predictor=predictor)


def test_everything_is_given_back_in_parts() -> None:
    fleet = fleet_of("prefill-0", "decode-0")
    held = claim(fleet, Predictor.learning())
    assert fleet.reservations.outstanding() == {"prefill-0": 1000, "decode-0": 1000}
    assert fleet.pending(Role.PREFILL).bounds == {2.0: 1}
    assert fleet.bounds(Role.DECODE) == {0.1: 1}
    held.prefilled(0.5)
    assert fleet.reservations.outstanding() == {"decode-0": 1000}
    assert fleet.pending(Role.PREFILL).bounds == {}
    held.close(1.0)
    held.close(1.0)
    assert fleet.reservations.outstanding() == {}
    assert fleet.bounds(Role.DECODE) == {}


def test_times_are_learned_where_nothing_else_was_in_the_way() -> None:
    fleet, predictor = fleet_of("prefill-0", "decode-0"), Predictor.learning()
    guess_s, _ = predictor.prefill_s(Role.PREFILL, 1000)
    assert guess_s == pytest.approx(0.11)
    now_s = 0.0
    for _ in range(30):
        held = claim(fleet, predictor, now_s)
        held.prefilled(now_s + 0.8)
        held.decoded(50, 50 * 0.04)
        now_s += 3.0
        held.close(now_s)
    assert predictor.prefill_s(Role.PREFILL, 1000)[0] == pytest.approx(0.8, rel=0.05)
    decode = fleet.view_of("decode-0")
    assert decode is not None
    assert predictor.iteration_s(decode, 1, 1000) == pytest.approx(0.04, rel=0.05)


def test_a_prompt_behind_another_tells_nothing_of_its_own_time() -> None:
    fleet, predictor = fleet_of("prefill-0", "decode-0"), Predictor.learning()
    first, second = claim(fleet, predictor), claim(fleet, predictor)
    guess_s, _ = predictor.prefill_s(Role.PREFILL, 1000)
    second.prefilled(9.0)
    assert predictor.prefill_s(Role.PREFILL, 1000)[0] == guess_s
    first.close(9.0)
    second.close(9.0)
