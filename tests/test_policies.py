"""What holds for every policy, in any cluster."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.instance import InstanceLoad, InstanceState, Role
from cluster.prefix_hash import chain_hashes, span_tokens
from cluster.request import ServeRequest, Slo
from cluster.wire import Blocks
from router.fleet import Fleet
from router.policies import POLICIES, make_policy
from router.predictor import Predictor
from router.view import LastSeen
from tests.test_goodput import LATENCY
from tests.twins import FACTS, info_of

NAMES = sorted(POLICIES)
PROMPT = list(range(1000))

instances = st.lists(
    st.tuples(
        st.sampled_from(list(Role)),
        st.sampled_from([InstanceState.READY, InstanceState.READY, InstanceState.DRAINING]),
        st.lists(st.tuples(st.floats(0.01, 1), st.sampled_from([0.3, 5.0])), max_size=3),
        st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([0.015, 0.1])), max_size=5),
        st.integers(0, 6),
    ),
    max_size=8,
)
slos = st.builds(Slo, ttft_s=st.sampled_from([0.1, 2.0, math.inf]), tpot_s=st.sampled_from([0.015, math.inf]))


def fleet_of(facts: list[tuple[Role, InstanceState, list[tuple[float, float]], list[tuple[int, float]], int]],
             order: list[int]) -> Fleet[LastSeen]:  # fmt: skip
    """A fleet of two that are READY and those, which join in an order of their own."""
    both = [(role, InstanceState.READY, [], [], 0) for role in Role]
    every = [*both, *facts]
    fleet: Fleet[LastSeen] = Fleet(with_prefixes=True)
    for index in order:
        role, state, prompts, decodes, cached = every[index]
        name = f"{role}-{index}"
        fleet.join(replace(info_of(name, index), state=state), LastSeen(InstanceLoad()))
        view = fleet.view_of(name)
        assert view is not None
        for number, (work_s, bound_s) in enumerate(prompts):
            view.prompts.add(f"p{number}", work_s, bound_s, 0.0, tokens=100, bound_s=bound_s)
        for number, (tokens, bound_s) in enumerate(decodes):
            view.decodes.add(f"d{number}", tokens, 50, bound_s)
        fleet.reservations.add(name, 100 * (len(prompts) + len(decodes)), len(prompts) + len(decodes))
        block_size = span_tokens(FACTS.fingerprint.block_size_tokens)
        fleet.blocks_changed(name, Blocks(stored=list(chain_hashes(PROMPT, block_size))[:cached]))
    return fleet


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(facts=instances, slo=slos, seed=st.integers(0, 99))
def test_a_pick_is_ready_and_depends_on_nothing_but_the_cluster(
    name: str,
    facts: list[tuple[Role, InstanceState, list[tuple[float, float]], list[tuple[int, float]], int]],
    slo: Slo,
    seed: int,
) -> None:
    """1: READY. 2: the same for the same cluster, however its instances came. 3: nothing is changed by it."""
    request = ServeRequest(request_id=f"r{seed}", prompt_token_ids=PROMPT, max_tokens=50, slo=slo)
    order = list(range(2 + len(facts)))
    shuffled = Random(seed).sample(order, len(order))
    decisions = []
    for fleet in (fleet_of(facts, order), fleet_of(facts, shuffled)):
        before = fleet.snapshot()
        policy = make_policy(name, Predictor(dict.fromkeys(Role, LATENCY)))
        decision = policy.decide(request, fleet, 0.05)
        for pick in (decision.prefill, decision.decode):
            member = fleet.get(pick)
            assert member is not None
            assert member.info.state is InstanceState.READY
        decisions.append(decision)
        after = fleet.snapshot()
        for role in Role:
            for one, other in zip(before.of(role), after.of(role), strict=True):
                assert one.decodes.bounds == other.decodes.bounds
                assert list(one.prompts) == list(other.prompts)
                assert one.outstanding_tokens == other.outstanding_tokens
    assert decisions[0] == decisions[1]
