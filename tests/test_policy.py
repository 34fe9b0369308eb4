from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import NoInstance, SpecError
from cluster.instance import Role
from cluster.request import ServeRequest
from cluster.spec import UNSPLIT, parse_spec
from router.policies import POLICIES, make_policy, predictor_of
from router.policy import LeastTokens
from router.view import ClusterView, InstanceView, Reservations
from tests.twins import info_of

REQUEST = ServeRequest(request_id="r", prompt_token_ids=[1, 2, 3], max_tokens=4)


def view_of(role: str, outstanding: list[int]) -> tuple[InstanceView, ...]:
    return tuple(
        InstanceView(info=info_of(f"{role}-{i}", i), outstanding_tokens=n, outstanding_requests=1)
        for i, n in enumerate(outstanding)
    )


tokens = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@given(tokens, tokens, st.randoms(use_true_random=False))
def test_least_tokens_takes_the_least_and_does_not_depend_on_order(
    prefill: list[int], decode: list[int], rng: random.Random
) -> None:
    policy = LeastTokens()
    view = ClusterView(prefill=view_of("prefill", prefill), decode=view_of("decode", decode))
    decision = policy.decide(REQUEST, view, 0.0)
    assert decision.prefill == f"prefill-{prefill.index(min(prefill))}"
    assert decision.decode == f"decode-{decode.index(min(decode))}"
    shuffled = ClusterView(
        prefill=tuple(rng.sample(view.prefill, len(view.prefill))),
        decode=tuple(rng.sample(view.decode, len(view.decode))),
    )
    assert policy.decide(REQUEST, shuffled, 9.0) == decision


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {UNSPLIT}))
@pytest.mark.parametrize("missing", ["prefill", "decode"])
def test_a_policy_without_instances_of_a_role_says_which(name: str, missing: str) -> None:
    some = {"prefill": view_of("prefill", [0]), "decode": view_of("decode", [0])}
    view = ClusterView(**{role: () if role == missing else views for role, views in some.items()})
    with pytest.raises(NoInstance) as caught:
        make_policy(name).decide(REQUEST, view, 0.0)
    assert caught.value.role == missing


@given(st.lists(st.integers(0, 5), max_size=4), st.lists(st.integers(0, 5), max_size=4))
def test_unsplit_takes_the_least_loaded_of_both_roles(prefill: list[int], decode: list[int]) -> None:
    view = ClusterView(prefill=view_of("prefill", prefill), decode=view_of("decode", decode))
    if not prefill + decode:
        with pytest.raises(NoInstance):
            make_policy(UNSPLIT).decide(REQUEST, view, 0.0)
        return
    decision = make_policy(UNSPLIT).decide(REQUEST, view, 0.0)
    chosen = {v.instance_id: v.outstanding_tokens for v in view.prefill + view.decode}
    assert decision.prefill == decision.decode
    assert chosen[decision.prefill] == min(prefill + decode)


def test_a_policy_that_predicts_learns_how_fast_engines_are_where_nothing_says_so() -> None:
    learning = predictor_of(parse_spec({"model": "m", "policy": "goodput"}))
    guess_s, _ = learning.prefill_s(Role.PREFILL, 100)
    for _ in range(20):
        learning.prefilled(Role.PREFILL, 100, 3.0)
    assert learning.prefill_s(Role.PREFILL, 100)[0] > 10 * guess_s
    known = parse_spec({"model": "m", "policy": "goodput", "sim": {"step_s": 0.01}})
    instance = view_of("decode", [0])[0]
    instance.decodes.add("r", 10, 10, 1.0)
    assert predictor_of(known).batch_s(instance) == 0.01


def test_an_unknown_policy_is_refused_with_the_names() -> None:
    with pytest.raises(SpecError, match="least_tokens"):
        make_policy("best")


def test_two_picks_in_a_row_see_each_other() -> None:
    reservations = Reservations()
    with reservations.hold("prefill-0", 10):
        assert reservations.tokens("prefill-0") == 10
        assert reservations.requests("prefill-0") == 1
    assert reservations.outstanding() == {}


def test_a_hold_is_released_once() -> None:
    reservations = Reservations()
    first, second = (reservations.hold("prefill-0", tokens) for tokens in (10, 5))
    first.release()
    first.release()
    assert reservations.outstanding() == {"prefill-0": 5}
    with second:
        second.release()
    assert reservations.outstanding() == {}


def test_a_view_without_the_failed_keeps_a_role_that_would_be_empty() -> None:
    view = ClusterView(prefill=view_of("prefill", [0, 0]), decode=view_of("decode", [0]))
    rest = view.without(frozenset({"prefill-0", "decode-0"}))
    assert [v.instance_id for v in rest.prefill] == ["prefill-1"]
    assert [v.instance_id for v in rest.decode] == ["decode-0"]
