"""The goodput policy: what it prefers, and what holds for any cluster."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.errors import NoInstance
from cluster.instance import Role
from cluster.latency import DecodeCost, LatencyProfile, PrefillCost, ProfiledLatency
from cluster.request import NO_SLO, Handoff, ServeRequest, Slo
from router.goodput import KV_SHARE, Goodput
from router.links import NODE
from router.predictor import Predictor
from router.view import ClusterView, InstanceView
from tests.twins import FACTS, info_of

# 10 ms and 0.1 ms per prompt token; 10 ms and 1 ms per decoding request.
LATENCY = ProfiledLatency(
    LatencyProfile(
        model="m",
        machine="none",
        source="made up",
        prefill=(PrefillCost(base_s=0.01, token_s=1e-4),),
        decode=(DecodeCost(base_s=0.01, request_s=0.001),),
        region={},
    )
)


def policy() -> Goodput:
    return Goodput(Predictor(dict.fromkeys(Role, LATENCY)))


def request(slo: Slo = NO_SLO, prompt: int = 1000, name: str = "r") -> ServeRequest:
    return ServeRequest(request_id=name, prompt_token_ids=[1] * prompt, max_tokens=100, slo=slo)


def prefill(index: int, *works_s: float) -> InstanceView:
    """An instance with such prompts in its queue since 0 s."""
    view = InstanceView(info=info_of(f"prefill-{index}", index))
    for number, work_s in enumerate(works_s):
        view.prompts.add(f"p{number}", work_s, deadline_s=math.inf, now_s=0.0)
    return view


def decode(index: int, requests: int = 0, tpot_s: float = math.inf, tokens: int = 100) -> InstanceView:
    """An instance that decodes so many requests with such a bound."""
    view = InstanceView(info=info_of(f"decode-{index}", index))
    for number in range(requests):
        view.decodes.add(f"d{number}", tokens, 0, tpot_s)
    return view


def view_of(*instances: InstanceView) -> ClusterView:
    return ClusterView(
        prefill=tuple(v for v in instances if v.info.role is Role.PREFILL),
        decode=tuple(v for v in instances if v.info.role is Role.DECODE),
    )


def test_without_bounds_it_takes_the_soonest() -> None:
    view = view_of(prefill(0, 0.5), prefill(1, 0.2, 0.1), prefill(2, 0.4), decode(0, 5), decode(1, 3))
    decision = policy().decide(request(), view, 0.1)
    assert (decision.prefill, decision.decode) == ("prefill-1", "decode-1")
    predicted = decision.predicted
    assert predicted is not None
    assert predicted.queue_s == pytest.approx(0.2)
    assert predicted.ttft_s == pytest.approx(0.2 + 0.11)
    assert predicted.tpot_s == pytest.approx(0.014)
    assert predicted.chance == 1.0


def test_a_slow_instance_is_known_by_its_pace() -> None:
    slow, fast = prefill(0), prefill(1, 0.01)
    for _ in range(20):
        slow.prefill_pace.worked(1.0, 1.9)
    decision = policy().decide(request(), view_of(slow, fast, decode(0)), 0.0)
    assert decision.prefill == "prefill-1"


@pytest.mark.parametrize("error", [0.997, 1.0, 1.003])
def test_instances_that_are_as_fast_share_the_requests(error: float) -> None:
    """Where a batch of any size takes as long, the noise of a learned factor is no reason to fill one."""
    flat = LatencyProfile(
        model="m",
        machine="none",
        source="made up",
        prefill=(PrefillCost(base_s=0.01, token_s=1e-4),),
        decode=(DecodeCost(base_s=0.01),),
        region={},
    )
    policy = Goodput(Predictor(dict.fromkeys(Role, ProfiledLatency(flat))))
    instances = decode(0), decode(1)
    for _ in range(50):
        instances[1].decode_pace.learn(0.01, 0.01 * error)
    for number in range(20):
        chosen = policy.decide(request(), view_of(prefill(0), *instances), 0.0).decode
        one = next(one for one in instances if one.instance_id == chosen)
        one.decodes.add(f"d{number}", 100, 0, math.inf)
    assert [len(one.decodes) for one in instances] == [10, 10]


def test_a_loose_request_leaves_the_light_instance_to_tight_ones() -> None:
    """The light one's 17 have 27 ms of their 40; each further one takes 1 ms."""
    tight, loose = Slo(tpot_s=0.04), Slo(tpot_s=0.1)
    full, light = decode(0, 40, loose.tpot_s), decode(1, 17, tight.tpot_s)
    view = view_of(prefill(0), full, light)
    assert policy().decide(request(tight), view, 0.0).decode == "decode-1"
    assert policy().decide(request(loose), view, 0.0).decode == "decode-0"
    # Where nobody is tight, it goes where it is fastest.
    easy = view_of(prefill(0), full, decode(1, 17, loose.tpot_s))
    assert policy().decide(request(loose), easy, 0.0).decode == "decode-1"


def test_what_it_costs_the_others_is_told() -> None:
    """39 ms of 40: one more costs each of the 29 some of its chance."""
    tight = view_of(prefill(0), decode(0, 29, 0.04))
    easy = view_of(prefill(0), decode(0, 29, math.inf))
    found, nothing = (policy().decide(request(), view, 0.0).predicted for view in (tight, easy))
    assert found is not None
    assert nothing is not None
    assert found.harm > 1
    assert nothing.harm == 0


