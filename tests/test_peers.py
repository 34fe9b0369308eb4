"""The peers' policies do what their sources say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.instance import Role
from cluster.prefix_hash import chain_hashes, span_tokens
from cluster.request import Slo
from cluster.wire import Blocks
from router.peers import SPLITWISE_PENDING_TOKENS, PowerOfTwo, RoundRobin, SplitwiseJsq
from router.predicting_peers import LlmdScorers, Mooncake
from router.predictor import Predictor
from router.prefix_index import Prefixes
from router.prefix_peers import DynamoKv, PrefixAffinity
from router.view import ClusterView, InstanceView
from tests.test_goodput import LATENCY, decode, prefill, request, view_of
from tests.twins import FACTS, info_of


def predictor() -> Predictor:
    return Predictor(dict.fromkeys(Role, LATENCY))


def cached_on(view: ClusterView, instance_id: str, tokens: int) -> ClusterView:
    """The view with so many leading tokens of `request()` in an instance's cache."""
    prefixes = Prefixes()
    names = chain_hashes(
        request().prompt_token_ids[:tokens], span_tokens(FACTS.fingerprint.block_size_tokens)
    )
    prefixes.changed(info_of(instance_id), Blocks(stored=list(names)))
    return replace(view, prefixes=prefixes)


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


def test_mooncake_counts_what_is_cached() -> None:
    view = cached_on(view_of(prefill(0, 0.05), prefill(1), decode(0)), "prefill-0", 896)
    decision = Mooncake(predictor()).decide(request(), view, 0.0)
    assert decision.prefill == "prefill-0"
    assert decision.predicted is not None
    assert decision.predicted.cached_tokens == 896
    assert decision.predicted.ttft_s == pytest.approx(0.05 + 0.0204)


def test_prefix_affinity_takes_the_longest_match_that_is_not_overloaded() -> None:
    instances = [prefill(index) for index in range(8)]
    view = cached_on(view_of(*instances, decode(0)), "prefill-5", 256)
    assert PrefixAffinity().decide(request(), view, 0.0).prefill == "prefill-5"
    instances[5].outstanding_requests = 9  # more than two standard deviations above the mean
    assert PrefixAffinity().decide(request(), view, 0.0).prefill == "prefill-0"
    for instance in instances:
        instance.outstanding_requests = 9
    assert PrefixAffinity().decide(request(), view, 0.0).prefill == "prefill-5"
    instances[3].outstanding_requests = 26  # out of balance
    instances[2].outstanding_requests = 8
    assert PrefixAffinity().decide(request(), view, 0.0).prefill == "prefill-2"


def test_dynamo_counts_the_tokens_to_prefill_and_the_decoding_ones() -> None:
    first, second = pending(prefill(0), 900), pending(prefill(1), 500)
    view = cached_on(view_of(first, second, decode(0, 3), decode(1, 2)), "prefill-0", 512)
    decision = DynamoKv(predictor()).decide(request(), view, 0.0)
    assert (decision.prefill, decision.decode) == ("prefill-0", "decode-1")
    assert decision.predicted is not None
    assert decision.predicted.cached_tokens == 512
    view = cached_on(view, "prefill-0", 256)
    assert DynamoKv(predictor()).decide(request(), view, 0.0).prefill == "prefill-1"


def test_llmd_draws_the_tightest_that_keeps_the_bound_most_often() -> None:
    # 0.11 s alone, bound 0.5 s: room of 0.39, 0.09 and none.
    view = view_of(prefill(0), prefill(1, 0.3), prefill(2, 0.6), decode(0))
    policy, slo = LlmdScorers(predictor()), Slo(ttft_s=0.5, tpot_s=1.0)
    names = [f"r{number}" for number in range(1000)]
    taken = [policy.decide(request(slo, name=name), view, 0.0).prefill for name in names]
    assert taken.count("prefill-2") == pytest.approx(10, abs=9)
    # Weights of 1 and 77.15.
    assert taken.count("prefill-0") == pytest.approx(990 / 78.15, abs=10)


def test_llmd_takes_the_nearest_miss_and_sheds_low_priority() -> None:
    view = view_of(prefill(0, 0.7), prefill(1, 0.6), decode(0, 3, tpot_s=0.012), decode(1, 5))
    policy, slo = LlmdScorers(predictor()), Slo(ttft_s=0.5, tpot_s=0.016)
    decision = policy.decide(request(slo), view, 0.0)
    # With it, decode-0 takes 14 ms; those that are there need 12.
    assert (decision.prefill, decision.decode) == ("prefill-1", "decode-1")
    assert decision.predicted is not None
    assert decision.predicted.chance == 1.0
    decision = policy.decide(replace(request(slo), priority=1), view, 0.0)
    assert decision.predicted is not None
    assert decision.predicted.chance == 0.0


def test_llmd_without_bounds_draws_evenly() -> None:
    view = view_of(prefill(0), prefill(1, 0.3), decode(0))
    names = [f"r{number}" for number in range(400)]
    taken = [LlmdScorers(predictor()).decide(request(name=name), view, 0.0).prefill for name in names]
    assert taken.count("prefill-0") == pytest.approx(200, abs=50)
