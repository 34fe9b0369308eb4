"""What an attempt reserves, gives back, and tells of how long it took."""

from __future__ import annotations

from dataclasses import replace

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


def claim(fleet: Fleet[LastSeen], predictor: Predictor, now_s: float = 0.0, name: str = "r") -> Claim:
    asked = replace(ASKED, request_id=name)
    decision = Goodput(predictor).decide(asked, fleet, now_s)
    return Claim(fleet, asked, decision, lone=None, tokens=1000, now_s=now_s, predictor=predictor)


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


def test_prompts_behind_others_tell_what_is_done_in_a_while() -> None:
    fleet, predictor = fleet_of("prefill-0", "decode-0"), Predictor.learning()
    guess_s, _ = predictor.prefill_s(Role.PREFILL, 1000)
    claims = [claim(fleet, predictor, name=f"r{number}") for number in range(8)]
    claims[0].prefilled(0.8)
    # It was alone when it came and not when it was done: its own time says nothing.
    assert predictor.prefill_s(Role.PREFILL, 1000)[0] == guess_s
    for number, held in enumerate(claims[1:], 2):
        held.prefilled(0.8 * number)
        held.close(0.8 * number)
    assert predictor.prefill_s(Role.PREFILL, 1000)[0] == pytest.approx(0.8, rel=0.1)
    claims[0].close(99.0)
