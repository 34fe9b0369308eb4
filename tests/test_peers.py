"""The peers' policies do what their sources say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.instance import Role
from cluster.request import Slo
from router.peers import SPLITWISE_PENDING_TOKENS, Mooncake, PowerOfTwo, RoundRobin, SplitwiseJsq
from router.predictor import Predictor
from router.view import InstanceView
from tests.test_goodput import LATENCY, decode, prefill, request, view_of
from tests.twins import FACTS


def predictor() -> Predictor:
    return Predictor(dict.fromkeys(Role, LATENCY))


def pending(view: InstanceView, tokens: int) -> InstanceView:
    """The instance with a further prompt of so many tokens."""
    view.prompts.add(f"t{len(view.prompts)}", 0.01, 1.0, 0.0, tokens=tokens)
    return view


def test_round_robin_takes_turns_in_each_role() -> None:
    view, policy = view_of(prefill(0), prefill(1), decode(0), decode(1), decode(2)), RoundRobin()
    taken = [policy.decide(request(), view, 0.0) for _ in range(6)]
    assert [d.prefill for d in taken] == [f"prefill-{n}" for n in (0, 1, 0, 1, 0, 1)]
    assert [d.decode for d in taken] == [f"decode-{n}" for n in (0, 1, 2, 0, 1, 2)]


def test_power_of_two_takes_the_fewer_of_two_and_draws_by_the_request() -> None:
    instances = [prefill(0), *(decode(index) for index in range(6))]
    for view in instances:
        view.outstanding_requests = 1 + view.info.engine_index
    policy = PowerOfTwo()
    names = [f"r{number}" for number in range(200)]
    taken = [policy.decide(request(name=name), view_of(*instances), 0.0).decode for name in names]
    # The fullest is the fewer of no two; the emptiest of every pair that it is in: one in three.
    assert "decode-5" not in taken
    assert taken.count("decode-0") == pytest.approx(200 / 3, rel=0.25)
    assert taken == [policy.decide(request(name=name), view_of(*instances), 9.0).decode for name in names]


def test_splitwise_takes_the_shortest_queues_in_tokens() -> None:
    view = view_of(pending(prefill(0), 500), pending(prefill(1), 400), decode(0, 3, tokens=100), decode(1, 1))
    decision = SplitwiseJsq(predictor()).decide(request(), view, 0.0)
    assert (decision.prefill, decision.decode) == ("prefill-1", "decode-1")


def test_splitwise_borrows_from_the_other_pool_and_takes_who_is_mixed_already_first() -> None:
    full = pending(prefill(0), SPLITWISE_PENDING_TOKENS)
    view = view_of(full, decode(0, 1), decode(1, 9))
    assert SplitwiseJsq(predictor()).decide(request(), view, 0.0).prefill == "decode-0"
    view = view_of(full, decode(0, 1), pending(decode(1, 9), 100))
    assert SplitwiseJsq(predictor()).decide(request(), view, 0.0).prefill == "decode-1"


def test_splitwise_runs_both_phases_in_one_place_when_nothing_fits() -> None:
    small = replace(FACTS, kv_capacity_tokens=10)
    instances = [pending(prefill(0), 9000), pending(decode(0), 9001)]
    for view in instances:
        view.info = replace(view.info, facts=small)
    decision = SplitwiseJsq(predictor()).decide(request(), view_of(*instances), 0.0)
    assert (decision.prefill, decision.decode) == ("prefill-0", "prefill-0")


def test_mooncake_takes_the_lowest_ttft_and_the_lowest_time_between_tokens_with_room() -> None:
    crowded = decode(0, 1, tokens=FACTS.kv_capacity_tokens)
    view = view_of(prefill(0, 0.3), prefill(1, 0.2), crowded, decode(1, 5), decode(2, 4))
    decision = Mooncake(predictor()).decide(request(), view, 0.0)
    assert (decision.prefill, decision.decode) == ("prefill-1", "decode-2")
    assert decision.predicted is not None
    assert decision.predicted.ttft_s == pytest.approx(0.2 + 0.11)
    assert decision.predicted.tpot_s == pytest.approx(0.015)


@pytest.mark.parametrize(
    ("slo", "chance"), [(Slo(ttft_s=0.3), 0.0), (Slo(ttft_s=0.32), 1.0), (Slo(tpot_s=0.01), 0.0)]
)
def test_mooncake_rejects_what_it_predicts_to_be_late(slo: Slo, chance: float) -> None:
    view = view_of(prefill(0, 0.2), decode(0))
    predicted = Mooncake(predictor()).decide(request(slo), view, 0.0).predicted
    assert predicted is not None
    assert predicted.chance == chance
