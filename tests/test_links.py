"""The way between two instances: what it is learned to take, and which pair is taken for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.instance import Role
from cluster.latency import ConstantLatency
from cluster.request import Handoff, ServeRequest, Slo
from router.choice import HARM_ERROR, INDIFFERENT, PATIENCE, Choice, best_pair
from router.goodput import Goodput
from router.links import NETWORK, NODE, NONE, HandOvers, link_between
from router.policy import Decision
from router.predictor import Predictor
from router.view import ClusterView, InstanceView
from tests.twins import info_of

PROMPT = 1000


def at(instance_id: str, node: str, requests: int = 0) -> InstanceView:
    """An instance on a node; it decodes so many requests."""
    index = int(instance_id.partition("-")[2])
    view = InstanceView(info=replace(info_of(instance_id, index), node=node))
    for number in range(requests):
        view.decodes.add(f"d{number}", 100, 100, 0.05)
    return view


def view_of(*instances: InstanceView) -> ClusterView:
    of = {role: tuple(v for v in instances if v.info.role is role) for role in Role}
    return ClusterView(prefill=of[Role.PREFILL], decode=of[Role.DECODE])


def policy_that_saw(near_s: float, far_s: float, *, learns: bool = False) -> Goodput:
    """10 ms an iteration and 1 ms for each prompt token; hand-overs of prompts took so long."""
    model = ConstantLatency(step_s=0.01, prefill_s_per_token=0.0001)
    predictor = Predictor.learning() if learns else Predictor(dict.fromkeys(Role, model))
    for tokens in (PROMPT // 2, 2 * PROMPT):
        predictor.hand_overs.came(NODE, tokens, near_s * tokens / PROMPT)
        predictor.hand_overs.came(NETWORK, tokens, far_s * tokens / PROMPT)
    return Goodput(predictor)


def decide(policy: Goodput, view: ClusterView, handoff: Handoff = Handoff.TOKENS) -> Decision:
    asked = ServeRequest(
        request_id="r",
        prompt_token_ids=[1] * PROMPT,
        max_tokens=100,
        slo=Slo(ttft_s=5.0, tpot_s=0.05),
        handoff=handoff,
    )
    return policy.decide(asked, view, 0.0)


def test_a_hand_over_takes_what_its_tokens_take_on_its_way() -> None:
    seen = HandOvers()
    assert seen.seconds(NETWORK, 100) == 0.0
    for tokens in (100, 300, 200):
        seen.came(NETWORK, tokens, 0.01 + 0.001 * tokens)
    assert seen.seconds(NETWORK, 1000) == pytest.approx(1.01)
    # Never seen: as on the other way, so it costs nothing to try it.
    assert seen.seconds(NODE, 1000) == pytest.approx(1.01)
    assert seen.more_s(NETWORK, 1000) == 0.0
    for tokens in (100, 300, 200):
        seen.came(NODE, tokens, 0.01)
    assert seen.more_s(NETWORK, 1000) == pytest.approx(1.0, rel=0.02)
    assert seen.seconds(NONE, 1000) == 0.0


def test_one_that_stalled_is_no_rule() -> None:
    seen = HandOvers()
    for _ in range(50):
        seen.came(NODE, 100, 0.1)
    seen.came(NODE, 100, 90.0)
    assert seen.seconds(NODE, 100) < 0.12


def test_a_way_that_was_crowded_and_that_nobody_takes_is_believed_again() -> None:
    seen = HandOvers()
    for _ in range(20):
        seen.came(NODE, 100, 0.1)
        seen.came(NETWORK, 100, 2.1)
    assert seen.more_s(NETWORK, 100) == pytest.approx(2.0)
    for _ in range(200):
        seen.came(NODE, 100, 0.1)
    assert seen.more_s(NETWORK, 100) == pytest.approx(1.0)
    seen.came(NETWORK, 100, 2.1)
    assert seen.more_s(NETWORK, 100) == pytest.approx(2.0)


def test_the_way_is_named_by_the_nodes() -> None:
    a, b, c = at("prefill-0", "x"), at("decode-0", "x"), at("decode-1", "y")
    assert (link_between(a, a), link_between(a, b), link_between(a, c)) == (NONE, NODE, NETWORK)


@pytest.mark.parametrize("learns", [False, True])
def test_of_pairs_that_are_as_good_the_near_one_is_taken(learns: bool) -> None:
    """The idlest decode instance is on the other node, by one request."""
    view = view_of(at("prefill-0", "x"), at("prefill-1", "y"), at("decode-0", "x", 6), at("decode-1", "z", 5))
    decision = decide(policy_that_saw(0.01, 0.5, learns=learns), view)
    assert (decision.prefill, decision.decode, decision.link) == ("prefill-0", "decode-0", NODE)
    # Where both ways take as long, it is the near one too: others may need the network.
    decision = decide(policy_that_saw(0.01, 0.01, learns=learns), view)
    assert decision.link == (NETWORK if decision.decode == "decode-1" else NODE)


def test_a_near_one_that_keeps_no_bound_is_not_taken() -> None:
    crowded = at("decode-0", "x", 6)
    crowded.decodes.add("huge", 10**9, 100, 0.05)  # no room for another
    view = view_of(at("prefill-0", "x"), crowded, at("decode-1", "y", 5))
    decision = decide(policy_that_saw(0.01, 0.5), view)
    assert (decision.decode, decision.link) == ("decode-1", NETWORK)
    assert decision.predicted is not None
    # 490 ms more than within a node, over the tokens that come after the first.
    output = decision.predicted.output_tokens
    assert decision.predicted.tpot_s == pytest.approx(0.01 + 0.49 / (output - 1))
    late = decide(policy_that_saw(0.01, 0.5), view, Handoff.KV_ONLY).predicted
    assert late is not None
    # Its first token waits for it.
    assert late.tpot_s == pytest.approx(0.01)
    assert late.ttft_s == pytest.approx(decision.predicted.ttft_s + 0.49)


def test_a_pair_on_another_node_is_found() -> None:
    """The soonest prefill instance has no decode instance beside it; the next one has."""
    busy = at("prefill-1", "y")
    busy.prompts.add("p", 0.02, deadline_s=9.0, now_s=0.0)
    view = view_of(at("prefill-0", "x"), busy, at("decode-0", "z", 3), at("decode-1", "y", 3))
    slow = policy_that_saw(0.01, 30.0)  # no bound can be kept over the network
    decision = decide(slow, view)
    assert (decision.prefill, decision.decode, decision.link) == ("prefill-1", "decode-1", NODE)


chances = st.floats(0, 1)
nodes = st.integers(0, 3)


@given(
    st.lists(st.tuples(chances, nodes), min_size=1, max_size=8),
    st.lists(st.tuples(chances, nodes), min_size=1, max_size=8),
    chances,
)
def test_no_pair_is_better_than_the_one_that_is_found(
    prefills: list[tuple[float, int]], decodes: list[tuple[float, int]], kept_far: float
) -> None:
    """Against all pairs, within what the search calls indifferent."""
    first = [at(f"prefill-{i}", str(node)) for i, (_, node) in enumerate(prefills)]
    second = [at(f"decode-{i}", str(node)) for i, (_, node) in enumerate(decodes)]
    own = {v.instance_id: chance for v, (chance, _) in zip(first + second, prefills + decodes, strict=True)}

    def weigh(instance: InstanceView, link: str = NODE) -> Choice:
        chance = own[instance.instance_id] * (kept_far if link == NETWORK else 1.0)
        return Choice(instance, chance, 0.0, 1 - chance, 0.0)

    def kept(a: InstanceView, b: InstanceView) -> float:
        return weigh(a).own * weigh(b, link_between(a, b)).own

    by_ttft = sorted(first, key=lambda v: -own[v.instance_id])
    nearest = max(second, key=lambda v: own[v.instance_id])
    view = view_of(*first, *second)
    found = best_pair(
        (weigh(by_ttft[0]), weigh(nearest, NETWORK)),
        weigh(nearest),
        ((one, view.beside(one, Role.DECODE)) for one in by_ttft),
        weigh,
        weigh,
        10,
    )
    if link_between(by_ttft[0], nearest) != NETWORK:
        return  # then there is nothing to look for
    reached = kept(found[0].instance, found[1].instance)
    if not any(view.beside(one, Role.DECODE) for one in first):
        assert found == (weigh(by_ttft[0]), weigh(nearest))  # what all have to take is no matter
        return
    best = max(kept(a, b) for a in first for b in second)
    slack = INDIFFERENT * (1 + 2 ** (len(first) / PATIENCE)) + HARM_ERROR * (1 - reached)
    assert reached >= best - slack