def test_an_idle_instance_is_used_however_tight_the_bounds_of_the_others() -> None:
    """11 ms of 12 with itself alone: from nothing to one, nobody loses anything that is there."""
    tight = 0.012
    busy = [decode(index, 1, tight) for index in range(3)]
    for one in busy:
        for _ in range(100):
            one.decode_pace.learn(0.01, 0.01)
    idle = decode(3)
    decision = policy().decide(request(Slo(tpot_s=0.1)), view_of(prefill(0), *busy, idle), 0.0)
    assert decision.decode == "decode-3"
    assert decision.predicted is not None
    assert decision.predicted.harm == 0


def test_the_hand_over_belongs_to_the_answer_unless_its_first_token_comes_after_it() -> None:
    predictor = Predictor.learning()
    view = view_of(prefill(0), decode(0, 3))
    asked = request()
    output = predictor.output_tokens(asked)
    before = Goodput(predictor).decide(asked, view, 0.0).predicted
    for seconds in (0.2, 0.2, 90.0):  # one that stalled is no rule
        predictor.hand_overs.came(NODE, 1000, seconds)
    assert before is not None
    hand_over_s = predictor.hand_overs.seconds(NODE, 1000)
    assert 0.2 < hand_over_s < 0.6
    extra_s = hand_over_s - before.tpot_s
    for handoff, more_s in ((Handoff.TOKENS, extra_s), (Handoff.KV_ONLY, 0.0)):
        predicted = Goodput(predictor).decide(replace(asked, handoff=handoff), view, 0.0).predicted
        assert predicted is not None
        assert predicted.tpot_s == pytest.approx(before.tpot_s + more_s / (output - 1))


def test_a_model_of_the_times_says_what_a_hand_over_takes() -> None:
    predictor = Predictor(dict.fromkeys(Role, LATENCY))
    predictor.hand_overs.came(NODE, 1000, 0.2)
    assert predictor.delay_s(NODE, 1000, 0.01) == 0.0


def test_a_prompt_may_be_computed_on_an_idle_instance_of_the_other_pool() -> None:
    """60 ms of it are spread over answers of a hundred tokens, of those who are not there yet as well."""
    view = view_of(prefill(0, 5.0), decode(0, 30, 0.05, tokens=10), decode(1))
    decision = policy().decide(request(Slo(ttft_s=0.1, tpot_s=0.05), prompt=500), view, 0.0)
    assert decision.prefill == "decode-1"
    assert decision.predicted is not None
    assert decision.predicted.harm < 0.01


def test_who_wants_one_token_is_not_judged_by_the_decodes() -> None:
    crowded = view_of(prefill(0), decode(0, 60, 0.02))
    asked = request(Slo(ttft_s=1.0, tpot_s=0.012))
    several, one = (policy().decide(replace(asked, max_tokens=n), crowded, 0.0).predicted for n in (9, 1))
    assert several is not None
    assert one is not None
    assert several.chance < 0.01
    assert one.chance > 0.99


def test_no_role_without_an_instance() -> None:
    for some, missing in ((prefill(0), "decode"), (decode(0), "prefill")):
        with pytest.raises(NoInstance, match=missing):
            policy().decide(request(), view_of(some), 0.0)


slos = st.builds(
    Slo, ttft_s=st.sampled_from([0.05, 0.5, math.inf]), tpot_s=st.sampled_from([0.012, 0.05, math.inf])
)
prefills = st.lists(st.lists(st.floats(0.01, 1), max_size=4), min_size=1, max_size=6)
decodes = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from([0.015, 0.05, math.inf]), st.integers(1, 2000)),
    min_size=1,
    max_size=6,
)


@given(slos, prefills, decodes, st.randoms(use_true_random=False))
def test_a_decision_depends_on_the_instances_and_not_on_their_order(
    slo: Slo, works: list[list[float]], batches: list[tuple[int, float, int]], rng: object
) -> None:
    instances = [
        *(prefill(index, *work) for index, work in enumerate(works)),
        *(decode(index, *batch) for index, batch in enumerate(batches)),
    ]
    decision = policy().decide(request(slo), view_of(*instances), 0.05)
    shuffled = list(instances)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    again = policy().decide(request(slo, name="other"), view_of(*shuffled), 0.05)
    assert (decision.prefill, decision.decode) == (again.prefill, again.decode)
    assert decision.predicted == again.predicted


@given(slos, decodes)
@example(Slo(ttft_s=0.05, tpot_s=0.012), [(39, 0.015, 1569), (39, 0.015, 1)])
def test_nobody_is_sent_where_there_is_no_room(slo: Slo, batches: list[tuple[int, float, int]]) -> None:
    instances = [decode(index, *batch) for index, batch in enumerate(batches)]
    room = {
        v.instance_id
        for v in instances
        if v.decodes.peak_tokens + 1100 <= KV_SHARE * FACTS.kv_capacity_tokens
    }
    decision = policy().decide(request(slo), view_of(prefill(0), *instances), 0.0)
    assert decision.decode in room or not room


def test_instances_without_facts_have_room() -> None:
    bare = decode(0)
    bare.info = replace(bare.info, facts=None)
    assert policy().decide(request(), view_of(prefill(0), bare), 0.0).decode == "decode-0"
